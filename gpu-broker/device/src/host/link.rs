//! The thread that does a host device's swaps, one after the other in the order of asking.
//!
//! It owns the pool: nobody else gives out or takes back chunks. Memory is lent part by part just before it is written,
//! so that the first group does not wait for the mapping of the last one.

use std::{
    collections::BTreeMap,
    iter,
    sync::{Arc, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use faaswap_protocol::Bytes;

use super::{
    arena::{Arena, Reservation, at},
    copy::{self, Pace},
    pool::{Pool, Run},
    shared::{Job, Shared, Swap},
};
use crate::{DeviceError, Group, HostWeights, RangeId, SwapReport, range::Step};

/// Most memory to lend in one system call: 12 us of delay for the first group.
const PART_MAX: usize = 64 << 20;

/// Memory behind a range.
struct Lent {
    runs: Vec<Run>,
    /// How many of the parts of these runs are lent.
    parts: usize,
}

/// A stretch that is lent in one call.
#[derive(Clone, Copy)]
struct Part {
    home: usize,
    range: usize,
    len: usize,
}

pub(super) struct Link {
    shared: Arc<Shared>,
    pool: Pool,
    chunk: usize,
    bytes_per_second: Option<u64>,
    behind: BTreeMap<RangeId, Lent>,
}

/// Loses the device when its thread ends, even by a panic of a callback: without it, everyone would wait for ever.
struct LoseAtEnd<'a>(&'a Shared);

impl Drop for LoseAtEnd<'_> {
    fn drop(&mut self) {
        self.0.lose();
        while let Some(job) = self.0.pop_job() {
            match job.swap {
                Swap::In { done, .. } => done(Err(DeviceError::Lost)),
                Swap::Out { done } => done(Err(DeviceError::Lost)),
            }
        }
    }
}

impl Link {
    pub(super) fn new(shared: Arc<Shared>, chunks: usize, chunk: usize, bytes_per_second: Option<u64>) -> Self {
        Self { shared, pool: Pool::new(chunks), chunk, bytes_per_second, behind: BTreeMap::new() }
    }

    /// Until the device goes.
    pub(super) fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let _guard = LoseAtEnd(&shared);
        while let Some(Job { range, reservation, swap }) = shared.next_job() {
            match swap {
                Swap::In { weights, groups, asked, done } => {
                    let waited = asked.elapsed();
                    let result = self.swap_in(range, &reservation, &weights, &groups);
                    let result = result.map(|report| SwapReport { waited, ..report });
                    drop((reservation, weights));
                    done(result);
                }
                Swap::Out { done } => {
                    let result = self.swap_out(range, &reservation);
                    drop(reservation);
                    done(result);
                }
            }
        }
    }

    fn swap_in(
        &mut self,
        range: RangeId,
        reservation: &Reservation,
        weights: &HostWeights,
        groups: &[Group],
    ) -> Result<SwapReport, DeviceError> {
        self.check_lost()?;
        self.shared.step(range, Step::Begin, None);
        let result = self.fill(range, reservation, weights, groups);
        match &result {
            Ok(_) => self.shared.step(range, Step::Arrive, None),
            // Programs may be running on what is there, so it stays.
            Err(DeviceError::Lost) => {}
            Err(failed) => {
                self.empty(range, reservation)?;
                self.shared.step(range, Step::Fail, Some(failed.clone()));
            }
        }
        result
    }

    fn swap_out(&mut self, range: RangeId, reservation: &Reservation) -> Result<(), DeviceError> {
        self.check_lost()?;
        self.empty(range, reservation)?;
        self.shared.step(range, Step::Leave, None);
        Ok(())
    }

    fn check_lost(&self) -> Result<(), DeviceError> {
        if self.shared.is_lost() { Err(DeviceError::Lost) } else { Ok(()) }
    }

    /// Lends memory to the range and copies the groups into it. On failure, what was lent stays so.
    fn fill(
        &mut self,
        range: RangeId,
        reservation: &Reservation,
        weights: &HostWeights,
        groups: &[Group],
    ) -> Result<SwapReport, DeviceError> {
        let started = Instant::now();
        let mut pace = Pace::start(started, self.bytes_per_second);
        let mut mapping = Duration::ZERO;
        let (mut copied, mut lent_until) = (0, 0);
        let mut parts = self.take_chunks(range, weights.size())?;
        for (group, arrived) in groups.iter().zip(1_u32..) {
            let end = copied + usize::try_from(group.len).expect("groups lie in the weights, which are mapped");
            if weights.filled() < end {
                let begun = Instant::now();
                weights.wait_unless_lost(end, || self.shared.is_lost())?;
                pace.stall(begun.elapsed());
            }
            while copied < end {
                self.check_lost()?;
                if copied == lent_until {
                    let begun = Instant::now();
                    let part = parts.next().expect("there are chunks for all weights");
                    self.lend(range, reservation, part)?;
                    lent_until += part.len;
                    mapping += begun.elapsed();
                }
                let len = pace.piece().min(end - copied).min(lent_until - copied);
                let from = weights.as_ptr().wrapping_add(copied);
                let to = at(reservation.base() + copied).cast::<u8>();
                // SAFETY: `copied + len` is at most the sum of the groups' lengths, which is the length of the weights
                // (checked when the swap was asked for), so `from` is readable; and at most `lent_until`, up to where
                // writable memory has been lent to the range. The two are different mappings.
                unsafe { copy::piece(from, to, len, weights.len()) };
                copied += len;
                pace.wait_for(len);
            }
            self.shared.publish(range, arrived);
        }
        let (waited, queueing) = (Duration::ZERO, Duration::ZERO);
        Ok(SwapReport { copied: Bytes::of_len(copied), waited, queueing, took: started.elapsed(), mapping })
    }

    /// Takes chunks for the range out of the pool, and says how to lend them.
    fn take_chunks(
        &mut self,
        range: RangeId,
        weights: Bytes,
    ) -> Result<impl Iterator<Item = Part> + use<>, DeviceError> {
        let chunk = Bytes::of_len(self.chunk);
        let needed = weights.checked_round_up(chunk).ok_or(DeviceError::Invalid("more weights than can be"))?;
        let chunks = needed.as_len().unwrap_or(usize::MAX) / self.chunk;
        let free = Bytes::of_len(self.pool.free() * self.chunk);
        let runs = self.pool.take(chunks).ok_or(DeviceError::OutOfMemory { needed, free })?;
        let parts = parts(&runs, self.chunk);
        self.behind.insert(range, Lent { runs, parts: 0 });
        self.count_mapped();
        Ok(parts.into_iter())
    }

    fn lend(&mut self, range: RangeId, reservation: &Reservation, part: Part) -> Result<(), DeviceError> {
        self.shared.arena.lend(part.home, part.len, reservation, part.range)?;
        self.behind.get_mut(&range).expect("the range has chunks").parts += 1;
        Ok(())
    }

    /// Takes away what is behind the range, if anything is.
    fn empty(&mut self, range: RangeId, reservation: &Reservation) -> Result<(), DeviceError> {
        self.shared.publish(range, 0);
        let Some(Lent { runs, parts: lent }) = self.behind.remove(&range) else { return Ok(()) };
        let readers = reservation.readers.write().unwrap_or_else(PoisonError::into_inner);
        let mut len = 0;
        for part in parts(&runs, self.chunk).into_iter().take(lent) {
            self.shared.arena.take_back(part.home, part.len, reservation, part.range);
            len = part.range + part.len;
        }
        if len > 0
            && let Err(e) = Arena::close(reservation, len)
        {
            // The range would go on showing memory that is about to be another's.
            tracing::error!(device = self.shared.info.name, error = %e, "device memory cannot be taken back");
            self.shared.lose();
            return Err(DeviceError::Lost);
        }
        drop(readers);
        runs.into_iter().for_each(|run| self.pool.give(run));
        self.count_mapped();
        Ok(())
    }

    fn count_mapped(&self) {
        let free = Bytes::of_len(self.pool.free() * self.chunk);
        let mapped = self.shared.info.capacity.checked_sub(free).expect("no more is free than there is");
        self.shared.mapped.store(mapped.get(), Ordering::SeqCst);
    }
}

/// The stretches to lend, in the order of the range's addresses.
fn parts(runs: &[Run], chunk: usize) -> Vec<Part> {
    let mut range = 0;
    let cut = |run: &Run| {
        let (mut home, mut left) = (run.first * chunk, run.chunks * chunk);
        let parts: Vec<Part> = iter::from_fn(|| {
            let len = left.min(PART_MAX);
            let part = Part { home, range, len };
            (home, range, left) = (home + len, range + len, left - len);
            (len > 0).then_some(part)
        })
        .collect();
        parts
    };
    runs.iter().flat_map(cut).collect()
}
