//! Drives the scheduler together with a node that obeys it, and checks what must hold whatever happens.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use faaswap_protocol::{Bytes, Late, Priority, Refusal, Slo};
use faaswap_scheduler::{
    Action, DeviceId, Event, FunctionKey, LaneId, ModelId, Moment, RequestKey, Scheduler, SchedulerConfig, Source, invariants,
};
use proptest::prelude::*;

const SLO: Slo = Slo { deadline: Duration::from_millis(50), percentile: 9800 };

fn ms(ms: u64) -> Moment {
    Moment(Duration::from_millis(ms))
}

/// A node that does what it is told and remembers what must not be done.
struct Node {
    scheduler: Scheduler,
    now: Moment,
    /// Models with memory behind them, per device, in the order of the actions.
    mapped: BTreeMap<DeviceId, BTreeSet<ModelId>>,
    running: BTreeMap<RequestKey, (DeviceId, LaneId, ModelId)>,
    copies: VecDeque<(DeviceId, ModelId)>,
    outcomes: BTreeMap<RequestKey, &'static str>,
    asked: BTreeSet<RequestKey>,
    log: Vec<Action>,
}

impl Node {
    /// `devices` gives capacity and lanes, `models` the charge of each; function n runs model n.
    fn new(devices: &[(u64, u16)], models: &[u64], late: Late) -> Self {
        let mut node = Self {
            scheduler: Scheduler::new(SchedulerConfig { function_queue_max: 8, node_queue_max: 32, ..SchedulerConfig::default() }),
            now: ms(0),
            mapped: BTreeMap::new(),
            running: BTreeMap::new(),
            copies: VecDeque::new(),
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

    fn tell(&mut self, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        self.scheduler.step(self.now, event, &mut actions);
        invariants::check(&self.scheduler).expect("invariants hold after every step");
        for action in &actions {
            self.obey(action);
        }
        self.log.extend(actions.iter().cloned());
        actions
    }

    fn obey(&mut self, action: &Action) {
        match *action {
            Action::SwapOut { model, device } => {
                assert!(self.mapped.entry(device).or_default().remove(&model), "{model:?} is not on {device:?}");
                assert!(!self.running.values().any(|&(d, _, m)| (d, m) == (device, model)), "{model:?} is in flight");
            }
            Action::SwapIn { model, device, source: _ } => {
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

    fn ask(&mut self, request: u64, function: u32, deadline_ms: u64) -> Vec<Action> {
        self.asked.insert(RequestKey(request));
        let deadline = Moment(self.now.0 + Duration::from_millis(deadline_ms));
        self.tell(Event::Arrived { request: RequestKey(request), function: FunctionKey(function), deadline })
    }

    fn finish_copy(&mut self) {
        if let Some((device, model)) = self.copies.pop_front() {
            self.tell(Event::SwapInDone { model, device, took: Duration::from_millis(1) });
        }
    }

    fn finish_run(&mut self, nth: usize) {
        let Some(&request) = self.running.keys().nth(nth % self.running.len().max(1)) else { return };
        self.running.remove(&request);
        assert_eq!(self.outcomes.insert(request, "answered"), None);
        self.tell(Event::RunDone { request, took: Duration::from_millis(1) });
    }
}

fn run(request: u64, model: u32, device: u16, lane: u16, resident: bool) -> Action {
    let (request, model) = (RequestKey(request), ModelId(model));
    Action::Run { request, model, device: DeviceId(device), lane: LaneId(lane), resident }
}

fn swap_in(model: u32, device: u16) -> Action {
    Action::SwapIn { model: ModelId(model), device: DeviceId(device), source: Source::Host }
}

fn swap_out(model: u32, device: u16) -> Action {
    Action::SwapOut { model: ModelId(model), device: DeviceId(device) }
}

#[test]
fn the_first_request_swaps_its_model_in_and_runs_at_once() {
    let mut node = Node::new(&[(10, 1)], &[6], Late::Serve);
    assert_eq!(node.ask(1, 0, 50), [swap_in(0, 0), run(1, 0, 0, 0, false)]);
    node.finish_copy();
    node.finish_run(0);
    assert_eq!(node.ask(2, 0, 50), [run(2, 0, 0, 0, true)]);
}

#[test]
fn a_resident_model_is_preferred_to_an_empty_device() {
    let mut node = Node::new(&[(10, 1), (10, 1)], &[6, 6], Late::Serve);
    node.ask(1, 0, 50);
    node.finish_copy();
    node.finish_run(0);
    assert_eq!(node.ask(2, 1, 50), [swap_in(1, 1), run(2, 1, 1, 0, false)], "nothing is evicted while room is left");
    assert_eq!(node.ask(3, 0, 50), [run(3, 0, 0, 0, true)]);
}

#[test]
fn the_least_recently_used_model_makes_room() {
    let mut node = Node::new(&[(10, 1)], &[5, 5, 5], Late::Serve);
    for (at, request, function) in [(1, 1, 0), (2, 2, 1), (3, 3, 0)] {
        node.now = ms(at);
        node.ask(request, function, 50);
        node.finish_copy();
        node.finish_run(0);
    }
    assert_eq!(node.ask(4, 2, 50), [swap_out(1, 0), swap_in(2, 0), run(4, 2, 0, 0, false)]);
}

#[test]
fn the_request_that_is_due_first_goes_first() {
    let mut node = Node::new(&[(10, 1)], &[1, 1, 1], Late::Serve);
    node.ask(1, 0, 50);
    node.ask(2, 1, 40);
    node.ask(3, 2, 30);
    node.finish_run(0);
    assert!(node.running.contains_key(&RequestKey(3)));
    node.finish_run(0);
    assert!(node.running.contains_key(&RequestKey(2)));
}

#[test]
fn work_that_fits_overtakes_work_that_does_not_until_that_is_overdue() {
    let mut node = Node::new(&[(10, 2)], &[4, 10, 4], Late::Serve);
    node.ask(1, 0, 10);
    node.finish_copy();
    assert_eq!(node.ask(2, 1, 20), [], "model 0 in flight leaves too little room");
    assert_eq!(node.ask(3, 2, 30), [swap_in(2, 0), run(3, 2, 0, 1, false)]);
    node.finish_copy();
    node.now = ms(25);
    node.finish_run(1);
    assert_eq!(node.ask(4, 2, 10), [], "request 2 is overdue: nothing less urgent may start before it");
    node.finish_run(0);
    assert_eq!(node.log.last(), Some(&run(2, 1, 0, 0, false)));
}

#[test]
fn a_function_that_prefers_refusals_gets_them_when_the_deadline_passes_in_the_queue() {
    let mut node = Node::new(&[(10, 1)], &[6, 6], Late::Refuse);
    node.ask(1, 0, 50);
    assert_eq!(node.ask(2, 1, 20), [Action::WakeAt(ms(21))]);
    node.now = ms(21);
    let late_by = Duration::from_millis(1);
    let refusal = Refusal::DeadlinePassed { late_by };
    assert_eq!(node.tell(Event::Woken), [Action::Refuse { request: RequestKey(2), refusal }]);
}

#[test]
fn full_queues_refuse_with_their_limit() {
    let mut node = Node::new(&[(10, 1)], &[6], Late::Serve);
    for request in 1..=9 {
        node.ask(request, 0, 50);
    }
    let refusal = Refusal::FunctionQueueFull { limit: 8 };
    assert_eq!(node.ask(10, 0, 50), [Action::Refuse { request: RequestKey(10), refusal }]);
}

#[test]
fn a_lost_device_refuses_what_ran_there_and_serves_the_rest_elsewhere() {
    let mut node = Node::new(&[(10, 1), (10, 1)], &[6], Late::Serve);
    node.ask(1, 0, 50);
    node.ask(2, 0, 50);
    node.copies.clear();
    let on: Vec<_> = node.running.values().map(|(device, ..)| *device).collect();
    assert_eq!(on, [DeviceId(0), DeviceId(1)], "a second copy where memory is free");
    node.ask(3, 0, 50);
    let actions = node.tell(Event::DeviceLost { device: DeviceId(0) });
    assert_eq!(actions, [Action::Refuse { request: RequestKey(1), refusal: Refusal::HardwareFault }]);
    node.tell(Event::SwapInDone { model: ModelId(0), device: DeviceId(1), took: Duration::ZERO });
    node.finish_run(0);
    assert_eq!(node.log.last(), Some(&run(3, 0, 1, 0, true)));
}

#[test]
fn nothing_waits_for_a_device_that_will_not_come_back() {
    let mut node = Node::new(&[(10, 1)], &[6], Late::Serve);
    node.ask(1, 0, 50);
    node.ask(2, 0, 50);
    let refused = |request| Action::Refuse { request: RequestKey(request), refusal: Refusal::HardwareFault };
    assert_eq!(node.tell(Event::DeviceLost { device: DeviceId(0) }), [refused(1), refused(2)]);
    assert_eq!(node.ask(3, 0, 50), [refused(3)]);
}

#[test]
fn a_model_that_fits_nowhere_is_refused_with_both_sizes() {
    let mut node = Node::new(&[(10, 1), (12, 1)], &[13], Late::Serve);
    let refusal = Refusal::ModelTooLarge { needed: Bytes::new(13), capacity: Bytes::new(12) };
    assert_eq!(node.ask(1, 0, 50), [Action::Refuse { request: RequestKey(1), refusal }]);
}

#[test]
fn a_removed_model_leaves_as_soon_as_nothing_runs_on_it() {
    let mut node = Node::new(&[(10, 1)], &[6], Late::Serve);
    node.ask(1, 0, 50);
    node.finish_copy();
    assert_eq!(node.tell(Event::ModelRemoved { model: ModelId(0) }), []);
    node.finish_run(0);
    assert_eq!(node.log.last(), Some(&swap_out(0, 0)));
}

#[derive(Clone, Debug)]
enum Step {
    Ask { function: u32, deadline_ms: u64 },
    FinishRun(usize),
    FinishCopy,
    Cancel(u64),
    Advance(u64),
    RemoveFunction(u32),
    FailCopy,
    Unknown(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..6_u32, 0..60_u64).prop_map(|(function, deadline_ms)| Step::Ask { function, deadline_ms }),
        5 => (0..8_usize).prop_map(Step::FinishRun),
        4 => Just(Step::FinishCopy),
        1 => (0..80_u64).prop_map(Step::Cancel),
        3 => (0..30_u64).prop_map(Step::Advance),
        1 => (0..6_u32).prop_map(Step::RemoveFunction),
        1 => Just(Step::FailCopy),
        1 => any::<u64>().prop_map(Step::Unknown),
    ];
    prop::collection::vec(step, 0..120)
}

fn play(steps: &[Step], late: Late) -> Node {
    let mut node = Node::new(&[(10, 2), (7, 1)], &[6, 3, 5, 7, 2], late);
    for (request, step) in (0..).zip(steps) {
        match *step {
            Step::Ask { function, deadline_ms } => drop(node.ask(request, function, deadline_ms)),
            Step::FinishRun(nth) => node.finish_run(nth),
            Step::FinishCopy => node.finish_copy(),
            Step::Cancel(request) => drop(node.tell(Event::Cancelled { request: RequestKey(request) })),
            Step::Advance(by) => node.now.0 += Duration::from_millis(by),
            Step::RemoveFunction(n) => drop(node.tell(Event::FunctionRemoved { function: FunctionKey(n) })),
            Step::FailCopy => fail_copy(&mut node),
            Step::Unknown(n) => {
                let (request, device, model) = (RequestKey(n | 1 << 60), DeviceId(9), ModelId(99));
                node.tell(Event::RunDone { request, took: Duration::ZERO });
                node.tell(Event::SwapInDone { model, device, took: Duration::ZERO });
                node.tell(Event::DeviceLost { device });
                node.tell(Event::ModelRemoved { model });
            }
        }
    }
    node
}

/// The copy fails, its memory is free again, and the runs that waited for it end as failed.
fn fail_copy(node: &mut Node) {
    let Some((device, model)) = node.copies.pop_front() else { return };
    node.mapped.entry(device).or_default().remove(&model);
    node.tell(Event::SwapInFailed { model, device });
    let hit: Vec<_> = node.running.iter().filter(|(_, on)| (on.0, on.2) == (device, model)).map(|(r, _)| *r).collect();
    // A run that started on a later copy of the same model is not among them: its request came after this failure.
    for request in hit {
        if node.running.remove(&request).is_some() && !node.outcomes.contains_key(&request) {
            node.outcomes.insert(request, "failed");
            node.tell(Event::RunDone { request, took: Duration::ZERO });
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Goal: no request is forgotten or answered twice, whatever happens in whatever order.
    #[test]
    fn every_request_gets_exactly_one_answer(steps in steps(), refuse in any::<bool>()) {
        let mut node = play(&steps, if refuse { Late::Refuse } else { Late::Serve });
        for _ in 0..10_000 {
            if node.running.is_empty() && node.copies.is_empty() {
                break;
            }
            node.finish_copy();
            node.finish_run(0);
        }
        node.now.0 += Duration::from_secs(1);
        node.tell(Event::Woken);
        prop_assert_eq!(node.scheduler.waiting_len(), 0, "nothing waits while lanes are idle");
        let answered: BTreeSet<_> = node.outcomes.keys().copied().collect();
        prop_assert_eq!(answered, node.asked);
    }

    #[test]
    fn equal_histories_give_equal_actions(steps in steps()) {
        prop_assert_eq!(play(&steps, Late::Serve).log, play(&steps, Late::Serve).log);
    }
}
