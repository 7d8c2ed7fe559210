//! The ports: reviews over TLS, probes and metrics without.

use std::{io, net::SocketAddr, sync::Arc, time::Instant};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    keeper::{self, Current},
    limits::{
        ACCEPT_PAUSE, CONNECTIONS_MAX, DRAIN_GRACE, DRAIN_WITHIN, HANDSHAKE_WITHIN, HEAD_WITHIN, REVIEW_BYTES_MAX,
    },
    review,
    settings::Settings,
    telemetry::{Outcome, Telemetry},
};

/// Why the injector cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A port cannot be opened.
    #[error("cannot listen on {0}: {1}")]
    Listen(SocketAddr, io::Error),
    /// TLS cannot be set up.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
}

/// What requests are answered from.
#[derive(Clone, Debug)]
pub struct Shared {
    settings: Arc<Settings>,
    telemetry: Arc<Telemetry>,
    current: Arc<Current>,
    stop: CancellationToken,
}

impl Shared {
    /// Nothing answered yet, no certificate yet.
    pub fn new(settings: Settings, stop: CancellationToken) -> Self {
        Self { settings: settings.into(), telemetry: Arc::default(), current: Arc::default(), stop }
    }

    /// The certificate in use.
    pub fn current(&self) -> &Current {
        &self.current
    }

    /// What the API server reaches.
    pub fn reviews(&self) -> Router {
        let limit = DefaultBodyLimit::max(REVIEW_BYTES_MAX);
        Router::new().route("/mutate", post(mutate)).layer(limit).with_state(self.clone())
    }

    /// What operators and probes reach.
    pub fn pages(&self) -> Router {
        Router::new()
            .route("/livez", get(|| async { StatusCode::OK }))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
            .with_state(self.clone())
    }
}

async fn mutate(State(shared): State<Shared>, body: Bytes) -> Response {
    let began = Instant::now();
    let reply = match review::answer(&body, &shared.settings, &shared.telemetry) {
        Ok(review) => Json(review).into_response(),
        Err(error) => {
            shared.telemetry.reviewed(Outcome::invalid);
            (StatusCode::BAD_REQUEST, error.to_string()).into_response()
        }
    };
    shared.telemetry.took(began.elapsed());
    reply
}

async fn readyz(State(shared): State<Shared>) -> (StatusCode, &'static str) {
    if shared.stop.is_cancelled() {
        (StatusCode::SERVICE_UNAVAILABLE, "shutting down")
    } else if shared.current.is_there() {
        (StatusCode::OK, "")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "no certificate yet")
    }
}

async fn metrics(State(shared): State<Shared>) -> Response {
    match shared.telemetry.text() {
        Ok(text) => {
            ([("content-type", "application/openmetrics-text; version=1.0.0; charset=utf-8")], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// Serves until `stop` is cancelled and reviews in work are answered.
pub async fn run(settings: Settings, stop: CancellationToken) -> Result<(), ServeError> {
    let shared = Shared::new(settings.clone(), stop.clone());
    let keeping = keeper::keep(settings.clone(), Arc::clone(&shared.current), Arc::clone(&shared.telemetry));
    let keeping = tokio::spawn(keeping);
    let pages = tokio::spawn(serve(listen(settings.metrics_listen).await?, shared.pages(), None, stop.clone()));
    let tls = TlsAcceptor::from(Arc::new(tls(Arc::clone(&shared.current))?));
    serve(listen(settings.listen).await?, shared.reviews(), Some(tls), stop).await;
    keeping.abort();
    pages.abort();
    Ok(())
}

/// TLS with whatever certificate is current.
pub fn tls(current: Arc<Current>) -> Result<rustls::ServerConfig, ServeError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let mut config = config.with_no_client_auth().with_cert_resolver(current);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

async fn listen(address: SocketAddr) -> Result<TcpListener, ServeError> {
    let listener = TcpListener::bind(address).await.map_err(|error| ServeError::Listen(address, error))?;
    tracing::info!(address = %listener.local_addr().unwrap_or(address), "listening");
    Ok(listener)
}

/// Serves one port. After `stop` it takes connections for a moment more, then waits for what is in work.
pub async fn serve(listener: TcpListener, router: Router, tls: Option<TlsAcceptor>, stop: CancellationToken) {
    let (places, open, closing) =
        (Arc::new(Semaphore::new(CONNECTIONS_MAX)), TaskTracker::new(), CancellationToken::new());
    let over = async {
        stop.cancelled().await;
        sleep(DRAIN_GRACE).await;
    };
    tokio::pin!(over);
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { break };
        let accepted = tokio::select! {
            () = over.as_mut() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                // Or the first answer of a connection waits 40 ms for the peer's acknowledgement of the handshake.
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "connection gone");
                    continue;
                }
                let connection = connection(stream, router.clone(), tls.clone(), closing.clone());
                open.spawn(async move {
                    connection.await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "connection not accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    closing.cancel();
    open.close();
    if timeout(DRAIN_WITHIN, open.wait()).await.is_err() {
        tracing::warn!(connections = open.len(), "connections cut off");
    }
}

async fn connection(stream: TcpStream, router: Router, tls: Option<TlsAcceptor>, closing: CancellationToken) {
    match tls {
        None => speak(TokioIo::new(stream), router, closing).await,
        Some(tls) => match timeout(HANDSHAKE_WITHIN, tls.accept(stream)).await {
            Ok(Ok(stream)) => speak(TokioIo::new(stream), router, closing).await,
            Ok(Err(error)) => tracing::debug!(%error, "no handshake"),
            Err(_) => tracing::debug!("no handshake in time"),
        },
    }
}

async fn speak<I>(stream: I, router: Router, closing: CancellationToken)
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_WITHIN);
    builder.http2().timer(TokioTimer::new());
    let connection = builder.serve_connection(stream, TowerToHyperService::new(router));
    tokio::pin!(connection);
    let outcome = tokio::select! {
        outcome = connection.as_mut() => outcome,
        () = closing.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(%error, "connection ended");
    }
}
