//! Where a swap-in's weights come from: host memory, or another GPU that holds them.

use std::sync::Arc;

use super::shared::Shared;
use crate::{HostWeights, RangeId};

/// The source of one swap-in. It stays until the copies have ended.
pub(super) enum Source {
    /// Host memory, over this GPU's own link.
    Host(Arc<HostWeights>),
    /// Host memory, over this GPU's own link and those of others: the detours of these numbers, at least one.
    Links(Arc<HostWeights>, Vec<usize>),
    /// Another GPU, over NVLink or the bus.
    Peer(Lent),
}

/// Weights on another GPU, which stay there as long as this.
pub(super) struct Lent {
    peer: Arc<Shared>,
    range: RangeId,
    /// Addresses of the chunks that they lie in.
    chunks: Vec<u64>,
    chunk: usize,
}

impl Lent {
    /// `chunks` are the range's on `peer`, which counts this as a reader already.
    pub(super) fn new(peer: Arc<Shared>, range: RangeId, chunks: Vec<u64>, chunk: usize) -> Self {
        Self { peer, range, chunks, chunk }
    }

    /// Calls `copy` with address, offset and length of each piece of a stretch that lies in a row.
    pub(super) fn pieces<E>(
        &self,
        from: usize,
        len: usize,
        mut copy: impl FnMut(u64, usize, usize) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut at = from;
        while at < from + len {
            let (chunk, inside) = (at / self.chunk, at % self.chunk);
            let piece = (self.chunk - inside).min(from + len - at);
            copy(self.chunks[chunk] + inside as u64, at - from, piece)?;
            at += piece;
        }
        Ok(())
    }
}

impl Source {
    /// The detours that it takes besides this GPU's own link.
    pub(super) fn detours(&self) -> &[usize] {
        match self {
            Self::Links(_, detours) => detours,
            Self::Host(_) | Self::Peer(_) => &[],
        }
    }

    /// The weights in host memory that it reads.
    pub(super) fn host(&self) -> Option<&HostWeights> {
        match self {
            Self::Host(weights) | Self::Links(weights, _) => Some(weights),
            Self::Peer(_) => None,
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.peer.change(self.range, |range| range.readers -= 1);
    }
}
