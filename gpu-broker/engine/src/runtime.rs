//! ONNX Runtime, loaded once per process from a shared library.
//!
//! Decides which version is accepted, how many threads a run uses and where scratch memory comes from. All sessions
//! share one bounded arena for scratch, so that a thousand idle models do not keep a thousand of them.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use faaswap_device::{Device, Stream};
use faaswap_protocol::Bytes;
use ort::{
    environment::{Environment, GlobalThreadPoolOptions},
    ep::{CUDA, cuda::ConvAlgorithmSearch},
    logging::LogLevel,
    session::{Session, builder::SessionBuilder},
};

use serde::{Deserialize, Serialize};

use crate::{EngineError, raw};

/// The version of ONNX Runtime that this engine is built and tested with; patch releases may differ.
pub const ORT_VERSION: &str = "1.31";

/// How models run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RuntimeOptions {
    /// Threads that work on one run, the caller among them. More than one: a pool that all runs share.
    pub threads_per_run: usize,
    /// Most scratch memory of all runs at a time together; a run that needs more fails.
    pub scratch_max: Bytes,
}

impl Default for RuntimeOptions {
    fn default() -> Self {
        Self { threads_per_run: 1, scratch_max: Bytes::mib(4096) }
    }
}

/// What runs a model's kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// The processor.
    Cpu,
    /// A GPU.
    Cuda(CudaTarget),
}

/// How a GPU runs a model's kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CudaTarget {
    /// Which GPU, by the driver's count. Models prepared on one run on all of a kind.
    pub ordinal: i32,
    /// Whether fp32 products may be computed in TF32, as PyTorch's convolutions are.
    pub tf32: bool,
    /// Whether convolutions keep channels last.
    pub channels_last: bool,
}

impl CudaTarget {
    /// The GPU of this number, with the usual settings.
    pub fn new(ordinal: i32) -> Self {
        Self { ordinal, tf32: true, channels_last: false }
    }
}

/// A handle to the loaded library; clones are the same runtime.
#[derive(Clone, Debug)]
pub struct Runtime(Arc<Loaded>);

#[derive(Debug)]
struct Loaded {
    environment: Environment,
    path: PathBuf,
    version: String,
    options: RuntimeOptions,
}

/// ONNX Runtime allows one environment per process, for as long as it lives.
static LOADED: Mutex<Option<Runtime>> = Mutex::new(None);

impl Runtime {
    /// Loads the library, or returns the handle to it when it is loaded already in the same way.
    pub fn load(dylib: &Path, options: RuntimeOptions) -> Result<Self, EngineError> {
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(runtime) = &*loaded {
            let same = runtime.0.path == dylib && runtime.0.options == options;
            return if same { Ok(runtime.clone()) } else { Err(runtime.loaded_differently()) };
        }
        let version =
            raw::library_version(dylib).map_err(|reason| EngineError::Load { path: dylib.to_owned(), reason })?;
        if version.strip_prefix(ORT_VERSION).is_none_or(|patch| !patch.starts_with('.')) {
            return Err(EngineError::Version { path: dylib.to_owned(), found: version, wanted: ORT_VERSION });
        }
        let environment = environment(dylib, options)?;
        raw::share_scratch(&environment, options.scratch_max)?;
        let runtime = Self(Arc::new(Loaded { environment, path: dylib.to_owned(), version, options }));
        *loaded = Some(runtime.clone());
        Ok(runtime)
    }

    /// The library's own version.
    pub fn version(&self) -> &str {
        &self.0.version
    }

    /// A session with this runtime's threads and nothing else decided.
    pub(crate) fn session_builder(&self) -> Result<SessionBuilder, EngineError> {
        let builder = Session::builder(&self.0.environment)?;
        Ok(builder.with_intra_threads(1)?.with_inter_threads(1)?.with_intra_op_spinning(false)?)
    }

    /// As [`Runtime::session_builder`], for kernels on this target. On a GPU they run on `stream` where one is given.
    pub(crate) fn builder_for(&self, target: Target, stream: Option<Stream>) -> Result<SessionBuilder, EngineError> {
        let builder = self.session_builder()?;
        let Target::Cuda(cuda) = target else { return Ok(builder) };
        let provider = CUDA::default()
            .with_device_id(cuda.ordinal)
            .with_tf32(cuda.tf32)
            .with_prefer_nhwc(cuda.channels_last)
            .with_conv_algorithm_search(ConvAlgorithmSearch::Heuristic);
        let provider = match stream {
            Some(stream) => raw::on_stream(provider, stream),
            None => provider,
        };
        Ok(builder.with_execution_providers([provider.build().error_on_failure()])?)
    }

    /// Sees whether kernels for this target can be had at all: a GPU's need libraries of the machine's.
    pub fn check(&self, target: Target) -> Result<(), EngineError> {
        self.builder_for(target, None).map(drop)
    }

    /// Has sessions that share allocators take their memory on this GPU from our arenas. Once per GPU.
    pub(crate) fn share_device_memory(&self, device: &Arc<dyn Device>) -> Result<(), EngineError> {
        raw::share_device_memory(&self.0.environment, device)
    }

    fn loaded_differently(&self) -> EngineError {
        EngineError::LoadedDifferently { path: self.0.path.clone(), options: format!("{:?}", self.0.options) }
    }
}

fn environment(dylib: &Path, options: RuntimeOptions) -> Result<Environment, EngineError> {
    let builder = ort::init_from(dylib)
        .map_err(|e| EngineError::Load { path: dylib.to_owned(), reason: e.to_string() })?
        .with_name("faaswap")
        .with_telemetry(false)
        .with_logger(Arc::new(log));
    let builder = match options.threads_per_run {
        0 | 1 => builder,
        threads => {
            let pool = GlobalThreadPoolOptions::default();
            builder.with_global_thread_pool(
                pool.with_intra_threads(threads)?.with_inter_threads(1)?.with_spin_control(false)?,
            )
        }
    };
    let environment = builder.build()?;
    environment.set_log_level(LogLevel::Warning);
    Ok(environment)
}

/// What ONNX Runtime has to say goes where everything else goes.
fn log(level: LogLevel, _category: &str, _session: &str, location: &str, message: &str) {
    match level {
        LogLevel::Verbose => tracing::trace!(target: "onnxruntime", location, "{message}"),
        LogLevel::Info => tracing::debug!(target: "onnxruntime", location, "{message}"),
        LogLevel::Warning => tracing::warn!(target: "onnxruntime", location, "{message}"),
        LogLevel::Error | LogLevel::Fatal => tracing::error!(target: "onnxruntime", location, "{message}"),
    }
}
