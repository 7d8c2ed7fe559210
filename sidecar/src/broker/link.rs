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
    limits::{MESSAGE_BYTES_MAX, PAYLOAD_BYTES_MAX, TENSOR_ALIGN},
};
use faaswap_slab::Slab;
use tokio::{
    sync::{Notify, oneshot},
    time::{Duration, Instant, timeout_at},
};

use super::{
    InferAnswer, InferRequest, OutputTensor,
    room::{NoPlace, Place, Room, Waiting},
    socket::{Frames, LinkError, Socket, Writer},
};
use crate::limits::{PING_EVERY, PING_IDLE_EVERY, SILENCE_MAX};

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
    retired: Notify,
}

impl Link {
    pub(super) fn new(function: FunctionId, socket: Arc<Socket>, slab: Option<Slab>) -> Arc<Self> {
        let slots = slab.as_ref().map(|slab| faaswap_slab::SlotAllocator::new(0, slab.layout().request.get()));
        Arc::new(Self {
            function,
            slab,
            writer: Writer::new(socket),
            room: Room::new(slots),
            pending: Mutex::new(Some(HashMap::new())),
            request_next: AtomicU64::new(1),
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

    /// Sends one request and waits for its answer.
    pub(super) async fn infer(
        self: &Arc<Self>,
        request: &InferRequest,
        deadline: Option<Instant>,
        room_until: Instant,
        waiting: &Waiting,
    ) -> Result<InferAnswer, Attempt> {
        let sizes = Sizes::of(request);
        let size = self.slab.as_ref().map_or(u64::from(PAYLOAD_BYTES_MAX), |slab| slab.layout().request.get());
        if sizes.total > size {
            return Err(Attempt::TooLarge { needed: sizes.total, size });
        }
        let place = match self.room.take_at_once(sizes.total) {
            Some(place) => place,
            None => timeout_at(room_until, self.room.take(sizes.total, waiting))
                .await
                .unwrap_or(Err(NoPlace::TimedOut))
                .map_err(|no| match no {
                    NoPlace::Closed => Attempt::Lost,
                    NoPlace::WaitingFull => Attempt::WaitingFull,
                    NoPlace::TimedOut => Attempt::NoRoom,
                })?,
        };
        let place = PlaceGuard { link: self, place: Some(place) };
        let (inputs, payload) = self.lay_out(request, &place, &sizes)?;
        let (id, reply) = self.post(
            place,
            &ToBroker::Infer {
                request: RequestId(self.request_next.fetch_add(1, Ordering::Relaxed)),
                function: self.function,
                inputs,
                outputs: request.outputs.clone(),
                time_left: deadline.map(|at| at.saturating_duration_since(Instant::now())),
            },
            &payload,
        )?;
        let mut call = Call { link: self, id, answered: false };
        let reply = reply.await;
        call.answered = true;
        match reply {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(refusal)) => Err(Attempt::Refused(refusal)),
            Err(_gone) => Err(Attempt::Lost),
        }
    }

    /// Writes the inputs into their slot: the one copy of a request. Inline, the pieces become the payload as they are.
    fn lay_out(
        &self,
        request: &InferRequest,
        place: &PlaceGuard<'_>,
        sizes: &Sizes,
    ) -> Result<(Vec<TensorSlice>, Vec<Bytes>), Attempt> {
        let slot = place.place.as_ref().and_then(|place| place.slot);
        let start = slot.map_or(0, |slot| slot.offset);
        let region = match (&self.slab, slot) {
            (Some(slab), Some(slot)) => Some(slab.request_region(slot).map_err(|_| Attempt::Lost)?),
            (_, None) | (None, _) => None,
        };
        let mut payload = Vec::new();
        let mut slices = Vec::with_capacity(request.inputs.len());
        let mut written = 0;
        for (input, &(at, len)) in request.inputs.iter().zip(&sizes.spans) {
            let offset = start + at;
            slices.push(TensorSlice {
                index: input.index,
                dtype: input.dtype,
                shape: input.shape.clone(),
                span: Span { offset, len },
            });
            let Some(region) = &region else {
                pad(&mut payload, at - written);
                payload.extend(input.data.iter().cloned());
                written = at + len;
                continue;
            };
            let mut at = usize::try_from(at).unwrap_or(usize::MAX);
            for piece in &input.data {
                region.write(at, piece).map_err(|_| Attempt::Lost)?;
                at = at.saturating_add(piece.len());
            }
        }
        Ok((slices, payload))
    }

    /// Notes the request as in flight and sends it.
    fn post(
        &self,
        mut place: PlaceGuard<'_>,
        message: &ToBroker,
        payload: &[Bytes],
    ) -> Result<(RequestId, oneshot::Receiver<Reply>), Attempt> {
        let ToBroker::Infer { request: id, .. } = *message else {
            return Err(Attempt::Lost);
        };
        let (reply, answer) = oneshot::channel();
        {
            let mut pending = self.lock_pending();
            let Some(pending) = pending.as_mut() else {
                return Err(Attempt::Lost);
            };
            if let Some(place) = place.place.take() {
                pending.insert(id, Pending { place, reply: Some(reply) });
            }
        }
        if self.writer.send(message, payload).is_err() {
            // Names are not in the message, so only hundreds of tensors could make it too long.
            drop(self.take_pending(id));
            let max = u64::from(MESSAGE_BYTES_MAX);
            return Err(Attempt::TooLarge { needed: max + 1, size: max });
        }
        Ok((id, answer))
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
                        let _sent = self.writer.send(&ToBroker::Ping { nonce: 1 }, &[]);
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
        let reply = self.take_pending(request)?;
        // From here on the answer's part of the slab is given back, whoever drops it.
        let release = self.slab.as_ref().map(|_| Arc::new(Release { link: Arc::clone(self), request }));
        let outputs =
            outputs.into_iter().map(|slice| self.output(slice, payload, release.as_ref())).collect::<Result<_, _>>()?;
        if let Some(reply) = reply {
            let _gone = reply.send(Ok(InferAnswer { outputs, timing }));
        }
        Ok(())
    }

    fn output(
        &self,
        slice: TensorSlice,
        payload: &Bytes,
        release: Option<&Arc<Release>>,
    ) -> Result<OutputTensor, LinkError> {
        const WRONG: LinkError = LinkError::Unexpected("an output whose bytes are not where it says");
        if slice.shape.size(slice.dtype).ok().map(faaswap_protocol::Bytes::get) != Some(slice.span.len) {
            return Err(WRONG);
        }
        let data = match (&self.slab, release) {
            (Some(slab), Some(release)) => {
                let region = slab.response_region(slice.span)?;
                Bytes::from_owner(Owned { region: region.into_bytes_owner(), _release: Arc::clone(release) })
            }
            (None, _) | (_, None) => {
                let range = usize::try_from(slice.span.offset)
                    .ok()
                    .zip(slice.span.end().and_then(|end| usize::try_from(end).ok()));
                let (start, end) = range.filter(|&(_, end)| end <= payload.len()).ok_or(WRONG)?;
                payload.slice(start..end)
            }
        };
        Ok(OutputTensor { index: slice.index, dtype: slice.dtype, shape: slice.shape, data })
    }

    /// Ends a request in flight: its place is free, and the caller is returned, if it still waits.
    fn take_pending(&self, request: RequestId) -> Result<Option<oneshot::Sender<Reply>>, LinkError> {
        let pending = self.lock_pending().as_mut().and_then(|all| all.remove(&request));
        let pending = pending.ok_or(LinkError::Unexpected("an answer to no request in flight"))?;
        self.room.free(pending.place);
        Ok(pending.reply)
    }
}

/// Where each input goes, counted from the start of its slot or payload.
struct Sizes {
    spans: Vec<(u64, u64)>,
    total: u64,
}

impl Sizes {
    fn of(request: &InferRequest) -> Self {
        let mut spans = Vec::with_capacity(request.inputs.len());
        let mut total = 0_u64;
        for input in &request.inputs {
            let at = total.next_multiple_of(TENSOR_ALIGN);
            let len = input.data.iter().map(|piece| faaswap_protocol::Bytes::of_len(piece.len()).get()).sum();
            spans.push((at, len));
            total = at + len;
        }
        Self { spans, total }
    }
}

/// Fills the gap before an aligned tensor.
fn pad(payload: &mut Vec<Bytes>, len: u64) {
    static ZEROS: [u8; 64] = [0; 64];
    if let Some(zeros) = usize::try_from(len).ok().and_then(|len| ZEROS.get(..len)) {
        payload.push(Bytes::from_static(zeros));
    }
}

/// Gives a place back when nothing came of it.
struct PlaceGuard<'a> {
    link: &'a Link,
    place: Option<Place>,
}

impl Drop for PlaceGuard<'_> {
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
            let _sent = self.link.writer.send(&ToBroker::Cancel { request: self.id }, &[]);
        }
    }
}

/// Tells the broker, when the last output of an answer was dropped, that its memory is free.
#[derive(Debug)]
struct Release {
    link: Arc<Link>,
    request: RequestId,
}

impl Drop for Release {
    fn drop(&mut self) {
        let _sent = self.link.writer.send(&ToBroker::Release { request: self.request }, &[]);
    }
}

/// Output bytes in the slab.
struct Owned<B> {
    region: B,
    _release: Arc<Release>,
}

impl<B: AsRef<[u8]>> AsRef<[u8]> for Owned<B> {
    fn as_ref(&self) -> &[u8] {
        self.region.as_ref()
    }
}
