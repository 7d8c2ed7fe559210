//! An estimate that learns from measurements and is not thrown by a few wild ones.

/// Samples that count in full; later ones move the estimate by one part in this many.
const MEMORY: u64 = 16;
/// So many samples on the same side of the fence are news, not noise.
const NEWS_AFTER: u8 = 6;
/// Samples from which on the fence stands.
const FENCE_FROM: u32 = 4;
/// From so many samples on an estimate may be used to refuse.
const TRUSTED_FROM: u32 = 3;

/// A quantity as far as it is known: a prior first, then a robust running mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Estimate {
    value: u64,
    /// Mean absolute deviation.
    spread: u64,
    samples: u32,
    /// Samples in a row above (positive) or below (negative) the fence.
    outside: i8,
}

impl Estimate {
    /// What is assumed before anything is measured.
    pub(crate) const fn prior(value: u64) -> Self {
        Self { value, spread: value / 2, samples: 0, outside: 0 }
    }

    /// Something measured with care, like a trial run or a probe of a link.
    pub(crate) const fn measured(value: u64) -> Self {
        Self { value, spread: value / 4, samples: TRUSTED_FROM, outside: 0 }
    }

    pub(crate) const fn value(&self) -> u64 {
        self.value
    }

    pub(crate) const fn samples(&self) -> u32 {
        self.samples
    }

    /// Whether enough was measured to decline work because of it.
    pub(crate) const fn is_trusted(&self) -> bool {
        self.samples >= TRUSTED_FROM
    }

    /// Takes in one measurement.
    ///
    /// One that lies far out moves the estimate only as far as the fence. When several in a row lie out on the same
    /// side, the world has changed, and the estimate starts again from there.
    pub(crate) fn learn(&mut self, sample: u64) {
        if self.samples == 0 {
            *self = Self { value: sample, spread: sample / 4, samples: 1, outside: 0 };
            return;
        }
        let reach = self.spread.saturating_mul(4).max(self.value / 8).max(1);
        let (low, high) = (self.value.saturating_sub(reach), self.value.saturating_add(reach));
        self.outside = match sample {
            s if s > high => self.outside.max(0).saturating_add(1),
            s if s < low => self.outside.min(0).saturating_sub(1),
            _ => 0,
        };
        if self.samples >= FENCE_FROM && self.outside.unsigned_abs() >= NEWS_AFTER {
            *self = Self { value: sample, spread: sample / 4, samples: FENCE_FROM, outside: 0 };
            return;
        }
        let sample = if self.samples >= FENCE_FROM { sample.clamp(low, high) } else { sample };
        let share = u64::from(self.samples).saturating_add(1).min(MEMORY);
        self.spread = toward(self.spread, sample.abs_diff(self.value), share);
        self.value = toward(self.value, sample, share);
        self.samples = self.samples.saturating_add(1);
    }
}

fn toward(from: u64, to: u64, share: u64) -> u64 {
    if to >= from { from.saturating_add((to - from) / share) } else { from - (from - to) / share }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_measurement_replaces_the_prior() {
        let mut estimate = Estimate::prior(1_000);
        estimate.learn(80);
        assert_eq!(estimate.value(), 80);
        assert!(!estimate.is_trusted());
    }

    #[test]
    fn a_wild_measurement_hardly_moves_the_estimate() {
        let mut estimate = Estimate::prior(0);
        (0..50).for_each(|n| estimate.learn(1_000 + n % 10));
        estimate.learn(1_000_000);
        estimate.learn(0);
        assert!(estimate.value().abs_diff(1_005) < 30, "{estimate:?}");
    }

    #[test]
    fn a_lasting_change_is_believed() {
        let mut estimate = Estimate::prior(0);
        (0..50).for_each(|_| estimate.learn(1_000));
        (0..10).for_each(|_| estimate.learn(3_000));
        assert_eq!(estimate.value(), 3_000);
    }

    #[test]
    fn extremes_do_not_overflow() {
        let mut estimate = Estimate::measured(u64::MAX);
        [0, u64::MAX, 0, 1, u64::MAX].into_iter().for_each(|sample| estimate.learn(sample));
    }
}
