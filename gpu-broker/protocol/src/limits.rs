//! The sizes that both ends of a connection agree on.

use crate::units::Bytes;

/// Version of the messages and of their bytes. A broker speaks exactly one.
pub const WIRE_VERSION: u32 = 5;
/// Longest encoded message, without its payload.
pub const MESSAGE_BYTES_MAX: u32 = 1 << 20;
/// Longest payload of one frame: tensors or a part of a model, on connections without a slab.
pub const PAYLOAD_BYTES_MAX: u32 = 256 << 20;
/// Largest part of a model in one `UploadPart` frame.
pub const UPLOAD_PART_BYTES_MAX: u32 = 4 << 20;
/// Most files in one model: the graph and its external data.
pub const MODEL_FILES_MAX: usize = 16;
/// Most dimensions of a tensor.
pub const RANK_MAX: usize = 16;
/// Most inputs, and most outputs, of a model.
pub const TENSORS_MAX: usize = 256;
/// Longest function or tensor name in bytes.
pub const NAME_BYTES_MAX: usize = 256;
/// Longest explanation inside a refusal, in bytes.
pub const DETAIL_BYTES_MAX: usize = 600;
/// Largest slab that a connection may ask for, both halves together.
pub const SLAB_BYTES_MAX: Bytes = Bytes::mib(1024);
/// Alignment of every tensor in a slab or payload.
pub const TENSOR_ALIGN: u64 = 64;
/// Most requests in flight on one connection; the next one is refused.
pub const REQUESTS_IN_FLIGHT_MAX: usize = 1024;

const _: () = assert!(UPLOAD_PART_BYTES_MAX <= PAYLOAD_BYTES_MAX, "a part of a model must fit in a frame");
const _: () = assert!(DETAIL_BYTES_MAX + 64 < MESSAGE_BYTES_MAX as usize, "a refusal must fit in a message");
