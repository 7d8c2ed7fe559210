//! Which chunks of the pool are free. Pure books; the memory itself is in `arena.rs`.
//!
//! One run of neighbours is preferred, the smallest that fits, because every run costs one system call to map.

use std::collections::{BTreeMap, BTreeSet};

/// Neighbouring chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Number of the first chunk.
    pub(super) first: usize,
    /// How many.
    pub(super) chunks: usize,
}

/// The free chunks as runs; no two runs touch.
#[derive(Debug)]
pub(super) struct Pool {
    by_first: BTreeMap<usize, usize>,
    by_chunks: BTreeSet<(usize, usize)>,
    free: usize,
}

impl Pool {
    pub(super) fn new(chunks: usize) -> Self {
        let mut pool = Self { by_first: BTreeMap::new(), by_chunks: BTreeSet::new(), free: 0 };
        if chunks > 0 {
            pool.insert(Run { first: 0, chunks });
        }
        pool
    }

    /// Number of free chunks.
    pub(super) fn free(&self) -> usize {
        self.free
    }

    /// Takes exactly so many chunks in as few runs as the free ones allow, or none at all.
    pub(super) fn take(&mut self, chunks: usize) -> Option<Vec<Run>> {
        if chunks > self.free {
            return None;
        }
        let mut runs = Vec::new();
        let mut missing = chunks;
        while missing > 0 {
            // The smallest run that holds all that is missing, else the largest one that there is.
            let best = self.by_chunks.range((missing, 0)..).next().or_else(|| self.by_chunks.last());
            let &(found, first) = best.expect("as many chunks are free as are missing");
            self.remove(Run { first, chunks: found });
            let used = found.min(missing);
            if found > used {
                self.insert(Run { first: first + used, chunks: found - used });
            }
            runs.push(Run { first, chunks: used });
            missing -= used;
        }
        Some(runs)
    }

    /// Takes back a run that [`Pool::take`] gave.
    pub(super) fn give(&mut self, run: Run) {
        let Run { mut first, mut chunks } = run;
        if let Some((&before, &len)) = self.by_first.range(..first).next_back() {
            assert!(before + len <= first, "chunk {first} was given back twice");
            if before + len == first {
                self.remove(Run { first: before, chunks: len });
                (first, chunks) = (before, len + chunks);
            }
        }
        if let Some((&after, &len)) = self.by_first.range(first..).next() {
            assert!(first + chunks <= after, "chunk {after} was given back twice");
            if first + chunks == after {
                self.remove(Run { first: after, chunks: len });
                chunks += len;
            }
        }
        self.insert(Run { first, chunks });
    }

    fn insert(&mut self, run: Run) {
        self.by_first.insert(run.first, run.chunks);
        self.by_chunks.insert((run.chunks, run.first));
        self.free += run.chunks;
    }

    fn remove(&mut self, run: Run) {
        self.by_first.remove(&run.first);
        self.by_chunks.remove(&(run.chunks, run.first));
        self.free -= run.chunks;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_chunk_is_never_given_out_twice_and_none_is_lost(
            steps in prop::collection::vec((0..12_usize, any::<usize>(), any::<bool>()), 0..200),
        ) {
            const CHUNKS: usize = 40;
            let mut pool = Pool::new(CHUNKS);
            let mut out: Vec<Vec<Run>> = Vec::new();
            for (chunks, which, take) in steps {
                if take {
                    let free = pool.free();
                    let runs = pool.take(chunks);
                    prop_assert_eq!(runs.is_some(), chunks <= free);
                    out.extend(runs);
                } else if !out.is_empty() {
                    out.swap_remove(which % out.len()).into_iter().for_each(|run| pool.give(run));
                }
                let mut taken: Vec<usize> =
                    out.iter().flatten().flat_map(|run| run.first..run.first + run.chunks).collect();
                let count = taken.len();
                taken.sort_unstable();
                taken.dedup();
                prop_assert_eq!(taken.len(), count, "a chunk is out twice");
                prop_assert_eq!(pool.free() + count, CHUNKS);
            }
            out.into_iter().flatten().for_each(|run| pool.give(run));
            prop_assert_eq!(pool.take(CHUNKS), Some(vec![Run { first: 0, chunks: CHUNKS }]));
        }
    }

    #[test]
    fn one_run_is_preferred_and_the_smallest_that_fits() {
        let mut pool = Pool::new(10);
        let [a, _b, c, _d] = [3, 1, 2, 4].map(|n| pool.take(n).expect("free")[0]);
        pool.give(a);
        pool.give(c);
        assert_eq!(pool.take(2), Some(vec![c]));
        pool.give(c);
        assert_eq!(pool.take(5).map(|runs| runs.len()), Some(2), "no single run holds 5");
    }

    #[test]
    #[should_panic(expected = "given back twice")]
    fn giving_a_chunk_back_twice_is_a_bug() {
        let mut pool = Pool::new(4);
        let run = pool.take(2).expect("free")[0];
        pool.give(run);
        pool.give(run);
    }
}
