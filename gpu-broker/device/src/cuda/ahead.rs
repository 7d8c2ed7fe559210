//! What a link has queued ahead of time: groups that may still be on their way, so that no more copies are queued than the
//! driver takes without keeping its callers waiting; and the events that time a swap-in, to be used again.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{driver::Context, queue::Event};
use crate::{DeviceError, RangeId};

/// Most copies that are queued at a time. Beyond some 50 the driver keeps the caller waiting, and others who call it.
const COPIES_QUEUED_MAX: usize = 40;

/// Groups that may still be on their way, in order. `E` is what comes behind a group's copies: an event that the next
/// swap-in of the same range records anew.
pub(super) struct Ahead<E>(VecDeque<Group<E>>);

struct Group<E> {
    range: RangeId,
    behind: E,
    copies: usize,
}

impl<E> Ahead<E> {
    pub(super) fn new() -> Self {
        Self(VecDeque::new())
    }

    /// A range's swap-in begins: nothing of its last one can be on its way, and what was recorded behind that will be
    /// recorded anew, so waiting for it would be waiting for what is queued now.
    pub(super) fn begin(&mut self, range: RangeId) {
        self.0.retain(|group| group.range != range);
    }

    /// A group's copies are queued.
    pub(super) fn push(&mut self, range: RangeId, behind: E, copies: usize) {
        self.0.push_back(Group { range, behind, copies });
    }

    /// What to wait for before so many more copies are queued; `None` once there is room, or nothing left to wait for.
    pub(super) fn first_beyond(&mut self, more: usize) -> Option<E> {
        let queued: usize = self.0.iter().map(|group| group.copies).sum();
        if queued + more <= COPIES_QUEUED_MAX {
            return None;
        }
        self.0.pop_front().map(|group| group.behind)
    }
}

/// Where a swap-in's copies begin and end in their queue.
pub(super) struct Timed {
    pub(super) start: Event,
    pub(super) end: Event,
}

/// Timed events that nothing uses: to make them takes longer than to queue a copy. There are no more than swap-ins were
/// ever under way at a time.
#[derive(Clone, Default)]
pub(super) struct Spare(Arc<Mutex<Vec<Timed>>>);

impl Spare {
    fn list(&self) -> MutexGuard<'_, Vec<Timed>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn take(&self, context: &Arc<Context>) -> Result<Timed, DeviceError> {
        let ready = self.list().pop();
        match ready {
            Some(timed) => Ok(timed),
            None => Ok(Timed { start: Event::timed(context)?, end: Event::timed(context)? }),
        }
    }

    pub(super) fn give(&self, timed: Timed) {
        self.list().push(timed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Table;

    #[test]
    fn the_oldest_are_waited_for_until_there_is_room() {
        let mut ranges = Table::default();
        let (a, b) = (ranges.insert(()).expect("room"), ranges.insert(()).expect("room"));
        let mut ahead = Ahead::new();
        ahead.push(a, "a0", COPIES_QUEUED_MAX - 2);
        assert_eq!(ahead.first_beyond(2), None);
        ahead.push(b, "b0", 2);
        assert_eq!(ahead.first_beyond(1), Some("a0"));
        assert_eq!(ahead.first_beyond(1), None);
        // A group of more copies than may be queued waits for all others, and is queued.
        assert_eq!(ahead.first_beyond(COPIES_QUEUED_MAX + 1), Some("b0"));
        assert_eq!(ahead.first_beyond(COPIES_QUEUED_MAX + 1), None);
    }

    #[test]
    fn what_a_range_queued_for_its_last_stay_is_not_waited_for() {
        let mut ranges = Table::default();
        let (a, b) = (ranges.insert(()).expect("room"), ranges.insert(()).expect("room"));
        let mut ahead = Ahead::new();
        for (range, behind) in [(a, "a0"), (b, "b0"), (a, "a1")] {
            ahead.push(range, behind, COPIES_QUEUED_MAX / 4);
        }
        ahead.begin(a);
        ahead.push(a, "a0 again", COPIES_QUEUED_MAX / 2);
        assert_eq!(ahead.first_beyond(COPIES_QUEUED_MAX / 2), Some("b0"));
        assert_eq!(ahead.first_beyond(COPIES_QUEUED_MAX / 2), None);
    }
}
