//! Models: prepared once, bound to a device at fixed addresses, run while their weights are still arriving.
//!
//! [`prepare`] turns an ONNX model into a rewritten graph, one flat file of weights and a [`Manifest`]. [`Bound`] is a
//! prepared model on one device: a session whose initializers lie at reserved addresses, so that swapping weights in
//! and out never touches the session. When to swap and what to run is decided elsewhere; memory behind the addresses is
//! the device's.

mod await_op;
mod bound;
mod error;
mod kind;
pub mod limits;
pub mod manifest;
pub mod onnx;
mod plain;
pub mod prepare;
mod program;
mod raw;
mod runtime;

pub use bound::{AskPlace, Bound, Input, InputData, Place, RunOutput};
pub use error::{EngineError, PrepareError, RunError};
pub use manifest::{Manifest, Prepared};
pub use plain::{OnDevice, PlainSession};
pub use raw::{await_copies, register};
pub use runtime::{CudaTarget, ORT_VERSION, Runtime, RuntimeOptions, Target};
