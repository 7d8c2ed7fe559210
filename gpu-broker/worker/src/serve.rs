//! The worker: opens a device and does what the broker says, until the broker goes or the device is lost.
//!
//! One thread takes the broker's messages and never waits; what takes time is begun on a thread of its own, of which there are as
//! many as the broker has such calls under way. Each lane has a thread.

mod pool;
mod swaps;

use std::{
    collections::HashMap,
    io,
    os::fd::OwnedFd,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use faaswap_device::{
    Device, Follower, HostWeights,
    cuda::{CudaConfig, CudaDevice},
    host::{HostConfig, HostDevice},
};
use faaswap_engine::{Bound, CudaTarget, EngineError, Prepared, Runtime, RuntimeOptions, Target};
use faaswap_protocol::Bytes;

use self::pool::Arriving;
use crate::{
    gone::Gone,
    message::{Answer, Ask, Call, DeviceSpec, Facts, Fault, FromWorker, ModelId, Spec, ToWorker, WeightsId},
    runs::Lane,
    wire::{Buffer, Wire},
};

/// How long a run looks again for a message that was sent before it.
const LOOK_AGAIN: Duration = Duration::from_micros(10);

/// What a worker has.
pub(crate) struct Worker {
    wire: Wire,
    spec: Spec,
    device: Arc<dyn Device>,
    runtime: Runtime,
    /// Messages that were taken.
    taken: AtomicU64,
    models: Mutex<HashMap<ModelId, Arc<Bound>>>,
    weights: Mutex<HashMap<WeightsId, Weights>>,
    arriving: Mutex<Arriving>,
    /// Takes down what has gone, one thing after the other.
    gone: Gone,
}

/// Weights that the broker has told of.
struct Weights {
    weights: Arc<HostWeights>,
    /// Until all bytes are there.
    follower: Option<Follower>,
}

/// Serves the broker at the other end of `socket`. Gives an error where the device cannot be opened, or the broker is no broker;
/// ends well when it goes.
pub fn run(socket: OwnedFd) -> io::Result<()> {
    let wire = Wire::of(socket);
    let mut buffer = Buffer::default();
    let Some(ToWorker::Open(spec)) = wire.receive(&mut buffer, &mut Vec::new(), Duration::ZERO)? else {
        return Err(io::Error::other("whoever has started this process says nothing of a device"));
    };
    let (device, runtime, facts) = match open(&spec) {
        Ok(opened) => opened,
        Err(error) => return wire.send(&FromWorker::Failed(error.to_string()), &[]),
    };
    wire.send(&FromWorker::Opened(facts), &[])?;
    let worker = Arc::new(Worker {
        wire,
        spec: *spec,
        device,
        runtime,
        taken: AtomicU64::new(1),
        models: Mutex::default(),
        weights: Mutex::default(),
        arriving: Mutex::default(),
        gone: Gone::start()?,
    });
    let mut fds = Vec::new();
    while let Some(message) = worker.wire.receive(&mut buffer, &mut fds, Duration::ZERO)? {
        worker.take(message, std::mem::take(&mut fds))?;
        worker.taken.fetch_add(1, Ordering::Release);
    }
    // What is on the device goes with the process, at once.
    end_now()
}

fn open(spec: &Spec) -> Result<(Arc<dyn Device>, Runtime, Facts), EngineError> {
    let options = RuntimeOptions { threads_per_run: spec.threads_per_run, scratch_max: spec.scratch_max };
    let (device, target, capability): (Arc<dyn Device>, _, _) = match &spec.device {
        DeviceSpec::Host { name, capacity, chunk, link_bytes_per_second } => {
            let config = HostConfig {
                chunk: *chunk,
                link_bytes_per_second: *link_bytes_per_second,
                ..HostConfig::new(name.clone(), *capacity)
            };
            (HostDevice::new(config)?, Target::Cpu, None)
        }
        DeviceSpec::Gpu { name, ordinal, memory, reserve, chunk, twins } => {
            let usual = CudaConfig::new(name.clone(), *ordinal);
            let device = CudaDevice::open(&CudaConfig {
                memory: *memory,
                reserve: *reserve,
                chunk: chunk.unwrap_or(usual.chunk),
                lanes: usize::from(spec.lanes),
                twins: *twins,
                shared: true,
                ..usual
            })?;
            let (target, capability) = (CudaTarget::new(device.ordinal()), device.capability()?);
            (device, Target::Cuda(target), Some(capability))
        }
    };
    let runtime = Runtime::load(&spec.onnxruntime, options)?;
    runtime.check(target)?;
    let info = device.info();
    let chunks = device.as_cuda().map_or(0, CudaDevice::shared_chunks);
    let facts = Facts { capacity: info.capacity, chunk: info.chunk, chunks, pci: device.pci_address(), capability };
    Ok((device, runtime, facts))
}

/// Ends this process as it is: to give back what is on a device takes long, and on a lost one fails.
pub(crate) fn end_now() -> ! {
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    std::process::abort()
}

impl Worker {
    fn models(&self) -> MutexGuard<'_, HashMap<ModelId, Arc<Bound>>> {
        self.models.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known_weights(&self) -> MutexGuard<'_, HashMap<WeightsId, Weights>> {
        self.weights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The model of a run, once everything was taken that the broker had said before.
    pub(crate) fn model_after(&self, ask: &Ask) -> Option<Arc<Bound>> {
        while self.taken.load(Ordering::Acquire) < ask.after {
            thread::sleep(LOOK_AGAIN);
        }
        self.models().get(&ask.model).map(Arc::clone)
    }

    /// Ends the process where its device is lost: the broker hears of it by that.
    pub(crate) fn end_if_lost(&self) {
        if self.device.is_lost() {
            tracing::error!(device = self.device.info().name, "the device is lost, and with it its process");
            // The system closes files only once all memory is given back, which takes a second.
            self.wire.shut_down();
            end_now();
        }
    }

    /// Tells how a call has ended.
    fn answer(&self, call: Call, result: Result<Answer, Fault>) {
        self.end_if_lost();
        if let Err(error) = self.wire.send(&FromWorker::Ended { call, result }, &[]) {
            tracing::error!(%error, "the broker does not listen");
            end_now();
        }
    }

    /// Does a call that takes time, and answers it.
    fn beside(self: &Arc<Self>, call: Call, work: impl FnOnce(&Self) -> Result<Answer, Fault> + Send + 'static) {
        let worker = Arc::clone(self);
        let begun = thread::Builder::new().name("call".to_owned()).spawn(move || {
            let result = work(&worker);
            worker.answer(call, result);
        });
        if let Err(error) = begun {
            self.answer(call, Err(Fault::Other(format!("starting a thread: {error}"))));
        }
    }

    fn take(self: &Arc<Self>, message: ToWorker, fds: Vec<OwnedFd>) -> io::Result<()> {
        match message {
            ToWorker::Open(_) => return Err(io::Error::other("a device is open already")),
            ToWorker::Lane => self.start_lane(fds)?,
            ToWorker::Weights { weights, size, full } => self.take_weights(weights, fds, size, full)?,
            ToWorker::Filled { weights, until } => self.filled(weights, until),
            ToWorker::NotFilled { weights, why } => self.not_filled(weights, why),
            ToWorker::Pin { call, weights } => self.beside(call, move |worker| worker.pin(weights)),
            ToWorker::Forget { weights } => self.gone.take_down(self.known_weights().remove(&weights)),
            ToWorker::Bind { call, model, prepared } => {
                self.beside(call, move |worker| worker.bind(model, &prepared));
            }
            ToWorker::Unbind { model } => self.gone.take_down(self.models().remove(&model)),
            ToWorker::SwapIn { call, model, weights, from } => self.swap_in(call, model, weights, from),
            ToWorker::SwapOut { call, model } => self.swap_out(call, model),
            ToWorker::Lend { model } => self.lend(model),
            ToWorker::Return { model } => self.take_back(model),
            ToWorker::Compare { call, model, weights } => {
                self.beside(call, move |worker| worker.compare(model, weights));
            }
            ToWorker::Knows { call, kind } => self.answer(call, Ok(Answer::Knows(self.device.knows_kind(&kind)))),
            ToWorker::Share { call, to } => self.beside(call, move |worker| worker.share(to)),
            ToWorker::Chunks { gpu, chunk, of } => self.chunks_came(gpu, fds, chunk, of),
            ToWorker::ForgetPool { call, gpu } => self.forget_pool(call, gpu),
            ToWorker::Fail => {
                let worker = Arc::clone(self);
                let fail = move || {
                    worker.device.fail();
                    worker.end_if_lost();
                };
                thread::Builder::new().name("fault".to_owned()).spawn(fail)?;
            }
        }
        Ok(())
    }

    fn start_lane(self: &Arc<Self>, fds: Vec<OwnedFd>) -> io::Result<()> {
        let [socket, memory] = <[OwnedFd; 2]>::try_from(fds).map_err(|_| io::Error::other("a lane needs two files"))?;
        let lane = Lane::new(socket, memory, self.spec.exchange, &*self.device).map_err(io::Error::other)?;
        let worker = Arc::clone(self);
        thread::Builder::new().name("lane".to_owned()).spawn(move || lane.serve(&worker)).map(drop)
    }

    fn bind(&self, model: ModelId, prepared: &Path) -> Result<Answer, Fault> {
        let bound = Prepared::open(prepared).and_then(|prepared| Bound::new(&self.runtime, &prepared, &self.device));
        let bound = bound.map_err(|error| {
            let EngineError::Device(error) = error else { return Fault::Other(error.to_string()) };
            error.into()
        })?;
        let answer = Answer::Bound { has_range: bound.range().is_some(), is_twin: bound.is_twin() };
        self.models().insert(model, Arc::new(bound));
        Ok(answer)
    }

    fn take_weights(&self, id: WeightsId, fds: Vec<OwnedFd>, size: Bytes, full: bool) -> io::Result<()> {
        let file = fds.into_iter().next().ok_or_else(|| io::Error::other("weights come with a file"))?;
        let weights = if full {
            HostWeights::of_file(file, size).map(|weights| Weights { weights: Arc::new(weights), follower: None })
        } else {
            HostWeights::to_follow(file, size).map(|(weights, follower)| Weights { weights, follower: Some(follower) })
        };
        match weights {
            Ok(weights) => drop(self.known_weights().insert(id, weights)),
            // What wants them fails; nobody else does.
            Err(error) => tracing::error!(%error, %size, "weights cannot be mapped"),
        }
        Ok(())
    }

    fn filled(&self, id: WeightsId, until: Bytes) {
        if let Some(known) = self.known_weights().get_mut(&id) {
            known.follower.take_if(|follower| !follower.raise(until));
        }
    }

    fn not_filled(&self, id: WeightsId, why: Fault) {
        if let Some(known) = self.known_weights().get_mut(&id)
            && let Some(follower) = known.follower.take()
        {
            follower.fail(why.into());
        }
    }

    fn weights(&self, id: WeightsId) -> Result<Arc<HostWeights>, Fault> {
        let known = self.known_weights().get(&id).map(|known| Arc::clone(&known.weights));
        known.ok_or_else(|| Fault::Other("weights that nobody has told of".to_owned()))
    }

    fn pin(&self, id: WeightsId) -> Result<Answer, Fault> {
        let weights = self.weights(id)?;
        self.device.prepare_weights(&weights)?;
        Ok(Answer::Done)
    }
}
