//! Chance, for comparison: any request, any idle device.

use super::{Policy, Trigger, published};
use crate::{
    books::Books,
    event::{Action, Source},
    eviction::Random,
    slots::Slot,
    time::At,
};

/// The policy.
#[derive(Clone, Debug)]
pub(crate) struct Chance {
    random: Random,
    candidates: Vec<Slot>,
}

impl Chance {
    pub(crate) const fn new(seed: u64) -> Self {
        Self { random: Random::new(seed), candidates: Vec::new() }
    }

    fn place(&mut self, books: &Books, model: Slot) -> Option<(usize, Option<Source>)> {
        let known = books.models.get(model)?;
        let holds = |device: usize| known.stay(device).is_some_and(|stay| !stay.doomed);
        let able = |device: usize| holds(device) || books.can_bring(model, device);
        let idle = books.homes(known).filter(|(_, device)| device.busy == 0).map(|(home, _)| home.device);
        let idle: Vec<_> = idle.filter(|device| able(*device)).collect();
        let device = *idle.get(self.random.below(idle.len()))?;
        Some((device, (!holds(device)).then_some(Source::Host)))
    }
}

impl Policy for Chance {
    fn fill(&mut self, books: &mut Books, _: Trigger, actions: &mut Vec<Action>) -> At {
        if books.ready.waiting_len() == 0 || !published::any_idle(books) {
            return At::NEVER;
        }
        let mut candidates = std::mem::take(&mut self.candidates);
        candidates.clear();
        candidates.extend(books.ready.ranks.iter().map(|(_, slot)| *slot));
        while published::any_idle(books) && !candidates.is_empty() {
            let slot = candidates.swap_remove(self.random.below(candidates.len()));
            published::start_one(books, slot, |books, model| self.place(books, model), actions);
        }
        self.candidates = candidates;
        At::NEVER
    }
}
