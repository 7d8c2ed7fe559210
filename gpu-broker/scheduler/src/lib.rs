//! Decides what runs where and when, without hands: `step(now, event) -> actions`.

mod event;

pub use event::{Action, DeviceId, Event, FunctionKey, LaneId, ModelId, Moment, RequestKey};
