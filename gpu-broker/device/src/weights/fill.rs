//! Filling weights from below: from a file, by several reads at a time that go around the page cache.
//!
//! Reads land in the very pages that devices copy from, piece by piece in order, and raise the weights' mark as they end:
//! a swap-in need not wait for the last of them. Which file that is, and that there is room, is the model store's business.

use std::{
    collections::BTreeSet,
    fs::File,
    io,
    os::fd::OwnedFd,
    path::Path,
    slice,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use faaswap_protocol::Bytes;
use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::{
    fs::{FallocateFlags, Mode, OFlags},
    io::Errno,
};

use super::HostWeights;
use crate::DeviceError;

/// Size of a read. Groups are a few of them, so that the first group is there after a few reads.
const PIECE: usize = 2 << 20;
/// Reads that go around the page cache begin, end and land at multiples of this.
const DIRECT_ALIGN: usize = 4096;
/// Most reads at a time.
pub const READS_IN_FLIGHT_MAX: usize = 64;
const _: () = assert!(PIECE.is_multiple_of(DIRECT_ALIGN), "pieces can be read directly");

/// How filling went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FillReport {
    /// Bytes read.
    pub read: Bytes,
    /// From the first read to the last.
    pub took: Duration,
    /// Whether the reads went around the page cache.
    pub direct: bool,
}

/// Called once, when a mark is reached, or will never be.
pub type Near = Box<dyn FnOnce() + Send>;

/// The right to fill weights, for one. Dropped before they are full, it fails whoever waits for the rest.
pub struct Filler {
    weights: Arc<HostWeights>,
    file: OwnedFd,
    /// The same pages as the weights' own mapping, to be written.
    map: Option<MmapRaw>,
    /// Who wants to know when the mark is somewhere.
    near: Mutex<Option<(usize, Near)>>,
}

impl Filler {
    pub(super) fn new(weights: Arc<HostWeights>, file: OwnedFd) -> Result<Self, DeviceError> {
        let map = || MmapOptions::new().len(weights.len()).map_raw(&file);
        let failed = |e: io::Error| DeviceError::Failed { call: "mmap of weights", reason: e.to_string() };
        let map = if weights.is_empty() { None } else { Some(map().map_err(failed)?) };
        Ok(Self { weights, file, map, near: Mutex::default() })
    }

    /// Has `near` called, by the thread that fills, once only so many bytes are left, or the rest will not come.
    pub fn tell_when_left(&self, bytes: usize, near: Near) {
        let mark = self.weights.len().saturating_sub(bytes);
        *self.near.lock().unwrap_or_else(PoisonError::into_inner) = Some((mark, near));
    }

    fn tell(&self, is_near: impl FnOnce(usize) -> bool) {
        let mut near = self.near.lock().unwrap_or_else(PoisonError::into_inner);
        let told = near.take_if(|(mark, _)| is_near(*mark));
        drop(near);
        if let Some((_, told)) = told {
            told();
        }
    }

    /// Raises the mark.
    fn raise(&self, until: usize) {
        self.weights.level.raise(until);
        self.tell(|mark| until >= mark);
    }

    /// The weights that this fills.
    pub fn weights(&self) -> &Arc<HostWeights> {
        &self.weights
    }

    /// Takes all memory now: a tmpfs that is full says so here. Before devices make the weights ready for fast copies.
    pub fn reserve(&self) -> Result<(), DeviceError> {
        if self.weights.is_empty() {
            return Ok(());
        }
        let len = self.weights.size().get();
        rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, len)
            .map_err(|e| DeviceError::Failed { call: "fallocate of weights", reason: format!("{len} bytes: {e}") })
    }

    /// Fills the next bytes.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), DeviceError> {
        let at = self.weights.filled();
        let end = at.checked_add(bytes.len()).filter(|end| *end <= self.weights.len());
        let end = end.ok_or(DeviceError::Invalid("more bytes than the weights have"))?;
        self.piece(at, bytes.len()).copy_from_slice(bytes);
        self.raise(end);
        Ok(())
    }

    /// Fills all of it from a file of the same size, by so many reads at a time. On failure whoever waits is told.
    pub fn read(self, path: &Path, reads_in_flight: usize) -> Result<FillReport, DeviceError> {
        let read = self.read_all(path, reads_in_flight.clamp(1, READS_IN_FLIGHT_MAX)).map_err(|reason| {
            DeviceError::Failed { call: "reading weights", reason: format!("{}: {reason}", path.display()) }
        });
        if let Err(why) = &read {
            self.weights.level.fail(why.clone());
        }
        read
    }

    /// Gives it up, for this reason.
    pub fn fail(self, why: DeviceError) {
        self.weights.level.fail(why);
    }

    fn read_all(&self, path: &Path, reads_in_flight: usize) -> io::Result<FillReport> {
        let source = Source::open(path)?;
        if source.len != self.weights.size() {
            let (found, wanted) = (source.len, self.weights.size());
            return Err(io::Error::other(format!("it has {found}, {wanted} are expected")));
        }
        let started = Instant::now();
        let progress = Progress::default();
        thread::scope(|scope| {
            let work = || self.read_pieces(&source, &progress);
            (1..reads_in_flight).for_each(|_| drop(scope.spawn(work)));
            work();
        });
        match progress.failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(FillReport { read: source.len, took: started.elapsed(), direct: source.finish() }),
        }
    }

    /// Reads pieces until there are no more, or one fails.
    fn read_pieces(&self, source: &Source, progress: &Progress) {
        let len = self.weights.len();
        loop {
            let index = progress.next.fetch_add(1, Ordering::Relaxed);
            let offset = index.saturating_mul(PIECE);
            if offset >= len || progress.has_failed() {
                return;
            }
            let size = PIECE.min(len - offset);
            self.fault_in(offset, size, Advice::PopulateWrite);
            if let Err(error) = source.read(self.piece(offset, size), offset) {
                return progress.fail(error);
            }
            self.weights.fault_in(offset, size);
            let pieces = progress.done(index);
            self.raise(pieces.saturating_mul(PIECE).min(len));
        }
    }

    /// Puts pages behind a piece, all at once: one by one takes longer than reading them.
    fn fault_in(&self, offset: usize, len: usize, advice: Advice) {
        if let Some(map) = &self.map
            && let Err(error) = map.advise_range(advice, offset, len)
        {
            // Then they come one by one; where there is no memory for them, the read says so.
            tracing::debug!(%error, "pages were not faulted in");
        }
    }

    /// A piece above the mark, to be written. Each is asked for once: `read_pieces` deals them out, and `append`, which
    /// has the filler for itself, goes on at the mark.
    #[expect(clippy::mut_from_ref, reason = "pieces do not overlap")]
    fn piece(&self, offset: usize, len: usize) -> &mut [u8] {
        let Some(map) = self.map.as_ref().filter(|_| len > 0) else { return &mut [] };
        assert!(offset.checked_add(len).is_some_and(|end| end <= map.len()), "a piece outside of the weights");
        let start = map.as_mut_ptr().wrapping_add(offset);
        // SAFETY: the stretch lies in a mapping that can be written and lives as long as `self`. Nobody else has it: see
        // above, and those who read weights, through a mapping of their own, do so only below the mark.
        unsafe { slice::from_raw_parts_mut(start, len) }
    }
}

impl std::fmt::Debug for Filler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Filler").field("weights", &self.weights).finish_non_exhaustive()
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        if self.weights.filled() < self.weights.len() {
            let reason = "it was given up".to_owned();
            self.weights.level.fail(DeviceError::Failed { call: "filling weights", reason });
        }
        self.tell(|_| true);
    }
}

/// Which pieces are there.
#[derive(Debug, Default)]
struct Progress {
    next: AtomicUsize,
    /// How many from the start, and those beyond them.
    done: Mutex<(usize, BTreeSet<usize>)>,
    failed: Mutex<Option<io::Error>>,
}

impl Progress {
    /// One more is there; returns how many are from the start.
    fn done(&self, index: usize) -> usize {
        let (pieces, beyond) = &mut *self.done.lock().unwrap_or_else(PoisonError::into_inner);
        beyond.insert(index);
        while beyond.remove(pieces) {
            *pieces += 1;
        }
        *pieces
    }

    fn fail(&self, error: io::Error) {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }

    fn has_failed(&self) -> bool {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }
}

/// A file, open twice: around the page cache, where its filesystem lets us, and through it.
#[derive(Debug)]
struct Source {
    buffered: File,
    direct: Option<OwnedFd>,
    /// Whether the filesystem has refused what it had let us open.
    refused: AtomicBool,
    len: Bytes,
}

impl Source {
    fn open(path: &Path) -> io::Result<Self> {
        let buffered = File::open(path)?;
        let len = Bytes::new(buffered.metadata()?.len());
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::DIRECT;
        let direct = rustix::fs::open(path, flags, Mode::empty()).ok();
        Ok(Self { buffered, direct, refused: AtomicBool::new(false), len })
    }

    /// Reads exactly so many bytes. What does not end at a multiple of a block comes through the page cache.
    fn read(&self, into: &mut [u8], offset: usize) -> io::Result<()> {
        let mut at = 0;
        while at < into.len() {
            let whole = (into.len() - at) / DIRECT_ALIGN * DIRECT_ALIGN;
            let refused = self.refused.load(Ordering::Relaxed);
            let direct = self.direct.as_ref().filter(|_| !refused && whole > 0 && at.is_multiple_of(DIRECT_ALIGN));
            let from = (offset + at) as u64;
            let read = rustix::io::retry_on_intr(|| match direct {
                Some(file) => rustix::io::pread(file, &mut into[at..at + whole], from),
                None => rustix::io::pread(&self.buffered, &mut into[at..], from),
            });
            match read {
                Ok(0) => return Err(io::Error::other(format!("it ends after {from} bytes"))),
                Ok(read) => at += read,
                Err(Errno::INVAL) if direct.is_some() => self.refused.store(true, Ordering::Relaxed),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Whether reads went around the page cache. Where they did not, what is there would be in memory twice.
    fn finish(&self) -> bool {
        let direct = self.direct.is_some() && !self.refused.load(Ordering::Relaxed);
        if !direct {
            // Only a hint to the kernel.
            let _ = rustix::fs::fadvise(&self.buffered, 0, None, rustix::fs::Advice::DontNeed);
        }
        direct
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    /// Bytes whose every word tells where it is.
    fn pattern(len: usize) -> Vec<u8> {
        (0..len.div_ceil(4))
            .flat_map(|i| u32::try_from(i).unwrap().wrapping_mul(0x9e37_79b9).to_le_bytes())
            .take(len)
            .collect()
    }

    fn fill(bytes: &[u8], dir: &Path, reads: usize) -> (Arc<HostWeights>, FillReport) {
        let path = dir.join("source");
        std::fs::write(&path, bytes).unwrap();
        let (weights, filler) = HostWeights::to_come(Bytes::of_len(bytes.len())).unwrap();
        filler.reserve().unwrap();
        let report = filler.read(&path, reads).unwrap();
        (weights, report)
    }

    #[test]
    fn a_file_of_any_size_is_read_exactly() {
        let dir = tempfile::tempdir().unwrap();
        for len in [0, 1, 4095, 4096, 4097, PIECE, PIECE + 1, 3 * PIECE - 4096, 5 * PIECE + 4711] {
            let bytes = pattern(len);
            for reads in [1, 4, usize::MAX] {
                let (weights, report) = fill(&bytes, dir.path(), reads);
                assert_eq!(report.read, Bytes::of_len(len));
                assert!(weights.as_slice() == bytes, "{len} bytes by {reads} reads");
            }
        }
    }

    #[test]
    fn where_reads_cannot_go_around_the_page_cache_they_go_through_it() {
        let dir = tempfile::tempdir().unwrap();
        let (path, bytes) = (dir.path().join("source"), pattern(PIECE + 5000));
        std::fs::write(&path, &bytes).unwrap();
        // A filesystem that refuses when the file is opened.
        let mut source = Source::open(&path).unwrap();
        let mut into = vec![0; bytes.len()];
        source.direct = None;
        source.read(&mut into, 0).unwrap();
        assert!(into == bytes && !source.finish());
        // One that refuses when it is read: it may refuse memory at an odd address.
        let source = Source::open(&path).unwrap();
        let mut into = vec![0; bytes.len() + 1];
        source.read(&mut into[1..], 0).unwrap();
        assert!(into[1..] == bytes);
    }

    #[test]
    fn a_file_that_is_not_what_it_should_be_fails_whoever_waits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("source");
        std::fs::write(&path, pattern(1000)).unwrap();
        for (path, said) in [(path, "1000"), (dir.path().join("nowhere"), "nowhere")] {
            let (weights, filler) = HostWeights::to_come(Bytes::new(1001)).unwrap();
            let failed = filler.read(&path, 2).unwrap_err();
            assert!(failed.to_string().contains(said), "{failed}");
            assert_eq!(weights.wait_filled(1, Duration::ZERO), Err(failed));
        }
    }

    #[test]
    fn who_wants_to_know_is_told_once_when_little_is_left_or_nothing_will_come() {
        let told = Arc::new(AtomicUsize::new(0));
        let near = || -> Near {
            let told = Arc::clone(&told);
            Box::new(move || {
                told.fetch_add(1, Ordering::SeqCst);
            })
        };
        let (_, mut filler) = HostWeights::to_come(Bytes::new(10)).unwrap();
        filler.tell_when_left(3, near());
        filler.append(&[0; 6]).unwrap();
        assert_eq!(told.load(Ordering::SeqCst), 0, "four are left");
        filler.append(&[0; 2]).unwrap();
        assert_eq!(told.load(Ordering::SeqCst), 1);
        filler.append(&[0; 2]).unwrap();
        drop(filler);
        assert_eq!(told.load(Ordering::SeqCst), 1, "once");
        let (_, filler) = HostWeights::to_come(Bytes::new(10)).unwrap();
        filler.tell_when_left(3, near());
        drop(filler);
        assert_eq!(told.load(Ordering::SeqCst), 2, "nothing will come");
    }

    #[test]
    fn pieces_count_from_the_start_whatever_the_order_of_their_ends() {
        let progress = Progress::default();
        assert_eq!([2, 0, 4, 1, 3].map(|index| progress.done(index)), [0, 1, 1, 3, 5]);
    }

    #[test]
    fn a_filler_that_is_dropped_fails_the_rest_and_one_that_is_done_does_not() {
        let (weights, mut filler) = HostWeights::to_come(Bytes::new(10)).unwrap();
        filler.append(&[7; 6]).unwrap();
        assert!(filler.append(&[7; 5]).is_err(), "more than there is room for");
        assert_eq!(weights.wait_filled(7, Duration::ZERO), Ok(false));
        drop(filler);
        assert!(weights.wait_filled(7, Duration::ZERO).is_err());
        assert_eq!(weights.wait_filled(6, Duration::ZERO), Ok(true));
        let (weights, mut filler) = HostWeights::to_come(Bytes::new(10)).unwrap();
        filler.append(&[3; 10]).unwrap();
        drop(filler);
        assert_eq!(weights.as_slice(), [3; 10]);
    }
}
