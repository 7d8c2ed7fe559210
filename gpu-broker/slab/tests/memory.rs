//! What a hostile or mistaken peer can do to a slab: nothing.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::{fs::File, os::fd::OwnedFd};

use faaswap_protocol::{
    Bytes, SlabLayout, Span,
    limits::{SLAB_BYTES_MAX, TENSOR_ALIGN},
};
use faaswap_slab::{Slab, SlabError};
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, SealFlags};

const LAYOUT: SlabLayout = SlabLayout { request: Bytes::kib(64), response: Bytes::kib(32) };
const SIZE: u64 = 96 << 10;

fn memfd(size: u64, seals: SealFlags) -> OwnedFd {
    let file = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&file, size).unwrap();
    rustix::fs::fcntl_add_seals(&file, seals).unwrap();
    file
}

fn span(offset: u64, len: u64) -> Span {
    Span { offset, len }
}

#[test]
fn both_ends_see_the_same_bytes() {
    let (ours, file) = Slab::create(LAYOUT).unwrap();
    let theirs = Slab::open(file, LAYOUT).unwrap();
    ours.response_region(span(64 << 10, 5)).unwrap().write(0, b"hello").unwrap();
    let region = theirs.response_region(span(64 << 10, 5)).unwrap();
    drop((ours, theirs));
    let mut read = [0; 5];
    region.read(0, &mut read).unwrap();
    assert_eq!(&read, b"hello", "a region keeps the memory mapped");
    assert_eq!(region.into_bytes_owner().as_ref(), b"hello");
}

#[test]
fn a_slab_cannot_change_its_size_once_it_is_sealed() {
    let (_slab, file) = Slab::create(LAYOUT).unwrap();
    for size in [0, SIZE - 4096, SIZE + 4096] {
        assert_eq!(rustix::fs::ftruncate(&file, size), Err(rustix::io::Errno::PERM), "to {size}");
    }
    assert_eq!(rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE), Err(rustix::io::Errno::PERM));
}

#[test]
fn punching_holes_into_a_slab_leaves_it_readable() {
    let (slab, file) = Slab::create(LAYOUT).unwrap();
    let region = slab.request_region(span(0, 4096)).unwrap();
    region.write(0, &[7; 4096]).unwrap();
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, flags, 0, SIZE).unwrap();
    let mut read = [1; 4096];
    region.read(0, &mut read).unwrap();
    assert_eq!(read, [0; 4096]);
}

#[test]
fn pages_that_are_faulted_in_take_memory_and_keep_their_bytes() {
    let (slab, file) = Slab::create(LAYOUT).unwrap();
    let region = slab.request_region(span(0, 8192)).unwrap();
    region.write(4096, &[7; 100]).unwrap();
    let blocks = || rustix::fs::fstat(&file).unwrap().st_blocks;
    let before = blocks();
    // Kernels before 5.14 cannot.
    assert!(region.fault_in().is_err() || blocks() > before, "{} blocks", blocks());
    let mut read = [1; 8192];
    region.read(0, &mut read).unwrap();
    assert!(read[4096..4196].iter().all(|byte| *byte == 7) && read[..4096].iter().all(|byte| *byte == 0));
}

#[test]
fn a_file_that_could_shrink_is_refused() {
    let all = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    for missing in [SealFlags::SHRINK, SealFlags::GROW, SealFlags::SEAL, all] {
        let refused = Slab::open(memfd(SIZE, all - missing), LAYOUT);
        assert!(matches!(refused, Err(SlabError::NotSealed)), "{missing:?}: {refused:?}");
    }
    assert!(Slab::open(memfd(SIZE, all), LAYOUT).is_ok());
}

#[test]
fn a_file_that_cannot_be_sealed_is_refused() {
    let file: OwnedFd = File::open("/proc/self/exe").unwrap().into();
    assert!(matches!(Slab::open(file, LAYOUT), Err(SlabError::NotSealed)));
    let (pipe, _other) = rustix::pipe::pipe().unwrap();
    assert!(matches!(Slab::open(pipe, LAYOUT), Err(SlabError::NotSealed)));
}

#[test]
fn a_file_of_another_size_is_refused() {
    for size in [0, SIZE - 1, SIZE - 4096, SIZE + 1, SIZE * 2] {
        let file = memfd(size, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL);
        let refused = Slab::open(file, LAYOUT);
        assert!(
            matches!(refused, Err(SlabError::Size { expected, found })
                if (expected, found) == (Bytes::new(SIZE), Bytes::new(size))),
            "{size}: {refused:?}"
        );
    }
}

#[test]
fn a_layout_that_no_slab_can_have_is_refused() {
    let layout =
        |request: u64, response: u64| SlabLayout { request: Bytes::new(request), response: Bytes::new(response) };
    let bad = [(0, 0), (u64::MAX, 64), (SLAB_BYTES_MAX.get(), 64), (63, 64), (64, 65), (u64::MAX - 63, 64)];
    for (request, response) in bad {
        let refused = Slab::create(layout(request, response));
        assert!(matches!(refused, Err(SlabError::Layout { .. })), "{request} {response}: {refused:?}");
    }
    assert!(Slab::create(layout(0, 64)).is_ok() && Slab::create(layout(64, 0)).is_ok());
}

/// Numbers near every edge that there is, and any others.
fn number() -> impl Strategy<Value = u64> {
    let near = prop_oneof![Just(0), Just(64 << 10), Just(SIZE), Just(u64::MAX - 64), Just(1 << 63)];
    prop_oneof![
        3 => (near, 0..130_u64).prop_map(|(at, by): (u64, u64)| at.wrapping_add(by).wrapping_sub(65)),
        2 => (0..SIZE / 64).prop_map(|n| n * 64),
        1 => any::<u64>(),
    ]
}

proptest! {
    #[test]
    fn no_span_reaches_out_of_its_half(offset in number(), len in number()) {
        let (slab, _file) = Slab::create(LAYOUT).unwrap();
        let inside = |start: u64, end: u64| {
            offset.is_multiple_of(TENSOR_ALIGN)
                && offset >= start
                && u128::from(offset) + u128::from(len) <= u128::from(end)
        };
        let asked = span(offset, len);
        prop_assert_eq!(slab.request_region(asked).is_ok(), inside(0, 64 << 10));
        prop_assert_eq!(slab.response_region(asked).is_ok(), inside(64 << 10, SIZE));
        if let Ok(region) = slab.request_region(asked) {
            prop_assert_eq!(region.len() as u64, len);
        }
    }

    #[test]
    fn no_access_reaches_out_of_its_region(at in any::<usize>(), near in 0..300_usize, len in 0..300_usize) {
        let (slab, _file) = Slab::create(LAYOUT).unwrap();
        let whole = slab.request_region(span(0, 512)).unwrap();
        let region = slab.request_region(span(128, 200)).unwrap();
        for at in [at, near] {
            let inside = at.checked_add(len).is_some_and(|end| end <= 200);
            prop_assert_eq!(region.write(at, &vec![0xee; len]).is_ok(), inside);
            prop_assert_eq!(region.read(at, &mut vec![0; len]).is_ok(), inside);
        }
        let mut bytes = [0; 512];
        whole.read(0, &mut bytes).unwrap();
        let outside = bytes[..128].iter().chain(&bytes[328..]);
        prop_assert!(outside.copied().all(|byte| byte == 0));
    }
}
