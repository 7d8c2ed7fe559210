//! How often a model is asked for, and whether its next request can be foreseen.
//!
//! The rate fades by half every [`HALF_LIFE`]. All models fade alike, so an order by rate only changes when somebody
//! asks: that is what lets a device keep its eviction order in a tree.

use crate::{
    estimate::Estimate,
    time::{At, Span, scale},
};

/// After this long, a past request counts half.
pub(crate) const HALF_LIFE: Span = Span::secs(60);
/// What one request adds to the faded count: room for 20 halvings.
const ONE: u64 = 1 << 20;
/// Gaps from which on a rhythm may be seen.
const RHYTHM_FROM: u32 = 6;
/// Fixed-point one of [`faded_over`].
pub(crate) const FADE_ONE: u64 = 1 << 16;
/// Fixed-point fraction of [`log2`].
pub(crate) const LOG_ONE: i64 = 1 << 10;

/// The requests of one model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Demand {
    faded: u64,
    faded_at: At,
    last: Option<At>,
    gap: Estimate,
    gap_spread: Estimate,
}

impl Demand {
    pub(crate) const fn new() -> Self {
        let (gap, gap_spread) = (Estimate::prior(0), Estimate::prior(0));
        Self { faded: 0, faded_at: At::START, last: None, gap, gap_spread }
    }

    /// A request came.
    pub(crate) fn asked(&mut self, now: At) {
        self.faded = self.count(now).saturating_add(ONE);
        self.faded_at = now;
        if let Some(last) = self.last {
            let gap = (now - last).nanos();
            self.gap_spread.learn(gap.abs_diff(self.gap.value()));
            self.gap.learn(gap);
        }
        self.last = Some(now);
    }

    /// Requests as they count now, in units of [`ONE`].
    fn count(&self, now: At) -> u64 {
        faded(self.faded, now - self.faded_at, HALF_LIFE)
    }

    /// Mean requests in so long a time.
    pub(crate) fn permille_in(&self, now: At, span: Span) -> u64 {
        // A steady rate r settles at r * half-life / ln 2.
        let per_half_life = scale(self.count(now), 693, ONE);
        scale(per_half_life, span.nanos(), HALF_LIFE.nanos())
    }

    /// The logarithm of the rate, raised by time so that it only changes when somebody asks.
    pub(crate) fn standing(&self) -> i64 {
        log2(self.faded.max(1)).saturating_add(log_of_age(self.faded_at))
    }

    /// When the next request is expected, where the gaps are regular; with how far it may be off.
    pub(crate) fn next(&self) -> Option<(At, Span)> {
        let last = self.last?;
        let (gap, spread) = (self.gap.value(), self.gap_spread.value());
        let regular = self.gap.samples() >= RHYTHM_FROM && spread <= gap / 8;
        regular.then(|| (last + Span::of_nanos(gap), Span::of_nanos(spread)))
    }
}

/// What is left of a count that fades by half in so long a time.
pub(crate) fn faded(count: u64, gone: Span, half_life: Span) -> u64 {
    let half_life = half_life.nanos().max(1);
    let halvings = u32::try_from(gone.nanos() / half_life).unwrap_or(u32::MAX);
    let rest = scale(gone.nanos() % half_life, FADE_ONE, half_life);
    let whole = count.checked_shr(halvings).unwrap_or(0);
    scale(whole, faded_over(rest), FADE_ONE)
}

/// `2^-x` for `x` between 0 and 1, both in units of [`FADE_ONE`]: a cubic that is exact at both ends.
fn faded_over(x: u64) -> u64 {
    let cubic = 15_742 - (3_113 * x / FADE_ONE).min(15_742);
    let square = 45_397 - (cubic * x / FADE_ONE).min(45_397);
    FADE_ONE - (square * x / FADE_ONE).min(FADE_ONE)
}

fn log_of_age(at: At) -> i64 {
    let halvings = at.nanos() / HALF_LIFE.nanos();
    let rest = at.nanos() % HALF_LIFE.nanos();
    let fraction = scale(rest, LOG_ONE.unsigned_abs(), HALF_LIFE.nanos());
    i64::try_from(halvings).unwrap_or(i64::MAX).saturating_mul(LOG_ONE).saturating_add_unsigned(fraction)
}

/// The binary logarithm in units of [`LOG_ONE`], linear between powers of two; 0 for 0.
pub(crate) fn log2(value: u64) -> i64 {
    let value = value.max(1);
    let whole = value.ilog2();
    let fraction = scale(value - (1 << whole), LOG_ONE.unsigned_abs(), 1 << whole);
    (i64::from(whole) * LOG_ONE).saturating_add_unsigned(fraction)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(secs: u64) -> At {
        At::START + Span::secs(secs)
    }

    #[test]
    fn a_steady_rate_is_found() {
        let mut demand = Demand::new();
        (0..600).for_each(|second| demand.asked(at(second)));
        let per_minute = demand.permille_in(at(600), Span::secs(60));
        assert!((55_000..65_000).contains(&per_minute), "{per_minute}");
    }

    #[test]
    fn the_order_by_standing_is_the_order_by_rate() {
        let mut often = Demand::new();
        (0..20).for_each(|n| often.asked(at(n)));
        let mut late = Demand::new();
        late.asked(at(100));
        assert!(often.standing() > late.standing(), "twenty a while ago outweigh one now");
        late.asked(at(400));
        assert!(often.standing() < late.standing(), "but not for ever");
    }

    #[test]
    fn a_rhythm_is_seen_and_noise_is_not() {
        let mut clock = Demand::new();
        (0..10).for_each(|n| clock.asked(at(30 * n)));
        assert_eq!(clock.next().map(|next| next.0), Some(at(300)));
        let mut noise = Demand::new();
        [0, 10, 90, 95, 200, 201, 290, 400, 410].into_iter().for_each(|second| noise.asked(at(second)));
        assert_eq!(noise.next(), None);
    }
}
