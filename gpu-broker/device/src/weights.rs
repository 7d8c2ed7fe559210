//! The master copy of a model's weights in host memory.
//!
//! A read-only shared mapping: models with the same file share its pages, and a swap-out has nothing to save. Which
//! file it is, that it is whole and stays unchanged, is the model store's business. They may be given to a device before
//! all of them are there: then they are filled from the start, up to a mark that rises, and swap-ins follow it.

mod fill;
mod follow;
mod level;

use std::{
    any::Any,
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    ptr, slice,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use faaswap_protocol::Bytes;
use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, SealFlags};

use self::level::Level;
pub use self::{
    fill::{FillReport, Filler, Near, READS_IN_FLIGHT_MAX},
    follow::Follower,
};
use crate::{
    DeviceError,
    cuda::{Context, Registration},
};

/// A model's weights, mapped. The file must not change as long as this lives: shrinking it would end the process.
#[derive(Debug)]
pub struct HostWeights {
    /// Where devices read it by themselves. Before the mapping, so that it goes first.
    registered: Mutex<Option<Registration>>,
    /// `None` where there are no bytes, which cannot be mapped.
    map: Option<MmapRaw>,
    /// What is mapped, for other processes.
    file: Option<OwnedFd>,
    level: Level,
    notes: Mutex<Notes>,
}

/// What others know of weights, by who they are. It is dropped with the weights.
pub type Notes = BTreeMap<u64, Box<dyn Any + Send>>;

/// How often a file is tried to be sealed. Linux refuses with `EBUSY` while anyone holds a page of it, itself included, as it
/// may for a moment on a busy machine (`memfd_wait_for_pins`).
const SEAL_TRIES: usize = 10;
const SEAL_PAUSE: Duration = Duration::from_millis(10);

/// Seals a file for good: nobody can change its bytes or its size from now on.
fn seal(file: &OwnedFd) -> rustix::io::Result<()> {
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL;
    for _ in 1..SEAL_TRIES {
        match rustix::fs::fcntl_add_seals(file, seals) {
            Err(rustix::io::Errno::BUSY) => std::thread::sleep(SEAL_PAUSE),
            done => return done,
        }
    }
    rustix::fs::fcntl_add_seals(file, seals)
}

/// When pages are put behind a mapping.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pages {
    /// At once; all bytes are there.
    Now,
    /// Once somebody touches them.
    Later,
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
        Self::map(file.into(), Bytes::new(metadata.len()), Pages::Now)
    }

    /// Maps a file that another process has given, with all of its bytes there.
    pub fn of_file(file: OwnedFd, size: Bytes) -> Result<Self, DeviceError> {
        Ok(Self { level: Level::full(size.as_len().unwrap_or(0)), ..Self::map(file, size, Pages::Later)? })
    }

    /// Weights of this size in memory of their own, to be filled.
    pub fn to_come(size: Bytes) -> Result<(Arc<Self>, Filler), DeviceError> {
        let file = rustix::fs::memfd_create("faaswap-weights", MemfdFlags::CLOEXEC).map_err(failed("memfd_create"))?;
        rustix::fs::ftruncate(&file, size.get()).map_err(failed("ftruncate"))?;
        Self::promise(file, size)
    }

    /// Weights of this size in a new file, to be filled. Takes no memory yet, and little time.
    pub fn to_come_in(path: &Path, size: Bytes) -> Result<(Arc<Self>, Filler), DeviceError> {
        let failed = |reason: io::Error| DeviceError::Failed {
            call: "making a file for weights",
            reason: format!("{}: {reason}", path.display()),
        };
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path).map_err(failed)?;
        file.set_len(size.get()).map_err(failed)?;
        Self::promise(file.into(), size)
    }

    fn promise(file: OwnedFd, size: Bytes) -> Result<(Arc<Self>, Filler), DeviceError> {
        let written = file.try_clone().map_err(|e| DeviceError::Failed { call: "dup", reason: e.to_string() })?;
        let weights = Arc::new(Self::map(file, size, Pages::Later)?);
        Ok((Arc::clone(&weights), Filler::new(weights, written)?))
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
        seal(&file).map_err(failed("fcntl(F_ADD_SEALS)"))?;
        Self::map(file, Bytes::of_len(bytes.len()), Pages::Now)
    }

    fn map(file: OwnedFd, size: Bytes, pages: Pages) -> Result<Self, DeviceError> {
        let (registered, notes) = (Mutex::default(), Mutex::default());
        if size == Bytes::ZERO {
            return Ok(Self { registered, map: None, file: None, level: Level::default(), notes });
        }
        let len = size.as_len().ok_or(DeviceError::Invalid("the weights are larger than this machine can address"))?;
        let mut options = MmapOptions::new();
        options.len(len);
        if pages == Pages::Now {
            options.populate();
        }
        let map = options
            .map_raw_read_only(&file)
            .map_err(|e| DeviceError::Failed { call: "mmap of weights", reason: e.to_string() })?;
        let level = if pages == Pages::Now { Level::full(len) } else { Level::default() };
        Ok(Self { registered, map: Some(map), file: Some(file), level, notes })
    }

    /// The file, for another process; `None` where there are no bytes.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }

    /// Reads and changes what others know of the weights. Nobody else does meanwhile.
    pub fn with_notes<R>(&self, f: impl FnOnce(&mut Notes) -> R) -> R {
        f(&mut self.notes.lock().unwrap_or_else(PoisonError::into_inner))
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

    /// How many bytes from the start are there.
    pub fn filled(&self) -> usize {
        self.level.until()
    }

    /// Why the rest will not come, where it will not.
    pub fn failed(&self) -> Option<DeviceError> {
        self.level.failed()
    }

    /// Waits until the bytes `0..end` are there; false where they are not yet after this time.
    pub fn wait_filled(&self, end: usize, most: Duration) -> Result<bool, DeviceError> {
        self.level.wait(end, most)
    }

    /// Waits until the bytes `0..end` are there, or there is no more reason to.
    pub(crate) fn wait_unless_lost(&self, end: usize, is_lost: impl Fn() -> bool) -> Result<(), DeviceError> {
        while !self.wait_filled(end, level::LOOK_EVERY)? {
            if is_lost() {
                return Err(DeviceError::Lost);
            }
        }
        Ok(())
    }

    /// Puts pages behind a stretch that was filled, all at once.
    fn fault_in(&self, offset: usize, len: usize) {
        if let Some(map) = &self.map
            && let Err(error) = map.advise_range(Advice::PopulateRead, offset, len)
        {
            tracing::debug!(%error, "pages were not faulted in");
        }
    }

    /// First byte; readable for [`HostWeights::filled`] bytes while this lives.
    pub fn as_ptr(&self) -> *const u8 {
        self.map.as_ref().map_or(ptr::dangling(), MmapRaw::as_ptr)
    }

    /// Lets GPUs read the weights by themselves, at the speed of the bus. Takes 25 to 40 ms per GB; done once, with any
    /// GPU's context.
    pub(crate) fn register(&self, context: &Arc<Context>) -> Result<(), DeviceError> {
        let mut registered = self.registered.lock().unwrap_or_else(PoisonError::into_inner);
        if registered.is_none() && !self.is_empty() {
            // SAFETY: the mapping has this length and goes after the registration, which is declared before it.
            *registered = Some(unsafe { Registration::new(context, self.as_ptr(), self.len()) }?);
        }
        Ok(())
    }

    /// The bytes. They must all be there.
    pub fn as_slice(&self) -> &[u8] {
        assert_eq!(self.filled(), self.len(), "the weights are not filled");
        // SAFETY: the pointer is the start of a mapping of exactly this length that is readable and lives as long as
        // `self`, or dangling (not null) with length 0. Nobody writes below the mark, and that the file does not change
        // otherwise is this type's contract.
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
    fn a_file_that_somebody_may_write_is_sealed_once_nobody_does() {
        let file = rustix::fs::memfd_create("weights", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&file, 4096).unwrap();
        let writable = MmapOptions::new().len(4096).map_raw(&file).unwrap();
        assert_eq!(seal(&file), Err(rustix::io::Errno::BUSY), "after the last try");
        drop(writable);
        assert_eq!(seal(&file), Ok(()));
        assert_eq!(rustix::io::write(&file, &[1]), Err(rustix::io::Errno::PERM));
    }

    #[test]
    fn another_process_maps_the_same_bytes_and_notes_go_with_the_weights() {
        let weights = HostWeights::from_bytes(&[7; 5000]).unwrap();
        let file = weights.file().unwrap().try_clone_to_owned().unwrap();
        assert_eq!(HostWeights::of_file(file, weights.size()).unwrap().as_slice(), [7; 5000]);
        let note = Arc::new(());
        let theirs = Arc::clone(&note);
        weights.with_notes(move |notes| notes.insert(1, Box::new(theirs)));
        assert_eq!(weights.with_notes(|notes| (notes.contains_key(&1), notes.contains_key(&2))), (true, false));
        assert_eq!(Arc::strong_count(&note), 2);
        drop(weights);
        assert_eq!(Arc::strong_count(&note), 1);
    }

    #[test]
    fn weights_that_are_no_file_are_refused_by_name() {
        for path in ["/nowhere/weights.bin", "/dev/zero", "/"] {
            let refused = HostWeights::open(Path::new(path)).unwrap_err();
            assert!(refused.to_string().contains(path), "{refused}");
        }
    }
}
