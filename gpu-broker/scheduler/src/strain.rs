//! How much runs slow each other down, learned from runs that had others beside them.
//!
//! The slowdown over the number beside, as a quotient of two sums: a run that hardly overlapped with another one says little, since
//! what it varies by anyway is divided by next to nothing there, and it counts for as little. What was seen fades. Who has learned that
//! running side by side does not pay runs nothing side by side, and so would never learn otherwise: on four H100s three devices once
//! ran one at a time for good, for some runs that were slow while models were still being bound.

use crate::{
    demand::{FADE_ONE, faded},
    time::{At, Span},
};

/// How much a run is assumed to slow down per run beside it, in thousandths: worth a try.
const PRIOR: u64 = 600;
/// More than one: running side by side would be slower than one after the other.
const MAX: u64 = 2_000;
/// What is assumed counts as much as so many runs with one beside them, in thousandths ...
const PRIOR_WEIGHT: i64 = 1_000;
/// ... and all that was seen as much as so many at most, so that what is new counts.
const WEIGHT_MAX: i64 = 128_000;
/// After this long without a run beside others, what a device has seen counts half ...
const DEVICE_FADES: Span = Span::secs(1);
/// ... and what was seen of one of its models, which is asked for more seldom.
const MODEL_FADES: Span = Span::secs(30);

/// What was seen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Strain {
    /// Slowdowns times what was beside, and the squares of the latter; both in thousandths.
    slowed: i64,
    weight: i64,
    at: At,
    fades: Span,
}

/// One run beside others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Beside {
    /// How much longer it took than alone, in thousandths; negative where it was shorter.
    pub(crate) slower_permille: i64,
    /// How many ran beside it on average, in thousandths.
    pub(crate) beside_permille: u64,
}

impl Strain {
    pub(crate) const fn of_device() -> Self {
        Self { slowed: 0, weight: 0, at: At::START, fades: DEVICE_FADES }
    }

    pub(crate) const fn of_model() -> Self {
        Self { slowed: 0, weight: 0, at: At::START, fades: MODEL_FADES }
    }

    /// Both sums as they count now.
    fn sums(&self, now: At) -> (i64, i64) {
        let left = i64::try_from(faded(FADE_ONE, now - self.at, self.fades)).unwrap_or(0);
        let one = FADE_ONE.cast_signed();
        (self.slowed.saturating_mul(left) / one, self.weight.saturating_mul(left) / one)
    }

    pub(crate) fn learn(&mut self, now: At, run: Beside) {
        let (slowed, weight) = self.sums(now);
        let beside = i64::try_from(run.beside_permille.min(64_000)).unwrap_or(0);
        let most = beside.saturating_mul(MAX.cast_signed()) / 1000;
        let slower = run.slower_permille.clamp(-beside, most);
        let (slowed, weight) = (slowed + slower * beside / 1000, weight + beside * beside / 1000);
        let kept = weight.min(WEIGHT_MAX);
        // Where there is too much, both shrink alike.
        self.slowed = slowed.saturating_mul(kept) / weight.max(1);
        self.weight = kept;
        self.at = now;
    }

    /// In thousandths of a run per run beside it; `others` is what is assumed where little was seen.
    fn value(&self, now: At, others: u64) -> u64 {
        let (slowed, weight) = self.sums(now);
        let assumed = others.min(MAX).cast_signed() * PRIOR_WEIGHT / 1000;
        let strain = (assumed + slowed).saturating_mul(1000) / (PRIOR_WEIGHT + weight);
        strain.clamp(0, MAX.cast_signed()).unsigned_abs()
    }

    /// What a device's runs show.
    pub(crate) fn on_device(&self, now: At) -> u64 {
        self.value(now, PRIOR)
    }

    /// What one of its models' runs show, where there were enough, beside what all of them do.
    pub(crate) fn for_model(&self, now: At, device: &Self) -> u64 {
        self.value(now, device.on_device(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> At {
        At::START + Span::millis(ms)
    }

    fn seen(runs: &[(i64, u64)]) -> Strain {
        let mut strain = Strain::of_device();
        for &(slower_permille, beside_permille) in runs {
            strain.learn(at(0), Beside { slower_permille, beside_permille });
        }
        strain
    }

    #[test]
    fn it_is_the_slowdown_per_run_beside() {
        let strain = seen(&[(500, 2_000); 40]).on_device(at(0));
        assert!((245..260).contains(&strain), "{strain}");
    }

    #[test]
    fn what_a_short_overlap_says_counts_little() {
        // A run varies by a tenth; where the overlap is as small, that would be a strain of one.
        let mut runs = vec![(100, 100); 40];
        runs.extend([(250, 1_000); 4]);
        let strain = seen(&runs).on_device(at(0));
        assert!(strain < 500, "{strain}");
    }

    #[test]
    fn what_was_learned_from_wild_runs_is_forgotten_where_nothing_runs_side_by_side() {
        let wild = seen(&[(17_000, 1_500); 20]);
        assert!(wild.on_device(at(0)) > 1_800);
        assert!(wild.on_device(at(8_000)) < 900, "{}", wild.on_device(at(8_000)));
    }

    #[test]
    fn a_model_that_was_not_seen_is_like_the_others() {
        let device = seen(&[(300, 1_000); 50]);
        let mut model = Strain::of_model();
        assert_eq!(model.for_model(at(0), &device), device.on_device(at(0)));
        (0..50).for_each(|_| model.learn(at(0), Beside { slower_permille: 900, beside_permille: 1_000 }));
        assert!(model.for_model(at(0), &device) > 850);
    }

    #[test]
    fn extremes_do_not_overflow() {
        let mut strain = Strain::of_device();
        for beside_permille in [0, 1, u64::MAX, 0] {
            for slower_permille in [i64::MIN, 0, i64::MAX] {
                strain.learn(At::NEVER, Beside { slower_permille, beside_permille });
                strain.learn(at(0), Beside { slower_permille, beside_permille });
                assert!(strain.on_device(at(1)) <= MAX && strain.on_device(At::NEVER) <= MAX);
            }
        }
    }
}
