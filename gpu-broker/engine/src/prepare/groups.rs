//! Cuts the flat weights into groups: small ones first, so that the first nodes start early, larger ones later, so that
//! a large model does not wait a thousand times, smaller ones last, so that little is left to run when all is there.

use faaswap_protocol::Bytes;

use crate::{
    limits::{
        FIRST_GROUP_BYTES, GROUPS_COST_ONE_IN, GROUPS_MAX, GROUPS_MIN, GROUPS_QUEUED, LAST_GROUP_BYTES, LAST_GROUPS,
    },
    manifest::{GroupSpan, Initializer},
};

/// As [`cut_from`], with as many groups as a link can have without losing time on them, where each costs it as much as
/// copying `cost` bytes does. A few smaller ones at the end come besides.
pub(super) fn cut(initializers: &[Initializer], weights_bytes: u64, largest: Bytes, cost: u64) -> Vec<GroupSpan> {
    let most = match cost {
        0 => usize::MAX,
        cost => usize::try_from(weights_bytes / (GROUPS_COST_ONE_IN * cost)).unwrap_or(usize::MAX).max(GROUPS_MIN),
    };
    let largest = match cost {
        0 => largest,
        _ => largest.max(Bytes::new(weights_bytes / GROUPS_QUEUED)),
    };
    let mut first = FIRST_GROUP_BYTES.get();
    loop {
        let last = first.min(LAST_GROUP_BYTES.get());
        let groups = cut_from(initializers, weights_bytes, (first, last), largest.get().max(first));
        if groups.len() <= most.saturating_add(LAST_GROUPS) || first >= weights_bytes {
            return groups;
        }
        first = first.saturating_add(first / 2);
    }
}

/// Cuts where initializers start; groups join without gaps and end with the weights. No group but the last is below its
/// wanted size, the smallest at the beginning and smaller ones at the end, unless the next initializer would more than double it.
/// The last one begins with the last initializer behind whose start not less than `last` is left, if so much comes before it, too: an
/// image model ends with its largest matrix, which is copied while what is before it runs, and a bias.
fn cut_from(
    initializers: &[Initializer],
    weights_bytes: u64,
    (smallest, last): (u64, u64),
    largest: u64,
) -> Vec<GroupSpan> {
    let largest = largest.max(weights_bytes.div_ceil(GROUPS_MAX / 2)).max(1);
    let mut wanted = smallest.min(largest);
    let mut groups = Vec::new();
    let mut start = 0;
    for weight in initializers {
        let (have, left) = (weight.offset - start, weights_bytes - weight.offset);
        if left < FIRST_GROUP_BYTES.get() {
            break;
        }
        let with = have + weight.len;
        // What is left halves from group to group towards the end.
        let wanted_here = wanted.min(((weights_bytes - start) / 2).max(last));
        let is_last = have >= last && left >= last && left - weight.len < last;
        if is_last || have >= wanted_here || (have > 0 && with > wanted_here.saturating_mul(2)) {
            groups.push(GroupSpan { offset: start, len: have });
            start = weight.offset;
            wanted = wanted.saturating_mul(2).min(largest);
        }
    }
    if weights_bytes > start {
        groups.push(GroupSpan { offset: start, len: weights_bytes - start });
    }
    groups
}

/// The group in which the byte lies.
pub(super) fn group_at(groups: &[GroupSpan], offset: u64) -> u32 {
    let group = groups.partition_point(|group| group.offset <= offset).saturating_sub(1);
    u32::try_from(group).expect("there are at most GROUPS_MAX groups")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights(lens: &[u64]) -> (Vec<Initializer>, u64) {
        let mut offset = 0;
        let table = lens.iter().map(|&len| {
            let weight = Initializer { name: String::new(), element: 2, dims: vec![], offset, len };
            offset += len;
            weight
        });
        (table.collect(), offset)
    }

    #[test]
    fn groups_join_grow_and_end_with_the_weights() {
        let (table, total) = weights(&[128 << 10; 400]);
        let groups = cut(&table, total, Bytes::mib(4), 0);
        assert_eq!(groups[0].len, FIRST_GROUP_BYTES.get());
        assert!(groups.windows(2).all(|w| w[0].offset + w[0].len == w[1].offset));
        assert_eq!(groups.iter().map(|g| g.len).sum::<u64>(), total);
        assert!(groups.iter().all(|g| g.len <= 4 << 20) && groups.iter().any(|g| g.len == 4 << 20));
    }

    #[test]
    fn a_huge_initializer_does_not_delay_the_small_ones_before_it() {
        let (table, total) = weights(&[2048, 2048, 100 << 20, 2048]);
        let groups = cut(&table, total, Bytes::mib(4), 0);
        assert_eq!(groups.iter().map(|g| g.len).collect::<Vec<_>>(), [4096, (100 << 20) + 2048]);
        assert_eq!(table.iter().map(|w| group_at(&groups, w.offset)).collect::<Vec<_>>(), [0, 0, 1, 1]);
    }

    #[test]
    fn no_model_has_more_than_the_most_groups() {
        let (table, total) = weights(&[1 << 20; 4000]);
        let groups = cut(&table, total, Bytes::mib(1), 0);
        assert!(groups.len() as u64 <= GROUPS_MAX, "{}", groups.len());
        assert_eq!(cut(&[], 0, Bytes::mib(1), 0), []);
    }

    #[test]
    fn groups_are_fewer_where_each_costs_time() {
        let (table, total) = weights(&[128 << 10; 400]);
        let (free, dear) = (cut(&table, total, Bytes::mib(8), 0), cut(&table, total, Bytes::mib(8), 192 << 10));
        assert!(dear.len() < free.len() && dear.len() <= GROUPS_MIN + LAST_GROUPS);
        assert!(dear.windows(2).all(|w| w[0].offset + w[0].len == w[1].offset));
        assert_eq!(dear.iter().map(|g| g.len).sum::<u64>(), total);
        assert!(dear.last().expect("there are some").len <= LAST_GROUP_BYTES.get(), "the last is");
        let (table, total) = weights(&[128 << 10; 30]);
        let small = cut(&table, total, Bytes::mib(4), 192 << 10).len();
        assert!((GROUPS_MIN..=GROUPS_MIN + LAST_GROUPS).contains(&small), "a small model: {small}");
    }

    #[test]
    fn what_is_before_the_last_matrix_is_not_awaited_with_it() {
        // As ResNet-50 ends: a convolution of 4 MiB, a matrix of 8, a bias.
        let sizes: Vec<u64> = [vec![2 << 20; 40], vec![4 << 20, 8 << 20, 4096]].concat();
        let (table, total) = weights(&sizes);
        let groups = cut(&table, total, Bytes::mib(8), 192 << 10);
        assert_eq!(groups.last().map(|last| last.len), Some((8 << 20) + 4096), "{groups:?}");
        assert_eq!(groups.iter().map(|group| group.len).sum::<u64>(), total);
        let (table, total) = weights(&[64 << 10, 8 << 20, 4096]);
        let ends = cut_from(&table, total, (256 << 10, 256 << 10), 8 << 20);
        assert_eq!(ends.iter().map(|group| group.len).collect::<Vec<_>>(), [64 << 10, (8 << 20) + 4096]);
    }
}
