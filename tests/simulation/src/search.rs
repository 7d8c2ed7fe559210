//! Finds how far a policy goes: the last of a row of loads that it carries.

/// The largest multiple of `step` in `low..=high` for which `holds`, found by halving; `None` where not even the first.
///
/// It takes for granted that what holds at some load holds below it, which chance can break by a step or so.
pub fn largest(low: usize, high: usize, step: usize, mut holds: impl FnMut(usize) -> bool) -> Option<usize> {
    if !holds(low) {
        return None;
    }
    let (mut good, mut bad) = (0, (high - low) / step + 1);
    while bad - good > 1 {
        let middle = good.midpoint(bad);
        if holds(low + middle * step) {
            good = middle;
        } else {
            bad = middle;
        }
    }
    Some(low + good * step)
}

/// The middle one of several figures.
pub fn median(mut figures: Vec<usize>) -> usize {
    figures.sort_unstable();
    figures.get(figures.len() / 2).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_load_that_holds_is_found() {
        for last in 0..=10 {
            assert_eq!(largest(0, 100, 10, |n| n <= last * 10 + 3), Some(last * 10));
        }
        assert_eq!(largest(0, 100, 10, |_| false), None);
    }
}
