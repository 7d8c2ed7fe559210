//! Which waiting requests join one that is about to start: those for the same model, of the same form, whose functions allow it.
//!
//! Nothing waits in order to be joined: what has queued up behind busy lanes goes together. A run is made longer only as far
//! as the most urgent of its requests allows, and the most urgent of other functions that could still be in time. Requests of
//! other functions join where they have identical weights; each still counts for its own function.

use super::predict::Prediction;
use crate::{
    books::Books,
    device::Device,
    event::RequestKey,
    limits::LOOKED_AT_MAX,
    ready::{Tier, Waiting},
    slots::Slot,
    time::{At, Span},
};

/// The requests that join, and when all will have ended.
pub(crate) struct Joined {
    pub(crate) with: Vec<RequestKey>,
    pub(crate) ends: At,
}

/// A request that could join, and its function.
struct Candidate {
    waiting: Waiting,
    slot: Slot,
}

/// Who joins this request, which starts now, as predicted.
pub(crate) fn joined(books: &mut Books, slot: Slot, tier: Tier, waiting: Waiting, best: &Prediction) -> Joined {
    let alone = Joined { with: Vec::new(), ends: best.ends };
    if !best.resident {
        return alone;
    }
    let Some(function) = books.functions.get(slot) else { return alone };
    let model = function.model;
    let candidates = candidates(books, slot, tier, waiting);
    if candidates.is_empty() {
        return alone;
    }
    // What is late already is not made later by going together.
    let own = if tier < Tier::Late && best.ends <= waiting.deadline { waiting.deadline } else { At::NEVER };
    let mut until = own.min(others_start(books, slot, &candidates, best));
    let now = books.now;
    let Some(home) = books.models.get(model).and_then(|known| known.home(best.device)) else { return alone };
    let (size, whole) = loop {
        let (size, whole) = home.cost.batches.best(home.cost.run(), candidates.len() + 1, best.unslowed(until - now));
        // Functions whose requests are left out count as all others do.
        let left = candidates[size - 1..].iter().filter(|left| left.slot != slot);
        let starts = left.filter_map(|left| latest_start(books, left.slot)).filter(|start| *start >= best.ends);
        match starts.min().filter(|_| size > 1 && lanes_are_short(books, best)) {
            Some(start) if start < now + best.slowed(whole) => until = start,
            Some(_) | None => break (size, whole),
        }
    };
    if let Some(home) = books.models.get_mut(model).and_then(|known| known.home_mut(best.device)) {
        home.cost.batches.chosen(size);
    }
    let with: Vec<_> = candidates[..size - 1].iter().map(|candidate| candidate.waiting.request).collect();
    if with.is_empty() { alone } else { Joined { with, ends: now + best.slowed(whole) } }
}

/// Requests that could join, none more urgent than the one that starts, most urgent first; as many as its function allows.
fn candidates(books: &Books, slot: Slot, tier: Tier, waiting: Waiting) -> Vec<Candidate> {
    let (Some(form), Some(function)) = (waiting.form, books.functions.get(slot)) else { return Vec::new() };
    let most = function.batch.most(books.now);
    if most < 2 {
        return Vec::new();
    }
    let fits = |other: &&Waiting| {
        other.form == Some(form) && other.request != waiting.request && other.deadline >= waiting.deadline
    };
    let own = function.queue(tier).iter().filter(fits).take(most - 1);
    let mut found: Vec<_> = own.map(|&waiting| Candidate { waiting, slot }).collect();
    let waits_for_model = books.models.get(function.model).map_or(0, |known| known.waiting);
    if usize::try_from(waits_for_model).unwrap_or(usize::MAX) > function.waiting_len() {
        let listed = books.ready.in_tiers(Tier::High..Tier::End).take(LOOKED_AT_MAX);
        for ((tier, _), slot) in listed.filter(|(_, other)| *other != slot) {
            let Some(other) = books.functions.get(slot) else { continue };
            if other.model == function.model && other.batch.most(books.now) >= most {
                let theirs = other.queue(tier).iter().filter(fits).take(most - 1);
                found.extend(theirs.map(|&waiting| Candidate { waiting, slot }));
            }
        }
        found.sort_unstable_by_key(|candidate| (candidate.waiting.deadline, candidate.waiting.request));
        found.truncate(most - 1);
    }
    found
}

/// When the first of those that do not join must start: what would be in time behind a run of one shall be so behind a
/// longer one.
fn others_start(books: &Books, slot: Slot, candidates: &[Candidate], best: &Prediction) -> At {
    if !lanes_are_short(books, best) {
        return At::NEVER;
    }
    let head = |other: Slot| books.functions.get(other).and_then(|function| function.fresh.front());
    let joins = |other| other == slot || candidates.iter().any(|candidate| Some(&candidate.waiting) == head(other));
    let others = books.ready.in_tiers(Tier::High..Tier::Late).take(LOOKED_AT_MAX).filter(|(_, other)| !joins(*other));
    let latest_starts = others.filter_map(|(_, other)| latest_start(books, other)).filter(|start| *start >= best.ends);
    latest_starts.min().unwrap_or(At::NEVER)
}

/// Whether who does not join has to wait for this run.
fn lanes_are_short(books: &Books, best: &Prediction) -> bool {
    let lanes_left = |on: &Device| on.lanes.len().saturating_sub(on.busy);
    books.devices.get(best.device).is_none_or(|on| lanes_left(on) <= 1)
}

/// When a function's most urgent request must start to be in time.
fn latest_start(books: &Books, slot: Slot) -> Option<At> {
    let function = books.functions.get(slot)?;
    Some(function.fresh.front()?.deadline - books.models.get(function.model)?.run())
}

impl Prediction {
    /// What a span of work takes here and now, beside others and at this clock.
    fn slowed(&self, span: Span) -> Span {
        span.permille(self.slowed_permille())
    }

    /// How much work that span holds.
    fn unslowed(&self, span: Span) -> Span {
        span / self.slowed_permille().max(1) * 1000
    }
}
