//! Percentiles of durations.

use std::time::Duration;

/// The smallest of the durations that a share of `percent` does not exceed; `None` where there are none.
pub fn percentile(times: &mut [Duration], percent: usize) -> Option<Duration> {
    times.sort_unstable();
    let rank = (times.len() * percent).div_ceil(100).max(1);
    times.get(rank - 1).copied()
}

/// In milliseconds.
pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_the_nearest_rank() {
        let mut times: Vec<_> = (1..=50).rev().map(Duration::from_millis).collect();
        assert_eq!(percentile(&mut times, 50), Some(Duration::from_millis(25)));
        assert_eq!(percentile(&mut times, 98), Some(Duration::from_millis(49)));
        assert_eq!(percentile(&mut times, 0), Some(Duration::from_millis(1)));
        assert_eq!(percentile(&mut [], 50), None);
    }
}
