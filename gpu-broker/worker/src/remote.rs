//! The device of a worker, as the broker's other parts see one.

mod swaps;
mod weights;

use std::{
    collections::HashMap,
    fmt,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU32, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use faaswap_device::{
    Device, DeviceError, DeviceInfo, DeviceMemory, Group, HostWeights, OnDone, PciAddress, RangeId, Stream, SwapReport,
    cuda::KindKey,
};
use faaswap_protocol::Bytes;

use crate::{
    life::{Life, TellChunks},
    message::{Answer, DeviceSpec, Facts, ModelId, Spec, ToWorker},
};

/// How long a device that is made to fail may take to do so.
const FAILS_WITHIN: Duration = Duration::from_secs(5);

/// A device in a process of its own. Where that ends, the device is lost, and can be opened anew.
pub struct RemoteDevice {
    me: Weak<Self>,
    program: PathBuf,
    spec: Spec,
    info: DeviceInfo,
    facts: Facts,
    life: Mutex<(Arc<Life>, Option<JoinHandle<()>>)>,
    ranges: Mutex<HashMap<RangeId, Ranged>>,
    range_next: AtomicU32,
    model_next: AtomicU32,
    others: Mutex<Vec<Weak<Self>>>,
}

/// The weights of a model in the worker.
struct Ranged {
    life: Weak<Life>,
    model: ModelId,
    /// Where all of them are in the pool, while they are there.
    chunks: Vec<u32>,
    /// Counts swap-ins and swap-outs that were asked for.
    stay: u64,
}

impl RemoteDevice {
    /// Starts a worker: `program` with the argument `worker`. Blocks until its device is open.
    pub fn open(program: &Path, spec: Spec) -> Result<Arc<Self>, DeviceError> {
        let later: Arc<Mutex<Weak<Self>>> = Arc::default();
        let (life, facts, thread) = Life::start(program, &spec, tell_chunks(&later))?;
        let info = DeviceInfo { name: spec.device.name().to_owned(), capacity: facts.capacity, chunk: facts.chunk };
        let spec = spec.with_memory_of(&facts);
        let device = Arc::new_cyclic(|me: &Weak<Self>| Self {
            me: me.clone(),
            program: program.to_owned(),
            spec,
            info,
            facts,
            life: Mutex::new((life, Some(thread))),
            ranges: Mutex::default(),
            range_next: AtomicU32::new(0),
            model_next: AtomicU32::new(0),
            others: Mutex::default(),
        });
        *later.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&device);
        Ok(device)
    }

    /// Lets each of these devices copy weights from the others, where they are GPUs.
    pub fn introduce(devices: &[Arc<Self>]) {
        for device in devices {
            let others = devices.iter().filter(|other| !Arc::ptr_eq(other, device)).map(Arc::downgrade);
            *device.others.lock().unwrap_or_else(PoisonError::into_inner) = others.collect();
        }
        devices.iter().for_each(|device| device.share(None));
    }

    /// A GPU's compute capability.
    pub fn capability(&self) -> Option<i32> {
        self.facts.capability
    }

    /// The worker now.
    pub(crate) fn life(&self) -> Arc<Life> {
        Arc::clone(&self.lives().0)
    }

    fn lives(&self) -> MutexGuard<'_, (Arc<Life>, Option<JoinHandle<()>>)> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ranges(&self) -> MutexGuard<'_, HashMap<RangeId, Ranged>> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn new_model(&self) -> ModelId {
        self.model_next.fetch_add(1, Ordering::Relaxed)
    }

    /// A number for the weights of a model that was bound.
    pub(crate) fn range_of(&self, life: &Arc<Life>, model: ModelId) -> RangeId {
        let range = RangeId(self.range_next.fetch_add(1, Ordering::Relaxed));
        self.ranges().insert(range, Ranged { life: Arc::downgrade(life), model, chunks: Vec::new(), stay: 0 });
        range
    }

    pub(crate) fn forget(&self, range: RangeId) {
        self.ranges().remove(&range);
    }

    /// The model of a range, and the worker, which is the one that has bound it.
    fn found(&self, range: RangeId) -> Result<(Arc<Life>, ModelId), DeviceError> {
        let life = self.life();
        let ranges = self.ranges();
        let found = ranges.get(&range).ok_or(DeviceError::Invalid("a range that nobody has reserved"))?;
        let is_of_now = found.life.upgrade().is_some_and(|theirs| Arc::ptr_eq(&theirs, &life));
        if is_of_now && !life.is_lost() { Ok((life, found.model)) } else { Err(DeviceError::Lost) }
    }

    fn gpu(&self) -> Option<u32> {
        match self.spec.device {
            DeviceSpec::Gpu { ordinal, .. } => Some(ordinal),
            DeviceSpec::Host { .. } => None,
        }
    }

    fn others(&self) -> Vec<Arc<Self>> {
        let others = self.others.lock().unwrap_or_else(PoisonError::into_inner);
        others.iter().filter_map(Weak::upgrade).collect()
    }

    /// Has the worker give its pool's chunks to all others, or to one.
    fn share(&self, to: Option<u32>) {
        if self.gpu().is_none() || self.others().is_empty() {
            return;
        }
        match self.life().ask(|call| ToWorker::Share { call, to }) {
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, name = self.info.name, "no GPU copies weights from this one's memory");
            }
        }
    }

    /// Hands some of this pool's chunks on.
    fn hand_on(&self, to: Option<u32>, chunks: &[OwnedFd]) {
        let Some(gpu) = self.gpu() else { return };
        let chunk = self.info.chunk;
        let of = u32::try_from(self.facts.chunks).unwrap_or(u32::MAX);
        let fds: Vec<_> = chunks.iter().map(AsFd::as_fd).collect();
        let others = self.others().into_iter().filter(|other| to.is_none() || other.gpu() == to);
        for other in others {
            // One that is lost gets them when it is back; one that does not get all of them copies from host memory.
            if let Err(error) = other.life().offer(&ToWorker::Chunks { gpu, chunk, of }, &fds) {
                tracing::debug!(%error, from = self.info.name, to = other.info.name, "a GPU's memory is not shared");
            }
        }
    }
}

/// Hands chunks on to the other workers.
fn tell_chunks(device: &Arc<Mutex<Weak<RemoteDevice>>>) -> TellChunks {
    let device = Arc::clone(device);
    Box::new(move |to, chunks| {
        let device = device.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        if let Some(device) = device {
            device.hand_on(to, &chunks);
        }
    })
}

fn unexpected(answer: &Answer) -> DeviceError {
    tracing::error!(?answer, "a device's process answers something else than it was asked");
    DeviceError::Invalid("the device's process answers something else than it was asked")
}

impl Device for RemoteDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn is_lost(&self) -> bool {
        self.life().is_lost()
    }

    fn fail(&self) {
        let life = self.life();
        // One that does not listen is lost already.
        let _ = life.say(&ToWorker::Fail, &[]);
        let until = Instant::now() + FAILS_WITHIN;
        while !life.is_lost() && Instant::now() < until {
            thread::sleep(Duration::from_millis(1));
        }
        if !life.is_lost() {
            tracing::error!(name = self.info.name, "the device does not fail as it was told: its process is ended");
            life.end();
        }
    }

    fn memory(&self) -> DeviceMemory {
        DeviceMemory { capacity: self.info.capacity, mapped: Bytes::new(self.life().mapped.load(Ordering::Relaxed)) }
    }

    fn reserve(&self, _weights: Bytes) -> Result<RangeId, DeviceError> {
        Err(DeviceError::Invalid("a worker reserves addresses itself, for the models that it binds"))
    }

    fn release(&self, _range: RangeId) -> Result<(), DeviceError> {
        Err(DeviceError::Invalid("a worker releases addresses itself, with the models that it has bound"))
    }

    fn address(&self, range: RangeId) -> Result<usize, DeviceError> {
        self.found(range)?;
        Err(DeviceError::Invalid("addresses of another process"))
    }

    fn swap_in(
        &self,
        range: RangeId,
        weights: Arc<HostWeights>,
        _groups: Arc<[Group]>,
        done: OnDone<SwapReport>,
    ) -> Result<(), DeviceError> {
        self.begin(None, range, &weights, done)
    }

    fn swap_in_from(
        &self,
        (holder, held): (&dyn Device, RangeId),
        range: RangeId,
        weights: Arc<HostWeights>,
        _groups: Arc<[Group]>,
        done: OnDone<SwapReport>,
    ) -> Result<(), DeviceError> {
        let is_it = |other: &Arc<Self>| std::ptr::addr_eq(Arc::as_ptr(other), std::ptr::from_ref(holder));
        let holder = self.others().into_iter().find(is_it);
        self.begin(holder.map(|holder| (holder, held)), range, &weights, done)
    }

    fn swap_out(&self, range: RangeId, done: OnDone<()>) -> Result<(), DeviceError> {
        self.leave(range, done)
    }

    fn await_group(&self, _range: RangeId, _group: u32, _stream: Stream) -> Result<(), DeviceError> {
        Err(DeviceError::Invalid("whoever awaits weights does so in the worker"))
    }

    fn pci_address(&self) -> Option<PciAddress> {
        self.facts.pci
    }

    fn knows_kind(&self, kind: &KindKey) -> Option<bool> {
        match self.life().ask(|call| ToWorker::Knows { call, kind: *kind }) {
            Ok(Answer::Knows(knows)) => knows,
            Ok(_) | Err(_) => None,
        }
    }

    fn expect_run(&self) {
        self.life().expect_run();
    }

    fn leave(&self) {
        self.life().end();
    }

    fn can_reopen(&self) -> bool {
        true
    }

    fn reopen(&self) -> Result<(), DeviceError> {
        let (old, thread) = {
            let mut lives = self.lives();
            (Arc::clone(&lives.0), lives.1.take())
        };
        if !old.is_lost() {
            return Err(DeviceError::Invalid("a device that is there is not opened anew"));
        }
        // Until then its memory is not free.
        if let Some(thread) = thread {
            drop(thread.join());
        }
        // Nor where others have it mapped.
        if let Some(gpu) = self.gpu() {
            for other in self.others() {
                if let Err(error) = other.life().ask(|call| ToWorker::ForgetPool { call, gpu }) {
                    tracing::debug!(%error, name = other.info.name, "has no other GPU's memory");
                }
            }
        }
        let device = Arc::new(Mutex::new(self.me.clone()));
        let (life, facts, thread) = Life::start(&self.program, &self.spec, tell_chunks(&device))?;
        if facts != self.facts {
            life.end();
            drop(thread.join());
            let (now, before) = (facts.capacity, self.facts.capacity);
            let reason = format!("{now} for weights now, {before} before: does another process use it?");
            return Err(DeviceError::Failed { call: "opening the device anew", reason });
        }
        *self.lives() = (life, Some(thread));
        self.share(None);
        self.others().iter().for_each(|other| other.share(self.gpu()));
        Ok(())
    }

    fn prepare_weights(&self, weights: &HostWeights) -> Result<(), DeviceError> {
        if weights.is_empty() {
            return Ok(());
        }
        let life = self.life();
        let id = weights::known(&life, weights)?;
        life.ask(|call| ToWorker::Pin { call, weights: id }).map(drop)
    }

    fn read_back(&self, _range: RangeId, _offset: u64, _into: &mut [u8]) -> Result<(), DeviceError> {
        Err(DeviceError::Invalid("a worker compares weights itself"))
    }

    fn differs_at(&self, range: RangeId, sent: &Arc<HostWeights>) -> Result<Option<u64>, DeviceError> {
        let (life, model) = self.found(range)?;
        let id = weights::known(&life, sent)?;
        let answer = life.ask(|call| ToWorker::Compare { call, model, weights: id })?;
        let Answer::Compared { differs_at } = answer else { return Err(unexpected(&answer)) };
        Ok(differs_at)
    }
}

impl Drop for RemoteDevice {
    fn drop(&mut self) {
        self.life().end();
    }
}

impl fmt::Debug for RemoteDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteDevice").field("info", &self.info).field("life", &self.life()).finish_non_exhaustive()
    }
}
