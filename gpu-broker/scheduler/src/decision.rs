//! Why a run went where it went: the parts of each prediction, for the last decisions.

use std::{collections::VecDeque, time::Duration};

use crate::{
    event::{DeviceId, FunctionKey, ModelId, Moment, RequestKey, Source},
    limits::DECISIONS_MAX,
};

/// A prediction in parts: the interference score. All spans count from the decision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Score {
    /// Until a lane is free, and more urgent work that waits for it is over.
    pub lane_wait: Duration,
    /// Copies to the same device that go first.
    pub copy_queue: Duration,
    /// The copy on an idle link.
    pub copy: Duration,
    /// What copies on shared links add to it.
    pub copy_contention: Duration,
    /// The run alone, at full clock.
    pub run: Duration,
    /// What runs beside it add.
    pub corun: Duration,
    /// What throttling and foreign load add.
    pub throttle: Duration,
    /// What remains when both copy and run are over but were not in step.
    pub tail: Duration,
    /// Until the answer: not the sum of the parts, since copies and runs overlap.
    pub total: Duration,
    /// What the choice costs others, in the same unit: link time, and what is evicted for it.
    pub price: Duration,
}

/// What was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Run now, where the weights are or come.
    Run {
        /// How many requests the run answers.
        size: usize,
    },
    /// Bring the weights for a request that waits.
    Bring,
    /// Bring the weights for a request that is foreseen.
    BringAhead,
    /// Decline: it cannot be in time.
    Refuse,
}

/// One decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// When.
    pub at: Moment,
    /// What.
    pub choice: Choice,
    /// For which request; `None` where it is only foreseen.
    pub request: Option<RequestKey>,
    /// Its function; `None` where only the model is foreseen.
    pub function: Option<FunctionKey>,
    /// Its model.
    pub model: ModelId,
    /// The device; `None` for a refusal.
    pub device: Option<DeviceId>,
    /// Where the weights come from; `None` where they are there.
    pub source: Option<Source>,
    /// Time to the deadline.
    pub left: Duration,
    /// The prediction.
    pub score: Score,
    /// Places that were compared.
    pub compared: u16,
}

/// The last decisions.
#[derive(Clone, Debug, Default)]
pub(crate) struct Decisions {
    ring: VecDeque<Decision>,
}

impl Decisions {
    pub(crate) fn add(&mut self, decision: Decision) {
        if self.ring.len() >= DECISIONS_MAX {
            self.ring.pop_front();
        }
        self.ring.push_back(decision);
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Decision> {
        self.ring.iter()
    }
}
