//! The limits and spans that no one configures, and how they relate.

use crate::time::Span;

/// Most devices of a node; further ones are ignored.
pub(crate) const DEVICES_MAX: usize = 64;
/// Most lanes of a device that are used.
pub(crate) const LANES_MAX: u16 = 64;
/// Most waiting functions that one step looks at; the others' turn comes when these have started.
pub(crate) const LOOKED_AT_MAX: usize = 48;
/// Decisions that are remembered.
pub(crate) const DECISIONS_MAX: usize = 256;
/// A request that has waited so long gets a turn whatever else is urgent ...
pub(crate) const STARVED_AFTER: Span = Span::secs(2);
/// ... once in so many starts, oldest first: with k older requests it starts within `STARVED_TURN * (k + 1)` starts.
pub(crate) const STARVED_TURN: u32 = 8;
/// Weights stay at least so long, where others can make room.
pub(crate) const RESIDENCY_MIN: Span = Span::millis(100);
/// Failed swap-ins in a row, on all devices, after which waiting requests of the model are refused.
pub(crate) const FAILURES_MAX: u32 = 3;
/// The wait after a failed swap-in; doubled each time.
pub(crate) const RETRY_AFTER: Span = Span::millis(10);
/// Shortest time to the next wake-up.
pub(crate) const WAKE_MIN: Span = Span::micros(50);
/// How often the class threshold is looked at.
pub(crate) const CONTROL_EVERY: Span = Span::millis(250);
/// Regular models that are brought ahead of their request: most copies of that kind at a time on a node.
pub(crate) const AHEAD_MAX: u32 = 1;
/// Most requests that one run answers.
pub(crate) const BATCH_MAX: u16 = 16;
/// Most forms and sizes of which is known what runs of a model on a device give.
pub(crate) const VERDICTS_MAX: usize = 256;
/// How long a function goes without runs of a size that came apart, or without other functions where it was one with theirs ...
pub(crate) const APART_PAUSE_MIN: Span = Span::secs(1);
/// ... doubled each time, up to this.
pub(crate) const APART_PAUSE_MAX: Span = Span::secs(600);
/// How long a model that was brought for an expected request is kept for it.
pub(crate) const EXPECTED_FOR: Span = Span::secs(10);

const _: () = assert!(STARVED_TURN >= 2, "a node must not serve the starved alone");
const _: () = assert!(RESIDENCY_MIN.nanos() < STARVED_AFTER.nanos(), "a guard against thrashing must not starve");
