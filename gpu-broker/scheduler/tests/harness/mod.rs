//! A node that obeys the scheduler, checks what must hold after every step, and remembers what came of each request.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part of it")]

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use faaswap_protocol::{Bytes, Late, Priority, Slo};
use faaswap_scheduler::{
    Action, DeviceId, Event, FunctionKey, LaneId, ModelId, Moment, PolicyKind, RequestKey, Scheduler, SchedulerConfig,
    Source, invariants,
};

pub const SLO: Slo = Slo { deadline: Duration::from_millis(50), percentile: 9800 };

pub fn ms(ms: u64) -> Moment {
    Moment(Duration::from_millis(ms))
}

/// A node that does what it is told and remembers what must not be done.
pub struct Node {
    pub scheduler: Scheduler,
    pub now: Moment,
    /// Models with memory behind them, per device, in the order of the actions.
    pub mapped: BTreeMap<DeviceId, BTreeSet<ModelId>>,
    pub running: BTreeMap<RequestKey, (DeviceId, LaneId, ModelId)>,
    pub copies: VecDeque<(DeviceId, ModelId)>,
    /// Models whose memory is not free yet.
    pub leaving: BTreeSet<(DeviceId, ModelId)>,
    /// Swap-outs are reported when the test says so, not at once.
    pub leaves_late: bool,
    pub outcomes: BTreeMap<RequestKey, &'static str>,
    pub asked: BTreeSet<RequestKey>,
    pub log: Vec<Action>,
}

impl Node {
    /// `devices` gives capacity and lanes, `models` the charge of each; function n runs model n.
    pub fn new(devices: &[(u64, u16)], models: &[u64], late: Late) -> Self {
        Self::with(PolicyKind::Faaswap, devices, models, late)
    }

    pub fn with(policy: PolicyKind, devices: &[(u64, u16)], models: &[u64], late: Late) -> Self {
        let config = SchedulerConfig { function_queue_max: 8, node_queue_max: 32, policy };
        let mut node = Self {
            scheduler: Scheduler::new(config),
            now: ms(0),
            mapped: BTreeMap::new(),
            running: BTreeMap::new(),
            copies: VecDeque::new(),
            leaving: BTreeSet::new(),
            leaves_late: false,
            outcomes: BTreeMap::new(),
            asked: BTreeSet::new(),
            log: Vec::new(),
        };
        for (device, &(capacity, lanes)) in (0..).map(DeviceId).zip(devices) {
            node.tell(Event::DeviceAdded { device, capacity: Bytes::new(capacity), lanes });
        }
        for (n, &charge) in (0..).zip(models) {
            let (model, function) = (ModelId(n), FunctionKey(n));
            for (device, _) in (0..).map(DeviceId).zip(devices) {
                node.tell(Event::ModelBound { model, device, charge: Bytes::new(charge) });
            }
            node.tell(Event::FunctionAdded { function, model, slo: SLO, priority: Priority::Latency, late });
        }
        node
    }

    pub fn tell(&mut self, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        self.scheduler.step(self.now, event, &mut actions);
        invariants::check(&self.scheduler).expect("invariants hold after every step");
        for action in &actions {
            self.obey(action);
        }
        self.log.extend(actions.iter().cloned());
        while !self.leaves_late && self.finish_swap_out(&mut actions) {}
        actions
    }

    /// The next model that was to leave has left.
    pub fn finish_swap_out(&mut self, actions: &mut Vec<Action>) -> bool {
        let Some(&(device, model)) = self.leaving.first() else { return false };
        self.leaving.remove(&(device, model));
        actions.extend(self.tell(Event::SwapOutDone { model, device }));
        true
    }

    pub fn obey(&mut self, action: &Action) {
        match *action {
            Action::SwapOut { model, device } => {
                assert!(self.mapped.entry(device).or_default().remove(&model), "{model:?} is not on {device:?}");
                assert!(!self.running.values().any(|&(d, _, m)| (d, m) == (device, model)), "{model:?} is in flight");
                assert!(self.leaving.insert((device, model)), "{model:?} leaves {device:?} already");
            }
            Action::SwapIn { model, device, source } => {
                assert!(!self.leaving.contains(&(device, model)), "{model:?} has not left {device:?} yet");
                if let Source::Peer(from) = source {
                    assert!(self.mapped.get(&from).is_some_and(|models| models.contains(&model)), "{from:?} has it");
                }
                assert!(self.mapped.entry(device).or_default().insert(model), "{model:?} is on {device:?} already");
                self.copies.push_back((device, model));
            }
            Action::Run { request, model, device, lane, resident } => {
                assert!(self.mapped.get(&device).is_some_and(|models| models.contains(&model)));
                assert_eq!(resident, !self.copies.contains(&(device, model)));
                assert!(!self.running.values().any(|&(d, l, _)| (d, l) == (device, lane)), "{lane:?} is taken");
                assert!(self.running.insert(request, (device, lane, model)).is_none());
            }
            Action::Refuse { request, ref refusal } => {
                self.running.remove(&request);
                assert_eq!(self.outcomes.insert(request, refusal.code()), None, "{request:?} was answered twice");
            }
            Action::WakeAt(moment) => assert!(moment >= self.now || self.now.0 > Duration::ZERO),
        }
    }

    pub fn ask(&mut self, request: u64, function: u32, deadline_ms: u64) -> Vec<Action> {
        self.asked.insert(RequestKey(request));
        let deadline = Moment(self.now.0 + Duration::from_millis(deadline_ms));
        self.tell(Event::Arrived { request: RequestKey(request), function: FunctionKey(function), deadline })
    }

    pub fn finish_copy(&mut self) {
        if let Some((device, model)) = self.copies.pop_front() {
            self.tell(Event::SwapInDone { model, device, took: Duration::from_millis(1) });
        }
    }

    pub fn finish_run(&mut self, nth: usize) {
        let Some(&request) = self.running.keys().nth(nth % self.running.len().max(1)) else { return };
        self.running.remove(&request);
        assert_eq!(self.outcomes.insert(request, "answered"), None);
        self.tell(Event::RunDone { request, took: Duration::from_millis(1) });
    }
}

pub fn run(request: u64, model: u32, device: u16, lane: u16, resident: bool) -> Action {
    let (request, model) = (RequestKey(request), ModelId(model));
    Action::Run { request, model, device: DeviceId(device), lane: LaneId(lane), resident }
}

pub fn swap_in(model: u32, device: u16) -> Action {
    Action::SwapIn { model: ModelId(model), device: DeviceId(device), source: Source::Host }
}

pub fn swap_out(model: u32, device: u16) -> Action {
    Action::SwapOut { model: ModelId(model), device: DeviceId(device) }
}
