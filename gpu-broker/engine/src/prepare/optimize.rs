//! Lets ONNX Runtime optimize the original graph for this machine and write the result, weights in a file of their own.
//!
//! The session that does so is the reference that the prepared model is compared with later: it holds the original
//! model at the same optimization level, without prepacking.

use std::path::{Path, PathBuf};

use ort::session::{
    Session,
    builder::{GraphOptimizationLevel, SessionBuilder},
};

use crate::{
    EngineError, PrepareError,
    limits::{FOLDED_BYTES_MAX, WEIGHT_BYTES_MIN},
    runtime::{Runtime, Target},
};

/// An optimized model on disk, and the session that made it.
pub(super) struct Optimized {
    /// The original model, optimized in memory.
    pub(super) session: Session,
    /// The optimized graph.
    pub(super) graph: PathBuf,
}

const GRAPH_FILE: &str = "optimized.onnx";
const DATA_FILE: &str = "optimized.bin";

/// On a GPU a product with a bias is two kernels, the first of which writes the bias to the whole output. Left apart, biases go into
/// the activation or normalization behind, which ONNX Runtime does by itself then.
const LEFT_OUT_ON_GPU: &str = "MatMulAddFusion";

/// Optimizes the model into `work`.
pub(super) fn optimize(
    runtime: &Runtime,
    target: Target,
    graph: &Path,
    work: &Path,
) -> Result<Optimized, PrepareError> {
    let optimized = work.join(GRAPH_FILE);
    let session = options(runtime, target, &optimized)?.commit_from_file(graph);
    // What fails here is the model's fault: operators that do not exist, shapes that contradict each other.
    let session = session.map_err(|e| PrepareError::rejected(e.message().to_owned()))?;
    Ok(Optimized { session, graph: optimized })
}

fn options(runtime: &Runtime, target: Target, optimized: &Path) -> Result<SessionBuilder, EngineError> {
    let builder = runtime.builder_for(target, None)?.with_optimization_level(GraphOptimizationLevel::All)?;
    let builder = builder.with_prepacking(false)?.with_optimized_model_path(optimized)?;
    let (file, min) = ("file_name", "min_size_in_bytes");
    let key = |what| format!("session.optimized_model_external_initializers_{what}");
    let builder = builder.with_config_entry(key(file), DATA_FILE)?;
    let builder = builder.with_config_entry(key(min), WEIGHT_BYTES_MIN.to_string())?;
    let builder = match target {
        Target::Cpu => builder,
        Target::Cuda(_) => builder.with_disabled_optimizers(LEFT_OUT_ON_GPU)?,
    };
    let most = FOLDED_BYTES_MAX.get().to_string();
    Ok(builder.with_config_entry("optimization.constant_folding_max_output_size_in_bytes", most)?)
}
