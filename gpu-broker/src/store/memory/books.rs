//! Who is in host memory, who has to go for others, and who may not. Books only: files and pages are moved elsewhere.

use std::{collections::HashMap, sync::Arc};

use faaswap_device::HostWeights;
use faaswap_protocol::Bytes;

/// How far an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// A file that an earlier process has left; nobody has mapped it yet.
    Left,
    /// On the way from disk. Charged once there is room.
    Filling { charged: bool },
    /// There.
    Here,
}

/// Weights in host memory, or on the way there.
#[derive(Debug)]
pub(super) struct Entry {
    /// Tells this stay from an earlier or later one of the same weights.
    pub(super) generation: u64,
    pub(super) size: Bytes,
    pub(super) state: State,
    /// Absent for what is left over.
    pub(super) weights: Option<Arc<HostWeights>>,
    /// Swap-ins under way.
    pub(super) copying: usize,
    /// Devices that it is on.
    pub(super) resident: usize,
    pub(super) used_at: u64,
    /// Whether the next swap-in was counted when it had the weights brought beforehand.
    pub(super) counted: bool,
}

/// Who is spared when room is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spare {
    /// What any registered model would miss.
    Registered,
    /// Only what is being copied.
    Copying,
}

/// All entries by what names their content.
#[derive(Debug, Default)]
pub(super) struct Books {
    pub(super) files: HashMap<String, Entry>,
    /// How many registered models have these weights, whether they are in memory or not.
    pub(super) homes: HashMap<String, usize>,
    pub(super) used: u64,
    clock: u64,
}

impl Books {
    /// The next moment; also a number that was not given before.
    pub(super) fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// An entry of one stay.
    pub(super) fn of(&mut self, key: &str, generation: u64) -> Option<&mut Entry> {
        self.files.get_mut(key).filter(|entry| entry.generation == generation)
    }

    /// Whether so much more is within the budget.
    pub(super) fn fits(&self, size: Bytes, budget: Bytes) -> bool {
        self.used.saturating_add(size.get()) <= budget.get()
    }

    /// Takes out the one that is missed least: what no model is registered with, then what is on no device, then what
    /// is on one, which needs host memory only when it is swapped in again; among these the least recently used.
    pub(super) fn take_victim(&mut self, spare: Spare) -> Option<(String, Entry)> {
        let class = |key: &str, entry: &Entry| match (self.homes.contains_key(key), entry.resident) {
            (false, _) => 0,
            (true, 0) => 1,
            (true, _) => 2,
        };
        let may_go = |(key, entry): &(&String, &Entry)| match entry.state {
            State::Filling { .. } => false,
            State::Left | State::Here => entry.copying == 0 && (spare == Spare::Copying || class(key, entry) == 0),
        };
        let goes = self.files.iter().filter(may_go).min_by_key(|(key, entry)| (class(key, entry), entry.used_at));
        let key = goes.map(|(key, _)| key.clone())?;
        self.take(&key).map(|entry| (key, entry))
    }

    /// Takes an entry out and its size back.
    pub(super) fn take(&mut self, key: &str) -> Option<Entry> {
        let entry = self.files.remove(key)?;
        match entry.state {
            State::Left | State::Here | State::Filling { charged: true } => self.used -= entry.size.get(),
            State::Filling { charged: false } => {}
        }
        Some(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn books(entries: &[(&str, State, usize, usize)], registered: &[&str]) -> Books {
        let mut books = Books::default();
        for (key, state, copying, resident) in entries {
            let used_at = books.tick();
            let (size, weights) = (Bytes::new(10), None);
            let entry = Entry {
                generation: used_at,
                size,
                state: *state,
                weights,
                copying: *copying,
                resident: *resident,
                used_at,
                counted: false,
            };
            books.used += 10;
            books.files.insert((*key).to_owned(), entry);
        }
        books.homes = registered.iter().map(|key| ((*key).to_owned(), 1)).collect();
        books
    }

    fn leave(books: &mut Books, spare: Spare) -> Vec<String> {
        std::iter::from_fn(|| books.take_victim(spare).map(|(key, _)| key)).collect()
    }

    #[test]
    fn what_nobody_misses_goes_first_and_what_is_being_copied_never() {
        use State::{Filling, Here, Left};
        let entries = [
            ("resident", Here, 0, 1),
            ("old", Here, 0, 0),
            ("copying", Here, 1, 1),
            ("left", Left, 0, 0),
            ("coming", Filling { charged: true }, 0, 0),
            ("new", Here, 0, 0),
            ("unregistered", Here, 0, 0),
        ];
        let registered = ["resident", "old", "copying", "coming", "new"];
        let mut all = books(&entries, &registered);
        assert_eq!(leave(&mut all, Spare::Copying), ["left", "unregistered", "old", "new", "resident"]);
        assert_eq!(all.used, 20);
        let mut few = books(&entries, &registered);
        assert_eq!(leave(&mut few, Spare::Registered), ["left", "unregistered"]);
    }

    #[test]
    fn what_was_never_charged_is_not_taken_back() {
        let mut books = books(&[("a", State::Here, 0, 0)], &[]);
        let entry = Entry {
            generation: 9,
            size: Bytes::new(100),
            state: State::Filling { charged: false },
            weights: None,
            copying: 1,
            resident: 0,
            used_at: 9,
            counted: false,
        };
        books.files.insert("b".to_owned(), entry);
        assert!(books.of("b", 9).is_some() && books.of("b", 8).is_none());
        assert!(books.take("b").is_some() && books.used == 10);
        assert!(books.fits(Bytes::new(90), Bytes::new(100)) && !books.fits(Bytes::new(91), Bytes::new(100)));
    }
}
