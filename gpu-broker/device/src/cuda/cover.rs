//! Where the link places weights, and what it puts behind their ranges and takes away again.

use std::sync::{Arc, atomic::Ordering};

use faaswap_protocol::Bytes;

use super::{driver::Addresses, link::Link, placement::Placement, shared::Range};
use crate::{DeviceError, RangeId};

impl Link {
    /// Gives a range chunks for its weights.
    pub(super) fn place(&mut self, range: RangeId, weights: Bytes) -> Result<Arc<Placement>, DeviceError> {
        let len = weights.as_len().expect("the weights are mapped");
        let chunks = self.pool.take(len.div_ceil(self.pool.chunk))?;
        self.shared.mapped.fetch_add(Bytes::of_len(chunks.len() * self.pool.chunk).get(), Ordering::SeqCst);
        self.placements += 1;
        let (number, window, chunk) = (self.placements, self.pool.window(), self.pool.chunk);
        Ok(self.shared.change(range, |range: &mut Range| {
            // Its programs are there already where it comes back to the same place.
            let was = range.was.take().map_or(number, |was| if was.chunks() == chunks { was.number } else { number });
            let (base, whole) = (range.addresses.base(), range.whole.as_deref());
            let placed = Arc::new(Placement::new(was, (chunks, chunk), (window, base), whole));
            range.placed = Some(Arc::clone(&placed));
            placed
        }))
    }

    /// Puts memory behind those of a range's addresses that programs use, from one place to another, where what was there before
    /// has gone.
    pub(super) fn map(
        &self,
        range: RangeId,
        placed: &Placement,
        (from, until): (usize, usize),
    ) -> Result<(), DeviceError> {
        let size = self.pool.chunk;
        // A range that comes back before the link was idle has still what was there.
        let addresses = if from == 0 {
            self.uncover(range)?
        } else {
            self.shared.change(range, |range| Arc::clone(&range.addresses))
        };
        let places: Vec<usize> = (from..until).filter(|&place| placed.is_own(place)).collect();
        for run in places.chunk_by(|place, next| place + 1 == *next) {
            for &place in run {
                addresses.map(place * size, self.pool.memory(placed.chunks()[place]), size)?;
                self.shared.change(range, |range| range.behind.push((place * size, size)));
            }
            addresses.open(run[0] * size, run.len() * size)?;
        }
        Ok(())
    }

    /// Gives the chunks of a range back. Its copies have ended, or never began. The memory stays behind the range until
    /// there is nothing else to do, or until it is needed: nobody runs what is swapped out, and the chunks' next owner sees
    /// them elsewhere.
    pub(super) fn empty(&mut self, range: RangeId) -> Result<(), DeviceError> {
        let (placed, newly) = self.shared.change(range, |range| {
            range.recorded = 0;
            let newly = !range.behind.is_empty() && !range.stale;
            range.stale |= newly;
            range.was.clone_from(&range.placed);
            (range.placed.take(), newly)
        });
        if newly {
            self.stale.push_back(range);
        }
        let chunks = placed.as_deref().map_or(&[][..], Placement::chunks);
        self.shared.mapped.fetch_sub(Bytes::of_len(chunks.len() * self.pool.chunk).get(), Ordering::SeqCst);
        self.pool.give(chunks);
        Ok(())
    }

    /// Takes away all that is behind a range.
    pub(super) fn uncover(&self, range: RangeId) -> Result<Arc<Addresses>, DeviceError> {
        let (addresses, behind) =
            self.shared.change(range, |range| (Arc::clone(&range.addresses), std::mem::take(&mut range.behind)));
        addresses.unmap_all(&behind)?;
        Ok(addresses)
    }

    /// Does a little of what can wait, so that a swap which comes meanwhile waits for no more than that: takes away one piece of what is
    /// behind a range that is out. The range may have been released, or swapped in again.
    pub(super) fn tidy(&mut self) -> Result<(), DeviceError> {
        self.shared.context.enter()?;
        let Some(&id) = self.stale.front() else { return Ok(()) };
        let found = self.shared.lock().ranges.get(id).ok().and_then(|range| {
            let is_out = range.placed.is_none() && !range.lent;
            let last = if is_out { range.behind.pop() } else { None };
            range.stale = last.is_some();
            last.map(|piece| (Arc::clone(&range.addresses), piece))
        });
        match found {
            Some((addresses, (from, len))) => addresses.unmap(from, len),
            None => {
                self.stale.pop_front();
                Ok(())
            }
        }
    }
}
