//! Memory: bringing weights, making room, letting go.

use faaswap_protocol::Bytes;

use super::{Books, add, subtract};
use crate::{
    event::{Action, Source},
    limits::RESIDENCY_MIN,
    links::Copy,
    model::{Stay, StayId, Weights},
    slots::Slot,
    time::{At, Span},
};

/// Most models that leave for one that comes.
const VICTIMS_MAX: usize = 4096;

impl Books {
    /// Whether the weights could be brought there now, whatever would have to leave.
    pub(crate) fn can_bring(&self, model: Slot, device: usize) -> bool {
        let (Some(known), Some(on)) = (self.models.get(model), self.devices.get(device)) else { return false };
        let home = known.home(device).filter(|home| home.may_come(self.now));
        !on.lost && !known.removed && known.stay(device).is_none() && home.is_some_and(|h| on.can_make_room(h.charge))
    }

    /// Brings weights to a device, after others have left where that is needed. `false`: there is no room.
    ///
    /// `need_by` is when they must be there; copies on shared paths are expected so much later.
    pub(crate) fn bring(
        &mut self,
        model: Slot,
        (device, source): (usize, Source),
        need_by: At,
        actions: &mut Vec<Action>,
    ) -> bool {
        if !self.can_bring(model, device) {
            return false;
        }
        let Some((id, charge, weights)) = self
            .models
            .get(model)
            .and_then(|known| known.home(device).map(|home| (known.id, home.charge, home.cost.weights)))
        else {
            return false;
        };
        let copy = self.copy(device, source, weights);
        // The source first: what others read from does not leave, not even for this.
        let Some((source, lender)) = self.lend(model, source) else { return false };
        if !self.make_room(device, charge, actions) {
            self.give_back(model, lender);
            return false;
        }
        let expected = self.now + copy.whole();
        let contended = self.delay_sharers(device, source, copy.contention);
        let stay = Stay {
            id: StayId(self.stays_made),
            device,
            weights: Weights::Coming { expected, source, need_by, contended },
            charge,
            in_flight: 0,
            lent: 0,
            asked: self.now,
            last_used: self.now,
            kept_until: At::START,
            doomed: false,
            listed: None,
        };
        self.stays_made += 1;
        if let Some(known) = self.models.get_mut(model) {
            known.stays.push(stay);
        }
        if let Some(on) = self.devices.get_mut(device) {
            add(&mut on.charged, charge);
            add(&mut on.pinned, charge);
            on.copies.push_back((model, source));
            actions.push(Action::SwapIn { model: id, device: on.id, source });
        }
        self.links.occupy(device, expected);
        self.settle_all(model);
        true
    }

    /// A copy that would be asked for now.
    pub(crate) fn copy(&self, device: usize, source: Source, weights: Bytes) -> Copy {
        let from_host = || self.links.host_copy(self.now, device, weights, |other| self.copies_from_host(other));
        match source {
            Source::Host => from_host(),
            Source::Peer(from) => match self.place(from) {
                Some(from) => self.links.peer_copy(self.now, from, device, weights).unwrap_or_else(from_host),
                None => from_host(),
            },
        }
    }

    fn lend(&mut self, model: Slot, source: Source) -> Option<(Source, Option<usize>)> {
        let Source::Peer(from) = source else { return Some((Source::Host, None)) };
        let from = self.place(from)?;
        let stay = self.models.get_mut(model)?.stay_mut(from)?;
        (stay.weights == Weights::Resident && !stay.doomed).then(|| stay.lent += 1)?;
        self.settle(model, from);
        Some((source, Some(from)))
    }

    pub(crate) fn give_back(&mut self, model: Slot, lender: Option<usize>) {
        let Some(from) = lender else { return };
        if let Some(stay) = self.models.get_mut(model).and_then(|known| known.stay_mut(from)) {
            stay.lent = stay.lent.saturating_sub(1);
        }
        self.settle(model, from);
    }

    /// Puts off the expected ends of copies that share a path with a new one, and marks them: their times will say
    /// nothing about the path alone. Both sides lose the same time.
    fn delay_sharers(&mut self, device: usize, source: Source, delay: Span) -> bool {
        let mut any = false;
        for other in (0..self.devices.len()).filter(|_| source == Source::Host) {
            if !self.links.share(device, other) || !self.copies_from_host(other) {
                continue;
            }
            any = true;
            for at in 0..self.devices[other].copies.len() {
                let (model, _) = self.devices[other].copies[at];
                let stay = self.models.get_mut(model).and_then(|known| known.stay_mut(other));
                if let Some(Weights::Coming { expected, contended, .. }) = stay.map(|stay| &mut stay.weights) {
                    *contended = true;
                    *expected = *expected + delay;
                }
            }
            let until = self.links.free_at(other) + delay;
            self.links.occupy(other, until);
        }
        any
    }

    /// What a copy of that contention would make late on shared paths: the copies that would be in vain.
    pub(crate) fn spoils(&self, device: usize, contention: Span) -> Span {
        let mut spoilt = Span::ZERO;
        for &other in self.links.sharers(device) {
            let Some((model, Source::Host)) = self.devices.get(other).and_then(|on| on.copies.front()) else {
                continue;
            };
            let stay = self.models.get(*model).and_then(|known| known.stay(other));
            if let Some(stay) = stay
                && let Weights::Coming { expected, need_by, .. } = stay.weights
                && expected <= need_by
                && expected + contention > need_by
            {
                spoilt += expected - stay.asked;
            }
        }
        spoilt
    }

    /// Evicts until this fits; `false` where it cannot.
    ///
    /// What came only just now leaves when nothing else will do. What others took of the memory is made up for by
    /// evicting more, as far as that goes.
    fn make_room(&mut self, device: usize, charge: Bytes, actions: &mut Vec<Action>) -> bool {
        let Some(on) = self.devices.get(device) else { return false };
        if !on.can_make_room(charge) {
            return false;
        }
        let wanted = charge.checked_add(on.foreign).unwrap_or(charge);
        for spare_the_young in [true, false] {
            for _ in 0..VICTIMS_MAX {
                let Some(on) = self.devices.get(device) else { return false };
                let enough = if spare_the_young { wanted } else { charge };
                if on.free() >= enough {
                    break;
                }
                let mut leaving = on.leaving.iter().map(|(_, model)| *model);
                let victim = leaving.find(|model| !spare_the_young || self.may_leave(*model, device));
                let Some(victim) = victim else { break };
                self.let_go(victim, device, actions);
            }
        }
        self.devices.get(device).is_some_and(|on| on.free() >= charge)
    }

    fn may_leave(&self, model: Slot, device: usize) -> bool {
        let stay = self.models.get(model).and_then(|known| known.stay(device));
        let waited_for = self.models.get(model).is_some_and(|known| known.waiting > 0 && known.copies() < 2);
        stay.is_some_and(|stay| self.now - stay.asked >= RESIDENCY_MIN && stay.kept_until <= self.now) && !waited_for
    }

    /// Swaps out what can leave.
    pub(crate) fn let_go(&mut self, model: Slot, device: usize, actions: &mut Vec<Action>) {
        let Some(known) = self.models.get_mut(model) else { return };
        let Some(at) = known.stays.iter().position(|stay| stay.device == device && stay.can_leave()) else { return };
        let (stay, id) = (known.stays.swap_remove(at), known.id);
        if let Some(home) = known.home_mut(device) {
            home.leaving = true;
        }
        if let Some(on) = self.devices.get_mut(device) {
            subtract(&mut on.charged, stay.charge);
            if let Some(worth) = stay.listed {
                on.leaving.remove(&(worth, model));
            }
            actions.push(Action::SwapOut { model: id, device: on.id });
        }
        self.settle_all(model);
        self.forget_model_if_gone(model);
    }

    /// Removes a stay whatever its state: the copy failed, or the device is gone.
    pub(crate) fn drop_stay(&mut self, model: Slot, device: usize) {
        let Some(known) = self.models.get_mut(model) else { return };
        let Some(at) = known.stays.iter().position(|stay| stay.device == device) else { return };
        let stay = known.stays.swap_remove(at);
        if let Some(on) = self.devices.get_mut(device) {
            subtract(&mut on.charged, stay.charge);
            match stay.listed {
                Some(worth) => drop(on.leaving.remove(&(worth, model))),
                None => subtract(&mut on.pinned, stay.charge),
            }
        }
        self.settle_all(model);
        self.forget_model_if_gone(model);
    }

    /// Lets a removed model go where it can.
    pub(crate) fn let_go_if_doomed(&mut self, model: Slot, device: usize, actions: &mut Vec<Action>) {
        let stay = self.models.get(model).and_then(|known| known.stay(device));
        if stay.is_some_and(|stay| stay.doomed && stay.can_leave()) {
            self.let_go(model, device, actions);
        }
    }

    /// Brings the eviction order up to date with a stay.
    pub(crate) fn settle(&mut self, model: Slot, device: usize) {
        let Some(known) = self.models.get_mut(model) else { return };
        let Some(on) = self.devices.get_mut(device) else { return };
        let Some(at) = known.stays.iter().position(|stay| stay.device == device) else { return };
        let stay = &known.stays[at];
        let worth = match known.home(device) {
            Some(home) if stay.can_leave() => {
                let copy = self.links.alone(device, home.cost.weights);
                Some(self.eviction.worth(known, home, stay, copy))
            }
            Some(_) | None => None,
        };
        let stay = &mut known.stays[at];
        match (stay.listed, worth) {
            (Some(old), Some(new)) if old == new => return,
            (Some(old), Some(_)) => drop(on.leaving.remove(&(old, model))),
            (Some(old), None) => {
                on.leaving.remove(&(old, model));
                add(&mut on.pinned, stay.charge);
            }
            (None, Some(_)) => subtract(&mut on.pinned, stay.charge),
            (None, None) => return,
        }
        stay.listed = worth;
        if let Some(worth) = worth {
            on.leaving.insert((worth, model));
        }
    }

    /// The same for all stays of a model: it was asked for, or got or lost a copy.
    pub(crate) fn settle_all(&mut self, model: Slot) {
        for at in 0..self.models.get(model).map_or(0, |known| known.stays.len()) {
            if let Some(device) = self.models.get(model).and_then(|known| Some(known.stays.get(at)?.device)) {
                self.settle(model, device);
            }
        }
    }

    /// A removed model is forgotten with its last stay and function.
    pub(crate) fn forget_model_if_gone(&mut self, model: Slot) {
        let gone = |known: &crate::model::Model| known.removed && known.stays.is_empty() && known.functions == 0;
        let Some(known) = self.models.get(model).filter(|known| gone(known)) else { return };
        let (id, foreseen) = (known.id, known.foreseen);
        if let Some(at) = foreseen {
            self.calendar.remove(&(at, model));
        }
        self.models.remove(id);
    }
}
