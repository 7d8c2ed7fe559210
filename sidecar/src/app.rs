//! The sidecar as a process: opens its ports, reads the model, connects, serves until told to stop.
//!
//! Ports are opened before the model is read, so that a probe finds a sidecar that is not ready rather than none. A side
//! service without its model ends; a front stays and says why it is not ready, because its pod would only be restarted.

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc};

use faaswap_protocol::FunctionSpec;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    broker::{Broker, BrokerConfig, Target},
    config::Settings,
    fetch::{self, Remote},
    infer::Function,
    limits::BODIES_OF_MAX_SIZE,
    model::{ModelError, ModelRef, ModelSource},
    server::{self, Served},
    watchdog::{self, handler::HandlerEnd},
};

/// Why the sidecar cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// A port cannot be opened.
    #[error("cannot listen on {address}: {error}")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why.
        error: io::Error,
    },
    /// The lock file cannot be written.
    #[error("cannot write the lock file {path} (suppress_lock=true does without): {error}")]
    Lock {
        /// Where.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The handler cannot be started.
    #[error("cannot start the handler '{program}': {error}")]
    Start {
        /// Its program.
        program: String,
        /// Why.
        error: io::Error,
    },
    /// The handler ended by itself.
    #[error("the handler ended: {0}")]
    Handler(HandlerEnd),
    /// The model cannot be read.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The thread that reads the model came to nothing.
    #[error("the model could not be read: {0}")]
    Thread(#[from] tokio::task::JoinError),
}

/// Runs the sidecar until `stop` is cancelled and what was in work has ended.
pub async fn run(settings: Settings, stop: CancellationToken) -> Result<(), AppError> {
    let listener = listen("service", settings.listen).await?;
    let body_bytes_max = settings.body_max.as_len().unwrap_or(usize::MAX);
    let function = Function::new(settings.model_name.clone(), body_bytes_max.saturating_mul(BODIES_OF_MAX_SIZE));
    if let Some(address) = settings.metrics_listen {
        let metrics = listen("metrics", address).await?;
        tokio::spawn(server::serve_metrics(metrics, Arc::clone(&function)));
    }
    let served = Served {
        function: Arc::clone(&function),
        body_bytes_max,
        upstream: settings.upstream.clone(),
        vision: settings.vision.clone(),
        prefetch: settings.prefetch,
    };
    match settings.watchdog.clone() {
        None => run_beside(listener, served, &settings, stop).await,
        Some(watchdog) => {
            let front = listen("front", SocketAddr::from(([0, 0, 0, 0], watchdog.port))).await?;
            let url = format!("http://{}", listener.local_addr().unwrap_or(settings.listen));
            // For the handler, which may ask for inferences while it answers: without the front's limits, and to the end.
            let beside = Served { upstream: None, vision: None, ..served.clone() };
            tokio::spawn(server::serve(listener, beside, CancellationToken::new(), settings.drain_grace));
            let attaching = async {
                attach_or_say_why(&function, &settings).await;
                std::future::pending().await
            };
            tokio::select! {
                outcome = watchdog::run(front, served, watchdog, url, stop) => outcome,
                outcome = attaching => outcome,
            }
        }
    }
}

async fn run_beside(
    listener: TcpListener,
    served: Served,
    settings: &Settings,
    stop: CancellationToken,
) -> Result<(), AppError> {
    let function = Arc::clone(&served.function);
    let serving = server::serve(listener, served, stop, settings.drain_grace);
    tokio::pin!(serving);
    tokio::select! {
        () = serving.as_mut() => return Ok(()),
        attached = attach(&function, settings) => attached?,
    }
    serving.await;
    Ok(())
}

async fn attach_or_say_why(function: &Function, settings: &Settings) {
    if let Err(error) = attach(function, settings).await {
        tracing::error!(%error, "the function has no model and will not be ready");
        function.give_up(error.to_string());
    }
}

async fn listen(port: &str, address: SocketAddr) -> Result<TcpListener, AppError> {
    let listener = TcpListener::bind(address).await.map_err(|error| AppError::Listen { address, error })?;
    // Says the port where the configuration left it to the system.
    tracing::info!(port, address = %listener.local_addr().unwrap_or(address), "listening");
    Ok(listener)
}

/// Reads or fetches the model. One on a server whose digest is known is fetched once the broker wants it.
async fn source(function: &Function, settings: &Settings) -> Result<ModelSource, AppError> {
    if let ModelRef::Remote(remote) = &settings.model {
        let remote = Arc::clone(remote);
        let (digest, files) = match remote.digest {
            Some(digest) => (digest, Vec::new()),
            None => fetch::until_fetched(&remote, |stage| function.stands(stage.into())).await,
        };
        // From here on it is that one: what the server has later may be another.
        let remote = Arc::new(Remote { digest: Some(digest), ..Remote::clone(&remote) });
        return Ok(ModelSource { digest, files, remote: Some(remote) });
    }
    let model = settings.model.clone();
    let model = tokio::task::spawn_blocking(move || ModelSource::load(&model)).await??;
    tracing::info!(model = %model.digest, files = model.files.len(), "model read");
    Ok(model.expect(settings.model_digest)?)
}

/// Reads the model and starts the broker client.
async fn attach(function: &Function, settings: &Settings) -> Result<(), AppError> {
    let model = source(function, settings).await?;
    let spec = FunctionSpec {
        name: settings.function.clone(),
        model: model.digest,
        slo: settings.slo,
        priority: settings.priority,
        late: settings.late,
        batching: settings.batching,
        tf32: settings.tf32,
    };
    // The list is never empty; a socket that is not there is where it would come.
    let nearest = settings.brokers.first().cloned().unwrap_or(Target::Socket(PathBuf::new()));
    let config = BrokerConfig::new(nearest, spec, model);
    let config = BrokerConfig { slab: settings.slab, targets: settings.brokers.clone(), ..config };
    function.attach(Broker::start(config));
    Ok(())
}
