//! The device without a GPU: the same path, with the processor as its accelerator.
//!
//! Not a mock. Memory is a bounded pool, programs see it at fixed addresses, touching what is swapped out faults, and a
//! link of its own copies group after group, at the machine's speed or at a configured one. Several of them in a process
//! stand for several GPUs. Needs Linux 5.14.

mod arena;
mod copy;
mod link;
mod pool;
mod shared;

use std::{
    fmt, ptr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Instant,
};

use faaswap_protocol::Bytes;

pub use self::shared::SWAPS_QUEUED_MAX;
use self::{
    arena::{Arena, Reservation, at},
    link::Link,
    shared::{Job, Range, Shared, Swap},
};
use crate::{
    Device, DeviceError, DeviceInfo, DeviceMemory, Group, HostWeights, OnDone, RangeId, Stream, SwapReport,
    range::{State, Step, addresses, count_groups},
};

/// Size of a chunk where nothing else is asked for: what the kernel moves in one go.
pub const CHUNK_DEFAULT: Bytes = Bytes::mib(2);

/// What a host device shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostConfig {
    /// For logs and metrics.
    pub name: String,
    /// Memory for weights; what is more than whole chunks is left out.
    pub capacity: Bytes,
    /// Memory is given out in chunks of this size, a multiple of the page size.
    pub chunk: Bytes,
    /// Speed of the link, to stand for a real one; as fast as the machine can where there is none.
    pub link_bytes_per_second: Option<u64>,
    /// Whether to take all memory from the system at the start. Takes 0.2 to 1 s per GB, which swap-ins pay otherwise.
    pub populate: bool,
}

impl HostConfig {
    /// A device with so much memory and the usual rest.
    pub fn new(name: impl Into<String>, capacity: Bytes) -> Self {
        Self { name: name.into(), capacity, chunk: CHUNK_DEFAULT, link_bytes_per_second: None, populate: true }
    }
}

/// A host device. Dropping it ends its thread, fails the swaps still queued and unmaps everything.
pub struct HostDevice {
    shared: Arc<Shared>,
    link: Mutex<Option<JoinHandle<()>>>,
}

impl HostDevice {
    /// Takes the memory and starts the link.
    pub fn new(config: HostConfig) -> Result<Arc<Self>, DeviceError> {
        let HostConfig { name, capacity, chunk, link_bytes_per_second, populate } = config;
        let page = Bytes::of_len(rustix::param::page_size());
        if chunk == Bytes::ZERO || !chunk.get().is_multiple_of(page.get()) {
            return Err(DeviceError::Invalid("the size of a chunk must be a multiple of the page size"));
        }
        if link_bytes_per_second == Some(0) {
            return Err(DeviceError::Invalid("a link needs a speed above 0"));
        }
        let (Some(chunk_len), Some(wanted)) = (chunk.as_len(), capacity.as_len()) else {
            return Err(DeviceError::Invalid("the device is larger than this machine can address"));
        };
        let chunks = wanted / chunk_len;
        if chunks == 0 {
            return Err(DeviceError::Invalid("the device must hold at least one chunk"));
        }
        let arena = Arena::new(chunks * chunk_len)?;
        if populate {
            arena.populate(&name)?;
        }
        let info = DeviceInfo { name, capacity: Bytes::of_len(chunks * chunk_len), chunk };
        let thread = thread::Builder::new().name(format!("link-{}", info.name));
        let shared = Arc::new(Shared::new(info, arena));
        let link = Link::new(Arc::clone(&shared), chunks, chunk_len, link_bytes_per_second);
        let link = thread
            .spawn(move || link.run())
            .map_err(|e| DeviceError::Failed { call: "starting the link thread", reason: e.to_string() })?;
        Ok(Arc::new(Self { shared, link: Mutex::new(Some(link)) }))
    }

    /// Declares the device lost, as a driver would: swaps queued, those who await groups, and all later calls get
    /// [`DeviceError::Lost`]. What runs on its memory can end; the memory goes when the device is dropped.
    pub fn lose(&self) {
        self.shared.lose();
    }

    fn queue(
        &self,
        range: RangeId,
        step: Step,
        check: impl FnOnce(&mut Range) -> Result<(), DeviceError>,
        swap: Swap,
    ) -> Result<(), DeviceError> {
        let mut books = self.shared.books()?;
        if !books.has_room() {
            let reason = format!("{SWAPS_QUEUED_MAX} swaps are queued already");
            return Err(DeviceError::Failed { call: "queueing a swap", reason });
        }
        let found = books.ranges.get(range)?;
        check(found)?;
        let reservation = Arc::clone(&found.reservation);
        let wanted = if step == Step::AskIn { State::Out } else { State::Resident };
        found.ask(range, step, wanted.name())?;
        self.shared.queue(&mut books, Job { range, reservation, swap });
        Ok(())
    }
}

impl Device for HostDevice {
    fn info(&self) -> &DeviceInfo {
        &self.shared.info
    }

    fn is_lost(&self) -> bool {
        self.shared.is_lost()
    }

    fn fail(&self) {
        self.lose();
    }

    fn memory(&self) -> DeviceMemory {
        let mapped = Bytes::new(AtomicU64::load(&self.shared.mapped, Ordering::SeqCst));
        DeviceMemory { capacity: self.shared.info.capacity, mapped }
    }

    fn reserve(&self, weights: Bytes) -> Result<RangeId, DeviceError> {
        let DeviceInfo { capacity, chunk, .. } = self.shared.info;
        let len = addresses(weights, chunk).ok_or(DeviceError::Invalid("more weights than can be"))?;
        if len > capacity {
            return Err(DeviceError::OutOfMemory { needed: len, free: capacity });
        }
        let len = len.as_len().ok_or(DeviceError::Invalid("more weights than can be"))?;
        drop(self.shared.books()?);
        let reservation = Arc::new(Reservation::new(len)?);
        self.shared.books()?.ranges.insert(Range { reservation, weights, state: State::Out, groups: 0, failed: None })
    }

    fn release(&self, range: RangeId) -> Result<(), DeviceError> {
        let mut books = self.shared.books()?;
        let state = books.ranges.get(range)?.state;
        if state != State::Out {
            return Err(DeviceError::State { range, state: state.name(), wanted: State::Out.name() });
        }
        let removed = books.ranges.remove(range);
        drop(books);
        drop(removed);
        Ok(())
    }

    fn address(&self, range: RangeId) -> Result<usize, DeviceError> {
        Ok(self.shared.books()?.ranges.get(range)?.reservation.base())
    }

    fn swap_in(
        &self,
        range: RangeId,
        weights: Arc<HostWeights>,
        groups: Arc<[Group]>,
        done: OnDone<SwapReport>,
    ) -> Result<(), DeviceError> {
        let (size, count) = (weights.size(), count_groups(&groups, weights.size())?);
        let check = |range: &mut Range| {
            if size != range.weights {
                return Err(DeviceError::Invalid("the weights have another size than the range"));
            }
            if range.state == State::Out {
                (range.groups, range.failed) = (count, None);
            }
            Ok(())
        };
        self.queue(range, Step::AskIn, check, Swap::In { weights, groups, asked: Instant::now(), done })
    }

    fn swap_out(&self, range: RangeId, done: OnDone<()>) -> Result<(), DeviceError> {
        self.queue(range, Step::AskOut, |_| Ok(()), Swap::Out { done })
    }

    fn await_group(&self, range: RangeId, group: u32, stream: Stream) -> Result<(), DeviceError> {
        if stream != Stream::CALLER {
            return Err(DeviceError::Invalid("the host device has no streams, only its caller can wait"));
        }
        self.shared.wait_for(range, group)
    }

    fn read_back(&self, range: RangeId, offset: u64, into: &mut [u8]) -> Result<(), DeviceError> {
        let mut books = self.shared.books()?;
        let found = books.ranges.get(range)?;
        if found.state != State::Resident {
            let (state, wanted) = (found.state.name(), State::Resident.name());
            return Err(DeviceError::State { range, state, wanted });
        }
        let end = offset.checked_add(Bytes::of_len(into.len()).get());
        let (Some(_), Ok(offset)) = (end.filter(|&end| end <= found.weights.get()), usize::try_from(offset)) else {
            return Err(DeviceError::Invalid("the weights end before what is to be read"));
        };
        let reservation = Arc::clone(&found.reservation);
        // Taken under the lock: a swap-out that is asked for from now on waits for this reader.
        let _reader = reservation.readers.read().unwrap_or_else(PoisonError::into_inner);
        drop(books);
        let from = at(reservation.base() + offset).cast::<u8>();
        // SAFETY: the stretch lies in the weights of a range that is swapped in, and stays so while the reader's lock is
        // held; `into` is a unique slice. A program only reads its weights.
        unsafe { ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        Ok(())
    }
}

impl Drop for HostDevice {
    fn drop(&mut self) {
        self.shared.close();
        let link = self.link.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        // The last owner may be a swap's own callback, on the very thread, which then ends by itself.
        if let Some(link) = link.filter(|link| link.thread().id() != thread::current().id())
            && link.join().is_err()
        {
            tracing::error!(device = self.shared.info.name, "the link thread had panicked");
        }
    }
}

impl fmt::Debug for HostDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostDevice").field("info", &self.shared.info).finish_non_exhaustive()
    }
}
