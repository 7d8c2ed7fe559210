//! The published policy, for comparison: one run per device at a time, its Algorithm 1, and its queues.
//!
//! Placement: run where the model is and the device is idle; else copy it from a device that has it to an idle one, over
//! the fastest link; else from the host to an idle device whose neighbour on the switch copies nothing, else a light
//! model, else any. Order: functions whose weighted deficit is within reach come first (largest first), the others after
//! them (smallest first); the cut moves with the share of compliant functions.

use std::collections::BTreeSet;

use super::{Policy, Trigger};
use crate::{
    books::Books,
    event::{Action, Source},
    eviction::is_light,
    model::Model,
    slots::Slot,
    time::{At, Span},
};

/// How often the classes are made anew.
const UPDATE_EVERY: Span = Span::secs(2);
/// Updates between two looks at the share of compliant functions.
const UPDATES_PER_LOOK: u32 = 20;
/// The change of that share, in thousandths, that counts.
const CHANGE_PERMILLE: i64 = 40;
/// Alpha in thousandths.
const ALPHA_ONE: i64 = 1000;

/// The order of functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// By required requests, in two classes.
    Required,
    /// By arrival.
    Arrival,
}

/// The policy.
#[derive(Clone, Debug)]
pub(crate) struct Published {
    order: Order,
    alpha_permille: i64,
    update_at: At,
    updates: u32,
    anchor_permille: i64,
    low: BTreeSet<Slot>,
    candidates: Vec<(bool, i64, Slot)>,
}

impl Published {
    pub(crate) fn new(order: Order) -> Self {
        Self {
            order,
            alpha_permille: ALPHA_ONE,
            update_at: At::START,
            updates: 0,
            anchor_permille: 1000,
            low: BTreeSet::new(),
            candidates: Vec::new(),
        }
    }

    fn update(&mut self, books: &Books) {
        if self.order == Order::Arrival || books.now < self.update_at {
            return;
        }
        self.update_at = books.now + UPDATE_EVERY;
        self.updates += 1;
        if self.updates.is_multiple_of(UPDATES_PER_LOOK) {
            self.move_alpha(books);
        }
        let mut needs: Vec<_> = books.functions.iter().map(|(slot, _)| (boundary(books, slot), slot)).collect();
        needs.sort_unstable();
        let total: i64 = needs.iter().map(|need| need.0.max(0)).sum();
        let reach = total / ALPHA_ONE * self.alpha_permille;
        let mut sum = 0_i64;
        self.low.clear();
        for (need, slot) in needs {
            sum = sum.saturating_add(need.max(0));
            if need > 0 && sum > reach {
                self.low.insert(slot);
            }
        }
    }

    fn move_alpha(&mut self, books: &Books) {
        let count = i64::try_from(books.functions.len()).unwrap_or(i64::MAX).max(1);
        let met = books.functions.iter().filter(|(_, function)| function.objective.is_met_in_lifetime()).count();
        let share = i64::try_from(met).unwrap_or(0) * 1000 / count;
        self.alpha_permille = match share - self.anchor_permille {
            up if up >= CHANGE_PERMILLE => (self.alpha_permille * 2).min(ALPHA_ONE),
            down if down < -CHANGE_PERMILLE => (self.alpha_permille / 2).max(1),
            _ => (self.alpha_permille * 101 / 100 + 1).min(ALPHA_ONE),
        };
        self.anchor_permille = share;
    }

    fn sort_candidates(&mut self, books: &Books) {
        self.candidates.clear();
        for (_, slot) in &books.ready.ranks {
            let Some(function) = books.functions.get(*slot).filter(|function| function.in_flight == 0) else {
                continue;
            };
            let low = self.low.contains(slot);
            let key = match self.order {
                Order::Required if low => weighted(books, *slot),
                Order::Required => -weighted(books, *slot),
                Order::Arrival => function
                    .fresh
                    .front()
                    .map_or(i64::MAX, |head| i64::try_from(head.arrived.nanos()).unwrap_or(i64::MAX)),
            };
            self.candidates.push((low, key, *slot));
        }
        self.candidates.sort_unstable();
    }
}

/// `mean latency * (p n - m)`, in milliseconds and thousandths of requests.
fn weighted(books: &Books, slot: Slot) -> i64 {
    let Some(function) = books.functions.get(slot) else { return 0 };
    let latency_us =
        i64::try_from(function.latency.nanos() / 1_000).unwrap_or(i64::MAX / 1_000_000_000).min(60_000_000);
    function.objective.lifetime_deficit_permille().saturating_mul(latency_us) / 1_000
}

/// The same over `1 - p`: what the classes are cut by.
fn boundary(books: &Books, slot: Slot) -> i64 {
    let tail = books.functions.get(slot).map_or(1, |function| function.objective.tail());
    weighted(books, slot).saturating_mul(100) / tail.max(1)
}

impl Policy for Published {
    fn fill(&mut self, books: &mut Books, _: Trigger, actions: &mut Vec<Action>) -> At {
        self.update(books);
        if books.ready.waiting_len() == 0 || !any_idle(books) {
            return At::NEVER;
        }
        self.sort_candidates(books);
        let candidates = std::mem::take(&mut self.candidates);
        for &(_, _, slot) in &candidates {
            if !any_idle(books) {
                break;
            }
            start_one(books, slot, algorithm_1, actions);
        }
        self.candidates = candidates;
        At::NEVER
    }
}

pub(super) fn any_idle(books: &Books) -> bool {
    books.devices.iter().any(|device| !device.lost && device.busy == 0)
}

/// Starts a function's next request where `place` says.
pub(super) fn start_one(
    books: &mut Books,
    slot: Slot,
    place: impl FnOnce(&Books, Slot) -> Option<(usize, Option<Source>)>,
    actions: &mut Vec<Action>,
) {
    let Some(function) = books.functions.get(slot) else { return };
    let (model, Some(head)) = (function.model, function.fresh.front().copied()) else { return };
    let Some((device, source)) = place(books, model) else { return };
    if let Some(source) = source
        && !books.bring(model, (device, source), head.deadline, actions)
    {
        return;
    }
    let ready_at = books.models.get(model).and_then(|known| known.stay(device)).map(|stay| stay.ready_at(books.now));
    let run = books.models.get(model).map(Model::run).unwrap_or_default();
    let ends = (books.now + run).max(ready_at.unwrap_or(books.now));
    books.start(head.request, Vec::new(), (device, ends), actions);
}

/// Where a model runs next among idle devices, and what it is copied from.
fn algorithm_1(books: &Books, model: Slot) -> Option<(usize, Option<Source>)> {
    let known = books.models.get(model)?;
    let idle: Vec<_> = books.homes(known).filter(|(_, device)| device.busy == 0).map(|(home, _)| home.device).collect();
    let holds = |device: usize| known.stay(device).is_some_and(|stay| !stay.doomed);
    if let Some(device) = idle.iter().copied().find(|device| holds(*device)) {
        return Some((device, None));
    }
    let able = || idle.iter().copied().filter(|device| books.can_bring(model, *device));
    let pairs = able().flat_map(|to| {
        let resident = known.stays.iter().filter(|stay| stay.ready_at(books.now) == books.now && !stay.doomed);
        resident.filter_map(move |stay| Some((books.links.peer_speed(books.now, stay.device, to)?, stay.device, to)))
    });
    if let Some((_, from, to)) = pairs.max_by_key(|(speed, from, to)| (*speed, std::cmp::Reverse((*from, *to)))) {
        return Some((to, Some(Source::Peer(books.devices.get(from)?.id))));
    }
    let to = able().min_by_key(|device| (neighbour(books, *device), *device))?;
    Some((to, Some(Source::Host)))
}

/// What the neighbours on the switch do: nothing, copy light models, copy heavy ones.
fn neighbour(books: &Books, device: usize) -> u8 {
    let neighbours = (0..books.devices.len()).filter(|other| books.links.share(device, *other));
    let loads = neighbours.flat_map(|other| books.devices[other].copies.iter().map(move |copy| (other, copy)));
    let from_host = loads.filter(|(_, (_, source))| *source == Source::Host);
    let weight = from_host.filter_map(|(other, (model, _))| {
        let home = books.models.get(*model)?.home(other)?;
        Some(if is_light(home, books.links.alone(other, home.cost.weights)) { 1 } else { 2 })
    });
    weight.max().unwrap_or(0)
}
