//! Sockets: accepting connections, serving them within limits, draining them, and the metrics port.
//!
//! One port takes HTTP/1.1, HTTP/2 and gRPC. What the requests mean is left to `http`.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use http::{Request, StatusCode, header};
use hyper::body::Incoming;
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
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::{Layer, Service};

use crate::{
    config::Vision,
    failure::Failure,
    grpc::Grpc,
    http::{Besides, Dispatch, hint, image::Images, limit::LimitLayer, oip::Oip, proxy::Upstream, reply},
    infer::Function,
    limits::{
        ACCEPT_PAUSE, CONNECTIONS_MAX, DRAIN_WITHIN, FIRST_REQUEST_WITHIN, HEAD_WITHIN, HTTP1_BUFFER_MAX,
        HTTP1_HEADERS_MAX, HTTP2_CONNECTION_WINDOW, HTTP2_FRAME_MAX, HTTP2_HEADERS_MAX, HTTP2_PING_EVERY,
        HTTP2_PING_WITHIN, HTTP2_STREAM_WINDOW, HTTP2_STREAMS_MAX, METRICS_CONNECTIONS_MAX, REQUESTS_MAX,
    },
};

/// What is served, and how large a body may be.
#[derive(Clone, Debug)]
pub struct Served {
    /// The function.
    pub function: Arc<Function>,
    /// Longest request body.
    pub body_bytes_max: usize,
    /// The handler behind the sidecar.
    pub upstream: Option<http::uri::Authority>,
    /// What is done with images; only without a handler.
    pub vision: Option<Vision>,
    /// Whether the broker hears of requests that go to the handler.
    pub prefetch: bool,
}

impl Served {
    /// The whole stack, outermost layer first.
    pub(crate) fn stack(&self) -> crate::http::limit::Limit<Dispatch> {
        let oip = Arc::new(Oip::new(Arc::clone(&self.function), self.body_bytes_max));
        let grpc = Grpc::new(Arc::clone(&self.function), self.body_bytes_max);
        let function = || Arc::clone(&self.function);
        let besides = match (self.upstream.clone(), self.vision.clone()) {
            (Some(authority), _) => Besides::Handler(Arc::new(Upstream::new(authority, function(), self.prefetch))),
            (None, Some(vision)) => Besides::Images(Arc::new(Images::new(function(), vision, self.body_bytes_max))),
            (None, None) => Besides::Nobody,
        };
        LimitLayer::new(REQUESTS_MAX).layer(Dispatch::new(oip, grpc, besides))
    }
}

/// How serving ends.
#[derive(Clone, Copy, Debug)]
pub struct Drain {
    /// How long new connections are still taken, because load balancers learn late.
    pub grace: Duration,
    /// How long requests in flight may go on after that.
    pub within: Duration,
}

/// Serves until `stop` is cancelled, then lets requests in flight finish. Readiness turns off at once; new connections
/// are taken for `grace` more.
pub async fn serve(listener: TcpListener, served: Served, stop: CancellationToken, grace: Duration) {
    let (stack, function) = (served.stack(), Arc::clone(&served.function));
    serve_stack(listener, stack, function, stop, Drain { grace, within: DRAIN_WITHIN }).await;
}

/// The same for any service.
pub(crate) async fn serve_stack<S>(
    listener: TcpListener,
    stack: S,
    function: Arc<Function>,
    stop: CancellationToken,
    drain: Drain,
) where
    S: Service<Request<Incoming>, Response = reply::Reply, Error = std::convert::Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    let connections = Connections::new(CONNECTIONS_MAX);
    let over = async {
        stop.cancelled().await;
        tracing::info!(grace_ms = drain.grace.as_millis(), "shutting down");
        function.drain();
        sleep(drain.grace).await;
    };
    tokio::select! {
        () = over => {}
        () = connections.accept(&listener, stack) => {}
    }
    drop(listener);
    connections.drain(drain.within).await;
}

/// Serves `/metrics`, the two probes, and hints, until dropped.
pub async fn serve_metrics(listener: TcpListener, function: Arc<Function>) {
    let service = tower::service_fn(move |request: Request<Incoming>| {
        let function = Arc::clone(&function);
        async move {
            let path = request.uri().path();
            let reply =
                if path == hint::PATH { hint::serve(&function, request).await } else { operator_page(&function, path) };
            Ok::<_, std::convert::Infallible>(reply)
        }
    });
    Connections::new(METRICS_CONNECTIONS_MAX).accept(&listener, service).await;
}

fn operator_page(function: &Function, path: &str) -> reply::Reply {
    match path {
        "/metrics" => {
            let broker = function.broker();
            match function.metrics.text(function.state().as_ref(), broker.map_or(0, crate::broker::Broker::waiting)) {
                Ok(text) => {
                    let mut page = reply::of_bytes(StatusCode::OK, text);
                    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
                    page.headers_mut().insert(header::CONTENT_TYPE, http::HeaderValue::from_static(kind));
                    page
                }
                Err(error) => reply::failure(&Failure::Internal(error.to_string())),
            }
        }
        "/livez" => reply::of_bytes(StatusCode::OK, ""),
        "/readyz" => match function.expect_ready() {
            Ok(()) => reply::of_bytes(StatusCode::OK, ""),
            Err(failure) => reply::failure(&failure),
        },
        other => reply::failure(&Failure::NotFound(format!("no such path: {other}"))),
    }
}

/// The open connections of one port.
#[derive(Debug)]
struct Connections {
    places: Arc<Semaphore>,
    open: TaskTracker,
    closing: CancellationToken,
}

impl Connections {
    fn new(max: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(max)), open: TaskTracker::new(), closing: CancellationToken::new() }
    }

    async fn accept<S>(&self, listener: &TcpListener, service: S)
    where
        S: Service<Request<Incoming>, Response = reply::Reply, Error = std::convert::Infallible>
            + Clone
            + Send
            + 'static,
        S::Future: Send,
    {
        loop {
            let Ok(place) = Arc::clone(&self.places).acquire_owned().await else {
                return;
            };
            match listener.accept().await {
                Ok((stream, peer)) => {
                    let connection = serve_connection(stream, peer, service.clone(), self.closing.clone());
                    self.open.spawn(async move {
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
    }

    async fn drain(self, within: Duration) {
        self.closing.cancel();
        self.open.close();
        if timeout(within, self.open.wait()).await.is_err() {
            tracing::warn!(connections = self.open.len(), "connections cut off while draining");
        }
    }
}

async fn serve_connection<S>(stream: TcpStream, peer: SocketAddr, service: S, closing: CancellationToken)
where
    S: Service<Request<Incoming>, Response = reply::Reply, Error = std::convert::Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%peer, %error, "connection gone");
        return;
    }
    let spoke = Arc::new(AtomicBool::new(false));
    let service = {
        let spoke = Arc::clone(&spoke);
        tower::ServiceBuilder::new()
            .map_request(move |request: Request<Incoming>| {
                spoke.store(true, Ordering::Relaxed);
                request
            })
            .service(service)
    };
    let builder = builder();
    let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    tokio::pin!(connection);
    // Finding out which protocol is spoken has no time limit of its own.
    let first = sleep(FIRST_REQUEST_WITHIN);
    tokio::pin!(first);
    let mut waits_for_first = true;
    let mut asked_to_close = false;
    let outcome = loop {
        tokio::select! {
            outcome = connection.as_mut() => break outcome,
            () = first.as_mut(), if waits_for_first => {
                waits_for_first = false;
                if !spoke.load(Ordering::Relaxed) {
                    break Err(io::Error::from(io::ErrorKind::TimedOut).into());
                }
            }
            () = closing.cancelled(), if !asked_to_close => {
                asked_to_close = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(%peer, %error, "connection ended");
    }
}

fn builder() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WITHIN)
        .max_headers(HTTP1_HEADERS_MAX)
        .max_buf_size(HTTP1_BUFFER_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(HTTP2_PING_EVERY)
        .keep_alive_timeout(HTTP2_PING_WITHIN)
        .max_concurrent_streams(HTTP2_STREAMS_MAX)
        .initial_stream_window_size(HTTP2_STREAM_WINDOW)
        .initial_connection_window_size(HTTP2_CONNECTION_WINDOW)
        .max_frame_size(HTTP2_FRAME_MAX)
        .max_header_list_size(HTTP2_HEADERS_MAX);
    builder
}
