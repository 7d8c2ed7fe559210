//! Compares two programs of a kind: what differs between them, and whether all of that is places.

use super::{Captured, Content, Node, Stretch};
use crate::DeviceError;

/// Addresses are words of this size.
pub(super) const WORD: usize = size_of::<u64>();
/// Numbers in arguments are below that, lower halves of addresses seldom.
const SMALL_NUMBERS: u64 = 1 << 20;
/// So many differences are told where they keep a kind apart.
const DIFFERENCES_TOLD: usize = 4;
/// The stretch of the weights in [`Places`].
pub(super) const WEIGHTS: usize = 0;
/// The first stretch of constants in [`Places`]: the model's own. Those behind it are the kind's.
pub(super) const OWN_CONSTANTS: usize = 4;

/// The stretches in [`Places`] that belong to a lane.
pub(super) const LANE: std::ops::Range<usize> = 1..OWN_CONSTANTS;

/// Stretches of addresses that a program is about, in the same order for all of a kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Places(pub(super) Vec<Stretch>);

/// A place: which stretch, and how far into it.
pub(super) type Place = (usize, u64);

impl Places {
    fn find(&self, address: u64) -> Option<Place> {
        let inside = |&(base, len): &Stretch| address.checked_sub(base).is_some_and(|offset| offset < len);
        let stretch = self.0.iter().position(inside)?;
        Some((stretch, address - self.0[stretch].0))
    }

    /// Whether any of its addresses, but for those of a lane where that is the same, are of the other's too. A place that is in
    /// both at the same address could not be told from what is no place.
    pub(super) fn overlaps(&self, other: &Self, same_lane: bool) -> bool {
        let own = |places: &Self| -> Vec<Stretch> {
            let all = places.0.iter().enumerate();
            all.filter(|(number, _)| !(same_lane && LANE.contains(number))).map(|(_, stretch)| *stretch).collect()
        };
        let theirs = own(other);
        let meet = |&(a, a_len): &Stretch, &(b, b_len): &Stretch| a < b + b_len.max(1) && b < a + a_len.max(1);
        own(self).iter().any(|stretch| theirs.iter().any(|other| meet(stretch, other)))
    }

    pub(super) fn address(&self, (stretch, offset): Place) -> Result<u64, DeviceError> {
        let found = self.0.get(stretch).filter(|(_, len)| offset < *len);
        found.map(|(base, _)| base + offset).ok_or(DeviceError::Invalid("a twin has fewer places than its kind"))
    }
}

/// A word of a kernel's arguments that names a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Word {
    pub(super) argument: usize,
    pub(super) offset: usize,
    pub(super) place: Place,
}

/// What is another thing in each program of a kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Differs {
    /// These words of a kernel.
    Words(Vec<Word>),
    /// The event of this group.
    Group(u32),
}

/// Finds all that differs between two programs of a kind; an error where that is more than places. `is_memory` says whether there
/// is memory of a device at an address.
pub(super) fn compare(
    one: &Captured,
    other: &Captured,
    is_memory: &dyn Fn(u64) -> bool,
) -> Result<Vec<Vec<(usize, Differs)>>, String> {
    let is_plain = |captured: &Captured| captured.drawing.parts.iter().all(|(.., counts)| counts.is_plain());
    if !is_plain(one) || !is_plain(other) {
        return Err("a program copies from host memory".to_owned());
    }
    let groups = |captured: &Captured| captured.drawing.parts.iter().map(|&(_, groups, _)| groups).collect::<Vec<_>>();
    if groups(one) != groups(other) {
        return Err("programs have other parts".to_owned());
    }
    let parts = one.content.iter().zip(&other.content).enumerate();
    parts
        .map(|(number, pair)| compare_part(one, other, pair, is_memory).map_err(|why| format!("part {number}: {why}")))
        .collect()
}

fn compare_part(
    one: &Captured,
    other: &Captured,
    (a, b): (&Content, &Content),
    is_memory: &dyn Fn(u64) -> bool,
) -> Result<Vec<(usize, Differs)>, String> {
    if a.nodes.len() != b.nodes.len() || a.edges != b.edges {
        return Err("graphs have another form".to_owned());
    }
    let group = |captured: &Captured, event: usize| captured.events.iter().position(|of| of.raw().addr() == event);
    let (mut differs, mut why) = (Vec::new(), Vec::new());
    for (number, nodes) in a.nodes.iter().zip(&b.nodes).enumerate() {
        let found = match nodes {
            (Node::Empty, Node::Empty) => Ok(None),
            (Node::Wait(a), Node::Wait(b)) => match (group(one, *a), group(other, *b)) {
                (Some(a), Some(b)) if a == b => Ok(u32::try_from(a).ok().map(Differs::Group)),
                _ => Err("it waits for something else".to_owned()),
            },
            (Node::Kernel(a), Node::Kernel(b)) => match a.difference(b) {
                Some(difference) => Err(difference),
                None => {
                    let arguments = (&a.arguments[..], &b.arguments[..]);
                    let alike = |a, b| are_alike((a, &one.constants), (b, &other.constants));
                    let words = compare_arguments(arguments, (&one.places, &other.places), &alike, is_memory);
                    let words = words.map_err(|why| format!("{}: {why}", a.name()));
                    words.map(|words| (!words.is_empty()).then_some(Differs::Words(words)))
                }
            },
            (Node::Other(why), _) | (_, Node::Other(why)) => Err((*why).to_owned()),
            _ => Err("it is another kind of node".to_owned()),
        };
        match found {
            Ok(found) => differs.extend(found.map(|found| (number, found))),
            Err(reason) => why.push(format!("node {number}: {reason}")),
        }
    }
    if why.is_empty() {
        return Ok(differs);
    }
    let count = why.len();
    why.truncate(DIFFERENCES_TOLD);
    Err(format!("{count} of {} nodes differ: {}", a.nodes.len(), why.join("; ")))
}

/// Whether two places are the same for all of a kind, by what its constants hold: sessions take memory for them in any order.
fn are_alike((here, constants): (Place, &[Vec<u8>]), (there, others): (Place, &[Vec<u8>])) -> bool {
    // Of constants of the kind.
    fn content(constants: &[Vec<u8>], stretch: usize) -> Option<&Vec<u8>> {
        constants.get(stretch.checked_sub(OWN_CONSTANTS).filter(|&number| number > 0)?)
    }
    let same = match (content(constants, here.0), content(others, there.0)) {
        (None, None) => here.0 == there.0,
        (Some(a), Some(b)) => a == b,
        (Some(_), None) | (None, Some(_)) => false,
    };
    same && here.1 == there.1
}

/// Words that differ and are places. Others that differ are left as they are where they cannot be addresses: what lies between
/// the fields of a kernel's argument is whatever was there before, often half of an address.
fn compare_arguments(
    (a, b): (&[Vec<u8>], &[Vec<u8>]),
    (from, to): (&Places, &Places),
    alike: &dyn Fn(Place, Place) -> bool,
    is_memory: &dyn Fn(u64) -> bool,
) -> Result<Vec<Word>, String> {
    let mut words = Vec::new();
    for (argument, (a, b)) in a.iter().zip(b).enumerate() {
        if a.len() != b.len() {
            return Err(format!("argument {argument} has another size"));
        }
        for offset in (0..a.len()).step_by(WORD).filter(|&at| word(a, at) != word(b, at)) {
            let (here, there) = (word(a, offset), word(b, offset));
            let (place, other) = (here.and_then(|a| from.find(a)), there.and_then(|b| to.find(b)));
            let is_theirs = |word: Option<u64>, places: &Places| {
                word.is_some_and(|word| places.find(word).is_some() || is_memory(word))
            };
            let are_addresses = || is_theirs(here, from) && is_theirs(there, to);
            // An address between two words that differs and is a place would be the same place in both.
            let is_place = |at: usize| {
                let (here, there) = (word(a, at), word(b, at));
                let places = (here.and_then(|a| from.find(a)), there.and_then(|b| to.find(b)));
                here != there && matches!(places, (Some(a), Some(b)) if alike(a, b))
            };
            match (place, other) {
                (Some(place), Some(other)) if alike(place, other) && offset + WORD <= a.len() => {
                    words.push(Word { argument, offset, place });
                }
                _ if (is_small_number(here, there) || (place, other) == (None, None) && !are_addresses())
                    && !aside(offset).any(is_place) => {}
                _ => {
                    let (len, values) = (a.len(), (here, there));
                    let beside = aside(offset).find(|&at| is_place(at));
                    return Err(format!(
                        "argument {argument}, {len} bytes, differs at {offset}: {values:x?}, {place:x?}, {other:x?}, {beside:?}"
                    ));
                }
            }
        }
    }
    Ok(words)
}

/// The word at an offset; what there is of it at the end, with zeros behind.
fn word(argument: &[u8], offset: usize) -> Option<u64> {
    let rest = argument.get(offset..)?;
    let mut bytes = [0; WORD];
    let len = rest.len().min(WORD);
    bytes[..len].copy_from_slice(&rest[..len]);
    Some(u64::from_ne_bytes(bytes))
}

/// Whether two words are the same small number in their lower halves, with whatever was there before in their upper ones. Of
/// addresses that differ, the lower halves do.
fn is_small_number(a: Option<u64>, b: Option<u64>) -> bool {
    let lower = |word: u64| word & u64::from(u32::MAX);
    matches!((a, b), (Some(a), Some(b)) if lower(a) == lower(b) && lower(a) < SMALL_NUMBERS)
}

/// Where an address could begin that has a part of the word at an offset, but for there.
fn aside(offset: usize) -> impl Iterator<Item = usize> {
    offset.checked_sub(WORD / 2).into_iter().chain([offset + WORD / 2])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn argument(words: &[u64], rest: &[u8]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).chain(rest.iter().copied()).collect()
    }

    /// Memory that is none of the model's.
    const OTHER: u64 = 0x77_0000;

    fn compared(a: &[Vec<u8>], b: &[Vec<u8>]) -> Result<Vec<Word>, String> {
        let from = Places(vec![(0x1000, 0x100), (0x8000, 0x1000)]);
        let to = Places(vec![(0x4000, 0x100), (0x20000, 0x1000)]);
        compare_arguments((a, b), (&from, &to), &|a, b| a == b, &|address| (OTHER..OTHER + 16).contains(&address))
    }

    #[test]
    fn words_that_differ_are_places_where_they_lie_alike_in_both() {
        let a = [argument(&[0x1010, 7, 0x8ff8], &[1]), argument(&[], &[9, 9])];
        let b = [argument(&[0x4010, 7, 0x20ff8], &[1]), argument(&[], &[9, 9])];
        let words = compared(&a, &b).expect("only places differ");
        let word = |argument, offset, place| Word { argument, offset, place };
        assert_eq!(words, [word(0, 0, (0, 0x10)), word(0, 16, (1, 0xff8))]);
        let third = Places(vec![(0x70_0000, 0x100), (0x90_0000, 0x1000)]);
        let moved: Vec<_> = words.iter().map(|word| third.address(word.place)).collect();
        assert_eq!(moved, [Ok(0x70_0010), Ok(0x90_0ff8)]);
    }

    #[test]
    fn addresses_that_differ_and_are_no_place_in_both_keep_a_kind_apart() {
        let differ = |a: Vec<u8>, b: Vec<u8>| compared(&[a], &[b]).is_err();
        assert!(differ(argument(&[0x1010], &[]), argument(&[0x4018], &[])), "another place");
        assert!(differ(argument(&[0x1010], &[]), argument(&[0x20010], &[])), "another stretch");
        assert!(differ(argument(&[0x1010], &[]), argument(&[0x4100], &[])), "behind the end");
        assert!(differ(argument(&[0x1010], &[]), argument(&[5], &[])), "an address and a number");
        assert!(differ(argument(&[OTHER], &[]), argument(&[OTHER + 1], &[])), "memory of others");
        assert!(differ(argument(&[1], &[]), argument(&[1], &[1])), "another size");
        let half = |address: u64| [&[0; 4][..], &address.to_ne_bytes()[..], &[0; 4]].concat();
        assert!(differ(half(0x1010), half(0x4010)), "an address between two words");
    }

    #[test]
    fn what_is_no_address_may_differ_and_stays() {
        let same = [argument(&[0x1010], &[])];
        assert_eq!(compared(&same, &same), Ok(vec![]), "it looks like a place and is the same in both");
        let leftovers = [argument(&[0x1234_5678_9abc, 0x1010], &[1]), argument(&[0x9999_8888_7777, 0x4010], &[2])];
        let [a, b] = leftovers;
        let words = compared(&[a], &[b]).expect("neither is an address");
        assert_eq!(words, [Word { argument: 0, offset: 8, place: (0, 0x10) }]);
        let beside = |upper: u64, lower: u64| [argument(&[upper << 32 | lower], &[])];
        for (a, b) in [(0x7fab, 0x7fa6), (0, 0x7fa6), (OTHER >> 4, 1)] {
            assert_eq!(compared(&beside(a, 3), &beside(b, 3)), Ok(vec![]), "half of an address beside a small number");
        }
        assert_eq!(
            compared(&[argument(&[OTHER], &[])], &[argument(&[5], &[])]),
            Ok(vec![]),
            "no address in one of them"
        );
        // Upper halves of old addresses beside a lower half of 0 look like one of an arena that begins at 0x1000.
        let halves = |upper: u64| [argument(&[upper << 32 | 7, 0], &[])];
        assert_eq!(compared(&halves(0x1020), &halves(0x4030)), Ok(vec![]), "another place in each");
        assert!(compared(&halves(0x1020), &halves(0x4020)).is_err(), "the same place in both");
    }

    #[test]
    fn programs_at_the_same_addresses_cannot_be_compared() {
        let places = |weights: u64, lane: u64, own: u64| {
            Places(vec![
                (weights, 0x100),
                (lane, 0x100),
                (lane + 0x100, 0x100),
                (lane + 0x200, 0x100),
                (own, 0),
                (own + 8, 8),
            ])
        };
        let one = places(0x1000, 0x2000, 0x5000);
        assert!(!one.overlaps(&places(0x1100, 0x3000, 0x6000), false));
        assert!(one.overlaps(&places(0x10ff, 0x3000, 0x6000), false), "weights");
        assert!(one.overlaps(&places(0x1100, 0x3000, 0x5000), false), "constants, also of nothing");
        assert!(one.overlaps(&places(0x1100, 0x2100, 0x6000), false), "another lane's");
        assert!(!one.overlaps(&places(0x1100, 0x2000, 0x6000), true), "the same lane's");
    }

    #[test]
    fn constants_of_the_kind_are_alike_by_what_they_hold_and_all_else_by_where_it_is() {
        let constants = |all: &[&[u8]]| all.iter().map(|content| content.to_vec()).collect::<Vec<_>>();
        let (one, other) = (constants(&[&[1], &[7], &[8, 8], &[7]]), constants(&[&[2], &[8, 8], &[7]]));
        let alike = |a: usize, b: usize| are_alike(((a, 1), &one), ((b, 1), &other));
        assert!((0..=OWN_CONSTANTS).all(|stretch| alike(stretch, stretch)), "also what is the model's own");
        assert!(!alike(0, 1) && !alike(OWN_CONSTANTS, OWN_CONSTANTS + 1) && !alike(OWN_CONSTANTS + 1, OWN_CONSTANTS));
        assert!(alike(OWN_CONSTANTS + 1, OWN_CONSTANTS + 2) && alike(OWN_CONSTANTS + 3, OWN_CONSTANTS + 2));
        assert!(!alike(OWN_CONSTANTS + 1, OWN_CONSTANTS + 1));
        assert!(!are_alike(((5, 1), &one), ((6, 2), &other)), "another place in it");
    }
}
