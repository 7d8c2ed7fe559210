//! Models that lie on a server: fetched over HTTP or HTTPS, checked by their digest, and then as good as local files.
//!
//! Where the digest is known beforehand, the broker is asked first: weights that the node has are not fetched. What is
//! fetched lies in a file without a name until the broker has it. When to fetch is left to `broker::supervise` and `app`.

mod client;
mod download;
mod error;
mod onnx;
mod part;
mod url;

use std::{
    fmt,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use faaswap_protocol::{Bytes, ModelDigest, ModelFile};
use http::HeaderValue;
use tokio::time::{sleep, timeout};

use self::{
    client::Client,
    download::{Wanted, download},
};
pub use self::{error::FetchError, url::ModelUrl};
use crate::{
    limits,
    model::{LocalFile, Place},
};

/// A model on a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remote {
    /// The `.onnx` file.
    pub graph: ModelUrl,
    /// Its external data, by the names that the graph has for them.
    pub data: Vec<(String, ModelUrl)>,
    /// What must come.
    pub digest: Option<ModelDigest>,
    /// What the server wants to be told.
    pub credentials: Credentials,
    /// Where files are put while they are fetched.
    pub folder: PathBuf,
    /// How much and how long.
    pub limits: FetchLimits,
}

/// How to get the value of the Authorization header.
#[derive(Clone, Default, PartialEq, Eq)]
pub enum Credentials {
    /// None is sent.
    #[default]
    None,
    /// This.
    Given(String),
    /// What the file holds when it is needed: mounted secrets change.
    File(PathBuf),
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::Given(_) => f.write_str("Given(..)"),
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
        }
    }
}

/// What a fetch may take. The defaults are the limits of `limits.rs`; tests have shorter ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FetchLimits {
    /// All files of the model together.
    pub bytes_max: Bytes,
    /// To open a connection.
    pub connect_within: Duration,
    /// From the question to the reply's head.
    pub head_within: Duration,
    /// Between two pieces of a body.
    pub silence_max: Duration,
    /// All of it, pauses included.
    pub within: Duration,
    /// Failures in a row without much coming between them.
    pub tries_max: u32,
    /// First pause after a failure; doubles.
    pub pause_min: Duration,
    /// Longest pause between two tries.
    pub pause_max: Duration,
    /// First pause after a fetch was given up; doubles.
    pub again_min: Duration,
    /// Longest pause before the next fetch.
    pub again_max: Duration,
}

impl Default for FetchLimits {
    fn default() -> Self {
        Self {
            bytes_max: limits::FETCH_BYTES_DEFAULT,
            connect_within: limits::FETCH_CONNECT_WITHIN,
            head_within: limits::FETCH_HEAD_WITHIN,
            silence_max: limits::FETCH_SILENCE_MAX,
            within: limits::FETCH_WITHIN,
            tries_max: limits::FETCH_TRIES_MAX,
            pause_min: limits::FETCH_PAUSE_MIN,
            pause_max: limits::FETCH_PAUSE_MAX,
            again_min: limits::FETCH_AGAIN_MIN,
            again_max: limits::FETCH_AGAIN_MAX,
        }
    }
}

/// How far a fetch is.
#[derive(Debug, Default)]
pub struct Progress {
    /// Of the files before this one.
    before: AtomicU64,
    file: AtomicU64,
    whole: AtomicU64,
    name: Mutex<String>,
}

impl Progress {
    fn next_file(&self, name: &str) {
        self.before.fetch_add(self.file.swap(0, Ordering::Relaxed), Ordering::Relaxed);
        self.whole.store(0, Ordering::Relaxed);
        name.clone_into(&mut self.name.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn begin(&self, got: u64, whole: Option<u64>) {
        self.file.store(got, Ordering::Relaxed);
        self.whole.store(whole.unwrap_or(0), Ordering::Relaxed);
    }

    fn got(&self, bytes: u64) {
        self.file.store(bytes, Ordering::Relaxed);
    }

    fn all(&self) -> u64 {
        self.before.load(Ordering::Relaxed) + self.file.load(Ordering::Relaxed)
    }
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (got, whole) = (self.file.load(Ordering::Relaxed), self.whole.load(Ordering::Relaxed));
        write!(f, "fetching the model: {} of {name}", Bytes::new(got))?;
        if whole > 0 { write!(f, " ({}, {} %)", Bytes::new(whole), got.saturating_mul(100) / whole) } else { Ok(()) }
    }
}

/// Where a fetch stands, for whoever shows it.
#[derive(Clone, Debug)]
pub enum Stage {
    /// It runs.
    Fetching(Arc<Progress>),
    /// It was given up, for now.
    Failed(String),
}

/// How long to wait after a fetch that was given up; longer each time.
#[derive(Debug)]
pub struct Patience(Option<Duration>);

impl Patience {
    /// Nothing has failed yet.
    pub fn new() -> Self {
        Self(None)
    }

    /// Fetches the model; `told` hears how it goes. `None`: it was given up, and the pause after that is over.
    pub async fn try_once(
        &mut self,
        remote: &Remote,
        mut told: impl FnMut(Stage),
    ) -> Option<(ModelDigest, Vec<LocalFile>)> {
        let progress = Arc::new(Progress::default());
        told(Stage::Fetching(Arc::clone(&progress)));
        let error = match fetch(remote, &progress).await {
            Ok(fetched) => return Some(fetched),
            Err(error) => error,
        };
        let limits = &remote.limits;
        let doubled = self.0.map_or(limits.again_min, |pause| (pause * 2).min(limits.again_max));
        let pause = if error.is_dear() { limits.again_max } else { doubled };
        self.0 = Some(pause);
        tracing::error!(%error, again_s = pause.as_secs(), "the model cannot be fetched; the function is not ready");
        told(Stage::Failed(error.to_string()));
        sleep(pause).await;
        None
    }
}

impl Default for Patience {
    fn default() -> Self {
        Self::new()
    }
}

/// Fetches the model, again and again until it is there; `told` hears how it goes.
pub async fn until_fetched(remote: &Remote, mut told: impl FnMut(Stage)) -> (ModelDigest, Vec<LocalFile>) {
    let mut patience = Patience::new();
    loop {
        if let Some(fetched) = patience.try_once(remote, &mut told).await {
            return fetched;
        }
    }
}

/// Fetches all files of the model and compares its digest.
pub async fn fetch(remote: &Remote, progress: &Progress) -> Result<(ModelDigest, Vec<LocalFile>), FetchError> {
    let limits = &remote.limits;
    let all = timeout(limits.within, fetch_files(remote, progress)).await;
    let files = all.unwrap_or_else(|_| Err(FetchError::Slow { url: remote.graph.clone(), within: limits.within }))?;
    let digests: Vec<_> = files.iter().map(|(file, digest)| (file.file.clone(), *digest)).collect();
    let came = ModelDigest::of_files(&digests);
    match remote.digest {
        Some(wanted) if wanted != came => Err(FetchError::Digest { url: remote.graph.clone(), came, wanted }),
        Some(_) => {
            tracing::info!(url = %remote.graph, bytes = progress.all(), "model fetched");
            Ok((came, files.into_iter().map(|(file, _)| file).collect()))
        }
        None => {
            tracing::warn!(url = %remote.graph, bytes = progress.all(), model = %came, "model fetched; pin it by this digest");
            Ok((came, files.into_iter().map(|(file, _)| file).collect()))
        }
    }
}

async fn fetch_files(remote: &Remote, progress: &Progress) -> Result<Vec<(LocalFile, [u8; 32])>, FetchError> {
    let limits = remote.limits;
    let credentials = remote.credentials.clone();
    let prepared = tokio::task::spawn_blocking(move || Ok((Client::new(&limits)?, value_of(&credentials)?)));
    let (client, credentials) = prepared.await.map_err(|error| FetchError::Tls(error.to_string()))??;
    let graph_name = remote.graph.name().unwrap_or("model.onnx").to_owned();
    let graph = std::iter::once((&graph_name, &remote.graph));
    let mut left = limits.bytes_max.get();
    let mut files = Vec::new();
    for (name, url) in graph.chain(remote.data.iter().map(|(name, url)| (name, url))) {
        progress.next_file(name);
        let wanted = Wanted {
            url,
            // Of another server than the graph's nothing is known.
            credentials: credentials.as_ref().filter(|_| url.has_origin_of(&remote.graph)),
            is_graph: files.is_empty(),
            is_verified: remote.digest.is_some(),
            bytes_max: left,
        };
        let written = download(&client, &wanted, &remote.folder, &limits, progress).await?;
        left = left.saturating_sub(written.len);
        let file = ModelFile { path: name.clone(), len: Bytes::new(written.len) };
        files.push((LocalFile { file, place: Place::Held(Arc::new(written.file)) }, written.digest));
    }
    Ok(files)
}

/// The header's value, marked so that nobody prints it.
fn value_of(credentials: &Credentials) -> Result<Option<HeaderValue>, FetchError> {
    let (text, path) = match credentials {
        Credentials::None => return Ok(None),
        Credentials::Given(text) => (text.clone(), PathBuf::from("FAASWAP_MODEL_AUTH")),
        Credentials::File(path) => {
            let text = std::fs::read_to_string(path);
            (text.map_err(|e| FetchError::Credentials { path: path.clone(), why: e.to_string() })?, path.clone())
        }
    };
    let why = "this is no value of an Authorization header, such as Bearer <token>".to_owned();
    let mut value: HeaderValue = text.trim().parse().map_err(|_| FetchError::Credentials { path, why })?;
    value.set_sensitive(true);
    Ok(Some(value))
}
