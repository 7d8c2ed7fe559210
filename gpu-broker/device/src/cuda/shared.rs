//! What callers, the link thread and the finishing thread of a CUDA device share: ranges and the queue of swaps.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use faaswap_protocol::Bytes;

use super::{
    driver::{Addresses, Context},
    placement::{Placement, Span},
    pool::Pool,
    queue::Event,
    source::{Lent, Source},
};
use crate::{
    DeviceError, DeviceInfo, Group, OnDone, RangeId, SwapReport,
    range::{State, Step},
    table::Table,
};

/// Most swaps that can wait for the link.
pub const SWAPS_QUEUED_MAX: usize = 4096;

/// How long the link must have been idle before it does what can wait.
const IDLE_AFTER: Duration = Duration::from_millis(1);

pub(super) enum Swap {
    In { source: Source, groups: Arc<[Group]>, asked: Instant, done: OnDone<SwapReport> },
    Out { done: OnDone<()> },
}

pub(super) struct Job {
    pub(super) range: RangeId,
    pub(super) swap: Swap,
}

/// What the link does next.
pub(super) enum Next {
    Job(Job),
    /// Whatever else there is to do.
    Nothing,
    /// The device goes or is lost.
    End,
}

/// A reserved range.
pub(super) struct Range {
    pub(super) addresses: Arc<Addresses>,
    pub(super) weights: Bytes,
    pub(super) state: State,
    /// Number of groups of the swap-in that was asked for last.
    pub(super) groups: u32,
    /// How many of them are queued on the link, each with its event recorded.
    pub(super) recorded: u32,
    /// The group behind which little is left; `None` where all of it is little.
    pub(super) late_group: Option<u32>,
    /// One per group. They stay for as long as the range does: programs wait for them.
    pub(super) events: Vec<Arc<Event>>,
    pub(super) failed: Option<DeviceError>,
    /// Weights that must each lie in a row, of those that cross the end of a chunk, for programs that move with them; `None` where
    /// some program knows the range's own addresses alone.
    pub(super) whole: Option<Arc<[Span]>>,
    /// Where the weights lie now; `None` where they have no chunks.
    pub(super) placed: Option<Arc<Placement>>,
    /// Where they lay at last.
    pub(super) was: Option<Arc<Placement>>,
    /// What has memory behind it, in order: offset and length. Where the range is out that memory is not its own any
    /// more: it is taken away when the link has nothing else to do.
    pub(super) behind: Vec<(usize, usize)>,
    /// Whether the link means to take that memory away.
    pub(super) stale: bool,
    /// Whether one chunk lies behind all of it, for a model to be bound.
    pub(super) lent: bool,
    /// Whether the finishing thread has still to look at it.
    pub(super) unfinished: bool,
    pub(super) readers: u32,
}

impl Range {
    /// Where the weights lie, once all are there.
    pub(super) fn resident(&self, id: RangeId) -> Result<Arc<Placement>, DeviceError> {
        let placed = self.placed.as_ref().filter(|_| self.state == State::Resident);
        let (state, wanted) = (self.state.name(), State::Resident.name());
        placed.map(Arc::clone).ok_or(DeviceError::State { range: id, state, wanted })
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        if let Err(error) = self.addresses.unmap_all(&self.behind) {
            tracing::debug!(%error, "a range that goes cannot be unmapped");
        }
    }
}

#[derive(Default)]
pub(super) struct Books {
    pub(super) ranges: Table<Range>,
    queue: VecDeque<Job>,
    closing: bool,
}

impl Books {
    /// The event of a group, made when it is first asked for.
    pub(super) fn event(&mut self, context: &Arc<Context>, id: RangeId, group: u32) -> Result<Arc<Event>, DeviceError> {
        let range = self.ranges.get(id)?;
        let index = usize::try_from(group).ok().filter(|&index| index < crate::GROUPS_MAX);
        let index = index.ok_or(DeviceError::Invalid("a model cannot have so many groups"))?;
        while range.events.len() <= index {
            range.events.push(Arc::new(Event::new(context)?));
        }
        Ok(Arc::clone(&range.events[index]))
    }
}

pub(super) struct Shared {
    pub(super) info: DeviceInfo,
    pub(super) context: Arc<Context>,
    pub(super) mapped: AtomicU64,
    /// Other GPUs that can read the pool.
    readers: Vec<i32>,
    /// Other GPUs over which there is a second way to this one.
    detours: OnceLock<Vec<i32>>,
    books: Mutex<Books>,
    news: Condvar,
    /// Counts news, for those who look for them.
    told: AtomicU64,
    work: Condvar,
    lost: AtomicBool,
}

impl Shared {
    pub(super) fn new(info: DeviceInfo, context: Arc<Context>, pool: &Pool) -> Self {
        Self {
            info,
            context,
            mapped: AtomicU64::new(0),
            readers: pool.readers.clone(),
            detours: OnceLock::new(),
            books: Mutex::default(),
            news: Condvar::new(),
            told: AtomicU64::new(0),
            work: Condvar::new(),
            lost: AtomicBool::new(false),
        }
    }

    pub(super) fn has_detours(&self, over: Vec<i32>) {
        // Set once, before anybody asks.
        let _ = self.detours.set(over);
    }

    /// The number of the second way over that GPU.
    pub(super) fn detour(&self, over: i32) -> Option<usize> {
        self.detours.get()?.iter().position(|&ordinal| ordinal == over)
    }

    /// Lends weights that are wholly here to another GPU; `None` where they are not, or where it cannot reach them.
    pub(super) fn lend(self: &Arc<Self>, id: RangeId, to: i32) -> Option<Lent> {
        let mut books = self.books().ok()?;
        let range = books.ranges.get(id).ok()?;
        if range.state != State::Resident || range.unfinished || !self.readers.contains(&to) {
            return None;
        }
        let placed = Arc::clone(range.placed.as_ref()?);
        range.readers += 1;
        Some(Lent::new(Arc::clone(self), id, placed))
    }

    pub(super) fn books(&self) -> Result<MutexGuard<'_, Books>, DeviceError> {
        let books = self.lock();
        if self.is_lost() { Err(DeviceError::Lost) } else { Ok(books) }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::SeqCst)
    }

    /// The device is lost: everyone who waits is told.
    pub(super) fn lose(&self) {
        let _books = self.lock();
        self.lost.store(true, Ordering::SeqCst);
        self.tell();
        self.work.notify_all();
    }

    /// Takes note of a failure that costs the device.
    pub(super) fn noted<T>(&self, result: Result<T, DeviceError>) -> Result<T, DeviceError> {
        if matches!(result, Err(DeviceError::Lost)) && !self.is_lost() {
            self.lose();
        }
        result
    }

    pub(super) fn close(&self) {
        self.lock().closing = true;
        self.work.notify_all();
        self.tell();
    }

    fn tell(&self) {
        self.told.fetch_add(1, Ordering::SeqCst);
        self.news.notify_all();
    }

    pub(super) fn queue(&self, books: &mut Books, job: Job) -> Result<(), DeviceError> {
        if books.queue.len() >= SWAPS_QUEUED_MAX {
            let reason = format!("{SWAPS_QUEUED_MAX} swaps are queued already");
            return Err(DeviceError::Failed { call: "queueing a swap", reason });
        }
        books.queue.push_back(job);
        self.work.notify_one();
        Ok(())
    }

    pub(super) fn pop_job(&self) -> Option<Job> {
        self.lock().queue.pop_front()
    }

    /// The next swap, when there is one; where there is none, nothing if the link has `other` work.
    pub(super) fn next_job(&self, other: bool) -> Next {
        let mut books = self.lock();
        loop {
            if self.is_lost() {
                return Next::End;
            }
            if let Some(job) = books.queue.pop_front() {
                return Next::Job(job);
            }
            if books.closing {
                return Next::End;
            }
            if other {
                let (woken, slept) = self.work.wait_timeout(books, IDLE_AFTER).unwrap_or_else(PoisonError::into_inner);
                books = woken;
                if slept.timed_out() && books.queue.is_empty() {
                    return Next::Nothing;
                }
                continue;
            }
            books = self.work.wait(books).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Changes a range that a job is for: it cannot be released meanwhile.
    pub(super) fn change<T>(&self, id: RangeId, change: impl FnOnce(&mut Range) -> T) -> T {
        let mut books = self.lock();
        let changed = change(books.ranges.get(id).expect("a range with swaps under way is not released"));
        drop(books);
        self.tell();
        changed
    }

    /// Counts the caller as a reader of a range until what this returns is dropped.
    pub(super) fn read(&self, id: RangeId) -> Result<Reading<'_>, DeviceError> {
        self.books()?.ranges.get(id)?.readers += 1;
        Ok(Reading { shared: self, range: id })
    }

    /// As above, where the weights are there.
    pub(super) fn read_resident(&self, id: RangeId) -> Result<Option<Reading<'_>>, DeviceError> {
        let mut books = self.books()?;
        let range = books.ranges.get(id)?;
        if range.state != State::Resident {
            return Ok(None);
        }
        range.readers += 1;
        Ok(Some(Reading { shared: self, range: id }))
    }

    /// Takes a step of the link.
    pub(super) fn step(&self, id: RangeId, step: Step) {
        self.change(id, |range| {
            let next = range.state.after(step);
            range.state = next.unwrap_or_else(|| panic!("range {id:?} is {:?} at {step:?}", range.state));
        });
    }

    /// Waits until something that `ready` looks for has come about. `ready` sees the range, and ends the wait. Looks for
    /// so long before it sleeps: waking up takes longer than what is waited for where that is near.
    pub(super) fn wait_until<T>(
        &self,
        id: RangeId,
        look: Duration,
        mut ready: impl FnMut(&mut Range) -> Option<Result<T, DeviceError>>,
    ) -> Result<T, DeviceError> {
        let started = Instant::now();
        let mut books = self.books()?;
        loop {
            if let Some(outcome) = ready(books.ranges.get(id)?) {
                return outcome;
            }
            if started.elapsed() < look {
                let told = self.told.load(Ordering::SeqCst);
                drop(books);
                while self.told.load(Ordering::SeqCst) == told && started.elapsed() < look {
                    std::hint::spin_loop();
                }
                books = self.books()?;
                continue;
            }
            books = self.news.wait(books).unwrap_or_else(PoisonError::into_inner);
            if self.is_lost() {
                return Err(DeviceError::Lost);
            }
        }
    }

    /// Waits until the weights have a place, which they keep for as long as the caller reads the range.
    pub(super) fn wait_placed(&self, id: RangeId, look: Duration) -> Result<Arc<Placement>, DeviceError> {
        self.wait_until(id, look, |range| match (&range.placed, &range.failed, range.state) {
            (Some(placed), _, _) => Some(Ok(Arc::clone(placed))),
            (None, Some(failed), _) => Some(Err(failed.clone())),
            (None, None, State::Out) => Some(Err(is_out(id))),
            (None, None, State::Queued | State::Copying | State::Resident | State::Leaving) => None,
        })
    }

    /// Waits until the copies of the groups `0..=group` are queued on the link; returns the event of the last of them.
    pub(super) fn wait_recorded(&self, id: RangeId, group: u32, look: Duration) -> Result<(), DeviceError> {
        self.wait_until(id, look, |range| {
            if range.lent || (range.recorded > group && range.state != State::Out) {
                return Some(Ok(()));
            }
            if let Some(failed) = &range.failed {
                return Some(Err(failed.clone()));
            }
            match range.state {
                State::Out => Some(Err(is_out(id))),
                State::Queued | State::Copying | State::Resident | State::Leaving if group >= range.groups => {
                    Some(Err(DeviceError::Invalid("the weights have no such group")))
                }
                State::Queued | State::Copying | State::Resident | State::Leaving => None,
            }
        })
    }
}

fn is_out(range: RangeId) -> DeviceError {
    DeviceError::State { range, state: State::Out.name(), wanted: State::Resident.name() }
}

/// A reader of a range, whose memory stays for so long.
pub(super) struct Reading<'s> {
    shared: &'s Shared,
    range: RangeId,
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        self.shared.change(self.range, |range| range.readers -= 1);
    }
}
