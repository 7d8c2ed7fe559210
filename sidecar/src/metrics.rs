//! What the sidecar tells Prometheus: a closed vocabulary.
//!
//! Names end in their unit; labels come from enums and from the stable codes of `failure`, never from free text.

use std::time::Duration;

use faaswap_protocol::Timing;
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use crate::broker::FunctionState;

/// Inference requests by protocol and outcome: `ok` or a failure's code.
pub const REQUESTS: &str = "faaswap_sidecar_requests";
/// From a request's arrival until its answer was there, by protocol.
pub const REQUEST_SECONDS: &str = "faaswap_sidecar_request_seconds";
/// The broker's share spent waiting.
pub const QUEUE_SECONDS: &str = "faaswap_sidecar_queue_seconds";
/// The broker's share spent running, swap-in included.
pub const RUN_SECONDS: &str = "faaswap_sidecar_run_seconds";
/// For answers whose weights were not there: how long they were still being copied.
pub const SWAP_SECONDS: &str = "faaswap_sidecar_swap_seconds";
/// Answers, by whether the weights were there already.
pub const ANSWERS: &str = "faaswap_sidecar_answers";
/// Requests that wait for the broker or for room in the slab.
pub const REQUESTS_WAITING: &str = "faaswap_sidecar_requests_waiting";
/// 1 for the state that the function is in.
pub const FUNCTION_STATE: &str = "faaswap_sidecar_function_state";
/// Requests passed to the handler, by outcome: `ok` or a failure's code.
pub const UPSTREAM_REQUESTS: &str = "faaswap_sidecar_upstream_requests";

/// Requests to the function's front by status and method; of-watchdog's name for them.
pub const FRONT_REQUESTS: &str = "http_requests";
/// How long they took.
pub const FRONT_SECONDS: &str = "http_request_duration_seconds";
/// How many are in work.
pub const FRONT_IN_FLIGHT: &str = "http_requests_in_flight";

/// Upper bounds of the latency buckets in seconds.
const SECONDS: [f64; 14] = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0];
const STATES: [&str; 7] = ["connecting", "fetching", "unfetched", "uploading", "preparing", "ready", "rejected"];

/// How a client speaks to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the variants are label values")]
pub enum Protocol {
    /// Open Inference Protocol over HTTP.
    http,
    /// Open Inference Protocol over gRPC.
    grpc,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    protocol: Protocol,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByProtocol {
    protocol: Protocol,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByOutcome {
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Residence {
    resident: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct State {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByStatus {
    code: u16,
    method: &'static str,
}

/// What of-watchdog counts, by its names.
#[derive(Clone, Debug)]
pub struct Front {
    requests: Family<ByStatus, Counter>,
    seconds: Family<ByStatus, Histogram, fn() -> Histogram>,
    in_flight: Gauge,
}

impl Default for Front {
    fn default() -> Self {
        Self {
            requests: Family::default(),
            seconds: Family::new_with_constructor(histogram),
            in_flight: Gauge::default(),
        }
    }
}

/// A request that is in work until this is dropped.
#[derive(Debug)]
pub struct Observed<'a>(&'a Front);

impl Front {
    pub(crate) fn enter(&self) -> Observed<'_> {
        self.in_flight.inc();
        Observed(self)
    }
}

impl Observed<'_> {
    pub(crate) fn done(self, method: &http::Method, code: u16, took: Duration) {
        const METHODS: [&str; 7] = ["DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"];
        // A client may invent methods; a label may not.
        let method = METHODS.into_iter().find(|known| *known == method.as_str()).unwrap_or("OTHER");
        let labels = ByStatus { code, method };
        self.0.requests.get_or_create(&labels).inc();
        self.0.seconds.get_or_create(&labels).observe(took.as_secs_f64());
    }
}

impl Drop for Observed<'_> {
    fn drop(&mut self) {
        self.0.in_flight.dec();
    }
}

/// The metrics of one sidecar.
#[derive(Debug)]
pub struct Metrics {
    pub(crate) front: Front,
    registry: Registry,
    requests: Family<Outcome, Counter>,
    request_seconds: Family<ByProtocol, Histogram, fn() -> Histogram>,
    queue_seconds: Histogram,
    run_seconds: Histogram,
    swap_seconds: Histogram,
    answers: Family<Residence, Counter>,
    waiting: Gauge,
    state: Family<State, Gauge>,
    upstream: Family<ByOutcome, Counter>,
}

fn histogram() -> Histogram {
    Histogram::new(SECONDS)
}

impl Default for Metrics {
    fn default() -> Self {
        let mut metrics = Self {
            front: Front::default(),
            registry: Registry::default(),
            requests: Family::default(),
            request_seconds: Family::new_with_constructor(histogram),
            queue_seconds: histogram(),
            run_seconds: histogram(),
            swap_seconds: histogram(),
            answers: Family::default(),
            waiting: Gauge::default(),
            state: Family::default(),
            upstream: Family::default(),
        };
        let registry = &mut metrics.registry;
        registry.register(REQUESTS, "Inference requests by outcome", metrics.requests.clone());
        registry.register(REQUEST_SECONDS, "From arrival to answer", metrics.request_seconds.clone());
        registry.register(QUEUE_SECONDS, "Waiting at the broker", metrics.queue_seconds.clone());
        registry.register(RUN_SECONDS, "Running, swap-in included", metrics.run_seconds.clone());
        registry.register(SWAP_SECONDS, "Weights still being copied", metrics.swap_seconds.clone());
        registry.register(ANSWERS, "Answers by residence of the weights", metrics.answers.clone());
        registry.register(REQUESTS_WAITING, "Requests waiting for the broker or for room", metrics.waiting.clone());
        registry.register(FUNCTION_STATE, "1 for the state of the function", metrics.state.clone());
        registry.register(UPSTREAM_REQUESTS, "Requests passed to the handler", metrics.upstream.clone());
        registry.register(FRONT_REQUESTS, "Requests to the function", metrics.front.requests.clone());
        registry.register(FRONT_SECONDS, "How long requests to the function took", metrics.front.seconds.clone());
        registry.register(FRONT_IN_FLIGHT, "Requests to the function in work", metrics.front.in_flight.clone());
        metrics
    }
}

impl Metrics {
    pub(crate) fn answered(&self, protocol: Protocol, took: Duration, timing: &Timing) {
        self.requests.get_or_create(&Outcome { protocol, outcome: "ok" }).inc();
        self.request_seconds.get_or_create(&ByProtocol { protocol }).observe(took.as_secs_f64());
        self.queue_seconds.observe(timing.queued.as_secs_f64());
        self.run_seconds.observe(timing.ran.as_secs_f64());
        if !timing.was_resident {
            self.swap_seconds.observe(timing.swapping.as_secs_f64());
        }
        self.answers.get_or_create(&Residence { resident: timing.was_resident }).inc();
    }

    pub(crate) fn failed(&self, protocol: Protocol, took: Duration, code: &'static str) {
        self.requests.get_or_create(&Outcome { protocol, outcome: code }).inc();
        self.request_seconds.get_or_create(&ByProtocol { protocol }).observe(took.as_secs_f64());
    }

    pub(crate) fn passed_upstream(&self, outcome: &'static str) {
        self.upstream.get_or_create(&ByOutcome { outcome }).inc();
    }

    /// Everything as text; what is a state rather than a count is read now.
    pub fn text(&self, state: Option<&FunctionState>, waiting: usize) -> Result<String, std::fmt::Error> {
        self.waiting.set(i64::try_from(waiting).unwrap_or(i64::MAX));
        let now = state.map_or("connecting", FunctionState::name);
        for state in STATES {
            self.state.get_or_create(&State { state }).set(i64::from(state == now));
        }
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_shown_under_its_name() {
        let metrics = Metrics::default();
        metrics.answered(Protocol::http, Duration::from_millis(1), &Timing::default());
        metrics.failed(Protocol::grpc, Duration::from_millis(1), "not_ready");
        metrics.passed_upstream("ok");
        metrics.front.enter().done(&http::Method::GET, 200, Duration::from_millis(1));
        metrics.front.enter().done(&http::Method::from_bytes(b"BREW").unwrap(), 405, Duration::ZERO);
        let text = metrics.text(None, 3).unwrap();
        let names = [
            FRONT_REQUESTS,
            FRONT_SECONDS,
            FRONT_IN_FLIGHT,
            REQUESTS,
            REQUEST_SECONDS,
            QUEUE_SECONDS,
            RUN_SECONDS,
            SWAP_SECONDS,
            ANSWERS,
            REQUESTS_WAITING,
            FUNCTION_STATE,
            UPSTREAM_REQUESTS,
        ];
        for name in names {
            assert!(text.contains(&format!("# TYPE {name} ")), "{name} is missing in\n{text}");
        }
        assert!(text.contains("faaswap_sidecar_requests_total{protocol=\"grpc\",outcome=\"not_ready\"} 1"), "{text}");
        assert!(text.contains("http_requests_total{code=\"405\",method=\"OTHER\"} 1"), "{text}");
        assert!(text.contains("http_requests_in_flight 0"), "{text}");
    }
}
