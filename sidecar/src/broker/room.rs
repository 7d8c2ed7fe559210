//! What one broker connection can hold: requests in flight, and slots in the request half of its slab.
//!
//! Who finds no room waits in line, first come first served, until somebody gives room back or the connection ends.
//! How long anybody waits is the caller's matter; how many may wait is counted in `Waiting`.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use faaswap_protocol::Span;
use faaswap_slab::SlotAllocator;
use tokio::sync::Notify;

use crate::limits::{IN_FLIGHT_MAX, WAITING_MAX};

/// Counts those who wait, for the broker or for room.
#[derive(Debug, Default)]
pub(super) struct Waiting(AtomicUsize);

/// One who waits.
#[derive(Debug)]
pub(super) struct WaitingGuard<'a>(&'a Waiting);

impl Waiting {
    /// Joins those who wait, unless they are too many.
    pub(super) fn enter(&self) -> Option<WaitingGuard<'_>> {
        let guard = WaitingGuard(self);
        (self.0.fetch_add(1, Ordering::Relaxed) < WAITING_MAX).then_some(guard)
    }

    pub(super) fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl Drop for WaitingGuard<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The place of one request: it counts as in flight and may have a slot in the slab.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) slot: Option<Span>,
    /// Bytes that count as drafted.
    drafted: u64,
}

/// Why there is no place.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NoPlace {
    /// The connection is over.
    Closed,
    /// Too many wait already.
    WaitingFull,
    /// None became free in time.
    TimedOut,
}

#[derive(Debug)]
struct Inner {
    slots: Option<SlotAllocator>,
    in_flight: usize,
    drafted: u64,
    /// The most that drafts may take together: clients that send slowly must not keep out those that are done.
    drafted_max: u64,
    closed: bool,
}

#[derive(Debug)]
pub(super) struct Room {
    inner: Mutex<Inner>,
    /// As in `inner`; to look at without a lock.
    closed: AtomicBool,
    freed: Notify,
    line: tokio::sync::Mutex<()>,
    in_line: AtomicUsize,
}

impl Room {
    /// Room for tensors in a slab half of this size, or on a connection without one.
    pub(super) fn new(half: Option<u64>) -> Self {
        Self {
            inner: Mutex::new(Inner {
                slots: half.map(|len| SlotAllocator::new(0, len)),
                in_flight: 0,
                drafted: 0,
                drafted_max: half.unwrap_or(0) / 2,
                closed: false,
            }),
            closed: AtomicBool::new(false),
            freed: Notify::new(),
            line: tokio::sync::Mutex::new(()),
            in_line: AtomicUsize::new(0),
        }
    }

    /// Takes a place for tensors of `len` bytes in all, if there is one and nobody waits for it.
    pub(super) fn take_at_once(&self, len: u64) -> Option<Place> {
        if self.in_line.load(Ordering::Relaxed) == 0 { self.try_take(len, false).ok().flatten() } else { None }
    }

    /// Takes a place for tensors that are still to come, if there is one, nobody waits for it, and drafts may have more.
    pub(super) fn take_for_draft(&self, len: u64) -> Option<Place> {
        if self.in_line.load(Ordering::Relaxed) == 0 { self.try_take(len, true).ok().flatten() } else { None }
    }

    /// Notes that a draft is complete.
    pub(super) fn settle(&self, place: &mut Place) {
        if place.drafted > 0 {
            let drafted = std::mem::take(&mut place.drafted);
            let mut inner = self.lock();
            inner.drafted = inner.drafted.saturating_sub(drafted);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place, waiting in line for it.
    pub(super) async fn take(&self, len: u64, waiting: &Waiting) -> Result<Place, NoPlace> {
        let _waits = waiting.enter().ok_or(NoPlace::WaitingFull)?;
        let _in_line = InLine::join(&self.in_line);
        let _first = self.line.lock().await;
        loop {
            if let Some(place) = self.try_take(len, false)? {
                return Ok(place);
            }
            self.freed.notified().await;
        }
    }

    fn try_take(&self, len: u64, is_draft: bool) -> Result<Option<Place>, NoPlace> {
        let mut inner = self.lock();
        if inner.closed {
            return Err(NoPlace::Closed);
        }
        let drafted = if is_draft { len } else { 0 };
        if inner.in_flight >= IN_FLIGHT_MAX || inner.drafted_max.saturating_sub(inner.drafted) < drafted {
            return Ok(None);
        }
        let slot = match &mut inner.slots {
            Some(slots) => match slots.allocate(len) {
                Some(slot) => Some(slot),
                None => return Ok(None),
            },
            None => None,
        };
        inner.in_flight += 1;
        inner.drafted += drafted;
        Ok(Some(Place { slot, drafted }))
    }

    /// Gives a place back: the broker no longer reads it.
    #[expect(clippy::needless_pass_by_value, reason = "a place is given back once")]
    pub(super) fn free(&self, place: Place) {
        let mut inner = self.lock();
        inner.in_flight = inner.in_flight.saturating_sub(1);
        inner.drafted = inner.drafted.saturating_sub(place.drafted);
        if let (Some(slots), Some(slot)) = (&mut inner.slots, place.slot)
            && let Err(error) = slots.free(slot)
        {
            tracing::error!(%error, "slot given back twice");
        }
        drop(inner);
        self.freed.notify_one();
    }

    /// Sends all who wait away: the connection is over.
    pub(super) fn close(&self) {
        // Under the lock: from here on no slot that is freed is given out again.
        self.lock().closed = true;
        self.closed.store(true, Ordering::Release);
        self.freed.notify_one();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }
}

struct InLine<'a>(&'a AtomicUsize);

impl<'a> InLine<'a> {
    fn join(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for InLine<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio_test::{assert_pending, assert_ready, task};

    use super::*;

    #[test]
    fn drafts_take_half_of_the_slab_at_most() {
        let room = Room::new(Some(1024));
        let mut first = room.take_for_draft(512).unwrap();
        assert!(room.take_for_draft(64).is_none());
        assert!(room.take_at_once(64).is_some(), "a request that is complete finds room");
        room.settle(&mut first);
        assert!(room.take_for_draft(64).is_some());
        room.free(first);
    }

    #[test]
    fn a_place_that_is_freed_goes_to_the_first_in_line() {
        let (room, waiting) = (Room::new(Some(128)), Waiting::default());
        let whole = room.take_at_once(128).unwrap();
        let mut first = task::spawn(room.take(128, &waiting));
        let mut second = task::spawn(room.take(64, &waiting));
        assert_pending!(first.poll());
        assert_pending!(second.poll());
        assert_eq!(waiting.count(), 2);
        room.free(whole);
        assert!(room.take_at_once(64).is_none(), "nobody overtakes those in line");
        assert!(first.is_woken());
        let whole = assert_ready!(first.poll()).unwrap();
        drop(first);
        assert_pending!(second.poll());
        room.free(whole);
        assert!(assert_ready!(second.poll()).is_ok());
    }

    #[test]
    fn a_closed_connection_sends_everyone_in_line_away() {
        let (room, waiting) = (Room::new(Some(64)), Waiting::default());
        let _held = room.take_at_once(64).unwrap();
        let mut first = task::spawn(room.take(64, &waiting));
        let mut second = task::spawn(room.take(64, &waiting));
        assert_pending!(first.poll());
        assert_pending!(second.poll());
        room.close();
        assert!(first.is_woken());
        assert_eq!(assert_ready!(first.poll()).unwrap_err(), NoPlace::Closed);
        drop(first);
        assert!(second.is_woken());
        assert_eq!(assert_ready!(second.poll()).unwrap_err(), NoPlace::Closed);
    }

    #[test]
    fn only_so_many_wait() {
        let waiting = Waiting::default();
        let all: Vec<_> = (0..WAITING_MAX).map(|_| waiting.enter().unwrap()).collect();
        assert!(waiting.enter().is_none());
        drop(all);
        assert!(waiting.enter().is_some());
        assert_eq!(waiting.count(), 0);
    }
}
