//! Several requests in one run: what such runs cost, by how many, what they give, and when a function goes without.
//!
//! Sizes are powers of two, so that few are learned and each is learned soon. A size is tried once the one below it was
//! measured; it is used where a request's share of the run is less than in any smaller one. What runs take, and whether
//! they give what each request alone gives, is a matter of model and device, the latter of the requests' form too, whosever
//! requests they are; what a function takes of that, and how long it keeps to itself once something has gone wrong, is its own.

use std::collections::BTreeMap;

use faaswap_protocol::Batching;

use crate::{
    estimate::Estimate,
    event::{Form, Verdict},
    limits::{APART_PAUSE_MAX, APART_PAUSE_MIN, BATCH_MAX, VERDICTS_MAX},
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

/// What runs of several requests of a model take on a device, nothing beside them, and what they give.
#[derive(Clone, Debug)]
pub(crate) struct Batches {
    runs: [Estimate; SIZES.len()],
    /// Of sizes that were tried with such a form.
    verdicts: BTreeMap<(Form, usize), Verdict>,
    choices: u32,
}

/// What may share a run: requests of that form, for functions that take so much.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sharing {
    pub(crate) form: Form,
    pub(crate) batching: Batching,
}

impl Batches {
    pub(crate) const fn new() -> Self {
        Self { runs: [Estimate::prior(0); SIZES.len()], verdicts: BTreeMap::new(), choices: 0 }
    }

    /// A run of that size, alone, took so long.
    pub(crate) fn learn(&mut self, size: usize, took: Span) {
        let at = SIZES.iter().position(|one| usize::from(*one) == size);
        if let Some(run) = at.and_then(|at| self.runs.get_mut(at)) {
            run.learn(took.nanos());
        }
    }

    /// The executor has seen what runs of so many requests of that form give. Where forms come without end, all is forgotten
    /// now and then: the executor says it again.
    pub(crate) fn tried(&mut self, form: Form, size: usize, verdict: Verdict) {
        if self.verdicts.len() >= VERDICTS_MAX {
            self.verdicts.clear();
        }
        self.verdicts.insert((form, size), verdict);
    }

    /// Whether a run of that size gives what is taken, as far as is known.
    pub(crate) fn may_serve(&self, size: usize, sharing: Sharing) -> bool {
        let known = self.verdicts.get(&(sharing.form, size));
        sharing.batching != Batching::Off && known.is_none_or(|verdict| verdict.serves(sharing.batching))
    }

    /// Whether runs of requests of that form were seen to round otherwise than each alone, by some size.
    pub(crate) fn rounds(&self, form: Form) -> bool {
        self.verdicts.range((form, 0)..=(form, usize::MAX)).any(|(_, verdict)| *verdict == Verdict::Close)
    }

    /// How many of at most so many requests are best run at once, and what that takes; more than `room` gives a run of that
    /// size it may not take.
    pub(crate) fn best(
        &self,
        alone: Span,
        most: usize,
        sharing: Sharing,
        room: impl Fn(usize) -> Span,
    ) -> (usize, Span) {
        let (mut best, mut smaller) = ((1, alone), alone);
        for (&size, run) in SIZES.iter().zip(&self.runs) {
            let size = usize::from(size);
            let is_known = run.samples() > 0;
            let whole = if is_known { Span::of_nanos(run.value()) } else { smaller.permille(DOUBLED_PRIOR_PERMILLE) };
            if size > most {
                break;
            }
            let pays = (whole / size as u64) < (best.1 / best.0 as u64).permille(SHARE_MAX_PERMILLE);
            if pays && self.may_serve(size, sharing) && whole <= room(size) {
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

/// A time without something, the longer the more often it has gone wrong.
#[derive(Clone, Copy, Debug)]
struct Pause {
    until: At,
    last: Span,
}

impl Pause {
    const NONE: Self = Self { until: At::START, last: Span::ZERO };

    fn begin(&mut self, now: At) {
        self.last = (self.last * 2).max(APART_PAUSE_MIN).min(APART_PAUSE_MAX);
        self.until = now + self.last;
    }

    fn is_over(&self, now: At) -> bool {
        now >= self.until
    }
}

/// How many requests of a function may share a run, and whether with those of others.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BatchLimit {
    pub(crate) batching: Batching,
    /// How many while the first pause lasts.
    limit: u16,
    large: Pause,
    mixed: Pause,
}

impl BatchLimit {
    pub(crate) const fn new(batching: Batching) -> Self {
        Self { batching, limit: BATCH_MAX, large: Pause::NONE, mixed: Pause::NONE }
    }

    pub(crate) fn most(&self, now: At) -> usize {
        match self.batching {
            Batching::Off => 1,
            Batching::Exact | Batching::On => usize::from(if self.large.is_over(now) { BATCH_MAX } else { self.limit }),
        }
    }

    /// Whether its requests may share runs with those of other functions now.
    pub(crate) fn mixes(&self, now: At) -> bool {
        self.batching != Batching::Off && self.large.is_over(now) && self.mixed.is_over(now)
    }

    /// A run of that size was reported to have come apart: its requests had to be run one by one. Such sizes are left
    /// alone for a while, the longer the more often that happens.
    pub(crate) fn came_apart(&mut self, now: At, size: usize) {
        self.limit = u16::try_from(size / 2).unwrap_or(1).max(1);
        self.large.begin(now);
    }

    /// The same of a run with requests of other functions: whose they were that did not go together, nobody knows. So it
    /// keeps to itself for a while, and what it can do by itself stays.
    pub(crate) fn came_apart_from_others(&mut self, now: At) {
        self.mixed.begin(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALONE: Span = Span::millis(10);
    const LONG: Span = Span::secs(1);

    fn sharing(batching: Batching) -> Sharing {
        Sharing { form: Form(1), batching }
    }

    fn best(batches: &Batches, most: usize, room: Span) -> (usize, Span) {
        batches.best(ALONE, most, sharing(Batching::Exact), |_| room)
    }

    #[test]
    fn sizes_are_tried_one_after_the_other_and_used_where_they_pay() {
        let mut batches = Batches::new();
        let mut tried = Vec::new();
        for _ in 0..8 {
            let (size, _) = best(&batches, 16, LONG);
            tried.push(size);
            // Reading the weights takes 8 ms, each request 2 ms; more than 8 do not fit into some cache.
            batches.learn(size, Span::millis(if size > 8 { 80 } else { 8 + 2 * size as u64 }));
        }
        assert_eq!(tried, [2, 4, 8, 16, 8, 8, 8, 8]);
        assert_eq!(best(&batches, 5, LONG), (4, Span::millis(16)), "no more than wait");
        assert_eq!(best(&batches, 16, Span::millis(20)), (4, Span::millis(16)), "no longer than there is room");
        assert_eq!(best(&batches, 16, Span::millis(9)), (1, ALONE));
    }

    #[test]
    fn a_size_that_does_not_pay_is_tried_again_after_long() {
        let mut batches = Batches::new();
        batches.learn(2, Span::millis(20));
        batches.learn(4, Span::millis(40));
        batches.learn(8, Span::millis(80));
        batches.learn(16, Span::millis(160));
        assert_eq!(best(&batches, 16, LONG).0, 1);
        let until = (0..2 * FORGET_EVERY).position(|_| {
            batches.chosen(1);
            best(&batches, 16, LONG).0 == 2
        });
        assert_eq!(until, Some(63));
    }

    #[test]
    fn what_comes_apart_is_left_alone_the_longer_the_more_often() {
        let mut limit = BatchLimit::new(Batching::Exact);
        let at = |ms| At::START + Span::millis(ms);
        limit.came_apart(at(0), 4);
        assert_eq!((limit.most(at(1)), limit.most(at(1_001))), (2, 16));
        limit.came_apart(at(1_001), 2);
        assert_eq!((limit.most(at(3_000)), limit.most(at(3_002))), (1, 16));
        (0..40).for_each(|_| limit.came_apart(at(4_000), 16));
        assert_eq!(limit.most(at(4_000) + APART_PAUSE_MAX), 16, "but not for ever");
    }

    #[test]
    fn what_comes_apart_from_others_keeps_to_itself_and_goes_on_there() {
        let mut limit = BatchLimit::new(Batching::On);
        let at = |ms| At::START + Span::millis(ms);
        assert!(limit.mixes(at(0)) && !BatchLimit::new(Batching::Off).mixes(at(0)));
        limit.came_apart_from_others(at(0));
        assert_eq!((limit.mixes(at(999)), limit.most(at(999)), limit.mixes(at(1_000))), (false, 16, true));
        limit.came_apart(at(1_000), 16);
        assert_eq!((limit.mixes(at(1_999)), limit.mixes(at(2_000))), (false, true));
    }

    #[test]
    fn sizes_serve_those_who_take_what_they_were_seen_to_give() {
        let mut batches = Batches::new();
        let (exact, on) = (Batching::Exact, Batching::On);
        for (size, verdict) in [(2, Verdict::Same), (4, Verdict::Close), (8, Verdict::Other)] {
            batches.learn(size, Span::millis(8 + 2 * size as u64));
            assert!(batches.may_serve(size, sharing(exact)), "not known yet");
            batches.tried(Form(1), size, verdict);
        }
        let sizes = |batching| [2, 4, 8, 16].map(|size| batches.may_serve(size, sharing(batching)));
        assert_eq!(sizes(exact), [true, false, false, true]);
        assert_eq!(sizes(on), [true, true, false, true]);
        assert_eq!(sizes(Batching::Off), [false; 4]);
        let best = |batching, most| batches.best(ALONE, most, sharing(batching), |_| LONG).0;
        assert_eq!((best(exact, 8), best(on, 8)), (2, 4));
        assert_eq!((best(exact, 16), best(on, 16)), (16, 16), "which is tried behind sizes that are known");
        assert!(batches.rounds(Form(1)) && !batches.rounds(Form(2)));
        assert!(batches.may_serve(8, Sharing { form: Form(2), batching: exact }), "another form, not tried");
        (0..10_000).for_each(|form| batches.tried(Form(form), 2, Verdict::Same));
        assert!(batches.verdicts.len() <= VERDICTS_MAX);
    }
}
