//! Device memory that a runtime takes while it makes and runs models: arenas that grow where they are.
//!
//! Constants, and each lane's scratch, have an arena of their own, for a captured program keeps the addresses that it
//! was captured with: two lanes' scratch may not overlap since they run at the same time, and nothing may overlap
//! constants, which live as long as their model. Programs of one lane run one after the other and share its scratch.

use std::{
    cell::Cell,
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use super::{
    Stretch,
    driver::{Addresses, Context, Physical},
};
use crate::DeviceError;

/// Memory is added to an arena in pieces of this size.
const GROW_BY: usize = 32 << 20;
/// Alignment of what is given out; what CUDA's own allocator keeps.
const ALIGN: usize = 512;

/// First-fit books of a stretch of addresses, in offsets from its start. They say nothing of what is mapped.
#[derive(Debug, Default)]
pub(super) struct Books {
    /// Free stretches below `end`: offset and length, no two of them neighbours.
    free: BTreeMap<usize, usize>,
    live: HashMap<usize, usize>,
    end: usize,
    peak: usize,
}

impl Books {
    /// Takes a stretch; the end moves where no free one is long enough.
    fn take(&mut self, len: usize) -> usize {
        let len = len.max(1).next_multiple_of(ALIGN);
        let fit = self.free.iter().find(|&(_, &free)| free >= len).map(|(&at, &free)| (at, free));
        let at = if let Some((at, free)) = fit {
            self.free.remove(&at);
            if free > len {
                self.free.insert(at + len, free - len);
            }
            at
        } else {
            // A free stretch at the very end grows instead of staying as a hole.
            let last = self.free.last_key_value().map(|(&at, &free)| (at, free));
            let at = last.filter(|&(at, free)| at + free == self.end).map_or(self.end, |(at, _)| at);
            self.free.remove(&at);
            self.end = at + len;
            at
        };
        self.live.insert(at, len);
        self.peak = self.peak.max(at + len);
        at
    }

    /// Gives a stretch back; false where it was not taken.
    fn give(&mut self, at: usize) -> bool {
        let Some(mut len) = self.live.remove(&at) else { return false };
        let mut start = at;
        if let Some(next) = self.free.remove(&(at + len)) {
            len += next;
        }
        let before = self.free.range(..at).next_back().map(|(&before, &free)| (before, free));
        if let Some((before, free)) = before.filter(|&(before, free)| before + free == at) {
            start = before;
            len += free;
        }
        self.free.insert(start, len);
        true
    }
}

/// An arena.
pub(super) struct Arena {
    context: Arc<Context>,
    addresses: Addresses,
    mapped: Vec<Physical>,
    books: Books,
}

impl Arena {
    /// Reserves addresses; takes no memory yet.
    pub(super) fn new(context: &Arc<Context>, most: usize) -> Result<Self, DeviceError> {
        let most = most.next_multiple_of(GROW_BY);
        let addresses = Addresses::reserve(context, most)?;
        Ok(Self { context: Arc::clone(context), addresses, mapped: Vec::new(), books: Books::default() })
    }

    pub(super) fn base(&self) -> u64 {
        self.addresses.base()
    }

    /// All of its addresses: base and length.
    pub(super) fn stretch(&self) -> Stretch {
        (self.addresses.base(), self.addresses.len() as u64)
    }

    pub(super) fn mapped(&self) -> usize {
        self.mapped.len() * GROW_BY
    }

    /// Sees to it that so many bytes from the start are there.
    pub(super) fn grow(&mut self, len: usize) -> Result<(), DeviceError> {
        self.context.enter()?;
        while self.mapped() < len {
            let at = self.mapped();
            if at + GROW_BY > self.addresses.len() {
                let reason = format!("the arena may have {} bytes, {len} are needed", self.addresses.len());
                return Err(DeviceError::Failed { call: "growing an arena", reason });
            }
            let memory = Physical::new(&self.context, GROW_BY)?;
            self.addresses.map(at, &memory, GROW_BY)?;
            self.mapped.push(memory);
            self.addresses.open(at, GROW_BY)?;
            self.context.zero(self.base() + at as u64, GROW_BY)?;
        }
        Ok(())
    }

    pub(super) fn take(&mut self, len: usize) -> Result<u64, DeviceError> {
        let at = self.books.take(len);
        match self.grow(at.saturating_add(len)) {
            Ok(()) => Ok(self.base() + at as u64),
            Err(error) => {
                self.books.give(at);
                Err(error)
            }
        }
    }

    fn offset(&self, address: u64) -> Option<usize> {
        let offset = usize::try_from(address.checked_sub(self.base())?).ok()?;
        (offset < self.addresses.len()).then_some(offset)
    }

    pub(super) fn holds(&self, address: u64) -> bool {
        self.offset(address).is_some()
    }

    pub(super) fn give(&mut self, address: u64) -> bool {
        self.offset(address).is_some_and(|offset| self.books.give(offset))
    }

    /// How far into the arena it was ever used.
    pub(super) fn peak(&self) -> usize {
        self.books.peak
    }

    /// How many bytes are taken.
    pub(super) fn taken(&self) -> usize {
        self.books.live.values().sum()
    }

    /// How many stretches are taken.
    pub(super) fn live(&self) -> usize {
        self.books.live.len()
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        if self.context.enter().is_ok()
            && let Err(error) = self.addresses.unmap(0, self.mapped())
        {
            tracing::warn!(%error, "an arena cannot be unmapped");
        }
    }
}

/// What the memory is for that the calling thread takes now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Kept until its owner, by this number, goes.
    Constants(u64),
    /// Of the lane of this number.
    Scratch(usize),
}

thread_local! {
    static PURPOSE: Cell<Option<Purpose>> = const { Cell::new(None) };
}

/// Does work whose memory is for this purpose.
pub(super) fn with_purpose<T>(purpose: Purpose, work: impl FnOnce() -> T) -> T {
    struct Restore(Option<Purpose>);
    impl Drop for Restore {
        fn drop(&mut self) {
            PURPOSE.set(self.0);
        }
    }
    let _restore = Restore(PURPOSE.replace(Some(purpose)));
    work()
}

pub(super) fn purpose() -> Option<Purpose> {
    PURPOSE.get()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn stretches_never_overlap_and_all_come_back(steps in prop::collection::vec((any::<bool>(), 1_usize..5000), 1..200)) {
            let mut books = Books::default();
            let mut live: Vec<(usize, usize)> = Vec::new();
            for (take, n) in steps {
                if take || live.is_empty() {
                    let at = books.take(n);
                    prop_assert_eq!(at % ALIGN, 0);
                    prop_assert!(live.iter().all(|&(b, len)| at + n <= b || b + len <= at));
                    prop_assert!(at + n <= books.peak);
                    live.push((at, n));
                } else {
                    let (at, _) = live.swap_remove(n % live.len());
                    prop_assert!(books.give(at));
                    prop_assert!(!books.give(at));
                }
            }
            for (at, _) in live {
                prop_assert!(books.give(at));
            }
            prop_assert_eq!(books.free.len(), 1);
            prop_assert_eq!(books.free.get(&0), Some(&books.end));
        }
    }

    #[test]
    fn the_same_requests_get_the_same_places() {
        let run = |books: &mut Books| {
            let a = books.take(1000);
            let b = books.take(70_000);
            books.give(a);
            let c = books.take(300);
            books.give(b);
            books.give(c);
            (a, b, c)
        };
        let mut books = Books::default();
        assert_eq!(run(&mut books), run(&mut books));
        assert_eq!(books.live.len(), 0);
    }
}
