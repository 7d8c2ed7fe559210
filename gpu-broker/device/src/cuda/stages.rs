//! A swap-in is made usable in stages, each as large as all before it, up to a limit: a program's first part is launched when
//! the copies of the first chunk are queued, and what of it must be mapped is, and the rest is seen to while that runs.
//!
//! A program is cut where stages begin, so link and capture must agree on where that is.

use faaswap_protocol::Bytes;

use crate::Group;

/// Most chunks that a stage adds: what is to be launched waits for no more than their mapping.
const STAGE_CHUNKS_MAX: u64 = 16;

/// A stage: groups up to one (not included), in chunks up to one (not included).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stage {
    pub(super) groups: usize,
    pub(super) chunks: usize,
}

/// The stages of these groups; the last one has all groups and all chunks. There is always one.
pub(super) fn stages(groups: &[Group], chunk: Bytes) -> Vec<Stage> {
    let chunk = chunk.get().max(1);
    let size = groups.last().map_or(0, |last| last.offset + last.len);
    let fits = |chunks: u64| usize::try_from(chunks).expect("weights have been mapped");
    let all = Stage { groups: groups.len(), chunks: fits(size.div_ceil(chunk)) };
    let mut stages: Vec<Stage> = Vec::new();
    let mut until = chunk;
    while until < size {
        let whole = groups.partition_point(|group| group.offset + group.len <= until);
        if whole > stages.last().map_or(0, |stage| stage.groups) && whole < groups.len() {
            stages.push(Stage { groups: whole, chunks: fits(until / chunk) });
        }
        until += until.min(STAGE_CHUNKS_MAX * chunk);
    }
    stages.push(all);
    stages
}

#[cfg(test)]
mod tests {
    use super::*;

    fn groups(lens: &[u64]) -> Vec<Group> {
        let mut offset = 0;
        let next = |&len: &u64| {
            offset += len;
            Group { offset: offset - len, len }
        };
        lens.iter().map(next).collect()
    }

    #[test]
    fn stages_double_and_end_with_everything() {
        let groups = groups(&[1, 3, 6, 8, 8, 8, 8, 8, 8, 4]);
        let found = stages(&groups, Bytes::new(8));
        let plain: Vec<_> = found.iter().map(|stage| (stage.groups, stage.chunks)).collect();
        // 4 bytes lie in the first chunk, 10 in two, 26 in four, all in eight.
        assert_eq!(plain, [(2, 1), (3, 2), (5, 4), (10, 8)]);
    }

    #[test]
    fn what_fits_one_chunk_has_one_stage_and_so_has_nothing() {
        assert_eq!(stages(&groups(&[1, 3, 4]), Bytes::new(8)), [Stage { groups: 3, chunks: 1 }]);
        assert_eq!(stages(&[], Bytes::new(8)), [Stage { groups: 0, chunks: 0 }]);
    }

    #[test]
    fn a_group_larger_than_chunks_is_in_the_stage_that_holds_all_of_it() {
        let found = stages(&groups(&[2, 60, 2]), Bytes::new(8));
        assert_eq!(found, [Stage { groups: 1, chunks: 1 }, Stage { groups: 3, chunks: 8 }]);
    }
}
