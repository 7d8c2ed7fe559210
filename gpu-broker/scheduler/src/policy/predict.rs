//! Predicts when a request would be answered on each device, in parts.

use super::plan::{Opening, Plan};
use crate::{
    books::Books,
    cost::strained,
    decision::Score,
    device::Device,
    event::Source,
    links::Copy,
    model::{Home, Model, Weights},
    time::{At, Span, scale},
};

/// Side by side pays while a run slows the others by less than this, in thousandths of itself.
const STRAIN_THAT_PAYS: u64 = 900;

/// How much earlier a run starts than its weights' copy asks for, where a lane is to spare. Timers are up to a millisecond
/// late, and as much is lost to waking up and to inputs; measured behind a broker on an H100: 0.9 ms later than without.
const STARTS_AHEAD: Span = Span::millis(1);

/// One place for a request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prediction {
    pub(crate) device: usize,
    /// Where the weights would be copied from; `None` where they are there or coming.
    pub(crate) source: Option<Source>,
    pub(crate) resident: bool,
    pub(crate) opening: Opening,
    pub(crate) ends: At,
    /// When it would end with nothing in its way: neither lanes nor links.
    pub(crate) ends_at_best: At,
    copy: Copy,
    run: Span,
    corun: Span,
    throttle: Span,
    pub(crate) tail: Span,
    pub(crate) price: Span,
}

/// A question: this model, now.
pub(crate) struct Question<'a> {
    pub(crate) books: &'a Books,
    pub(crate) plan: &'a Plan,
    pub(crate) model: &'a Model,
}

impl Question<'_> {
    /// The prediction for one device; `None` where it cannot run now.
    pub(crate) fn on(&self, home: &Home, device: &Device) -> Option<Prediction> {
        let now = self.books.now;
        let (source, copy, ready_at, resident) = match self.model.stay(home.device) {
            Some(stay) if stay.doomed => return None,
            Some(stay) => (None, Copy::default(), stay.ready_at(now), stay.weights == Weights::Resident),
            None => {
                let (source, copy) = self.best_source(home, device)?;
                (Some(source), copy, now + copy.whole(), false)
            }
        };
        let run = home.cost.run();
        let strain = home.cost.strain(now, &device.strain);
        let throttle = Span::of_nanos(scale(run.nanos(), 1000, device.speed_permille.max(1))) - run;
        let beside = device.busy.min(device.lanes.len().saturating_sub(1));
        let corun = strained(run, strain, beside) - run;
        let whole = run + throttle + corun;
        // Started so early, the run and the copy end together: earlier would only occupy the lane. Where there are lanes
        // to spare it is a little earlier: who is woken at a certain moment is late, and first layers run longer than
        // their weights are copied.
        let spare = device.lanes.len().saturating_sub(device.busy) > 1;
        let lead = if spare { STARTS_AHEAD } else { Span::ZERO };
        let from = (ready_at - whole - lead).max(now).max(self.not_before(device, strain));
        let opening = self.plan.opening(home.device, from, whole)?;
        let pipelined = ready_at > opening.start;
        let tail = if pipelined { home.cost.tail() } else { Span::ZERO };
        let ends = (opening.start + whole).max(ready_at) + tail;
        let ends_at_best = (now + run + throttle).max(now + copy.alone) + if resident { Span::ZERO } else { tail };
        let price = self.price(home, device, copy, source);
        let device = home.device;
        Some(Prediction {
            device,
            source,
            resident,
            opening,
            ends,
            ends_at_best,
            copy,
            run,
            corun,
            throttle,
            tail,
            price,
        })
    }

    /// The fastest way to bring the weights.
    fn best_source(&self, home: &Home, device: &Device) -> Option<(Source, Copy)> {
        if !home.may_come(self.books.now) || !device.can_make_room(home.charge) {
            return None;
        }
        let weights = home.cost.weights;
        let mut best = (Source::Host, self.books.copy(home.device, Source::Host, weights));
        for stay in self.model.stays.iter().filter(|stay| stay.weights == Weights::Resident && !stay.doomed) {
            let from = &self.books.devices[stay.device];
            if let Some(copy) = self.books.links.peer_copy(self.books.now, stay.device, home.device, weights)
                && copy.whole() <= best.1.whole()
            {
                best = (Source::Peer(from.id), copy);
            }
        }
        Some(best)
    }

    /// How many runs at once: one more joins while that pays and makes no running one late.
    fn not_before(&self, device: &Device, strain: u64) -> At {
        let now = self.books.now;
        if device.busy == 0 || !device.has_idle_lane() {
            return now;
        }
        let running = device.lanes.iter().flatten();
        let hurts = |ends: At, deadline: At| ends <= deadline && ends + (ends - now).permille(strain) > deadline;
        if strain < STRAIN_THAT_PAYS && !running.clone().any(|running| hurts(running.ends, running.deadline)) {
            return now;
        }
        running.map(|running| running.ends).min().unwrap_or(now).max(now + Span::micros(20))
    }

    /// What the choice costs others: the link, copies that it slows down, and what has to leave.
    fn price(&self, home: &Home, device: &Device, copy: Copy, source: Option<Source>) -> Span {
        if source.is_none() {
            return Span::ZERO;
        }
        let spoilt =
            if copy.contention.is_zero() { Span::ZERO } else { self.books.spoils(home.device, copy.contention) };
        let link = copy.alone / 4 + copy.contention + spoilt;
        if device.free() >= home.charge {
            return link;
        }
        link + self.books.links.alone(home.device, home.cost.weights) / 2
    }
}

impl Prediction {
    /// How much longer than alone and at full clock runs take there now.
    pub(crate) fn slowed_permille(&self) -> u64 {
        let run = self.run.nanos().max(1);
        scale((self.run + self.throttle + self.corun).nanos(), 1000, run)
    }

    /// The order of predictions: by when the answer comes, the price, and what being late costs.
    pub(crate) fn cost(&self, deadline: At, recent: Span) -> (At, Span, usize) {
        let late = (self.ends - deadline) * 3;
        (self.ends + self.price + late, recent, self.device)
    }

    pub(crate) fn score(&self, now: At) -> Score {
        Score {
            lane_wait: (self.opening.start - now).into(),
            copy_queue: self.copy.queue.into(),
            copy: self.copy.alone.into(),
            copy_contention: self.copy.contention.into(),
            run: self.run.into(),
            corun: self.corun.into(),
            throttle: self.throttle.into(),
            tail: self.tail.into(),
            total: (self.ends - now).into(),
            price: self.price.into(),
        }
    }
}
