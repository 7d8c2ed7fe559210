//! Which chunks of the pool are free, and how they are made of physical memory: four in a row as one piece, a block, or each
//! one as a piece of its own.
//!
//! To put memory behind addresses costs 30 to 50 us a piece on an H100 that is alone, of 16 MiB and of 64 MiB alike (measured; a part of a
//! piece cannot be mapped, the driver says `NOT_SUPPORTED`). So weights get blocks as far as they fill them, and single
//! chunks for the rest. A free block can be split when there are too few single chunks, and a split block whose chunks
//! are all free can be merged; both are done when the link is idle, as far as that can be foreseen.

use std::collections::BTreeSet;

/// Chunks of a block.
pub(super) const BLOCK: usize = 4;
/// One block in so many begins split: most weights end in less than a block.
const SPLIT_FIRST: usize = 8;
/// With fewer free single chunks a block is split ahead.
const SINGLE_MIN: usize = BLOCK;
/// With so many of them, and more than there were at first, a block that can be merged is.
const SINGLE_MAX: usize = 4 * BLOCK;

/// What to do with a block when there is time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Split(usize),
    Merge(usize),
}

/// Free chunks, by their numbers.
#[derive(Debug)]
pub(super) struct Blocks {
    /// Whether a block is one piece.
    whole: Vec<bool>,
    /// Blocks in one piece whose chunks are all free; in order, so that what is taken at once mostly lies in a row.
    free: BTreeSet<usize>,
    /// Free chunks that are pieces of their own.
    single: BTreeSet<usize>,
    /// With more free single chunks than that, and a block's more, a block is merged.
    single_max: usize,
}

impl Blocks {
    /// Of so many chunks, all free; those behind the last block are single for good.
    pub(super) fn new(chunks: usize) -> Self {
        let whole: Vec<bool> = (0..chunks / BLOCK).map(|block| block % SPLIT_FIRST != 0).collect();
        let is_single = |chunk: &usize| !whole.get(chunk / BLOCK).copied().unwrap_or(false);
        let single: BTreeSet<_> = (0..chunks).filter(is_single).collect();
        let single_max = SINGLE_MAX.max(single.len());
        let free = (0..whole.len()).filter(|&block| whole[block]).collect();
        Self { whole, free, single, single_max }
    }

    pub(super) fn free_len(&self) -> usize {
        self.free.len() * BLOCK + self.single.len()
    }

    /// The piece that a chunk belongs to: its first chunk, and how many it has.
    pub(super) fn piece(&self, chunk: usize) -> (usize, usize) {
        match self.whole.get(chunk / BLOCK) {
            Some(true) => (chunk / BLOCK * BLOCK, BLOCK),
            Some(false) | None => (chunk, 1),
        }
    }

    /// The block that must be split before so many chunks can be taken; none where there are not so many.
    pub(super) fn must_split(&self, count: usize) -> Option<usize> {
        if count > self.free_len() {
            return None;
        }
        let rest = count - (count / BLOCK).min(self.free.len()) * BLOCK;
        if rest > self.single.len() { self.free.last().copied() } else { None }
    }

    /// Takes chunks, whole blocks first and in order. `None` where there are not enough, or a block must be split before.
    pub(super) fn take(&mut self, count: usize) -> Option<Vec<usize>> {
        if count > self.free_len() || self.must_split(count).is_some() {
            return None;
        }
        let blocks: Vec<_> = std::iter::from_fn(|| self.free.pop_first()).take(count / BLOCK).collect();
        let mut chunks: Vec<_> = blocks.iter().flat_map(|block| block * BLOCK..(block + 1) * BLOCK).collect();
        let rest = count - chunks.len();
        chunks.extend(std::iter::from_fn(|| self.single.pop_first()).take(rest));
        Some(chunks)
    }

    /// Gives back all that was taken at once.
    pub(super) fn give(&mut self, chunks: &[usize]) {
        for &chunk in chunks {
            match self.piece(chunk) {
                (_, 1) => self.single.insert(chunk),
                (first, _) => self.free.insert(first / BLOCK),
            };
        }
    }

    /// What should be done with a block when there is time.
    pub(super) fn change(&self) -> Option<Change> {
        if self.single.len() < SINGLE_MIN {
            return self.free.last().copied().map(Change::Split);
        }
        // Asked before each swap: mostly it ends here.
        if self.single.len() < self.single_max + BLOCK {
            return None;
        }
        let all_free = |block: &usize| self.single.range(block * BLOCK..(block + 1) * BLOCK).count() == BLOCK;
        (0..self.whole.len()).rev().filter(|&block| !self.whole[block]).find(all_free).map(Change::Merge)
    }

    /// Takes a free block away, to be changed.
    pub(super) fn remove(&mut self, block: usize) {
        self.free.remove(&block);
        self.single.retain(|chunk| chunk / BLOCK != block);
    }

    /// The block that was taken away is changed.
    pub(super) fn put(&mut self, change: Change) {
        match change {
            Change::Split(block) => {
                self.whole[block] = false;
                self.single.extend(block * BLOCK..(block + 1) * BLOCK);
            }
            Change::Merge(block) => {
                self.whole[block] = true;
                self.free.insert(block);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(blocks: &mut Blocks, count: usize) -> Vec<usize> {
        blocks.take(count).expect("there are so many")
    }

    fn change(blocks: &mut Blocks, change: Change) {
        let (Change::Split(block) | Change::Merge(block)) = change;
        blocks.remove(block);
        blocks.put(change);
    }

    #[test]
    fn weights_get_blocks_and_single_chunks_for_the_rest() {
        let mut blocks = Blocks::new(18);
        // Block 0 is split; 16 and 17 lie behind the last block.
        let taken = take(&mut blocks, 9);
        assert_eq!(taken, [4, 5, 6, 7, 8, 9, 10, 11, 0]);
        assert_eq!((blocks.piece(5), blocks.piece(0), blocks.piece(17)), ((4, 4), (0, 1), (17, 1)));
        assert_eq!(take(&mut blocks, 3), [1, 2, 3]);
        blocks.give(&taken);
        assert_eq!(blocks.free_len(), 15);
    }

    #[test]
    fn a_block_is_split_where_single_chunks_are_missing_only() {
        let mut blocks = Blocks::new(16);
        assert_eq!(take(&mut blocks, 3), [0, 1, 2]);
        assert_eq!((blocks.must_split(2), blocks.take(2)), (Some(3), None));
        change(&mut blocks, Change::Split(3));
        assert_eq!(take(&mut blocks, 2), [3, 12]);
        // Eleven are left: eight in blocks, three single.
        assert_eq!((blocks.must_split(11), blocks.take(12)), (None, None));
        assert_eq!(blocks.must_split(12), None, "nothing is split for what cannot be had");
        assert_eq!(take(&mut blocks, 11).len(), 11);
    }

    #[test]
    fn there_is_always_a_way_to_take_all_that_is_free() {
        for chunks in 0..40 {
            for first in 0..=chunks {
                let mut blocks = Blocks::new(chunks);
                for count in [first, chunks - first] {
                    if let Some(block) = blocks.must_split(count) {
                        change(&mut blocks, Change::Split(block));
                    }
                    assert_eq!(blocks.take(count).map(|taken| taken.len()), Some(count), "{chunks} {first}");
                }
            }
        }
    }

    #[test]
    fn what_is_single_at_first_stays_so_while_nothing_is_asked_for() {
        assert_eq!(Blocks::new(4096).change(), None);
    }

    #[test]
    fn blocks_are_split_and_merged_when_there_is_time() {
        let mut blocks = Blocks::new(64);
        assert_eq!(blocks.change(), None);
        let taken = take(&mut blocks, 7);
        assert_eq!(blocks.change(), None);
        let more = take(&mut blocks, 2);
        // Three of the eight single chunks are free.
        assert_eq!(blocks.change(), Some(Change::Split(15)));
        for block in [15, 14, 13, 12, 11] {
            change(&mut blocks, Change::Split(block));
        }
        assert_eq!(blocks.change(), Some(Change::Merge(15)));
        change(&mut blocks, Change::Merge(15));
        blocks.give(&taken);
        blocks.give(&more);
        assert_eq!(blocks.free_len(), 64);
        blocks.remove(15);
        assert_eq!(blocks.free_len(), 60);
    }
}
