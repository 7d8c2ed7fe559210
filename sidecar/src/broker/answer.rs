//! Turns an answer's slices into bytes that a caller may keep, and tells the broker when it no longer does.

use std::sync::Arc;

use bytes::Bytes;
use faaswap_protocol::{RequestId, TensorSlice, ToBroker};
use faaswap_slab::Slab;

use super::{OutputTensor, link::Link, socket::LinkError};

const WRONG: LinkError = LinkError::Unexpected("an output whose bytes are not where it says");

/// Tells the broker, when the last output of an answer was dropped, that its memory is free.
#[derive(Debug)]
pub(super) struct Release {
    link: Arc<Link>,
    request: RequestId,
}

impl Release {
    pub(super) fn new(link: Arc<Link>, request: RequestId) -> Arc<Self> {
        Arc::new(Self { link, request })
    }
}

impl Drop for Release {
    fn drop(&mut self) {
        self.link.tell(&ToBroker::Release { request: self.request });
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

/// An output in the slab: its bytes stay where they are.
pub(super) fn in_slab(slice: TensorSlice, slab: &Slab, release: &Arc<Release>) -> Result<OutputTensor, LinkError> {
    check(&slice)?;
    let region = slab.response_region(slice.span)?;
    let data = Bytes::from_owner(Owned { region: region.into_bytes_owner(), _release: Arc::clone(release) });
    Ok(OutputTensor { index: slice.index, dtype: slice.dtype, shape: slice.shape, data })
}

/// An output in the frame's payload.
pub(super) fn inline(slice: TensorSlice, payload: &Bytes) -> Result<OutputTensor, LinkError> {
    check(&slice)?;
    let start = usize::try_from(slice.span.offset).map_err(|_| WRONG)?;
    let end = slice.span.end().and_then(|end| usize::try_from(end).ok()).ok_or(WRONG)?;
    if end > payload.len() {
        return Err(WRONG);
    }
    Ok(OutputTensor { index: slice.index, dtype: slice.dtype, shape: slice.shape, data: payload.slice(start..end) })
}

fn check(slice: &TensorSlice) -> Result<(), LinkError> {
    let size = slice.shape.size(slice.dtype).map(faaswap_protocol::Bytes::get);
    if size == Ok(slice.span.len) { Ok(()) } else { Err(WRONG) }
}
