//! Host memory of others that GPUs read by themselves: a run's inputs may lie there instead of in its lane's pinned memory.
//!
//! What it is, and who writes there, is the caller's business. Others may write while a device reads: then the run gets some
//! of the old bytes and some of the new. So only values that choose no addresses may be read from it.

use std::{any::Any, fmt, sync::Arc};

use super::{CudaDevice, host_memory::Registration};
use crate::DeviceError;

/// What a kernel copies at a time; it reads whole such units.
pub(super) const UNIT: usize = 16;

/// Addresses in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stretch {
    start: usize,
    len: usize,
}

impl Stretch {
    /// Whether so many bytes from an address lie here, rounded up to whole units, and begin with one.
    fn has(self, address: usize, len: usize) -> bool {
        let end = len.checked_next_multiple_of(UNIT).and_then(|len| address.checked_add(len));
        let inside = address >= self.start && end.is_some_and(|end| end <= self.start.saturating_add(self.len));
        inside && address.is_multiple_of(UNIT)
    }
}

/// Host memory that all GPUs of this process read by themselves, as long as this lives. Its pages stay: nobody can take them
/// away, also not from a file under them.
pub struct Registered {
    // The order matters: it is registered no more before its owner goes, and with it the mapping.
    _registration: Registration,
    stretch: Stretch,
    _owner: Box<dyn Any + Send + Sync>,
}

impl Registered {
    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.stretch.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where a device finds so many bytes at an address of the host's, in whole units; `None` where they do not lie here so.
    pub(super) fn find(&self, address: usize, len: usize) -> Option<u64> {
        // Where a GPU sees such memory elsewhere than the processor does, none is registered or read.
        self.stretch.has(address, len).then_some(address as u64)
    }
}

impl fmt::Debug for Registered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registered").field("stretch", &self.stretch).finish_non_exhaustive()
    }
}

impl CudaDevice {
    /// Registers host memory with the driver, for all GPUs. Takes milliseconds, and all of the memory's pages.
    ///
    /// # Safety
    /// `len` bytes from `address` must stay mapped, for reading and writing, until `owner` is dropped.
    pub unsafe fn register(
        &self,
        address: *const u8,
        len: usize,
        owner: impl Any + Send + Sync,
    ) -> Result<Registered, DeviceError> {
        if len == 0 || !self.memory.reads_registered {
            return Err(DeviceError::Invalid("the GPU cannot read this memory of the host by itself"));
        }
        let context: &Arc<_> = &self.shared.context;
        // SAFETY: the owner is kept until the registration has gone, and the mapping is its.
        let registration = self.shared.noted(unsafe { Registration::for_kernels(context, address, len) })?;
        let stretch = Stretch { start: address.expose_provenance(), len };
        Ok(Registered { _registration: registration, stretch, _owner: Box::new(owner) })
    }
}

/// A stretch of a lane's inputs, and where it is copied from: registered memory, or (`None`) the lane's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) offset: usize,
    pub(super) len: usize,
    pub(super) from: Option<u64>,
}

/// The copies that bring all inputs, which are a stretch of the lane's memory: as few as there can be. Inputs that are read in
/// place come in order; behind each is room up to a multiple of `align`, which needs no copy.
pub(super) fn pieces((start, len): (usize, usize), in_place: &[Piece], align: usize) -> Vec<Piece> {
    let mut pieces = Vec::with_capacity(2 * in_place.len() + 1);
    let mut at = start;
    let own = |at: usize, until: usize| (at < until).then(|| Piece { offset: at, len: until - at, from: None });
    for input in in_place {
        pieces.extend(own(at, input.offset));
        pieces.push(*input);
        at = (input.offset + input.len).next_multiple_of(align);
    }
    pieces.extend(own(at, start + len));
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_units_that_lie_in_the_memory_are_found() {
        let memory = Stretch { start: 4096, len: 8192 };
        let last = 4096 + 8192;
        for (address, len, found) in [
            (4096, 8192, true),
            (4096, 8193, false),
            (4096 + 64, 1000, true),
            (4096 + 8, 1000, false),
            (4096 - 16, 64, false),
            (last - 16, 16, true),
            (last - 16, 3, true),
            (last - 16, 17, false),
            (last, 1, false),
            (0, 0, false),
            (usize::MAX - 15, 16, false),
            (4096, usize::MAX, false),
        ] {
            assert_eq!(memory.has(address, len), found, "{len} bytes at {address}");
        }
        let cut = Stretch { start: 4096, len: 100 };
        assert!(cut.has(4096, 96));
        assert!(!cut.has(4096, 97), "its last unit ends outside");
    }
    #[test]
    fn inputs_take_one_copy_for_each_that_is_in_place_and_one_for_what_lies_between() {
        let own = |offset, len| Piece { offset, len, from: None };
        let placed = |offset, len| Piece { offset, len, from: Some(1 << 20) };
        for (inputs, in_place, expected) in [
            ((0, 1024), vec![], vec![own(0, 1024)]),
            ((0, 0), vec![], vec![]),
            ((0, 1024), vec![placed(0, 1008)], vec![placed(0, 1008)]),
            ((0, 1024), vec![placed(256, 512)], vec![own(0, 256), placed(256, 512), own(768, 256)]),
            ((0, 1024), vec![placed(0, 256), placed(256, 16)], vec![placed(0, 256), placed(256, 16), own(512, 512)]),
            ((0, 768), vec![placed(0, 16), placed(512, 256)], vec![placed(0, 16), own(256, 256), placed(512, 256)]),
        ] {
            assert_eq!(pieces(inputs, &in_place, 256), expected, "{inputs:?} {in_place:?}");
        }
    }
}
