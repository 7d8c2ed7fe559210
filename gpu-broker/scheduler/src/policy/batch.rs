//! Which waiting requests of a function join one that is about to start.
//!
//! Nothing waits in order to be joined: what has queued up behind busy lanes goes together. A run is made longer only as far
//! as the most urgent of its requests allows, and the most urgent of other functions that could still be in time.

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

/// Who joins this request, which starts now, as predicted.
pub(crate) fn joined(books: &mut Books, slot: Slot, tier: Tier, waiting: Waiting, best: &Prediction) -> Joined {
    let alone = Joined { with: Vec::new(), ends: best.ends };
    let (Some(form), true) = (waiting.form, best.resident) else { return alone };
    let Some(function) = books.functions.get(slot) else { return alone };
    let most = function.batch.most(books.now);
    if most < 2 {
        return alone;
    }
    let fits = |other: &&Waiting| other.form == Some(form) && other.request != waiting.request;
    let behind = function.queue(tier).iter().filter(|other| other.deadline >= waiting.deadline).filter(fits);
    let mut with: Vec<_> = behind.take(most - 1).map(|other| other.request).collect();
    if with.is_empty() {
        return alone;
    }
    let model = function.model;
    let until = latest_end(books, slot, tier, waiting, best);
    let now = books.now;
    let Some(home) = books.models.get_mut(model).and_then(|known| known.home_mut(best.device)) else { return alone };
    let room = best.unslowed(until - now);
    let (size, whole) = home.cost.batches.best(home.cost.run(), with.len() + 1, room);
    home.cost.batches.chosen(size);
    with.truncate(size - 1);
    if with.is_empty() { alone } else { Joined { with, ends: now + best.slowed(whole) } }
}

/// By when a run of several must have ended.
fn latest_end(books: &Books, slot: Slot, tier: Tier, waiting: Waiting, best: &Prediction) -> At {
    // What is late already is not made later by going together.
    let own = if tier < Tier::Late && best.ends <= waiting.deadline { waiting.deadline } else { At::NEVER };
    let lanes_left = |on: &Device| on.lanes.len().saturating_sub(on.busy);
    if books.devices.get(best.device).is_some_and(|on| lanes_left(on) > 1) {
        return own;
    }
    // Those that would be in time behind a run of one shall be so behind a longer one.
    let others = books.ready.in_tiers(Tier::High..Tier::Late).take(LOOKED_AT_MAX).filter(|(_, other)| *other != slot);
    let latest_starts = others.filter_map(|(_, other)| latest_start(books, other)).filter(|start| *start >= best.ends);
    own.min(latest_starts.min().unwrap_or(At::NEVER))
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
