//! Requests: from a peer's frame to the scheduler, and from a run's end back into the books.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::Instant,
};

use bytes::Bytes as Buffer;
use faaswap_protocol::{
    Bytes, Detail, FromBroker, FunctionId, Refusal, RequestId, Signature, Span, TensorSlice,
    limits::REQUESTS_IN_FLIGHT_MAX,
};
use faaswap_scheduler::{Event, Form, FunctionKey, Moment, RequestKey};

use super::{Core, Outcome, PeerId, Request};
use crate::{
    lane::{AnswerRight, Ask, InputBytes, Peer, RunInput},
    limits::{BATCH_INPUT_BYTES_MAX, INLINE_BYTES_MAX, UNRELEASED_MAX},
};

/// What a peer asks for.
#[derive(Debug)]
pub(crate) struct Infer {
    pub(crate) request: RequestId,
    pub(crate) function: FunctionId,
    pub(crate) inputs: Vec<TensorSlice>,
    pub(crate) outputs: Vec<u16>,
    pub(crate) time_left: Option<std::time::Duration>,
    pub(crate) payload: Buffer,
}

/// Why a request goes no further.
enum Declined {
    /// This request only.
    Refused(Refusal),
    /// The peer is broken or hostile.
    Violation(String),
}

impl From<Refusal> for Declined {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl Core {
    /// Takes a request in. An error is a violation: the connection ends.
    pub(super) fn infer(&mut self, from: PeerId, infer: Infer) -> Result<(), String> {
        let id = infer.request;
        match self.admit(from, infer) {
            Ok(()) => Ok(()),
            Err(Declined::Refused(refusal)) => {
                if let Some(entry) = self.peers.get(&from) {
                    entry.peer.outbox.send(&FromBroker::Refused { request: id, refusal }, Vec::new());
                }
                Ok(())
            }
            Err(Declined::Violation(what)) => Err(what),
        }
    }

    fn admit(&mut self, from: PeerId, infer: Infer) -> Result<(), Declined> {
        let arrived = Instant::now();
        let Some(entry) = self.peers.get(&from) else { return Ok(()) };
        let id = infer.request;
        if entry.in_flight.contains_key(&id) || entry.unreleased.contains_key(&id) {
            return Err(Declined::Violation(format!("request {} is in flight already", id.0)));
        }
        if entry.in_flight.len() >= REQUESTS_IN_FLIGHT_MAX {
            return Err(Refusal::ConnectionFull { limit: REQUESTS_IN_FLIGHT_MAX as u64 }.into());
        }
        if entry.unreleased.len() >= UNRELEASED_MAX
            || entry.inline_bytes.saturating_add(infer.payload.len() as u64) > INLINE_BYTES_MAX
        {
            return Err(Refusal::ConnectionFull { limit: UNRELEASED_MAX as u64 }.into());
        }
        let function = *entry.functions.get(&infer.function).ok_or(Refusal::UnknownFunction)?;
        let known = self.functions.get(&function).ok_or(Refusal::UnknownFunction)?;
        let model = self.models.get(&known.model).ok_or(Refusal::UnknownFunction)?;
        if let Some(left) = self.suspects.suspended_for(&model.variant.digest) {
            let refusal = Refusal::ModelSuspended { left };
            self.count_refused(function, refusal.code());
            return Err(refusal.into());
        }
        let inputs = inputs(&entry.peer, &model.loaded.signature, infer.inputs, &infer.payload)?;
        let (deadline, model) = (infer.time_left.unwrap_or(known.spec.slo.deadline), known.model);
        let form = form(&inputs, &infer.outputs);
        let key = RequestKey(self.new_id());
        let Some(entry) = self.peers.get_mut(&from) else { return Ok(()) };
        entry.in_flight.insert(id, key);
        entry.inline_bytes += infer.payload.len() as u64;
        let ask = Arc::new(Ask {
            key,
            id,
            peer: Arc::clone(&entry.peer),
            inputs,
            wanted: infer.outputs,
            payload_len: infer.payload.len() as u64,
            arrived,
            right: AnswerRight::default(),
        });
        self.requests.insert(key, Request { ask, from, function, resident: false });
        let deadline = Moment(self.now().0.saturating_add(deadline));
        self.arrived(model, key, function, (deadline, form));
        Ok(())
    }

    /// A peer writes inputs: the scheduler may bring weights, and whoever will be needed soon wakes up, while nothing
    /// else keeps them awake.
    pub(super) fn expect(&mut self, from: PeerId, function: FunctionId, soon: bool) {
        let key = self.peers.get(&from).and_then(|entry| entry.functions.get(&function)).copied();
        let Some((function, model)) = key.and_then(|key| Some((key, self.functions.get(&key)?.model))) else { return };
        let Some(model) = self.models.get(&model) else { return };
        if model.on.is_empty() {
            return self.happen(Event::Expected { function });
        }
        if !soon || !self.requests.is_empty() {
            return;
        }
        self.expected.notify_one();
        // All lanes are idle, and the first idle one of a device is taken.
        for entry in model.on.iter().filter_map(|device| self.devices.get(usize::from(device.0))) {
            entry.lanes.first().inspect(|lane| lane.look());
            entry.device.expect_run();
        }
    }

    pub(super) fn cancel(&mut self, from: PeerId, request: RequestId) {
        let key = self.peers.get(&from).and_then(|entry| entry.in_flight.get(&request).copied());
        // One that was answered meanwhile needs no cancelling.
        if let Some(request) = key {
            self.cancelled(request);
        }
    }

    pub(super) fn release(&mut self, from: PeerId, request: RequestId) {
        let Some(entry) = self.peers.get_mut(&from) else { return };
        let spans = entry.unreleased.remove(&request);
        if let (Some(spans), Some(shared)) = (spans, entry.peer.shared.get()) {
            shared.free(spans);
        }
    }

    /// Declines a request that has no answer yet.
    pub(super) fn refuse(&mut self, key: RequestKey, refusal: Refusal) {
        let Some(request) = self.forget(key) else { return };
        if request.ask.right.take() {
            self.count_refused(request.function, refusal.code());
            request.ask.peer.outbox.send(&FromBroker::Refused { request: request.ask.id, refusal }, Vec::new());
        }
    }

    /// Brings the books up to date with a run that has ended, and has been answered.
    pub(super) fn run_ended(&mut self, key: RequestKey, outcome: Outcome) {
        let Some(request) = self.forget(key) else { return };
        match outcome {
            Outcome::Answered { outputs } => {
                self.count_answered(&request);
                self.keep_until_released(&request, outputs);
            }
            Outcome::Refused(code) => self.count_refused(request.function, code),
            Outcome::GivenUp => {}
        }
    }

    fn keep_until_released(&mut self, request: &Request, outputs: Vec<Span>) {
        if outputs.is_empty() {
            return;
        }
        match self.peers.get_mut(&request.from) {
            Some(entry) => drop(entry.unreleased.insert(request.ask.id, outputs)),
            // The peer is gone, and its slab goes with the last run.
            None => {
                if let Some(shared) = request.ask.peer.shared.get() {
                    shared.free(outputs);
                }
            }
        }
    }

    fn forget(&mut self, key: RequestKey) -> Option<Request> {
        let request = self.requests.remove(&key)?;
        if let Some(entry) = self.peers.get_mut(&request.from) {
            entry.in_flight.remove(&request.ask.id);
            entry.inline_bytes -= request.ask.payload_len;
        }
        Some(request)
    }

    fn count_answered(&mut self, request: &Request) {
        let took = request.ask.arrived.elapsed();
        if let Some(function) = self.functions.get_mut(&request.function) {
            let met = took <= function.spec.slo.deadline;
            function.answered += 1;
            function.slo_met += u64::from(met);
            self.telemetry.answered(function.spec.name.as_str(), took, request.resident, met);
        }
    }

    fn count_refused(&mut self, function: FunctionKey, code: &'static str) {
        if let Some(function) = self.functions.get_mut(&function) {
            *function.refused.entry(code).or_default() += 1;
            self.telemetry.request(function.spec.name.as_str(), code);
        }
    }
}

/// What a request has in common with those that it could be run with: shapes behind the first dimension, and the outputs that
/// it wants. `None` where it holds more than one row, or too much to be copied. Whoever runs it compares the shapes again.
fn form(inputs: &[RunInput], wanted: &[u16]) -> Option<Form> {
    let mut hash = DefaultHasher::new();
    let mut bytes = 0_u64;
    for input in inputs {
        let [1, rest @ ..] = input.shape.dims() else { return None };
        bytes = bytes.checked_add(input.shape.size(input.dtype).ok()?.get())?;
        rest.hash(&mut hash);
    }
    wanted.hash(&mut hash);
    (bytes <= BATCH_INPUT_BYTES_MAX).then(|| Form(u32::try_from(hash.finish() >> 32).unwrap_or_default()))
}

/// Checks each input against the signature, and its place against the slab or payload.
fn inputs(
    peer: &Peer,
    signature: &Signature,
    slices: Vec<TensorSlice>,
    payload: &Buffer,
) -> Result<Vec<RunInput>, Declined> {
    let specs = &signature.inputs;
    if slices.len() != specs.len() {
        let (wanted, came) = (specs.len(), slices.len());
        return Err(invalid(format!("the model takes {wanted} inputs, {came} came")));
    }
    let mut inputs: Vec<Option<RunInput>> = specs.iter().map(|_| None).collect();
    for slice in slices {
        let index = usize::from(slice.index);
        let (Some(spec), Some(place)) = (specs.get(index), inputs.get_mut(index)) else {
            return Err(invalid(format!("the model has {} inputs, not one at {index}", specs.len())));
        };
        if place.is_some() {
            return Err(invalid(format!("input {} comes twice", spec.name)));
        }
        let size = slice.shape.size(slice.dtype).map_err(|e| invalid(format!("{}: {e}", spec.name)))?;
        if size != Bytes::new(slice.span.len) {
            let (name, shape, len) = (&spec.name, &slice.shape, slice.span.len);
            return Err(invalid(format!("{name} of shape {shape} has {} bytes, {len} came", size.get())));
        }
        let bytes = match peer.shared.get() {
            Some(shared) => InputBytes::Shared(
                shared.slab.request_region(slice.span).map_err(|e| Declined::Violation(e.to_string()))?,
            ),
            None => InputBytes::Own(part(payload, slice.span).map_err(Declined::Violation)?),
        };
        if slice.dtype != spec.dtype || !spec.accepts(&slice.shape) {
            return Err(invalid(format!("{spec} is expected, {} {} came", slice.dtype, slice.shape)));
        }
        *place = Some(RunInput { dtype: slice.dtype, shape: slice.shape, bytes });
    }
    // As many as the signature has, none twice: each is there.
    Ok(inputs.into_iter().flatten().collect())
}

fn part(payload: &Buffer, span: Span) -> Result<Buffer, String> {
    let bounds = || Some((usize::try_from(span.offset).ok()?, usize::try_from(span.end()?).ok()?));
    match bounds() {
        Some((start, end)) if span.fits(Bytes::of_len(payload.len())) => Ok(payload.slice(start..end)),
        Some(_) | None => {
            Err(format!("{} bytes at {} do not lie aligned in a payload of {}", span.len, span.offset, payload.len()))
        }
    }
}

fn invalid(reason: String) -> Declined {
    Declined::Refused(Refusal::InputInvalid { reason: Detail::from(reason) })
}
