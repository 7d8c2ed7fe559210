//! Models that differ in their weights alone are prepared once: what was prepared for the first is used for the others.
//!
//! Fine-tuned variants of one architecture have the same *kind*, a digest of everything but float weights. Where each
//! part of prepared weights comes from is [learnt](learn) once per kind, when its second model comes: the first is
//! optimized again with all weights changed a little, and every part must be found among them, before and after, as a copy or
//! transposed; the graph must not have changed. Such a kind's further models need neither ONNX Runtime nor a device to be
//! prepared. A kind of which a part is computed from weights is prepared model by model.

mod derive;
mod learn;
mod original;
mod parts;

use std::{
    fs,
    path::{Path, PathBuf},
};

use faaswap_protocol::Bytes;
use serde::{Deserialize, Serialize};

use self::{original::Original, parts::Part};
use crate::{EngineError, PrepareError, Prepared, Runtime, limits::MANIFEST_BYTES_MAX};

/// Where parts come from, beside the manifest of the kind's first model.
const RECIPE_FILE: &str = "recipe.json";

/// One model that may be of a known kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareJob {
    /// Folder of the original model.
    pub model_dir: PathBuf,
    /// Name of its graph file in that folder.
    pub graph_file: String,
    /// Folder of what is known of kinds, for one kind of machine.
    pub kin_dir: PathBuf,
    /// Folder for the prepared model; made if it is not there.
    pub out_dir: PathBuf,
    /// Wanted size of the later groups.
    pub group_bytes: Bytes,
    /// Whether a recipe may be learnt, which takes a device and about as long as half of preparing.
    pub may_learn: bool,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Shared {
    /// The model is prepared.
    Prepared,
    /// It has to be prepared by itself. Then it may be [named](Kin::name) as the first of its kind.
    Alone {
        /// Its kind.
        kind: String,
        /// Whether nothing of its kind is there yet.
        is_first: bool,
        /// Whether learning could help.
        is_learnable: bool,
    },
}

/// The first model of a kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kin {
    /// Folder of the original model.
    pub model_dir: PathBuf,
    /// Its graph file.
    pub graph_file: String,
    /// Folder of the prepared model.
    pub prepared_dir: PathBuf,
}

impl Kin {
    /// Names a prepared model as the first of its kind.
    pub fn name(&self, kin_dir: &Path, kind: &str) -> Result<(), EngineError> {
        fs::create_dir_all(kin_dir).map_err(EngineError::io(kin_dir))?;
        write_whole(&kin_dir.join(kind), self)
    }

    /// The first of a kind, as long as all of it is there.
    fn of(kin_dir: &Path, kind: &str) -> Option<(Self, Prepared)> {
        let kin: Self = serde_json::from_slice(&fs::read(kin_dir.join(kind)).ok()?).ok()?;
        let prepared = Prepared::open(&kin.prepared_dir).ok()?;
        kin.model_dir.join(&kin.graph_file).is_file().then_some((kin, prepared))
    }
}

/// What is known of a kind's parts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Recipe {
    /// Each part's origin, first those in the weights' file, then those in the graph.
    Parts { in_file: Vec<Part>, in_graph: Vec<(String, Part)> },
    /// It cannot be had.
    Unknown { why: String },
}

/// Prepares the model by what was prepared for the first of its kind, where that can be done. `runtime` is asked for only
/// where something has to be learnt.
pub fn share(runtime: impl FnOnce() -> Result<Runtime, EngineError>, job: &ShareJob) -> Result<Shared, PrepareError> {
    let original = Original::open(&job.model_dir, &job.graph_file)?;
    let kind = original.kind()?;
    let alone = |is_first, is_learnable| Ok(Shared::Alone { kind: kind.clone(), is_first, is_learnable });
    let Some((kin, prepared)) = Kin::of(&job.kin_dir, &kind) else { return alone(true, false) };
    let path = kin.prepared_dir.join(RECIPE_FILE);
    let recipe = match read_recipe(&path) {
        Some(recipe) => recipe,
        None if !job.may_learn => return alone(false, true),
        None => {
            let work = job.out_dir.join("work");
            fs::create_dir_all(&work).map_err(EngineError::io(&work))?;
            let learnt = learn::learn(&runtime()?, &kin, &prepared, job.group_bytes, &work);
            // A leftover costs disk space, not correctness.
            let _ = fs::remove_dir_all(&work);
            let recipe = learnt.unwrap_or_else(|error| Recipe::Unknown { why: error.to_string() });
            write_whole(&path, &recipe)?;
            recipe
        }
    };
    match recipe {
        Recipe::Unknown { why } => {
            tracing::debug!(kind, why, "models of this kind are prepared one by one");
            alone(false, false)
        }
        Recipe::Parts { in_file, in_graph } => {
            derive::derive(&original, &prepared, (&in_file, &in_graph), &job.out_dir)?;
            Ok(Shared::Prepared)
        }
    }
}

fn read_recipe(path: &Path) -> Option<Recipe> {
    let len = fs::metadata(path).ok()?.len();
    serde_json::from_slice(&fs::read(path).ok().filter(|_| len <= MANIFEST_BYTES_MAX)?).ok()
}

/// Writes a file that is there whole or not at all, whoever else writes it.
fn write_whole(path: &Path, value: &impl Serialize) -> Result<(), EngineError> {
    let draft = path.with_extension(format!("{}.draft", std::process::id()));
    let text = serde_json::to_vec(value)
        .map_err(|e| EngineError::NotPrepared { path: path.to_owned(), reason: e.to_string() })?;
    fs::write(&draft, text).map_err(EngineError::io(&draft))?;
    fs::rename(&draft, path).map_err(EngineError::io(path))
}
