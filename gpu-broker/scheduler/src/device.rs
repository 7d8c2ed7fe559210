//! What one device holds and does, as far as the scheduler has decided it.
//!
//! Memory is charged from the decision to swap in until the decision to swap out. That is sound because a device does
//! its swaps in the order in which they were decided: the memory is free by the time the next swap-in needs it.

use std::collections::BTreeMap;

use faaswap_protocol::Bytes;

use crate::event::{LaneId, ModelId, Moment, RequestKey};

/// Tells one stay of a model on a device from the next, so that a late report is not booked on the wrong one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StayId(pub(crate) u64);

/// How far a model's weights are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Weights {
    /// A swap-in was asked for and has not been reported done.
    Coming,
    /// All there.
    Resident,
}

/// One stay of a model on a device.
#[derive(Clone, Debug)]
pub(crate) struct Stay {
    pub(crate) id: StayId,
    pub(crate) weights: Weights,
    pub(crate) charge: Bytes,
    /// Runs that were started and have not ended. Weights in flight are never taken away.
    pub(crate) in_flight: u32,
    pub(crate) last_used: Moment,
    /// The model was removed: swapped out as soon as nothing runs on it.
    pub(crate) doomed: bool,
}

impl Stay {
    /// Whether the weights may be taken away now.
    ///
    /// Weights that are still coming stay: every report of a swap-in then finds the stay that it is about.
    pub(crate) fn can_leave(&self) -> bool {
        self.in_flight == 0 && self.weights == Weights::Resident
    }
}

/// One device.
#[derive(Clone, Debug)]
pub(crate) struct Device {
    pub(crate) capacity: Bytes,
    pub(crate) lanes: Vec<Option<RequestKey>>,
    pub(crate) stays: BTreeMap<ModelId, Stay>,
}

impl Device {
    pub(crate) fn new(capacity: Bytes, lanes: u16) -> Self {
        Self { capacity, lanes: vec![None; usize::from(lanes)], stays: BTreeMap::new() }
    }

    /// What the models here take.
    pub(crate) fn charged(&self) -> Bytes {
        self.stays.values().map(|stay| stay.charge).sum()
    }

    /// What is left. Invariant BR-2 makes the difference exist.
    pub(crate) fn free(&self) -> Bytes {
        self.capacity.checked_sub(self.charged()).unwrap_or(Bytes::ZERO)
    }

    /// The first lane with nothing on it.
    pub(crate) fn idle_lane(&self) -> Option<LaneId> {
        let idle = self.lanes.iter().position(Option::is_none)?;
        u16::try_from(idle).ok().map(LaneId)
    }

    /// How many swap-ins have not been reported done.
    pub(crate) fn copies_in_flight(&self) -> usize {
        self.stays.values().filter(|stay| stay.weights == Weights::Coming).count()
    }

    /// The models to swap out so that `charge` fits, least recently used first; `None` when even all would not do.
    pub(crate) fn victims(&self, charge: Bytes) -> Option<Vec<ModelId>> {
        let mut candidates: Vec<_> = self.stays.iter().filter(|(_, stay)| stay.can_leave()).collect();
        candidates.sort_by_key(|(model, stay)| (stay.last_used, **model));
        let mut free = self.free();
        let mut victims = Vec::new();
        for (model, stay) in candidates {
            if free >= charge {
                break;
            }
            free = free.checked_add(stay.charge)?;
            victims.push(*model);
        }
        (free >= charge).then_some(victims)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn stay(last_used_s: u64, charge: u64, in_flight: u32) -> Stay {
        Stay {
            id: StayId(0),
            weights: Weights::Resident,
            charge: Bytes::new(charge),
            in_flight,
            last_used: Moment(Duration::from_secs(last_used_s)),
            doomed: false,
        }
    }

    #[test]
    fn the_least_recently_used_leave_first_and_only_as_many_as_needed() {
        let mut device = Device::new(Bytes::new(10), 1);
        device.stays =
            BTreeMap::from([(ModelId(1), stay(3, 3, 0)), (ModelId(2), stay(1, 3, 0)), (ModelId(3), stay(0, 3, 1))]);
        assert_eq!(device.victims(Bytes::new(1)), Some(vec![]));
        assert_eq!(device.victims(Bytes::new(4)), Some(vec![ModelId(2)]));
        assert_eq!(device.victims(Bytes::new(7)), Some(vec![ModelId(2), ModelId(1)]));
        assert_eq!(device.victims(Bytes::new(8)), None, "model 3 is in flight");
    }
}
