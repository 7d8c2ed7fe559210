//! Lanes: threads that do one run at a time, and answer its requests themselves.
//!
//! The answer goes from here straight to the peer's socket; the loop hears of it through the mailbox, *before* the peer
//! does, so that whatever the peer says next meets books that know the run has ended.

mod answer;
mod batch;

use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, SyncSender, TryRecvError, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes as Buffer;
use faaswap_device::{Device, DeviceError, HostWeights, cuda::Registered};
use faaswap_engine::{Input, InputData};
use faaswap_protocol::{Batching, DType, ModelDigest, RequestId, Shape, Span, Timing};
use faaswap_scheduler::RequestKey;
use faaswap_slab::{Region, Slab, SlotAllocator};

use self::{answer::Places, batch::Trials};
use crate::{
    bound::BoundThere,
    limits::{EXPECTED_LOOKS_FOR, LANE_LOOKS_FOR},
    mailbox::{Ended, Mailbox},
    registrar::{Lease, Registrar},
    socket::Outbox,
    store::Held,
};

/// Most orders that wait for a lane: its next run, one that follows at once, and one hint.
const ORDERS_MAX: usize = 3;

/// A peer's slab and the books of its response half.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) slab: Slab,
    slots: Mutex<SlotAllocator>,
    /// Whether somebody has asked for it to be registered.
    asked: AtomicBool,
    registered: OnceLock<Lease>,
}

impl Shared {
    pub(crate) fn new(slab: Slab) -> Self {
        let layout = slab.layout();
        let slots = Mutex::new(SlotAllocator::new(layout.request.get(), layout.response.get()));
        Self { slab, slots, asked: AtomicBool::default(), registered: OnceLock::new() }
    }

    /// Whether nobody has asked before for the slab to be registered.
    pub(crate) fn asks_first(&self) -> bool {
        !self.asked.swap(true, Ordering::AcqRel)
    }

    pub(crate) fn may_ask_again(&self) {
        self.asked.store(false, Ordering::Release);
    }

    /// The start of the slab is registered from now on.
    pub(crate) fn is_registered(&self, lease: Lease) {
        // Set once, since it is asked for once.
        let _ = self.registered.set(lease);
    }

    /// The part of the slab that GPUs read by themselves.
    fn registered(&self) -> Option<&Registered> {
        self.registered.get()?.memory()
    }

    pub(crate) fn slots(&self) -> MutexGuard<'_, SlotAllocator> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives outputs' slots back.
    pub(crate) fn free(&self, spans: impl IntoIterator<Item = Span>) {
        let mut slots = self.slots();
        for span in spans {
            if let Err(error) = slots.free(span) {
                tracing::error!(%error, "the books of a response slab are wrong");
            }
        }
    }
}

/// The end of a connection that lanes need.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) outbox: Outbox,
    /// Absent where tensors travel in payloads.
    pub(crate) shared: OnceLock<Shared>,
}

/// Where an input's bytes are.
#[derive(Clone, Debug)]
pub(crate) enum InputBytes {
    Shared(Region),
    Own(Buffer),
}

#[derive(Clone, Debug)]
pub(crate) struct RunInput {
    pub(crate) dtype: DType,
    pub(crate) shape: Shape,
    pub(crate) bytes: InputBytes,
}

/// The right to answer a request: whoever takes it first answers, nobody else does.
#[derive(Debug, Default)]
pub(crate) struct AnswerRight(AtomicBool);

impl AnswerRight {
    pub(crate) fn take(&self) -> bool {
        !self.0.swap(true, Ordering::AcqRel)
    }
}

/// A request as its peer has sent it.
#[derive(Debug)]
pub(crate) struct Ask {
    pub(crate) key: RequestKey,
    pub(crate) id: RequestId,
    pub(crate) peer: Arc<Peer>,
    pub(crate) inputs: Vec<RunInput>,
    pub(crate) wanted: Vec<u16>,
    /// Bytes of payload that the inputs keep in memory.
    pub(crate) payload_len: u64,
    pub(crate) arrived: Instant,
    pub(crate) right: AnswerRight,
}

/// A model on a device, and when its last copy there was complete.
#[derive(Debug)]
pub(crate) struct BoundModel {
    pub(crate) digest: ModelDigest,
    pub(crate) bound: BoundThere,
    pub(crate) device: Arc<dyn Device>,
    copied_at: Mutex<Option<Instant>>,
    /// Its weights in host memory, while they are copied, and while they are on the device.
    held: Mutex<Option<Held>>,
    trials: Trials,
}

impl BoundModel {
    pub(crate) fn new(digest: ModelDigest, bound: BoundThere, device: Arc<dyn Device>) -> Self {
        Self { digest, bound, device, copied_at: Mutex::default(), held: Mutex::default(), trials: Trials::default() }
    }

    /// Keeps weights in host memory for a copy that begins, and gives them.
    pub(crate) fn hold(&self, held: Held) -> Result<Arc<HostWeights>, DeviceError> {
        let weights = held.weights().ok_or(DeviceError::Invalid("the weights were copied already"))?;
        *self.held() = Some(held);
        Ok(weights)
    }

    /// The copy has ended: well, and the weights are on the device; or else they are not.
    pub(crate) fn copied(&self, well: bool) {
        let mut held = self.held();
        match held.as_mut().filter(|_| well) {
            Some(held) => held.settle(),
            None => *held = None,
        }
    }

    /// Takes the note that the weights are on the device. The next swap-in may be asked for before this one has left.
    pub(crate) fn let_go(&self) -> Option<Held> {
        self.held().take()
    }

    fn held(&self) -> MutexGuard<'_, Option<Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the device under it has failed for good.
    fn is_lost(&self) -> bool {
        self.bound.is_gone()
            || self.bound.range().is_some_and(|range| self.device.address(range) == Err(DeviceError::Lost))
    }

    /// Whether a request that came at that moment found the weights there; `resident` says whether they are by now.
    pub(crate) fn found_by(&self, arrived: Instant, resident: bool) -> bool {
        resident && self.copied_at().is_none_or(|at| at <= arrived)
    }

    pub(crate) fn copied_at(&self) -> MutexGuard<'_, Option<Instant>> {
        self.copied_at.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One run.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) ask: Arc<Ask>,
    /// Other requests that it answers: of its function, or of others with the same model.
    pub(crate) with: Vec<Arc<Ask>>,
    /// On what condition it may: the strictest that its functions say.
    pub(crate) batching: Batching,
    pub(crate) model: Arc<BoundModel>,
    pub(crate) resident: bool,
}

/// What a lane is told.
#[derive(Debug)]
enum Order {
    Run(Run),
    /// A run is about to come.
    Look,
}

/// A lane's thread. It ends when this is dropped and its run has ended.
#[derive(Debug)]
pub(crate) struct Lane {
    orders: SyncSender<Order>,
    /// Whether it was told to look and has not heard of it yet: hints leave the places to runs.
    told: Arc<AtomicBool>,
}

impl Lane {
    pub(crate) fn start(name: &str, mailbox: Arc<Mailbox>, registrar: Option<Registrar>) -> io::Result<Self> {
        // The scheduler gives a lane one run at a time; more places mean that handing over never waits.
        let (orders, queue): (_, Receiver<Order>) = sync_channel(ORDERS_MAX);
        let told = Arc::new(AtomicBool::new(false));
        let heard = Arc::clone(&told);
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            while let Some(run) = next(&queue, &heard) {
                serve(run, &mailbox, registrar.as_ref());
            }
        })?;
        Ok(Self { orders, told })
    }

    /// Hands a run over. False where the thread is gone or busy twice over, which a lane of the scheduler never is.
    pub(crate) fn run(&self, run: Run) -> bool {
        self.orders.try_send(Order::Run(run)).is_ok()
    }

    /// Wakes the thread: a run is about to come. Where orders wait already it is awake.
    pub(crate) fn look(&self) {
        // Where there is no place for it there are runs, which keep the thread awake too.
        if !self.told.swap(true, Ordering::AcqRel) && self.orders.try_send(Order::Look).is_err() {
            self.told.store(false, Ordering::Release);
        }
    }
}

/// The next run; `None` once the broker ends. Looks for a moment before it sleeps: waking a thread takes longer than
/// what most requests wait for.
fn next(queue: &Receiver<Order>, heard: &AtomicBool) -> Option<Run> {
    let mut until = Instant::now() + LANE_LOOKS_FOR;
    loop {
        let order = match queue.try_recv() {
            Ok(order) => order,
            Err(TryRecvError::Disconnected) => return None,
            Err(TryRecvError::Empty) if Instant::now() < until => {
                std::hint::spin_loop();
                continue;
            }
            Err(TryRecvError::Empty) => queue.recv().ok()?,
        };
        match order {
            Order::Run(run) => return Some(run),
            Order::Look => {
                heard.store(false, Ordering::Release);
                until = Instant::now() + EXPECTED_LOOKS_FOR;
            }
        }
    }
}

fn serve(run: Run, mailbox: &Mailbox, registrar: Option<&Registrar>) {
    if !run.with.is_empty() {
        return batch::serve(run, mailbox);
    }
    let Run { ask, model, resident, .. } = run;
    let started = Instant::now();
    let inputs = inputs_of(&ask);
    let mut places = Places::of(&ask.peer);
    let result = model.bound.run(&inputs, &ask.wanted, &mut |index, _, _, size| places.place(index, size));
    let ran = started.elapsed();
    let registrar = registrar.filter(|_| model.bound.would_read_in_place(&inputs));
    let copied_at = *model.copied_at();
    let swapping = copied_at.map_or(Duration::ZERO, |at| at.saturating_duration_since(started)).min(ran);
    let timing = Timing {
        queued: started.saturating_duration_since(ask.arrived),
        ran,
        swapping: if resident { Duration::ZERO } else { swapping },
        was_resident: model.found_by(ask.arrived, resident),
    };
    let result = result.map_err(|error| answer::refusal(error, model.is_lost()));
    drop(inputs);
    let unsettled = model.bound.is_unsettled().then(|| Arc::clone(&model));
    drop(model);
    let request = ask.key;
    places.answer(&ask, result, timing, |outcome| mailbox.put(Ended::Run { request, took: ran, outcome }));
    mailbox.ring();
    if let Some(registrar) = registrar {
        registrar.ask(&ask.peer);
    }
    // Nobody waits for this; the next run in this lane does, once.
    if let Some(model) = unsettled {
        model.bound.settle();
    }
}

/// A request's inputs. Those in shared memory say where GPUs may read them; whether one does is the engine's choice.
fn inputs_of(ask: &Ask) -> Vec<Input<'_>> {
    let registered = ask.peer.shared.get().and_then(Shared::registered);
    let inputs = ask.inputs.iter().map(|input| {
        let data = match (&input.bytes, registered) {
            (InputBytes::Shared(region), Some(memory)) => InputData::Registered(region, memory),
            (InputBytes::Shared(region), None) => InputData::Region(region),
            (InputBytes::Own(bytes), _) => InputData::Bytes(bytes),
        };
        Input { dtype: input.dtype, shape: &input.shape, data }
    });
    inputs.collect()
}
