//! The chunks that weights are swapped into. All of them are mapped, for good, in a window of the pool's own: copies go
//! there. Programs find them there too, or behind the ranges of their models (`placement.rs`).

use std::sync::Arc;

use faaswap_protocol::Bytes;

use super::{
    CudaConfig,
    chunks::{Chunks, SPARE_ONE_IN},
    driver::{Addresses, Context, Physical, can_reach},
};
use crate::DeviceError;

pub(super) struct Pool {
    memory: Arc<Vec<Physical>>,
    window: Addresses,
    chunks: Chunks,
    pub(super) chunk: usize,
    /// Other GPUs that can read what is in it.
    pub(super) readers: Vec<i32>,
}

impl Pool {
    /// Takes as much memory as is wanted, or as there is, in chunks. GPUs in `peers` that can reach it may read it.
    pub(super) fn new(
        context: &Arc<Context>,
        wanted: Bytes,
        (chunk, config): (usize, &CudaConfig),
        peers: &[i32],
    ) -> Result<Self, DeviceError> {
        let wanted = wanted.as_len().ok_or(DeviceError::Invalid("more device memory than can be"))? / chunk;
        let memory = Arc::new(take_memory(context, wanted, (chunk, config.shared))?);
        let window = Addresses::reserve(context, memory.len().max(1) * chunk)?;
        let readers = peers
            .iter()
            .map(|&peer| can_reach(peer, context.device).map(|can| can.then_some(peer)))
            .collect::<Vec<_>>();
        let readers = readers.into_iter().filter_map(Result::transpose).collect::<Result<_, _>>()?;
        let chunks = Chunks::new(memory.len(), config.scattered);
        let pool = Self { memory, window, chunks, chunk, readers };
        pool.show()?;
        Ok(pool)
    }

    /// Puts the chunks into the window.
    fn show(&self) -> Result<(), DeviceError> {
        let len = self.memory.len() * self.chunk;
        for (number, memory) in self.memory.iter().enumerate() {
            self.window.map(number * self.chunk, memory, self.chunk)?;
        }
        if len > 0 {
            self.window.open(0, len)?;
            self.readers.iter().try_for_each(|&peer| self.window.open_to(peer, 0, len))?;
        }
        Ok(())
    }

    pub(super) fn size(&self) -> Bytes {
        Bytes::of_len(self.memory.len() * self.chunk)
    }

    /// How much of it weights may take at a time: the rest is free, so that there are longer runs.
    pub(super) fn capacity(&self) -> Bytes {
        Bytes::of_len((self.memory.len() - self.memory.len() / SPARE_ONE_IN) * self.chunk)
    }

    pub(super) fn take(&mut self, count: usize) -> Result<Vec<usize>, DeviceError> {
        let size = |chunks: usize| Bytes::of_len(chunks * self.chunk);
        let short = DeviceError::OutOfMemory { needed: size(count), free: size(self.chunks.free_len()) };
        self.chunks.take(count).ok_or(short)
    }

    pub(super) fn give(&mut self, chunks: &[usize]) {
        self.chunks.give(chunks);
    }

    /// All chunks, in order.
    pub(super) fn all_memory(&self) -> Arc<Vec<Physical>> {
        Arc::clone(&self.memory)
    }

    pub(super) fn memory(&self, chunk: usize) -> &Physical {
        &self.memory[chunk]
    }

    /// Where the first chunk is, for copies; the others follow.
    pub(super) fn window(&self) -> u64 {
        self.window.base()
    }
}

/// So many chunks, or as many as there are.
fn take_memory(
    context: &Arc<Context>,
    wanted: usize,
    (chunk, shared): (usize, bool),
) -> Result<Vec<Physical>, DeviceError> {
    let mut memory = Vec::with_capacity(wanted);
    while memory.len() < wanted {
        match if shared { Physical::new_shared(context, chunk) } else { Physical::new(context, chunk) } {
            Ok(piece) => memory.push(piece),
            Err(DeviceError::OutOfMemory { .. }) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(memory)
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Err(error) = self.window.unmap(0, self.memory.len() * self.chunk) {
            tracing::warn!(%error, "the pool cannot be unmapped");
        }
    }
}
