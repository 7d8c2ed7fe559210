//! The chunks that weights are swapped into. All of them are mapped, for good, in a window of the pool's own: copies go
//! there. Programs see them behind the ranges of their models.

use std::{collections::BTreeSet, sync::Arc};

use faaswap_protocol::Bytes;

use super::driver::{Addresses, Context, Physical, can_reach};
use crate::DeviceError;

pub(super) struct Pool {
    memory: Vec<Physical>,
    window: Addresses,
    /// In order, so that what is taken at once mostly lies in a row.
    free: BTreeSet<usize>,
    pub(super) chunk: usize,
    /// Other GPUs that can read what is in it.
    pub(super) readers: Vec<i32>,
}

impl Pool {
    /// Takes as much memory as is wanted, or as there is. GPUs in `peers` that can reach it may read it.
    pub(super) fn new(context: &Arc<Context>, wanted: Bytes, chunk: usize, peers: &[i32]) -> Result<Self, DeviceError> {
        let wanted = wanted.as_len().ok_or(DeviceError::Invalid("more device memory than can be"))? / chunk;
        let mut memory = Vec::with_capacity(wanted);
        while memory.len() < wanted {
            match Physical::new(context, chunk) {
                Ok(chunk) => memory.push(chunk),
                Err(DeviceError::OutOfMemory { .. }) => break,
                Err(error) => return Err(error),
            }
        }
        let window = Addresses::reserve(context, memory.len().max(1) * chunk)?;
        let mut pool = Self { free: (0..memory.len()).collect(), memory, window, chunk, readers: Vec::new() };
        for (place, memory) in pool.memory.iter().enumerate() {
            pool.window.map(place * chunk, memory, chunk)?;
        }
        if !pool.memory.is_empty() {
            pool.window.open(0, pool.memory.len() * chunk)?;
            for &peer in peers {
                if can_reach(peer, context.device)? {
                    pool.window.open_to(peer, 0, pool.memory.len() * chunk)?;
                    pool.readers.push(peer);
                }
            }
        }
        Ok(pool)
    }

    pub(super) fn size(&self) -> Bytes {
        Bytes::of_len(self.memory.len() * self.chunk)
    }

    pub(super) fn take(&mut self, count: usize) -> Result<Vec<usize>, DeviceError> {
        if count > self.free.len() {
            let size = |chunks: usize| Bytes::of_len(chunks * self.chunk);
            return Err(DeviceError::OutOfMemory { needed: size(count), free: size(self.free.len()) });
        }
        Ok(std::iter::from_fn(|| self.free.pop_first()).take(count).collect())
    }

    pub(super) fn give(&mut self, chunks: Vec<usize>) {
        self.free.extend(chunks);
    }

    pub(super) fn memory(&self, chunk: usize) -> &Physical {
        &self.memory[chunk]
    }

    /// Where a byte of a chunk is, whatever range the chunk is behind.
    pub(super) fn address(&self, (chunk, offset): (usize, usize)) -> u64 {
        self.window.base() + (chunk * self.chunk + offset) as u64
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Err(error) = self.window.unmap(0, self.memory.len() * self.chunk) {
            tracing::warn!(%error, "the pool cannot be unmapped");
        }
    }
}
