//! Policies: who goes first, where, and what is brought for it.
//!
//! All of them decide over the same books and with the same means, so that a simulation compares decisions and
//! nothing else.

mod ahead;
mod batch;
mod faaswap;
mod means;
mod plan;
mod predict;
mod pressure;
mod published;
mod simple;

use crate::{
    books::Books,
    event::Action,
    eviction::{Eviction, Random},
    slots::Slot,
    time::At,
};

/// Which policy decides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PolicyKind {
    /// Ours: placement by predicted completion, swaps beside runs, eviction by regret, classes by required requests.
    #[default]
    Faaswap,
    /// The published one: its Algorithm 1, its queues, heavy models evicted last.
    Torpor,
    /// As published, but evicts the least recently used.
    Lru,
    /// As published, but in order of arrival.
    Fifo,
    /// Any request, any idle device, any victim.
    Random {
        /// What the choices follow from.
        seed: u64,
    },
}

impl PolicyKind {
    /// All of them, with this seed where one follows from a seed.
    pub const fn all(seed: u64) -> [Self; 5] {
        [Self::Faaswap, Self::Torpor, Self::Lru, Self::Fifo, Self::Random { seed }]
    }

    /// Its name in settings, traces and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Faaswap => "faaswap",
            Self::Torpor => "torpor",
            Self::Lru => "lru",
            Self::Fifo => "fifo",
            Self::Random { .. } => "random",
        }
    }

    /// What its choices follow from; 0 where they follow from nothing else than events.
    pub const fn seed(self) -> u64 {
        match self {
            Self::Random { seed } => seed,
            Self::Faaswap | Self::Torpor | Self::Lru | Self::Fifo => 0,
        }
    }

    /// The policy of that name.
    pub fn of(name: &str, seed: u64) -> Option<Self> {
        Self::all(seed).into_iter().find(|policy| policy.name() == name)
    }
}

/// What happened, as far as it decides how much is to be looked at again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trigger {
    /// Nothing that a decision depends on.
    Nothing,
    /// A request of this function has come.
    Arrived(Slot),
    /// Lanes, links or memory may be free, or time has passed.
    Changed,
}

/// What a policy is asked. Three implementations: ours, the published one, and chance.
pub(crate) trait Policy {
    /// Brings and starts what should be brought and started now; gives when to look again if nothing happens.
    fn fill(&mut self, books: &mut Books, trigger: Trigger, actions: &mut Vec<Action>) -> At;

    /// A run of this model has answered.
    fn ended(&mut self, books: &mut Books, model: Slot) {
        let _ = (books, model);
    }

    /// A request of this function is about to come.
    fn expect(&mut self, books: &Books, function: Slot) {
        let _ = (books, function);
    }
}

/// The policy of a scheduler.
#[derive(Clone, Debug)]
pub(crate) enum Chosen {
    Faaswap(faaswap::Faaswap),
    Published(published::Published),
    Simple(simple::Chance),
}

impl Chosen {
    pub(crate) fn of(kind: PolicyKind) -> (Self, Eviction) {
        match kind {
            PolicyKind::Faaswap => (Self::Faaswap(faaswap::Faaswap::new()), Eviction::Regret),
            PolicyKind::Torpor => {
                (Self::Published(published::Published::new(published::Order::Required)), Eviction::HeavyLast)
            }
            PolicyKind::Lru => (Self::Published(published::Published::new(published::Order::Required)), Eviction::Lru),
            PolicyKind::Fifo => {
                (Self::Published(published::Published::new(published::Order::Arrival)), Eviction::HeavyLast)
            }
            PolicyKind::Random { seed } => {
                (Self::Simple(simple::Chance::new(seed)), Eviction::Random(Random::new(seed ^ 0x5EED)))
            }
        }
    }

    pub(crate) fn as_policy(&mut self) -> &mut dyn Policy {
        match self {
            Self::Faaswap(policy) => policy,
            Self::Published(policy) => policy,
            Self::Simple(policy) => policy,
        }
    }
}
