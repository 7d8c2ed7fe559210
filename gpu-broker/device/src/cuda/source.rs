//! Where a swap-in's weights come from: host memory, or another GPU that holds them.

use std::sync::Arc;

use super::{foreign::Foreign, placement::Placement, shared::Shared};
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
    holder: Holder,
    placed: Arc<Placement>,
}

enum Holder {
    /// Counts this as a reader of the range.
    Here(Arc<Shared>, RangeId),
    /// A GPU of another process, where somebody else keeps them.
    Elsewhere { _pool: Arc<Foreign> },
}

impl Lent {
    /// `placed` is where the range's are on `peer`, which counts this as a reader already.
    pub(super) fn new(peer: Arc<Shared>, range: RangeId, placed: Arc<Placement>) -> Self {
        Self { holder: Holder::Here(peer, range), placed }
    }

    /// Weights in another process' GPU, `placed` in its pool as it is mapped here.
    pub(super) fn of_foreign(pool: Arc<Foreign>, placed: Placement) -> Self {
        Self { holder: Holder::Elsewhere { _pool: pool }, placed: Arc::new(placed) }
    }

    /// Calls `copy` with address, offset and length of each piece of a stretch that lies in a row.
    pub(super) fn pieces<E>(
        &self,
        from: usize,
        len: usize,
        mut copy: impl FnMut(u64, usize, usize) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut at = 0;
        for (address, piece) in self.placed.pieces(from as u64..(from + len) as u64) {
            let piece = usize::try_from(piece).expect("a piece of weights that are mapped");
            copy(address, at, piece)?;
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
        match &self.holder {
            Holder::Here(peer, range) => peer.change(*range, |range| range.readers -= 1),
            Holder::Elsewhere { .. } => {}
        }
    }
}
