//! Decides what runs where and when, without hands: `step(now, event) -> actions`.
//!
//! No clock, no I/O, no iteration order that could differ between two runs: equal histories give equal actions, so a
//! recorded history replays. The broker and the simulator drive the same code.
//!
//! The books hold what is where and keep the invariants; a policy decides over them. Ours predicts for every place when
//! a request would be answered there, from costs that it measures as it goes; the published one, LRU, FIFO and chance
//! stand beside it for comparison.

mod batches;
mod books;
mod cost;
mod decision;
mod demand;
mod device;
mod estimate;
mod event;
mod eviction;
pub mod invariants;
mod limits;
mod links;
mod model;
mod objective;
mod policy;
mod ready;
mod scheduler;
mod slots;
mod strain;
mod time;
pub mod trace;

pub use decision::{Choice, Decision, Score};
pub use event::{
    Action, DeviceId, Event, Form, FunctionKey, LaneId, Link, ModelId, Moment, RequestKey, Source, Verdict,
};
pub use policy::PolicyKind;
pub use scheduler::{Scheduler, SchedulerConfig};
