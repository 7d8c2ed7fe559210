//! The books of one half of a slab: which stretches are taken.
//!
//! Pure and deterministic. Best fit, lowest address first, so that few requests at a time keep reusing pages that are
//! already there. Neighbouring free stretches are always one. It touches no memory and knows no requests.

use std::collections::{BTreeMap, BTreeSet};

use faaswap_protocol::{
    Span,
    limits::{REQUESTS_IN_FLIGHT_MAX, TENSOR_ALIGN, TENSORS_MAX},
};

/// Most slots out at a time; it bounds the memory of the books.
pub const SLOTS_MAX: usize = REQUESTS_IN_FLIGHT_MAX * TENSORS_MAX;

const _: () = assert!(SLOTS_MAX <= 1 << 20, "the books of one connection must stay small");

/// A span was given back that is not out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("slot of {} bytes at {} was freed but is not taken", span.len, span.offset)]
pub struct SlotError {
    /// What was given back.
    pub span: Span,
}

/// Gives out aligned stretches of `start..start + len`. Every call takes time logarithmic in the number of stretches.
#[derive(Clone, Debug)]
pub struct SlotAllocator {
    start: u64,
    /// Free stretches by offset; no two touch.
    free: BTreeMap<u64, u64>,
    /// The same stretches as (length, offset).
    free_by_len: BTreeSet<(u64, u64)>,
    free_bytes: u64,
    /// The length that was asked for, by offset.
    taken: BTreeMap<u64, u64>,
    /// Slots of no bytes that are out; they take no room.
    taken_empty: usize,
}

impl SlotAllocator {
    /// Books for a stretch where nothing is taken. Its ends are moved inwards to whole slots.
    pub fn new(start: u64, len: u64) -> Self {
        let end = start.saturating_add(len);
        let start = start.checked_next_multiple_of(TENSOR_ALIGN).unwrap_or(end).min(end);
        let len = (end - start) / TENSOR_ALIGN * TENSOR_ALIGN;
        let mut slots = Self {
            start,
            free: BTreeMap::new(),
            free_by_len: BTreeSet::new(),
            free_bytes: 0,
            taken: BTreeMap::new(),
            taken_empty: 0,
        };
        if len > 0 {
            slots.insert_free(start, len);
        }
        slots
    }

    /// Takes a slot of `len` bytes, aligned to [`TENSOR_ALIGN`]; `None` where there is no such stretch, or too many
    /// slots are out.
    pub fn allocate(&mut self, len: u64) -> Option<Span> {
        if self.taken.len() + self.taken_empty >= SLOTS_MAX {
            return None;
        }
        if len == 0 {
            self.taken_empty += 1;
            return Some(Span { offset: self.start, len });
        }
        let room = room(len)?;
        let &(found, offset) = self.free_by_len.range((room, 0)..).next()?;
        self.remove_free(offset, found);
        if found > room {
            self.insert_free(offset + room, found - room);
        }
        self.taken.insert(offset, len);
        Some(Span { offset, len })
    }

    /// Takes a slot back. A span that is not out, or not as it was given out, changes nothing.
    pub fn free(&mut self, span: Span) -> Result<(), SlotError> {
        let refused = SlotError { span };
        if span.len == 0 {
            if span.offset != self.start || self.taken_empty == 0 {
                return Err(refused);
            }
            self.taken_empty -= 1;
            return Ok(());
        }
        let room = room(span.len).ok_or(refused)?;
        if self.taken.get(&span.offset) != Some(&span.len) {
            return Err(refused);
        }
        self.taken.remove(&span.offset);
        let (mut offset, mut len) = (span.offset, room);
        if let Some((&before, &before_len)) = self.free.range(..offset).next_back()
            && before + before_len == offset
        {
            self.remove_free(before, before_len);
            (offset, len) = (before, len + before_len);
        }
        if let Some(&after_len) = self.free.get(&(offset + len)) {
            self.remove_free(offset + len, after_len);
            len += after_len;
        }
        self.insert_free(offset, len);
        Ok(())
    }

    /// Bytes that are not taken, in whole slots; not necessarily in one stretch.
    pub fn free_bytes(&self) -> u64 {
        self.free_bytes
    }

    fn insert_free(&mut self, offset: u64, len: u64) {
        self.free.insert(offset, len);
        self.free_by_len.insert((len, offset));
        self.free_bytes += len;
    }

    fn remove_free(&mut self, offset: u64, len: u64) {
        self.free.remove(&offset);
        self.free_by_len.remove(&(len, offset));
        self.free_bytes -= len;
    }
}

/// What a slot of so many bytes takes.
fn room(len: u64) -> Option<u64> {
    len.checked_next_multiple_of(TENSOR_ALIGN)
}
