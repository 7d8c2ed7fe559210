//! Experiments with a whole broker: real processes, real sockets, functions as many as memory has weights for.
//!
//! What is measured is what a sidecar sees. All of it runs on GPUs, however many there are, and on host devices.

mod bare;
mod bases;
pub(crate) mod broker;
mod costs;
pub(crate) mod density;
mod fleet;
pub(crate) mod front;
pub(crate) mod lose;
mod options;
mod predict;
pub(crate) mod scale;
pub(crate) mod soak;
mod stage;
mod step;
mod swaps;
mod variants;

pub(crate) use broker::own_memory;
pub(crate) use options::Options;
pub(crate) use variants::turn;
