//! The chunks that weights are swapped into. All of them are mapped, for good, in a window of the pool's own: copies go
//! there. Programs see them behind the ranges of their models.

use std::sync::Arc;

use faaswap_protocol::Bytes;

use super::{
    blocks::{BLOCK, Blocks, Change},
    driver::{Addresses, Context, Physical, can_reach},
};
use crate::DeviceError;

pub(super) struct Pool {
    context: Arc<Context>,
    /// The piece that begins with a chunk.
    memory: Vec<Option<Physical>>,
    window: Addresses,
    blocks: Blocks,
    pub(super) chunk: usize,
    /// Other GPUs that can read what is in it.
    pub(super) readers: Vec<i32>,
}

impl Pool {
    /// Takes as much memory as is wanted, or as there is. GPUs in `peers` that can reach it may read it.
    pub(super) fn new(context: &Arc<Context>, wanted: Bytes, chunk: usize, peers: &[i32]) -> Result<Self, DeviceError> {
        let wanted = wanted.as_len().ok_or(DeviceError::Invalid("more device memory than can be"))? / chunk;
        let (memory, blocks) = take_memory(context, wanted, chunk)?;
        let window = Addresses::reserve(context, memory.len().max(1) * chunk)?;
        let readers = peers
            .iter()
            .map(|&peer| can_reach(peer, context.device).map(|can| can.then_some(peer)))
            .collect::<Vec<_>>();
        let readers = readers.into_iter().filter_map(Result::transpose).collect::<Result<_, _>>()?;
        let pool = Self { context: Arc::clone(context), memory, window, blocks, chunk, readers };
        pool.show(0, pool.memory.len())?;
        Ok(pool)
    }

    /// Puts chunks of the pool into its window.
    fn show(&self, first: usize, count: usize) -> Result<(), DeviceError> {
        let mut at = first;
        while at < first + count {
            let (memory, len) = self.piece(at);
            self.window.map(at * self.chunk, memory, len * self.chunk)?;
            at += len;
        }
        if count > 0 {
            self.window.open(first * self.chunk, count * self.chunk)?;
            self.readers
                .iter()
                .try_for_each(|&peer| self.window.open_to(peer, first * self.chunk, count * self.chunk))?;
        }
        Ok(())
    }

    pub(super) fn size(&self) -> Bytes {
        Bytes::of_len(self.memory.len() * self.chunk)
    }

    /// The block to be split before so many chunks can be taken.
    pub(super) fn must_split(&self, count: usize) -> Option<usize> {
        self.blocks.must_split(count)
    }

    /// What should be done with a block when there is time.
    pub(super) fn change(&self) -> Option<Change> {
        self.blocks.change()
    }

    pub(super) fn take(&mut self, count: usize) -> Result<Vec<usize>, DeviceError> {
        let size = |chunks: usize| Bytes::of_len(chunks * self.chunk);
        let short = DeviceError::OutOfMemory { needed: size(count), free: size(self.blocks.free_len()) };
        self.blocks.take(count).ok_or(short)
    }

    pub(super) fn give(&mut self, chunks: &[usize]) {
        self.blocks.give(chunks);
    }

    /// The piece of memory that begins with a chunk, and how many chunks it has.
    pub(super) fn piece(&self, chunk: usize) -> (&Physical, usize) {
        let (first, len) = self.blocks.piece(chunk);
        assert_eq!(first, chunk, "blocks are mapped from their beginning");
        (self.memory[first].as_ref().expect("chunks that can be taken have memory"), len)
    }

    /// Makes pieces of a free block, or one of its pieces. It is behind no range.
    pub(super) fn apply(&mut self, change: Change) -> Result<(), DeviceError> {
        let (block, pieces) = match change {
            Change::Split(block) => (block, BLOCK),
            Change::Merge(block) => (block, 1),
        };
        let (first, size) = (block * BLOCK, BLOCK * self.chunk);
        // Kept from being taken, should something fail on the way.
        self.blocks.remove(block);
        self.window.unmap(first * self.chunk, size)?;
        self.memory[first..first + BLOCK].fill_with(|| None);
        for at in (first..first + BLOCK).step_by(BLOCK / pieces) {
            self.memory[at] = Some(Physical::new(&self.context, size / pieces).inspect_err(|error| {
                tracing::error!(%error, "another process has taken GPU memory that was free for a moment: there is less for weights now");
            })?);
        }
        self.blocks.put(change);
        self.show(first, BLOCK)
    }

    /// Where a byte of a chunk is, whatever range the chunk is behind.
    pub(super) fn address(&self, (chunk, offset): (usize, usize)) -> u64 {
        self.window.base() + (chunk * self.chunk + offset) as u64
    }
}

/// Memory in blocks and single chunks, as far as there is any.
fn take_memory(
    context: &Arc<Context>,
    wanted: usize,
    chunk: usize,
) -> Result<(Vec<Option<Physical>>, Blocks), DeviceError> {
    let mut memory: Vec<Option<Physical>> = Vec::with_capacity(wanted);
    let plan = Blocks::new(wanted);
    while memory.len() < wanted {
        let (_, len) = plan.piece(memory.len());
        match Physical::new(context, len * chunk) {
            Ok(piece) => {
                memory.push(Some(piece));
                memory.extend((1..len).map(|_| None));
            }
            Err(DeviceError::OutOfMemory { .. }) => break,
            Err(error) => return Err(error),
        }
    }
    // What is left may hold less than a block.
    let blocks = Blocks::new(memory.len());
    Ok((memory, blocks))
}

impl Drop for Pool {
    fn drop(&mut self) {
        for (at, piece) in self.memory.iter().enumerate() {
            let len = self.blocks.piece(at).1 * self.chunk;
            if piece.is_some()
                && let Err(error) = self.window.unmap(at * self.chunk, len)
            {
                tracing::warn!(%error, "the pool cannot be unmapped");
                return;
            }
        }
    }
}
