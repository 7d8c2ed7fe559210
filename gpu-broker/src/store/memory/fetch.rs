//! Bringing weights from disk: one model at a time, in the order of asking, with all of the disk's speed.
//!
//! Two at a time would both be late. What is asked for behind a large one waits for it; what is in host memory does not
//! come by here.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{PoisonError, Weak, atomic::Ordering, mpsc::Receiver},
    time::Instant,
};

use faaswap_device::{DeviceError, FillReport, Filler};

use super::{
    Memory, MemoryError,
    books::{Entry, Spare, State},
};
use crate::limits::{HOST_ROOM_WITHIN, WEIGHT_READS_IN_FLIGHT};

/// Weights to be brought.
#[derive(Debug)]
pub(super) struct Fetch {
    pub(super) key: String,
    pub(super) generation: u64,
    pub(super) filler: Filler,
    pub(super) from: PathBuf,
    /// The file that is filled; it gets its name once it is whole.
    pub(super) draft: PathBuf,
}

/// Until the memory goes.
pub(super) fn run(memory: &Weak<Memory>, fetches: &Receiver<Fetch>) {
    for fetch in fetches {
        // Without it nobody waits for the weights any more.
        let Some(memory) = memory.upgrade() else { return };
        // Whoever waits has the reason; the log has it too.
        let _ = memory.fetch(fetch, Spare::Copying);
    }
}

impl Memory {
    /// Brings weights, or tells whoever waits for them why not.
    pub(super) fn fetch(&self, fetch: Fetch, spare: Spare) -> Result<(), MemoryError> {
        let Fetch { key, generation, filler, from, draft } = fetch;
        match self.bring(&key, generation, filler, (&from, &draft), spare) {
            Ok(report) => {
                tracing::debug!(weights = key, size = %report.read, took = ?report.took, direct = report.direct, "read from disk");
                Ok(())
            }
            Err(error) => {
                if spare == Spare::Registered && matches!(error, MemoryError::Full { .. }) {
                    tracing::debug!(weights = key, "others are in host memory");
                } else {
                    self.stats.failed.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(weights = key, %error, "weights could not be brought to host memory");
                }
                let mut books = self.books();
                let ours = books.of(&key, generation).is_some();
                let gone = if ours { books.take(&key) } else { None };
                drop(books);
                self.room.notify_all();
                // What is left of it goes at the next start at the latest.
                let _ = fs::remove_file(&draft);
                drop(gone);
                Err(error)
            }
        }
    }

    fn bring(
        &self,
        key: &str,
        generation: u64,
        filler: Filler,
        (from, draft): (&Path, &Path),
        spare: Spare,
    ) -> Result<FillReport, MemoryError> {
        let begun = self.take_room(key, generation, spare).and_then(|()| Ok(filler.reserve()?));
        if let Err(error) = begun {
            filler.fail(DeviceError::from(&error));
            return Err(error);
        }
        (self.ready)(filler.weights());
        let report = filler.read(from, WEIGHT_READS_IN_FLIGHT)?;
        self.stats.read.fetch_add(report.read.get(), Ordering::Relaxed);
        let nanos = u64::try_from(report.took.as_nanos()).unwrap_or(u64::MAX);
        self.stats.read_nanos.fetch_add(nanos, Ordering::Relaxed);
        let home = self.dir.join(key);
        if let Err(error) = fs::rename(draft, &home) {
            // It serves under any name; it will be read again after a restart.
            tracing::warn!(%error, file = %draft.display(), "weights in host memory have no name");
        }
        if let Some(entry) = self.books().of(key, generation) {
            entry.state = State::Here;
        }
        self.room.notify_all();
        Ok(report)
    }

    /// Charges an entry, after others have left for it. Waits, for a while, for those that are being copied.
    fn take_room(&self, key: &str, generation: u64, spare: Spare) -> Result<(), MemoryError> {
        let until = Instant::now() + HOST_ROOM_WITHIN;
        let mut books = self.books();
        loop {
            let Some(size) = books.of(key, generation).map(|entry| entry.size) else {
                return Err(MemoryError::Full { needed: self.budget, left: self.budget });
            };
            if books.fits(size, self.budget) {
                books.used += size.get();
                if let Some(entry) = books.of(key, generation) {
                    entry.state = State::Filling { charged: true };
                }
                return Ok(());
            }
            if let Some((key, entry)) = books.take_victim(spare) {
                drop(books);
                self.evict(&key, entry);
                books = self.books();
                continue;
            }
            let left = until.saturating_duration_since(Instant::now());
            if spare == Spare::Registered || left.is_zero() {
                let left = faaswap_protocol::Bytes::new(self.budget.get().saturating_sub(books.used));
                return Err(MemoryError::Full { needed: size, left });
            }
            books = self.room.wait_timeout(books, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Gives an entry's memory back. Unmapping a gigabyte takes milliseconds: not under the lock.
    fn evict(&self, key: &str, entry: Entry) {
        self.stats.evicted.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(weights = key, size = %entry.size, "left host memory");
        // Files that are not there take no memory either.
        let _ = fs::remove_file(self.dir.join(key));
        let _ = fs::remove_file(self.draft(key, entry.generation));
        drop(entry);
    }
}
