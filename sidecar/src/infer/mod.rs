//! The inference core that HTTP and gRPC share: the function, its model's signature, and one call from checked inputs
//! to an answer.
//!
//! What a request looks like on the wire is left to `http` and `grpc`; how it reaches the broker to `broker`.

pub mod check;
pub mod stats;

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Instant,
};

use faaswap_protocol::Timing;

use crate::{
    broker::{Broker, Draft, FunctionState, InferAnswer, InferError, InferRequest, Known},
    failure::Failure,
    metrics::{Metrics, Protocol},
};

/// The only version that a model has here.
pub const MODEL_VERSION: &str = "1";
/// What kind of model is served.
pub const PLATFORM: &str = "onnxruntime_onnx";
/// The name of this server.
pub const SERVER_NAME: &str = "faaswap";
/// The parts of the protocol that are offered.
pub const EXTENSIONS: [&str; 5] =
    ["binary_tensor_data", "model_configuration", "model_repository", "parameters", "statistics"];

/// What a client that wants to unload the model is told.
pub const UNLOAD_IS_NOT_OURS: &str =
    "models are not unloaded by request: the node's broker swaps them in and out on demand";

/// The function that this sidecar serves.
#[derive(Debug)]
pub struct Function {
    /// Its model's name in the protocol.
    pub model_name: String,
    /// The way to the broker; absent while the model's files are still being read.
    broker: std::sync::OnceLock<Broker>,
    /// Counts for the protocol's statistics call.
    pub stats: stats::Stats,
    /// Counts for Prometheus.
    pub metrics: Metrics,
    /// How the function stands while there is no broker client yet.
    before: Mutex<Option<FunctionState>>,
    /// Why there will be no broker client.
    trouble: std::sync::OnceLock<String>,
    draining: AtomicBool,
    bodies: Budget,
}

impl Function {
    /// A function whose broker client comes with [`Function::attach`].
    pub fn new(model_name: String, bodies_bytes_max: usize) -> Arc<Self> {
        Arc::new(Self {
            model_name,
            broker: std::sync::OnceLock::new(),
            stats: stats::Stats::default(),
            metrics: Metrics::default(),
            before: Mutex::new(None),
            trouble: std::sync::OnceLock::new(),
            draining: AtomicBool::new(false),
            bodies: Budget { left: AtomicUsize::new(bodies_bytes_max) },
        })
    }

    /// Gives the function its broker client, once.
    pub fn attach(&self, broker: Broker) {
        let _first = self.broker.set(broker);
    }

    /// Says, once, why the function will never be ready.
    pub fn give_up(&self, why: String) {
        let _first = self.trouble.set(why);
    }

    /// The broker client, once there is one.
    pub fn broker(&self) -> Option<&Broker> {
        self.broker.get()
    }

    /// Says how the function stands as long as it has no broker client.
    pub fn stands(&self, state: FunctionState) {
        *self.before.lock().unwrap_or_else(PoisonError::into_inner) = Some(state);
    }

    /// How the function stands; `None`: its model is still being read, or cannot be.
    pub fn state(&self) -> Option<FunctionState> {
        let before = || self.before.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.broker().map(Broker::state).or_else(before)
    }

    /// Says in words how the function stands.
    pub fn state_text(&self) -> String {
        match self.state() {
            _ if self.is_draining() => "shutting down".to_owned(),
            Some(state) => state.to_string(),
            None => self.trouble.get().map_or("the model is being read", String::as_str).to_owned(),
        }
    }

    /// Whether a request would be sent to the broker at once.
    pub fn is_ready(&self) -> bool {
        !self.is_draining() && self.broker().is_some_and(Broker::is_ready)
    }

    /// Fails, saying why, unless a request would be sent to the broker at once.
    pub fn expect_ready(&self) -> Result<(), Failure> {
        match self.broker().map(Broker::state) {
            _ if self.is_ready() => Ok(()),
            Some(FunctionState::Rejected(refusal)) => Err(Failure::Infer(InferError::Refused(refusal))),
            Some(_) | None => {
                Err(Failure::NotReady(format!("model '{}' is not ready: {}", self.model_name, self.state_text())))
            }
        }
    }

    /// Turns readiness off; requests are served on.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// The memory that request bodies may take together.
    pub fn bodies(&self) -> &Budget {
        &self.bodies
    }

    /// What the model takes and gives; before the function was ever ready, a failure that says why not.
    pub fn known(&self) -> Result<Arc<Known>, Failure> {
        let broker = self.broker().ok_or_else(|| self.not_attached())?;
        broker.known().ok_or_else(|| Failure::Infer(broker.state().into()))
    }

    fn not_attached(&self) -> Failure {
        Failure::NotReady(format!("the function is not ready: {}", self.state_text()))
    }

    /// Checks that a request means this model.
    pub fn expect_model(&self, name: &str, version: &str) -> Result<(), Failure> {
        if name != self.model_name {
            return Err(Failure::NotFound(format!(
                "unknown model '{name}': this endpoint serves '{}'",
                self.model_name
            )));
        }
        if !version.is_empty() && version != MODEL_VERSION {
            return Err(Failure::NotFound(format!(
                "model '{name}' has no version {version}: its only version is {MODEL_VERSION}"
            )));
        }
        Ok(())
    }

    /// Takes room for inputs that are still to come; see [`Broker::draft`].
    pub fn draft(&self, lens: impl Iterator<Item = u64>) -> Option<Draft> {
        self.broker()?.draft(lens)
    }

    /// Lets the broker bring the weights: a request is about to come. Whether that helps is the broker's to know.
    pub fn announce(&self) {
        if let Some(broker) = self.broker() {
            broker.announce();
        }
    }

    /// Runs one checked request; where there is a draft, its inputs lie there.
    pub async fn infer(&self, request: &InferRequest, draft: Option<Draft>) -> Result<InferAnswer, Failure> {
        let broker = self.broker().ok_or_else(|| self.not_attached())?;
        Ok(match draft {
            Some(draft) => broker.infer_drafted(request, draft).await?,
            None => broker.infer(request).await?,
        })
    }

    /// Notes the end of one request, once, for statistics, metrics and the log.
    pub fn note(&self, protocol: Protocol, began: Instant, outcome: Result<&Timing, &Failure>) {
        let took = began.elapsed();
        self.stats.note(took, outcome.ok());
        match outcome {
            Ok(timing) => self.metrics.answered(protocol, took, timing),
            Err(failure) => {
                let verdict = failure.verdict();
                self.metrics.failed(protocol, took, verdict.code);
                if verdict.status.is_server_error() {
                    tracing::warn!(code = verdict.code, status = verdict.status.as_u16(), error = %failure, "request failed");
                } else {
                    tracing::debug!(code = verdict.code, status = verdict.status.as_u16(), error = %failure, "request declined");
                }
            }
        }
    }
}

/// An amount of memory that is lent out.
#[derive(Debug)]
pub struct Budget {
    left: AtomicUsize,
}

/// What one request has taken of a budget.
#[derive(Debug)]
pub struct Lent<'a> {
    from: &'a Budget,
    bytes: usize,
}

impl Budget {
    /// Nothing yet.
    pub fn open(&self) -> Lent<'_> {
        Lent { from: self, bytes: 0 }
    }
}

impl Lent<'_> {
    /// Takes more, or says that the budget does not reach.
    pub fn take(&mut self, bytes: usize) -> Result<(), Failure> {
        let enough = |left: usize| left.checked_sub(bytes);
        if self.from.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, enough).is_err() {
            return Err(Failure::Busy("request bodies fill the memory that they may take; come back later"));
        }
        self.bytes += bytes;
        Ok(())
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.from.left.fetch_add(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_for_bodies_is_given_back() {
        let budget = Budget { left: AtomicUsize::new(10) };
        let mut one = budget.open();
        assert!(one.take(8).is_ok());
        assert!(budget.open().take(3).is_err());
        drop(one);
        assert!(budget.open().take(10).is_ok());
    }
}
