//! What is known of a prepared model: the manifest beside its graph and its weights.
//!
//! `prepare` writes it, `bound` reads it. A folder is believed only when its version, its sizes and the order of its
//! tables hold; the content of weights is checked by whoever stores them.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use faaswap_device::{Group, cuda::KindKey};
use faaswap_protocol::{Bytes, DType, Signature};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{CudaTarget, EngineError, Target, kind::Kind, limits::MANIFEST_BYTES_MAX, onnx, program::IoLayout};

/// Version of the manifest, and of how a graph is rewritten. Older prepared models are prepared again.
pub const MANIFEST_VERSION: u32 = 14;
/// File names inside the folder of a prepared model.
pub const MODEL_FILE: &str = "model.onnx";
/// The flat weights.
pub const WEIGHTS_FILE: &str = "weights.bin";
/// The manifest.
pub const MANIFEST_FILE: &str = "manifest.json";

/// Bytes of a hash that are enough for the name of weights, beside their model's digest.
const WEIGHTS_NAME_BYTES: usize = 8;

/// One initializer in the flat weights.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Initializer {
    /// Its name in the prepared graph.
    pub name: String,
    /// ONNX's number of its element type.
    pub element: i32,
    /// Its dimensions.
    pub dims: Vec<i64>,
    /// First byte in the weights.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

/// A stretch of weights that is copied, and awaited, as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupSpan {
    /// First byte in the weights.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

/// What is known of a prepared model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`MANIFEST_VERSION`] of the engine that wrote it.
    pub version: u32,
    /// The ONNX Runtime that optimized the graph.
    pub ort_version: String,
    /// What it was optimized for.
    pub target: Target,
    /// Why the model's program does not outlive its session on a GPU; `None` where it was seen to.
    pub keep_session: Option<String>,
    /// Whether sessions on a GPU may make kernels of their own, which go with them: not where two of them were seen to run the
    /// very same ones. A program that is captured keeps its session then; those of its kind share one.
    pub kernels_go: bool,
    /// Why each model of its kind needs a session to be bound on a GPU; `None` where a program that was made of two others of
    /// the kind was seen to answer right.
    pub bind_apart: Option<String>,
    /// Whether it has convolutions: only these have layouts to choose from.
    pub has_convolutions: bool,
    /// How many attentions were fused into one operator each.
    pub fused_attention: usize,
    /// How many products were made of several with the same input; see `prepare::joined`.
    pub joined_products: usize,
    /// What the model takes and gives.
    pub signature: Signature,
    /// Size of the flat weights.
    pub weights_bytes: Bytes,
    /// The weights, cut where initializers end.
    pub groups: Vec<GroupSpan>,
    /// What lies in the weights, in order.
    pub initializers: Vec<Initializer>,
    /// How many Await nodes the graph has.
    pub await_count: u32,
    /// Of which element types.
    pub await_types: Vec<DType>,
    /// The last group that some node needs without having an input that could wait for it.
    pub await_before_run: Option<u32>,
    /// Whether several requests could be run together, one below the other; see `prepare::rows`.
    pub by_rows: bool,
    /// Inputs that only kernels read which do not choose addresses by their values; see `prepare::shared`.
    pub inputs_in_place: Vec<bool>,
    /// Outputs that no other node reads.
    pub outputs_in_place: Vec<bool>,
    /// How long a trial run took with the weights there; `None` where no inputs could be made up that the original
    /// model accepts.
    pub trial_run_us: Option<u64>,
    /// Largest difference between the trial's outputs and the original model's; 0 where all were equal. `None` where
    /// nothing was compared: no trial, a model that draws random numbers, or one that was prepared by its kind.
    pub trial_max_abs_diff: Option<f64>,
}

/// A session that must be kept counts as so many percent of the run's time more: it takes device memory for good.
const KEPT_SESSION_PERCENT: u64 = 100;
/// One for all of a kind counts as so many: it takes memory, too, and to make kernels takes seconds.
const KERNELS_GO_PERCENT: u64 = 10;

impl Manifest {
    /// How dear the model is when prepared in this way, to choose between ways: how long it runs, and more where a session must be
    /// kept. The largest where it was not tried.
    pub fn cost(&self) -> u64 {
        self.trial_run_us.map_or(u64::MAX, |us| us.saturating_mul(100 + self.kept_percent()) / 100)
    }

    /// What is kept for it counts as so many percent of its run's time.
    pub fn kept_percent(&self) -> u64 {
        match (&self.keep_session, self.kernels_go) {
            (Some(_), _) => KEPT_SESSION_PERCENT,
            (None, true) => KERNELS_GO_PERCENT,
            (None, false) => 0,
        }
    }

    /// The target, whichever GPU of its kind it was.
    pub(crate) fn target_of_any(&self) -> Target {
        match self.target {
            Target::Cpu => Target::Cpu,
            Target::Cuda(target) => Target::Cuda(CudaTarget { ordinal: 0, ..target }),
        }
    }

    /// Names what lies in the weights, and in which order: two prepared models of one digest have the same name only where
    /// their weights are the same, byte for byte. What was measured of them does not count.
    pub fn weights_name(&self) -> String {
        let told = (self.version, &self.ort_version, self.target_of_any(), self.weights_bytes, &self.initializers);
        let text = serde_json::to_vec(&told).expect("numbers and names can be written");
        let hash = Sha256::digest(&text);
        hash[..WEIGHTS_NAME_BYTES].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn check(&self) -> Result<(), String> {
        if self.version != MANIFEST_VERSION {
            return Err(format!("its version is {}, not {MANIFEST_VERSION}", self.version));
        }
        let mut end = 0;
        for group in &self.groups {
            if group.offset != end || group.len == 0 {
                return Err(format!("its groups do not join at byte {end}"));
            }
            end = group.offset.checked_add(group.len).ok_or("its groups overflow")?;
        }
        if end != self.weights_bytes.get() {
            return Err(format!("its groups end at byte {end}, its weights at {}", self.weights_bytes.get()));
        }
        let mut end = 0;
        for weight in &self.initializers {
            if weight.offset < end || onnx::data_len(weight.element, &weight.dims) != Some(weight.len) {
                return Err(format!("its initializer {} overlaps another or has the wrong size", weight.name));
            }
            end = weight.offset.checked_add(weight.len).ok_or("its initializers overflow")?;
        }
        if end > self.weights_bytes.get() {
            return Err("its initializers end behind its weights".to_owned());
        }
        if self.await_before_run.is_some_and(|group| usize::try_from(group).is_ok_and(|g| g >= self.groups.len())) {
            return Err("it waits for a group that it does not have".to_owned());
        }
        if self.inputs_in_place.len() != self.signature.inputs.len()
            || self.outputs_in_place.len() != self.signature.outputs.len()
        {
            return Err("its signature and its tables differ in length".to_owned());
        }
        Ok(())
    }
}

/// A prepared model in a folder.
#[derive(Clone, Debug)]
pub struct Prepared {
    dir: PathBuf,
    manifest: Arc<Manifest>,
    /// Once it was asked for.
    kind: OnceLock<Option<Arc<Kind>>>,
}

impl Prepared {
    /// Reads the manifest and checks that the files are the ones that it describes.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, EngineError> {
        let dir = dir.into();
        let path = dir.join(MANIFEST_FILE);
        let refuse = |reason: String| EngineError::NotPrepared { path: path.clone(), reason };
        let len = fs::metadata(&path).map_err(EngineError::io(&path))?.len();
        if len > MANIFEST_BYTES_MAX {
            return Err(refuse(format!("{len} bytes are too many for a manifest")));
        }
        let text = fs::read(&path).map_err(EngineError::io(&path))?;
        let manifest: Manifest = serde_json::from_slice(&text).map_err(|e| refuse(e.to_string()))?;
        manifest.check().map_err(refuse)?;
        let weights = dir.join(WEIGHTS_FILE);
        let len = fs::metadata(&weights).map_err(EngineError::io(&weights))?.len();
        if len != manifest.weights_bytes.get() {
            let reason = format!("the weights are {len} bytes, not {}", manifest.weights_bytes.get());
            return Err(EngineError::NotPrepared { path: weights, reason });
        }
        Ok(Self { dir, manifest: Arc::new(manifest), kind: OnceLock::new() })
    }

    /// A model that was just written and is not believed yet.
    pub(crate) fn untried(dir: &Path, manifest: Manifest) -> Result<Self, EngineError> {
        let refuse = |reason| EngineError::NotPrepared { path: dir.to_owned(), reason };
        manifest.check().map_err(refuse)?;
        Ok(Self { dir: dir.to_owned(), manifest: Arc::new(manifest), kind: OnceLock::new() })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What is known of the model.
    pub fn manifest(&self) -> &Arc<Manifest> {
        &self.manifest
    }

    /// Its kind; `None` where its program does not outlive its session, so that it has none.
    pub(crate) fn kind(&self) -> Result<Option<&Kind>, EngineError> {
        if self.kind.get().is_none() {
            let Manifest { keep_session, bind_apart, weights_bytes, signature, .. } = &*self.manifest;
            let stands_alone = keep_session.is_none() && bind_apart.is_none() && *weights_bytes > Bytes::ZERO;
            let has_kind = stands_alone && IoLayout::of(signature).is_ok();
            let kind = has_kind.then(|| Kind::of(self)).transpose()?.map(Arc::new);
            // Another thread may have been faster, with the same.
            let _ = self.kind.set(kind);
        }
        Ok(self.kind.get().and_then(Option::as_deref))
    }

    /// What is the same for all models that differ from it in their weights alone, on a GPU; `None` where it has to be bound by a
    /// session of its own.
    pub fn kind_key(&self) -> Result<Option<KindKey>, EngineError> {
        Ok(self.kind()?.map(|kind| kind.key))
    }

    /// The flat weights.
    pub fn weights_path(&self) -> PathBuf {
        self.dir.join(WEIGHTS_FILE)
    }

    /// The rewritten graph.
    pub fn graph_path(&self) -> PathBuf {
        self.dir.join(MODEL_FILE)
    }

    /// The groups as a device wants them.
    pub fn groups(&self) -> Arc<[Group]> {
        self.manifest.groups.iter().map(|group| Group { offset: group.offset, len: group.len }).collect()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// One that holds, of two weights.
    pub(crate) fn manifest() -> Manifest {
        let weight = |name: &str, offset, len: u8| Initializer {
            name: name.to_owned(),
            element: 1,
            dims: vec![i64::from(len) / 4],
            offset,
            len: u64::from(len),
        };
        Manifest {
            version: MANIFEST_VERSION,
            ort_version: "1.2.3".to_owned(),
            target: Target::Cuda(CudaTarget::new(0)),
            keep_session: None,
            kernels_go: false,
            bind_apart: None,
            has_convolutions: true,
            fused_attention: 0,
            joined_products: 0,
            signature: Signature { inputs: Vec::new(), outputs: Vec::new() },
            weights_bytes: Bytes::new(16),
            groups: vec![GroupSpan { offset: 0, len: 16 }],
            initializers: vec![weight("a", 0, 8), weight("b", 8, 8)],
            await_count: 0,
            await_types: Vec::new(),
            await_before_run: None,
            by_rows: false,
            inputs_in_place: Vec::new(),
            outputs_in_place: Vec::new(),
            trial_run_us: Some(10),
            trial_max_abs_diff: None,
        }
    }

    #[test]
    fn what_keeps_a_session_is_taken_where_it_is_much_faster() {
        let of = |us, keep_session: Option<&str>, kernels_go| Manifest {
            trial_run_us: Some(us),
            keep_session: keep_session.map(str::to_owned),
            kernels_go,
            ..manifest()
        };
        assert!(of(109, None, false).cost() < of(100, None, true).cost(), "a session for each kind");
        assert!(of(111, None, false).cost() > of(100, None, true).cost());
        assert!(of(199, None, false).cost() < of(100, Some("so"), true).cost(), "one for each function");
        assert_eq!(Manifest { trial_run_us: None, ..manifest() }.cost(), u64::MAX);
    }

    #[test]
    fn weights_are_named_by_what_lies_in_them() {
        let name = manifest().weights_name();
        let on_another = Target::Cuda(CudaTarget::new(3));
        let same =
            Manifest { trial_run_us: Some(20), keep_session: Some("so".into()), target: on_another, ..manifest() };
        assert_eq!(name, same.weights_name());
        let mut swapped = manifest().initializers;
        swapped.reverse();
        let last = Target::Cuda(CudaTarget { channels_last: true, ..CudaTarget::new(0) });
        let others = [
            Manifest { initializers: swapped, ..manifest() },
            Manifest { target: last, ..manifest() },
            Manifest { target: Target::Cuda(CudaTarget { tf32: false, ..CudaTarget::new(0) }), ..manifest() },
            Manifest { ort_version: "1.2.4".to_owned(), ..manifest() },
            Manifest { version: MANIFEST_VERSION + 1, ..manifest() },
        ];
        let mut names: Vec<_> = others.iter().map(Manifest::weights_name).chain([name]).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 6);
    }
}
