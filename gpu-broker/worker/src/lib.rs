//! A device in a process of its own, so that its faults are nobody else's.
//!
//! A kernel that fails costs its process the contexts of *all* its GPUs. So a broker with several gives each to a worker: this
//! same program, which opens the device, binds models and runs them. Here are both ends: [`RemoteDevice`] and [`RemoteModel`]
//! stand in the broker for what [`run`] does in the worker. Weights are mapped by both; inputs and outputs go through memory that
//! both share, one stretch for each lane, and no peer's slab is seen by a worker. Nothing here decides anything.

#![warn(missing_docs)]

mod channel;
mod gone;
mod life;
mod message;
mod model;
mod remote;
mod runs;
mod serve;
mod wire;

pub use gone::Gone;
pub use message::{DeviceSpec, Facts, Spec};
pub use model::RemoteModel;
pub use remote::RemoteDevice;
pub use serve::run;
