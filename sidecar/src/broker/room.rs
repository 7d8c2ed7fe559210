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
}

#[derive(Debug)]
pub(super) struct Room {
    inner: Mutex<Inner>,
    closed: AtomicBool,
    freed: Notify,
    line: tokio::sync::Mutex<()>,
    in_line: AtomicUsize,
}

impl Room {
    /// Room for tensors in a slab half of this size, or on a connection without one.
    pub(super) fn new(slots: Option<SlotAllocator>) -> Self {
        Self {
            inner: Mutex::new(Inner { slots, in_flight: 0 }),
            closed: AtomicBool::new(false),
            freed: Notify::new(),
            line: tokio::sync::Mutex::new(()),
            in_line: AtomicUsize::new(0),
        }
    }

    /// Takes a place for tensors of `len` bytes in all, if there is one and nobody waits for it.
    pub(super) fn take_at_once(&self, len: u64) -> Option<Place> {
        if self.in_line.load(Ordering::Relaxed) == 0 { self.try_take(len).ok().flatten() } else { None }
    }

    /// Takes a place, waiting in line for it.
    pub(super) async fn take(&self, len: u64, waiting: &Waiting) -> Result<Place, NoPlace> {
        let _waits = waiting.enter().ok_or(NoPlace::WaitingFull)?;
        let _in_line = InLine::join(&self.in_line);
        let _first = self.line.lock().await;
        loop {
            if let Some(place) = self.try_take(len)? {
                return Ok(place);
            }
            self.freed.notified().await;
        }
    }

    fn try_take(&self, len: u64) -> Result<Option<Place>, NoPlace> {
        if self.closed.load(Ordering::Acquire) {
            return Err(NoPlace::Closed);
        }
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.in_flight >= IN_FLIGHT_MAX {
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
        Ok(Some(Place { slot }))
    }

    /// Gives a place back: the broker no longer reads it.
    #[expect(clippy::needless_pass_by_value, reason = "a place is given back once")]
    pub(super) fn free(&self, place: Place) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.in_flight = inner.in_flight.saturating_sub(1);
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
