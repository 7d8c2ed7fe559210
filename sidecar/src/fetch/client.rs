//! Asks a server for a file, or for the rest of one, and follows its redirects.
//!
//! hyper and rustls, which the workspace has already, rather than a larger client: what is wanted is one GET. Whether
//! what comes is the file is left to `download`.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::TokioExecutor,
};
use rustls::{ClientConfig, RootCertStore};
use tokio::time::timeout;

use super::{FetchError, FetchLimits, url::ModelUrl};
use crate::limits::FETCH_REDIRECTS_MAX;

/// The client; authorities are read when it is made.
pub(super) struct Client {
    inner: legacy::Client<HttpsConnector<HttpConnector>, Empty<Bytes>>,
    has_authorities: bool,
}

/// What is asked for.
pub(super) struct Ask<'a> {
    pub(super) url: &'a ModelUrl,
    pub(super) credentials: Option<&'a HeaderValue>,
    /// Where to go on, and what must be unchanged for that: an entity tag or a date.
    pub(super) rest: Option<(u64, &'a HeaderValue)>,
}

impl Client {
    /// Reads the system's authorities: for a thread that may block.
    pub(super) fn new(limits: &FetchLimits) -> Result<Self, FetchError> {
        let mut authorities = RootCertStore::empty();
        // Those that cannot be read are no use; that there is none at all is said when one is needed.
        let (_added, _ignored) = authorities.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        let has_authorities = !authorities.is_empty();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| FetchError::Tls(error.to_string()))?
            .with_root_certificates(authorities)
            .with_no_client_auth();
        let mut http = HttpConnector::new();
        http.enforce_http(false);
        http.set_connect_timeout(Some(limits.connect_within));
        let https =
            HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1().wrap_connector(http);
        // Each file is a connection of its own: one that broke must not be found again.
        let inner = legacy::Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(https);
        Ok(Self { inner, has_authorities })
    }

    /// The reply to a GET, wherever redirects led.
    pub(super) async fn get(&self, ask: &Ask<'_>, limits: &FetchLimits) -> Result<Response<Incoming>, FetchError> {
        let mut url = ask.url.clone();
        for _ in 0..=FETCH_REDIRECTS_MAX {
            let reply = self.get_once(&url, ask, limits).await?;
            if !is_redirect(reply.status()) {
                return Ok(reply);
            }
            let target = reply.headers().get(header::LOCATION).and_then(|to| to.to_str().ok());
            let target = target.ok_or_else(|| FetchError::Redirect { url: url.clone(), why: "leads nowhere" })?;
            let next = url.join(target);
            let next = next.map_err(|_| FetchError::Redirect { url: url.clone(), why: "leads to what is no URL" })?;
            if url.is_encrypted() && !next.is_encrypted() {
                return Err(FetchError::Redirect { url, why: "leads from https to http" });
            }
            url = next;
        }
        Err(FetchError::Redirect { url: ask.url.clone(), why: "goes on and on" })
    }

    async fn get_once(
        &self,
        url: &ModelUrl,
        ask: &Ask<'_>,
        limits: &FetchLimits,
    ) -> Result<Response<Incoming>, FetchError> {
        if url.is_encrypted() && !self.has_authorities {
            return Err(FetchError::NoAuthorities);
        }
        let mut request = Request::get(url.uri().clone()).header(header::ACCEPT_ENCODING, "identity");
        request = request.header(header::USER_AGENT, concat!("faaswap-sidecar/", env!("CARGO_PKG_VERSION")));
        if let Some(credentials) = ask.credentials.filter(|_| url.has_origin_of(ask.url)) {
            request = request.header(header::AUTHORIZATION, credentials);
        }
        if let Some((from, unchanged)) = ask.rest {
            request = request.header(header::RANGE, format!("bytes={from}-")).header(header::IF_RANGE, unchanged);
        }
        let broken = |what: String| FetchError::Broken { url: url.clone(), what };
        let request = request.body(Empty::new()).map_err(|error| broken(error.to_string()))?;
        match timeout(limits.head_within, self.inner.request(request)).await {
            Ok(reply) => reply.map_err(|error| broken(with_causes(&error))),
            Err(_) => Err(broken(format!("no answer within {:?}", limits.head_within))),
        }
    }
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// An error with what lies below it: "client error (Connect)" alone helps nobody.
pub(super) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(below) = cause {
        text = format!("{text}: {below}");
        cause = below.source();
    }
    text
}
