//! The threads that do a CUDA device's swaps: one maps memory and queues copies, in the order of asking, the other
//! waits for the copies' ends. So the bus never waits for a mapping, but for the first of the first swap.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{Receiver, SyncSender},
    },
    time::{Duration, Instant},
};

use faaswap_protocol::Bytes;

use super::{
    driver::{Addresses, Event, Physical, Queue},
    shared::{Job, Range, Shared, Swap},
};
use crate::{DeviceError, Group, HostWeights, OnDone, RangeId, SwapReport, range::Step};

/// Most swaps whose copies are queued at a time: enough that the bus never idles between two.
pub(super) const AHEAD_MAX: usize = 4;

/// A swap-in whose copies are all queued.
pub(super) struct Copying {
    range: RangeId,
    last: Option<Arc<Event>>,
    /// Keeps the source mapped.
    weights: Arc<HostWeights>,
    started: Instant,
    mapping: Duration,
    done: OnDone<SwapReport>,
}

pub(super) struct Link {
    pub(super) shared: Arc<Shared>,
    pub(super) pool: VecDeque<Physical>,
    pub(super) chunk: usize,
    pub(super) copies: Queue,
    pub(super) ends: SyncSender<Copying>,
}

/// Tells all who wait when the thread ends, even by a panic.
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
    /// Until the device goes.
    pub(super) fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let _guard = LoseAtEnd(&shared);
        while let Some(Job { range, swap }) = shared.next_job() {
            match swap {
                Swap::In { weights, groups, done } => self.swap_in(range, weights, &groups, done),
                Swap::Out { done } => {
                    let result = self.swap_out(range);
                    done(self.shared.noted(result));
                }
            }
        }
    }

    fn swap_in(&mut self, range: RangeId, weights: Arc<HostWeights>, groups: &[Group], done: OnDone<SwapReport>) {
        let started = Instant::now();
        let begun = self.shared.context.enter();
        self.shared.step(range, Step::Begin);
        let mut mapping = Duration::ZERO;
        let filled = begun.and_then(|()| self.fill(range, &weights, groups, &mut mapping));
        match self.shared.noted(filled) {
            Ok(last) => {
                self.shared.change(range, |range| range.unfinished = true);
                let copying = Copying { range, last, weights, started, mapping, done };
                if let Err(gone) = self.ends.send(copying) {
                    (gone.0.done)(Err(DeviceError::Lost));
                }
            }
            Err(DeviceError::Lost) => done(Err(DeviceError::Lost)),
            Err(failed) => {
                let emptied = self.empty(range);
                if self.shared.noted(emptied).is_err() {
                    self.shared.lose();
                    return done(Err(DeviceError::Lost));
                }
                self.shared.change(range, |range| range.failed = Some(failed.clone()));
                self.shared.step(range, Step::Fail);
                done(Err(failed));
            }
        }
    }

    fn swap_out(&mut self, range: RangeId) -> Result<(), DeviceError> {
        self.shared.context.enter()?;
        self.shared.wait_until(range, |range| (!range.unfinished && range.readers == 0).then_some(Ok(())))?;
        self.empty(range)?;
        self.shared.step(range, Step::Leave);
        Ok(())
    }

    /// Puts chunks behind the range, one group ahead of its copy, and queues the copies. Returns the last one's event.
    fn fill(
        &mut self,
        range: RangeId,
        weights: &HostWeights,
        groups: &[Group],
        mapping: &mut Duration,
    ) -> Result<Option<Arc<Event>>, DeviceError> {
        let addresses = self.take_chunks(range, weights.size())?;
        let mut behind = 0;
        let mut last = None;
        for (group, number) in groups.iter().zip(0_u32..) {
            let fits = |bytes: u64| usize::try_from(bytes).expect("groups lie in the weights, which are mapped");
            let (offset, len) = (fits(group.offset), fits(group.len));
            let begun = Instant::now();
            self.map(range, &addresses, &mut behind, offset + len)?;
            *mapping += begun.elapsed();
            let event = self.shared.books()?.event(&self.shared.context, range, number)?;
            if len > 0 {
                let to = addresses.base() + group.offset;
                let from = weights.as_ptr().wrapping_add(offset);
                // SAFETY: the group lies in the weights, which `Copying` keeps mapped and which do not change; memory
                // is mapped behind the range up to the group's end until a swap-out, which waits for the last copy.
                unsafe { self.copies.copy_in(to, from, len) }?;
            }
            self.copies.record(&event)?;
            self.shared.change(range, |range| range.recorded = number + 1);
            last = Some(event);
        }
        Ok(last)
    }

    fn take_chunks(&mut self, range: RangeId, weights: Bytes) -> Result<Arc<Addresses>, DeviceError> {
        let len = weights.as_len().expect("the weights are mapped");
        let needed = len.div_ceil(self.chunk);
        if needed > self.pool.len() {
            let size = |chunks: usize| Bytes::of_len(chunks * self.chunk);
            return Err(DeviceError::OutOfMemory { needed: size(needed), free: size(self.pool.len()) });
        }
        self.shared.mapped.fetch_add(Bytes::of_len(needed * self.chunk).get(), Ordering::SeqCst);
        let chunks: Vec<_> = self.pool.drain(..needed).collect();
        Ok(self.shared.change(range, |range: &mut Range| {
            range.chunks = chunks;
            Arc::clone(&range.addresses)
        }))
    }

    /// Maps chunks until `end` bytes of the range are there.
    fn map(&self, range: RangeId, addresses: &Addresses, behind: &mut usize, end: usize) -> Result<(), DeviceError> {
        let start = *behind;
        if start >= end {
            return Ok(());
        }
        let stop = end.next_multiple_of(self.chunk);
        let mut books = self.shared.books()?;
        let chunks = &books.ranges.get(range)?.chunks;
        while *behind < stop {
            addresses.map(*behind, &chunks[*behind / self.chunk], self.chunk)?;
            *behind += self.chunk;
        }
        drop(books);
        addresses.open(start, stop - start)
    }

    /// Takes what is behind a range. Its copies have ended, or never began.
    fn empty(&mut self, range: RangeId) -> Result<(), DeviceError> {
        let (chunks, addresses) = self.shared.change(range, |range| {
            range.recorded = 0;
            (std::mem::take(&mut range.chunks), Arc::clone(&range.addresses))
        });
        if chunks.is_empty() {
            return Ok(());
        }
        let len = chunks.len() * self.chunk;
        // What failed halfway has copies under way, and addresses with nothing behind them; both are rare enough to be
        // cleared one by one.
        if let Err(error) = addresses.unmap(0, len) {
            tracing::warn!(%error, "unmapping a range part by part");
            self.copies.finish(&Event::new(&self.shared.context)?)?;
            for at in (0..len).step_by(self.chunk) {
                let _ = addresses.unmap(at, self.chunk);
            }
        }
        self.shared.mapped.fetch_sub(Bytes::of_len(len).get(), Ordering::SeqCst);
        self.pool.extend(chunks);
        Ok(())
    }
}

/// Waits for the ends of copies, in order, and reports them.
pub(super) fn finish(shared: &Shared, ends: &Receiver<Copying>) {
    let mut free_since = Instant::now();
    for Copying { range, last, weights, started, mapping, done } in ends {
        let waited = last.map_or(Ok(()), |last| last.wait());
        let ended = Instant::now();
        let started = started.max(free_since);
        free_since = ended;
        let copied = weights.size();
        drop(weights);
        let result = shared.noted(waited).and_then(|()| if shared.is_lost() { Err(DeviceError::Lost) } else { Ok(()) });
        if result.is_ok() {
            shared.step(range, Step::Arrive);
        } else {
            shared.lose();
        }
        shared.change(range, |range| range.unfinished = false);
        done(result.map(|()| SwapReport { copied, took: ended.saturating_duration_since(started), mapping }));
    }
}
