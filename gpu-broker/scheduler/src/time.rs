//! Time as integers: points and spans in nanoseconds whose arithmetic saturates.
//!
//! Integers keep equal histories equal on every machine, and leave no room for a NaN. Saturation makes absurd reports
//! (years, or the end of time) harmless.

use std::{
    ops::{Add, AddAssign, Div, Mul, Sub},
    time::Duration,
};

use crate::event::Moment;

/// A point in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct At(u64);

/// A length of time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Span(u64);

impl At {
    /// Before everything.
    pub(crate) const START: Self = Self(0);
    /// After everything.
    pub(crate) const NEVER: Self = Self(u64::MAX);

    pub(crate) const fn nanos(self) -> u64 {
        self.0
    }
}

impl Span {
    pub(crate) const ZERO: Self = Self(0);

    pub(crate) const fn of_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    pub(crate) const fn micros(micros: u64) -> Self {
        Self(micros.saturating_mul(1_000))
    }

    pub(crate) const fn millis(millis: u64) -> Self {
        Self(millis.saturating_mul(1_000_000))
    }

    pub(crate) const fn secs(secs: u64) -> Self {
        Self(secs.saturating_mul(1_000_000_000))
    }

    pub(crate) const fn nanos(self) -> u64 {
        self.0
    }

    pub(crate) const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// This many thousandths of the span.
    pub(crate) fn permille(self, permille: u64) -> Self {
        Self(scale(self.0, permille, 1000))
    }
}

/// `value * by / over` without overflow on the way.
pub(crate) fn scale(value: u64, by: u64, over: u64) -> u64 {
    if let Some(product) = value.checked_mul(by) {
        return product / over.max(1);
    }
    let scaled = u128::from(value) * u128::from(by) / u128::from(over.max(1));
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

impl Add<Span> for At {
    type Output = Self;
    fn add(self, span: Span) -> Self {
        Self(self.0.saturating_add(span.0))
    }
}

impl Sub<Span> for At {
    type Output = Self;
    fn sub(self, span: Span) -> Self {
        Self(self.0.saturating_sub(span.0))
    }
}

impl Sub for At {
    type Output = Span;
    fn sub(self, earlier: Self) -> Span {
        Span(self.0.saturating_sub(earlier.0))
    }
}

impl Add for Span {
    type Output = Self;
    fn add(self, more: Self) -> Self {
        Self(self.0.saturating_add(more.0))
    }
}

impl AddAssign for Span {
    fn add_assign(&mut self, more: Self) {
        *self = *self + more;
    }
}

impl Sub for Span {
    type Output = Self;
    fn sub(self, less: Self) -> Self {
        Self(self.0.saturating_sub(less.0))
    }
}

impl Mul<u64> for Span {
    type Output = Self;
    fn mul(self, by: u64) -> Self {
        Self(self.0.saturating_mul(by))
    }
}

impl Div<u64> for Span {
    type Output = Self;
    fn div(self, by: u64) -> Self {
        Self(self.0 / by.max(1))
    }
}

impl From<Moment> for At {
    fn from(moment: Moment) -> Self {
        Self(Span::from(moment.0).0)
    }
}

impl From<At> for Moment {
    fn from(at: At) -> Self {
        Self(Duration::from_nanos(at.0))
    }
}

impl From<Duration> for Span {
    fn from(span: Duration) -> Self {
        Self(u64::try_from(span.as_nanos()).unwrap_or(u64::MAX))
    }
}

impl From<Span> for Duration {
    fn from(span: Span) -> Self {
        Self::from_nanos(span.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absurd_times_saturate() {
        assert_eq!(At::NEVER + Span::secs(1), At::NEVER);
        assert_eq!(At::START - Span::secs(1), At::START);
        assert_eq!(Span::from(Duration::MAX), Span(u64::MAX));
        assert_eq!(Span(u64::MAX).permille(2000), Span(u64::MAX));
    }
}
