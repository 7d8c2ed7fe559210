//! Turns an ONNX model into a prepared one: optimized for this machine, its weights in one flat file, Await nodes where
//! they are needed, tried once against the original.
//!
//! Runs in a process of its own with [limits](limit_this_process), because what it opens may be hostile: it may die, the
//! broker goes on. Where prepared models are kept, and for how long, is the model store's business.

pub mod attention;
mod awaits;
mod check;
mod concat;
pub(crate) mod graph;
mod groups;
mod head;
mod inspect;
pub mod joined;
pub mod kin;
mod limit;
mod optimize;
mod order;
mod rows;
mod shared;
mod types;
mod verify;
mod weights;

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use faaswap_protocol::{Bytes, DType, Signature, TensorSpec};
use prost::Message;
use serde::{Deserialize, Serialize};

use self::verify::{Apart, Reference};
pub use self::{
    check::{Proof, check},
    limit::{PrepareLimits, limit_this_process},
    verify::is_close,
};
use crate::{
    EngineError, Manifest, PlainSession, PrepareError, Prepared, Runtime, Target, await_op,
    limits::{GRAPH_FILE_BYTES_MAX, GROUP_COSTS_BYTES},
    manifest::{MANIFEST_FILE, MANIFEST_VERSION, MODEL_FILE},
    onnx::{GraphProto, ModelProto, OperatorSetIdProto},
};

/// One model to prepare.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrepareJob {
    /// Folder of the original model.
    pub model_dir: PathBuf,
    /// Name of its graph file in that folder.
    pub graph_file: String,
    /// Folder for the prepared model; made if it is not there. Its parent must have room for about
    /// twice the model, and once more for products that are joined.
    pub out_dir: PathBuf,
    /// Wanted size of the later groups.
    pub group_bytes: Bytes,
    /// What it shall run on.
    pub target: Target,
}

/// Prepares the model. The manifest is written last: a folder without one is no prepared model.
pub fn run(runtime: &Runtime, job: &PrepareJob) -> Result<Manifest, PrepareError> {
    let signature = inspect::inspect(&job.model_dir, &job.graph_file)?;
    let work = job.out_dir.join("work");
    fs::create_dir_all(&work).map_err(EngineError::io(&work))?;
    let done = prepare(runtime, job, &signature, &work);
    // A leftover costs disk space, not correctness; what went wrong before matters more.
    let _ = fs::remove_dir_all(&work);
    done
}

fn prepare(runtime: &Runtime, job: &PrepareJob, signature: &Signature, work: &Path) -> Result<Manifest, PrepareError> {
    let optimized = optimize::optimize(runtime, job.target, &job.model_dir.join(&job.graph_file), work)?;
    let reference = {
        let original = PlainSession::of(optimized.session)?;
        verify::ask_original(&original, signature)
    };
    let on_gpu = job.target != Target::Cpu;
    let model = inspect::read_model(&optimized.graph)?;
    let make = |model| {
        let manifest = rewrite(model, runtime, job, signature, work)?;
        try_out(runtime, job, manifest, reference.as_ref())
    };
    // Only where it can be tried.
    let changed = reference.as_ref().map_or(Ok(None), |_| for_gpu(&model, job.target, work))?;
    let mut manifest = match changed.map(&make) {
        Some(Ok(manifest)) => manifest,
        Some(Err(error)) => {
            tracing::warn!(%error, "attention and products are left as they are");
            make(model)?
        }
        None => make(model)?,
    };
    write_manifest(&job.out_dir, &manifest)?;
    if on_gpu && let Some(reference) = &reference {
        // Each of these may end the process, and with it the GPU's context: then the manifest that was written last stands.
        let untried = |manifest: &Manifest| Prepared::untried(&job.out_dir, manifest.clone());
        let does_not_outlive = |manifest: &Manifest| -> Result<Option<String>, EngineError> {
            Ok(verify::outlives_its_session(runtime, &untried(manifest)?, reference).err())
        };
        match verify::binds_by_kind(runtime, &untried(&manifest)?, reference) {
            Ok(kernels_go) => {
                manifest.kernels_go = kernels_go;
                manifest.bind_apart = None;
                // Where they go, all of a kind keep one session.
                manifest.keep_session = if kernels_go { None } else { does_not_outlive(&manifest)? };
            }
            Err(Apart::NoKind) => {
                manifest.keep_session = does_not_outlive(&manifest)?;
                manifest.kernels_go = false;
            }
            Err(Apart::Because(why)) => {
                manifest.keep_session = Some("its kernels may go with its session".to_owned());
                manifest.bind_apart = Some(why);
            }
        }
        write_manifest(&job.out_dir, &manifest)?;
    }
    Ok(manifest)
}

/// The model with its attention fused and its products joined; `None` where there is nothing to do, and for the processor, where nothing is
/// gained. Attention of single precision stays apart: on an H100 BERT-large took longer with the kernels that there are for it (4.7 ms,
/// and 4.2 to 4.3 without). `work` has the weights.
fn for_gpu(model: &ModelProto, target: Target, work: &Path) -> Result<Option<ModelProto>, EngineError> {
    if target == Target::Cpu {
        return Ok(None);
    }
    let mut changed = model.clone();
    let attention = attention::fuse(&mut changed, |dtype| matches!(dtype, DType::F16 | DType::Bf16));
    let opset = changed.opset();
    let products = joined::join(changed.graph.get_or_insert_default(), opset, work)?;
    tracing::debug!(attention, products, "attention is fused, and products are joined");
    Ok((attention + products > 0).then_some(changed))
}

/// Writes the rewritten graph and its weights.
fn rewrite(
    mut model: ModelProto,
    runtime: &Runtime,
    job: &PrepareJob,
    signature: &Signature,
    work: &Path,
) -> Result<Manifest, PrepareError> {
    let graph = model.graph.get_or_insert_default();
    let on_gpu = job.target != Target::Cpu;
    if on_gpu {
        concat::split_wide(graph);
    }
    let (initializers, weights_bytes) = weights::extract(graph, work, &job.out_dir, on_gpu)?;
    let groups = groups::cut(&initializers, weights_bytes, job.group_bytes, if on_gpu { GROUP_COSTS_BYTES } else { 0 });
    let group_of = |offset: u64, len: u64| groups::group_at(&groups, offset + len - 1);
    let group_of: HashMap<_, _> = initializers.iter().map(|w| (w.name.clone(), group_of(w.offset, w.len))).collect();
    let placed = awaits::place(graph, &group_of);
    let has_convolutions = graph.node.iter().any(|node| node.op_type().contains("Conv"));
    let signature = refine(signature.clone(), graph);
    let inputs_in_place = shared::inputs_in_place(graph, signature.inputs.iter().map(|spec| spec.name.as_str()));
    let outputs_in_place = shared::outputs_in_place(graph, signature.outputs.iter().map(|spec| spec.name.as_str()));
    let by_rows = rows::by_rows(graph, signature.inputs.iter().map(|spec| spec.name.as_str()));
    model.training_info.clear();
    model.opset_import.push(OperatorSetIdProto { domain: Some(await_op::DOMAIN.to_owned()), version: Some(1) });
    let (fused_attention, joined_products) = (attention::count(graph), joined::count(graph));
    let manifest = Manifest {
        version: MANIFEST_VERSION,
        ort_version: runtime.version().to_owned(),
        target: job.target,
        has_convolutions,
        fused_attention,
        joined_products,
        keep_session: on_gpu.then(|| "its program was not seen to outlive its session".to_owned()),
        kernels_go: on_gpu,
        bind_apart: on_gpu.then(|| "no program of its kind was seen to be made of others".to_owned()),
        signature,
        weights_bytes: Bytes::new(weights_bytes),
        groups,
        initializers,
        await_count: placed.count,
        await_types: placed.types.into_iter().collect(),
        await_before_run: placed.before_run,
        by_rows,
        inputs_in_place,
        outputs_in_place,
        trial_run_us: None,
        trial_max_abs_diff: None,
    };
    let proof =
        check(&model, &manifest).map_err(|why| PrepareError::rejected(format!("cannot be made late-bound: {why}")))?;
    tracing::debug!(uses = proof.uses, awaits = proof.awaits, "every use of weights is awaited");
    let path = job.out_dir.join(MODEL_FILE);
    let bytes = model.encode_to_vec();
    if bytes.len() as u64 > GRAPH_FILE_BYTES_MAX.get() {
        return Err(PrepareError::rejected(format!("without its weights the graph still has {} bytes", bytes.len())));
    }
    fs::write(&path, bytes).map_err(EngineError::io(&path))?;
    Ok(manifest)
}

/// Takes over what ONNX Runtime has inferred about the shapes of outputs.
fn refine(mut signature: Signature, graph: &GraphProto) -> Signature {
    for spec in &mut signature.outputs {
        let inferred = graph.output.iter().find(|output| output.name() == spec.name);
        let inferred: Option<TensorSpec> = inferred.and_then(|output| inspect::tensor_spec("output", output).ok());
        if let Some(inferred) = inferred.filter(|inferred| inferred.dtype == spec.dtype) {
            spec.dims = inferred.dims;
        }
    }
    signature
}

fn try_out(
    runtime: &Runtime,
    job: &PrepareJob,
    mut manifest: Manifest,
    reference: Option<&Reference>,
) -> Result<Manifest, PrepareError> {
    let prepared = Prepared::untried(&job.out_dir, manifest.clone())?;
    let Some(trial) = verify::try_prepared(runtime, &prepared, reference)? else {
        return Ok(manifest);
    };
    manifest.trial_run_us = Some(trial.run_us);
    manifest.trial_max_abs_diff = trial.max_abs_diff;
    // A shape that the model declares and does not keep cannot be written in place.
    for (in_place, holds) in manifest.outputs_in_place.iter_mut().zip(trial.shape_holds) {
        *in_place &= holds;
    }
    Ok(manifest)
}

fn write_manifest(dir: &Path, manifest: &Manifest) -> Result<(), EngineError> {
    let path = dir.join(MANIFEST_FILE);
    let draft = dir.join("manifest.draft");
    let text = serde_json::to_vec(manifest)
        .map_err(|e| EngineError::NotPrepared { path: path.clone(), reason: e.to_string() })?;
    fs::write(&draft, text).map_err(EngineError::io(&draft))?;
    fs::rename(&draft, &path).map_err(EngineError::io(&path))
}
