//! A slab and the stretches of it that tensors lie in.
//!
//! The other end writes this memory whenever it likes, so no reference to it is formed here: bytes go in and out by
//! copying through raw pointers. The one exception is [`BytesOwner`], whose contract says why.

use std::{fmt, os::fd::OwnedFd, ptr, slice, sync::Arc};

use faaswap_protocol::{
    Bytes, SlabLayout, Span,
    limits::{SLAB_BYTES_MAX, TENSOR_ALIGN},
};
use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, SealFlags};

use crate::SlabError;

/// Without these a peer could shrink the file and have us killed by SIGBUS.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// Shared memory of one connection: a half for requests and a half for responses. Clones are the same memory.
#[derive(Clone)]
pub struct Slab {
    map: Arc<MmapRaw>,
    layout: SlabLayout,
}

impl Slab {
    /// Makes a slab, zeroed, and the sealed file to pass to the other end. Pages are taken when they are first written.
    pub fn create(layout: SlabLayout) -> Result<(Self, OwnedFd), SlabError> {
        let size = checked_size(layout)?;
        let file = rustix::fs::memfd_create("faaswap-slab", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(os("memfd_create"))?;
        rustix::fs::ftruncate(&file, size.get()).map_err(os("ftruncate"))?;
        rustix::fs::fcntl_add_seals(&file, SEALS).map_err(os("fcntl(F_ADD_SEALS)"))?;
        Ok((Self::map(&file, size, layout)?, file))
    }

    /// Maps a slab that the other end made, once it is certain that its size is right and can never change.
    pub fn open(file: OwnedFd, layout: SlabLayout) -> Result<Self, SlabError> {
        let size = checked_size(layout)?;
        // A file that cannot be sealed at all makes this call fail with EINVAL.
        let seals = rustix::fs::fcntl_get_seals(&file).map_err(|_| SlabError::NotSealed)?;
        if !seals.contains(SEALS) {
            return Err(SlabError::NotSealed);
        }
        let found = rustix::fs::fstat(&file).map_err(os("fstat"))?.st_size;
        let found = Bytes::new(found.try_into().unwrap_or(0));
        if found != size {
            return Err(SlabError::Size { expected: size, found });
        }
        let slab = Self::map(&file, size, layout);
        drop(file);
        slab
    }

    fn map(file: &OwnedFd, size: Bytes, layout: SlabLayout) -> Result<Self, SlabError> {
        let len = size.as_len().ok_or(SlabError::Layout { request: layout.request, response: layout.response })?;
        let map = MmapOptions::new()
            .len(len)
            .map_raw(file)
            .map_err(|source| SlabError::Os { call: "mmap of a slab", source })?;
        Ok(Self { map: Arc::new(map), layout })
    }

    /// The two halves.
    pub fn layout(&self) -> SlabLayout {
        self.layout
    }

    /// A stretch of the request half.
    pub fn request_region(&self, span: Span) -> Result<Region, SlabError> {
        self.region(span, 0, self.layout.request)
    }

    /// A stretch of the response half.
    pub fn response_region(&self, span: Span) -> Result<Region, SlabError> {
        self.region(span, self.layout.request.get(), self.layout.response)
    }

    fn region(&self, span: Span, start: u64, half: Bytes) -> Result<Region, SlabError> {
        // The layout was checked when the slab was made, so this sum cannot saturate.
        let end = start.saturating_add(half.get());
        let refused = SlabError::Span { span, start, end };
        if span.offset < start || !span.fits(Bytes::new(end)) {
            return Err(refused);
        }
        match (usize::try_from(span.offset), usize::try_from(span.len)) {
            (Ok(offset), Ok(len)) => Ok(Region { map: Arc::clone(&self.map), offset, len }),
            _ => Err(refused),
        }
    }
}

impl fmt::Debug for Slab {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slab").field("layout", &self.layout).finish_non_exhaustive()
    }
}

/// A stretch of a slab, wholly inside its half; keeps the memory mapped. Clones are the same memory.
///
/// Both processes can write it at any time. What is read may be torn if they do, so whoever reads must either be able
/// to live with any bytes or copy them out first and judge the copy.
#[derive(Clone)]
pub struct Region {
    map: Arc<MmapRaw>,
    offset: usize,
    len: usize,
}

impl Region {
    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// First byte. Valid for [`Region::len`] bytes while the region, or a clone, lives.
    pub fn as_ptr(&self) -> *const u8 {
        self.map.as_ptr().wrapping_add(self.offset)
    }

    /// First byte. Valid for [`Region::len`] bytes while the region, or a clone, lives.
    pub fn as_mut_ptr(&self) -> *mut u8 {
        self.map.as_mut_ptr().wrapping_add(self.offset)
    }

    /// Puts pages behind all of the region, which whoever pins them would do one by one.
    pub fn fault_in(&self) -> Result<(), SlabError> {
        let all = self.map.advise_range(Advice::PopulateWrite, self.offset, self.len);
        all.map_err(|source| SlabError::Os { call: "madvise(MADV_POPULATE_WRITE)", source })
    }

    /// Copies bytes into the region.
    pub fn write(&self, at: usize, from: &[u8]) -> Result<(), SlabError> {
        self.check(at, from.len())?;
        // SAFETY: `at..at + len` lies in the region, and the region in a live mapping that is writable; `from` is
        // readable by being a slice and is no part of the mapping, of which nobody holds a slice while writing to it
        // (see `BytesOwner`). Bytes need no alignment.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), self.as_mut_ptr().wrapping_add(at), from.len()) };
        Ok(())
    }

    /// Copies bytes out of the region.
    pub fn read(&self, at: usize, into: &mut [u8]) -> Result<(), SlabError> {
        self.check(at, into.len())?;
        // SAFETY: `at..at + len` lies in the region, and the region in a live mapping that is readable; `into` is ours
        // alone by being a unique slice, so it cannot overlap the mapping. Any bytes are valid bytes.
        unsafe { ptr::copy_nonoverlapping(self.as_ptr().wrapping_add(at), into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Copies all bytes of another region of this length, of whatever slab.
    pub fn copy_from(&self, from: &Self) -> Result<(), SlabError> {
        self.check(0, from.len)?;
        // SAFETY: both regions lie in live mappings, this one in one that is writable, and have this length; they may overlap.
        // Any bytes are valid bytes, and bytes need no alignment.
        unsafe { ptr::copy(from.as_ptr(), self.as_mut_ptr(), from.len) };
        Ok(())
    }

    /// A view of the region as a slice, for [`bytes::Bytes::from_owner`](https://docs.rs/bytes) and its like.
    ///
    /// Only for the end that was *given* these bytes, by a broker that it trusts, and that has not released them yet:
    /// until then nobody writes them any more. The broker must never use it on what a sidecar writes.
    pub fn into_bytes_owner(self) -> BytesOwner {
        BytesOwner { region: self }
    }

    fn check(&self, at: usize, len: usize) -> Result<(), SlabError> {
        match at.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            Some(_) | None => Err(SlabError::Access { at, len, region: self.len }),
        }
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region").field("offset", &self.offset).field("len", &self.len).finish_non_exhaustive()
    }
}

/// Bytes of an answer, read in place. See [`Region::into_bytes_owner`] for when it may be used.
#[derive(Clone, Debug)]
pub struct BytesOwner {
    region: Region,
}

impl AsRef<[u8]> for BytesOwner {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the region lies in a mapping that lives as long as `self`; its start is not null, bytes need no
        // alignment, and a slab is far smaller than `isize::MAX`. That the bytes do not change is the contract of
        // `into_bytes_owner`: they were handed over, and their writer does not touch them before they are released.
        unsafe { slice::from_raw_parts(self.region.as_ptr(), self.region.len) }
    }
}

/// Size of the file: both halves, each of whole tensor slots.
fn checked_size(layout: SlabLayout) -> Result<Bytes, SlabError> {
    let SlabLayout { request, response } = layout;
    let aligned = |half: Bytes| half.get().is_multiple_of(TENSOR_ALIGN);
    match request.checked_add(response) {
        Some(size) if size > Bytes::ZERO && size <= SLAB_BYTES_MAX && aligned(request) && aligned(response) => Ok(size),
        Some(_) | None => Err(SlabError::Layout { request, response }),
    }
}

fn os(call: &'static str) -> impl FnOnce(rustix::io::Errno) -> SlabError {
    move |errno| SlabError::Os { call, source: errno.into() }
}
