//! What configurations say of the model: a path, a digest, or where to fetch it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use faaswap_protocol::{Bytes, ModelDigest, limits::MODEL_FILES_MAX};

use super::{Start, read::Reader};
use crate::{
    fetch::{Credentials, FetchLimits, ModelUrl, Remote},
    limits::FETCH_BYTES_DEFAULT,
    model::ModelRef,
};

/// Largest limit that can be set for a model on a server, in MiB.
const MODEL_MIB_MAX: u64 = 64 << 10;

/// The model and the digest that it must have. `may_be_absent`: a path that leads nowhere is no mistake of the settings,
/// since a front that ended for want of a model would be started again and again; it says why it is not ready instead.
pub(super) fn read(from: &mut Reader, start: &Start, may_be_absent: bool) -> (Option<ModelRef>, Option<ModelDigest>) {
    let data = from.list("model_data");
    let digest = from.parse("model_digest", |text| text.parse::<ModelDigest>().map_err(|error| error.to_string()));
    let fetching = Fetching {
        credentials: credentials(from),
        folder: from.text("model_dir").map_or_else(|| std::env::temp_dir().join("faaswap"), PathBuf::from),
        bytes_max: from.number("model_mib_max", 1..=MODEL_MIB_MAX).map_or(FETCH_BYTES_DEFAULT, Bytes::mib),
        digest,
    };
    let folder = start.folder.as_deref().filter(|_| start.variable("FAASWAP_MODEL").is_none());
    let model = from.required("model", |text| {
        if ModelUrl::is_meant(text) { fetching.remote(text, &data) } else { local(text, folder, data, may_be_absent) }
    });
    let pinned = match &model {
        Some(ModelRef::Remote(remote)) => remote.digest,
        Some(ModelRef::Digest(_) | ModelRef::File { .. } | ModelRef::Folder(_)) | None => digest,
    };
    (model, pinned)
}

/// A digest, a graph, or a folder with one.
fn local(text: &str, folder: Option<&Path>, data: Vec<String>, may_be_absent: bool) -> Result<ModelRef, String> {
    if text.starts_with("sha256:") {
        return text.parse().map(ModelRef::Digest).map_err(|error| error.to_string());
    }
    let path = folder.unwrap_or(Path::new("")).join(text);
    if path.is_dir() {
        return Ok(ModelRef::Folder(path));
    }
    if !path.is_file() && !may_be_absent {
        return Err(format!("'{}' is neither a file, nor a folder, nor a URL, nor sha256:<digest>", path.display()));
    }
    Ok(ModelRef::File { graph: path, data })
}

fn credentials(from: &mut Reader) -> Credentials {
    match (from.text("model_auth"), from.text("model_auth_file")) {
        (None, None) => Credentials::None,
        (Some(text), None) => Credentials::Given(text),
        (None, Some(path)) => Credentials::File(path.into()),
        (Some(_), Some(_)) => {
            from.mistake("model_auth and model_auth_file: only one of them can be set".to_owned());
            Credentials::None
        }
    }
}

/// How models on servers are fetched.
struct Fetching {
    credentials: Credentials,
    folder: PathBuf,
    bytes_max: Bytes,
    digest: Option<ModelDigest>,
}

impl Fetching {
    fn remote(self, text: &str, data: &[String]) -> Result<ModelRef, String> {
        let (graph, in_url) = ModelUrl::parse(text)?;
        let digest = match (in_url, self.digest) {
            (Some(file), None) if data.is_empty() => Some(file),
            (Some(_), None) => {
                return Err(
                    "#sha256= is the digest of one file; of a model with model_data set model_digest".to_owned()
                );
            }
            (Some(file), Some(model)) if file != model => {
                return Err("#sha256= and model_digest name two digests: which one is it?".to_owned());
            }
            (_, pinned) => pinned,
        };
        if digest.is_none() && !graph.is_encrypted() {
            return Err(
                "over http:// anybody on the way can change the model: pin it by #sha256= or model_digest, or use \
                        https://"
                    .to_owned(),
            );
        }
        if data.len() >= MODEL_FILES_MAX {
            return Err(format!("a model has at most {MODEL_FILES_MAX} files, its graph among them"));
        }
        let data = data.iter().map(|entry| beside(&graph, entry)).collect::<Result<_, _>>()?;
        let limits = FetchLimits { bytes_max: self.bytes_max, ..FetchLimits::default() };
        let Self { credentials, folder, .. } = self;
        Ok(ModelRef::Remote(Arc::new(Remote { graph, data, digest, credentials, folder, limits })))
    }
}

/// A file of external data: its name beside the graph, or a URL of its own that ends with the name.
fn beside(graph: &ModelUrl, entry: &str) -> Result<(String, ModelUrl), String> {
    let url = if ModelUrl::is_meant(entry) { ModelUrl::parse(entry).map(|(url, _)| url) } else { graph.join(entry) };
    let url = url.map_err(|why| format!("a file of model_data: {why}"))?;
    let name = if ModelUrl::is_meant(entry) { url.name().map(str::to_owned) } else { Some(entry.to_owned()) };
    match name {
        Some(name) => Ok((name, url)),
        None => Err("a URL in model_data ends with no file name".to_owned()),
    }
}
