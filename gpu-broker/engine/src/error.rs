//! What can go wrong in the engine, by whom it concerns: the operator, the model's owner, or one request.

use std::{fmt::Display, io, path::PathBuf};

use faaswap_device::DeviceError;
use faaswap_protocol::{Detail, Refusal};

/// A failure of the runtime, of the disk or of a device: the operator's concern.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The shared library cannot be loaded.
    #[error("onnx runtime cannot be loaded from {path}: {reason}")]
    Load {
        /// Where it should be.
        path: PathBuf,
        /// What the loader said.
        reason: String,
    },
    /// The shared library is of another version.
    #[error("onnx runtime {wanted}.x is needed, {path} is {found}")]
    Version {
        /// Which library.
        path: PathBuf,
        /// Its version.
        found: String,
        /// Major and minor version that this engine was built and tested with.
        wanted: &'static str,
    },
    /// One process can have one runtime with one set of options.
    #[error("onnx runtime is loaded already, from {path} with {options}; it cannot be loaded differently")]
    LoadedDifferently {
        /// Where it was loaded from.
        path: PathBuf,
        /// The options then.
        options: String,
    },
    /// A call into ONNX Runtime failed.
    #[error("onnx runtime: {0}")]
    Ort(String),
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A folder does not hold a prepared model of this version.
    #[error("{path} is no prepared model: {reason}")]
    NotPrepared {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The device refused or failed.
    #[error("device: {0}")]
    Device(#[from] DeviceError),
    /// The operating system refused a limit.
    #[error("the limit on {what} cannot be set: {source}")]
    Limit {
        /// Which resource.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl EngineError {
    /// A file's failure.
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}

impl<R> From<ort::Error<R>> for EngineError {
    fn from(error: ort::Error<R>) -> Self {
        Self::Ort(error.to_string())
    }
}

/// Why a model was not prepared.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The model itself is at fault.
    #[error("{0}")]
    Rejected(Detail),
    /// Something else is.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

impl PrepareError {
    /// The model is at fault, for this reason.
    pub(crate) fn rejected(reason: impl Into<String>) -> Self {
        Self::Rejected(Detail::from(reason.into()))
    }

    /// The answer that the model's owner gets.
    pub fn refusal(&self) -> Refusal {
        match self {
            Self::Rejected(reason) => Refusal::ModelRejected { reason: reason.clone() },
            Self::Engine(error) => {
                Refusal::ModelRejected { reason: Detail::from(format!("it could not be prepared here: {error}")) }
            }
        }
    }
}

/// Why a run gave no outputs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RunError {
    /// The request is at fault, or there is no place for its outputs.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The model or the device failed.
    #[error("the run failed: {0}")]
    Failed(Detail),
}

impl RunError {
    pub(crate) fn failed(reason: impl Display) -> Self {
        Self::Failed(Detail::from(reason.to_string()))
    }
}
