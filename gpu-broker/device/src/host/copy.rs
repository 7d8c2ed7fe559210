//! Copying weights as fast as the machine allows, or as fast as a configured link would.
//!
//! Measured on two cores of an EPYC with 100 MB into populated pages: `memcpy` 11.9 GB/s, stores that go around the
//! cache 18.9 GB/s, since lines that will be overwritten whole need not be read first. With 1 MB, which fits in a cache,
//! it is 41 against 27 GB/s, and the run that follows finds the weights in the cache. So the size decides.

use std::{
    ptr, thread,
    time::{Duration, Instant},
};

/// Weights of at least this size go around the cache.
const STREAM_FROM: usize = 8 << 20;
/// Longest stretch between two looks at whether the device was lost. Larger pieces are no faster.
const PIECE_MAX: usize = 4 << 20;
/// Shortest one, for slow links.
const PIECE_MIN: usize = 4 << 10;
/// Longest that a piece may take on a configured link; the pace is this smooth.
const PIECE_TIME_MS: u64 = 2;

/// The pace of one swap.
#[derive(Debug)]
pub(super) struct Pace {
    started: Instant,
    bytes_per_second: Option<u64>,
    copied: u64,
}

impl Pace {
    pub(super) fn start(started: Instant, bytes_per_second: Option<u64>) -> Self {
        Self { started, bytes_per_second, copied: 0 }
    }

    /// How much to copy at once.
    pub(super) fn piece(&self) -> usize {
        let by_time = self.bytes_per_second.map(|rate| rate.saturating_mul(PIECE_TIME_MS) / 1000);
        by_time.map_or(PIECE_MAX, |n| usize::try_from(n).unwrap_or(PIECE_MAX).clamp(PIECE_MIN, PIECE_MAX))
    }

    /// The link had nothing to copy for so long.
    pub(super) fn stall(&mut self, by: Duration) {
        self.started += by;
    }

    /// Waits until so many more bytes would have come over the link.
    pub(super) fn wait_for(&mut self, bytes: usize) {
        let Some(rate) = self.bytes_per_second else { return };
        self.copied += bytes as u64;
        let due_ns = u128::from(self.copied) * 1_000_000_000 / u128::from(rate.max(1));
        let due = Duration::from_nanos(u64::try_from(due_ns).unwrap_or(u64::MAX));
        if let Some(early) = due.checked_sub(self.started.elapsed()) {
            thread::sleep(early);
        }
    }
}

/// Copies a piece of weights of `whole` bytes in all.
///
/// # Safety
/// `from` must be readable and `to` writable for `len` bytes, and the two must not overlap.
pub(super) unsafe fn piece(from: *const u8, to: *mut u8, len: usize, whole: usize) {
    if whole < STREAM_FROM {
        // SAFETY: the caller vouches for exactly this; bytes need no alignment.
        unsafe { ptr::copy_nonoverlapping(from, to, len) };
    } else {
        // SAFETY: the caller vouches for exactly this.
        unsafe { stream(from, to, len) };
    }
}

/// # Safety
/// As [`piece`].
#[cfg(target_arch = "x86_64")]
unsafe fn stream(from: *const u8, to: *mut u8, len: usize) {
    use std::arch::x86_64::{__m128i, _mm_sfence, _mm_stream_si128};
    const LINE: usize = 64;

    let head = to.align_offset(LINE).min(len);
    // SAFETY: `head <= len`, for which the caller vouches.
    unsafe { ptr::copy_nonoverlapping(from, to, head) };
    let lines = (len - head) / LINE;
    for line in 0..lines {
        let at = head + line * LINE;
        // SAFETY: `at + LINE <= len`; any bytes are a valid `__m128i`, and reading needs no alignment.
        let bytes = unsafe { from.wrapping_add(at).cast::<[__m128i; 4]>().read_unaligned() };
        let target = to.wrapping_add(at).cast::<__m128i>();
        for (i, part) in bytes.into_iter().enumerate() {
            // SAFETY: the same bounds; `target` is a multiple of 64 by `head`, so each part is aligned to 16. Every
            // x86-64 processor has SSE2.
            unsafe { _mm_stream_si128(target.wrapping_add(i), part) };
        }
    }
    let tail = head + lines * LINE;
    // SAFETY: `tail <= len`, for which the caller vouches.
    unsafe { ptr::copy_nonoverlapping(from.wrapping_add(tail), to.wrapping_add(tail), len - tail) };
    // Such stores are not ordered with the one that will say that the group is there.
    // SAFETY: every x86-64 processor has SSE.
    #[allow(unused_unsafe, reason = "newer compilers know that this one is safe")]
    unsafe {
        _mm_sfence();
    };
}

/// # Safety
/// As [`piece`].
#[cfg(not(target_arch = "x86_64"))]
unsafe fn stream(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the caller vouches for exactly this.
    unsafe { ptr::copy_nonoverlapping(from, to, len) };
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn both_ways_of_copying_move_exactly_the_bytes_asked_for(
            from in 0..70_usize, to in 0..70_usize, len in 0..900_usize, large in any::<bool>(),
        ) {
            let source: Vec<u8> = (0..1000_u32).map(|i| i.to_le_bytes()[0] | 1).collect();
            let mut target = vec![0; 1000];
            let whole = if large { STREAM_FROM } else { 0 };
            let start = target.as_mut_ptr().wrapping_add(to);
            // SAFETY: 70 + 900 < 1000, and the two vectors do not overlap.
            unsafe { piece(source.as_ptr().wrapping_add(from), start, len, whole) };
            prop_assert_eq!(&target[to..to + len], &source[from..from + len]);
            prop_assert!(target[..to].iter().chain(&target[to + len..]).all(|&byte| byte == 0));
        }
    }

    #[test]
    fn pieces_are_small_on_a_slow_link_and_bounded_on_any() {
        let piece = |rate| Pace::start(Instant::now(), rate).piece();
        assert_eq!([piece(None), piece(Some(u64::MAX)), piece(Some(1))], [PIECE_MAX, PIECE_MAX, PIECE_MIN]);
        assert_eq!(piece(Some(100_000_000)), 200_000);
    }
}
