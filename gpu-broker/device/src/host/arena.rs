//! Addresses and the memory that is lent to them.
//!
//! The pool is one memory file, mapped once, at its *home*, where its pages were populated. Lending chunks to a range
//! moves their page-table entries from home to the range (`mremap`), and taking them back moves them home again: no
//! page faults, no zeroing, and with 2 MiB alignment the kernel moves whole tables. Measured for 100 MB of 4 KiB pages:
//! 18 us to lend and 46 us to take back, against 5.5 ms and 2.2 ms for mapping the file anew with `MAP_POPULATE`.
//! Needs Linux 5.14.
//!
//! Which chunks are lent to whom is not decided here.

use std::{
    ffi::c_void,
    os::fd::OwnedFd,
    ptr,
    sync::RwLock,
    time::{Duration, Instant},
};

use faaswap_protocol::Bytes;
use rustix::{
    fs::MemfdFlags,
    io::Errno,
    mm::{Advice, MapFlags, MremapFlags, ProtFlags},
};

use crate::DeviceError;

/// What the kernel maps with one entry of its second-lowest table; ranges start at multiples of it.
pub(super) const ALIGN: usize = 2 << 20;
/// How much is populated between two looks at the clock.
const POPULATE_STEP: usize = 64 << 20;
/// How often a long start reports.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);

/// Addresses that nothing else will be mapped at while this lives. Touching them faults, unless memory is lent to them.
#[derive(Debug)]
pub(super) struct Reservation {
    base: usize,
    len: usize,
    /// Held for reading by whoever reads the range without being one of its programs; memory is not taken away then.
    pub(super) readers: RwLock<()>,
}

impl Reservation {
    /// Reserves `len` bytes, a multiple of the page size and not 0, at a multiple of [`ALIGN`].
    pub(super) fn new(len: usize) -> Result<Self, DeviceError> {
        let wide = len.checked_add(ALIGN).ok_or(DeviceError::Invalid("more addresses than there are"))?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: no address is asked for, so the kernel picks one that replaces no mapping.
        let found = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), wide, ProtFlags::empty(), flags) }
            .map_err(failed("mmap"))?
            .expose_provenance();
        let base = found.next_multiple_of(ALIGN);
        let reservation = Self { base, len, readers: RwLock::new(()) };
        for (start, end) in [(found, base), (base + len, found + wide)] {
            if start < end {
                // SAFETY: the stretch is a part of the mapping just made, outside of what is kept, and unused.
                unsafe { rustix::mm::munmap(at(start), end - start) }.map_err(failed("munmap"))?;
            }
        }
        Ok(reservation)
    }

    pub(super) fn base(&self) -> usize {
        self.base
    }

    fn stretch(&self, offset: usize, len: usize) -> *mut c_void {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "{len} bytes at {offset} of {self:?}");
        at(self.base + offset)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the addresses are ours since `new`, and whoever held some has let go of them: owners of a reservation
        // give it up last.
        let unmapped = unsafe { rustix::mm::munmap(at(self.base), self.len) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}

/// The memory of a device.
#[derive(Debug)]
pub(super) struct Arena {
    file: OwnedFd,
    home: Reservation,
}

impl Arena {
    /// Makes so much memory. `len` is a multiple of the page size and not 0.
    pub(super) fn new(len: usize) -> Result<Self, DeviceError> {
        let file = rustix::fs::memfd_create("faaswap-device", MemfdFlags::CLOEXEC).map_err(failed("memfd_create"))?;
        rustix::fs::ftruncate(&file, Bytes::of_len(len).get()).map_err(failed("ftruncate"))?;
        let arena = Self { file, home: Reservation::new(len)? };
        arena.map_home(0, len, MapFlags::FIXED).map_err(failed("mmap of device memory"))?;
        let home = arena.home.stretch(0, len);
        // SAFETY: the stretch was just mapped, and advice changes no contents. Kernels that give no huge pages to
        // shared memory refuse or ignore it, which is why the result does not matter.
        let _ = unsafe { rustix::mm::madvise(home, len, Advice::LinuxHugepage) };
        Ok(arena)
    }

    /// Takes all pages now, so that no swap-in waits for the kernel to find and zero them.
    pub(super) fn populate(&self, name: &str) -> Result<(), DeviceError> {
        let started = Instant::now();
        let mut reported = Duration::ZERO;
        for offset in (0..self.home.len).step_by(POPULATE_STEP) {
            let len = POPULATE_STEP.min(self.home.len - offset);
            let stretch = self.home.stretch(offset, len);
            // SAFETY: the stretch lies in the home mapping; populating changes no contents.
            unsafe { rustix::mm::madvise(stretch, len, Advice::LinuxPopulateWrite) }
                .map_err(failed("madvise(MADV_POPULATE_WRITE)"))?;
            if started.elapsed() - reported > PROGRESS_EVERY {
                reported = started.elapsed();
                let (done, of) = (Bytes::of_len(offset + len), Bytes::of_len(self.home.len));
                tracing::info!(device = name, %done, %of, "taking device memory");
            }
        }
        Ok(())
    }

    /// Puts `len` bytes of memory, from `offset` on, behind the addresses of `to` from `to_offset` on.
    pub(super) fn lend(
        &self,
        offset: usize,
        len: usize,
        to: &Reservation,
        to_offset: usize,
    ) -> Result<(), DeviceError> {
        let (from, target) = (self.home.stretch(offset, len), to.stretch(to_offset, len));
        // SAFETY: see `remap`; the pages at home are lent to nobody, so nothing uses them there.
        let Err(errno) = (unsafe { remap(from, target, len) }) else { return Ok(()) };
        // Where the call failed half way the target may be a hole now. Where it is not, this changes nothing.
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED_NOREPLACE;
        // SAFETY: with FIXED_NOREPLACE no mapping is replaced, whatever it is.
        let _ = unsafe { rustix::mm::mmap_anonymous(target, len, ProtFlags::empty(), flags) };
        Err(failed("mremap")(errno))
    }

    /// Takes lent memory back; touching the addresses still works until [`Arena::close`].
    pub(super) fn take_back(&self, offset: usize, len: usize, from: &Reservation, from_offset: usize) {
        let (home, lent) = (self.home.stretch(offset, len), from.stretch(from_offset, len));
        // SAFETY: see `remap`; nothing runs on a range that is swapped out, which is the caller's promise.
        if let Err(errno) = unsafe { remap(lent, home, len) } {
            // The page-table entries are lost and will be faulted in again at home; the memory is the file's anyway.
            tracing::warn!(%errno, "moving device memory home failed, the next swap-in of it will be slow");
            let _ = self.map_home(offset, len, MapFlags::FIXED_NOREPLACE);
        }
    }

    /// Makes touching the addresses fault again.
    pub(super) fn close(range: &Reservation, len: usize) -> Result<(), DeviceError> {
        let target = range.stretch(0, len);
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: what is replaced lies in the reservation and nothing runs on it. It is one call, so that at no moment
        // another mapping could land there.
        unsafe { rustix::mm::mmap_anonymous(target, len, ProtFlags::empty(), flags) }
            .map_err(failed("mmap"))
            .map(|_| ())
    }

    fn map_home(&self, offset: usize, len: usize, fixed: MapFlags) -> Result<(), Errno> {
        let target = self.home.stretch(offset, len);
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | fixed;
        // SAFETY: what is replaced, if anything, lies at home, where nothing is read or written.
        unsafe { rustix::mm::mmap(target, len, prot, flags, &self.file, Bytes::of_len(offset).get()) }.map(|_| ())
    }
}

/// Moves pages of the memory file from one of our addresses to another in one step. The mapping at `from` stays, empty
/// of pages, so that nothing else can land there.
///
/// # Safety
/// Both stretches must lie in live reservations, `from` must be mapped to the memory file, they must not overlap, and
/// nobody may be using either.
unsafe fn remap(from: *mut c_void, to: *mut c_void, len: usize) -> Result<(), Errno> {
    let flags = MremapFlags::MAYMOVE | MremapFlags::DONTUNMAP;
    // SAFETY: the caller vouches for both stretches; both are page aligned, as are all parts of reservations.
    unsafe { rustix::mm::mremap_fixed(from, len, len, flags, to) }.map(|_| ())
}

pub(super) fn at(address: usize) -> *mut c_void {
    ptr::with_exposed_provenance_mut(address)
}

pub(super) fn failed(call: &'static str) -> impl FnOnce(Errno) -> DeviceError {
    move |errno| DeviceError::Failed { call, reason: errno.to_string() }
}
