//! Brings models whose next request is foreseen, while nobody needs the link or the memory.
//!
//! A request is foreseen by a hint, or by the rhythm of those before. Such a copy starts only when nothing waits and no
//! copy is under way, one at a time, and never takes the place of what would be missed about as much.

use std::collections::VecDeque;

use crate::{
    books::Books,
    decision::{Choice, Decision, Score},
    event::{Action, Source},
    limits::{AHEAD_MAX, EXPECTED_FOR},
    model::{Home, Weights},
    slots::Slot,
    time::{At, Span},
};

/// Hints that wait; an older one is forgotten for a newer one.
const HINTS_MAX: usize = 64;
/// How much earlier than needed a copy begins.
const EARLY: Span = Span::millis(5);
/// A copy longer than this leaves another device's link free for what may come meanwhile.
const LONG: Span = Span::millis(10);
/// What has to leave may cost so much of what is gained, in thousandths: both are delays, as far as they are expected while
/// the foreseen model is kept.
const COST_MAX_PERMILLE: u64 = 500;

/// What is foreseen.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ahead {
    hints: VecDeque<Slot>,
    /// Copies of this kind under way.
    under_way: Vec<(Slot, usize)>,
}

impl Ahead {
    /// A request for this model is about to come.
    pub(crate) fn expect(&mut self, model: Slot) {
        if !self.hints.contains(&model) {
            if self.hints.len() >= HINTS_MAX {
                self.hints.pop_front();
            }
            self.hints.push_back(model);
        }
    }

    /// Enters the model's next request into the calendar, where its requests have a rhythm.
    pub(crate) fn foresee(&self, books: &mut Books, model: Slot) {
        let Some(known) = books.models.get_mut(model) else { return };
        let Some((next, spread)) = known.demand.next() else { return };
        let copy = known.homes.iter().map(|home| books.links.alone(home.device, home.cost.weights)).max();
        let begin = next - spread * 2 - copy.unwrap_or_default() - EARLY;
        if begin <= books.now {
            return;
        }
        if let Some(old) = known.foreseen.replace(begin) {
            books.calendar.remove(&(old, model));
        }
        books.calendar.insert((begin, model));
    }

    /// Brings one model if the moment is good; gives when to look again.
    pub(crate) fn look(&mut self, books: &mut Books, actions: &mut Vec<Action>) -> At {
        if !books.config.ahead {
            return At::NEVER;
        }
        self.under_way.retain(|(model, device)| {
            let stay = books.models.get(*model).and_then(|known| known.stay(*device));
            stay.is_some_and(|stay| matches!(stay.weights, Weights::Coming { .. }))
        });
        if self.under_way.len() >= AHEAD_MAX as usize {
            return At::NEVER;
        }
        while let Some(model) = self.hints.pop_front() {
            if self.bring(books, model, actions) {
                return At::NEVER;
            }
        }
        while let Some(&(begin, model)) = books.calendar.first() {
            if begin > books.now {
                return begin;
            }
            books.calendar.remove(&(begin, model));
            if let Some(known) = books.models.get_mut(model) {
                known.foreseen = None;
            }
            if self.bring(books, model, actions) {
                return At::NEVER;
            }
        }
        At::NEVER
    }

    fn bring(&mut self, books: &mut Books, model: Slot, actions: &mut Vec<Action>) -> bool {
        let Some(device) = place(books, model) else { return false };
        let Some(home) = books.models.get(model).and_then(|known| known.home(device)) else { return false };
        let copy = books.links.alone(device, home.cost.weights);
        let id = books.models.get(model).map(|known| known.id);
        if !books.bring(model, (device, Source::Host), At::NEVER, actions) {
            return false;
        }
        let until = books.now + copy + EXPECTED_FOR;
        if let Some(stay) = books.models.get_mut(model).and_then(|known| known.stay_mut(device)) {
            stay.kept_until = until;
        }
        if let (Some(model), Some(on)) = (id, books.devices.get(device).map(|on| on.id)) {
            let score = Score { copy: copy.into(), total: copy.into(), ..Score::default() };
            books.decisions.add(Decision {
                at: books.now.into(),
                choice: Choice::BringAhead,
                request: None,
                function: None,
                model,
                device: Some(on),
                source: Some(Source::Host),
                left: EXPECTED_FOR.into(),
                score,
                compared: 1,
            });
        }
        self.under_way.push((model, device));
        true
    }
}

/// Where a foreseen model may be brought without anybody noticing.
fn place(books: &Books, model: Slot) -> Option<usize> {
    let known = books.models.get(model).filter(|known| known.stays.is_empty())?;
    let idle = |device: usize| books.devices.get(device).is_some_and(|on| !on.lost && on.copies.is_empty());
    let quiet = (0..books.devices.len()).all(|other| idle(other) || books.devices[other].lost);
    let spared = books.devices.iter().filter(|device| !device.lost).count() > 1;
    let homes = books.homes(known).filter(|(home, device)| {
        let copy = books.links.alone(home.device, home.cost.weights);
        let in_nobodys_way = copy <= LONG || (spared && copy * 2 <= tightest_deadline(books));
        quiet && in_nobodys_way && books.can_bring(model, home.device) && {
            let bearable = delay(books, home).permille(COST_MAX_PERMILLE);
            device.free() >= home.charge || victims_delay(books, home.device, home.charge.get()) < bearable
        }
    });
    homes.max_by_key(|(home, device)| (device.free(), std::cmp::Reverse(home.device))).map(|(home, _)| home.device)
}

/// The tightest deadline of all functions: whoever comes during a copy that takes half of it is still in time.
fn tightest_deadline(books: &Books) -> Span {
    books.functions.iter().map(|(_, function)| function.deadline).min().unwrap_or_default()
}

/// What a request waits for its weights beyond its run, where these are not there.
fn delay(books: &Books, home: &Home) -> Span {
    books.links.alone(home.device, home.cost.weights) - home.cost.run() + home.cost.tail()
}

/// How much requests for what would have to leave are expected to wait in all, while the foreseen model is kept.
fn victims_delay(books: &Books, device: usize, charge: u64) -> Span {
    let never = Span::secs(u64::MAX);
    let Some(on) = books.devices.get(device) else { return never };
    let (mut free, mut waits) = (on.free().get(), Span::ZERO);
    for (_, victim) in &on.leaving {
        if free >= charge {
            break;
        }
        let Some(known) = books.models.get(*victim) else { continue };
        let (Some(stay), Some(home)) = (known.stay(device), known.home(device)) else { continue };
        if stay.kept_until > books.now {
            return never;
        }
        free = free.saturating_add(stay.charge.get());
        waits += delay(books, home).permille(known.demand.permille_in(books.now, EXPECTED_FOR).min(1000));
    }
    waits
}
