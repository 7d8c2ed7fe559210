//! Weights in host memory: a tier within a budget, above the store on disk.
//!
//! One file per set of weights in a tmpfs. A registered model has a [`Home`] here whether its weights are in memory or
//! not; [`Home::hold`] gives them, at once where they are there, else to be followed while they come from disk. Who has
//! not been used for longest leaves. The files outlive the broker, so that a restart reads nothing from disk.

mod books;
mod fetch;

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
        mpsc::{SyncSender, sync_channel},
    },
    thread,
    time::Duration,
};

use faaswap_device::{DeviceError, HostWeights, Near};
use faaswap_protocol::Bytes;

use self::{
    books::{Books, Entry, Spare, State},
    fetch::Fetch,
};
use crate::limits::{FETCHES_QUEUED_MAX, SCHEDULED_WITH_LEFT};

/// Why weights are not in host memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// They are larger than the budget, or the budget is used up by models that are being copied.
    #[error("host memory for weights is full: {needed} needed, {left} left")]
    Full {
        /// What the weights take.
        needed: Bytes,
        /// What could be had.
        left: Bytes,
    },
    /// More are on the way than may be.
    #[error("{FETCHES_QUEUED_MAX} models are on their way from disk already")]
    Busy,
    /// The file cannot be made, read or mapped.
    #[error(transparent)]
    Map(#[from] DeviceError),
}

impl From<&MemoryError> for DeviceError {
    fn from(error: &MemoryError) -> Self {
        match error {
            MemoryError::Map(error) => error.clone(),
            MemoryError::Full { .. } | MemoryError::Busy => {
                Self::Failed { call: "bringing weights to host memory", reason: error.to_string() }
            }
        }
    }
}

/// What the tier has done.
#[derive(Debug, Default)]
struct Stats {
    found: AtomicU64,
    followed: AtomicU64,
    fetched: AtomicU64,
    failed: AtomicU64,
    evicted: AtomicU64,
    read: AtomicU64,
    read_nanos: AtomicU64,
}

/// What the tier has done since the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TierStats {
    /// Swap-ins that found their weights in host memory.
    pub found: u64,
    /// Those whose weights were on the way for another one.
    pub followed: u64,
    /// Those that had them brought from disk, then or beforehand.
    pub fetched: u64,
    /// Weights that could not be brought.
    pub failed: u64,
    /// Weights that left for others.
    pub evicted: u64,
    /// Bytes from disk.
    pub read: Bytes,
    /// Time that took.
    pub reading: Duration,
}

/// Makes weights ready for fast copies, once their memory is there.
pub type Ready = Box<dyn Fn(&HostWeights) + Send + Sync>;

/// The budget and its files.
pub struct Memory {
    dir: PathBuf,
    budget: Bytes,
    books: Mutex<Books>,
    /// Something may have become free.
    room: Condvar,
    fetches: SyncSender<Fetch>,
    stats: Stats,
    ready: Ready,
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory").field("dir", &self.dir).field("budget", &self.budget).finish_non_exhaustive()
    }
}

impl Memory {
    /// Takes over what is in the folder; removes what is unfinished or exceeds the budget.
    pub fn open(dir: &Path, budget: Bytes, ready: Ready) -> io::Result<Arc<Self>> {
        use std::os::unix::fs::DirBuilderExt;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let owner = rustix::fs::stat(dir)?.st_uid;
        if owner != rustix::process::getuid().as_raw() {
            return Err(io::Error::other(format!("{} belongs to user {owner}, not to us", dir.display())));
        }
        let mut books = Books::default();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let size = Bytes::new(entry.metadata()?.len());
            if name.ends_with(DRAFT) || !books.fits(size, budget) {
                fs::remove_file(entry.path())?;
                continue;
            }
            books.used += size.get();
            let generation = books.tick();
            let (state, weights) = (State::Left, None);
            let entry = Entry { generation, size, state, weights, copying: 0, resident: 0, used_at: 0, counted: false };
            books.files.insert(name, entry);
        }
        let (fetches, queue) = sync_channel(FETCHES_QUEUED_MAX);
        let (dir, books, room, stats) = (dir.to_owned(), Mutex::new(books), Condvar::new(), Stats::default());
        let memory = Arc::new(Self { dir, budget, books, room, fetches, stats, ready });
        let theirs: Weak<Self> = Arc::downgrade(&memory);
        thread::Builder::new().name("weights".to_owned()).spawn(move || fetch::run(&theirs, &queue))?;
        Ok(memory)
    }

    /// Bytes of weights in host memory, and the budget.
    pub fn used(&self) -> (Bytes, Bytes) {
        (Bytes::new(self.books().used), self.budget)
    }

    /// What the tier has done.
    pub fn stats(&self) -> TierStats {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        TierStats {
            found: count(&self.stats.found),
            followed: count(&self.stats.followed),
            fetched: count(&self.stats.fetched),
            failed: count(&self.stats.failed),
            evicted: count(&self.stats.evicted),
            read: Bytes::new(count(&self.stats.read)),
            reading: Duration::from_nanos(count(&self.stats.read_nanos)),
        }
    }

    /// A place for a model's weights, which are in the file `from` on disk. `key` names their content. Only what could
    /// never be in host memory is refused.
    pub fn home(self: &Arc<Self>, key: &str, from: &Path, size: Bytes) -> Result<Home, MemoryError> {
        if size > self.budget {
            return Err(MemoryError::Full { needed: size, left: self.budget });
        }
        *self.books().homes.entry(key.to_owned()).or_default() += 1;
        Ok(Home { memory: Arc::clone(self), key: key.to_owned(), from: from.to_owned(), size })
    }

    /// The weights of this content, where they are in host memory.
    pub fn there(&self, key: &str) -> Option<Arc<HostWeights>> {
        let books = self.books();
        books.files.get(key).filter(|entry| entry.state == State::Here)?.weights.clone()
    }

    fn draft(&self, key: &str, generation: u64) -> PathBuf {
        self.dir.join(format!("{key}.{generation}.{DRAFT}"))
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const DRAFT: &str = "draft";

/// Whether weights are there or will be.
fn is_usable(entry: &Entry) -> bool {
    entry.weights.as_ref().is_some_and(|weights| weights.failed().is_none())
}

/// A registered model's place in the tier.
#[derive(Debug)]
pub struct Home {
    memory: Arc<Memory>,
    key: String,
    from: PathBuf,
    size: Bytes,
}

impl Home {
    /// Brings the weights to host memory if no other registered model has to leave for them. Blocks.
    pub fn warm(&self) -> Result<(), MemoryError> {
        if self.is_in_memory() || self.take_over() {
            return Ok(());
        }
        let fetch = {
            let mut books = self.memory.books();
            if books.files.contains_key(&self.key) {
                return Ok(());
            }
            self.promise(&mut books)?.1
        };
        match self.memory.fetch(fetch, Spare::Registered) {
            // On disk it is good enough.
            Ok(()) | Err(MemoryError::Full { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Maps what an earlier process has left. False where there is none, or it cannot be used.
    fn take_over(&self) -> bool {
        let left = |entry: &&mut Entry| entry.state == State::Left && entry.size == self.size;
        if self.memory.books().files.get_mut(&self.key).filter(left).is_none() {
            return false;
        }
        // To make weights ready takes long where they are many: whoever wants others does not wait for it.
        let opened =
            HostWeights::open(&self.memory.dir.join(&self.key)).inspect(|weights| (self.memory.ready)(weights));
        let mut books = self.memory.books();
        let now = books.tick();
        let Some(entry) = books.files.get_mut(&self.key).filter(left) else { return false };
        match opened {
            Ok(weights) => {
                (entry.weights, entry.state, entry.used_at) = (Some(Arc::new(weights)), State::Here, now);
                true
            }
            Err(error) => {
                tracing::warn!(%error, "weights of an earlier process are read anew");
                false
            }
        }
    }

    /// Whether the weights are in host memory now.
    pub fn is_in_memory(&self) -> bool {
        self.memory.books().files.get(&self.key).is_some_and(|entry| entry.state == State::Here)
    }

    /// Has weights that are on disk brought, and `near` called when the end of it is near, or it has failed. `None` where
    /// they are there, or on the way. They do not leave until the answer is dropped. Does not block.
    pub fn bring(&self, near: Near) -> Result<Option<Held>, MemoryError> {
        let mut books = self.memory.books();
        if books.files.get(&self.key).is_some_and(is_usable) {
            return Ok(None);
        }
        self.begin(&mut books, Some(near)).map(Some)
    }

    /// The weights, for a swap-in: there, or on the way. Does not block.
    pub fn hold(&self) -> Result<Held, MemoryError> {
        let stats = &self.memory.stats;
        let mut books = self.memory.books();
        let now = books.tick();
        if let Some(entry) = books.files.get_mut(&self.key).filter(|entry| is_usable(entry))
            && let Some(weights) = entry.weights.clone()
        {
            (entry.copying, entry.used_at) = (entry.copying + 1, now);
            let counter = if entry.state == State::Here { &stats.found } else { &stats.followed };
            let counted = std::mem::take(&mut entry.counted);
            counter.fetch_add(u64::from(!counted), Ordering::Relaxed);
            let generation = entry.generation;
            return Ok(self.held(weights, generation));
        }
        self.begin(&mut books, None)
    }

    /// Has the weights brought from disk.
    fn begin(&self, books: &mut Books, near: Option<Near>) -> Result<Held, MemoryError> {
        // What failed, or was left and could not be mapped, makes place for another try.
        if books.take(&self.key).is_some_and(|entry| entry.state == State::Left) {
            // It goes at the next start at the latest, or when the new one gets its name.
            let _ = fs::remove_file(self.memory.dir.join(&self.key));
        }
        let (weights, fetch) = self.promise(books)?;
        let generation = fetch.generation;
        let is_beforehand = near.is_some();
        if let Some(near) = near {
            fetch.filler.tell_when_left(weights.len() / SCHEDULED_WITH_LEFT, near);
        }
        if let Some(entry) = books.of(&self.key, generation) {
            (entry.copying, entry.counted) = (1, is_beforehand);
        }
        if self.memory.fetches.try_send(fetch).is_err() {
            books.take(&self.key);
            return Err(MemoryError::Busy);
        }
        self.memory.stats.fetched.fetch_add(1, Ordering::Relaxed);
        Ok(self.held(weights, generation))
    }

    fn held(&self, weights: Arc<HostWeights>, generation: u64) -> Held {
        Held { memory: Arc::clone(&self.memory), key: self.key.clone(), generation, weights: Some(weights) }
    }

    /// Enters weights that are to come.
    fn promise(&self, books: &mut Books) -> Result<(Arc<HostWeights>, Fetch), MemoryError> {
        let generation = books.tick();
        let draft = self.memory.draft(&self.key, generation);
        let (weights, filler) = HostWeights::to_come_in(&draft, self.size)?;
        let entry = Entry {
            generation,
            size: self.size,
            state: State::Filling { charged: false },
            weights: Some(Arc::clone(&weights)),
            copying: 0,
            resident: 0,
            used_at: generation,
            counted: false,
        };
        books.files.insert(self.key.clone(), entry);
        let (key, from) = (self.key.clone(), self.from.clone());
        Ok((weights, Fetch { key, generation, filler, from, draft }))
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let mut books = self.memory.books();
        if let Some(homes) = books.homes.get_mut(&self.key) {
            *homes -= 1;
            if *homes == 0 {
                books.homes.remove(&self.key);
            }
        }
    }
}

/// Weights that a swap-in copies, and do not leave meanwhile; then, once it is [settled](Held::settle), a note that they
/// are on a device, and rather stay.
#[derive(Debug)]
pub struct Held {
    memory: Arc<Memory>,
    key: String,
    generation: u64,
    /// Absent once the copy has ended.
    weights: Option<Arc<HostWeights>>,
}

impl Held {
    /// The weights, as long as they are being copied.
    pub fn weights(&self) -> Option<Arc<HostWeights>> {
        self.weights.clone()
    }

    /// The copy has ended; the weights are on the device until this is dropped.
    pub fn settle(&mut self) {
        if self.weights.take().is_some() {
            if let Some(entry) = self.memory.books().of(&self.key, self.generation) {
                (entry.copying, entry.resident) = (entry.copying - 1, entry.resident + 1);
            }
            self.memory.room.notify_all();
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut books = self.memory.books();
        let now = books.tick();
        if let Some(entry) = books.of(&self.key, self.generation) {
            let count = if self.weights.is_some() { &mut entry.copying } else { &mut entry.resident };
            *count -= 1;
            entry.used_at = now;
        }
        drop(books);
        self.memory.room.notify_all();
    }
}

#[cfg(test)]
mod tests;
