//! The threads that do a CUDA device's swaps: one maps memory and queues copies, in the order of asking, the other
//! waits for the copies' ends. Copies go to the pool's own addresses, so the bus never waits for a mapping: that is done
//! while they run, stage after stage (`stages.rs`), before the parts of programs that need it are launched.
//!
//! To launch all of a program before, with groups that wait on the device until the host has mapped their chunks, was tried on an H100:
//! conformance and models of up to 100 MB passed, BERT-large hung. A launch of many kernels seems to keep the driver
//! from mapping until the device has taken them, and the device waits for the mapping.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender},
    },
    time::{Duration, Instant},
};

use faaswap_protocol::Bytes;

use super::{
    ahead::{Ahead, Spare, Timed},
    detour::Detour,
    placement::Placement,
    pool::Pool,
    queue::{Event, Queue},
    shared::{Job, Next, Shared, Swap},
    source::Source,
    stages::stages,
};
use crate::{DeviceError, Group, OnDone, RangeId, SwapReport, range::Step};

/// Most swaps whose copies are queued at a time: enough that the bus never idles between two.
pub(super) const AHEAD_MAX: usize = 4;

/// Chunks that are mapped before any copy where mapping waits for copies: as much as takes less time than one wait does.
const MAPPED_FIRST: usize = 16;

/// A swap-in whose copies are all queued.
pub(super) struct Copying {
    range: RangeId,
    timed: Timed,
    last: Option<Arc<Event>>,
    /// Keeps the weights where they are read.
    source: Source,
    report: SwapReport,
    done: OnDone<SwapReport>,
}

/// How much of a swap-in is queued.
#[derive(Default)]
struct Queued {
    groups: usize,
    /// The event of the last group.
    last: Option<Arc<Event>>,
    /// Bytes that were sent over each way: the own link, then the detours.
    sent: Vec<u64>,
}

pub(super) struct Link {
    pub(super) shared: Arc<Shared>,
    pub(super) pool: Pool,
    /// Brings weights, one group after the other.
    pub(super) copies: Queue,
    /// Second ways, over other GPUs.
    pub(super) detours: Vec<Detour>,
    /// Keeps the groups' events in order where there are two ways.
    pub(super) order: Queue,
    /// The last copy on either way.
    pub(super) copied: Event,
    pub(super) ends: SyncSender<Copying>,
    /// Ranges that are out and have still memory behind them; each once.
    pub(super) stale: VecDeque<RangeId>,
    /// Groups that may still be under way.
    pub(super) ahead: Ahead<Arc<Event>>,
    pub(super) spare: Spare,
    /// Whether a stage is mapped before its copies are queued; see `order.rs`.
    pub(super) maps_first: bool,
    /// How many placements there were.
    pub(super) placements: u64,
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
        loop {
            let can_tidy = !self.stale.is_empty();
            let Job { range, swap } = match shared.next_job(can_tidy) {
                Next::Job(job) => job,
                Next::Nothing => {
                    let tidied = self.tidy();
                    if let Err(error) = self.shared.noted(tidied) {
                        tracing::error!(%error, "the pool cannot be tidied");
                    }
                    continue;
                }
                Next::End => break,
            };
            match swap {
                Swap::In { source, groups, asked, done } => {
                    self.swap_in(range, source, &groups, asked.elapsed(), done);
                }
                Swap::Out { done } => {
                    let result = self.swap_out(range);
                    done(self.shared.noted(result));
                }
            }
        }
        // The pool goes with this: nothing that is queued may need it any more.
        if let Err(error) = self.settle() {
            tracing::debug!(%error, "the link of a device that goes cannot be emptied");
        }
    }

    /// Waits for all copies.
    fn settle(&self) -> Result<(), DeviceError> {
        self.detours.iter().try_for_each(Detour::settle)?;
        self.copies.finish(&Event::new(&self.shared.context)?)
    }

    fn swap_in(
        &mut self,
        range: RangeId,
        source: Source,
        groups: &[Group],
        waited: Duration,
        done: OnDone<SwapReport>,
    ) {
        let size = self.shared.change(range, |range| range.weights);
        let begun = self.shared.context.enter();
        self.shared.step(range, Step::Begin);
        let mut report = SwapReport {
            copied: size,
            waited,
            queueing: Duration::ZERO,
            mapping: Duration::ZERO,
            took: Duration::ZERO,
        };
        let filled = begun.and_then(|()| self.fill(range, (&source, size), groups, &mut report));
        match self.shared.noted(filled) {
            Ok((timed, last)) => {
                self.shared.change(range, |range| range.unfinished = true);
                let copying = Copying { range, timed, last, source, report, done };
                if let Err(gone) = self.ends.send(copying) {
                    (gone.0.done)(Err(DeviceError::Lost));
                }
            }
            Err(DeviceError::Lost) => done(Err(DeviceError::Lost)),
            Err(failed) => {
                self.shared.change(range, |range| (range.recorded, range.failed) = (0, Some(failed.clone())));
                let undone = self.undo(range);
                if self.shared.noted(undone).is_err() {
                    self.shared.lose();
                    return done(Err(DeviceError::Lost));
                }
                self.shared.step(range, Step::Fail);
                done(Err(failed));
            }
        }
    }

    /// Takes back a swap-in that could not be queued as a whole. Programs that began on the part that was there have read
    /// of the failure, and end.
    fn undo(&mut self, range: RangeId) -> Result<(), DeviceError> {
        self.shared.wait_until(range, Duration::ZERO, |range| (range.readers == 0).then_some(Ok(())))?;
        // Copies may be under way into chunks that go back to the pool.
        self.settle()?;
        self.empty(range)
    }

    fn swap_out(&mut self, range: RangeId) -> Result<(), DeviceError> {
        self.shared.context.enter()?;
        self.shared
            .wait_until(range, Duration::ZERO, |range| (!range.unfinished && range.readers == 0).then_some(Ok(())))?;
        self.empty(range)?;
        self.shared.step(range, Step::Leave);
        Ok(())
    }

    /// Queues the copies and puts the chunks behind the range while they run, or before, stage after stage. Returns the last
    /// copy's event.
    fn fill(
        &mut self,
        range: RangeId,
        (source, size): (&Source, Bytes),
        groups: &[Group],
        report: &mut SwapReport,
    ) -> Result<(Timed, Option<Arc<Event>>), DeviceError> {
        let context = Arc::clone(&self.shared.context);
        let timed = self.spare.take(&context)?;
        self.ahead.begin(range);
        let placed = self.place(range, size)?;
        let chunks = placed.chunks().len();
        self.copies.record(&timed.start)?;
        // Detours may not begin before either: their time counts too, and the chunks may still be in use.
        for &number in source.detours() {
            self.detours[number].gather.wait(&timed.start)?;
        }
        let mut queued = Queued { sent: vec![0; 1 + source.detours().len()], ..Queued::default() };
        let mut mapped = 0;
        for stage in stages(groups, self.shared.info.chunk) {
            if self.maps_first {
                let until = stage.chunks.max(chunks.min(MAPPED_FIRST));
                mapped = self.map_timed(range, &placed, (mapped, until), report)?;
            }
            let begun = Instant::now();
            for group in &groups[queued.groups..stage.groups] {
                self.queue_group(range, source, group, &placed, &mut queued)?;
            }
            if stage.groups == groups.len() {
                // Without detours it is recorded on this very queue.
                if let Some(last) = queued.last.as_ref().filter(|_| !source.detours().is_empty()) {
                    self.copies.wait(last)?;
                }
                self.copies.record(&timed.end)?;
            }
            report.queueing += begun.elapsed();
            if !self.maps_first {
                mapped = self.map_timed(range, &placed, (mapped, stage.chunks), report)?;
            }
            let there = u32::try_from(stage.groups).expect("there are at most GROUPS_MAX groups");
            self.shared.change(range, |range| range.recorded = there);
        }
        Ok((timed, queued.last))
    }

    /// Puts behind a range what must be there, from one place to another; returns how far that is done.
    fn map_timed(
        &self,
        range: RangeId,
        placed: &Placement,
        (from, until): (usize, usize),
        report: &mut SwapReport,
    ) -> Result<usize, DeviceError> {
        if until <= from {
            return Ok(from);
        }
        let begun = Instant::now();
        let mapped = self.map(range, placed, (from, until));
        report.mapping += begun.elapsed();
        mapped.map(|()| until)
    }

    /// Queues the copy of a group with its event behind it.
    fn queue_group(
        &mut self,
        range: RangeId,
        source: &Source,
        group: &Group,
        placed: &Placement,
        queued: &mut Queued,
    ) -> Result<(), DeviceError> {
        self.wait_filled(source, group)?;
        let number = u32::try_from(queued.groups).expect("there are at most GROUPS_MAX groups");
        let event = self.shared.books()?.event(&self.shared.context, range, number)?;
        let way = least_sent(&queued.sent);
        let detour = way.checked_sub(1).map(|number| source.detours()[number]);
        queued.sent[way] += group.len;
        let copies = placed.pieces(group.offset..group.offset + group.len);
        while let Some(behind) = self.ahead.first_beyond(copies.len()) {
            if !behind.look(Duration::ZERO)? {
                behind.wait()?;
            }
        }
        self.ahead.push(range, Arc::clone(&event), copies.len());
        let fits = |bytes: u64| usize::try_from(bytes).expect("groups lie in the weights, which are mapped");
        let mut from = fits(group.offset);
        for (to, len) in copies {
            // Each copy costs some 3 us: neighbouring chunks are one.
            self.queue_piece(source, detour, from, to, fits(len))?;
            from += fits(len);
        }
        self.record(source, detour, &event)?;
        queued.groups += 1;
        queued.last = Some(event);
        Ok(())
    }

    /// Records a group's event: once its copy, and those of all groups before it, are done.
    fn record(&self, source: &Source, detour: Option<usize>, event: &Event) -> Result<(), DeviceError> {
        if source.detours().is_empty() {
            return self.copies.record(event);
        }
        detour.map_or(&self.copies, |detour| &self.detours[detour].gather).record(&self.copied)?;
        self.order.wait(&self.copied)?;
        self.order.record(event)
    }

    /// Waits until a group is in host memory.
    fn wait_filled(&self, source: &Source, group: &Group) -> Result<(), DeviceError> {
        let Some(weights) = source.host() else { return Ok(()) };
        let end = usize::try_from(group.offset + group.len).expect("groups lie in the weights, which are mapped");
        weights.wait_unless_lost(end, || self.shared.is_lost())
    }

    /// Queues the copy of a piece of the weights, over a detour where one is named.
    fn queue_piece(
        &mut self,
        source: &Source,
        detour: Option<usize>,
        from: usize,
        to: u64,
        len: usize,
    ) -> Result<(), DeviceError> {
        match (source, detour) {
            (Source::Host(weights) | Source::Links(weights, _), None) => {
                let from = weights.as_ptr().wrapping_add(from);
                // SAFETY: the piece lies in the weights, which `Copying` keeps mapped and which do not change. The pool
                // is mapped as long as the link lives, and the chunk is the range's until a swap-out, which waits for
                // the last copy.
                unsafe { self.copies.copy_in(to, from, len) }
            }
            (Source::Host(weights) | Source::Links(weights, _), Some(detour)) => {
                let from = weights.as_ptr().wrapping_add(from);
                // SAFETY: as above.
                unsafe { self.detours[detour].copy_in(to, from, len) }
            }
            (Source::Peer(lent), _) => lent.pieces(from, len, |from, at, len| {
                // SAFETY: as above; the peer keeps its chunks until `Copying` gives them back.
                unsafe { self.copies.copy_across(to + at as u64, from, len) }
            }),
        }
    }
}

/// The way that has got the fewest bytes so far; of those the first, which is the GPU's own link.
fn least_sent(sent: &[u64]) -> usize {
    (0..sent.len()).min_by_key(|&way| sent[way]).unwrap_or(0)
}

/// Waits for the ends of copies, in order, and reports them.
pub(super) fn finish(shared: &Shared, ends: &Receiver<Copying>, spare: &Spare) {
    for Copying { range, timed, last, source, report, done } in ends {
        let waited = last.map_or(Ok(()), |last| last.wait()).and_then(|()| timed.end.wait());
        let took = waited.and_then(|()| timed.end.since(&timed.start));
        drop(source);
        spare.give(timed);
        let lost = |took| if shared.is_lost() { Err(DeviceError::Lost) } else { Ok(took) };
        let result = shared.noted(took).and_then(lost);
        if result.is_ok() {
            shared.step(range, Step::Arrive);
        } else {
            shared.lose();
        }
        shared.change(range, |range| range.unfinished = false);
        // Weights can be used once they are there and mapped, whichever comes last.
        done(result.map(|took| SwapReport { took: took.max(report.mapping), ..report }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_go_where_the_fewest_bytes_have_gone_and_over_the_own_link_first() {
        let mut sent = vec![0; 3];
        let ways = [8, 4, 2, 1, 3, 6].map(|len| {
            let way = least_sent(&sent);
            sent[way] += len;
            way
        });
        assert_eq!(ways, [0, 1, 2, 2, 2, 1]);
        assert_eq!(least_sent(&[7]), 0);
    }
}
