//! What clients of the function see: probes, the limit, the time limit, and of-watchdog's headers around everything else.
//!
//! Which requests are the protocol's and which the handler's is decided further in, by `http::Dispatch`.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, header, uri::Authority};
use tokio::{
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tower::Service;

use super::{lock::Lock, settings, settings::WatchdogSettings};
use crate::{
    http::{
        REFUSAL_HEADER,
        proxy::Probe,
        reply::{self, Reply, ReplyBody},
    },
    infer::Function,
    limits::{HANDLER_PROBE_WITHIN, REQUESTS_MAX},
};

/// How gateways know that an error is not the function's own.
const INTERNAL: HeaderName = HeaderName::from_static("x-openfaas-internal");
const INTERNAL_US: HeaderValue = HeaderValue::from_static("of-watchdog");
/// A client's wish for less than `exec_timeout`.
const TIMEOUT: HeaderName = HeaderName::from_static("x-timeout");
const DURATION: HeaderName = HeaderName::from_static("x-duration-seconds");

type FrontFuture = Pin<Box<dyn Future<Output = Result<Reply, Infallible>> + Send>>;

/// What decides whether requests come in.
#[derive(Debug)]
pub struct Gate {
    closed: AtomicBool,
    lock: Option<Lock>,
    places: Arc<Semaphore>,
    max_inflight: Option<usize>,
    exec_timeout: Option<Duration>,
    ready_path: Option<String>,
    handler: Option<Authority>,
    function: Arc<Function>,
}

impl Gate {
    /// An open gate.
    pub fn new(
        settings: &WatchdogSettings,
        handler: Option<Authority>,
        lock: Option<Lock>,
        function: Arc<Function>,
    ) -> Self {
        Self {
            closed: AtomicBool::new(false),
            lock,
            places: Arc::new(Semaphore::new(settings.max_inflight.unwrap_or(REQUESTS_MAX))),
            max_inflight: settings.max_inflight,
            exec_timeout: settings.exec_timeout,
            ready_path: settings.ready_path.clone(),
            handler,
            function,
        }
    }

    /// Health turns off, the lock file goes. Requests are still served.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        if let Some(lock) = &self.lock {
            lock.release();
        }
    }

    fn is_open(&self) -> bool {
        !self.closed.load(Ordering::Relaxed) && self.lock.as_ref().is_none_or(Lock::holds)
    }

    /// Whether the process serves; says nothing of the model, or a model that takes long would have its pod killed.
    fn health(&self, method: &Method) -> Reply {
        match *method {
            Method::GET if self.is_open() => text(StatusCode::OK, "OK"),
            Method::GET => text(StatusCode::SERVICE_UNAVAILABLE, "shutting down, or the lock file is gone"),
            _ => text(StatusCode::METHOD_NOT_ALLOWED, "only GET is allowed here"),
        }
    }

    /// Why a request would not be served now, if so.
    async fn not_ready(&self) -> Option<Reply> {
        if !self.is_open() {
            return Some(text(StatusCode::SERVICE_UNAVAILABLE, "shutting down, or the lock file is gone"));
        }
        if self.places.available_permits() == 0 {
            return Some(self.full());
        }
        if let Err(failure) = self.function.expect_ready() {
            return Some(reply::failure(&failure));
        }
        let handler = self.handler.as_ref()?;
        let there = timeout(HANDLER_PROBE_WITHIN, TcpStream::connect(handler.as_str())).await;
        let answers = matches!(there, Ok(Ok(_)));
        (!answers).then(|| text(StatusCode::SERVICE_UNAVAILABLE, format!("the handler at {handler} does not listen")))
    }

    fn full(&self) -> Reply {
        let max = self.max_inflight.unwrap_or(REQUESTS_MAX);
        let said = format!("concurrent request limit exceeded: {max} are in work");
        let mut reply = text(StatusCode::TOO_MANY_REQUESTS, said);
        reply.headers_mut().insert(header::RETRY_AFTER, crate::limits::RETRY_AFTER_S.into());
        reply
    }

    fn enter(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.places).try_acquire_owned().ok()
    }

    /// How long this request may take.
    fn time_for(&self, headers: &HeaderMap) -> Option<Duration> {
        let wish = headers.get(TIMEOUT).and_then(|wish| settings::duration(wish.to_str().ok()?));
        match (self.exec_timeout, wish.filter(|wish| !wish.is_zero())) {
            _ if streams(headers) => None,
            (Some(limit), Some(wish)) => Some(limit.min(wish)),
            (limit, _) => limit,
        }
    }
}

fn text(status: StatusCode, said: impl Into<bytes::Bytes>) -> Reply {
    let mut reply = reply::of_bytes(status, said);
    reply.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    reply
}

/// Whether the client reads an answer that goes on and on.
fn streams(headers: &HeaderMap) -> bool {
    let accepts = headers.get(header::ACCEPT).map(HeaderValue::as_bytes).unwrap_or_default();
    [&b"text/event-stream"[..], b"application/x-ndjson"].iter().any(|kind| accepts.starts_with(kind))
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Front<S> {
    gate: Arc<Gate>,
    inner: S,
}

impl<S> Front<S> {
    /// Puts the gate before a service.
    pub fn new(gate: Arc<Gate>, inner: S) -> Self {
        Self { gate, inner }
    }
}

impl<S, B> Service<Request<B>> for Front<S>
where
    S: Service<Request<B>, Response = Reply, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
    B: Send + 'static,
{
    type Response = Reply;
    type Error = Infallible;
    type Future = FrontFuture;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> FrontFuture {
        let gate = Arc::clone(&self.gate);
        // The service that is ready is used; its clone is what waits for the next request.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        Box::pin(async move {
            match request.uri().path() {
                "/_/health" => return Ok(gate.health(request.method())),
                "/_/ready" => return Ok(ready(&gate, inner, request).await),
                _ => {}
            }
            let began = Instant::now();
            let method = request.method().clone();
            let observed = gate.function.metrics.front.enter();
            let mut reply = match gate.enter() {
                Some(place) => {
                    let limit = gate.time_for(request.headers());
                    within(limit, Some(place), inner.call(request)).await
                }
                None => gate.full(),
            };
            let took = began.elapsed();
            if let Ok(seconds) = HeaderValue::try_from(format!("{:.6}", took.as_secs_f64())) {
                reply.headers_mut().insert(DURATION, seconds);
            }
            observed.done(&method, reply.status().as_u16(), took);
            Ok(reply)
        })
    }
}

/// The readiness probe, which is the handler's where the settings have a path for it. It takes no place and is not
/// counted: a probe must not be why a request meets the limit.
async fn ready<S, B>(gate: &Gate, mut inner: S, mut request: Request<B>) -> Reply
where
    S: Service<Request<B>, Response = Reply, Error = Infallible>,
{
    if *request.method() != Method::GET {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET is allowed here");
    }
    if let Some(why) = gate.not_ready().await {
        return why;
    }
    // A path by the settings' own check.
    let Some(Ok(uri)) = gate.ready_path.as_ref().map(|path| path.parse()) else {
        return text(StatusCode::OK, "OK");
    };
    *request.uri_mut() = uri;
    request.extensions_mut().insert(Probe);
    within(gate.time_for(request.headers()), None, inner.call(request)).await
}

/// The reply in time; of-watchdog's words where there is none. The place is held until the whole reply is sent.
async fn within(
    limit: Option<Duration>,
    place: Option<OwnedSemaphorePermit>,
    asked: impl Future<Output = Result<Reply, Infallible>>,
) -> Reply {
    let until = limit.map(|limit| tokio::time::Instant::now() + limit);
    let answered = match until {
        Some(until) => tokio::time::timeout_at(until, asked).await.ok(),
        None => Some(asked.await),
    };
    let Some(Ok(mut reply)) = answered else {
        return ours(text(StatusCode::GATEWAY_TIMEOUT, ""));
    };
    let is_from_handler = matches!(reply.body(), ReplyBody::Upstream(_));
    if !is_from_handler && reply.headers().get(REFUSAL_HEADER).is_some_and(|code| code == "upstream_unreachable") {
        *reply.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
        reply = ours(reply);
    }
    reply.map(|body| body.guarded(place, until))
}

fn ours(mut reply: Reply) -> Reply {
    reply.headers_mut().insert(INTERNAL, INTERNAL_US);
    reply
}
