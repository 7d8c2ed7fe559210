//! A count in host memory that work on the device waits for: what the host has done so far.
//!
//! The link lets groups of weights be used only once the chunks under them are mapped, and it queues that before it maps:
//! so programs are launched, and their first layers run, while later chunks are still being mapped.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use super::{
    driver::{Context, Pinned},
    queue::Queue,
};
use crate::DeviceError;

/// Bytes of pinned memory for the count: a cache line of its own.
const LINE: usize = 64;

/// The count. It wraps; waits compare by the difference.
pub(super) struct Gate {
    word: Pinned,
    promised: u32,
}

impl Gate {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, DeviceError> {
        Ok(Self { word: Pinned::new(context, LINE)?, promised: 0 })
    }

    /// Promises `steps` more; returns the count before them. Each must follow by [`Gate::open`], or all by
    /// [`Gate::open_all`]: queues wait for them.
    pub(super) fn promise(&mut self, steps: u32) -> u32 {
        let before = self.promised;
        self.promised = before.wrapping_add(steps);
        before
    }

    /// Makes what is queued from now on wait until the count is at least this.
    pub(super) fn hold(&self, queue: &Queue, count: u32) -> Result<(), DeviceError> {
        // SAFETY: the word is pinned memory of this gate, which its owner keeps until the queue is empty.
        unsafe { queue.wait_for_word(self.word.as_ptr().cast(), count) }
    }

    /// Lets pass what waits for up to this count.
    pub(super) fn open(&self, count: u32) {
        // SAFETY: the word is aligned, lives as long as `self`, and nobody but this thread and the device touches it.
        unsafe { AtomicU32::from_ptr(self.word.as_ptr().cast()) }.store(count, Ordering::Release);
    }

    /// Lets everything pass that was promised.
    pub(super) fn open_all(&self) {
        self.open(self.promised);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.open_all();
    }
}
