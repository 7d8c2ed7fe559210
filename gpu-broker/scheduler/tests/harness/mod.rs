//! A node that obeys the scheduler, checks what must hold after every step, and remembers what came of each request.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part of it")]

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use faaswap_protocol::{Batching, Bytes, Late, Priority, Slo};
use faaswap_scheduler::{
    Action, DeviceId, Event, Form, FunctionKey, LaneId, ModelId, Moment, PolicyKind, RequestKey, Scheduler,
    SchedulerConfig, Source, Verdict, invariants,
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
    /// What else each run answers.
    pub joined: BTreeMap<RequestKey, Vec<RequestKey>>,
    pub copies: VecDeque<(DeviceId, ModelId)>,
    /// Models whose memory is not free yet.
    pub leaving: BTreeSet<(DeviceId, ModelId)>,
    /// Swap-outs are reported when the test says so, not at once.
    pub leaves_late: bool,
    pub outcomes: BTreeMap<RequestKey, &'static str>,
    pub asked: BTreeSet<RequestKey>,
    /// What each request said of itself.
    pub about: BTreeMap<RequestKey, (FunctionKey, Option<Form>)>,
    /// What functions run, and what they take.
    pub functions: BTreeMap<FunctionKey, (ModelId, Batching)>,
    /// What runs of several were said to give.
    pub verdicts: BTreeMap<(ModelId, DeviceId, Option<Form>, usize), Verdict>,
    /// Runs of requests of several functions.
    pub mixed: usize,
    pub log: Vec<Action>,
}

impl Node {
    /// `devices` gives capacity and lanes, `models` the charge of each; function n runs model n.
    pub fn new(devices: &[(u64, u16)], models: &[u64], late: Late) -> Self {
        Self::with(PolicyKind::Faaswap, devices, models, late)
    }

    pub fn with(policy: PolicyKind, devices: &[(u64, u16)], models: &[u64], late: Late) -> Self {
        let config = SchedulerConfig { function_queue_max: 8, node_queue_max: 32, policy, ahead: true };
        let mut node = Self {
            scheduler: Scheduler::new(config),
            now: ms(0),
            mapped: BTreeMap::new(),
            running: BTreeMap::new(),
            joined: BTreeMap::new(),
            copies: VecDeque::new(),
            leaving: BTreeSet::new(),
            leaves_late: false,
            outcomes: BTreeMap::new(),
            asked: BTreeSet::new(),
            about: BTreeMap::new(),
            functions: BTreeMap::new(),
            verdicts: BTreeMap::new(),
            mixed: 0,
            log: Vec::new(),
        };
        for (device, &(capacity, lanes)) in (0..).map(DeviceId).zip(devices) {
            node.tell(Event::DeviceAdded { device, capacity: Bytes::new(capacity), lanes });
        }
        for (n, &charge) in (0..).zip(models) {
            let model = ModelId(n);
            for (device, _) in (0..).map(DeviceId).zip(devices) {
                node.tell(Event::ModelBound { model, device, charge: Bytes::new(charge) });
            }
            node.add((n, n), late, Batching::Exact);
        }
        node
    }

    /// A function, by its number and that of its model.
    pub fn add(&mut self, (function, model): (u32, u32), late: Late, batching: Batching) {
        let (function, model) = (FunctionKey(function), ModelId(model));
        self.functions.insert(function, (model, batching));
        let (slo, priority) = (SLO, Priority::Latency);
        self.tell(Event::FunctionAdded { function, model, slo, priority, late, batching });
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
            Action::Run { request, ref with, model, device, lane, resident } => {
                assert!(self.mapped.get(&device).is_some_and(|models| models.contains(&model)));
                assert_eq!(resident, !self.copies.contains(&(device, model)));
                assert!(!self.running.values().any(|&(d, l, _)| (d, l) == (device, lane)), "{lane:?} is taken");
                assert!(self.running.insert(request, (device, lane, model)).is_none());
                let all: BTreeSet<_> = with.iter().copied().chain([request]).collect();
                assert_eq!(all.len(), with.len() + 1, "none is there twice");
                assert!(all.is_disjoint(&self.joined.values().flatten().copied().collect()));
                assert!(all.iter().all(|one| self.asked.contains(one) && !self.outcomes.contains_key(one)));
                self.check_consent(&all, (model, device));
                self.joined.insert(request, with.clone());
            }
            Action::Refuse { request, ref refusal } => {
                // All requests of a run that breaks off are refused, one after the other.
                self.running.remove(&request);
                self.joined.remove(&request);
                assert_eq!(self.outcomes.insert(request, refusal.code()), None, "{request:?} was answered twice");
            }
            Action::WakeAt(moment) => assert!(moment >= self.now || self.now.0 > Duration::ZERO),
        }
    }

    /// Requests that share a run are of one model and one form, and their functions take what it is known to give.
    fn check_consent(&mut self, all: &BTreeSet<RequestKey>, (model, device): (ModelId, DeviceId)) {
        let about = || all.iter().map(|one| self.about[one]);
        assert!(about().all(|(function, _)| self.functions[&function].0 == model));
        if all.len() < 2 {
            return;
        }
        let forms: BTreeSet<_> = about().map(|(_, form)| form.expect("it goes with others")).collect();
        assert_eq!(forms.len(), 1);
        let verdict =
            self.verdicts.get(&(model, device, forms.first().copied(), all.len())).copied().unwrap_or(Verdict::Same);
        assert!(about().all(|(function, _)| verdict.serves(self.functions[&function].1)), "{all:?} {verdict:?}");
        let functions: BTreeSet<_> = about().map(|(function, _)| function).collect();
        self.mixed += usize::from(functions.len() > 1);
    }

    /// A request that goes alone.
    pub fn ask(&mut self, request: u64, function: u32, deadline_ms: u64) -> Vec<Action> {
        self.ask_with(request, function, deadline_ms, None)
    }

    pub fn ask_with(&mut self, request: u64, function: u32, deadline_ms: u64, form: Option<Form>) -> Vec<Action> {
        self.asked.insert(RequestKey(request));
        let deadline = Moment(self.now.0 + Duration::from_millis(deadline_ms));
        let (request, function) = (RequestKey(request), FunctionKey(function));
        self.about.insert(request, (function, form));
        self.tell(Event::Arrived { request, function, deadline, form })
    }

    /// The copy fails, its memory is free again, and the runs that waited for it end as failed.
    pub fn fail_copy(&mut self) {
        let Some((device, model)) = self.copies.pop_front() else { return };
        self.mapped.entry(device).or_default().remove(&model);
        self.tell(Event::SwapInFailed { model, device });
        let hit: Vec<_> =
            self.running.iter().filter(|(_, on)| (on.0, on.2) == (device, model)).map(|(r, _)| *r).collect();
        // A run that started on a later copy of the same model is not among them: its request came after this failure.
        for request in hit {
            if self.running.remove(&request).is_some() && !self.outcomes.contains_key(&request) {
                self.outcomes.insert(request, "failed");
                self.tell(Event::RunDone { request, took: Duration::ZERO });
            }
        }
    }

    pub fn finish_copy(&mut self) {
        if let Some((device, model)) = self.copies.pop_front() {
            self.tell(Event::SwapInDone { model, device, took: Duration::from_millis(1) });
        }
    }

    pub fn finish_run(&mut self, nth: usize) {
        self.finish_run_after(nth, Duration::from_millis(1));
    }

    /// A run was the first of its size.
    pub fn try_run(&mut self, nth: usize, verdict: Verdict) {
        let Some((&request, &(device, _, model))) = self.running.iter().nth(nth % self.running.len().max(1)) else {
            return;
        };
        let size = self.joined[&request].len() + 1;
        if size > 1 {
            self.verdicts.insert((model, device, self.about[&request].1, size), verdict);
        }
        self.tell(Event::RunTried { request, verdict });
    }

    pub fn finish_run_after(&mut self, nth: usize, took: Duration) {
        let Some(&request) = self.running.keys().nth(nth % self.running.len().max(1)) else { return };
        self.running.remove(&request);
        for one in self.joined.remove(&request).unwrap_or_default().into_iter().chain([request]) {
            assert_eq!(self.outcomes.insert(one, "answered"), None);
        }
        self.tell(Event::RunDone { request, took });
    }
}

pub fn run(request: u64, model: u32, device: u16, lane: u16, resident: bool) -> Action {
    let (request, model) = (RequestKey(request), ModelId(model));
    Action::Run { request, with: vec![], model, device: DeviceId(device), lane: LaneId(lane), resident }
}

pub fn swap_in(model: u32, device: u16) -> Action {
    Action::SwapIn { model: ModelId(model), device: DeviceId(device), source: Source::Host }
}

pub fn swap_out(model: u32, device: u16) -> Action {
    Action::SwapOut { model: ModelId(model), device: DeviceId(device) }
}

/// A form.
pub const ONE: Option<Form> = Some(Form(1));
/// A run of one in [`busy`].
pub const RUN: Duration = Duration::from_millis(10);

/// Models 0 and 1 on one lane, 10 ms a run, both there; request 0 of function 0 runs.
pub fn busy() -> Node {
    let mut node = Node::new(&[(10, 1)], &[4, 4], Late::Serve);
    for model in [0, 1].map(ModelId) {
        node.tell(Event::ModelMeasured { model, device: DeviceId(0), weights: Bytes::new(4), run: RUN });
    }
    for function in [1, 0] {
        node.ask(900 + u64::from(function), function, 500);
        node.finish_copy();
        node.now.0 += RUN;
        node.finish_run_after(0, RUN);
    }
    node.now = ms(100);
    node.ask_with(0, 0, 500, ONE);
    assert_eq!(node.running.len(), 1);
    node
}

/// What runs after the run that is there ends at that moment.
pub fn next(node: &mut Node, at_ms: u64, took: Duration) -> Vec<u64> {
    node.now = ms(at_ms);
    node.log.clear();
    node.finish_run_after(0, took);
    let run = node.log.iter().find_map(|action| match action {
        Action::Run { request, with, .. } => Some((request, with)),
        Action::SwapIn { .. } | Action::SwapOut { .. } | Action::Refuse { .. } | Action::WakeAt(_) => None,
    });
    run.map(|(request, with)| std::iter::once(request).chain(with).map(|one| one.0).collect()).unwrap_or_default()
}
