//! What is where: the state that all policies share, and the only ways to change it.
//!
//! A policy reads what it likes and asks for three things: bring weights, start a run, refuse. Each keeps the
//! invariants by itself, so that no policy can break them.

mod memory;
mod node;
mod requests;

use std::collections::{BTreeMap, BTreeSet};

use faaswap_protocol::Bytes;

use crate::{
    decision::Decisions,
    device::Device,
    event::{DeviceId, FunctionKey, LaneId, ModelId, Moment, RequestKey},
    eviction::Eviction,
    links::Links,
    model::{Home, Model, StayId},
    objective::Tally,
    ready::{Function, Ready, Tier, Waiting},
    scheduler::SchedulerConfig,
    slots::{Slot, Slots},
    time::{At, Span},
};

/// Where a request is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Stage {
    Waiting,
    Running { device: usize, lane: LaneId, model: Slot, stay: StayId },
}

/// A request that has no answer yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) function: FunctionKey,
    pub(crate) waiting: Waiting,
    pub(crate) stage: Stage,
    /// It was given up before it ran, and is recorded as missed.
    pub(crate) given_up: bool,
}

/// The state.
#[derive(Clone, Debug)]
pub(crate) struct Books {
    pub(crate) config: SchedulerConfig,
    pub(crate) now: At,
    pub(crate) devices: Vec<Device>,
    pub(crate) models: Slots<ModelId, Model>,
    pub(crate) functions: Slots<FunctionKey, Function>,
    pub(crate) requests: BTreeMap<RequestKey, Request>,
    pub(crate) ready: Ready,
    pub(crate) links: Links,
    pub(crate) eviction: Eviction,
    pub(crate) decisions: Decisions,
    /// Models whose next request is foreseen, by when.
    pub(crate) calendar: BTreeSet<(At, Slot)>,
    /// Functions whose required request count exceeds this are of the low class, in thousandths.
    pub(crate) threshold_permille: i64,
    /// By so much of its deadline a function of the low class yields to the others, in thousandths.
    pub(crate) low_yields_permille: u64,
    /// What has become of requests since the policy took it.
    pub(crate) tally: Tally,
    pub(crate) draining: bool,
    stays_made: u64,
}

impl Books {
    pub(crate) fn new(config: SchedulerConfig, eviction: Eviction) -> Self {
        Self {
            config,
            now: At::START,
            devices: Vec::new(),
            models: Slots::default(),
            functions: Slots::default(),
            requests: BTreeMap::new(),
            ready: Ready::default(),
            links: Links::default(),
            eviction,
            decisions: Decisions::default(),
            calendar: BTreeSet::new(),
            threshold_permille: i64::MAX,
            low_yields_permille: 0,
            tally: Tally::default(),
            draining: false,
            stays_made: 0,
        }
    }

    /// The clock as this event tells it; one that jumps back stands still instead.
    pub(crate) fn advance(&mut self, now: Moment) {
        self.now = self.now.max(At::from(now));
    }

    /// The place of a device that is there.
    pub(crate) fn place(&self, device: DeviceId) -> Option<usize> {
        self.devices.iter().position(|other| other.id == device && !other.lost)
    }

    /// Where a model may run now.
    pub(crate) fn homes<'a>(&'a self, model: &'a Model) -> impl Iterator<Item = (&'a Home, &'a Device)> {
        let homes = model.homes.iter().filter_map(|home| Some((home, self.devices.get(home.device)?)));
        homes.filter(|(_, device)| !device.lost)
    }

    /// Whether that device copies from host memory now.
    pub(crate) fn copies_from_host(&self, device: usize) -> bool {
        self.devices.get(device).is_some_and(|device| !device.lost && device.copies_from_host())
    }

    /// Forgets how functions stand to their objectives, and takes back what was given up: not every policy looks there.
    pub(crate) fn begin_anew(&mut self) {
        (self.threshold_permille, self.low_yields_permille) = (i64::MAX, 0);
        self.tally = Tally::default();
        let slots: Vec<_> = self.functions.iter().map(|(slot, _)| slot).collect();
        for slot in slots {
            if let Some(function) = self.functions.get_mut(slot) {
                function.objective.begin_anew();
                self.ready.take_back(function);
            }
            self.relist(slot);
        }
    }

    /// Brings a function's place in the order up to date.
    pub(crate) fn relist(&mut self, slot: Slot) {
        let (threshold, low_yields) = (self.threshold_permille, self.low_yields_permille);
        let Some(function) = self.functions.get_mut(slot) else { return };
        let run = self.models.get(function.model).map(Model::run).unwrap_or_default();
        let rank = rank(function, run, (threshold, low_yields));
        self.ready.relist(slot, function, rank);
    }
}

/// The tier of a function's most urgent fresh request, and its key there.
///
/// The key is the latest safe start. A function that can afford misses yields to one that cannot, within reason; and so does one
/// of the low class, which is too far behind. Where nobody is in the way it loses nothing by that, and so comes back.
fn rank(function: &Function, run: Span, (threshold_permille, low_yields_permille): (i64, u64)) -> (Tier, At) {
    let head = function.fresh.front();
    let latest_start = head.map_or(At::NEVER, |head| head.deadline - run);
    if function.priority == faaswap_protocol::Priority::Batch {
        return (Tier::Batch, head.map_or(At::NEVER, |head| head.arrived));
    }
    let patience = match function.objective.spare() {
        _ if !function.is_high(threshold_permille) => function.deadline.permille(low_yields_permille),
        ..=0 => Span::ZERO,
        1..=2 => function.deadline / 8,
        3.. => function.deadline / 4,
    };
    (Tier::Fresh, latest_start + patience)
}

/// Takes `less` from a sum that it is part of.
pub(crate) fn subtract(sum: &mut Bytes, less: Bytes) {
    *sum = sum.checked_sub(less).unwrap_or(Bytes::ZERO);
}

/// Adds to a sum that is known to have room.
pub(crate) fn add(sum: &mut Bytes, more: Bytes) {
    *sum = sum.checked_add(more).unwrap_or(*sum);
}
