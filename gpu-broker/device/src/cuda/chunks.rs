//! Which chunks of the pool are free. What is taken at once lies in as few runs as can be: programs find weights that lie in a row in the
//! pool's window, and only what a run's end cuts in two must be put behind addresses of its own (`placement.rs`).

use std::collections::BTreeMap;

/// A device keeps one chunk of so many free, so that there are longer runs: without, a quarter of all bytes were cut in two where models
/// of the published mix come and go, with it 6 % (reckoned, with the least recently used going first).
pub(super) const SPARE_ONE_IN: usize = 32;

/// Free chunks by their numbers.
#[derive(Debug)]
pub(super) struct Chunks {
    /// Runs by their first chunk: how many.
    free: BTreeMap<usize, usize>,
    /// Whether no two that are taken shall lie in a row, for trials.
    scattered: bool,
}

impl Chunks {
    /// Of so many chunks, all free.
    pub(super) fn new(count: usize, scattered: bool) -> Self {
        Self { free: (count > 0).then_some((0, count)).into_iter().collect(), scattered }
    }

    pub(super) fn free_len(&self) -> usize {
        self.free.values().sum()
    }

    /// Takes chunks: from the shortest run that has all, else from the longest runs. `None` where there are not so many.
    pub(super) fn take(&mut self, count: usize) -> Option<Vec<usize>> {
        if count > self.free_len() {
            return None;
        }
        let mut taken = Vec::with_capacity(count);
        while taken.len() < count {
            let left = count - taken.len();
            let (first, len) = self.best(left)?;
            let part = if self.scattered { 1 } else { left.min(len) };
            // The end of a run where chunks are scattered, so that the next one taken is not behind this one.
            let from = if self.scattered { first + len - part } else { first };
            self.free.remove(&first);
            if from > first {
                self.free.insert(first, from - first);
            }
            if from + part < first + len {
                self.free.insert(from + part, first + len - from - part);
            }
            taken.extend(from..from + part);
        }
        Some(taken)
    }

    /// The run to take so many from.
    fn best(&self, count: usize) -> Option<(usize, usize)> {
        let runs = || self.free.iter().map(|(&first, &len)| (first, len));
        if self.scattered {
            return runs().next_back();
        }
        let whole = runs().filter(|&(_, len)| len >= count).min_by_key(|&(first, len)| (len, first));
        whole.or_else(|| runs().max_by_key(|&(_, len)| len))
    }

    /// Gives chunks back.
    pub(super) fn give(&mut self, chunks: &[usize]) {
        for &chunk in chunks {
            let (mut first, mut len) = (chunk, 1);
            if let Some(behind) = self.free.remove(&(chunk + 1)) {
                len += behind;
            }
            if let Some((&before, &have)) =
                self.free.range(..chunk).next_back().filter(|&(&at, &have)| at + have == chunk)
            {
                (first, len) = (before, have + len);
            }
            self.free.insert(first, len);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn take(chunks: &mut Chunks, count: usize) -> Vec<usize> {
        chunks.take(count).expect("there are so many")
    }

    #[test]
    fn weights_get_the_shortest_run_that_holds_them_and_else_the_longest_ones() {
        let mut chunks = Chunks::new(12, false);
        let all: Vec<_> = [3, 1, 2, 1, 5].map(|count| take(&mut chunks, count)).into();
        assert_eq!(all.concat(), (0..12).collect::<Vec<_>>());
        assert_eq!(chunks.take(1), None);
        for run in [&all[0], &all[2], &all[4]] {
            chunks.give(run);
        }
        assert_eq!(take(&mut chunks, 2), [4, 5]);
        assert_eq!(take(&mut chunks, 2), [0, 1]);
        assert_eq!(take(&mut chunks, 6), [7, 8, 9, 10, 11, 2], "the longest, and the rest where it fits best");
        assert_eq!(chunks.free_len(), 0);
    }

    #[test]
    fn what_is_scattered_has_no_two_in_a_row() {
        let mut chunks = Chunks::new(9, true);
        let first = take(&mut chunks, 5);
        chunks.give(&first[1..3]);
        let second = take(&mut chunks, 5);
        for taken in [first, second] {
            assert!(taken.windows(2).all(|pair| pair[1] != pair[0] + 1), "{taken:?}");
        }
    }

    proptest! {
        #[test]
        fn no_chunk_is_taken_twice_and_all_come_back(counts in prop::collection::vec(0_usize..9, 1..60), scattered: bool) {
            let mut chunks = Chunks::new(40, scattered);
            let mut taken: Vec<Vec<usize>> = Vec::new();
            for count in counts {
                match chunks.take(count) {
                    Some(more) => {
                        prop_assert_eq!(more.len(), count);
                        prop_assert!(more.iter().all(|chunk| *chunk < 40 && !taken.concat().contains(chunk)));
                        taken.push(more);
                    }
                    None => {
                        prop_assert!(taken.concat().len() + count > 40);
                        let gone = taken.remove(count % taken.len());
                        chunks.give(&gone);
                    }
                }
                prop_assert_eq!(chunks.free_len() + taken.concat().len(), 40);
            }
            taken.iter().for_each(|gone| chunks.give(gone));
            prop_assert_eq!(&chunks.free, &BTreeMap::from([(0, 40)]));
        }
    }
}
