//! How a function stands to its objective: the required request count over a sliding window.
//!
//! With `m` of `n` requests within the deadline and a percentile `p`, the function needs
//! `RRC = (p n - m) / (1 - p)` more good ones in a row to be compliant. What is older than the window does not count:
//! a function is neither lost for ever after a bad hour, nor safe for ever after a good one.

use faaswap_protocol::Slo;

use crate::time::{At, Span};

/// Parts of the window; the oldest falls out as a whole.
const PARTS: usize = 8;
/// The length of one part.
const PART: Span = Span::secs(75);
/// A percentile is given in so many parts of one.
const WHOLE: i64 = 10_000;

/// Requests and those of them in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) asked: u32,
    pub(crate) met: u32,
}

impl Count {
    pub(crate) const NONE: Self = Self { asked: 0, met: 0 };

    pub(crate) fn missed(self) -> u32 {
        self.asked.saturating_sub(self.met)
    }

    fn add(&mut self, met: bool) {
        self.asked = self.asked.saturating_add(1);
        self.met = self.met.saturating_add(u32::from(met));
    }
}

/// What has become of requests that somebody waits for, of all functions and of those of the high class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) all: Count,
    pub(crate) high: Count,
}

impl Tally {
    pub(crate) fn add(&mut self, is_high: bool, met: bool) {
        self.all.add(met);
        if is_high {
            self.high.add(met);
        }
    }

    /// One that was added as missed was in time after all.
    pub(crate) fn amend(&mut self, is_high: bool) {
        self.all.met = self.all.met.saturating_add(1);
        self.high.met = self.high.met.saturating_add(u32::from(is_high));
    }
}

/// One function's record.
#[derive(Clone, Debug)]
pub(crate) struct Objective {
    percentile: i64,
    parts: [Count; PARTS],
    /// Which part of time `parts[part % PARTS]` is.
    part: u64,
    sum: Count,
    /// Since the function was added or the policy chosen: what the published policy looks at.
    pub(crate) lifetime: Count,
}

impl Objective {
    pub(crate) fn new(slo: Slo) -> Self {
        // Out of range is refused at registration; here it only must not divide by zero.
        let percentile = i64::from(slo.percentile.clamp(1, 9_999));
        let (parts, sum) = ([Count::default(); PARTS], Count::default());
        Self { percentile, parts, part: 0, sum, lifetime: Count::default() }
    }

    /// Forgets all requests so far.
    pub(crate) fn begin_anew(&mut self) {
        (self.parts, self.sum, self.lifetime) = ([Count::default(); PARTS], Count::default(), Count::default());
    }

    /// A request ended, in time or not.
    pub(crate) fn record(&mut self, now: At, met: bool) {
        self.slide(now);
        self.parts[place(self.part)].add(met);
        self.sum.add(met);
        self.lifetime.add(met);
    }

    /// A request that was recorded as missed was in time after all.
    pub(crate) fn amend(&mut self, now: At) {
        self.slide(now);
        for count in [&mut self.parts[place(self.part)], &mut self.sum, &mut self.lifetime] {
            count.met = count.met.saturating_add(1);
        }
    }

    fn slide(&mut self, now: At) {
        let current = now.nanos() / PART.nanos();
        let steps = current.saturating_sub(self.part).min(PARTS as u64);
        for step in 1..=steps {
            let gone = std::mem::take(&mut self.parts[place(self.part + step)]);
            self.sum.asked -= gone.asked;
            self.sum.met -= gone.met;
        }
        self.part = self.part.max(current);
    }

    /// RRC in thousandths of a request; negative where there is room for misses.
    pub(crate) fn required_permille(&self) -> i64 {
        self.deficit() * 1000 / (WHOLE - self.percentile)
    }

    /// `p n - m` over the window, in units of 1/[`WHOLE`] requests.
    fn deficit(&self) -> i64 {
        self.percentile * i64::from(self.sum.asked) - WHOLE * i64::from(self.sum.met)
    }

    /// `p n - m` since the start, in thousandths of a request.
    pub(crate) fn lifetime_deficit_permille(&self) -> i64 {
        (self.percentile * i64::from(self.lifetime.asked) - WHOLE * i64::from(self.lifetime.met)) * 1000 / WHOLE
    }

    /// How many of the next requests could be missed without missing the objective.
    pub(crate) fn spare(&self) -> i64 {
        -(self.deficit() + self.percentile) / WHOLE
    }

    pub(crate) fn is_met_in_lifetime(&self) -> bool {
        self.lifetime_deficit_permille() <= 0
    }

    /// `1 - p` in ten-thousandths.
    pub(crate) fn tail(&self) -> i64 {
        WHOLE - self.percentile
    }
}

fn place(part: u64) -> usize {
    usize::try_from(part % PARTS as u64).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn objective() -> Objective {
        Objective::new(Slo { deadline: Duration::from_millis(50), percentile: 9800 })
    }

    #[test]
    fn the_required_count_is_the_published_formula() {
        let mut objective = objective();
        (0..100).for_each(|n| objective.record(At::START, n >= 5));
        // (0.98 * 100 - 95) / 0.02 = 150
        assert_eq!(objective.required_permille(), 150_000);
        (0..150).for_each(|_| objective.record(At::START, true));
        assert_eq!(objective.required_permille(), 0);
    }

    #[test]
    fn what_is_older_than_the_window_is_forgotten() {
        let mut objective = objective();
        (0..10).for_each(|_| objective.record(At::START, false));
        objective.record(At::START + PART * 20, true);
        assert!(objective.required_permille() <= 0);
        assert!(!objective.is_met_in_lifetime());
    }

    #[test]
    fn what_was_given_up_and_is_in_time_after_all_counts_once_and_as_met() {
        let (mut given_up, mut plain) = (objective(), objective());
        given_up.record(At::START, false);
        given_up.amend(At::START + PART);
        plain.record(At::START, true);
        assert_eq!(given_up.required_permille(), plain.required_permille());
        assert!(given_up.is_met_in_lifetime());
        // The miss is out of the window by now, what made up for it is not.
        given_up.record(At::START + PART * PARTS as u64, true);
        assert!(given_up.required_permille() < 0);
    }

    #[test]
    fn spare_is_what_may_still_be_missed() {
        let mut objective = objective();
        assert_eq!(objective.spare(), 0, "a first request that is missed is a miss");
        (0..99).for_each(|_| objective.record(At::START, true));
        assert_eq!(objective.spare(), 1);
        objective.record(At::START, false);
        assert_eq!(objective.spare(), 0);
    }

    #[test]
    fn absurd_percentiles_do_not_divide_by_zero() {
        for percentile in [0, 10_000, u16::MAX] {
            let mut objective = Objective::new(Slo { deadline: Duration::ZERO, percentile });
            objective.record(At::NEVER, false);
            assert!(objective.required_permille() >= 0);
        }
    }
}
