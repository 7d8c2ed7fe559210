//! What can be configured: a TOML file, and `FAASWAP_` variables over it. Every mistake is reported at once.
//!
//! The files that are named are not opened here; that they exist is checked, because a wrong path is the mistake that
//! people make most.

mod model;
pub(crate) mod read;
#[cfg(test)]
mod tests;
mod vision;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use ::config::{Config, Environment, File, FileFormat};
use faaswap_protocol::{Batching, Bytes, FunctionName, Late, ModelDigest, Priority, Slo, Tf32};
use http::uri::Authority;

use self::read::Reader;
pub use self::vision::Vision;
use crate::{
    broker::{SlabSizes, Target},
    model::ModelRef,
    watchdog::WatchdogSettings,
};

/// Where the node's broker listens for sidecars without a shared socket.
const BROKER_PORT: u16 = 9470;
/// The Service that leads to the broker of the pod's own node.
const BROKER_SERVICE: &str = "gpu-broker.faaswap-system.svc:9470";

/// How the process was started: what is behind `--`, and the variables that are the platform's rather than ours.
#[derive(Clone, Debug, Default)]
pub struct Start {
    /// The handler's command, as far as it was given.
    pub command: Vec<String>,
    /// The environment.
    pub variables: BTreeMap<String, String>,
    /// Where the configuration file lies, which names its model relative to itself.
    pub folder: Option<PathBuf>,
    /// What Kubernetes says is the pod's namespace.
    pub namespace: Option<String>,
}

impl Start {
    /// A variable that is set to something.
    pub fn variable(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(|value| value.trim()).filter(|value| !value.is_empty())
    }

    /// The namespace of the pod, as far as it is known.
    pub fn namespace(&self) -> Option<&str> {
        let named = self.variable("POD_NAMESPACE").or_else(|| self.variable("OPENFAAS_NAMESPACE"));
        named.or(self.namespace.as_deref()).map(str::trim).filter(|name| !name.is_empty())
    }
}

/// All mistakes of a configuration.
#[derive(Debug, thiserror::Error)]
#[error("the configuration has {} mistake(s):\n  {}", .0.len(), .0.join("\n  "))]
pub struct ConfigError(pub Vec<String>);

/// The sidecar's settings.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Where brokers may listen, in the order in which they are tried: the socket, `broker_addr`, the node's address
    /// (`HOST_IP`), and in a cluster the Service of the node's broker.
    pub brokers: Vec<Target>,
    /// The function's name on the node.
    pub function: FunctionName,
    /// What clients call the model; the function's name where absent.
    pub model_name: String,
    /// Its model.
    pub model: ModelRef,
    /// The digest that the model must have.
    pub model_digest: Option<ModelDigest>,
    /// The objective for its latency.
    pub slo: Slo,
    /// Whether somebody waits.
    pub priority: Priority,
    /// What to do with late requests.
    pub late: Late,
    /// Whether its requests may share runs.
    pub batching: Batching,
    /// Whether GPUs may compute its fp32 products in TF32.
    pub tf32: Tf32,
    /// Port for clients.
    pub listen: SocketAddr,
    /// Port for operators; absent: none.
    pub metrics_listen: Option<SocketAddr>,
    /// The handler behind the sidecar.
    pub upstream: Option<Authority>,
    /// Whether the broker hears of requests that go to the handler, to bring the weights meanwhile.
    pub prefetch: bool,
    /// Images in and labels out at `/`, where no handler is behind the sidecar.
    pub vision: Option<Vision>,
    /// Wanted sizes of the slab.
    pub slab: SlabSizes,
    /// Longest request body.
    pub body_max: Bytes,
    /// How long new connections are taken after SIGTERM.
    pub drain_grace: Duration,
    /// The function's front, where the sidecar stands in for of-watchdog.
    pub watchdog: Option<WatchdogSettings>,
    /// Which log lines are written.
    pub log: String,
    /// How they are written.
    pub log_format: LogFormat,
    /// `FAASWAP_` variables that mean nothing to the sidecar: worth a warning, no mistake, since pods inherit them.
    pub ignored: Vec<String>,
}

/// `FAASWAP_CONFIG` names the file: it is read before everything else, in `main`.
const FILE_KEY: &str = "config";

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For collectors.
    Json,
}

impl Settings {
    /// Reads the file, where one is named, and the environment.
    pub fn load(file: Option<&Path>, start: &Start) -> Result<Self, ConfigError> {
        let mut text = String::new();
        let mut start = start.clone();
        if let Some(path) = file {
            start.folder = path.parent().map(Path::to_owned);
            text = std::fs::read_to_string(path)
                .map_err(|e| ConfigError(vec![format!("{} cannot be read: {e}", path.display())]))?;
        }
        Self::from_parts(&text, Environment::with_prefix("FAASWAP"), &start)
    }

    fn from_parts(text: &str, environment: Environment, start: &Start) -> Result<Self, ConfigError> {
        let build = |builder: ::config::ConfigBuilder<::config::builder::DefaultState>| {
            builder.build().map_err(|error| ConfigError(vec![error.to_string()]))
        };
        let file = build(Config::builder().add_source(File::from_str(text, FileFormat::Toml)))?;
        let environment = build(Config::builder().add_source(environment.prefix_separator("_")))?;
        let merged = build(Config::builder().add_source(file.clone()).add_source(environment.clone()))?;
        let mut reader = Reader::new(&merged);
        let settings = Self::read(&mut reader, start);
        reader.refuse_unknown(&file);
        let ignored = reader.unknown(&environment).into_iter().filter(|key| key != FILE_KEY).collect();
        reader.finish(settings.map(|settings| Self { ignored, ..settings }))
    }

    /// `None` only where the reader has noted why.
    fn read(from: &mut Reader, start: &Start) -> Option<Self> {
        let brokers = read::brokers(from, start);
        let watchdog = WatchdogSettings::read(from, start);
        let (function, model_name) = (read::function(from, start, watchdog.is_some()), from.text("model_name"));
        let (model, model_digest) = model::read(from, start, watchdog.is_some());
        let deadline = from.number("slo_ms", 1..=3_600_000).unwrap_or(1000);
        let percentile = from.parse("slo_percentile", read::percentile).unwrap_or(9800);
        let priority = from.one_of("priority", &[("latency", Priority::Latency), ("batch", Priority::Batch)]);
        let late = from.one_of("late", &[("serve", Late::Serve), ("refuse", Late::Refuse)]);
        let batching = [("off", Batching::Off), ("exact", Batching::Exact), ("on", Batching::On)];
        let batching = from.one_of("batching", &batching);
        let tf32 = from.one_of("tf32", &[("on", Tf32::On), ("off", Tf32::Off)]);
        let everywhere = |port| SocketAddr::from(([0, 0, 0, 0], port));
        // Behind a front, the second port is for the handler alone.
        let beside = if watchdog.is_some() { SocketAddr::from(([127, 0, 0, 1], 9463)) } else { everywhere(9463) };
        let listen = from.parse("listen", read::address).unwrap_or(beside);
        let metrics_listen = from.parse("metrics_listen", read::address_or_off);
        let metrics_default = if watchdog.is_some() { everywhere(8081) } else { everywhere(9465) };
        let upstream = from.parse("upstream", read::upstream);
        let upstream = upstream.or_else(|| watchdog.as_ref()?.upstream.clone());
        let prefetch = from.one_of("prefetch", &[("true", true), ("false", false)]);
        let vision = vision::read(from, start);
        if vision.is_some() && upstream.is_some() {
            from.mistake("preprocess_kind and a handler are both set: who answers requests to / ?".to_owned());
        }
        let slab = read::slab(from);
        let body_max = Bytes::mib(from.number("body_mib_max", 1..=1024).unwrap_or(64));
        let drain_grace = Duration::from_millis(from.number("drain_grace_ms", 0..=600_000).unwrap_or(1000));
        let log = from.parse("log", read::log_filter).unwrap_or_else(|| "info".to_owned());
        let log_format = from.one_of("log_format", &[("text", LogFormat::Text), ("json", LogFormat::Json)]);
        let function = function?;
        Some(Self {
            brokers,
            model_name: model_name.unwrap_or_else(|| read::model_name(&function, start, watchdog.is_some())),
            function,
            model: model?,
            model_digest,
            slo: Slo { deadline: Duration::from_millis(deadline), percentile },
            priority: priority.unwrap_or_default(),
            late: late.unwrap_or_default(),
            batching: batching.unwrap_or_default(),
            tf32: tf32.unwrap_or_default(),
            listen,
            metrics_listen: metrics_listen.unwrap_or(Some(metrics_default)),
            upstream,
            prefetch: prefetch.unwrap_or(true),
            vision,
            slab,
            body_max,
            drain_grace,
            watchdog,
            log,
            log_format: log_format.unwrap_or(LogFormat::Text),
            ignored: Vec::new(),
        })
    }
}
