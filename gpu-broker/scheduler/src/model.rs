//! A model: where it may run, where its weights are, what it costs, and how often it is asked for.

use std::collections::BTreeSet;

use faaswap_protocol::Bytes;

use crate::{
    cost::Cost,
    demand::Demand,
    event::{Form, ModelId, RequestKey, Source},
    eviction::Worth,
    slots::Slot,
    time::{At, Span},
};

/// Tells one stay of a model on a device from the next, so that a late report is not booked on the wrong one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StayId(pub(crate) u64);

/// A device on which the model is bound.
#[derive(Clone, Debug)]
pub(crate) struct Home {
    /// Its place in the list of devices.
    pub(crate) device: usize,
    pub(crate) charge: Bytes,
    pub(crate) cost: Cost,
    /// Swap-ins that failed in a row.
    pub(crate) failures: u32,
    /// No swap-in before that.
    pub(crate) retry_at: At,
    /// Its swap-out was asked for and has not been reported done: the addresses cannot be given memory yet.
    pub(crate) leaving: bool,
}

impl Home {
    /// Whether a swap-in could be asked for, as far as the last ones have shown.
    pub(crate) fn may_come(&self, now: At) -> bool {
        self.retry_at <= now && !self.leaving
    }
}

/// How far a model's weights are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Weights {
    /// A swap-in was asked for and has not been reported done.
    Coming {
        /// When it is expected to have ended.
        expected: At,
        source: Source,
        /// When it must have ended for the request that it was brought for.
        need_by: At,
        /// Another copy shared its path: its time says nothing about the path alone.
        contended: bool,
    },
    /// All there.
    Resident,
}

/// One stay of a model on a device: charged from the decision to swap in until the decision to swap out.
#[derive(Clone, Debug)]
pub(crate) struct Stay {
    pub(crate) id: StayId,
    pub(crate) device: usize,
    pub(crate) weights: Weights,
    pub(crate) charge: Bytes,
    /// Runs that were started and have not ended. Weights in flight are never taken away.
    pub(crate) in_flight: u32,
    /// Copies to other devices that read from here.
    pub(crate) lent: u32,
    pub(crate) asked: At,
    pub(crate) last_used: At,
    /// Brought before its request came, and kept for it until then.
    pub(crate) kept_until: At,
    /// The model was removed: swapped out as soon as nothing runs on it.
    pub(crate) doomed: bool,
    /// Its place in the device's order of eviction; `None` while it cannot leave.
    pub(crate) listed: Option<Worth>,
}

impl Stay {
    /// Whether the weights may be taken away now.
    ///
    /// Weights that are still coming stay: every report of a swap-in then finds the stay that it is about.
    pub(crate) fn can_leave(&self) -> bool {
        self.in_flight == 0 && self.lent == 0 && self.weights == Weights::Resident
    }

    /// When the weights will be there, as far as is known.
    ///
    /// A copy that is overdue is expected the later the longer it is overdue: one that is stuck is then avoided.
    pub(crate) fn ready_at(&self, now: At) -> At {
        match self.weights {
            Weights::Resident => now,
            Weights::Coming { expected, .. } if expected > now => expected,
            Weights::Coming { expected, .. } => now + (now - expected) + Span::micros(100),
        }
    }
}

/// One model.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    pub(crate) id: ModelId,
    pub(crate) homes: Vec<Home>,
    pub(crate) stays: Vec<Stay>,
    pub(crate) demand: Demand,
    /// The tightest deadline among its functions.
    pub(crate) deadline: Span,
    /// Functions that run it.
    pub(crate) functions: u32,
    /// Requests that wait for it.
    pub(crate) waiting: u32,
    /// Those of them that may share a run with others of their form, by deadline; and their functions.
    pub(crate) sharing: BTreeSet<(Form, At, RequestKey, Slot)>,
    /// When its next request is foreseen, as it stands in the node's calendar.
    pub(crate) foreseen: Option<At>,
    pub(crate) removed: bool,
}

impl Model {
    pub(crate) fn new(id: ModelId) -> Self {
        Self {
            id,
            homes: Vec::new(),
            stays: Vec::new(),
            demand: Demand::new(),
            deadline: Span::secs(3600),
            functions: 0,
            waiting: 0,
            sharing: BTreeSet::new(),
            foreseen: None,
            removed: false,
        }
    }

    pub(crate) fn home(&self, device: usize) -> Option<&Home> {
        self.homes.iter().find(|home| home.device == device)
    }

    pub(crate) fn home_mut(&mut self, device: usize) -> Option<&mut Home> {
        self.homes.iter_mut().find(|home| home.device == device)
    }

    pub(crate) fn stay(&self, device: usize) -> Option<&Stay> {
        self.stays.iter().find(|stay| stay.device == device)
    }

    pub(crate) fn stay_mut(&mut self, device: usize) -> Option<&mut Stay> {
        self.stays.iter_mut().find(|stay| stay.device == device)
    }

    /// Stays that are not about to leave.
    pub(crate) fn copies(&self) -> usize {
        self.stays.iter().filter(|stay| !stay.doomed).count()
    }

    /// A run of it alone, where it is fastest.
    pub(crate) fn run(&self) -> Span {
        self.homes.iter().map(|home| home.cost.run()).min().unwrap_or_default()
    }
}
