//! Things with outside names in a dense list: a name is looked up once per event, then a place is an index.

use std::collections::BTreeMap;

/// A place in [`Slots`]. Places are used again after [`Slots::remove`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Slot(u32);

impl Slot {
    /// The smallest place.
    pub(crate) const FIRST: Self = Self(0);
}

/// The list.
#[derive(Clone, Debug)]
pub(crate) struct Slots<K, T> {
    names: BTreeMap<K, Slot>,
    things: Vec<Option<T>>,
    free: Vec<Slot>,
}

impl<K, T> Default for Slots<K, T> {
    fn default() -> Self {
        Self { names: BTreeMap::new(), things: Vec::new(), free: Vec::new() }
    }
}

impl<K: Copy + Ord, T> Slots<K, T> {
    pub(crate) fn find(&self, name: K) -> Option<Slot> {
        self.names.get(&name).copied()
    }

    pub(crate) fn get(&self, slot: Slot) -> Option<&T> {
        self.things.get(slot.0 as usize)?.as_ref()
    }

    pub(crate) fn get_mut(&mut self, slot: Slot) -> Option<&mut T> {
        self.things.get_mut(slot.0 as usize)?.as_mut()
    }

    /// The place of that name, made where there is none.
    pub(crate) fn find_or_insert(&mut self, name: K, make: impl FnOnce() -> T) -> Slot {
        if let Some(slot) = self.find(name) {
            return slot;
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            self.things.push(None);
            Slot(u32::try_from(self.things.len() - 1).expect("names have 32 bits, so there are not more things"))
        });
        self.things[slot.0 as usize] = Some(make());
        self.names.insert(name, slot);
        slot
    }

    pub(crate) fn remove(&mut self, name: K) -> Option<T> {
        let slot = self.names.remove(&name)?;
        self.free.push(slot);
        self.things[slot.0 as usize].take()
    }

    /// Everything in the order of names.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Slot, &T)> {
        self.names.values().filter_map(|&slot| Some((slot, self.get(slot)?)))
    }

    pub(crate) fn len(&self) -> usize {
        self.names.len()
    }
}
