//! Lanes: threads that run one request at a time, and answer it themselves.
//!
//! The answer goes from here straight to the peer's socket; the loop hears of it through the mailbox, *before* the peer
//! does, so that whatever the peer says next meets books that know the run has ended.

use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, SyncSender, TryRecvError, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes as Buffer;
use faaswap_device::{Device, DeviceError, HostWeights};
use faaswap_engine::{Bound, Input, InputData, Place, RunError, RunOutput};
use faaswap_protocol::{
    Bytes, DType, FromBroker, Refusal, RequestId, Shape, Span, TensorSlice, Timing,
    limits::{PAYLOAD_BYTES_MAX, TENSOR_ALIGN},
};
use faaswap_scheduler::RequestKey;
use faaswap_slab::{Region, Slab, SlotAllocator};

use crate::{
    limits::{EXPECTED_LOOKS_FOR, LANE_LOOKS_FOR},
    mailbox::{Ended, Mailbox, Outcome},
    socket::Outbox,
    store::Held,
};

/// Most orders that wait for a lane: its next run, one that follows at once, and one hint.
const ORDERS_MAX: usize = 3;
/// Alignment of a tensor in a payload.
#[expect(clippy::cast_possible_truncation, reason = "a small constant")]
const PAYLOAD_ALIGN: usize = TENSOR_ALIGN as usize;

/// A peer's slab and the books of its response half.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) slab: Slab,
    slots: Mutex<SlotAllocator>,
}

impl Shared {
    pub(crate) fn new(slab: Slab) -> Self {
        let layout = slab.layout();
        let slots = Mutex::new(SlotAllocator::new(layout.request.get(), layout.response.get()));
        Self { slab, slots }
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
    pub(crate) shared: std::sync::OnceLock<Shared>,
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
    pub(crate) bound: Bound,
    pub(crate) device: Arc<dyn Device>,
    copied_at: Mutex<Option<Instant>>,
    /// Its weights in host memory, while they are copied, and while they are on the device.
    held: Mutex<Option<Held>>,
}

impl BoundModel {
    pub(crate) fn new(bound: Bound, device: Arc<dyn Device>) -> Self {
        Self { bound, device, copied_at: Mutex::default(), held: Mutex::default() }
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
        self.bound.range().is_some_and(|range| self.device.address(range) == Err(DeviceError::Lost))
    }

    pub(crate) fn copied_at(&self) -> MutexGuard<'_, Option<Instant>> {
        self.copied_at.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One run.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) ask: Arc<Ask>,
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
    pub(crate) fn start(name: &str, mailbox: Arc<Mailbox>) -> io::Result<Self> {
        // The scheduler gives a lane one run at a time; more places mean that handing over never waits.
        let (orders, queue): (_, Receiver<Order>) = sync_channel(ORDERS_MAX);
        let told = Arc::new(AtomicBool::new(false));
        let heard = Arc::clone(&told);
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            while let Some(run) = next(&queue, &heard) {
                serve(run, &mailbox);
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

fn serve(run: Run, mailbox: &Mailbox) {
    let Run { ask, model, resident } = run;
    let started = Instant::now();
    let inputs: Vec<_> = ask.inputs.iter().map(as_input).collect();
    let mut places = Places { peer: &ask.peer, taken: Vec::new(), bytes: 0 };
    let result = model.bound.run(&inputs, &ask.wanted, &mut |index, _, _, size| places.place(index, size));
    let taken = std::mem::take(&mut places.taken);
    let ran = started.elapsed();
    let copied_at = *model.copied_at();
    let swapping = copied_at.map_or(Duration::ZERO, |at| at.saturating_duration_since(started)).min(ran);
    let timing = Timing {
        queued: started.saturating_duration_since(ask.arrived),
        ran,
        swapping: if resident { Duration::ZERO } else { swapping },
        was_resident: resident,
    };
    let lost = result.is_err() && model.is_lost();
    drop((inputs, model));
    if !ask.right.take() {
        give_up(&ask.peer, &taken);
        mailbox.post(Ended::Run { request: ask.key, took: ran, outcome: Outcome::GivenUp });
        return;
    }
    match result {
        Ok(outputs) => {
            let spans = taken.iter().map(|(_, span)| *span).collect();
            let outcome = Outcome::Answered { outputs: spans };
            mailbox.put(Ended::Run { request: ask.key, took: ran, outcome });
            let (outputs, payload) = describe(outputs, &taken);
            ask.peer.outbox.send(&FromBroker::Answer { request: ask.id, outputs, timing }, payload);
        }
        Err(error) => {
            give_up(&ask.peer, &taken);
            let refusal = match error {
                RunError::Refused(refusal) => refusal,
                RunError::Failed(_) if lost => Refusal::HardwareFault,
                RunError::Failed(reason) => Refusal::RunFailed { reason },
            };
            let outcome = Outcome::Refused(refusal.code());
            mailbox.put(Ended::Run { request: ask.key, took: ran, outcome });
            ask.peer.outbox.send(&FromBroker::Refused { request: ask.id, refusal }, Vec::new());
        }
    }
    mailbox.ring();
}

fn as_input(input: &RunInput) -> Input<'_> {
    let data = match &input.bytes {
        InputBytes::Shared(region) => InputData::Region(region),
        InputBytes::Own(bytes) => InputData::Bytes(bytes),
    };
    Input { dtype: input.dtype, shape: &input.shape, data }
}

fn give_up(peer: &Peer, taken: &[(u16, Span)]) {
    if let Some(shared) = peer.shared.get() {
        shared.free(taken.iter().map(|(_, span)| *span));
    }
}

/// Finds places for outputs.
struct Places<'a> {
    peer: &'a Peer,
    /// Which output lies where in the slab.
    taken: Vec<(u16, Span)>,
    bytes: u64,
}

impl Places<'_> {
    fn place(&mut self, index: u16, size: Bytes) -> Result<Place, Refusal> {
        let Some(shared) = self.peer.shared.get() else { return self.place_in_memory(size) };
        let full = || Refusal::SlabFull { needed: size, size: shared.slab.layout().response };
        let span = shared.slots().allocate(size.get()).ok_or_else(full)?;
        self.taken.push((index, span));
        shared.slab.response_region(span).map(Place::Region).map_err(|_| full())
    }

    fn place_in_memory(&mut self, size: Bytes) -> Result<Place, Refusal> {
        let most = Bytes::new(u64::from(PAYLOAD_BYTES_MAX));
        let start = self.bytes.next_multiple_of(TENSOR_ALIGN);
        let end = start.checked_add(size.get()).filter(|end| *end <= most.get());
        let (Some(end), Some(len)) = (end, size.as_len()) else {
            return Err(Refusal::SlabFull { needed: size, size: most });
        };
        self.bytes = end;
        Ok(Place::Memory(vec![0; len]))
    }
}

/// The outputs as a message says them, and the payload that carries them where they are in memory of ours.
fn describe(outputs: Vec<RunOutput>, taken: &[(u16, Span)]) -> (Vec<TensorSlice>, Vec<u8>) {
    let mut payload = Vec::new();
    let place_of = |index| taken.iter().find(|(of, _)| *of == index).map(|(_, span)| *span);
    let slices = outputs.into_iter().map(|output| {
        let span = match &output.place {
            Place::Region(_) => place_of(output.index).unwrap_or(Span { offset: 0, len: 0 }),
            Place::Memory(bytes) => {
                payload.resize(payload.len().next_multiple_of(PAYLOAD_ALIGN), 0);
                let span = Span { offset: payload.len() as u64, len: bytes.len() as u64 };
                payload.extend_from_slice(bytes);
                span
            }
        };
        TensorSlice { index: output.index, dtype: output.dtype, shape: output.shape, span }
    });
    let slices = slices.collect();
    (slices, payload)
}
