//! The slot books against a list that is too simple to be wrong.

#![allow(clippy::unwrap_used, reason = "tests")]

use faaswap_protocol::{Span, limits::TENSOR_ALIGN};
use faaswap_slab::{SlotAllocator, SlotError};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Allocate(u64),
    Free(usize),
    FreeTwice(usize),
    FreeForeign(Span),
}

fn step() -> impl Strategy<Value = Step> {
    let len = prop_oneof![4 => 0..700_u64, 2 => 0..20_000_u64, 1 => any::<u64>()];
    let span = (0..40_000_u64, 0..2_000_u64).prop_map(|(offset, len)| Span { offset, len });
    prop_oneof![
        5 => len.prop_map(Step::Allocate),
        4 => any::<usize>().prop_map(Step::Free),
        1 => any::<usize>().prop_map(Step::FreeTwice),
        1 => span.prop_map(Step::FreeForeign),
    ]
}

fn room(span: Span) -> u64 {
    span.len.next_multiple_of(TENSOR_ALIGN)
}

fn disjoint(a: Span, b: Span) -> bool {
    a.offset + room(a) <= b.offset || b.offset + room(b) <= a.offset
}

proptest! {
    #[test]
    fn slots_are_aligned_in_bounds_and_never_overlap(
        start in 0..300_u64,
        len in 0..32_000_u64,
        steps in prop::collection::vec(step(), 0..200),
    ) {
        let mut slots = SlotAllocator::new(start, len);
        let whole = slots.free_bytes();
        prop_assert!(whole <= len && whole + 2 * TENSOR_ALIGN > len);
        let mut out: Vec<Span> = Vec::new();
        for step in steps {
            match step {
                Step::Allocate(len_wanted) => {
                    if let Some(span) = slots.allocate(len_wanted) {
                        prop_assert_eq!(span.len, len_wanted);
                        prop_assert!(span.offset.is_multiple_of(TENSOR_ALIGN) || len < TENSOR_ALIGN);
                        prop_assert!(span.offset >= start && span.end().unwrap() <= start + len);
                        prop_assert!(out.iter().all(|&other| disjoint(span, other)), "{:?} in {:?}", span, out);
                        out.push(span);
                    } else {
                        let fits = len_wanted.checked_next_multiple_of(TENSOR_ALIGN).is_some_and(|n| n <= whole);
                        prop_assert!(!(fits && out.iter().all(|s| s.len == 0)), "refused in empty books");
                    }
                }
                Step::Free(i) if !out.is_empty() => {
                    let span = out.swap_remove(i % out.len());
                    prop_assert_eq!(slots.free(span), Ok(()));
                }
                Step::FreeTwice(i) if !out.is_empty() => {
                    let span = out.swap_remove(i % out.len());
                    prop_assert_eq!(slots.free(span), Ok(()));
                    if !out.contains(&span) {
                        prop_assert_eq!(slots.free(span), Err(SlotError { span }));
                    }
                }
                Step::Free(_) | Step::FreeTwice(_) => {}
                Step::FreeForeign(span) => {
                    if !out.contains(&span) {
                        prop_assert_eq!(slots.free(span), Err(SlotError { span }));
                    }
                }
            }
            prop_assert_eq!(slots.free_bytes() + out.iter().map(|&span| room(span)).sum::<u64>(), whole);
        }
        for span in out {
            prop_assert_eq!(slots.free(span), Ok(()));
        }
        if whole > 0 {
            prop_assert_eq!(slots.allocate(whole).map(|span| span.len), Some(whole), "freed stretches are one again");
        }
    }
}

#[test]
fn a_slot_that_was_just_freed_is_used_again_first() {
    let mut slots = SlotAllocator::new(0, 1 << 20);
    let a = slots.allocate(1000).unwrap();
    let b = slots.allocate(1000).unwrap();
    slots.free(a).unwrap();
    assert_eq!(slots.allocate(1000), Some(a));
    assert_ne!(a, b);
}

#[test]
fn a_length_near_the_end_of_numbers_is_refused() {
    let mut slots = SlotAllocator::new(0, 1 << 20);
    assert_eq!(slots.allocate(u64::MAX), None);
    let span = Span { offset: 0, len: u64::MAX };
    assert_eq!(slots.free(span), Err(SlotError { span }));
    assert_eq!(SlotAllocator::new(u64::MAX - 3, u64::MAX).free_bytes(), 0);
}

#[test]
fn an_empty_slot_takes_no_room_and_is_freed_as_often_as_it_was_taken() {
    let mut slots = SlotAllocator::new(64, 64);
    let empty = slots.allocate(0).unwrap();
    let full = slots.allocate(64).unwrap();
    assert_eq!((slots.free_bytes(), empty.offset), (0, 64));
    slots.free(empty).unwrap();
    assert!(slots.free(empty).is_err());
    slots.free(full).unwrap();
}
