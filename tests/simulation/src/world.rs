//! A node of the simulation: it obeys the real scheduler and tells it what happens, event after event.
//!
//! Time jumps from event to event. Copies share links, runs share a device; both advance at rates that change when
//! others come and go. A run behind a swap-in ends after the longer of copy and run, and its tail.

mod links;
mod runs;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    time::{Duration, Instant},
};

use faaswap_protocol::{Batching, Late, Priority, Slo};
use faaswap_scheduler::{
    Action, DeviceId, Event, Form, FunctionKey, Link, ModelId, Moment, RequestKey, Scheduler, SchedulerConfig,
    invariants, trace::Writer,
};

use self::{links::Links, runs::Runs};
use crate::{
    catalog::{ModelSpec, Nanos, NodeSpec},
    outcome::{Outcome, Tally, Work},
    random::Random,
    workload::Workload,
};

/// p98, as the paper has it.
const PERCENTILE: u16 = 9_800;
/// After the last request, what waits is still served for so long.
const AFTER: Nanos = 60 * crate::catalog::SECOND;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A device is gone.
    Lost {
        /// Which.
        device: usize,
    },
    /// A link carries so many thousandths of what it did.
    Slow {
        /// Whose.
        device: usize,
        /// How much is left.
        permille: u64,
    },
    /// The copy that is under way stands still; it fails later.
    Stuck {
        /// Where.
        device: usize,
        /// When it fails.
        until: Nanos,
    },
}

/// How a simulation is run.
#[derive(Clone, Debug)]
pub struct Setting {
    /// The scheduler's settings.
    pub config: SchedulerConfig,
    /// What functions want done with late requests.
    pub late: Late,
    /// The deviation of run times.
    pub noise: f64,
    /// Faults and when they happen.
    pub faults: Vec<(Nanos, Fault)>,
    /// The seed of noise.
    pub seed: u64,
    /// Check the invariants after every step.
    pub check: bool,
    /// Note how long each step took.
    pub timed: bool,
    /// Whether requests of a function may share a run; each further one adds this part of a run to it.
    pub batching: Option<f64>,
    /// Write a trace, as a broker does.
    pub record: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Happening {
    Arrive(usize),
    CopyEnds { device: usize, version: u64 },
    RunTurns { device: usize, lane: usize, version: u64 },
    Wake,
    Fault(usize),
}

struct World<'a> {
    models: &'a [ModelSpec],
    workload: &'a Workload,
    setting: &'a Setting,
    scheduler: Scheduler,
    now: Nanos,
    agenda: BinaryHeap<Reverse<(Nanos, u64, Happening)>>,
    entries: u64,
    links: Links,
    runs: Vec<Runs>,
    lost: Vec<bool>,
    arrived: BTreeMap<RequestKey, (usize, Nanos)>,
    wake_at: Nanos,
    /// What else a run answers, by the request that it was started for.
    joined: BTreeMap<RequestKey, Vec<RequestKey>>,
    noise: Random,
    record: Option<Writer>,
    outcome: Outcome,
}

/// Runs a workload on a node.
pub fn simulate(node: &NodeSpec, models: &[ModelSpec], workload: &Workload, setting: &Setting) -> Outcome {
    let mut world = World {
        models,
        workload,
        setting,
        scheduler: Scheduler::new(setting.config),
        now: 0,
        agenda: BinaryHeap::new(),
        entries: 0,
        links: Links::new(node),
        runs: node.devices.iter().map(|device| Runs::new(device.lanes)).collect(),
        lost: vec![false; node.devices.len()],
        arrived: BTreeMap::new(),
        wake_at: Nanos::MAX,
        joined: BTreeMap::new(),
        noise: Random::new(setting.seed).fork(7),
        record: None,
        outcome: Outcome {
            functions: vec![Tally::default(); workload.functions.len()],
            devices: vec![Work::default(); node.devices.len()],
            span: workload.span,
            ..Outcome::default()
        },
    };
    world.record = setting.record.then(|| Writer::begin(&setting.config, &mut world.outcome.trace));
    world.set_up(node);
    world.run();
    world.outcome
}

impl World<'_> {
    fn set_up(&mut self, node: &NodeSpec) {
        for (place, device) in node.devices.iter().enumerate() {
            let id = device_id(place);
            self.tell(Event::DeviceAdded { device: id, capacity: device.capacity, lanes: device.lanes });
            self.tell(Event::LinkMeasured { link: Link::Host { to: id }, bytes_per_s: device.link });
        }
        // What all links carry at once is not told: policies did no better with it.
        for (devices, total) in node.shared.iter().filter(|(devices, _)| !node.is_all_of_many(devices)) {
            for (&to, &beside) in devices.iter().flat_map(|a| devices.iter().map(move |b| (a, b))) {
                if to != beside {
                    let (to, beside) = (device_id(to), device_id(beside));
                    self.tell(Event::LinkMeasured { link: Link::HostBeside { to, beside }, bytes_per_s: total / 2 });
                }
            }
        }
        for &(from, to, bytes_per_s) in &node.peers {
            let (from, to) = (device_id(from), device_id(to));
            self.tell(Event::LinkMeasured { link: Link::Peer { from, to }, bytes_per_s });
        }
        for (place, function) in self.workload.functions.iter().enumerate() {
            let spec = self.models[function.model];
            let (model, run) = (model_id(place), Duration::from_nanos(spec.run));
            for device in (0..node.devices.len()).map(device_id) {
                self.tell(Event::ModelBound { model, device, charge: node.charge(spec.weights) });
                self.tell(Event::ModelMeasured { model, device, weights: spec.weights, run });
            }
            let slo = Slo { deadline: Duration::from_nanos(function.deadline), percentile: PERCENTILE };
            let (function, late) = (FunctionKey(model.0), self.setting.late);
            let batching = if self.setting.batching.is_some() { Batching::Exact } else { Batching::Off };
            let priority = Priority::Latency;
            self.tell(Event::FunctionAdded { function, model, slo, priority, late, batching });
        }
        for (at, (when, _)) in self.setting.faults.iter().enumerate() {
            self.enter(*when, Happening::Fault(at));
        }
        if let Some(first) = self.workload.requests.first() {
            self.enter(first.at, Happening::Arrive(0));
        }
    }

    fn run(&mut self) {
        while let Some(Reverse((at, _, what))) = self.agenda.pop() {
            if at > self.workload.span + AFTER {
                break;
            }
            self.now = at;
            match what {
                Happening::Arrive(index) => self.arrive(index),
                Happening::CopyEnds { device, version } => self.copy_ends(device, version),
                Happening::RunTurns { device, lane, version } => self.run_turns(device, lane, version),
                Happening::Wake if at == self.wake_at => {
                    self.wake_at = Nanos::MAX;
                    self.tell(Event::Woken);
                }
                Happening::Wake => {}
                Happening::Fault(index) => self.fault(self.setting.faults[index].1),
            }
        }
        self.outcome.latencies_us.sort_unstable();
        self.outcome.swapped_us.sort_unstable();
    }

    fn enter(&mut self, at: Nanos, what: Happening) {
        self.entries += 1;
        self.agenda.push(Reverse((at, self.entries, what)));
    }

    fn arrive(&mut self, index: usize) {
        let request = self.workload.requests[index];
        if let Some(next) = self.workload.requests.get(index + 1) {
            self.enter(next.at, Happening::Arrive(index + 1));
        }
        let key = RequestKey(index as u64);
        let deadline = self.workload.functions[request.function].deadline;
        self.outcome.functions[request.function].asked += u32::from(self.counts(self.now));
        self.arrived.insert(key, (request.function, self.now));
        let function = FunctionKey(model_id(request.function).0);
        let deadline = Moment(Duration::from_nanos(self.now + deadline));
        let form = self.setting.batching.map(|_| Form(0));
        self.tell(Event::Arrived { request: key, function, deadline, form });
    }

    /// Whether a request that came then is counted.
    fn counts(&self, arrived: Nanos) -> bool {
        arrived >= self.workload.counted_from
    }

    fn tell(&mut self, event: Event) {
        let mut actions = Vec::new();
        let now = Moment(Duration::from_nanos(self.now));
        let begun = self.setting.timed.then(Instant::now);
        self.scheduler.step(now, event, &mut actions);
        if let Some(begun) = begun {
            self.outcome.step_nanos.push(u32::try_from(begun.elapsed().as_nanos()).unwrap_or(u32::MAX));
        }
        self.outcome.steps += 1;
        if let Some(record) = &mut self.record {
            record.step(&mut self.outcome.trace, now, &event, &actions);
        }
        if self.setting.check {
            invariants::check(&self.scheduler).expect("invariants hold after every step");
        }
        for action in actions {
            self.note(&action);
            self.obey(&action);
        }
    }

    /// Two runs with the same digest did the same.
    fn note(&mut self, action: &Action) {
        let numbers = match *action {
            Action::SwapOut { model, device } => [1, u64::from(model.0), u64::from(device.0)],
            Action::SwapIn { model, device, .. } => [2, u64::from(model.0), u64::from(device.0)],
            Action::Run { request, device, lane, .. } => [3, request.0, u64::from(device.0) << 16 | u64::from(lane.0)],
            Action::Refuse { request, .. } => [4, request.0, 0],
            Action::WakeAt(_) => return,
        };
        for number in numbers.into_iter().chain([self.now]) {
            self.outcome.digest = (self.outcome.digest ^ number).wrapping_mul(0x0100_0000_01B3).rotate_left(5);
        }
    }

    fn obey(&mut self, action: &Action) {
        match *action {
            Action::SwapOut { model, device } => self.tell(Event::SwapOutDone { model, device }),
            Action::SwapIn { model, device, source } => self.begin_copy(model, usize::from(device.0), source),
            Action::Run { request, ref with, model, device, lane, resident } => {
                self.begin_run(request, with, model, (usize::from(device.0), usize::from(lane.0)), resident);
            }
            Action::Refuse { request, .. } => {
                if let Some((function, arrived)) = self.arrived.remove(&request) {
                    self.outcome.functions[function].refused += u32::from(self.counts(arrived));
                }
            }
            Action::WakeAt(moment) => {
                let at = u64::try_from(moment.0.as_nanos()).unwrap_or(Nanos::MAX).max(self.now + 1);
                self.wake_at = at;
                self.enter(at, Happening::Wake);
            }
        }
    }

    fn fault(&mut self, fault: Fault) {
        match fault {
            Fault::Lost { device } => {
                self.lost[device] = true;
                self.links.lose(self.now, device);
                self.runs[device].lose();
                self.reschedule_copies();
                self.tell(Event::DeviceLost { device: device_id(device) });
            }
            Fault::Slow { device, permille } => {
                self.links.slow(self.now, device, permille);
                self.reschedule_copies();
            }
            Fault::Stuck { device, until } => {
                self.links.stick(self.now, device, until);
                self.reschedule_copies();
            }
        }
    }
}

fn device_id(place: usize) -> DeviceId {
    DeviceId(u16::try_from(place).unwrap_or(u16::MAX))
}

/// Each function has weights of its own.
fn model_id(function: usize) -> ModelId {
    ModelId(u32::try_from(function).unwrap_or(u32::MAX))
}
