//! Our policy: the request that must start soonest goes where it is predicted to be answered first.
//!
//! Runs and swaps are decided apart. Weights are brought while the lanes are busy with other models, and a run starts
//! only so early that it ends with its copy: a heavy model on its way does not block a lane. What cannot be in time any
//! more yields to what can; what waits too long gets a turn regardless.

use faaswap_protocol::{Late, Refusal};

use super::{
    Policy, Trigger,
    ahead::Ahead,
    batch::{Joined, joined},
    means::{COPY_ENDS_SOON, Means, runs_at_once},
    plan::Plan,
    predict::{Prediction, Question},
    pressure::Pressure,
};
use crate::{
    books::{Books, Stage},
    decision::{Choice, Decision},
    device::Device,
    event::Action,
    limits::{LOOKED_AT_MAX, STARVED_AFTER, STARVED_TURN},
    ready::{Function, Rank, Tier, Waiting},
    slots::Slot,
    time::{At, Span},
};

/// Functions for which a pass keeps lanes and links; those behind them only get what is idle and fits at once.
const PROMISED_TO_MAX: usize = 16;
/// Requests of one function that one pass looks at.
const OF_ONE_FUNCTION_MAX: usize = 4;

/// What came of one request in a pass.
enum Outcome {
    /// It runs.
    Started,
    /// It goes on waiting; look again then.
    Waits(At),
    /// It cannot be in time any more, and was moved or refused.
    GivenUp,
}

/// The policy.
#[derive(Clone, Debug)]
pub(crate) struct Faaswap {
    plan: Plan,
    ahead: Ahead,
    looked_at: Vec<(Rank, Slot)>,
    /// The rank of the last function that the last pass looked at: an arrival behind it changes nothing before it.
    reached: Option<Rank>,
    /// When that pass wanted to look again.
    wake: At,
    /// Starts since a starved request had its turn.
    starts: u32,
    pressure: Pressure,
}

impl Faaswap {
    pub(crate) fn new() -> Self {
        Self {
            plan: Plan::default(),
            ahead: Ahead::default(),
            looked_at: Vec::new(),
            reached: None,
            wake: At::NEVER,
            starts: 0,
            pressure: Pressure::new(),
        }
    }

    /// Looks at as much as what happened calls for; gives when to look again.
    fn look(&mut self, books: &mut Books, trigger: Trigger, actions: &mut Vec<Action>) -> At {
        let newcomer = match trigger {
            Trigger::Nothing => return self.wake,
            Trigger::Arrived(slot) => Some(slot),
            Trigger::Changed => None,
        };
        if books.ready.waiting_len() == 0 {
            self.reached = None;
            return self.ahead.look(books, actions);
        }
        if let Some(slot) = newcomer.filter(|slot| wants_refusal(books, *slot)) {
            let wake = self.pass(books, actions);
            self.refuse_newcomer(books, slot, actions);
            return wake;
        }
        if !Means::of(books).any() {
            self.reached = None;
            return link_is_nearly_free(books);
        }
        let wake = match newcomer.filter(|slot| self.is_behind(books, *slot)) {
            Some(slot) => self.wake.min(self.look_at(books, Tier::Fresh, slot, actions)),
            None => self.pass(books, actions),
        };
        if books.ready.waiting_len() > 0 { wake.min(link_is_nearly_free(books)) } else { wake }
    }

    /// One look at everything that waits, most urgent first.
    fn pass(&mut self, books: &mut Books, actions: &mut Vec<Action>) -> At {
        let mut wake = At::NEVER;
        self.plan.begin(books);
        self.reached = None;
        self.serve_the_starved(books, actions);
        // What is given up on the way is looked at again among the late.
        for tiers in [Tier::Fresh..Tier::Late, Tier::Late..Tier::End] {
            let mut looked_at = std::mem::take(&mut self.looked_at);
            looked_at.clear();
            looked_at.extend(books.ready.in_tiers(tiers).take(LOOKED_AT_MAX));
            for (at, &(rank, slot)) in looked_at.iter().enumerate() {
                let means = Means::of(books);
                if !means.any() {
                    break;
                }
                self.reached = Some(rank);
                if means.suffice(books, rank.0, slot) && (at < PROMISED_TO_MAX || runs_at_once(books, slot)) {
                    wake = wake.min(self.look_at(books, rank.0, slot, actions));
                }
            }
            self.looked_at = looked_at;
        }
        wake
    }

    /// Whether a request that has just come is less urgent than all that the last pass looked at.
    ///
    /// What that pass promised then stands, and only the newcomer needs a look.
    fn is_behind(&self, books: &Books, slot: Slot) -> bool {
        let rank = books.functions.get(slot).filter(|function| function.waiting_len() == 1).and_then(Function::rank);
        let (Some(reached), Some(rank)) = (self.reached, rank) else { return false };
        reached < rank && rank.0 == Tier::Fresh
    }

    /// Looks at the requests of one function.
    fn look_at(&mut self, books: &mut Books, tier: Tier, slot: Slot, actions: &mut Vec<Action>) -> At {
        let (mut wake, mut behind) = (At::NEVER, 0);
        for _ in 0..OF_ONE_FUNCTION_MAX {
            let Some(function) = books.functions.get(slot) else { return wake };
            let queue = function.queue(tier);
            let Some(&waiting) = queue.get(behind) else { return wake };
            match self.consider(books, slot, tier, waiting, actions) {
                Outcome::Started => {}
                Outcome::GivenUp if behind > 0 => return wake,
                Outcome::GivenUp => {}
                Outcome::Waits(until) => {
                    wake = wake.min(until);
                    behind += 1;
                }
            }
        }
        wake
    }

    /// Finds the best place for a request, and does what can be done about it now.
    fn consider(
        &mut self,
        books: &mut Books,
        slot: Slot,
        tier: Tier,
        waiting: Waiting,
        actions: &mut Vec<Action>,
    ) -> Outcome {
        let Some((best, compared)) = self.best_place(books, slot, waiting.deadline) else {
            return Outcome::Waits(At::NEVER);
        };
        let margin = self.pressure.margin(waiting);
        let in_time = best.ends + margin <= waiting.deadline;
        if tier < Tier::Late && !in_time {
            if best.ends > waiting.deadline && self.refuses(books, slot, waiting, best, actions) {
                return Outcome::GivenUp;
            }
            let is_head = books.functions.get(slot).and_then(|function| function.fresh.front()) == Some(&waiting);
            if is_head && best.ends_at_best + margin > waiting.deadline {
                books.give_up_head(slot);
                return Outcome::GivenUp;
            }
        }
        let Some(model) = books.functions.get(slot).map(|function| function.model) else {
            return Outcome::Waits(At::NEVER);
        };
        if let Some(source) = best.source {
            if !self.may_copy(books, best, tier) {
                self.plan.promise_link(best.device);
                return Outcome::Waits(At::NEVER);
            }
            if !books.bring(model, (best.device, source), waiting.deadline - best.tail, actions) {
                return Outcome::Waits(At::NEVER);
            }
            remember(books, slot, waiting, best, compared, Choice::Bring);
        }
        if best.opening.start <= books.now {
            let Joined { with, ends } = joined(books, (slot, tier, waiting), &best);
            let size = with.len() + 1;
            if books.start(waiting.request, with, (best.device, ends), actions) {
                if best.source.is_none() {
                    remember(books, slot, waiting, best, compared, Choice::Run { size });
                }
                self.starts += 1;
                self.plan.promise(best.device, best.opening, ends, Span::ZERO);
                return Outcome::Started;
            }
        }
        if in_time || tier == Tier::Batch {
            self.plan.promise(best.device, best.opening, best.ends, (waiting.deadline - best.ends) / 2);
        }
        // A busy lane reports its end; only weights that come to an idle one need a look at a certain moment.
        let idle = books.devices.get(best.device).is_some_and(Device::has_idle_lane);
        Outcome::Waits(if idle { best.opening.start.max(books.now) } else { At::NEVER })
    }

    /// The place with the best prediction, and how many were compared.
    ///
    /// A model that is held somewhere gets another copy where memory is free, where its load asks for one, or where it
    /// would be late otherwise. (To ask for a gain that grows with how wrong predictions are was tried: fewer copies,
    /// and later answers, simulated and on four H100s.)
    fn best_place(&self, books: &Books, slot: Slot, deadline: At) -> Option<(Prediction, u16)> {
        let function = books.functions.get(slot)?;
        let model = books.models.get(function.model)?;
        let question = Question { books, plan: &self.plan, model };
        let mut best: Option<((At, Span, usize), Prediction)> = None;
        let mut compared = 0;
        let mut consider = |held: bool, only_free: bool, best: &mut Option<((At, Span, usize), Prediction)>| {
            for (home, device) in books.homes(model) {
                let is_held = model.stay(home.device).is_some();
                if is_held != held || (only_free && device.free() < home.charge) {
                    continue;
                }
                let Some(found) = question.on(home, device) else { continue };
                compared += 1;
                let cost = found.cost(deadline, device.recent);
                if best.as_ref().is_none_or(|(other, _)| cost < *other) {
                    *best = Some((cost, found));
                }
            }
        };
        consider(true, false, &mut best);
        let held_in_time = best.as_ref().is_some_and(|(_, found)| found.ends <= deadline);
        let at_once = best.as_ref().is_some_and(|(_, found)| found.resident && found.opening.start <= books.now);
        if !at_once {
            let load_permille = model.demand.permille_in(books.now, model.run() * 2);
            let wanted = usize::try_from(1 + load_permille / 1000).unwrap_or(1);
            let only_free = held_in_time && model.copies() >= wanted;
            consider(false, only_free, &mut best);
        }
        best.map(|(_, found)| (found, compared))
    }

    /// Whether a copy may be asked for on that link now.
    fn may_copy(&self, books: &Books, best: Prediction, tier: Tier) -> bool {
        let Some(on) = books.devices.get(best.device) else { return false };
        if self.plan.link_is_promised(best.device) {
            return false;
        }
        let nearly_free = on.copies.len() == 1 && books.links.free_at(best.device) <= books.now + COPY_ENDS_SOON;
        match tier {
            Tier::Fresh => on.copies.is_empty() || nearly_free,
            // Nobody gains by it in time: only where it disturbs nothing.
            Tier::Late | Tier::Batch | Tier::End => {
                books.devices.iter().all(|device| device.lost || device.copies.is_empty())
            }
        }
    }

    /// Refuses what is predicted to be late, where its function wants that and the prediction rests on measurements.
    fn refuses(
        &self,
        books: &mut Books,
        slot: Slot,
        waiting: Waiting,
        best: Prediction,
        actions: &mut Vec<Action>,
    ) -> bool {
        let Some(function) = books.functions.get(slot).filter(|function| function.late == Late::Refuse) else {
            return false;
        };
        let home = books.models.get(function.model).and_then(|model| model.home(best.device));
        if !home.is_some_and(|home| home.cost.is_trusted()) {
            return false;
        }
        remember(books, slot, waiting, best, 0, Choice::Refuse);
        let (needed, left) = (best.ends - books.now, waiting.deadline - books.now);
        let refusal = Refusal::DeadlineUnreachable { needed: needed.into(), left: left.into() };
        books.refuse_as_late(waiting.request, refusal, actions);
        true
    }

    /// Refuses a request that has just come and has no chance, even where there was nothing to give and so no look at it.
    fn refuse_newcomer(&self, books: &mut Books, slot: Slot, actions: &mut Vec<Action>) {
        let newest = books.functions.get(slot).and_then(|function| function.fresh.back().copied());
        let Some(waiting) = newest else { return };
        if let Some((best, _)) = self.best_place(books, slot, waiting.deadline)
            && best.ends > waiting.deadline
        {
            self.refuses(books, slot, waiting, best, actions);
        }
    }

    /// Gives the oldest request that waits too long its turn, once in so many starts.
    fn serve_the_starved(&mut self, books: &mut Books, actions: &mut Vec<Action>) {
        let Some(&(arrived, request)) = books.ready.by_age.first() else { return };
        if self.starts < STARVED_TURN || books.now - arrived < STARVED_AFTER {
            return;
        }
        let Some(found) = books.requests.get(&request).copied() else { return };
        let (Stage::Waiting, Some(slot)) = (found.stage, books.functions.find(found.function)) else { return };
        // As urgent as can be: it takes the first lane and link that it can get, and holds them until it has both.
        if let Outcome::Started = self.consider_starved(books, slot, found.waiting, actions) {
            self.starts = 0;
        }
    }

    fn consider_starved(
        &mut self,
        books: &mut Books,
        slot: Slot,
        waiting: Waiting,
        actions: &mut Vec<Action>,
    ) -> Outcome {
        let Some((best, compared)) = self.best_place(books, slot, books.now) else {
            // Models in flight hold the memory: nothing new starts on the device that it fits best until they have ended.
            self.hold_back_a_device(books, slot);
            return Outcome::Waits(At::NEVER);
        };
        let Some(model) = books.functions.get(slot).map(|function| function.model) else {
            return Outcome::Waits(At::NEVER);
        };
        if let Some(source) = best.source {
            let idle = books.devices.get(best.device).is_some_and(|on| on.copies.is_empty());
            if !idle || !books.bring(model, (best.device, source), waiting.deadline - best.tail, actions) {
                self.plan.promise_link(best.device);
                return Outcome::Waits(At::NEVER);
            }
            remember(books, slot, waiting, best, compared, Choice::Bring);
        }
        if best.opening.start <= books.now
            && books.start(waiting.request, Vec::new(), (best.device, best.ends), actions)
        {
            self.plan.promise(best.device, best.opening, best.ends, Span::ZERO);
            return Outcome::Started;
        }
        self.plan.promise(best.device, best.opening, best.ends, Span::ZERO);
        Outcome::Waits(best.opening.start)
    }

    fn hold_back_a_device(&mut self, books: &Books, slot: Slot) {
        let model = books.functions.get(slot).and_then(|function| books.models.get(function.model));
        let Some(model) = model else { return };
        let fitting = books.homes(model).filter(|(home, device)| home.charge <= device.capacity);
        let Some((home, _)) = fitting.min_by_key(|(_, device)| device.pinned) else { return };
        self.plan.close(home.device);
    }
}

impl Policy for Faaswap {
    fn fill(&mut self, books: &mut Books, trigger: Trigger, actions: &mut Vec<Action>) -> At {
        self.pressure.look(books);
        self.wake = self.look(books, trigger, actions);
        self.wake
    }

    fn ended(&mut self, books: &mut Books, model: Slot) {
        self.ahead.foresee(books, model);
    }

    fn expect(&mut self, books: &Books, function: Slot) {
        if let Some(function) = books.functions.get(function) {
            self.ahead.expect(function.model);
        }
    }
}

fn wants_refusal(books: &Books, slot: Slot) -> bool {
    books.functions.get(slot).is_some_and(|function| function.late == Late::Refuse)
}

/// When one of the copies that keep all links busy ends soon, so that the next one is queued behind it: the link would wait for its end to
/// be told and answered otherwise, a quarter of a millisecond on an H100.
fn link_is_nearly_free(books: &Books) -> At {
    if Means::of(books).link() {
        return At::NEVER;
    }
    let busy = books.devices.iter().enumerate().filter(|(_, device)| !device.lost && device.copies.len() == 1);
    let soon = busy.map(|(place, _)| books.links.free_at(place) - COPY_ENDS_SOON);
    soon.filter(|soon| *soon > books.now).min().unwrap_or(At::NEVER)
}

fn remember(books: &mut Books, slot: Slot, waiting: Waiting, best: Prediction, compared: u16, choice: Choice) {
    let Some(function) = books.functions.get(slot) else { return };
    let Some(model) = books.models.get(function.model) else { return };
    let device = books.devices.get(best.device).map(|device| device.id);
    let decision = Decision {
        at: books.now.into(),
        choice,
        request: Some(waiting.request),
        function: Some(function.key),
        model: model.id,
        device: if choice == Choice::Refuse { None } else { device },
        source: best.source,
        left: (waiting.deadline - books.now).into(),
        score: best.score(books.now),
        compared,
    };
    books.decisions.add(decision);
}
