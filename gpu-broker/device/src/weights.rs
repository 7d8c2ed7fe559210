//! The master copy of a model's weights in host memory.
//!
//! A read-only shared mapping: models with the same file share its pages, and a swap-out has nothing to save. Which
//! file it is, that it is whole and stays unchanged, is the model store's business.

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    path::Path,
    ptr, slice,
    sync::{Mutex, PoisonError},
};

use faaswap_protocol::Bytes;
use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, SealFlags};

use crate::{DeviceError, cuda::Registration};

/// A model's weights, mapped. The file must not change as long as this lives: shrinking it would end the process.
#[derive(Debug)]
pub struct HostWeights {
    /// Where devices read it by themselves. Before the mapping, so that it goes first.
    registered: Mutex<Option<Registration>>,
    /// `None` where there are no bytes, which cannot be mapped.
    map: Option<MmapRaw>,
}

impl HostWeights {
    /// Maps a file. Reads all of it, so that the first swap-in does not wait for the disk.
    pub fn open(path: &Path) -> Result<Self, DeviceError> {
        let failed = |reason: io::Error| DeviceError::Failed {
            call: "opening weights",
            reason: format!("{}: {reason}", path.display()),
        };
        let file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(failed(io::Error::other("not a regular file")));
        }
        Self::map(&file.into(), Bytes::new(metadata.len()))
    }

    /// Copies bytes into memory of their own, for weights that come from no file.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DeviceError> {
        let file = rustix::fs::memfd_create("faaswap-weights", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(failed("memfd_create"))?;
        let mut left = bytes;
        while !left.is_empty() {
            let written = rustix::io::retry_on_intr(|| rustix::io::write(&file, left)).map_err(failed("write"))?;
            left = &left[written..];
        }
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals).map_err(failed("fcntl(F_ADD_SEALS)"))?;
        Self::map(&file, Bytes::of_len(bytes.len()))
    }

    fn map(file: &OwnedFd, size: Bytes) -> Result<Self, DeviceError> {
        if size == Bytes::ZERO {
            return Ok(Self { registered: Mutex::default(), map: None });
        }
        let len = size.as_len().ok_or(DeviceError::Invalid("the weights are larger than this machine can address"))?;
        let map = MmapOptions::new()
            .len(len)
            .populate()
            .map_raw_read_only(file)
            .map_err(|e| DeviceError::Failed { call: "mmap of weights", reason: e.to_string() })?;
        Ok(Self { registered: Mutex::default(), map: Some(map) })
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.map.as_ref().map_or(0, MmapRaw::len)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.map.is_none()
    }

    /// Number of bytes, as an amount.
    pub fn size(&self) -> Bytes {
        Bytes::of_len(self.len())
    }

    /// First byte; readable for [`HostWeights::len`] bytes while this lives.
    pub fn as_ptr(&self) -> *const u8 {
        self.map.as_ref().map_or(ptr::dangling(), MmapRaw::as_ptr)
    }

    /// Lets GPUs read the weights by themselves, at the speed of the bus. Takes 25 to 40 ms per GB; done once. The
    /// calling thread has a GPU's context.
    pub(crate) fn register(&self) -> Result<(), DeviceError> {
        let mut registered = self.registered.lock().unwrap_or_else(PoisonError::into_inner);
        if registered.is_none() && !self.is_empty() {
            // SAFETY: the mapping has this length and goes after the registration, which is declared before it.
            *registered = Some(unsafe { Registration::new(self.as_ptr(), self.len()) }?);
        }
        Ok(())
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the pointer is the start of a mapping of exactly this length that is readable and lives as long as
        // `self`, or dangling (not null) with length 0. That the file does not change is this type's contract.
        unsafe { slice::from_raw_parts(self.as_ptr(), self.len()) }
    }
}

fn failed(call: &'static str) -> impl FnOnce(rustix::io::Errno) -> DeviceError {
    move |errno| DeviceError::Failed { call, reason: errno.to_string() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::io::Write;

    use super::*;

    #[test]
    fn weights_are_the_bytes_of_their_file() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        assert!(HostWeights::open(file.path()).unwrap().is_empty());
        let bytes: Vec<u8> = (0..10_000_u32).map(|i| i.to_le_bytes()[1]).collect();
        file.write_all(&bytes).unwrap();
        assert_eq!(HostWeights::open(file.path()).unwrap().as_slice(), bytes);
        assert_eq!(HostWeights::from_bytes(&bytes).unwrap().as_slice(), bytes);
        assert_eq!(HostWeights::from_bytes(&[]).unwrap().as_slice(), []);
    }

    #[test]
    fn weights_that_are_no_file_are_refused_by_name() {
        for path in ["/nowhere/weights.bin", "/dev/zero", "/"] {
            let refused = HostWeights::open(Path::new(path)).unwrap_err();
            assert!(refused.to_string().contains(path), "{refused}");
        }
    }
}
