//! Passes requests outside `/v2` to the handler behind the sidecar, streaming both ways.
//!
//! Method, path, query, `Host` and headers go through as they are, less what concerns one hop only. Retries and
//! timeouts are the platform's: it knows the function's.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Request, Uri, header, uri};
use http_body_util::combinators::UnsyncBoxBody;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};

use super::reply::{self, BoxError, Reply, ReplyBody};
use crate::{
    failure::Failure,
    infer::Function,
    limits::{DIAL_WITHIN, HTTP1_BUFFER_MAX, UPSTREAM_IDLE_MAX, UPSTREAM_IDLE_WITHIN},
};

/// Headers that end at the next hop (RFC 9110, section 7.6.1).
const HOP_BY_HOP: [HeaderName; 8] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    HeaderName::from_static("proxy-connection"),
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Marks a request that only asks whether the handler is ready.
#[derive(Clone, Copy, Debug)]
pub struct Probe;

/// Whether no inference will come of it: our own probes, the kubelet's and those of Knative's network.
fn is_probe<B>(request: &Request<B>) -> bool {
    let agent = request.headers().get(header::USER_AGENT).map(http::HeaderValue::as_bytes).unwrap_or_default();
    request.extensions().get::<Probe>().is_some()
        || agent.starts_with(b"kube-probe")
        || request.headers().contains_key("k-network-probe")
}

/// The handler behind the sidecar.
#[derive(Clone, Debug)]
pub struct Upstream {
    authority: uri::Authority,
    client: Client<HttpConnector, UnsyncBoxBody<Bytes, BoxError>>,
    function: std::sync::Arc<Function>,
    prefetch: bool,
}

impl Upstream {
    /// The handler at `http://<authority>`. `prefetch`: what goes there will ask for an inference before long.
    pub fn new(authority: uri::Authority, function: std::sync::Arc<Function>, prefetch: bool) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(DIAL_WITHIN));
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(UPSTREAM_IDLE_WITHIN)
            .pool_max_idle_per_host(UPSTREAM_IDLE_MAX)
            .http1_max_buf_size(HTTP1_BUFFER_MAX)
            .build(connector);
        Self { authority, client, function, prefetch }
    }

    /// Passes one request on and its reply back.
    pub async fn pass<B>(&self, request: Request<B>) -> Reply
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        if self.prefetch && !is_probe(&request) {
            // While the handler reads and prepares its input, the broker brings weights that have left.
            self.function.announce();
        }
        match self.try_pass(request).await {
            Ok(reply) => {
                self.function.metrics.passed_upstream("ok");
                reply
            }
            Err(failure) => {
                tracing::warn!(error = %failure, "handler unreachable");
                self.function.metrics.passed_upstream(failure.verdict().code);
                reply::failure(&failure)
            }
        }
    }

    async fn try_pass<B>(&self, request: Request<B>) -> Result<Reply, Failure>
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let (mut parts, body) = request.into_parts();
        strip(&mut parts.headers);
        // HTTP/2 says the host in the URI only.
        if let Some(authority) = parts.uri.authority()
            && !parts.headers.contains_key(header::HOST)
            && let Ok(host) = authority.as_str().parse()
        {
            parts.headers.insert(header::HOST, host);
        }
        let mut target = Uri::builder().scheme(uri::Scheme::HTTP).authority(self.authority.clone());
        target = target.path_and_query(parts.uri.path_and_query().map_or("/", uri::PathAndQuery::as_str));
        parts.uri =
            target.build().map_err(|error| Failure::Invalid(format!("the path cannot be passed on: {error}")))?;
        parts.version = http::Version::HTTP_11;
        let body = UnsyncBoxBody::new(http_body_util::BodyExt::map_err(body, Into::into));
        let reply = self.client.request(Request::from_parts(parts, body)).await;
        let mut reply = reply.map_err(|error| {
            let cause = std::error::Error::source(&error).map_or_else(String::new, |cause| format!(": {cause}"));
            Failure::Upstream(format!("the handler at {} gave no reply: {error}{cause}", self.authority))
        })?;
        strip(reply.headers_mut());
        Ok(reply.map(ReplyBody::Upstream))
    }
}

/// Takes out what concerns one hop, and what `Connection` names besides.
fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_concerns_one_hop_is_taken_out_and_the_rest_stays() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "close, X-Hop"),
            ("x-hop", "1"),
            ("te", "trailers"),
            ("x-call-id", "7"),
            ("keep-alive", "5"),
        ] {
            headers.insert(HeaderName::from_static(name), value.parse().unwrap());
        }
        strip(&mut headers);
        assert_eq!(headers.len(), 1);
        assert_eq!(headers["x-call-id"], "7");
    }
}
