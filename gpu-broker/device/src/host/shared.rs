//! What callers and the link thread of a host device share: ranges, the queue of swaps, and which groups have arrived.
//!
//! One mutex guards all of it but the arrivals, which a program reads before every few layers and so must not contend
//! for. Moving memory is the link thread's alone (`link.rs`).

use std::{
    collections::VecDeque,
    hint,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Instant,
};

use faaswap_protocol::Bytes;

use super::arena::{Arena, Reservation};
use crate::{
    DeviceError, DeviceInfo, Group, HostWeights, OnDone, RangeId, SwapReport,
    range::{State, Step},
    table::{RANGES_MAX, Table, place},
};

/// Most swaps that can wait for the link.
pub const SWAPS_QUEUED_MAX: usize = 4096;
/// How often to look again before an awaiter sleeps; a few microseconds, since waking up takes longer than that.
const SPINS: usize = 128;

/// A swap that waits for the link.
pub(super) enum Swap {
    In { weights: Arc<HostWeights>, groups: Arc<[Group]>, asked: Instant, done: OnDone<SwapReport> },
    Out { done: OnDone<()> },
}

/// A swap with its range.
pub(super) struct Job {
    pub(super) range: RangeId,
    pub(super) reservation: Arc<Reservation>,
    pub(super) swap: Swap,
}

/// A reserved range.
pub(super) struct Range {
    pub(super) reservation: Arc<Reservation>,
    pub(super) weights: Bytes,
    pub(super) state: State,
    /// Number of groups of the swap-in that was asked for last.
    pub(super) groups: u32,
    /// Why that swap-in failed, if it did.
    pub(super) failed: Option<DeviceError>,
}

impl Range {
    /// Takes a step that a caller asks for.
    pub(super) fn ask(&mut self, range: RangeId, step: Step, wanted: &'static str) -> Result<(), DeviceError> {
        let next = self.state.after(step);
        self.state = next.ok_or(DeviceError::State { range, state: self.state.name(), wanted })?;
        Ok(())
    }
}

/// What the mutex guards.
#[derive(Default)]
pub(super) struct Books {
    pub(super) ranges: Table<Range>,
    queue: VecDeque<Job>,
    closing: bool,
}

impl Books {
    pub(super) fn has_room(&self) -> bool {
        self.queue.len() < SWAPS_QUEUED_MAX
    }
}

/// A device without its link thread.
pub(super) struct Shared {
    pub(super) info: DeviceInfo,
    pub(super) arena: Arena,
    /// Bytes behind ranges.
    pub(super) mapped: AtomicU64,
    books: Mutex<Books>,
    arrivals: Box<[AtomicU64]>,
    awaiting: AtomicUsize,
    news: Condvar,
    work: Condvar,
    lost: AtomicBool,
}

impl Shared {
    pub(super) fn new(info: DeviceInfo, arena: Arena) -> Self {
        Self {
            info,
            arena,
            mapped: AtomicU64::new(0),
            books: Mutex::default(),
            arrivals: (0..RANGES_MAX).map(|_| AtomicU64::new(0)).collect(),
            awaiting: AtomicUsize::new(0),
            news: Condvar::new(),
            work: Condvar::new(),
            lost: AtomicBool::new(false),
        }
    }

    /// The books of a device that is not lost.
    pub(super) fn books(&self) -> Result<MutexGuard<'_, Books>, DeviceError> {
        let books = self.lock();
        if self.is_lost() { Err(DeviceError::Lost) } else { Ok(books) }
    }

    fn lock(&self) -> MutexGuard<'_, Books> {
        // A panic under this lock is a bug in the link thread, which loses the device on its way out.
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::SeqCst)
    }

    /// The device is lost: everyone who waits is told. Its memory stays where it is, since programs may be running on it.
    pub(super) fn lose(&self) {
        let _books = self.lock();
        self.lost.store(true, Ordering::SeqCst);
        self.arrivals.iter().for_each(|word| word.store(0, Ordering::SeqCst));
        self.news.notify_all();
        self.work.notify_all();
    }

    /// No more work will come.
    pub(super) fn close(&self) {
        self.lose();
        self.lock().closing = true;
        self.work.notify_all();
    }

    pub(super) fn queue(&self, books: &mut Books, job: Job) {
        books.queue.push_back(job);
        self.work.notify_one();
    }

    /// The next swap, if there is one.
    pub(super) fn pop_job(&self) -> Option<Job> {
        self.lock().queue.pop_front()
    }

    /// The next swap, when there is one; `None` when the device goes.
    pub(super) fn next_job(&self) -> Option<Job> {
        let mut books = self.lock();
        loop {
            if let Some(job) = books.queue.pop_front() {
                return Some(job);
            }
            if books.closing {
                return None;
            }
            books = self.work.wait(books).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes a step of the link thread. The range is there: it cannot be released with swaps to be done.
    pub(super) fn step(&self, id: RangeId, step: Step, failed: Option<DeviceError>) {
        let mut books = self.lock();
        let range = books.ranges.get(id).expect("a range with swaps queued is not released");
        let next = range.state.after(step);
        range.state = next.unwrap_or_else(|| panic!("range {id:?} is {:?} at {step:?}", range.state));
        if failed.is_some() {
            range.failed = failed;
        }
        drop(books);
        self.tell();
    }

    /// Says that so many groups are there; 0 takes all of that back.
    pub(super) fn publish(&self, id: RangeId, groups: u32) {
        let word = &self.arrivals[place(id)];
        word.store(arrival(id, groups), Ordering::SeqCst);
        if self.is_lost() {
            word.store(0, Ordering::SeqCst);
        }
        self.tell();
    }

    /// Wakes those who sleep in `wait_for`. Taking the lock puts this after an awaiter's look at what it waits for;
    /// one that counts itself only after this load sees the news by itself.
    fn tell(&self) {
        if self.awaiting.load(Ordering::SeqCst) > 0 {
            drop(self.lock());
            self.news.notify_all();
        }
    }

    fn has_arrived(&self, id: RangeId, group: u32) -> bool {
        let word = self.arrivals[place(id)].load(Ordering::SeqCst);
        (word >> 32) == u64::from(id.0) && (word & u64::from(u32::MAX)) > u64::from(group)
    }

    /// Blocks until the group is there, or will not come.
    pub(super) fn wait_for(&self, id: RangeId, group: u32) -> Result<(), DeviceError> {
        for _ in 0..SPINS {
            if self.has_arrived(id, group) {
                return Ok(());
            }
            hint::spin_loop();
        }
        let mut books = self.books()?;
        self.awaiting.fetch_add(1, Ordering::SeqCst);
        let outcome = loop {
            if let Some(outcome) = self.outcome(&mut books, id, group) {
                break outcome;
            }
            books = self.news.wait(books).unwrap_or_else(PoisonError::into_inner);
        };
        self.awaiting.fetch_sub(1, Ordering::SeqCst);
        outcome
    }

    /// How waiting for the group has ended, if it has.
    fn outcome(&self, books: &mut Books, id: RangeId, group: u32) -> Option<Result<(), DeviceError>> {
        if self.is_lost() {
            return Some(Err(DeviceError::Lost));
        }
        let range = match books.ranges.get(id) {
            Ok(range) => range,
            Err(e) => return Some(Err(e)),
        };
        if self.has_arrived(id, group) {
            return Some(Ok(()));
        }
        if let Some(failed) = &range.failed {
            return Some(Err(failed.clone()));
        }
        match range.state {
            State::Out => {
                Some(Err(DeviceError::State { range: id, state: State::Out.name(), wanted: State::Resident.name() }))
            }
            State::Queued | State::Copying | State::Resident | State::Leaving if group >= range.groups => {
                Some(Err(DeviceError::Invalid("the weights have no such group")))
            }
            State::Queued | State::Copying | State::Resident | State::Leaving => None,
        }
    }
}

fn arrival(id: RangeId, groups: u32) -> u64 {
    u64::from(id.0) << 32 | u64::from(groups)
}
