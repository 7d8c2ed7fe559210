//! What the link puts behind ranges and takes away again: pieces of the pool's memory.

use std::sync::{Arc, atomic::Ordering};

use faaswap_protocol::Bytes;

use super::{blocks::Change, driver::Addresses, link::Link, shared::Range};
use crate::{DeviceError, RangeId};

impl Link {
    pub(super) fn take_chunks(&mut self, range: RangeId, weights: Bytes) -> Result<Vec<usize>, DeviceError> {
        let len = weights.as_len().expect("the weights are mapped");
        let needed = len.div_ceil(self.pool.chunk);
        if let Some(block) = self.pool.must_split(needed) {
            // What is behind ranges that are out keeps memory that is to be given back.
            while !self.stale.is_empty() {
                self.forget_one()?;
            }
            self.pool.apply(Change::Split(block))?;
        }
        let chunks = self.pool.take(needed)?;
        self.shared.mapped.fetch_add(Bytes::of_len(needed * self.pool.chunk).get(), Ordering::SeqCst);
        self.shared.change(range, |range: &mut Range| range.chunks.clone_from(&chunks));
        Ok(chunks)
    }

    /// Puts a range's chunks behind it until so many are, where what was there before has gone. Returns how many are:
    /// more, where the last ones are of a block.
    pub(super) fn map(
        &self,
        range: RangeId,
        chunks: &[usize],
        from: usize,
        until: usize,
    ) -> Result<usize, DeviceError> {
        let size = self.pool.chunk;
        // A range that comes back before the link was idle has still what was there.
        let addresses = if from == 0 {
            self.uncover(range)?
        } else {
            self.shared.change(range, |range| Arc::clone(&range.addresses))
        };
        let mut at = from;
        while at < until {
            let (memory, len) = self.pool.piece(chunks[at]);
            addresses.map(at * size, memory, len * size)?;
            at += len;
            self.shared.change(range, |range| range.behind.push(len * size));
        }
        if at > from {
            addresses.open(from * size, (at - from) * size)?;
        }
        Ok(at)
    }

    /// Gives the chunks of a range back. Its copies have ended, or never began. The memory stays behind the range until
    /// there is nothing else to do, or until it is needed: nobody runs what is swapped out, and the chunks' next owner sees
    /// them behind addresses of its own.
    pub(super) fn empty(&mut self, range: RangeId) -> Result<(), DeviceError> {
        let (chunks, newly) = self.shared.change(range, |range| {
            range.recorded = 0;
            let newly = !range.behind.is_empty() && !range.stale;
            range.stale |= newly;
            (std::mem::take(&mut range.chunks), newly)
        });
        if newly {
            self.stale.push_back(range);
        }
        self.shared.mapped.fetch_sub(Bytes::of_len(chunks.len() * self.pool.chunk).get(), Ordering::SeqCst);
        self.pool.give(&chunks);
        Ok(())
    }

    /// Takes away all that is behind a range.
    pub(super) fn uncover(&self, range: RangeId) -> Result<Arc<Addresses>, DeviceError> {
        let (addresses, behind) =
            self.shared.change(range, |range| (Arc::clone(&range.addresses), std::mem::take(&mut range.behind)));
        addresses.unmap(0, behind.iter().sum())?;
        Ok(addresses)
    }

    /// Does a little of what can wait, so that a swap which comes meanwhile waits for no more than that.
    pub(super) fn tidy(&mut self) -> Result<(), DeviceError> {
        self.shared.context.enter()?;
        if self.stale.is_empty() {
            return self.pool.change().map_or(Ok(()), |change| self.pool.apply(change));
        }
        self.forget_one()
    }

    /// Takes away one piece of what is behind a range that is out. The range may have been released, or swapped in again.
    fn forget_one(&mut self) -> Result<(), DeviceError> {
        let Some(&id) = self.stale.front() else { return Ok(()) };
        let found = self.shared.lock().ranges.get(id).ok().and_then(|range| {
            let is_out = range.chunks.is_empty() && !range.lent;
            let last = if is_out { range.behind.pop() } else { None };
            range.stale = last.is_some();
            last.map(|len| (Arc::clone(&range.addresses), range.behind.iter().sum(), len))
        });
        match found {
            Some((addresses, from, len)) => addresses.unmap(from, len),
            None => {
                self.stale.pop_front();
                Ok(())
            }
        }
    }
}
