//! What runs and swaps of a model cost, learned from their ends.
//!
//! A run alone, with `k` others beside it, and behind its weights: `run`, `run * (1 + strain * k)`, and what comes on
//! top of the longer of run and copy (`tail`). Nobody says which models are heavy: that follows from these.

use faaswap_protocol::Bytes;

use crate::{
    batches::Batches,
    estimate::Estimate,
    strain::{Beside, Strain},
    time::{At, Span, scale},
};

/// Assumed before anything is known: a fixed part, and reading the weights once at this rate.
const RUN_PRIOR_FIXED: Span = Span::millis(2);
const RUN_PRIOR_BYTES_PER_MS: u64 = 25_000_000;
/// The part of a run that is assumed to remain when copy and run are over but not yet in step.
const TAIL_PRIOR_PERMILLE: u64 = 60;

/// What a model costs on one device.
#[derive(Clone, Debug)]
pub(crate) struct Cost {
    /// What a swap-in copies.
    pub(crate) weights: Bytes,
    run: Estimate,
    tail: Estimate,
    strain: Strain,
    pub(crate) batches: Batches,
}

/// A run that has ended, as it went.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ran {
    pub(crate) ended: At,
    pub(crate) took: Span,
    /// Runs beside it, averaged over its time, in thousandths.
    pub(crate) beside_permille: u64,
    /// How long after its start the weights were there; `None` where they were there before.
    pub(crate) weights_after: Option<Span>,
    /// Clock and foreign load while it ran, in thousandths of full speed.
    pub(crate) speed_permille: u64,
    /// Requests that it answered.
    pub(crate) size: usize,
}

impl Cost {
    pub(crate) fn prior(weights: Bytes) -> Self {
        let run = RUN_PRIOR_FIXED + Span::millis(1) * (weights.get() / RUN_PRIOR_BYTES_PER_MS);
        Self {
            weights,
            run: Estimate::prior(run.nanos()),
            tail: Estimate::prior(run.permille(TAIL_PRIOR_PERMILLE).nanos()),
            strain: Strain::of_model(),
            batches: Batches::new(),
        }
    }

    /// The weights and the run were measured with nothing else going on.
    pub(crate) fn measured(&mut self, weights: Bytes, run: Span) {
        self.weights = weights;
        if !run.is_zero() {
            self.run = Estimate::measured(run.nanos());
            if self.tail.samples() == 0 {
                self.tail = Estimate::prior(run.permille(TAIL_PRIOR_PERMILLE).nanos());
            }
        }
    }

    pub(crate) const fn run(&self) -> Span {
        Span::of_nanos(self.run.value())
    }

    pub(crate) const fn tail(&self) -> Span {
        Span::of_nanos(self.tail.value())
    }

    /// How much a run slows down per run beside it, in thousandths; `others` is what the device's runs show.
    pub(crate) fn strain(&self, now: At, others: &Strain) -> u64 {
        self.strain.for_model(now, others)
    }

    pub(crate) const fn is_trusted(&self) -> bool {
        self.run.is_trusted()
    }

    /// Learns from a run; gives what it showed of strain, for the device's books.
    pub(crate) fn learn(&mut self, ran: Ran, others: &Strain) -> Option<Beside> {
        let took = ran.took.permille(ran.speed_permille);
        if ran.size > 1 {
            if ran.weights_after.is_none() {
                let slowed = self.strain(ran.ended, others).saturating_mul(ran.beside_permille);
                let alone = scale(took.nanos(), 1_000_000, slowed.saturating_add(1_000_000));
                self.batches.learn(ran.size, Span::of_nanos(alone));
            }
            return None;
        }
        match ran.weights_after {
            None if ran.beside_permille < 50 => {
                self.run.learn(took.nanos());
                None
            }
            None => Some(self.learn_strain(took, ran)),
            Some(after) => {
                if ran.beside_permille < 50 {
                    let longer = self.run().max(after);
                    self.tail.learn((took - longer).nanos().min(self.run.value()));
                    if took < self.run() {
                        self.run.learn(took.nanos());
                    }
                }
                None
            }
        }
    }

    fn learn_strain(&mut self, took: Span, ran: Ran) -> Beside {
        let alone = self.run.value().max(1);
        let took_permille = i64::try_from(scale(took.nanos(), 1000, alone)).unwrap_or(i64::MAX);
        let beside = Beside { slower_permille: took_permille - 1000, beside_permille: ran.beside_permille };
        self.strain.learn(ran.ended, beside);
        // Never alone, and faster than believed: then it was the belief that was wrong.
        if took.nanos() < alone {
            self.run.learn(took.nanos());
        }
        beside
    }
}

/// A run with so many beside it.
pub(crate) fn strained(run: Span, strain: u64, beside: usize) -> Span {
    run + run.permille(strain.saturating_mul(beside as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Strain = Strain::of_device();

    fn alone(took_ms: u64) -> Ran {
        Ran {
            ended: At::START,
            took: Span::millis(took_ms),
            beside_permille: 0,
            weights_after: None,
            speed_permille: 1000,
            size: 1,
        }
    }

    #[test]
    fn a_run_behind_its_weights_teaches_the_tail_and_not_the_run() {
        let mut cost = Cost::prior(Bytes::mib(100));
        for _ in 0..5 {
            cost.learn(alone(17), &NOTHING);
        }
        cost.learn(Ran { weights_after: Some(Span::millis(23)), ..alone(25) }, &NOTHING);
        assert_eq!((cost.run(), cost.tail()), (Span::millis(17), Span::millis(2)));
    }

    #[test]
    fn runs_beside_others_teach_the_strain() {
        let mut cost = Cost::prior(Bytes::mib(100));
        for _ in 0..5 {
            cost.learn(alone(10), &NOTHING);
        }
        // Three beside it, half as fast again: a sixth per run.
        for _ in 0..50 {
            cost.learn(Ran { beside_permille: 3000, ..alone(15) }, &NOTHING);
        }
        let strain = cost.strain(At::START, &NOTHING);
        assert!((160..175).contains(&strain), "{strain}");
        assert_eq!(strained(Span::millis(10), 166, 3).nanos() / 1_000_000, 14);
    }

    #[test]
    fn a_throttled_run_is_not_taken_for_a_slow_model() {
        let mut cost = Cost::prior(Bytes::mib(100));
        for _ in 0..5 {
            cost.learn(Ran { speed_permille: 500, ..alone(20) }, &NOTHING);
        }
        assert_eq!(cost.run(), Span::millis(10));
    }
}
