//! The CUDA device as every caller sees one.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use faaswap_protocol::Bytes;

use super::{
    CudaDevice, KindKey,
    driver::Addresses,
    kernels::Work,
    queue,
    shared::{Range, Swap},
    source::Source,
};
use crate::{
    Device, DeviceError, DeviceInfo, DeviceMemory, Group, HostWeights, OnDone, PciAddress, RangeId, Stream, SwapReport,
    range::{State, Step, addresses},
};

impl Device for CudaDevice {
    fn info(&self) -> &DeviceInfo {
        &self.shared.info
    }

    fn is_lost(&self) -> bool {
        self.shared.is_lost()
    }

    fn fail(&self) {
        let queue = &self.memory.lanes[self.own_lane()].queue;
        // SAFETY: this work touches no memory.
        let queued = self.enter().and_then(|()| unsafe { self.memory.kernels.queue(Work::Trap, queue) });
        if let Err(error) = queued.and_then(|()| self.synchronize()) {
            tracing::warn!(%error, name = self.shared.info.name, "a fault was provoked");
        }
    }

    fn memory(&self) -> DeviceMemory {
        let mapped = Bytes::new(self.shared.mapped.load(Ordering::SeqCst));
        DeviceMemory { capacity: self.shared.info.capacity, mapped }
    }

    fn reserve(&self, weights: Bytes) -> Result<RangeId, DeviceError> {
        let DeviceInfo { capacity, chunk, .. } = self.shared.info;
        let len = addresses(weights, chunk).ok_or(DeviceError::Invalid("more weights than can be"))?;
        if len > capacity {
            return Err(DeviceError::OutOfMemory { needed: len, free: capacity });
        }
        let len = len.as_len().ok_or(DeviceError::Invalid("more weights than can be"))?;
        drop(self.shared.books()?);
        let addresses = Arc::new(Addresses::reserve(&self.shared.context, len)?);
        self.shared.books()?.ranges.insert(Range {
            addresses,
            weights,
            state: State::Out,
            groups: 0,
            recorded: 0,
            late_group: None,
            events: Vec::new(),
            failed: None,
            whole: None,
            placed: None,
            was: None,
            behind: Vec::new(),
            stale: false,
            lent: false,
            unfinished: false,
            readers: 0,
        })
    }

    fn release(&self, range: RangeId) -> Result<(), DeviceError> {
        let mut books = self.shared.books()?;
        let found = books.ranges.get(range)?;
        if found.state != State::Out || found.lent {
            return Err(DeviceError::State { range, state: found.state.name(), wanted: State::Out.name() });
        }
        let removed = books.ranges.remove(range);
        drop(books);
        drop(removed);
        Ok(())
    }

    fn address(&self, range: RangeId) -> Result<usize, DeviceError> {
        let base = self.shared.books()?.ranges.get(range)?.addresses.base();
        usize::try_from(base).map_err(|_| DeviceError::Invalid("an address that does not fit"))
    }

    fn swap_in(
        &self,
        range: RangeId,
        weights: Arc<HostWeights>,
        groups: Arc<[Group]>,
        done: OnDone<SwapReport>,
    ) -> Result<(), DeviceError> {
        let size = weights.size();
        self.queue_in(range, size, Source::Host(weights), groups, done)
    }

    fn swap_in_from(
        &self,
        (holder, held): (&dyn Device, RangeId),
        range: RangeId,
        weights: Arc<HostWeights>,
        groups: Arc<[Group]>,
        done: OnDone<SwapReport>,
    ) -> Result<(), DeviceError> {
        let size = weights.size();
        let peer = holder.as_cuda().filter(|peer| peer.shared.info.chunk == self.shared.info.chunk);
        let lent = peer.and_then(|peer| peer.shared.lend(held, self.ordinal));
        let source = lent.map_or(Source::Host(weights), Source::Peer);
        self.queue_in(range, size, source, groups, done)
    }

    fn swap_in_over(
        &self,
        others: &[&dyn Device],
        range: RangeId,
        weights: Arc<HostWeights>,
        groups: Arc<[Group]>,
        done: OnDone<SwapReport>,
    ) -> Result<(), DeviceError> {
        let size = weights.size();
        let others = others.iter().filter_map(|other| other.as_cuda());
        let detours: Vec<_> = others.filter_map(|other| self.shared.detour(other.ordinal)).collect();
        let source = if detours.is_empty() { Source::Host(weights) } else { Source::Links(weights, detours) };
        self.queue_in(range, size, source, groups, done)
    }

    fn swap_out(&self, range: RangeId, done: OnDone<()>) -> Result<(), DeviceError> {
        self.queue(range, Step::AskOut, |_| Ok(()), Swap::Out { done })
    }

    fn await_group(&self, range: RangeId, group: u32, stream: Stream) -> Result<(), DeviceError> {
        if stream == Stream::CALLER {
            self.shared.wait_recorded(range, group, Duration::ZERO)?;
            let event = self.shared.books()?.event(&self.shared.context, range, group)?;
            let waited = event.wait();
            return self.shared.noted(waited);
        }
        // SAFETY: the engine names the stream of a kernel that is being run.
        let captured = unsafe { queue::is_captured(stream.0) }?;
        if !captured {
            self.shared.wait_recorded(range, group, Duration::ZERO)?;
            if self.shared.books()?.ranges.get(range)?.lent {
                return Ok(());
            }
        }
        if captured {
            self.shared.noted(self.cut_before(group))?;
        }
        let event = self.shared.books()?.event(&self.shared.context, range, group)?;
        // SAFETY: as above.
        self.shared.noted(unsafe { queue::wait_on(stream.0, &event, captured) })
    }

    fn read_back(&self, range: RangeId, offset: u64, into: &mut [u8]) -> Result<(), DeviceError> {
        let pieces = {
            let mut books = self.shared.books()?;
            let found = books.ranges.get(range)?;
            let placed = found.resident(range)?;
            let end = offset.checked_add(Bytes::of_len(into.len()).get()).filter(|end| *end <= found.weights.get());
            let end = end.ok_or(DeviceError::Invalid("the weights end before what is to be read"))?;
            found.readers += 1;
            placed.pieces(offset..end)
        };
        let mut rest = into;
        let read = pieces.into_iter().try_for_each(|(address, len)| {
            let (piece, behind) = std::mem::take(&mut rest).split_at_mut(usize::try_from(len).unwrap_or(0));
            rest = behind;
            self.shared.context.read(address, piece)
        });
        self.shared.change(range, |range| range.readers -= 1);
        self.shared.noted(read)
    }

    fn pci_address(&self) -> Option<PciAddress> {
        self.shared.noted(self.shared.context.pci_address()).ok()
    }

    fn as_cuda(&self) -> Option<&CudaDevice> {
        Some(self)
    }

    fn knows_kind(&self, kind: &KindKey) -> Option<bool> {
        self.knows(kind)
    }

    fn prepare_weights(&self, weights: &HostWeights) -> Result<(), DeviceError> {
        self.shared.noted(weights.register(&self.shared.context))
    }
}
