//! Requests of one function in one run: what such runs cost, by how many, and when a function goes without.
//!
//! Sizes are powers of two, so that few are learned and each is learned soon. A size is tried once the one below it was
//! measured; it is used where a request's share of the run is less than in any smaller one.

use crate::{
    estimate::Estimate,
    limits::{APART_PAUSE_MAX, APART_PAUSE_MIN},
    time::{At, Span},
};

/// How many requests one run may answer. More than one, that is.
pub(crate) const SIZES: [u16; 4] = [2, 4, 8, 16];
/// A run of twice as many is assumed to take so many thousandths of the time: worth a try.
const DOUBLED_PRIOR_PERMILLE: u64 = 1_700;
/// A larger run must bring a request's share of it below so many thousandths of what it is in a smaller one.
const SHARE_MAX_PERMILLE: u64 = 950;
/// Sizes that did not pay are tried again after so many choices: what they were measured under may have changed.
const FORGET_EVERY: u32 = 64;

/// What runs of several requests of a model take on a device, nothing beside them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Batches {
    runs: [Estimate; SIZES.len()],
    choices: u32,
}

impl Batches {
    pub(crate) const fn new() -> Self {
        Self { runs: [Estimate::prior(0); SIZES.len()], choices: 0 }
    }

    /// A run of that size, alone, took so long.
    pub(crate) fn learn(&mut self, size: usize, took: Span) {
        let at = SIZES.iter().position(|one| usize::from(*one) == size);
        if let Some(run) = at.and_then(|at| self.runs.get_mut(at)) {
            run.learn(took.nanos());
        }
    }

    /// How many of at most so many requests are best run at once, and what that takes; more than `room` it may not take.
    pub(crate) fn best(&self, alone: Span, most: usize, room: Span) -> (usize, Span) {
        let (mut best, mut smaller) = ((1, alone), alone);
        for (&size, run) in SIZES.iter().zip(&self.runs) {
            let size = usize::from(size);
            let is_known = run.samples() > 0;
            let whole = if is_known { Span::of_nanos(run.value()) } else { smaller.permille(DOUBLED_PRIOR_PERMILLE) };
            if size > most || whole > room {
                break;
            }
            if (whole / size as u64) < (best.1 / best.0 as u64).permille(SHARE_MAX_PERMILLE) {
                best = (size, whole);
            }
            if !is_known {
                break;
            }
            smaller = whole;
        }
        best
    }

    /// A choice was made; now and then, what was not chosen is forgotten.
    pub(crate) fn chosen(&mut self, size: usize) {
        self.choices += 1;
        if self.choices >= FORGET_EVERY {
            self.choices = 0;
            for (_, run) in SIZES.iter().zip(&mut self.runs).filter(|(one, _)| usize::from(**one) > size) {
                *run = Estimate::prior(0);
            }
        }
    }
}

/// How many requests of a function may share a run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BatchLimit {
    max: u16,
    limit: u16,
    /// Until then the limit stands.
    until: At,
    pause: Span,
}

impl BatchLimit {
    pub(crate) const fn new(max: u16) -> Self {
        Self { max, limit: max, until: At::START, pause: Span::ZERO }
    }

    pub(crate) fn most(&self, now: At) -> usize {
        usize::from(if now < self.until { self.limit } else { self.max })
    }

    /// A run of that size was reported to have come apart: its requests had to be run one by one. Such sizes are left
    /// alone for a while, the longer the more often that happens.
    pub(crate) fn came_apart(&mut self, now: At, size: usize) {
        self.limit = u16::try_from(size / 2).unwrap_or(1).max(1);
        self.pause = (self.pause * 2).max(APART_PAUSE_MIN).min(APART_PAUSE_MAX);
        self.until = now + self.pause;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALONE: Span = Span::millis(10);
    const LONG: Span = Span::secs(1);

    #[test]
    fn sizes_are_tried_one_after_the_other_and_used_where_they_pay() {
        let mut batches = Batches::new();
        let mut tried = Vec::new();
        for _ in 0..8 {
            let (size, _) = batches.best(ALONE, 16, LONG);
            tried.push(size);
            // Reading the weights takes 8 ms, each request 2 ms; more than 8 do not fit into some cache.
            batches.learn(size, Span::millis(if size > 8 { 80 } else { 8 + 2 * size as u64 }));
        }
        assert_eq!(tried, [2, 4, 8, 16, 8, 8, 8, 8]);
        assert_eq!(batches.best(ALONE, 5, LONG), (4, Span::millis(16)), "no more than wait");
        assert_eq!(batches.best(ALONE, 16, Span::millis(20)), (4, Span::millis(16)), "no longer than there is room");
        assert_eq!(batches.best(ALONE, 16, Span::millis(9)), (1, ALONE));
    }

    #[test]
    fn a_size_that_does_not_pay_is_tried_again_after_long() {
        let mut batches = Batches::new();
        batches.learn(2, Span::millis(20));
        batches.learn(4, Span::millis(40));
        batches.learn(8, Span::millis(80));
        batches.learn(16, Span::millis(160));
        assert_eq!(batches.best(ALONE, 16, LONG).0, 1);
        let until = (0..2 * FORGET_EVERY).position(|_| {
            batches.chosen(1);
            batches.best(ALONE, 16, LONG).0 == 2
        });
        assert_eq!(until, Some(63));
    }

    #[test]
    fn what_comes_apart_is_left_alone_the_longer_the_more_often() {
        let mut limit = BatchLimit::new(16);
        let at = |ms| At::START + Span::millis(ms);
        limit.came_apart(at(0), 4);
        assert_eq!((limit.most(at(1)), limit.most(at(1_001))), (2, 16));
        limit.came_apart(at(1_001), 2);
        assert_eq!((limit.most(at(3_000)), limit.most(at(3_002))), (1, 16));
        (0..40).for_each(|_| limit.came_apart(at(4_000), 16));
        assert_eq!(limit.most(at(4_000) + APART_PAUSE_MAX), 16, "but not for ever");
    }
}
