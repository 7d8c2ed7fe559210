//! What both ends of a FaaSwap connection share: ids, units, tensors, frames and refusals.
//!
//! Nothing here does I/O or knows a clock, and no word here can name a GPU: where a request runs is the broker's
//! decision alone. Encoding lives in [`wire`]; `WIRE.md` beside this crate describes the bytes.

#![warn(missing_docs)]

pub mod ids;
pub mod limits;
pub mod message;
pub mod refusal;
pub mod tensor;
pub mod units;
pub mod wire;

pub use ids::{CallId, FunctionId, FunctionName, ModelDigest, NameError, RequestId};
pub use message::{
    Batching, FromBroker, FunctionSpec, Late, ModelFile, Priority, SlabLayout, Slo, Tf32, Timing, ToBroker, Transport,
};
pub use refusal::{Detail, Refusal};
pub use tensor::{DType, Dim, Shape, ShapeError, Signature, Span, TensorSlice, TensorSpec};
pub use units::Bytes;
