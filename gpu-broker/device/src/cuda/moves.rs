//! Programs that are moved to where their weights lie: words of kernels' arguments that name a place in the weights are set anew in
//! what is launched, 0.3 to 1.6 us for each kernel on an H100, while the weights' copies run. Nothing is mapped for it.
//!
//! Which words these are is known of a kind (`twins.rs`).

use std::sync::{Arc, Mutex, PoisonError};

use super::{
    drawn::{self, Call},
    placement::Placement,
    queue::Graph,
    twins::{Template, WORD},
};
use crate::DeviceError;

/// A kernel that reads weights.
pub(super) struct Reader {
    /// Which node of the template's part it is.
    pub(super) node: usize,
    pub(super) call: Call,
    /// Words of its arguments: which argument, where in it, and the place in the weights that it names.
    pub(super) words: Vec<(usize, usize, u64)>,
}

/// What of a program's part moves with its weights.
pub(super) struct Moves {
    template: Arc<Template>,
    /// Where it stands, by a placement's number; `None` before the first, and after one that failed.
    stands: Mutex<(Option<u64>, Vec<Reader>)>,
}

impl Moves {
    pub(super) fn new(template: &Arc<Template>, readers: Vec<Reader>) -> Self {
        Self { template: Arc::clone(template), stands: Mutex::new((None, readers)) }
    }

    /// Sees to it that the part is where the weights are, when it is launched next.
    pub(super) fn to(&self, placement: &Placement, graph: &Graph) -> Result<(), DeviceError> {
        let (stands, readers) = &mut *self.stands.lock().unwrap_or_else(PoisonError::into_inner);
        if *stands == Some(placement.number) {
            return Ok(());
        }
        *stands = None;
        // The nodes are the template's, whose graph nobody else may use meanwhile.
        let drawing = self.template.drawing();
        for Reader { node, call, words } in readers {
            for &(argument, offset, place) in &*words {
                let address = placement.address(place).to_ne_bytes();
                call.arguments[argument][offset..offset + WORD].copy_from_slice(&address);
            }
            // SAFETY: the graph was made of the template's part, whose node this is; weights are where the placement has them, for as
            // long as anything runs that reads them.
            unsafe { drawn::set_in(graph.raw(), *node, call) }?;
        }
        drop(drawing);
        *stands = Some(placement.number);
        Ok(())
    }
}
