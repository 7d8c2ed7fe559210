//! Decides what runs where and when, without hands: `step(now, event) -> actions`.
//!
//! No clock, no I/O, no iteration order that could differ between two runs: equal histories give equal actions, so a
//! recorded history replays. The broker and the simulator drive the same code.
//!
//! This first policy keeps a queue per function, serves the function whose oldest request is due first, runs it where
//! its weights are, else swaps it in where that costs the fewest evicted bytes, evicting the least recently used.

mod device;
mod event;
pub mod invariants;
mod placement;
mod queue;
mod scheduler;

pub use event::{Action, DeviceId, Event, FunctionKey, LaneId, ModelId, Moment, RequestKey};
pub use scheduler::{Scheduler, SchedulerConfig};
