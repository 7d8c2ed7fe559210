//! Waiting requests: one queue per function, and the orders in which functions are looked at.

use std::{
    collections::{BTreeSet, VecDeque},
    ops::Range,
};

use faaswap_protocol::{Batching, Late, Priority, Slo};

use crate::{
    batches::BatchLimit,
    event::{Form, FunctionKey, RequestKey},
    objective::Objective,
    slots::Slot,
    time::{At, Span},
};

/// What a request can still expect, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Tier {
    /// Can be in time.
    Fresh,
    /// Cannot be in time any more.
    Late,
    /// Nobody waits for it.
    Batch,
    /// None: behind all others.
    End,
}

/// A function's place among those with something waiting.
pub(crate) type Rank = (Tier, At);

/// A request that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Waiting {
    pub(crate) request: RequestKey,
    pub(crate) arrived: At,
    pub(crate) deadline: At,
    pub(crate) form: Option<Form>,
}

/// A function and what waits for it.
#[derive(Clone, Debug)]
pub(crate) struct Function {
    pub(crate) key: FunctionKey,
    pub(crate) model: Slot,
    pub(crate) deadline: Span,
    pub(crate) priority: Priority,
    pub(crate) late: Late,
    pub(crate) objective: Objective,
    /// Mean latency, for the published order.
    pub(crate) latency: Span,
    pub(crate) in_flight: u32,
    pub(crate) batch: BatchLimit,
    /// By deadline.
    pub(crate) fresh: VecDeque<Waiting>,
    /// What cannot be in time any more, by deadline.
    pub(crate) stale: VecDeque<Waiting>,
    /// Its entries in [`Ready::ranks`].
    listed: [Option<Rank>; 2],
}

impl Function {
    pub(crate) fn new(
        key: FunctionKey,
        model: Slot,
        slo: Slo,
        (priority, late, batching): (Priority, Late, Batching),
    ) -> Self {
        Self {
            key,
            model,
            deadline: slo.deadline.into(),
            priority,
            late,
            objective: Objective::new(slo),
            latency: Span::ZERO,
            in_flight: 0,
            batch: BatchLimit::new(batching),
            fresh: VecDeque::new(),
            stale: VecDeque::new(),
            listed: [None; 2],
        }
    }

    /// Its place by its fresh requests.
    pub(crate) fn rank(&self) -> Option<Rank> {
        self.listed[0]
    }

    pub(crate) fn waiting_len(&self) -> usize {
        self.fresh.len() + self.stale.len()
    }

    /// What waits in that tier.
    pub(crate) fn queue(&self, tier: Tier) -> &VecDeque<Waiting> {
        match tier {
            Tier::Fresh | Tier::Batch | Tier::End => &self.fresh,
            Tier::Late => &self.stale,
        }
    }

    /// Whether it is of the high class: its objective is within reach.
    pub(crate) fn is_high(&self, threshold_permille: i64) -> bool {
        self.objective.required_permille() <= threshold_permille
    }

    /// A request was answered after so long.
    pub(crate) fn took(&mut self, latency: Span) {
        self.latency = if self.latency.is_zero() { latency } else { (self.latency * 15 + latency) / 16 };
    }
}

/// The orders.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ready {
    /// Functions with something waiting, best first; one that has fresh and late requests is there twice.
    pub(crate) ranks: BTreeSet<(Rank, Slot)>,
    /// Everything that waits, oldest first.
    pub(crate) by_age: BTreeSet<(At, RequestKey)>,
    /// What is to be refused when its deadline passes.
    pub(crate) refusable: BTreeSet<(At, RequestKey)>,
    /// What was given up and waits, oldest first.
    pub(crate) given_up: BTreeSet<(At, RequestKey)>,
}

impl Ready {
    pub(crate) fn waiting_len(&self) -> usize {
        self.by_age.len()
    }

    /// Functions with something waiting in these tiers, best first.
    pub(crate) fn in_tiers(&self, tiers: Range<Tier>) -> impl Iterator<Item = (Rank, Slot)> {
        let bound = |tier| ((tier, At::START), Slot::FIRST);
        self.ranks.range(bound(tiers.start)..bound(tiers.end)).copied()
    }

    pub(crate) fn push(&mut self, function: &mut Function, waiting: Waiting) {
        insert(&mut function.fresh, waiting);
        self.by_age.insert((waiting.arrived, waiting.request));
        if function.late == Late::Refuse {
            self.refusable.insert((waiting.deadline, waiting.request));
        }
    }

    /// Takes a request out of its queue; tells whether it was given up.
    pub(crate) fn take(&mut self, function: &mut Function, waiting: Waiting) -> bool {
        let given_up = !remove(&mut function.fresh, waiting) && remove(&mut function.stale, waiting);
        self.given_up.remove(&(waiting.arrived, waiting.request));
        self.by_age.remove(&(waiting.arrived, waiting.request));
        self.refusable.remove(&(waiting.deadline, waiting.request));
        given_up
    }

    /// The most urgent fresh request of a function becomes a late one.
    pub(crate) fn give_up_head(&mut self, function: &mut Function) {
        if let Some(head) = function.fresh.pop_front() {
            self.given_up.insert((head.arrived, head.request));
            insert(&mut function.stale, head);
        }
    }

    /// All that waits for a function is fresh again, for a policy that has given nothing up.
    pub(crate) fn take_back(&mut self, function: &mut Function) {
        for waiting in std::mem::take(&mut function.stale) {
            self.given_up.remove(&(waiting.arrived, waiting.request));
            insert(&mut function.fresh, waiting);
        }
    }

    /// Lists a function by its heads; `fresh` is the rank of the fresh one.
    pub(crate) fn relist(&mut self, slot: Slot, function: &mut Function, fresh: Rank) {
        let late = function.stale.front().map(|head| (Tier::Late, head.arrived));
        let new = [function.fresh.front().map(|_| fresh), late];
        if new != function.listed {
            for rank in function.listed.into_iter().flatten() {
                self.ranks.remove(&(rank, slot));
            }
            for rank in new.into_iter().flatten() {
                self.ranks.insert((rank, slot));
            }
            function.listed = new;
        }
    }
}

fn insert(queue: &mut VecDeque<Waiting>, waiting: Waiting) {
    let behind = queue.partition_point(|other| (other.deadline, other.request) <= (waiting.deadline, waiting.request));
    queue.insert(behind, waiting);
}

fn remove(queue: &mut VecDeque<Waiting>, waiting: Waiting) -> bool {
    let at = queue.iter().position(|other| other.request == waiting.request);
    at.and_then(|at| queue.remove(at)).is_some()
}
