//! One open broker connection with its registered function: requests go out, answers come back in any order.
//!
//! A request whose caller has gone keeps its slots until the broker has answered it; an answer keeps its part of the
//! response slab until its bytes were dropped. Connecting again, and sending again what was lost, is left to `mod`.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use faaswap_protocol::{
    FromBroker, FunctionId, Refusal, RequestId, Span, TensorSlice, Timing, ToBroker,
    limits::{MESSAGE_BYTES_MAX, PAYLOAD_BYTES_MAX},
};
use faaswap_slab::{Region, Slab, SlabError};
use tokio::{
    sync::{Notify, oneshot},
    time::{Duration, Instant, timeout_at},
};

use super::{
    InferAnswer, InferRequest,
    answer::{self, Release},
    draft::{Draft, Layout, pad},
    room::{NoPlace, Place, Room, Waiting},
    socket::{Frames, LinkError, Socket, Writer},
};
use crate::limits::{ANNOUNCED_AFTER, ANNOUNCED_FROM, LOOKED_FOR_MAX, PING_EVERY, PING_IDLE_EVERY, SILENCE_MAX};

type Reply = Result<InferAnswer, Refusal>;

/// Why one attempt on one connection gave no answer.
#[derive(Debug)]
pub(super) enum Attempt {
    /// The connection ended before the answer: the request may be sent again.
    Lost,
    /// Nothing was sent, since too many wait for room.
    WaitingFull,
    /// Nothing was sent, and never will be: the inputs exceed the slab.
    TooLarge { needed: u64, size: u64 },
    /// Nothing was sent: no room became free in time.
    NoRoom,
    /// The broker declined.
    Refused(Refusal),
}

/// A request that the broker has not answered. No `reply`: its caller has gone.
#[derive(Debug)]
struct Pending {
    place: Place,
    reply: Option<oneshot::Sender<Reply>>,
}

#[derive(Debug)]
pub(super) struct Link {
    function: FunctionId,
    slab: Option<Slab>,
    writer: Writer,
    room: Room,
    /// `None` once the connection is over.
    pending: Mutex<Option<HashMap<RequestId, Pending>>>,
    request_next: AtomicU64,
    /// How long the broker worked on the last request, in microseconds.
    last_took_us: AtomicU64,
    /// When the last answer came; at first, when the connection was made.
    answered: Mutex<Instant>,
    retired: Notify,
}

impl Link {
    pub(super) fn new(function: FunctionId, socket: Arc<Socket>, slab: Option<Slab>) -> Arc<Self> {
        let half = slab.as_ref().map(|slab| slab.layout().request.get());
        Arc::new(Self {
            function,
            slab,
            writer: Writer::new(socket),
            room: Room::new(half),
            pending: Mutex::new(Some(HashMap::new())),
            request_next: AtomicU64::new(1),
            last_took_us: AtomicU64::new(u64::MAX),
            answered: Mutex::new(Instant::now()),
            retired: Notify::new(),
        })
    }

    /// Whether new requests may still be sent here.
    pub(super) fn is_open(&self) -> bool {
        !self.room.is_closed()
    }

    /// Takes no new requests from here on; those in flight go on.
    pub(super) fn retire(&self) {
        self.room.close();
        self.retired.notify_one();
    }

    /// Waits until the connection takes nothing new. For one waiter.
    pub(super) async fn until_retired(&self) {
        while self.is_open() {
            self.retired.notified().await;
        }
    }

    /// Takes room for inputs of these sizes whose bytes are still to come, if there is some at once.
    pub(super) fn draft(self: &Arc<Self>, layout: Layout) -> Option<Draft> {
        let slab = self.slab.as_ref()?;
        let place = self.room.take_for_draft(layout.total)?;
        let place = PlaceGuard { link: Arc::clone(self), place: Some(place) };
        let region = slab.request_region(place.slot()?).ok()?;
        self.announce(layout.total, false);
        Some(Draft { link: Arc::clone(self), place, layout, region })
    }

    /// Sends a request whose inputs were drafted here, and waits for its answer.
    pub(super) async fn infer_drafted(
        self: &Arc<Self>,
        request: &InferRequest,
        draft: Draft,
        deadline: Option<Instant>,
    ) -> Result<InferAnswer, Attempt> {
        let start = draft.place.slot().map_or(0, |slot| slot.offset);
        let inputs = slices(request, &draft.layout, start);
        self.exchange(draft.place, request, inputs, &[], deadline).await
    }

    /// Sends one request and waits for its answer.
    pub(super) async fn infer(
        self: &Arc<Self>,
        request: &InferRequest,
        deadline: Option<Instant>,
        room_until: Instant,
        waiting: &Waiting,
    ) -> Result<InferAnswer, Attempt> {
        let size = self.slab.as_ref().map_or(u64::from(PAYLOAD_BYTES_MAX), |slab| slab.layout().request.get());
        let layout = Layout::of_request(request).ok_or(Attempt::TooLarge { needed: u64::MAX, size })?;
        if layout.total > size {
            return Err(Attempt::TooLarge { needed: layout.total, size });
        }
        let place = match self.room.take_at_once(layout.total) {
            Some(place) => place,
            None => timeout_at(room_until, self.room.take(layout.total, waiting))
                .await
                .unwrap_or(Err(NoPlace::TimedOut))
                .map_err(|no| match no {
                    NoPlace::Closed => Attempt::Lost,
                    NoPlace::WaitingFull => Attempt::WaitingFull,
                    NoPlace::TimedOut => Attempt::NoRoom,
                })?,
        };
        let place = PlaceGuard { link: Arc::clone(self), place: Some(place) };
        let slot = place.slot();
        let payload = match (&self.slab, slot) {
            (Some(slab), Some(slot)) => {
                let region = slab.request_region(slot).map_err(|_| Attempt::Lost)?;
                self.announce(layout.total, true);
                fill(&region, request, &layout).map_err(|_| Attempt::Lost)?;
                Vec::new()
            }
            (_, None) | (None, _) => pieces(request, &layout),
        };
        let inputs = slices(request, &layout, slot.map_or(0, |slot| slot.offset));
        self.exchange(place, request, inputs, &payload, deadline).await
    }

    async fn exchange(
        self: &Arc<Self>,
        place: PlaceGuard,
        request: &InferRequest,
        inputs: Vec<TensorSlice>,
        payload: &[Bytes],
        deadline: Option<Instant>,
    ) -> Result<InferAnswer, Attempt> {
        let id = RequestId(self.request_next.fetch_add(1, Ordering::Relaxed));
        let message = ToBroker::Infer {
            request: id,
            function: self.function,
            inputs,
            outputs: request.outputs.clone(),
            time_left: deadline.map(|at| at.saturating_duration_since(Instant::now())),
        };
        let mut reply = self.post(place, id, &message, payload)?;
        let mut call = Call { link: self, id, answered: false };
        let reply = match self.look_for(&mut reply).await {
            Some(reply) => Ok(reply),
            None => reply.await,
        };
        call.answered = true;
        match reply {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(refusal)) => Err(Attempt::Refused(refusal)),
            Err(_gone) => Err(Attempt::Lost),
        }
    }

    /// Looks for an answer that must be near, where the last one took so little time that to sleep and be woken would take
    /// longer, and nothing else is in flight. Others get their turn between two looks.
    async fn look_for(&self, reply: &mut oneshot::Receiver<Reply>) -> Option<Reply> {
        let near = Duration::from_micros(self.last_took_us.load(Ordering::Relaxed));
        if near > LOOKED_FOR_MAX || self.in_flight() > 1 {
            return None;
        }
        // The clock of the machine: one that a test holds still would be looked at for ever.
        let since = std::time::Instant::now();
        while since.elapsed() < LOOKED_FOR_MAX {
            if let Ok(reply) = reply.try_recv() {
                return Some(reply);
            }
            tokio::task::yield_now().await;
        }
        None
    }

    /// Notes the request as in flight and sends it.
    fn post(
        &self,
        mut place: PlaceGuard,
        id: RequestId,
        message: &ToBroker,
        payload: &[Bytes],
    ) -> Result<oneshot::Receiver<Reply>, Attempt> {
        let (reply, answer) = oneshot::channel();
        {
            let mut pending = self.lock_pending();
            let Some(pending) = pending.as_mut() else {
                return Err(Attempt::Lost);
            };
            if let Some(mut place) = place.place.take() {
                self.room.settle(&mut place);
                pending.insert(id, Pending { place, reply: Some(reply) });
            }
        }
        if self.writer.send(message, payload).is_err() {
            // Names are not in the message, so only hundreds of tensors could make it too long.
            drop(self.take_pending(id));
            let max = u64::from(MESSAGE_BYTES_MAX);
            return Err(Attempt::TooLarge { needed: max + 1, size: max });
        }
        Ok(answer)
    }

    /// Lets the broker get ready while inputs are written, where that takes long enough: wake up for those that come at
    /// once, bring weights for those that stream in after a pause.
    fn announce(&self, bytes: u64, soon: bool) {
        let paused = || self.answered.lock().unwrap_or_else(PoisonError::into_inner).elapsed() >= ANNOUNCED_AFTER;
        if bytes >= ANNOUNCED_FROM && (soon || paused()) {
            self.tell(&ToBroker::Expect { function: self.function, soon });
        }
    }

    /// Lets the broker bring weights, where there was a pause in which they may have left.
    pub(super) fn expect_one(&self) {
        self.announce(ANNOUNCED_FROM, false);
    }

    /// Sends a message that nobody waits for; on a connection that is over it goes nowhere.
    pub(super) fn tell(&self, message: &ToBroker) {
        let _sent = self.writer.send(message, &[]);
    }

    fn lock_pending(&self) -> std::sync::MutexGuard<'_, Option<HashMap<RequestId, Pending>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn in_flight(&self) -> usize {
        self.lock_pending().as_ref().map_or(0, HashMap::len)
    }

    /// Reads the connection until it ends, then lets all who wait for answers know.
    pub(super) async fn run(self: Arc<Self>, socket: Arc<Socket>, mut frames: Frames) -> LinkError {
        let end = self.read_until_the_end(&socket, &mut frames).await;
        self.retire();
        // Dropping the senders wakes every caller; each decides whether to send again.
        drop(self.lock_pending().take());
        end
    }

    async fn read_until_the_end(self: &Arc<Self>, socket: &Socket, frames: &mut Frames) -> LinkError {
        let flush = self.writer.flush_forever();
        tokio::pin!(flush);
        let mut heard = Instant::now();
        let mut probed: Option<Instant> = None;
        let mut tick = tokio::time::interval_at(heard + PING_EVERY, PING_EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                frame = frames.next(socket) => {
                    heard = Instant::now();
                    probed = None;
                    match frame.and_then(|(message, payload)| self.hear(message, &payload)) {
                        Ok(()) => {}
                        Err(end) => return end,
                    }
                }
                error = &mut flush => return error.into(),
                _ = tick.tick() => {
                    if probed.is_some_and(|at| at.elapsed() >= SILENCE_MAX) {
                        return LinkError::Silent(SILENCE_MAX, "it was probed");
                    }
                    if probed.is_none() && self.wants_probe(heard.elapsed()) {
                        probed = Some(Instant::now());
                        self.tell(&ToBroker::Ping { nonce: 1 });
                    }
                }
            }
        }
    }

    fn wants_probe(&self, silent: Duration) -> bool {
        silent >= PING_IDLE_EVERY || (silent >= PING_EVERY && self.in_flight() > 0)
    }

    fn hear(self: &Arc<Self>, message: FromBroker, payload: &Bytes) -> Result<(), LinkError> {
        match message {
            FromBroker::Answer { request, outputs, timing } => self.answer(request, outputs, timing, payload),
            FromBroker::Refused { request, refusal } => {
                if refusal == Refusal::Draining {
                    // Before the slot is free: its inputs are still to be read back for the next broker.
                    self.retire();
                }
                let pending = self.take_pending(request)?;
                if let Some(reply) = pending {
                    let _gone = reply.send(Err(refusal));
                }
                Ok(())
            }
            FromBroker::Draining => {
                self.retire();
                Ok(())
            }
            FromBroker::Pong { .. } => Ok(()),
            FromBroker::Closing { refusal } => Err(LinkError::Closing(refusal)),
            FromBroker::Welcome { .. }
            | FromBroker::ModelNeeded { .. }
            | FromBroker::Uploaded { .. }
            | FromBroker::Preparing { .. }
            | FromBroker::Registered { .. }
            | FromBroker::CallRefused { .. } => Err(LinkError::Unexpected("a registration message after registration")),
        }
    }

    fn answer(
        self: &Arc<Self>,
        request: RequestId,
        outputs: Vec<TensorSlice>,
        timing: Timing,
        payload: &Bytes,
    ) -> Result<(), LinkError> {
        *self.answered.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        let took = (timing.queued + timing.ran).as_micros();
        self.last_took_us.store(u64::try_from(took).unwrap_or(u64::MAX), Ordering::Relaxed);
        let reply = self.take_pending(request)?;
        let outputs: Vec<_> = match &self.slab {
            Some(slab) => {
                // From here on the answer's part of the slab is given back, whoever drops it.
                let release = Release::new(Arc::clone(self), request);
                outputs.into_iter().map(|slice| answer::in_slab(slice, slab, &release)).collect::<Result<_, _>>()?
            }
            None => outputs.into_iter().map(|slice| answer::inline(slice, payload)).collect::<Result<_, _>>()?,
        };
        if let Some(reply) = reply {
            let _gone = reply.send(Ok(InferAnswer { outputs, timing }));
        }
        Ok(())
    }

    /// Ends a request in flight: its place is free, and the caller is returned, if it still waits.
    fn take_pending(&self, request: RequestId) -> Result<Option<oneshot::Sender<Reply>>, LinkError> {
        let pending = self.lock_pending().as_mut().and_then(|all| all.remove(&request));
        let pending = pending.ok_or(LinkError::Unexpected("an answer to no request in flight"))?;
        self.room.free(pending.place);
        Ok(pending.reply)
    }
}

/// Gives a place back when nothing came of it.
#[derive(Debug)]
pub(super) struct PlaceGuard {
    link: Arc<Link>,
    place: Option<Place>,
}

impl PlaceGuard {
    fn slot(&self) -> Option<Span> {
        self.place.as_ref().and_then(|place| place.slot)
    }
}

impl Drop for PlaceGuard {
    fn drop(&mut self) {
        if let Some(place) = self.place.take() {
            self.link.room.free(place);
        }
    }
}

/// A request in flight, from its caller's side. Dropped unanswered, it takes the request back.
struct Call<'a> {
    link: &'a Link,
    id: RequestId,
    answered: bool,
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        if self.answered {
            return;
        }
        // The broker may still read the slot: it is freed when the cancelled request is answered.
        let in_flight = self.link.lock_pending().as_mut().and_then(|all| all.get_mut(&self.id)).map(|p| p.reply = None);
        if in_flight.is_some() {
            self.link.tell(&ToBroker::Cancel { request: self.id });
        }
    }
}

/// What the broker is told of the inputs, which lie behind `start`.
fn slices(request: &InferRequest, layout: &Layout, start: u64) -> Vec<TensorSlice> {
    let slice = |(input, &(at, len)): (&super::TensorInput, &(u64, u64))| TensorSlice {
        index: input.index,
        dtype: input.dtype,
        shape: input.shape.clone(),
        span: Span { offset: start + at, len },
    };
    request.inputs.iter().zip(&layout.spans).map(slice).collect()
}

/// Writes the inputs into their slot: the one copy of a request.
fn fill(region: &Region, request: &InferRequest, layout: &Layout) -> Result<(), SlabError> {
    for (input, &(at, _)) in request.inputs.iter().zip(&layout.spans) {
        let mut at = usize::try_from(at).unwrap_or(usize::MAX);
        for piece in &input.data {
            region.write(at, piece)?;
            at = at.saturating_add(piece.len());
        }
    }
    Ok(())
}

/// The inputs as a payload, in the pieces in which they came.
fn pieces(request: &InferRequest, layout: &Layout) -> Vec<Bytes> {
    let mut payload = Vec::new();
    let mut written = 0;
    for (input, &(at, len)) in request.inputs.iter().zip(&layout.spans) {
        pad(&mut payload, at - written);
        payload.extend(input.data.iter().cloned());
        written = at + len;
    }
    payload
}
