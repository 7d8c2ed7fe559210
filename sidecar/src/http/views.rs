//! The JSON of everything but inferences: server, model, configuration, statistics, repository.

use std::sync::Arc;

use faaswap_protocol::{DType, Dim, TensorSpec};
use serde::Serialize;

use crate::{
    broker::{FunctionState, Known},
    infer::{EXTENSIONS, Function, MODEL_VERSION, PLATFORM, SERVER_NAME, stats::Reading},
};

/// `GET /v2`.
#[derive(Debug, Serialize)]
pub struct Server {
    name: &'static str,
    version: &'static str,
    extensions: [&'static str; EXTENSIONS.len()],
}

/// Who answers.
pub const SERVER: Server = Server { name: SERVER_NAME, version: env!("CARGO_PKG_VERSION"), extensions: EXTENSIONS };

/// A tensor in a model's metadata.
#[derive(Debug, Serialize)]
pub struct TensorView<'a> {
    name: &'a str,
    datatype: &'static str,
    shape: Vec<i64>,
}

/// `GET /v2/models/M`.
#[derive(Debug, Serialize)]
pub struct ModelView<'a> {
    name: &'a str,
    versions: [&'static str; 1],
    platform: &'static str,
    inputs: Vec<TensorView<'a>>,
    outputs: Vec<TensorView<'a>>,
}

/// Dimensions as the protocol writes them: -1 where a request may choose.
pub fn dims(spec: &TensorSpec) -> Vec<i64> {
    let dim = |dim: &Dim| match dim {
        Dim::Fixed(n) => i64::try_from(*n).unwrap_or(i64::MAX),
        Dim::Any => -1,
    };
    spec.dims.iter().map(dim).collect()
}

fn tensors(specs: &[TensorSpec]) -> Vec<TensorView<'_>> {
    specs.iter().map(|spec| TensorView { name: &spec.name, datatype: spec.dtype.oip(), shape: dims(spec) }).collect()
}

/// The model's metadata.
pub fn model<'a>(name: &'a str, known: &'a Arc<Known>) -> ModelView<'a> {
    ModelView {
        name,
        versions: [MODEL_VERSION],
        platform: PLATFORM,
        inputs: tensors(&known.signature.inputs),
        outputs: tensors(&known.signature.outputs),
    }
}

/// A tensor in a model's configuration.
#[derive(Debug, Serialize)]
pub struct ConfigTensor<'a> {
    name: &'a str,
    data_type: String,
    dims: Vec<i64>,
}

/// `GET /v2/models/M/config`.
#[derive(Debug, Serialize)]
pub struct ConfigView<'a> {
    name: &'a str,
    platform: &'static str,
    backend: &'static str,
    /// 0: the batch is an ordinary dimension of the tensors.
    max_batch_size: u32,
    input: Vec<ConfigTensor<'a>>,
    output: Vec<ConfigTensor<'a>>,
}

/// The backend that configurations name.
pub const BACKEND: &str = "onnxruntime";

/// The model's configuration, as far as clients read it.
pub fn config<'a>(name: &'a str, known: &'a Arc<Known>) -> ConfigView<'a> {
    let view = |spec: &'a TensorSpec| {
        let data_type = format!("TYPE_{}", spec.dtype.oip());
        ConfigTensor { name: &spec.name, data_type, dims: dims(spec) }
    };
    ConfigView {
        name,
        platform: PLATFORM,
        backend: BACKEND,
        max_batch_size: 0,
        input: known.signature.inputs.iter().map(view).collect(),
        output: known.signature.outputs.iter().map(view).collect(),
    }
}

/// `GET /v2/models`.
#[derive(Debug, Serialize)]
pub struct Models<'a> {
    /// Their names.
    pub models: [&'a str; 1],
}

/// One line of the repository's index.
#[derive(Debug, Serialize)]
pub struct IndexLine<'a> {
    /// The model.
    pub name: &'a str,
    /// Its version.
    pub version: &'static str,
    /// `READY`, `LOADING` or `UNAVAILABLE`.
    pub state: &'static str,
    /// Why it is not ready.
    pub reason: String,
}

/// The one model, with its state.
pub fn index(function: &Function) -> IndexLine<'_> {
    let state = match function.state() {
        _ if function.is_ready() => "READY",
        Some(FunctionState::Rejected(_) | FunctionState::Unfetched(_)) => "UNAVAILABLE",
        Some(
            FunctionState::Connecting
            | FunctionState::Fetching(_)
            | FunctionState::Uploading
            | FunctionState::Preparing(_)
            | FunctionState::Ready(_),
        )
        | None => "LOADING",
    };
    let reason = if state == "READY" { String::new() } else { function.state_text() };
    IndexLine { name: &function.model_name, version: MODEL_VERSION, state, reason }
}

#[derive(Debug, Serialize)]
struct InferStats {
    success: Reading,
    fail: Reading,
    queue: Reading,
    compute_input: Reading,
    compute_infer: Reading,
    compute_output: Reading,
    cache_hit: Reading,
    cache_miss: Reading,
}

#[derive(Debug, Serialize)]
struct BatchStats {
    batch_size: u64,
    compute_input: Reading,
    compute_infer: Reading,
    compute_output: Reading,
}

#[derive(Debug, Serialize)]
struct Memory {
    r#type: &'static str,
    id: i64,
    byte_size: u64,
}

/// One model's statistics.
#[derive(Debug, Serialize)]
pub struct ModelStats<'a> {
    name: &'a str,
    version: &'static str,
    last_inference: u64,
    inference_count: u64,
    execution_count: u64,
    inference_stats: InferStats,
    response_stats: serde_json::Map<String, serde_json::Value>,
    batch_stats: Vec<BatchStats>,
    memory_usage: Vec<Memory>,
}

/// `GET /v2/models/stats`.
#[derive(Debug, Serialize)]
pub struct Stats<'a> {
    model_stats: [ModelStats<'a>; 1],
}

/// The statistics. Inputs and outputs take no time of their own: they lie in memory that both sides see. Host weights
/// are the `CPU` memory; what lies on devices the broker tells, not the sidecar.
pub fn stats(function: &Function) -> Stats<'_> {
    let totals = function.stats.read();
    let none = Reading::default();
    let batch = BatchStats { batch_size: 1, compute_input: none, compute_infer: totals.infer, compute_output: none };
    let weights = function.broker().and_then(crate::broker::Broker::known).map(|known| known.weights.get());
    Stats {
        model_stats: [ModelStats {
            name: &function.model_name,
            version: MODEL_VERSION,
            last_inference: totals.last_ms,
            inference_count: totals.success.count,
            execution_count: totals.success.count,
            inference_stats: InferStats {
                success: totals.success,
                fail: totals.fail,
                queue: totals.queue,
                compute_input: none,
                compute_infer: totals.infer,
                compute_output: none,
                cache_hit: none,
                cache_miss: none,
            },
            response_stats: serde_json::Map::new(),
            batch_stats: if totals.success.count > 0 { vec![batch] } else { Vec::new() },
            memory_usage: weights.map(|byte_size| Memory { r#type: "CPU", id: 0, byte_size }).into_iter().collect(),
        }],
    }
}

/// The number of a type in `model_config.proto`.
pub const fn config_type(dtype: DType) -> crate::grpc::inference::DataType {
    use crate::grpc::inference::DataType as T;
    match dtype {
        DType::Bool => T::TypeBool,
        DType::U8 => T::TypeUint8,
        DType::U16 => T::TypeUint16,
        DType::U32 => T::TypeUint32,
        DType::U64 => T::TypeUint64,
        DType::I8 => T::TypeInt8,
        DType::I16 => T::TypeInt16,
        DType::I32 => T::TypeInt32,
        DType::I64 => T::TypeInt64,
        DType::F16 => T::TypeFp16,
        DType::Bf16 => T::TypeBf16,
        DType::F32 => T::TypeFp32,
        DType::F64 => T::TypeFp64,
    }
}
