//! Whom to evict: an order of what can leave, cheapest first.
//!
//! The order is kept in a tree per device, so a place in it must not depend on the present: it changes when a model is
//! asked for, used, or gets or loses a copy, and then the books list it anew. Models in flight are not in the tree.

use crate::{
    demand::{LOG_ONE, log2},
    model::{Home, Model, Stay},
    time::{Span, scale},
};

/// A place in the order: the smallest leaves first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Worth(u8, i64);

/// What a swap-in takes beyond its bytes: to be asked for, queued, and seen to end; 0.15 to 0.43 ms behind a broker with H100s.
const BEYOND_BYTES: Span = Span::micros(300);
/// Leaves before anything else.
const SPARE: u8 = 0;
/// Leaves when nothing else can.
const KEPT: u8 = 1;

/// The rule.
#[derive(Clone, Debug)]
pub(crate) enum Eviction {
    /// Duplicates first, then by regret: how often it is asked for, times what bringing it back would cost, per byte.
    Regret,
    /// Light models and duplicates first, then the heavy ones; both least recently used first. As published.
    HeavyLast,
    /// Least recently used first.
    Lru,
    /// Any.
    Random(Random),
}

impl Eviction {
    /// The place of a stay. `copy` is the time of a swap-in on an idle link.
    pub(crate) fn worth(&mut self, model: &Model, home: &Home, stay: &Stay, copy: Span) -> Worth {
        let used = i64::try_from(stay.last_used.nanos()).unwrap_or(i64::MAX);
        match self {
            Self::Regret if model.copies() > 1 => Worth(SPARE, used),
            Self::Regret => Worth(KEPT, model.demand.standing().saturating_add(pain_per_byte(model, home, copy))),
            Self::HeavyLast if model.copies() > 1 || is_light(home, copy) => Worth(SPARE, used),
            Self::HeavyLast => Worth(KEPT, used),
            Self::Lru => Worth(SPARE, used),
            Self::Random(random) => Worth(SPARE, i64::try_from(random.bits() >> 1).unwrap_or(0)),
        }
    }
}

/// Whether swapping it in costs its run nothing: the copy hides behind the run.
pub(crate) fn is_light(home: &Home, copy: Span) -> bool {
    copy <= home.cost.run()
}

/// The logarithm of what a swap-in costs per byte that eviction would free.
///
/// It takes a moment whatever it copies, so that of as many bytes a few large ones rather leave than many small ones; it occupies
/// the link; and it makes the request later; that hurts the more, the nearer it comes to the deadline.
fn pain_per_byte(model: &Model, home: &Home, copy: Span) -> i64 {
    let run = home.cost.run();
    let added = copy - run + home.cost.tail();
    let near_permille = scale((run + added).nanos(), 1000, model.deadline.nanos().max(1)).min(2_000);
    let weight_permille = 1000 + 8 * near_permille * near_permille / 1000;
    let pain = BEYOND_BYTES + copy / 4 + added.permille(weight_permille);
    log2(pain.nanos().saturating_mul(1 << 16)).saturating_sub(log2(home.charge.get())).max(-64 * LOG_ONE)
}

/// Chance that replays: every number follows from the seed (splitmix64).
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) const fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// One of `0..n`; 0 where `n` is 0.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.bits() % (n as u64).max(1)).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use faaswap_protocol::Bytes;

    use super::*;
    use crate::{
        cost::Cost,
        event::ModelId,
        model::{StayId, Weights},
        time::At,
    };

    fn at(ms: u64) -> At {
        At::START + Span::millis(ms)
    }

    /// A model with a stay on each of so many devices, asked for at these times.
    fn model(mib: u64, run_ms: u64, deadline_ms: u64, copies: usize, asked: &[u64]) -> Model {
        let mut cost = Cost::prior(Bytes::mib(mib));
        cost.measured(Bytes::mib(mib), Span::millis(run_ms));
        let (charge, retry_at) = (Bytes::mib(mib), At::START);
        let mut model = Model { deadline: Span::millis(deadline_ms), ..Model::new(ModelId(0)) };
        asked.iter().for_each(|ms| model.demand.asked(at(*ms)));
        for device in 0..copies {
            model.homes.push(Home { device, charge, cost: cost.clone(), failures: 0, retry_at, leaving: false });
            model.stays.push(Stay {
                id: StayId(0),
                device,
                weights: Weights::Resident,
                charge,
                in_flight: 0,
                lent: 0,
                asked: At::START,
                last_used: at(asked.last().copied().unwrap_or(0)),
                kept_until: At::START,
                doomed: false,
                listed: None,
            });
        }
        model
    }

    fn worth(rule: &mut Eviction, model: &Model) -> Worth {
        let home = &model.homes[0];
        // 10 GB/s.
        let copy = Span::of_nanos(home.cost.weights.get() / 10);
        rule.worth(model, home, &model.stays[0], copy)
    }

    #[test]
    fn duplicates_leave_before_the_last_copy_of_anything() {
        let (duplicate, sole) = (model(1340, 43, 200, 2, &[1, 2, 3]), model(20, 12, 80, 1, &[1]));
        assert!(worth(&mut Eviction::Regret, &duplicate) < worth(&mut Eviction::Regret, &sole));
    }

    #[test]
    fn what_is_asked_for_more_stays_longer() {
        let (often, seldom) = (model(100, 9, 80, 1, &[1, 2, 3]), model(100, 9, 80, 1, &[3]));
        assert!(worth(&mut Eviction::Regret, &seldom) < worth(&mut Eviction::Regret, &often));
    }

    #[test]
    fn of_two_that_are_asked_for_alike_the_one_whose_swap_endangers_its_deadline_stays() {
        let (heavy, light) = (model(1340, 43, 200, 1, &[1, 2]), model(57, 25, 80, 1, &[1, 2]));
        assert!(worth(&mut Eviction::Regret, &light) < worth(&mut Eviction::Regret, &heavy));
    }

    #[test]
    fn the_published_rule_keeps_heavy_models_whatever_was_used_last() {
        let (heavy, light) = (model(1340, 43, 200, 1, &[1]), model(57, 25, 80, 1, &[9]));
        assert!(worth(&mut Eviction::HeavyLast, &light) < worth(&mut Eviction::HeavyLast, &heavy));
        assert!(worth(&mut Eviction::Lru, &heavy) < worth(&mut Eviction::Lru, &light));
    }
}
