//! Fetches one file, however often the connection breaks.
//!
//! A broken transfer goes on where it broke, but only if the server says that the file is unchanged since; else it
//! starts over. So what is put together is one version of the file, or its digest shows that it is not.

use std::path::Path;

use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::time::{Instant, sleep, timeout};

use super::{
    FetchError, FetchLimits, Progress,
    client::{Ask, Client, with_causes},
    onnx,
    part::{Part, Written},
    url::ModelUrl,
};
use crate::limits::{FETCH_ADVANCE_MIN, FETCH_SAID_EVERY};

/// One file to fetch.
pub(super) struct Wanted<'a> {
    pub(super) url: &'a ModelUrl,
    pub(super) credentials: Option<&'a HeaderValue>,
    /// Whether it must be an ONNX graph.
    pub(super) is_graph: bool,
    /// Whether the whole model's digest will be compared.
    pub(super) is_verified: bool,
    /// What the model may still take.
    pub(super) bytes_max: u64,
}

/// The state of one download across connections.
struct Download<'a> {
    client: &'a Client,
    wanted: &'a Wanted<'a>,
    limits: &'a FetchLimits,
    progress: &'a Progress,
    part: Part,
    /// What says that the file is still the one that we have the beginning of.
    version: Option<HeaderValue>,
    said: Instant,
    disk_failed: bool,
}

/// Fetches the file to its end, or says why that cannot be.
pub(super) async fn download(
    client: &Client,
    wanted: &Wanted<'_>,
    folder: &Path,
    limits: &FetchLimits,
    progress: &Progress,
) -> Result<Written, FetchError> {
    let part = Part::new(folder);
    let mut this =
        Download { client, wanted, limits, progress, part, version: None, said: Instant::now(), disk_failed: false };
    let (mut failures, mut pause) = (0, limits.pause_min);
    loop {
        let had = this.part.len();
        let Err(error) = this.attempt().await else { break };
        if this.part.len() >= had.saturating_add(FETCH_ADVANCE_MIN) {
            (failures, pause) = (0, limits.pause_min);
        }
        failures += 1;
        if !error.may_pass() || failures >= limits.tries_max {
            return Err(error);
        }
        tracing::warn!(%error, failures, got = this.part.len(), pause_ms = pause.as_millis(), "the fetch goes on after a pause");
        sleep(pause).await;
        pause = (pause * 2).min(limits.pause_max);
    }
    this.part.finish().await.map_err(|error| FetchError::Disk { folder: folder.to_owned(), error })
}

impl Download<'_> {
    /// One connection's worth.
    async fn attempt(&mut self) -> Result<(), FetchError> {
        let from = self.part.len();
        let rest = self.version.as_ref().filter(|_| from > 0).map(|version| (from, version));
        let resumes = rest.is_some();
        let ask = Ask { url: self.wanted.url, credentials: self.wanted.credentials, rest };
        let reply = self.client.get(&ask, self.limits).await?;
        let whole = match reply.status() {
            StatusCode::PARTIAL_CONTENT if resumes => match self.continuation(reply.headers(), from) {
                Ok(whole) => whole,
                Err(what) => {
                    self.start_over().await;
                    return Err(self.broken(what));
                }
            },
            StatusCode::OK => {
                if from > 0 {
                    tracing::warn!(url = %self.wanted.url, got = from, "the file changed, or cannot be resumed: starting over");
                    self.start_over().await;
                }
                self.version = self.version_of(reply.headers());
                self.length(&reply)?
            }
            StatusCode::RANGE_NOT_SATISFIABLE => {
                self.start_over().await;
                return Err(self.broken("the file is shorter than what came of it".to_owned()));
            }
            status => return Err(FetchError::Status { url: self.wanted.url.clone(), status }),
        };
        if whole.is_some_and(|whole| whole > self.wanted.bytes_max) {
            return Err(self.too_large());
        }
        tracing::info!(url = %self.wanted.url, from = self.part.len(), whole, "fetching the model");
        self.progress.begin(self.part.len(), whole);
        self.take(reply.into_body()).await?;
        match whole {
            // Why it failed, the writer says at its end.
            Some(whole) if self.part.len() != whole && !self.disk_failed => {
                Err(self.broken(format!("{} of {whole} bytes came", self.part.len())))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// A strong entity tag; where a digest will tell, the date of the last change will do, too.
    fn version_of(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        let tag = headers.get(header::ETAG).filter(|tag| tag.as_bytes().starts_with(b"\""));
        tag.or_else(|| headers.get(header::LAST_MODIFIED).filter(|_| self.wanted.is_verified)).cloned()
    }

    async fn start_over(&mut self) {
        self.version = None;
        self.part.restart().await;
    }

    /// The file's length, where a whole file is sent. Without one, only a digest shows that it came to its end.
    fn length(&self, reply: &Response<Incoming>) -> Result<Option<u64>, FetchError> {
        let packed = reply.headers().get(header::CONTENT_ENCODING).is_some_and(|coding| coding != "identity");
        if packed {
            return Err(FetchError::Packed { url: self.wanted.url.clone() });
        }
        let announced = number(reply.headers(), &header::CONTENT_LENGTH);
        let ends_itself = reply.headers().contains_key(header::TRANSFER_ENCODING);
        if announced.is_none() && !ends_itself && !self.wanted.is_verified {
            return Err(FetchError::NoLength { url: self.wanted.url.clone() });
        }
        Ok(announced)
    }

    /// Checks that a part begins where ours ends, and is of the same version; its whole length is returned.
    fn continuation(&self, headers: &HeaderMap, from: u64) -> Result<Option<u64>, String> {
        let range = headers.get(header::CONTENT_RANGE).and_then(|range| range.to_str().ok()).unwrap_or_default();
        let (span, whole) = range.strip_prefix("bytes ").and_then(|range| range.split_once('/')).unwrap_or_default();
        if span.split_once('-').and_then(|(start, _)| start.parse().ok()) != Some(from) {
            return Err(format!("the rest from byte {from} was asked for, '{range}' came"));
        }
        let tag = headers.get(header::ETAG);
        if tag.is_some()
            && self.version.as_ref().is_some_and(|had| had.as_bytes().starts_with(b"\"") && tag != Some(had))
        {
            return Err("the rest of another version came".to_owned());
        }
        Ok(whole.parse().ok())
    }

    async fn take(&mut self, mut body: Incoming) -> Result<(), FetchError> {
        loop {
            let frame = timeout(self.limits.silence_max, body.frame()).await;
            let Some(frame) = frame.map_err(|_| self.broken(format!("silent for {:?}", self.limits.silence_max)))?
            else {
                return Ok(());
            };
            let frame = frame.map_err(|error| self.broken(with_causes(&error)))?;
            let Ok(piece) = frame.into_data() else { continue };
            if self.wanted.is_graph && self.part.len() == 0 && !piece.is_empty() && !onnx::begins(&piece) {
                return Err(FetchError::NoOnnx { url: self.wanted.url.clone(), begins: onnx::shown(&piece) });
            }
            if faaswap_protocol::Bytes::of_len(piece.len()).get()
                > self.wanted.bytes_max.saturating_sub(self.part.len())
            {
                return Err(self.too_large());
            }
            if !self.part.push(piece).await {
                self.disk_failed = true;
                return Ok(());
            }
            self.progress.got(self.part.len());
            if self.said.elapsed() >= FETCH_SAID_EVERY {
                self.said = Instant::now();
                tracing::info!(url = %self.wanted.url, "{}", self.progress);
            }
        }
    }

    fn broken(&self, what: String) -> FetchError {
        FetchError::Broken { url: self.wanted.url.clone(), what }
    }

    fn too_large(&self) -> FetchError {
        FetchError::TooLarge { url: self.wanted.url.clone(), max: self.limits.bytes_max }
    }
}

fn number(headers: &HeaderMap, name: &http::HeaderName) -> Option<u64> {
    headers.get(name)?.to_str().ok()?.parse().ok()
}
