//! Which waiting requests join one that is about to start: of its function, and of others with the same weights.
//!
//! Nothing waits in order to be joined: what has queued up behind busy lanes goes together. A run is made longer only as far
//! as the most urgent of its requests allows, and the most urgent of other functions that could still be in time. It gives
//! what the strictest of its functions takes.

use faaswap_protocol::{Batching, Priority};

use super::predict::Prediction;
use crate::{
    batches::Sharing,
    books::Books,
    device::Device,
    event::RequestKey,
    limits::LOOKED_AT_MAX,
    ready::{Function, Tier, Waiting},
    slots::Slot,
    time::{At, Span},
};

/// The requests that join, and when all will have ended.
pub(crate) struct Joined {
    pub(crate) with: Vec<RequestKey>,
    pub(crate) ends: At,
}

/// Who joins this request of a function, which starts now, as predicted.
pub(crate) fn joined(books: &mut Books, first: (Slot, Tier, Waiting), best: &Prediction) -> Joined {
    let alone = Joined { with: Vec::new(), ends: best.ends };
    let Some(mut company) = company(books, first, best).filter(|company| !company.is_empty()) else { return alone };
    let (slot, tier, waiting) = first;
    let (Some(function), Some(form)) = (books.functions.get(slot), waiting.form) else { return alone };
    let (model, sharing) = (function.model, Sharing { form, batching: function.batch.batching });
    // What is late already is not made later by going together.
    let in_time = |deadline: &At| Class::of(tier) == Class::Fresh && best.ends <= *deadline;
    let rivals = rivals(books, slot, best);
    let now = books.now;
    let room = |size: usize| {
        let with = &company[..size - 1];
        let deadlines = std::iter::once(waiting.deadline).chain(with.iter().map(|other| other.deadline));
        let own = deadlines.filter(in_time).min().unwrap_or(At::NEVER);
        best.unslowed(own.min(latest_end(&rivals, with)) - now)
    };
    let Some(home) = books.models.get_mut(model).and_then(|known| known.home_mut(best.device)) else { return alone };
    let (size, whole) = home.cost.batches.best(home.cost.run(), company.len() + 1, sharing, room);
    home.cost.batches.chosen(size);
    company.truncate(size - 1);
    if company.is_empty() {
        return alone;
    }
    Joined { with: company.into_iter().map(|other| other.request).collect(), ends: now + best.slowed(whole) }
}

/// One that could join.
struct Other {
    request: RequestKey,
    deadline: At,
}

/// Who could join, most urgent first. None is more urgent than the first, or of another class: a run that somebody waits for
/// is not made longer for what nobody waits for, nor one that can be in time for what cannot.
fn company(books: &Books, (slot, tier, waiting): (Slot, Tier, Waiting), best: &Prediction) -> Option<Vec<Other>> {
    let form = waiting.form.filter(|_| best.resident)?;
    let first = books.functions.get(slot)?;
    let most = first.batch.most(books.now);
    if most < 2 {
        return None;
    }
    let model = books.models.get(first.model)?;
    // Requests of functions that want the same bits would keep the others from sizes that round.
    let rounds = first.batch.batching == Batching::On && model.home(best.device)?.cost.batches.rounds(form);
    let mixes = |other: &Function| other.batch.mixes(books.now) && !(rounds && other.batch.batching == Batching::Exact);
    let first_mixes = first.batch.mixes(books.now);
    let may_join = |of: Slot, deadline: At, request: RequestKey| {
        let other = books.functions.get(of).filter(|other| of == slot || (first_mixes && mixes(other)));
        other.is_some_and(|other| class_of(other, deadline, request) == Class::of(tier))
    };
    let from = (form, waiting.deadline, RequestKey(0), Slot::FIRST);
    let behind = model.sharing.range(from..).take_while(|(other, ..)| *other == form).take(LOOKED_AT_MAX);
    let others =
        behind.filter(|(_, deadline, request, of)| *request != waiting.request && may_join(*of, *deadline, *request));
    let others = others.map(|&(_, deadline, request, _)| Other { request, deadline });
    Some(others.take(most - 1).collect())
}

/// What may go together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// Somebody waits, and it can be in time.
    Fresh,
    /// It cannot be in time any more.
    Late,
    /// Nobody waits for it.
    Batch,
}

impl Class {
    const fn of(tier: Tier) -> Self {
        match tier {
            Tier::Fresh => Self::Fresh,
            Tier::Late => Self::Late,
            Tier::Batch | Tier::End => Self::Batch,
        }
    }
}

/// The class of a waiting request.
fn class_of(function: &Function, deadline: At, request: RequestKey) -> Class {
    if function.stale.binary_search_by_key(&(deadline, request), |late| (late.deadline, late.request)).is_ok() {
        return Class::Late;
    }
    match function.priority {
        Priority::Latency => Class::Fresh,
        Priority::Batch => Class::Batch,
    }
}

/// The most urgent request of another function, and when it must start to be in time.
struct Rival {
    head: RequestKey,
    latest_start: At,
}

/// Those that would be in time behind a run of one, and shall be so behind a longer one.
fn rivals(books: &Books, slot: Slot, best: &Prediction) -> Vec<Rival> {
    let lanes_left = |on: &Device| on.lanes.len().saturating_sub(on.busy);
    if books.devices.get(best.device).is_some_and(|on| lanes_left(on) > 1) {
        return Vec::new();
    }
    let others = books.ready.in_tiers(Tier::Fresh..Tier::Late).take(LOOKED_AT_MAX).filter(|(_, other)| *other != slot);
    others.filter_map(|(_, other)| rival(books, other)).filter(|rival| rival.latest_start >= best.ends).collect()
}

fn rival(books: &Books, slot: Slot) -> Option<Rival> {
    let function = books.functions.get(slot)?;
    let head = function.fresh.front()?;
    Some(Rival { head: head.request, latest_start: head.deadline - books.models.get(function.model)?.run() })
}

/// By when a run with these must have ended for the sake of those that it leaves behind.
fn latest_end(rivals: &[Rival], with: &[Other]) -> At {
    let left = rivals.iter().filter(|rival| with.iter().all(|other| other.request != rival.head));
    left.map(|rival| rival.latest_start).min().unwrap_or(At::NEVER)
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
