//! GPUs that other processes have: their pools' chunks by descriptors, mapped here, so that weights can be copied from there.
//!
//! Whoever holds weights keeps them as long as they are read: that is between the processes. Memory stays as long as one process
//! has it mapped, also where the one that made it has ended.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
};

use faaswap_protocol::Bytes;

use super::{
    CudaDevice,
    driver::{Addresses, Context, Physical},
    placement::Placement,
    source::{Lent, Source},
};
use crate::{DeviceError, Group, HostWeights, OnDone, RangeId, SwapReport};

/// The pool of another process' GPU.
pub(super) struct Foreign {
    /// The chunks stay as long as they are mapped.
    _memory: Vec<Physical>,
    window: Addresses,
    count: usize,
    chunk: usize,
}

impl Foreign {
    fn new(context: &Arc<Context>, chunks: &[OwnedFd], chunk: Bytes) -> Result<Self, DeviceError> {
        let chunk = chunk.as_len().filter(|&chunk| chunk > 0).ok_or(DeviceError::Invalid("no size of a chunk"))?;
        let memory = chunks.iter().map(|fd| Physical::import(context, fd.as_fd())).collect::<Result<Vec<_>, _>>()?;
        let window = Addresses::reserve(context, memory.len().max(1) * chunk)?;
        let mut foreign = Self { _memory: Vec::new(), window, count: 0, chunk };
        for physical in &memory {
            foreign.window.map(foreign.count * chunk, physical, chunk)?;
            foreign.count += 1;
        }
        foreign._memory = memory;
        if foreign.count > 0 {
            // For reading, where the driver can: nothing that runs here changes weights there.
            foreign.window.open_to(context.device, 0, foreign.count * chunk)?;
        }
        Ok(foreign)
    }

    /// Where weights in these chunks are.
    fn placed(&self, chunks: &[u32]) -> Option<Placement> {
        let chunk = |&chunk: &u32| usize::try_from(chunk).ok().filter(|&chunk| chunk < self.count);
        let chunks = chunks.iter().map(chunk).collect::<Option<Vec<_>>>()?;
        Some(Placement::new(0, (chunks, self.chunk), (self.window.base(), 0), Some(&[])))
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        if let Err(error) = self.window.unmap(0, self.count * self.chunk) {
            tracing::warn!(%error, "another GPU's pool cannot be unmapped");
        }
    }
}

/// Pools of other GPUs, by the driver's count.
#[derive(Default)]
pub(super) struct Pools(Mutex<Vec<(u32, Arc<Foreign>)>>);

impl Pools {
    fn of(&self, gpu: u32) -> Option<Arc<Foreign>> {
        let pools = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pools.iter().find(|(of, _)| *of == gpu).map(|(_, pool)| Arc::clone(pool))
    }

    fn set(&self, gpu: u32, pool: Option<Foreign>) {
        let mut pools = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before: Vec<_> = pools.extract_if(.., |(of, _)| *of == gpu).collect();
        pools.extend(pool.map(|pool| (gpu, Arc::new(pool))));
        drop(pools);
        // To unmap takes a while.
        drop(before);
    }
}

impl CudaDevice {
    /// How many chunks the pool has for other processes.
    pub fn shared_chunks(&self) -> usize {
        self.exported.as_ref().map_or(0, |memory| memory.len())
    }

    /// The pool's chunks, in order, for other processes; none where it was not opened to be shared.
    pub fn export_pool(&self) -> Result<Vec<OwnedFd>, DeviceError> {
        self.shared.context.enter()?;
        self.exported.iter().flat_map(|memory| memory.iter()).map(Physical::export).collect()
    }

    /// Takes the chunks of another process' GPU, all of them in order; those that were there before go.
    pub fn import_pool(&self, gpu: u32, chunks: &[OwnedFd], chunk: Bytes) -> Result<(), DeviceError> {
        self.pools.set(gpu, None);
        self.pools.set(gpu, Some(Foreign::new(&self.shared.context, chunks, chunk)?));
        Ok(())
    }

    /// Gives the memory of another process' GPU up, so that it can be given back.
    pub fn forget_pool(&self, gpu: u32) {
        self.pools.set(gpu, None);
    }

    /// As [`swap_in_from`](crate::Device::swap_in_from), from these chunks of another process' GPU; from host memory where its pool is
    /// not here. Whoever asks sees to it that the weights stay there until the end is told.
    pub fn swap_in_from_pool(
        &self,
        (gpu, chunks): (u32, &[u32]),
        range: RangeId,
        (weights, groups): (Arc<HostWeights>, Arc<[Group]>),
        done: OnDone<SwapReport>,
    ) -> Result<(), DeviceError> {
        let size = weights.size();
        let pool = self.pools.of(gpu);
        let placed = pool.as_ref().filter(|_| !chunks.is_empty()).and_then(|pool| pool.placed(chunks));
        let source = match (pool, placed) {
            (Some(pool), Some(placed)) => Source::Peer(Lent::of_foreign(pool, placed)),
            (_, _) => Source::Host(weights),
        };
        self.queue_in(range, size, source, groups, done)
    }

    /// In which chunks of the pool a range's weights are; none where they are not all there.
    pub fn chunks_of(&self, range: RangeId) -> Vec<u32> {
        let Ok(mut books) = self.shared.books() else { return Vec::new() };
        let placed = books.ranges.get(range).and_then(|found| found.resident(range));
        let chunks = placed.map(|placed| placed.chunks().iter().map(|&chunk| u32::try_from(chunk).ok()).collect());
        chunks.ok().flatten().unwrap_or_default()
    }

    /// Keeps a range's weights where they are for a reader in another process.
    pub fn keep_for_reader(&self, range: RangeId) {
        if let Ok(mut books) = self.shared.books()
            && let Ok(range) = books.ranges.get(range)
        {
            range.readers += 1;
        }
    }

    /// A reader for whom they were kept has gone.
    pub fn reader_has_gone(&self, range: RangeId) {
        self.shared.change(range, |range| range.readers = range.readers.saturating_sub(1));
    }
}
