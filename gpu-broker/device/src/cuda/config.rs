//! What a CUDA device is told when it is opened.

use faaswap_protocol::Bytes;

/// Size of a chunk: half a one is wasted per model, and where weights must be mapped that costs by the chunk, about 40 us each.
pub const CHUNK_DEFAULT: Bytes = Bytes::mib(16);
/// What is left to constants, scratch, programs and libraries where no amount of memory is named.
pub const RESERVE_DEFAULT: Bytes = Bytes::mib(8 << 10);
/// Most scratch memory of one lane.
pub const SCRATCH_MAX_DEFAULT: Bytes = Bytes::mib(4 << 10);
/// How many models are bound at once where nothing else is said.
pub const BINDING_DEFAULT: usize = 2;

/// What a CUDA device shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaConfig {
    /// For logs and metrics.
    pub name: String,
    /// Which GPU, by the driver's count.
    pub ordinal: u32,
    /// Memory for weights; `None` for what is free, less [`CudaConfig::reserve`].
    pub memory: Option<Bytes>,
    /// Memory that is left for everything else where `memory` is `None`.
    pub reserve: Bytes,
    /// Memory is given out in chunks of this size.
    pub chunk: Bytes,
    /// How many programs may run at once.
    pub lanes: usize,
    /// How many models may be bound at once: mostly the processor's work, and each has a lane's memory.
    pub binding: usize,
    /// Most scratch memory of one lane.
    pub scratch_max: Bytes,
    /// Other GPUs, by the driver's count, that may bring weights from this one's memory.
    pub peers: Vec<u32>,
    /// Those over whose links this one's weights may come too; each lends 64 MiB for it.
    pub detours: Vec<u32>,
    /// Whether programs are made of others of their kind, without a session, and move to where their weights are.
    pub twins: bool,
    /// Whether other processes may have the pool's chunks, to copy from them.
    pub shared: bool,
    /// Whether no two chunks of a model's weights shall lie in a row: for trials.
    pub scattered: bool,
}

impl CudaConfig {
    /// A GPU with the usual settings.
    pub fn new(name: impl Into<String>, ordinal: u32) -> Self {
        Self {
            name: name.into(),
            ordinal,
            memory: None,
            reserve: RESERVE_DEFAULT,
            chunk: CHUNK_DEFAULT,
            lanes: 8,
            binding: BINDING_DEFAULT,
            scratch_max: SCRATCH_MAX_DEFAULT,
            peers: Vec::new(),
            detours: Vec::new(),
            twins: true,
            shared: false,
            scattered: false,
        }
    }
}
