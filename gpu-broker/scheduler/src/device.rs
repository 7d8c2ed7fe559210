//! What one device holds and does, as far as the scheduler has decided it.
//!
//! Memory is charged from the decision to swap in until the decision to swap out. That is sound because a device does
//! its swaps in the order in which they were decided: the memory is free by the time the next swap-in needs it.

use std::collections::{BTreeSet, VecDeque};

use faaswap_protocol::Bytes;

use crate::{
    event::{DeviceId, LaneId, RequestKey, Source},
    eviction::Worth,
    limits::LANES_MAX,
    slots::Slot,
    strain::Strain,
    time::{At, Span, scale},
};

/// What runs on a lane.
#[derive(Clone, Debug)]
pub(crate) struct Running {
    pub(crate) request: RequestKey,
    /// Requests that share the run.
    pub(crate) with: Vec<RequestKey>,
    pub(crate) started: At,
    /// When it is expected to end.
    pub(crate) ends: At,
    pub(crate) deadline: At,
    /// The device's busy time when it started.
    busy_before: Span,
}

/// One device.
#[derive(Clone, Debug)]
pub(crate) struct Device {
    pub(crate) id: DeviceId,
    pub(crate) lost: bool,
    pub(crate) capacity: Bytes,
    pub(crate) charged: Bytes,
    /// What of it cannot leave now.
    pub(crate) pinned: Bytes,
    /// What others are said to have taken; kept free where that is possible.
    pub(crate) foreign: Bytes,
    pub(crate) lanes: Vec<Option<Running>>,
    pub(crate) busy: usize,
    /// Lane time so far: the integral of `busy`.
    busy_time: Span,
    busy_since: At,
    /// How much runs slow each other down here.
    pub(crate) strain: Strain,
    /// Clock and foreign load: thousandths of full speed.
    pub(crate) speed_permille: u64,
    /// What may leave, cheapest first.
    pub(crate) leaving: BTreeSet<(Worth, Slot)>,
    /// Copies that were asked for and have not ended, in order.
    pub(crate) copies: VecDeque<(Slot, Source)>,
    /// Lane time of recent minutes, halved now and then: the tie-break that spreads load.
    pub(crate) recent: Span,
}

impl Device {
    pub(crate) fn new(id: DeviceId, capacity: Bytes, lanes: u16) -> Self {
        Self {
            id,
            lost: false,
            capacity,
            charged: Bytes::ZERO,
            pinned: Bytes::ZERO,
            foreign: Bytes::ZERO,
            lanes: vec![None; usize::from(lanes.min(LANES_MAX))],
            busy: 0,
            busy_time: Span::ZERO,
            busy_since: At::START,
            strain: Strain::of_device(),
            speed_permille: 1000,
            leaving: BTreeSet::new(),
            copies: VecDeque::new(),
            recent: Span::ZERO,
        }
    }

    /// What is left. Invariant BR-2 makes the difference exist.
    pub(crate) fn free(&self) -> Bytes {
        self.capacity.checked_sub(self.charged).unwrap_or(Bytes::ZERO)
    }

    /// Whether this fits when everything leaves that can.
    pub(crate) fn can_make_room(&self, charge: Bytes) -> bool {
        self.pinned.checked_add(charge).is_some_and(|sum| sum <= self.capacity)
    }

    pub(crate) fn has_idle_lane(&self) -> bool {
        self.busy < self.lanes.len()
    }

    /// The first lane with nothing on it.
    pub(crate) fn idle_lane(&self) -> Option<LaneId> {
        let idle = self.lanes.iter().position(Option::is_none)?;
        u16::try_from(idle).ok().map(LaneId)
    }

    pub(crate) fn copies_from_host(&self) -> bool {
        self.copies.iter().any(|(_, source)| *source == Source::Host)
    }

    fn tick(&mut self, now: At) {
        self.busy_time += (now - self.busy_since) * self.busy as u64;
        self.busy_since = self.busy_since.max(now);
    }

    pub(crate) fn begin(&mut self, now: At, lane: LaneId, mut running: Running) {
        self.tick(now);
        running.busy_before = self.busy_time;
        if let Some(slot @ None) = self.lanes.get_mut(usize::from(lane.0)) {
            *slot = Some(running);
            self.busy += 1;
        }
    }

    /// Frees a lane; gives what ran there and how many others ran beside it on average, in thousandths.
    pub(crate) fn end(&mut self, now: At, lane: LaneId) -> Option<(Running, u64)> {
        self.tick(now);
        let running = self.lanes.get_mut(usize::from(lane.0))?.take()?;
        self.busy -= 1;
        let took = now - running.started;
        self.recent += took;
        let lane_time = self.busy_time - running.busy_before;
        Some((running, scale(lane_time.nanos(), 1000, took.nanos().max(1)).saturating_sub(1000)))
    }
}

impl Running {
    /// All requests that the run answers.
    pub(crate) fn requests(&self) -> impl Iterator<Item = RequestKey> {
        std::iter::once(self.request).chain(self.with.iter().copied())
    }

    pub(crate) fn new(request: RequestKey, with: Vec<RequestKey>, started: At, ends: At, deadline: At) -> Self {
        Self { request, with, started, ends, deadline, busy_before: Span::ZERO }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_beside_each_other_are_averaged_over_time() {
        let mut device = Device::new(DeviceId(0), Bytes::new(10), 2);
        let at = |ms| At::START + Span::millis(ms);
        let run = |key, from| Running::new(RequestKey(key), Vec::new(), at(from), at(from), At::NEVER);
        device.begin(at(0), LaneId(0), run(1, 0));
        device.begin(at(5), LaneId(1), run(2, 5));
        let (first, beside) = device.end(at(10), LaneId(0)).expect("it ran");
        assert_eq!((first.request, beside), (RequestKey(1), 500), "half of its time");
        assert_eq!(device.end(at(15), LaneId(1)).map(|ended| ended.1), Some(500));
        assert_eq!(device.busy, 0);
    }
}
