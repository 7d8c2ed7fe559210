//! The HTTP half of the Open Inference Protocol, and the one service behind the port: gRPC, protocol and handler.
//!
//! The stack, outermost first: `limit` refuses when too much is in work; then the kind of request is told apart by
//! content type and path. `failure` turns what goes wrong into statuses; `server` owns sockets and their limits.

pub mod body;
pub mod encoding;
pub mod hint;
pub mod image;
pub mod intake;
pub mod json_data;
pub mod limit;
pub mod oip;
pub mod proxy;
pub mod reply;
pub mod request;
mod request_json;
pub mod rest;
pub mod route;
pub mod views;

use std::{
    convert::Infallible,
    sync::Arc,
    task::{Context, Poll},
};

use http::{Request, header};
use tower::Service;

use self::{image::Images, oip::Oip, proxy::Upstream, reply::Reply};
use crate::{failure::Failure, grpc::Grpc};

/// Response header with the stable code of a failure.
pub const REFUSAL_HEADER: &str = "faaswap-refusal";

type ServiceFuture = std::pin::Pin<Box<dyn Future<Output = Result<Reply, Infallible>> + Send>>;

/// Tells requests apart and hands them on.
#[derive(Clone, Debug)]
pub struct Dispatch {
    oip: Arc<Oip>,
    grpc: Grpc,
    besides: Besides,
}

/// Who answers what is not of the protocol.
#[derive(Clone, Debug)]
pub enum Besides {
    /// Nobody.
    Nobody,
    /// The handler behind the sidecar.
    Handler(Arc<Upstream>),
    /// The sidecar itself, at `/`.
    Images(Arc<Images>),
}

impl Dispatch {
    /// The three that requests are handed to.
    pub fn new(oip: Arc<Oip>, grpc: Grpc, besides: Besides) -> Self {
        Self { oip, grpc, besides }
    }
}

impl<B> Service<Request<B>> for Dispatch
where
    B: http_body::Body<Data = bytes::Bytes> + Send + Unpin + 'static,
    B::Error: Into<reply::BoxError> + std::fmt::Display + Send,
{
    type Response = Reply;
    type Error = Infallible;
    type Future = ServiceFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> ServiceFuture {
        if is_grpc(&request) {
            return Box::pin(self.grpc.serve(request));
        }
        if route::is_protocol(request.uri().path()) {
            let oip = Arc::clone(&self.oip);
            return Box::pin(async move { Ok(oip.serve(request).await) });
        }
        let served = match &self.besides {
            Besides::Handler(upstream) => {
                let upstream = Arc::clone(upstream);
                return Box::pin(async move { Ok(upstream.pass(request).await) });
            }
            Besides::Images(images) if request.uri().path() == "/" => {
                let images = Arc::clone(images);
                return Box::pin(async move { Ok(images.serve(request).await) });
            }
            Besides::Images(_) => "/v2 is served here, and images at /",
            Besides::Nobody => "only /v2 is served here; for others no upstream is configured",
        };
        let failure = Failure::NotFound(format!("no such path: {} ({served})", request.uri().path()));
        Box::pin(std::future::ready(Ok(reply::failure(&failure))))
    }
}

fn is_grpc<B>(request: &Request<B>) -> bool {
    let kind = request.headers().get(header::CONTENT_TYPE).map(http::HeaderValue::as_bytes);
    kind.and_then(|kind| kind.strip_prefix(b"application/grpc"))
        .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}
