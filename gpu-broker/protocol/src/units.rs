//! Quantities as types. A bare integer never describes an amount of memory.

use std::{fmt, iter::Sum};

use serde::{Deserialize, Serialize};

/// An amount of memory or data in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(u64);

impl Bytes {
    /// No bytes at all.
    pub const ZERO: Self = Self(0);

    /// So many bytes.
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// So many KiB.
    pub const fn kib(kib: u64) -> Self {
        Self(kib << 10)
    }

    /// So many MiB.
    pub const fn mib(mib: u64) -> Self {
        Self(mib << 20)
    }

    /// The length of something that is in memory here.
    pub const fn of_len(len: usize) -> Self {
        Self(len as u64)
    }

    /// The number, for arithmetic at the edge of the program.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The number as a length in memory; `None` where this machine cannot address so much.
    pub fn as_len(self) -> Option<usize> {
        usize::try_from(self.0).ok()
    }

    /// Adds, or says by `None` that the sum cannot be told.
    pub fn checked_add(self, more: Self) -> Option<Self> {
        self.0.checked_add(more.0).map(Self)
    }

    /// Subtracts, or says by `None` that the budget does not reach.
    pub fn checked_sub(self, spent: Self) -> Option<Self> {
        self.0.checked_sub(spent.0).map(Self)
    }

    /// Rounds up to a multiple of `unit`; `None` on overflow.
    pub fn checked_round_up(self, unit: Self) -> Option<Self> {
        self.0.checked_next_multiple_of(unit.0.max(1)).map(Self)
    }
}

impl fmt::Display for Bytes {
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = self.0 as f64;
        match self.0 {
            0..0x400 => write!(f, "{} B", self.0),
            0x400..0x10_0000 => write!(f, "{:.1} KiB", n / 1024.0),
            0x10_0000..0x4000_0000 => write!(f, "{:.1} MiB", n / 1_048_576.0),
            _ => write!(f, "{:.2} GiB", n / 1_073_741_824.0),
        }
    }
}

impl Sum for Bytes {
    fn sum<I: Iterator<Item = Self>>(amounts: I) -> Self {
        Self(amounts.fold(0, |sum, bytes| sum.saturating_add(bytes.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_shown_in_the_largest_unit_that_fits() {
        let shown: Vec<String> = [12, 1536, 3 << 20, 5 << 30].iter().map(|&n| Bytes::new(n).to_string()).collect();
        assert_eq!(shown, ["12 B", "1.5 KiB", "3.0 MiB", "5.00 GiB"]);
    }

    #[test]
    fn rounding_up_past_the_largest_amount_is_refused() {
        assert_eq!(Bytes::new(5).checked_round_up(Bytes::new(4)), Some(Bytes::new(8)));
        assert_eq!(Bytes::new(u64::MAX).checked_round_up(Bytes::new(4096)), None);
    }
}
