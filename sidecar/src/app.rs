//! The sidecar as a process: opens its ports, reads the model, connects, serves until told to stop.
//!
//! Ports are opened before the model is read, so that a probe finds a sidecar that is not ready rather than none.

use std::{io, net::SocketAddr, sync::Arc};

use faaswap_protocol::FunctionSpec;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    broker::{Broker, BrokerConfig},
    config::Settings,
    infer::Function,
    limits::BODIES_OF_MAX_SIZE,
    model::{ModelError, ModelSource},
    server::{self, Served},
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
    let served = Served { function: Arc::clone(&function), body_bytes_max, upstream: settings.upstream.clone() };
    let serving = server::serve(listener, served, stop.clone(), settings.drain_grace);
    tokio::pin!(serving);
    tokio::select! {
        () = serving.as_mut() => return Ok(()),
        attached = attach(&function, &settings) => attached?,
    }
    serving.await;
    Ok(())
}

async fn listen(port: &str, address: SocketAddr) -> Result<TcpListener, AppError> {
    let listener = TcpListener::bind(address).await.map_err(|error| AppError::Listen { address, error })?;
    // Says the port where the configuration left it to the system.
    tracing::info!(port, address = %listener.local_addr().unwrap_or(address), "listening");
    Ok(listener)
}

/// Reads the model and starts the broker client.
async fn attach(function: &Function, settings: &Settings) -> Result<(), AppError> {
    let model = settings.model.clone();
    let model = tokio::task::spawn_blocking(move || ModelSource::load(&model)).await??;
    tracing::info!(model = %model.digest, files = model.files.len(), "model read");
    let spec = FunctionSpec {
        name: settings.function.clone(),
        model: model.digest,
        slo: settings.slo,
        priority: settings.priority,
        late: settings.late,
    };
    let config = BrokerConfig { slab: settings.slab, ..BrokerConfig::new(settings.broker.clone(), spec, model) };
    function.attach(Broker::start(config));
    Ok(())
}
