//! Weights in host memory: one file per model in a tmpfs, within a budget.
//!
//! The files outlive the broker, so that a restart reads nothing from disk. Files that no model uses stay for as long
//! as the budget allows, and leave least recently used first.

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use faaswap_device::{DeviceError, HostWeights};
use faaswap_protocol::Bytes;
use rustix::fs::FallocateFlags;

/// Why weights are not in host memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The budget is used up by models in use.
    #[error("host memory for weights is full: {needed} needed, {left} left")]
    Full {
        /// What the weights take.
        needed: Bytes,
        /// What could be had.
        left: Bytes,
    },
    /// The system refused.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// The file cannot be mapped.
    #[error(transparent)]
    Map(#[from] DeviceError),
}

#[derive(Debug)]
struct Entry {
    size: Bytes,
    users: usize,
    used_at: u64,
}

#[derive(Debug, Default)]
struct Books {
    files: HashMap<String, Entry>,
    used: u64,
    clock: u64,
}

/// The budget and its files.
#[derive(Debug)]
pub struct Memory {
    dir: PathBuf,
    budget: Bytes,
    books: Mutex<Books>,
}

/// Weights in host memory; they may leave it once this is dropped.
#[derive(Debug)]
pub struct Held {
    weights: Arc<HostWeights>,
    key: String,
    memory: Arc<Memory>,
}

impl Held {
    /// The mapped weights.
    pub fn weights(&self) -> Arc<HostWeights> {
        Arc::clone(&self.weights)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut books = self.memory.books();
        if let Some(entry) = books.files.get_mut(&self.key) {
            entry.users -= 1;
        }
    }
}

impl Memory {
    /// Takes over what is in the folder; removes what is unfinished or exceeds the budget.
    pub fn open(dir: &Path, budget: Bytes) -> io::Result<Arc<Self>> {
        use std::os::unix::fs::DirBuilderExt;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let owner = rustix::fs::stat(dir)?.st_uid;
        if owner != rustix::process::getuid().as_raw() {
            return Err(io::Error::other(format!("{} belongs to user {owner}, not to us", dir.display())));
        }
        let memory = Arc::new(Self { dir: dir.to_owned(), budget, books: Mutex::default() });
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let size = entry.metadata()?.len();
            if name.ends_with(DRAFT) || memory.books().used.saturating_add(size) > budget.get() {
                fs::remove_file(entry.path())?;
                continue;
            }
            let mut books = memory.books();
            books.used += size;
            books.files.insert(name, Entry { size: Bytes::new(size), users: 0, used_at: 0 });
        }
        Ok(memory)
    }

    /// Bytes of weights in host memory, and the budget.
    pub fn used(&self) -> (Bytes, Bytes) {
        (Bytes::new(self.books().used), self.budget)
    }

    /// Brings weights into host memory, or finds them there. `key` names their content. Blocks while it copies.
    pub fn hold(self: &Arc<Self>, key: &str, from: &Path, size: Bytes) -> Result<Held, MemoryError> {
        let path = self.dir.join(key);
        let known = {
            let mut books = self.books();
            books.clock += 1;
            let now = books.clock;
            match books.files.get_mut(key).filter(|entry| entry.size == size) {
                Some(entry) => {
                    (entry.users, entry.used_at) = (entry.users + 1, now);
                    true
                }
                None => {
                    self.make_room(&mut books, size)?;
                    books.used += size.get();
                    books.files.insert(key.to_owned(), Entry { size, users: 1, used_at: now });
                    false
                }
            }
        };
        let brought = if known { Ok(()) } else { self.bring(&path, from, size) };
        match brought.and_then(|()| HostWeights::open(&path).map_err(MemoryError::Map)) {
            Ok(weights) => Ok(Held { weights: Arc::new(weights), key: key.to_owned(), memory: Arc::clone(self) }),
            Err(error) => {
                self.forget(key);
                Err(error)
            }
        }
    }

    fn bring(&self, path: &Path, from: &Path, size: Bytes) -> Result<(), MemoryError> {
        let draft = path.with_extension(DRAFT);
        let copied = copy(from, &draft, size).and_then(|()| fs::rename(&draft, path));
        copied.map_err(|source| {
            // What is left of it is removed at the next start at the latest.
            let _ = fs::remove_file(&draft);
            MemoryError::Io { path: path.to_owned(), source }
        })
    }

    /// Takes back what `hold` has booked.
    fn forget(&self, key: &str) {
        let mut books = self.books();
        if let Some(entry) = books.files.get_mut(key) {
            entry.users -= 1;
            if entry.users == 0 {
                self.drop_file(&mut books, key);
            }
        }
    }

    fn make_room(&self, books: &mut Books, size: Bytes) -> Result<(), MemoryError> {
        while books.used.saturating_add(size.get()) > self.budget.get() {
            let unused = books.files.iter().filter(|(_, entry)| entry.users == 0);
            let Some(key) = unused.min_by_key(|(_, entry)| entry.used_at).map(|(key, _)| key.clone()) else {
                let left = Bytes::new(self.budget.get().saturating_sub(books.used));
                return Err(MemoryError::Full { needed: size, left });
            };
            self.drop_file(books, &key);
        }
        Ok(())
    }

    fn drop_file(&self, books: &mut Books, key: &str) {
        if let Some(entry) = books.files.remove(key) {
            books.used -= entry.size.get();
            // A file that is not there takes no memory either.
            let _ = fs::remove_file(self.dir.join(key));
        }
    }

    fn books(&self) -> std::sync::MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const DRAFT: &str = "draft";

/// Copies within the kernel, after all room was taken: a tmpfs that is full says so now, not when a page is touched.
fn copy(from: &Path, to: &Path, size: Bytes) -> io::Result<()> {
    let source = File::open(from)?;
    let target = File::create(to)?;
    if size == Bytes::ZERO {
        return Ok(());
    }
    rustix::fs::fallocate(&target, FallocateFlags::empty(), 0, size.get())?;
    let copied = io::copy(&mut &source, &mut &target)?;
    if copied != size.get() {
        return Err(io::Error::other(format!("{copied} bytes were read, {} expected", size.get())));
    }
    Ok(())
}
