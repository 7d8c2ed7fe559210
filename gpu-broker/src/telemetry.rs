//! What the broker counts. Every metric's name, labels and buckets stand here, or in `gpus` below, and nowhere else.

mod gpus;
mod tiers;

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64},
    },
    time::Duration,
};

use faaswap_device::SwapReport;
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByFunction {
    function: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByOutcome {
    function: String,
    /// `answered`, or the refusal's code.
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByResidency {
    /// Whether the weights were there when the request was given to a lane.
    resident: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByDevice {
    device: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByPart {
    device: String,
    /// `waited` for the link; of the time behind that `queueing` copies, and `mapping` memory.
    part: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByBinding {
    device: String,
    /// `kind`: its program was made of another model's of its kind; else `session`.
    how: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByRefusal {
    outcome: &'static str,
}

use self::{gpus::GpuMetrics, tiers::TierMetrics};
use crate::{gpus::Gpus, store::Memory};

type Level = Gauge<i64, AtomicI64>;

/// All metrics of one broker.
#[derive(Debug)]
pub struct Telemetry {
    registry: Registry,
    gpus: Arc<Gpus>,
    requests: Family<ByOutcome, Counter>,
    slo_met: Family<ByFunction, Counter>,
    latency: Family<ByResidency, Histogram, fn() -> Histogram>,
    registrations: Family<ByRefusal, Counter>,
    bindings: Family<ByBinding, Counter>,
    swaps_in: Family<ByDevice, Counter>,
    swaps_out: Family<ByDevice, Counter>,
    swap_failures: Family<ByDevice, Counter>,
    devices_lost: Family<ByDevice, Counter>,
    weights_same: Level,
    weights_damaged: Level,
    swapped_in: Family<ByDevice, Counter<u64, AtomicU64>>,
    swap_in: Family<ByDevice, Histogram, fn() -> Histogram>,
    swap_in_parts: Family<ByPart, Counter<f64, AtomicU64>>,
    device_used: Family<ByDevice, Level>,
    device_capacity: Family<ByDevice, Level>,
    shared_runs: Counter,
    shared_requests: Counter,
    mixed_runs: Counter,
    /// Runs of several requests that had to be run one by one.
    pub(crate) shared_runs_apart: Counter,
    /// Connections.
    pub(crate) connections: Level,
    /// Peers that were cut off for what they sent, or did not read.
    pub(crate) peers_cut_off: Counter,
    /// Functions that can be called.
    pub(crate) functions: Level,
    /// Models that are loaded.
    pub(crate) models: Level,
    /// Requests that wait for a lane.
    pub(crate) waiting: Level,
    /// Requests that wait or run.
    pub(crate) in_flight: Level,
    /// Weights in host memory.
    pub(crate) host_weights: Level,
}

const SECONDS: [f64; 14] =
    [0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

fn seconds() -> Histogram {
    Histogram::new(SECONDS)
}

impl Telemetry {
    /// Nothing counted yet, and neither GPUs nor tiers of memory seen.
    pub fn new() -> Self {
        Self::of(Arc::default(), None)
    }

    /// Nothing counted yet.
    pub(crate) fn of(gpus: Arc<Gpus>, memory: Option<Arc<Memory>>) -> Self {
        let mut t = Self {
            registry: Registry::with_prefix("faaswap"),
            gpus,
            requests: Family::default(),
            slo_met: Family::default(),
            latency: Family::new_with_constructor(seconds),
            registrations: Family::default(),
            bindings: Family::default(),
            swaps_in: Family::default(),
            swaps_out: Family::default(),
            swap_failures: Family::default(),
            devices_lost: Family::default(),
            weights_same: Level::default(),
            weights_damaged: Level::default(),
            swapped_in: Family::default(),
            swap_in: Family::new_with_constructor(seconds),
            swap_in_parts: Family::default(),
            device_used: Family::default(),
            device_capacity: Family::default(),
            shared_runs: Counter::default(),
            shared_requests: Counter::default(),
            mixed_runs: Counter::default(),
            shared_runs_apart: Counter::default(),
            connections: Level::default(),
            peers_cut_off: Counter::default(),
            functions: Level::default(),
            models: Level::default(),
            waiting: Level::default(),
            in_flight: Level::default(),
            host_weights: Level::default(),
        };
        t.register();
        if let Some(memory) = memory {
            t.registry.register_collector(Box::new(TierMetrics(memory)));
        }
        t
    }

    fn register(&mut self) {
        let r = &mut self.registry;
        r.register("requests", "Requests by function and how they ended", self.requests.clone());
        r.register("requests_slo_met", "Requests answered within the function's deadline", self.slo_met.clone());
        let help = "From a request's arrival to its answer";
        r.register_with_unit("request_latency", help, Unit::Seconds, self.latency.clone());
        r.register("registrations", "Registrations by how they ended", self.registrations.clone());
        r.register("bindings", "Models bound to a device, by a session or by their kind", self.bindings.clone());
        r.register("swaps_in", "Models brought to a device", self.swaps_in.clone());
        r.register("swaps_out", "Models taken off a device", self.swaps_out.clone());
        r.register("swap_failures", "Swaps that failed", self.swap_failures.clone());
        r.register("weights_verified", "Swap-ins that were read back and found right", self.weights_same.clone());
        r.register("weights_damaged", "Swap-ins that were read back and found wrong", self.weights_damaged.clone());
        r.register("devices_lost", "Devices that failed for good", self.devices_lost.clone());
        r.register_with_unit("swapped_in", "Weights copied to a device", Unit::Bytes, self.swapped_in.clone());
        r.register_with_unit("swap_in", "Time to bring a model to a device", Unit::Seconds, self.swap_in.clone());
        let parts = "Where that time goes: waited for the link before it; of it, queueing copies and mapping memory";
        r.register_with_unit("swap_in_parts", parts, Unit::Seconds, self.swap_in_parts.clone());
        r.register_with_unit("device_used", "Device memory charged to models", Unit::Bytes, self.device_used.clone());
        r.register_with_unit("device_capacity", "Device memory in all", Unit::Bytes, self.device_capacity.clone());
        r.register("shared_runs", "Runs that answered several requests", self.shared_runs.clone());
        r.register("shared_run_requests", "Requests that they answered", self.shared_requests.clone());
        r.register("mixed_runs", "Runs that answered requests of several functions", self.mixed_runs.clone());
        let help = "Those whose requests had to be run one by one";
        r.register("shared_runs_apart", help, self.shared_runs_apart.clone());
        r.register("connections", "Open connections", self.connections.clone());
        r.register("peers_cut_off", "Peers cut off by limits or violations", self.peers_cut_off.clone());
        r.register("functions", "Functions that can be called", self.functions.clone());
        r.register("models", "Models that are loaded", self.models.clone());
        r.register("requests_waiting", "Requests that wait for a lane", self.waiting.clone());
        r.register("requests_in_flight", "Requests that wait or run", self.in_flight.clone());
        r.register_with_unit("host_weights", "Weights in host memory", Unit::Bytes, self.host_weights.clone());
        r.register_collector(Box::new(GpuMetrics(Arc::clone(&self.gpus))));
    }

    /// The GPUs that are watched.
    pub(crate) fn gpus(&self) -> &Gpus {
        &self.gpus
    }

    pub(crate) fn request(&self, function: &str, outcome: &'static str) {
        self.requests.get_or_create(&ByOutcome { function: function.to_owned(), outcome }).inc();
    }

    /// A run begins that answers so many requests, of one function or of several.
    pub(crate) fn shared_run(&self, requests: usize, is_mixed: bool) {
        self.mixed_runs.inc_by(u64::from(is_mixed));
        self.shared_runs.inc();
        self.shared_requests.inc_by(u64::try_from(requests).unwrap_or(u64::MAX));
    }

    pub(crate) fn answered(&self, function: &str, took: Duration, resident: bool, slo_met: bool) {
        self.request(function, "answered");
        let resident = if resident { "true" } else { "false" };
        self.latency.get_or_create(&ByResidency { resident }).observe(took.as_secs_f64());
        let met = self.slo_met.get_or_create(&ByFunction { function: function.to_owned() });
        if slo_met {
            met.inc();
        }
    }

    /// A function is gone: its labels go too, so that names that come and go do not fill memory.
    pub(crate) fn forget(&self, function: &str, outcomes: impl IntoIterator<Item = &'static str>) {
        for outcome in outcomes {
            self.requests.remove(&ByOutcome { function: function.to_owned(), outcome });
        }
        self.slo_met.remove(&ByFunction { function: function.to_owned() });
    }

    pub(crate) fn registration(&self, outcome: &'static str) {
        self.registrations.get_or_create(&ByRefusal { outcome }).inc();
    }

    pub(crate) fn bound(&self, device: &str, by_kind: bool) {
        let how = if by_kind { "kind" } else { "session" };
        self.bindings.get_or_create(&ByBinding { device: device.to_owned(), how }).inc();
    }

    pub(crate) fn swapped_in(&self, device: &str, report: &SwapReport) {
        let device = ByDevice { device: device.to_owned() };
        self.swaps_in.get_or_create(&device).inc();
        self.swapped_in.get_or_create(&device).inc_by(report.copied.get());
        self.swap_in.get_or_create(&device).observe(report.took.as_secs_f64());
        let parts = [("waited", report.waited), ("queueing", report.queueing), ("mapping", report.mapping)];
        for (part, took) in parts {
            let of = ByPart { device: device.device.clone(), part };
            self.swap_in_parts.get_or_create(&of).inc_by(took.as_secs_f64());
        }
    }

    pub(crate) fn swapped_out(&self, device: &str) {
        self.swaps_out.get_or_create(&ByDevice { device: device.to_owned() }).inc();
    }

    pub(crate) fn verified(&self, same: u64, damaged: u64) {
        self.weights_same.set(i64::try_from(same).unwrap_or(i64::MAX));
        self.weights_damaged.set(i64::try_from(damaged).unwrap_or(i64::MAX));
    }

    pub(crate) fn device_lost(&self, device: &str) {
        self.devices_lost.get_or_create(&ByDevice { device: device.to_owned() }).inc();
    }

    pub(crate) fn swap_failed(&self, device: &str) {
        self.swap_failures.get_or_create(&ByDevice { device: device.to_owned() }).inc();
    }

    pub(crate) fn device(&self, device: &str, used: u64, capacity: u64) {
        let device = ByDevice { device: device.to_owned() };
        self.device_used.get_or_create(&device).set(i64::try_from(used).unwrap_or(i64::MAX));
        self.device_capacity.get_or_create(&device).set(i64::try_from(capacity).unwrap_or(i64::MAX));
    }

    /// All metrics in the OpenMetrics text format.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

impl Default for Telemetry {
    fn default() -> Self {
        Self::new()
    }
}

/// A number of things as a gauge's value.
pub(crate) fn level(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
