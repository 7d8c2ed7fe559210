//! Models on disk, by content: what was uploaded, and what was prepared from it.
//!
//! `models/<hex>/` holds a model's files and `model.json`, its table of contents; `prepared/<hex>-<target>/` what the
//! engine made of it; `kin/<target>/<kind>` names the first of the models that differ in their weights alone. Folders appear whole, by renaming. Who uses a model, and what is in host memory, is not decided here.

mod memory;
mod prepare;
mod upload;

use std::{
    fs,
    io::{self, Write},
    path::{Component, Path, PathBuf},
    time::SystemTime,
};

use faaswap_engine::{Manifest, ORT_VERSION, manifest::MANIFEST_VERSION};
use faaswap_protocol::{Bytes, Detail, ModelDigest, ModelFile, Refusal, limits::MODEL_FILES_MAX};
use serde::{Deserialize, Serialize};

pub use self::{
    memory::{Held, Home, Memory, MemoryError, Ready, TierStats},
    prepare::{ChildJob, ChildLimits, Preparer, child},
    upload::{Upload, UploadError, copy_files},
};

const CONTENTS: &str = "model.json";
/// Longest name of a model's file.
const FILE_NAME_MAX: usize = 255;

/// A model's table of contents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contents {
    /// The files; the graph first.
    pub files: Vec<ModelFile>,
}

impl Contents {
    /// Size of all files.
    pub fn size(&self) -> Bytes {
        self.files.iter().map(|file| file.len).sum()
    }
}

/// The folder.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
    max: Bytes,
    /// What prepared models are for.
    flavour: String,
}

impl Store {
    /// Makes the folder where needed, and removes what an earlier process left unfinished.
    pub fn open(dir: &Path, max: Bytes) -> io::Result<Self> {
        let store = Self { dir: dir.to_owned(), max, flavour: flavour(None) };
        fs::create_dir_all(store.dir.join("models"))?;
        fs::create_dir_all(store.dir.join("prepared"))?;
        let drafts = store.dir.join("drafts");
        if drafts.exists() {
            fs::remove_dir_all(&drafts)?;
        }
        fs::create_dir_all(&drafts)?;
        Ok(store)
    }

    /// The same store, whose prepared models are for machines of this kind.
    pub fn with_flavour(self, flavour: String) -> Self {
        Self { flavour, ..self }
    }

    /// Folder of an uploaded model.
    pub fn model_dir(&self, model: &ModelDigest) -> PathBuf {
        self.dir.join("models").join(model.hex())
    }

    /// Folder of the prepared model for this kind of machine, this ONNX Runtime and this engine.
    pub fn prepared_dir(&self, model: &ModelDigest) -> PathBuf {
        self.dir.join("prepared").join(format!("{}-{}", model.hex(), self.made_for()))
    }

    /// Folder of what is known of kinds of models, for the same.
    pub fn kin_dir(&self) -> PathBuf {
        self.dir.join("kin").join(self.made_for())
    }

    /// Whether any kind is known.
    fn has_kinds(&self) -> bool {
        self.kin_dir().exists()
    }

    fn made_for(&self) -> String {
        format!("{}-ort{ORT_VERSION}-v{MANIFEST_VERSION}", self.flavour)
    }

    /// A folder of one's own for something unfinished.
    pub fn draft(&self) -> io::Result<PathBuf> {
        use std::sync::atomic::{AtomicU64, Ordering};
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let draft = self.dir.join("drafts").join(NEXT.fetch_add(1, Ordering::Relaxed).to_string());
        fs::create_dir(&draft)?;
        Ok(draft)
    }

    /// What was uploaded under this digest.
    pub fn contents(&self, model: &ModelDigest) -> Option<Contents> {
        let text = fs::read(self.model_dir(model).join(CONTENTS)).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Takes a draft over as the model.
    pub fn keep(&self, draft: &Path, model: &ModelDigest, contents: &Contents) -> io::Result<()> {
        let mut file = fs::File::create(draft.join(CONTENTS))?;
        file.write_all(&serde_json::to_vec(contents)?)?;
        file.sync_all()?;
        let home = self.model_dir(model);
        if home.exists() {
            // Somebody else was faster with the same content.
            return fs::remove_dir_all(draft);
        }
        fs::rename(draft, home)
    }

    /// Sees to it that `needed` more bytes fit, by removing the models that were added first and that `in_use` does not
    /// claim. What was prepared from a model goes with it.
    pub fn make_room(&self, needed: Bytes, in_use: impl Fn(&str) -> bool) -> Result<(), Refusal> {
        let mut models = self.sizes().map_err(|e| full(&e.to_string()))?;
        models.sort_by_key(|(_, _, added)| *added);
        let mut total: Bytes = models.iter().map(|(_, size, _)| *size).sum();
        for (hex, size, _) in models {
            if total.checked_add(needed).is_some_and(|sum| sum <= self.max) {
                return Ok(());
            }
            if !in_use(&hex) {
                tracing::info!(model = hex, %size, "removed from the full store");
                self.remove(&hex).map_err(|e| full(&e.to_string()))?;
                total = total.checked_sub(size).unwrap_or(Bytes::ZERO);
            }
        }
        match total.checked_add(needed) {
            Some(sum) if sum <= self.max => Ok(()),
            Some(_) | None => Err(full(&format!("{needed} needed, {total} of {} are in use", self.max))),
        }
    }

    fn remove(&self, hex: &str) -> io::Result<()> {
        for entry in fs::read_dir(self.dir.join("prepared"))? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(hex) {
                fs::remove_dir_all(entry.path())?;
            }
        }
        fs::remove_dir_all(self.dir.join("models").join(hex))
    }

    /// Digest, size with all that was made of it, and age of each model.
    fn sizes(&self) -> io::Result<Vec<(String, Bytes, SystemTime)>> {
        let mut sizes = Vec::new();
        for entry in fs::read_dir(self.dir.join("models"))? {
            let entry = entry?;
            let hex = entry.file_name().to_string_lossy().into_owned();
            let mut size = folder_size(&entry.path())?;
            for prepared in fs::read_dir(self.dir.join("prepared"))? {
                let prepared = prepared?;
                if prepared.file_name().to_string_lossy().starts_with(&hex) {
                    size = Bytes::new(size.get().saturating_add(folder_size(&prepared.path())?.get()));
                }
            }
            sizes.push((hex, size, entry.metadata()?.modified()?));
        }
        Ok(sizes)
    }
}

/// How machines are named for which models are prepared: by their processor, or by a GPU's capability and whether its
/// fp32 products may be computed in TF32.
pub fn flavour(gpu: Option<(i32, bool)>) -> String {
    match gpu {
        Some((capability, tf32)) => format!("cuda{capability}-tf32-{tf32}"),
        None => std::env::consts::ARCH.to_owned(),
    }
}

/// Name of a prepared model's weights in host memory. What was prepared otherwise, by another ONNX Runtime or in another
/// layout, has another name: a broker takes over what it finds in memory, which would be in the wrong order.
pub fn memory_key(model: &ModelDigest, prepared: &Manifest) -> String {
    format!("{}-{}", model.hex(), prepared.weights_name())
}

fn folder_size(dir: &Path) -> io::Result<Bytes> {
    let mut size = 0_u64;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        let more = if kind.is_dir() { folder_size(&entry.path())?.get() } else { entry.metadata()?.len() };
        size = size.saturating_add(more);
    }
    Ok(Bytes::new(size))
}

fn full(reason: &str) -> Refusal {
    Refusal::UploadFailed { reason: Detail::from(format!("the node's store of models is full: {reason}")) }
}

/// Whether a model may consist of these files; says what is wrong with them.
pub fn check_files(files: &[ModelFile], model_max: Bytes) -> Result<(), String> {
    if files.is_empty() || files.len() > MODEL_FILES_MAX {
        return Err(format!("a model has 1 to {MODEL_FILES_MAX} files, not {}", files.len()));
    }
    let mut seen = std::collections::BTreeSet::new();
    let mut total = Bytes::ZERO;
    for file in files {
        let path = Path::new(&file.path);
        let mut parts = path.components();
        let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
        if !plain || file.path.len() > FILE_NAME_MAX || file.path == CONTENTS || file.path.contains('\0') {
            return Err(format!("{:?} is no plain file name", file.path));
        }
        if !seen.insert(&file.path) {
            return Err(format!("{:?} comes twice", file.path));
        }
        total = total.checked_add(file.len).ok_or("the sizes of the files overflow")?;
    }
    if total > model_max {
        return Err(format!("the model has {total}, at most {model_max} are allowed"));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
