//! Programs that are moved to where their weights lie: words of kernels' arguments that name a place in the weights are set anew in
//! what is launched, some 0.5 us for each kernel on an H100, while the weights' copies run. Nothing is mapped for it.
//!
//! Which words these are is known of a kind (`twins.rs`).

use std::sync::{Mutex, PoisonError};

use super::{
    drawn::{self, Call, Drawn},
    placement::Placement,
    queue::Graph,
    twins::WORD,
};
use crate::DeviceError;

/// A kernel that reads weights.
pub(super) struct Reader {
    /// Which node it is.
    pub(super) node: usize,
    pub(super) call: Call,
    /// Words of its arguments: which argument, where in it, and the place in the weights that it names.
    pub(super) words: Vec<(usize, usize, u64)>,
}

/// What of a program's part moves with its weights.
pub(super) struct Moves(Mutex<Standing>);

struct Standing {
    /// Where it stands, by a placement's number; `None` before the first, and after one that failed.
    at: Option<u64>,
    readers: Vec<Reader>,
    /// What the part was made of, whose nodes the readers are.
    _drawn: Drawn,
}

impl Moves {
    /// `drawn` is what the part was made of, and has these nodes.
    pub(super) fn new(drawn: Drawn, readers: Vec<Reader>) -> Self {
        Self(Mutex::new(Standing { at: None, readers, _drawn: drawn }))
    }

    /// Sees to it that the part is where the weights are, when it is launched next.
    pub(super) fn to(&self, placement: &Placement, graph: &Graph) -> Result<(), DeviceError> {
        let standing = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if standing.at == Some(placement.number) {
            return Ok(());
        }
        standing.at = None;
        for Reader { node, call, words } in &mut standing.readers {
            for &(argument, offset, place) in &*words {
                let address = placement.address(place).to_ne_bytes();
                call.arguments[argument][offset..offset + WORD].copy_from_slice(&address);
            }
            // SAFETY: the graph was made of the one that is kept, whose node this is, and which nobody else has; weights are where the
            // placement has them, for as long as anything runs that reads them.
            unsafe { drawn::set_in(graph.raw(), *node, call) }?;
        }
        standing.at = Some(placement.number);
        Ok(())
    }
}
