//! In which order a link maps memory, where it must, and queues copies: what is better there is measured when the device is opened.
//!
//! Where mapping does not mind copies, it is hidden behind them: a stage's copies are queued first. On machines with two H100
//! it took 0.08 ms for a chunk alone and 1.03 ms beside copies, and models of 50 to 180 MB ran only when all was there. There
//! a stage is mapped first: its first part then runs beside its copies.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    driver::{Addresses, Context, Physical},
    host_memory::Pinned,
    pool::Pool,
    queue::{Event, Queue},
};
use crate::DeviceError;

/// Length of a copy that mapping is tried beside, and how many are queued: some 2.5 ms over PCIe of the fifth generation.
const COPY: usize = 8 << 20;
const COPIES: usize = 16;
/// Tries of each kind; the shortest counts, for what is first is slow.
const TRIES: usize = 3;
/// Mapping that takes so many parts of the copies' time longer beside them has waited for them.
const WAITS_ONE_IN: u32 = 4;

/// Whether mapping waits for copies that are queued.
pub(super) fn mapping_waits(context: &Arc<Context>, pool: &Pool) -> Result<bool, DeviceError> {
    let (queue, done) = (Queue::new(context)?, Event::new(context)?);
    let host = Pinned::new(context, COPY.min(pool.chunk))?;
    let memory = Physical::new(context, pool.chunk)?;
    let addresses = Addresses::reserve(context, pool.chunk)?;
    let map = || {
        let started = Instant::now();
        addresses.map(0, &memory, pool.chunk)?;
        let opened = addresses.open(0, pool.chunk);
        let took = started.elapsed();
        opened.and(addresses.unmap(0, pool.chunk))?;
        Ok::<_, DeviceError>(took)
    };
    let (mut alone, mut beside, mut copying) = (Duration::MAX, Duration::MAX, Duration::MAX);
    for _ in 0..TRIES {
        alone = alone.min(map()?);
        let started = Instant::now();
        let queued = (0..COPIES).try_for_each(|_| {
            // SAFETY: the pinned memory and the pool's first chunk, which no range has yet, outlive the wait below.
            unsafe { queue.copy_in(pool.window(), host.as_ptr(), host.len()) }
        });
        let mapped = map();
        queue.finish(&done)?;
        queued?;
        copying = copying.min(started.elapsed());
        beside = beside.min(mapped?);
    }
    let waits = beside > alone + copying / WAITS_ONE_IN;
    tracing::info!(?alone, ?beside, ?copying, waits, "mapping a chunk, alone and beside copies");
    Ok(waits)
}
