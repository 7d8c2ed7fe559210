//! Where a request's inputs lie before its answer: laid out in one stretch of the slab, or drafted there piece by piece
//! while the body is still arriving.
//!
//! A draft saves the only copy that a large request would otherwise make. Its memory outlives its connection, so that
//! the inputs can be read back and sent to the next broker.

use std::sync::Arc;

use bytes::Bytes;
use faaswap_protocol::limits::TENSOR_ALIGN;
use faaswap_slab::{Region, SlabError};

use super::{
    InferRequest,
    link::{Link, PlaceGuard},
};

/// Where each input goes, counted from the start of its slot or payload.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    pub(super) spans: Vec<(u64, u64)>,
    pub(super) total: u64,
}

impl Layout {
    /// Inputs of these sizes, in this order. `None`: nobody can have so much memory.
    pub(super) fn of(lens: impl Iterator<Item = u64>) -> Option<Self> {
        let mut spans = Vec::with_capacity(lens.size_hint().0);
        let mut total = 0_u64;
        for len in lens {
            let at = total.checked_next_multiple_of(TENSOR_ALIGN)?;
            spans.push((at, len));
            total = at.checked_add(len)?;
        }
        Some(Self { spans, total })
    }

    /// Of inputs that are at hand.
    pub(super) fn of_request(request: &InferRequest) -> Option<Self> {
        Self::of(
            request
                .inputs
                .iter()
                .map(|input| input.data.iter().map(|piece| faaswap_protocol::Bytes::of_len(piece.len()).get()).sum()),
        )
    }
}

/// Inputs on their way into the slab, for a request that is not sent yet. Dropped, it gives its place back.
#[derive(Debug)]
pub struct Draft {
    pub(super) link: Arc<Link>,
    pub(super) place: PlaceGuard,
    pub(super) layout: Layout,
    pub(super) region: Region,
}

impl Draft {
    /// Writes some bytes of one input. What was never written is whatever an earlier request left there.
    pub fn write(&self, input: usize, at: usize, bytes: &[u8]) -> Result<(), SlabError> {
        let refused = || SlabError::Access { at, len: bytes.len(), region: self.region.len() };
        let &(start, len) = self.layout.spans.get(input).ok_or_else(refused)?;
        let end = at.checked_add(bytes.len()).ok_or_else(refused)?;
        if faaswap_protocol::Bytes::of_len(end).get() > len {
            return Err(refused());
        }
        let start = usize::try_from(start).map_err(|_| refused())?;
        self.region.write(start + at, bytes)
    }

    /// What is left when the draft was sent: enough to send it again.
    pub(super) fn written(&self) -> Written {
        Written { layout: self.layout.clone(), region: self.region.clone() }
    }
}

/// The inputs of a draft whose connection ended.
#[derive(Debug)]
pub(super) struct Written {
    layout: Layout,
    region: Region,
}

impl Written {
    /// Reads the inputs back. Nobody else writes there: the connection takes nothing new.
    pub(super) fn read_back(&self, request: &InferRequest) -> Result<InferRequest, SlabError> {
        let mut request = request.clone();
        for (input, &(at, len)) in request.inputs.iter_mut().zip(&self.layout.spans) {
            let (Ok(at), Ok(len)) = (usize::try_from(at), usize::try_from(len)) else {
                return Err(SlabError::Access { at: usize::MAX, len: usize::MAX, region: self.region.len() });
            };
            let mut bytes = vec![0; len];
            self.region.read(at, &mut bytes)?;
            input.data = vec![Bytes::from(bytes)];
        }
        Ok(request)
    }
}

/// Fills the gap before an aligned tensor in a payload.
pub(super) fn pad(payload: &mut Vec<Bytes>, len: u64) {
    static ZEROS: [u8; 64] = [0; 64];
    const _: () = assert!(ZEROS.len() as u64 == TENSOR_ALIGN, "a gap is shorter than the alignment");
    if let Some(zeros) = usize::try_from(len).ok().and_then(|len| ZEROS.get(..len)) {
        payload.push(Bytes::from_static(zeros));
    }
}
