//! From a run's outputs to its request's answer: places for them, and the frame that names these.

use faaswap_engine::{Place, RunError, RunOutput};
use faaswap_protocol::{
    Bytes, FromBroker, Refusal, Span, TensorSlice, Timing,
    limits::{PAYLOAD_BYTES_MAX, TENSOR_ALIGN},
};

use super::{Ask, Peer};
use crate::mailbox::Outcome;

/// Alignment of a tensor in a payload.
#[expect(clippy::cast_possible_truncation, reason = "a small constant")]
const PAYLOAD_ALIGN: usize = TENSOR_ALIGN as usize;

/// Finds places for a request's outputs.
pub(super) struct Places<'a> {
    peer: &'a Peer,
    /// Which output lies where in the slab.
    taken: Vec<(u16, Span)>,
    bytes: u64,
}

impl<'a> Places<'a> {
    pub(super) fn of(peer: &'a Peer) -> Self {
        Self { peer, taken: Vec::new(), bytes: 0 }
    }

    pub(super) fn place(&mut self, index: u16, size: Bytes) -> Result<Place, Refusal> {
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

    /// Gives the places back, and what was taken of them.
    fn give_up(self) {
        if let Some(shared) = self.peer.shared.get() {
            shared.free(self.taken.iter().map(|(_, span)| *span));
        }
    }

    /// Answers the request, where nobody has yet. `put` tells the loop before the peer hears of it; what is put must be rung.
    pub(super) fn answer(
        self,
        ask: &Ask,
        result: Result<Vec<RunOutput>, Refusal>,
        timing: Timing,
        put: impl FnOnce(Outcome),
    ) {
        if !ask.right.take() {
            self.give_up();
            return put(Outcome::GivenUp);
        }
        match result {
            Ok(outputs) => {
                put(Outcome::Answered { outputs: self.taken.iter().map(|(_, span)| *span).collect() });
                let (outputs, payload) = describe(outputs, &self.taken);
                ask.peer.outbox.send(&FromBroker::Answer { request: ask.id, outputs, timing }, payload);
            }
            Err(refusal) => {
                self.give_up();
                put(Outcome::Refused(refusal.code()));
                ask.peer.outbox.send(&FromBroker::Refused { request: ask.id, refusal }, Vec::new());
            }
        }
    }
}

/// What a request is told of a run that failed.
pub(super) fn refusal(error: RunError, device_is_lost: bool) -> Refusal {
    match error {
        RunError::Refused(refusal) => refusal,
        RunError::Failed(_) if device_is_lost => Refusal::HardwareFault,
        RunError::Failed(reason) => Refusal::RunFailed { reason },
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
