//! A GPU: chunks of its memory taken at the start, mapped at fixed addresses, and programs that wait for weights.
//!
//! Nothing on the path of a request allocates device memory. Weights come from a pool of uniform chunks; constants,
//! scratch, inputs and outputs have arenas of their own (see `arena`). Programs are CUDA graphs whose waits are for
//! events of the link: a program may be launched as soon as all copies of its weights are *queued*.

mod ahead;
mod arena;
mod binding;
mod chunks;
mod config;
mod cover;
mod detour;
mod device;
mod drawn;
mod driver;
mod foreign;
mod host_memory;
mod kernels;
mod lane;
mod link;
mod measure;
mod order;
mod peer;
mod placement;
mod pool;
mod probe;
mod program;
mod queue;
mod registered;
mod rewrite;
mod shared;
mod source;
mod stages;
mod twins;

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    sync::{
        Arc, Condvar, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc::sync_channel,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use faaswap_protocol::Bytes;

use self::{
    ahead::{Ahead, Spare},
    arena::{Arena, Purpose},
    detour::Detour,
    driver::{Addresses, Physical},
    foreign::Pools,
    kernels::Kernels,
    lane::Lane,
    link::Link,
    pool::Pool,
    queue::{Event, Queue},
    shared::{Job, Range, Shared, Swap},
    source::Source,
    twins::Kinds,
};
pub use self::{
    config::{BINDING_DEFAULT, CHUNK_DEFAULT, CudaConfig, RESERVE_DEFAULT, SCRATCH_MAX_DEFAULT},
    lane::{Alone, Constants, IO_ALIGN, IO_BYTES_MAX, Run},
    probe::{PROBE_WITHIN, measure_links},
    program::{Drawing, Program, RunTimes},
    registered::Registered,
    shared::SWAPS_QUEUED_MAX,
    twins::{COMPARED_MAX, KINDS_MAX, KindKey, Origin, Template},
};
pub(crate) use self::{driver::Context, host_memory::Registration};
use crate::{
    DeviceError, DeviceInfo, Group, OnDone, RangeId, Stream, SwapReport,
    range::{State, Step, count_groups},
};

/// The CUDA version that a driver must support at least, in the driver's way of writing it.
pub const DRIVER_CUDA_MIN: i32 = 13_000;
/// How long a program that is to be launched looks for its weights' copies to be queued, before it sleeps.
const QUEUED_LOOKS_FOR: Duration = Duration::from_micros(300);
/// Bytes of weights that arrive while a thread wakes up.
const LATE_BYTES: u64 = 16 << 20;
/// Most constants of all models.
const CONSTANTS_MAX: usize = 64 << 30;

/// Whether this machine has a CUDA driver, of whatever version.
pub fn is_present() -> bool {
    driver::is_present()
}

/// How many GPUs are visible; an error says what is missing.
pub fn count() -> Result<i32, DeviceError> {
    driver::count()
}

/// Address and length.
type Stretch = (u64, u64);

/// Memory other than the pool: arenas, by purpose.
pub(crate) struct Memory {
    /// Those for programs, then those for binding, then the device's own.
    lanes: Vec<Lane>,
    binding: usize,
    kernels: Kernels,
    constants: Mutex<(Arena, HashMap<u64, Vec<Stretch>>)>,
    owners: AtomicU64,
    /// Whether this GPU reads registered memory at the host's addresses.
    reads_registered: bool,
}

impl Memory {
    fn new_owner(&self) -> u64 {
        self.owners.fetch_add(1, Ordering::Relaxed)
    }

    /// Stretches of an owner's constants, in the order in which they were taken.
    fn kept(&self, owner: u64) -> Vec<Stretch> {
        let (_, owners) = &*self.constants.lock().unwrap_or_else(PoisonError::into_inner);
        owners.get(&owner).cloned().unwrap_or_default()
    }

    fn give_up(&self, owner: u64) {
        let (arena, owners) = &mut *self.constants.lock().unwrap_or_else(PoisonError::into_inner);
        for (address, _) in owners.remove(&owner).into_iter().flatten() {
            arena.give(address);
        }
    }
}

/// A GPU.
pub struct CudaDevice {
    shared: Arc<Shared>,
    memory: Arc<Memory>,
    /// Lies behind ranges while models are bound; what is there does not matter.
    dummy: Physical,
    /// The lanes that nobody binds in now.
    binding: Mutex<Vec<usize>>,
    bound: Condvar,
    /// Held by whoever captures, and shared by those who may spoil that.
    capturing: RwLock<()>,
    next_lane: AtomicUsize,
    /// For what is brought to the device when models are bound: what graphs need there, and constants.
    uploads: Queue,
    /// What twins are made of; `None` where none are made.
    kinds: Option<Kinds>,
    ordinal: i32,
    /// The pool's chunks, where other processes may have them.
    exported: Option<Arc<Vec<Physical>>>,
    /// Those of GPUs that other processes have.
    pools: Pools,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl CudaDevice {
    /// Takes the memory and starts the threads.
    pub fn open(config: &CudaConfig) -> Result<Arc<Self>, DeviceError> {
        let ordinal = i32::try_from(config.ordinal).map_err(|_| DeviceError::Invalid("there is no such GPU"))?;
        let context = Context::open(ordinal)?;
        let granularity = context.granularity()?;
        if config.chunk == Bytes::ZERO || !config.chunk.get().is_multiple_of(granularity.get()) {
            return Err(DeviceError::Invalid("the size of a chunk must be a multiple of the GPU's granularity, 2 MiB"));
        }
        let chunk = config.chunk.as_len().ok_or(DeviceError::Invalid("a chunk larger than can be"))?;
        let (free, total) = context.memory()?;
        let wanted = config.memory.unwrap_or_else(|| free.checked_sub(config.reserve).unwrap_or(Bytes::ZERO));
        let pool = Pool::new(&context, wanted, (chunk, config), &others(&config.peers, ordinal))?;
        let (taken, capacity) = (pool.size(), pool.capacity());
        if capacity == Bytes::ZERO {
            return Err(DeviceError::OutOfMemory { needed: wanted.max(config.chunk), free });
        }
        if config.memory.is_some_and(|wanted| taken.get() + config.chunk.get() <= wanted.get()) {
            tracing::warn!(name = config.name, %wanted, %taken, %free, "the GPU has less free memory than asked for");
        }
        tracing::info!(name = config.name, gpu = context.model_name()?, %total, %free, weights = %capacity, "GPU");
        let info = DeviceInfo { name: config.name.clone(), capacity, chunk: config.chunk };
        let scratch = config.scratch_max.as_len().ok_or(DeviceError::Invalid("more scratch than can be"))?;
        let lanes = (0..config.lanes.max(1) + config.binding.max(1) + 1)
            .map(|_| Lane::new(&context, scratch))
            .collect::<Result<_, _>>()?;
        let constants = Mutex::new((Arena::new(&context, CONSTANTS_MAX)?, HashMap::new()));
        let kernels = Kernels::load(&context)?;
        let uploads = Queue::new(&context)?;
        let memory = Arc::new(Memory {
            lanes,
            kernels,
            binding: config.binding.max(1),
            constants,
            owners: AtomicU64::new(0),
            reads_registered: context.reads_registered()?,
        });
        let dummy = Physical::new(&context, chunk)?;
        zero(&context, &dummy, chunk)?;
        let shared = Arc::new(Shared::new(info, context, &pool));
        let exported = config.shared.then(|| pool.all_memory());
        let threads = start_threads(&shared, pool, &others(&config.detours, ordinal))?;
        let threads = Mutex::new(threads);
        let first = config.lanes.max(1);
        let binding = Mutex::new((first..first + config.binding.max(1)).collect());
        Ok(Arc::new(Self {
            shared,
            memory,
            dummy,
            binding,
            bound: Condvar::new(),
            capturing: RwLock::new(()),
            next_lane: AtomicUsize::new(0),
            uploads,
            kinds: config.twins.then(Kinds::default),
            ordinal,
            exported,
            pools: Pools::default(),
            threads,
        }))
    }

    /// The driver's number of this GPU.
    pub fn ordinal(&self) -> i32 {
        self.ordinal
    }

    /// The GPU's compute capability, 90 for 9.0: kernels chosen on one suit all of a kind.
    pub fn capability(&self) -> Result<i32, DeviceError> {
        self.shared.context.capability()
    }

    /// Makes this GPU the one that the calling thread's libraries work on.
    pub fn enter(&self) -> Result<(), DeviceError> {
        self.shared.context.enter()
    }

    /// Free and total memory of the GPU, by the driver's count.
    pub fn driver_memory(&self) -> Result<(Bytes, Bytes), DeviceError> {
        self.shared.context.memory()
    }

    /// Declares the device lost.
    pub fn lose(&self) {
        self.shared.lose();
    }

    /// Device memory for the purpose that the calling thread has named; the device's own scratch where it named none.
    pub fn allocate(&self, len: usize) -> Result<usize, DeviceError> {
        let address = match arena::purpose().unwrap_or(Purpose::Scratch(self.own_lane())) {
            Purpose::Constants(owner) => {
                let (arena, owners) = &mut *self.memory.constants.lock().unwrap_or_else(PoisonError::into_inner);
                let address = arena.take(len)?;
                owners.entry(owner).or_default().push((address, len as u64));
                address
            }
            Purpose::Scratch(lane) => self.memory.lanes[lane].scratch().take(len)?,
        };
        usize::try_from(address).map_err(|_| DeviceError::Invalid("an address that does not fit"))
    }

    /// Gives memory back. Constants stay until their model goes: its programs use them.
    pub fn free(&self, address: usize) {
        let address = address as u64;
        for lane in &self.memory.lanes {
            let mut scratch = lane.scratch();
            if scratch.holds(address) {
                if !scratch.give(address) {
                    tracing::error!(address, "scratch memory was given back that nobody had taken");
                }
                return;
            }
        }
    }

    /// Memory that models' constants take of theirs.
    pub fn constants_taken(&self) -> Bytes {
        Bytes::of_len(self.memory.constants.lock().unwrap_or_else(PoisonError::into_inner).0.taken())
    }

    /// Memory of constants and of scratch, by our count.
    pub fn arenas(&self) -> (Bytes, Bytes) {
        let constants = self.memory.constants.lock().unwrap_or_else(PoisonError::into_inner).0.mapped();
        let scratch = self.memory.lanes.iter().map(|lane| lane.scratch().mapped() + lane.workspace().mapped()).sum();
        (Bytes::of_len(constants), Bytes::of_len(scratch))
    }

    /// Waits until the copies of the range's first groups, so many, are queued and have memory behind their addresses: so
    /// that a part of a program that waits for them may be launched.
    pub(super) fn wait_queued(&self, range: RangeId, groups: u32) -> Result<(), DeviceError> {
        match groups.checked_sub(1) {
            Some(last) => self.shared.wait_recorded(range, last, QUEUED_LOOKS_FOR),
            None => Ok(()),
        }
    }

    /// A moment of the range's swap-in when little of it is left, where one is under way.
    fn late_copy(&self, range: RangeId) -> Result<Option<Arc<Event>>, DeviceError> {
        let mut books = self.shared.books()?;
        let found = books.ranges.get(range)?;
        match found.late_group {
            Some(late) if found.state != State::Resident => books.event(&self.shared.context, range, late).map(Some),
            _ => Ok(None),
        }
    }

    /// Copies within the device, behind what is queued on the stream.
    pub fn copy_within(&self, stream: Stream, to: usize, from: usize, len: usize) -> Result<(), DeviceError> {
        // SAFETY: the engine names the stream of a kernel that is being run and tensors that the run has allocated.
        self.shared.noted(unsafe { queue::copy_within(stream.0, to, from, len) })
    }

    /// Sets device memory to zeros.
    pub fn zero(&self, address: usize, len: usize) -> Result<(), DeviceError> {
        self.shared.noted(self.shared.context.zero(address as u64, len.max(1)))
    }

    /// Waits for everything on the device: for measurements.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        self.shared.noted(self.shared.context.synchronize())
    }

    /// Reads device memory at an address, for tests.
    #[doc(hidden)]
    pub fn peek(&self, address: usize, into: &mut [u8]) -> Result<(), DeviceError> {
        self.shared.context.read(address as u64, into)
    }

    fn queue_in(
        &self,
        range: RangeId,
        size: Bytes,
        source: Source,
        groups: Arc<[Group]>,
        done: OnDone<SwapReport>,
    ) -> Result<(), DeviceError> {
        let (count, late) = (count_groups(&groups, size)?, late_group(&groups, size));
        let check = |range: &mut Range| {
            if size != range.weights {
                return Err(DeviceError::Invalid("the weights have another size than the range"));
            }
            if range.state == State::Out {
                (range.groups, range.recorded, range.failed) = (count, 0, None);
                range.late_group = late;
            }
            Ok(())
        };
        let asked = Instant::now();
        self.queue(range, Step::AskIn, check, Swap::In { source, groups, asked, done })
    }

    fn queue(
        &self,
        range: RangeId,
        step: Step,
        check: impl FnOnce(&mut Range) -> Result<(), DeviceError>,
        swap: Swap,
    ) -> Result<(), DeviceError> {
        let mut books = self.shared.books()?;
        let found = books.ranges.get(range)?;
        check(found)?;
        let wanted = if step == Step::AskIn { State::Out } else { State::Resident };
        let before = found.state;
        let next = before.after(step).filter(|_| !found.lent);
        found.state = next.ok_or(DeviceError::State { range, state: before.name(), wanted: wanted.name() })?;
        let queued = self.shared.queue(&mut books, Job { range, swap });
        if queued.is_err() {
            books.ranges.get(range)?.state = before;
        }
        queued
    }
}

/// The group behind which so little is left to copy that waking up takes about as long.
fn late_group(groups: &[Group], size: Bytes) -> Option<u32> {
    let late = size.get().checked_sub(LATE_BYTES)?;
    let group = groups.iter().position(|group| group.offset + group.len >= late)?;
    u32::try_from(group).ok().filter(|_| group + 1 < groups.len())
}

fn zero(context: &Arc<Context>, memory: &Physical, len: usize) -> Result<(), DeviceError> {
    let addresses = Addresses::reserve(context, len)?;
    addresses.map(0, memory, len)?;
    let zeroed = addresses.open(0, len).and_then(|()| context.zero(addresses.base(), len));
    zeroed.and(addresses.unmap(0, len))
}

/// GPUs by the driver's own type of number, without this one.
fn others(gpus: &[u32], this: i32) -> Vec<i32> {
    gpus.iter().filter_map(|&gpu| i32::try_from(gpu).ok()).filter(|&gpu| gpu != this).collect()
}

fn start_threads(shared: &Arc<Shared>, pool: Pool, over: &[i32]) -> Result<Vec<JoinHandle<()>>, DeviceError> {
    let failed = |e: std::io::Error| DeviceError::Failed { call: "starting the link's threads", reason: e.to_string() };
    let (ends, copying) = sync_channel(link::AHEAD_MAX);
    let (spare, finishing) = (Spare::default(), Arc::clone(shared));
    let given = spare.clone();
    let finish = thread::Builder::new()
        .name(format!("ends-{}", shared.info.name))
        .spawn(move || link::finish(&finishing, &copying, &given))
        .map_err(failed)?;
    let context = &shared.context;
    let maps_first = order::mapping_waits(context, &pool).unwrap_or_else(|error| {
        tracing::warn!(%error, "whether mapping waits for copies cannot be measured");
        false
    });
    let mut detours = Vec::new();
    for &other in over {
        detours.extend(Detour::new(context, other)?);
    }
    shared.has_detours(detours.iter().map(|detour| detour.ordinal).collect());
    let (copies, order, copied) = (Queue::new(context)?, Queue::new(context)?, Event::new(context)?);
    let link = Link {
        shared: Arc::clone(shared),
        pool,
        copies,
        detours,
        order,
        copied,
        ends,
        stale: VecDeque::new(),
        ahead: Ahead::new(),
        spare,
        maps_first,
        placements: 0,
    };
    let link =
        thread::Builder::new().name(format!("link-{}", shared.info.name)).spawn(move || link.run()).map_err(failed)?;
    Ok(vec![link, finish])
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        self.shared.close();
        let threads = self.threads.get_mut().unwrap_or_else(PoisonError::into_inner);
        for thread in threads.drain(..).filter(|other| other.thread().id() != thread::current().id()) {
            if thread.join().is_err() {
                tracing::error!(device = self.shared.info.name, "a thread of the device had panicked");
            }
        }
    }
}

impl fmt::Debug for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaDevice").field("info", &self.shared.info).finish_non_exhaustive()
    }
}
