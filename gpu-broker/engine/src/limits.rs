//! The sizes that bound what the engine takes on.

use faaswap_protocol::Bytes;

/// Largest graph file: what ONNX Runtime, and protobuf under it, can read. Larger models keep weights in other files.
pub const GRAPH_FILE_BYTES_MAX: Bytes = Bytes::new((1 << 31) - 1);
/// Most nodes of one graph, bodies included.
pub const NODES_MAX: usize = 1 << 20;
/// Alignment of every initializer in the flat weights file: a cache line for the CPU, a memory transaction for a GPU.
pub const WEIGHT_ALIGN: u64 = 256;
/// Initializers below this size stay in the graph: a table entry would cost as much as the data, and shapes and axes
/// must be readable when a session is made.
pub const WEIGHT_BYTES_MIN: u64 = 1024;
/// Most of a model's first weights that stay on the GPU with each function: a run begins with them.
pub const HEAD_BYTES_MAX: Bytes = Bytes::kib(768);
/// The part of a model's weights that may be its head: one in so many.
pub const HEAD_ONE_IN: u64 = 16;
/// Models with more weights have no head: to copy them takes longer than they run, 2.5 ms at 54 GB/s.
pub const HEAD_OF_BYTES_MAX: Bytes = Bytes::mib(128);
/// The first group of a model: small, so that the first nodes start early. Each later group is twice as large.
pub const FIRST_GROUP_BYTES: Bytes = Bytes::kib(256);
/// What a group costs on a GPU's link beyond its bytes, in bytes of the same time: about 3.6 us between two copies with
/// an event, at 54 GB/s, as measured on an H100.
pub const GROUP_COSTS_BYTES: u64 = 192 << 10;
/// The part of a swap-in's time that groups may cost: one in so many.
pub const GROUPS_COST_ONE_IN: u64 = 64;
/// About the smallest of a model's last groups on a GPU: what is left to run behind them is short.
pub const LAST_GROUP_BYTES: Bytes = Bytes::mib(1);
/// Groups that a model may have for that besides.
pub const LAST_GROUPS: usize = 3;
/// Groups that a model has all the same, where it has so many initializers: small models run longer than they are copied,
/// and would wait for one large group.
pub const GROUPS_MIN: usize = 4;
/// About how many groups a large model has on a GPU: where more than some 48 copies are queued, the driver keeps the one
/// who queues them waiting, as measured on an H100.
pub const GROUPS_QUEUED: u64 = 24;
/// Runs of the same shapes in a session before they are captured, where a model has open dimensions.
pub const CAPTURED_AFTER: u32 = 3;
/// Most programs of one model with open dimensions; further shapes run in its session.
pub const PROGRAMS_PER_MODEL_MAX: usize = 8;
/// Shapes without a program whose runs are counted, the latest.
pub const SHAPES_COUNTED_MAX: usize = 32;
/// Largest request, with its answer, that is kept to be compared with what a program answers.
pub const SAMPLE_BYTES_MAX: Bytes = Bytes::mib(64);
/// Smallest input that a device reads where it is, in registered memory: one more kernel takes as long as copying less does.
pub const IN_PLACE_BYTES_MIN: usize = 32 << 10;
/// Most groups of one model; larger models get larger groups.
pub const GROUPS_MAX: u64 = 256;
/// Largest constant that the optimizer may compute in advance: a tiny graph can ask for terabytes of them.
pub const FOLDED_BYTES_MAX: Bytes = Bytes::mib(1024);
/// Largest manifest that is read back.
pub const MANIFEST_BYTES_MAX: u64 = 256 << 20;
/// Largest tensor that a trial run makes up; models that need more are not tried.
pub const TRIAL_TENSOR_BYTES_MAX: u64 = 256 << 20;

const _: () = assert!(WEIGHT_BYTES_MIN >= WEIGHT_ALIGN, "padding must not outweigh what is stored");
