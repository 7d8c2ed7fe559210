//! The books of kinds: what a device knows of each.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use super::{Captured, KindKey, Template};

/// Most kinds that are known of a device.
pub const KINDS_MAX: usize = 128;

/// What is known of a kind.
pub(super) enum Known {
    /// The last that was captured, and how many others it and those before it were compared with in vain.
    One(Box<Captured>, u32),
    Template(Arc<Template>),
    /// Its programs differ in more than places, or cannot be kept, for this reason.
    Apart(String),
}

impl Known {
    /// Whether what its kernels go with has gone.
    pub(super) fn has_gone(&self) -> bool {
        let origin = match self {
            Self::One(captured, _) => Some(&captured.origin),
            Self::Template(template) => template.origin.as_ref(),
            Self::Apart(_) => None,
        };
        origin.is_some_and(|origin| origin.strong_count() == 0)
    }
}

/// The kinds that are known on a device.
#[derive(Default)]
pub(in crate::cuda) struct Kinds(Mutex<Books>);

#[derive(Default)]
struct Books {
    /// Each with the time of its last use.
    known: HashMap<KindKey, (Known, u64)>,
    /// Counts uses.
    now: u64,
}

impl Kinds {
    /// Does something with what is known of a kind, which is the one used last then.
    pub(super) fn with<T>(&self, key: &KindKey, work: impl FnOnce(Option<&mut Known>) -> T) -> T {
        let Books { known, now } = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *now += 1;
        work(known.get_mut(key).map(|(known, last)| {
            *last = *now;
            known
        }))
    }

    /// Takes out what is known of a kind if it is so.
    pub(super) fn take_if(&self, key: &KindKey, is_so: impl FnOnce(&Known) -> bool) -> Option<Known> {
        let known = &mut self.0.lock().unwrap_or_else(PoisonError::into_inner).known;
        let (found, _) = known.get(key)?;
        if is_so(found) { known.remove(key).map(|(known, _)| known) } else { None }
    }

    /// Keeps what is known; where there is no room, the kind that was used the longest time ago goes.
    pub(super) fn keep(&self, key: KindKey, next: Known) {
        let Books { known, now } = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *now += 1;
        if known.len() >= KINDS_MAX && !known.contains_key(&key) {
            let oldest = known.iter().min_by_key(|(_, (_, last))| *last).map(|(key, _)| *key);
            oldest.map(|oldest| known.remove(&oldest));
        }
        known.insert(key, (next, *now));
    }
}

#[cfg(test)]
mod tests {
    use super::{super::alike::WORD, *};

    #[test]
    fn the_kind_that_was_used_the_longest_time_ago_goes() {
        let kinds = Kinds::default();
        let key = |number: usize| {
            let mut key = KindKey::default();
            key[..WORD].copy_from_slice(&number.to_ne_bytes());
            key
        };
        for number in 0..KINDS_MAX {
            kinds.keep(key(number), Known::Apart(String::new()));
        }
        kinds.with(&key(0), |known| assert!(known.is_some()));
        kinds.keep(key(KINDS_MAX), Known::Apart(String::new()));
        let is_known = |number| kinds.with(&key(number), |known| known.is_some());
        assert!(is_known(0) && !is_known(1) && is_known(KINDS_MAX));
        assert_eq!(kinds.0.lock().expect("nobody panicked").known.len(), KINDS_MAX);
    }
}
