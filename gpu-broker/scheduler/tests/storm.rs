//! Events in any order and with any content, from a driver that does not obey: nothing may panic, no invariant may
//! break, and every request that came in must leave exactly once.

use std::{collections::BTreeMap, time::Duration};

use faaswap_protocol::{Batching, Bytes, Late, Priority, Slo};
use faaswap_scheduler::{
    Action, DeviceId, Event, Form, FunctionKey, Link, ModelId, Moment, PolicyKind, RequestKey, Scheduler,
    SchedulerConfig, Verdict, invariants,
};
use proptest::prelude::*;

fn device() -> impl Strategy<Value = DeviceId> {
    (0..4_u16).prop_map(DeviceId)
}

fn model() -> impl Strategy<Value = ModelId> {
    (0..6_u32).prop_map(ModelId)
}

fn function() -> impl Strategy<Value = FunctionKey> {
    (0..8_u32).prop_map(FunctionKey)
}

fn request() -> impl Strategy<Value = RequestKey> {
    (0..24_u64).prop_map(RequestKey)
}

/// Mostly sensible, sometimes absurd.
fn bytes() -> impl Strategy<Value = Bytes> {
    prop_oneof![8 => 0..12_u64, 1 => Just(u64::MAX), 1 => Just(0)].prop_map(Bytes::new)
}

fn span() -> impl Strategy<Value = Duration> {
    prop_oneof![8 => (0..200_u64).prop_map(Duration::from_millis), 1 => Just(Duration::MAX), 1 => Just(Duration::ZERO)]
}

fn link() -> impl Strategy<Value = Link> {
    prop_oneof![
        device().prop_map(|to| Link::Host { to }),
        (device(), device()).prop_map(|(to, beside)| Link::HostBeside { to, beside }),
        (device(), device()).prop_map(|(from, to)| Link::Peer { from, to }),
    ]
}

fn batching() -> impl Strategy<Value = Batching> {
    prop::sample::select(vec![Batching::Off, Batching::Exact, Batching::On])
}

fn verdict() -> impl Strategy<Value = Verdict> {
    prop::sample::select(vec![Verdict::Same, Verdict::Close, Verdict::Other])
}

fn function_added() -> impl Strategy<Value = Event> {
    (function(), model(), span(), any::<u16>(), any::<bool>(), any::<bool>(), batching()).prop_map(
        |(function, model, deadline, percentile, batch, refuse, batching)| Event::FunctionAdded {
            function,
            model,
            slo: Slo { deadline, percentile },
            priority: if batch { Priority::Batch } else { Priority::Latency },
            late: if refuse { Late::Refuse } else { Late::Serve },
            batching,
        },
    )
}

fn about_the_node() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => (device(), bytes(), 0..3_u16)
            .prop_map(|(device, capacity, lanes)| Event::DeviceAdded { device, capacity, lanes }),
        1 => device().prop_map(|device| Event::DeviceLost { device }),
        5 => (model(), device(), bytes()).prop_map(|(model, device, charge)| Event::ModelBound { model, device, charge }),
        2 => (model(), device(), bytes(), span())
            .prop_map(|(model, device, weights, run)| Event::ModelMeasured { model, device, weights, run }),
        1 => model().prop_map(|model| Event::ModelRemoved { model }),
        4 => function_added(),
        1 => function().prop_map(|function| Event::FunctionRemoved { function }),
        2 => (link(), any::<u64>()).prop_map(|(link, bytes_per_s)| Event::LinkMeasured { link, bytes_per_s }),
        1 => (device(), any::<u16>(), any::<u16>(), bytes()).prop_map(
            |(device, foreign_permille, clock_permille, foreign)| {
                Event::DeviceObserved { device, foreign_permille, clock_permille, foreign }
            }
        ),
    ]
}

fn about_requests() -> impl Strategy<Value = Event> {
    prop_oneof![
        8 => (request(), function(), span(), prop::option::of((0..2_u32).prop_map(Form))).prop_map(
            |(request, function, at, form)| Event::Arrived { request, function, deadline: Moment(at), form }
        ),
        1 => request().prop_map(|request| Event::Cancelled { request }),
        4 => (model(), device(), span()).prop_map(|(model, device, took)| Event::SwapInDone { model, device, took }),
        1 => (model(), device()).prop_map(|(model, device)| Event::SwapInFailed { model, device }),
        1 => (model(), device()).prop_map(|(model, device)| Event::SwapOutDone { model, device }),
        2 => (request(), verdict()).prop_map(|(request, verdict)| Event::RunTried { request, verdict }),
        5 => (request(), span()).prop_map(|(request, took)| Event::RunDone { request, took }),
        1 => function().prop_map(|function| Event::Expected { function }),
        1 => policies().prop_map(|policy| Event::PolicyChosen { policy }),
        2 => Just(Event::Woken),
    ]
}

fn policies() -> impl Strategy<Value = PolicyKind> {
    let random = PolicyKind::Random { seed: 9 };
    prop::sample::select(vec![PolicyKind::Faaswap, PolicyKind::Torpor, PolicyKind::Lru, PolicyKind::Fifo, random])
}

/// What became of the requests that came in.
#[derive(Default)]
struct Ledger {
    /// Open requests, and whether they run.
    open: BTreeMap<RequestKey, bool>,
    /// Their functions and forms.
    about: BTreeMap<RequestKey, (FunctionKey, Option<Form>)>,
    /// What functions run, and what they take.
    functions: BTreeMap<FunctionKey, (ModelId, Batching)>,
    /// What else each run answers, by the request that it was started for.
    runs: BTreeMap<RequestKey, Vec<RequestKey>>,
}

impl Ledger {
    /// The first function and the first open request of a name are the ones that count.
    fn hear(&mut self, event: Event) {
        if let Event::FunctionAdded { function, model, batching, .. } = event {
            self.functions.entry(function).or_insert((model, batching));
        }
        if let Event::FunctionRemoved { function } = event {
            self.functions.remove(&function);
        }
        if let Event::Arrived { request, function, form, .. } = event
            && !self.open.contains_key(&request)
        {
            self.open.insert(request, false);
            self.about.insert(request, (function, form));
        }
    }

    /// Who shares a run allows it, runs the same model, and has the same form.
    fn check_consent(&self, request: RequestKey, with: &[RequestKey], model: ModelId) -> Result<(), TestCaseError> {
        let form = self.about[&request].1;
        for one in with.iter().chain([&request]) {
            let (function, its) = self.about[one];
            let (of, batching) = self.functions[&function];
            prop_assert_eq!(of, model);
            prop_assert!(with.is_empty() || (its == form && its.is_some() && batching != Batching::Off));
        }
        Ok(())
    }

    fn tell(&mut self, scheduler: &mut Scheduler, now: Moment, event: Event) -> Result<(), TestCaseError> {
        self.hear(event);
        if let Event::RunDone { request, .. } = event
            && let Some(with) = self.runs.remove(&request)
        {
            for one in with.into_iter().chain([request]) {
                self.open.remove(&one);
            }
        }
        let mut actions = Vec::new();
        scheduler.step(now, event, &mut actions);
        prop_assert_eq!(invariants::check(scheduler), Ok(()), "after {:?}", event);
        for action in actions {
            match action {
                Action::Run { request, with, model, .. } => {
                    self.check_consent(request, &with, model)?;
                    for one in with.iter().copied().chain([request]) {
                        prop_assert_eq!(self.open.insert(one, true), Some(false), "{:?} waits", one);
                    }
                    self.runs.insert(request, with);
                }
                Action::Refuse { request, .. } => {
                    self.runs.remove(&request);
                    prop_assert!(self.open.remove(&request).is_some(), "{:?} is open", request);
                }
                Action::SwapIn { .. } | Action::SwapOut { .. } => {}
                Action::WakeAt(at) => prop_assert!(at.0 > Duration::ZERO),
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(600) })]

    #[test]
    fn any_events_in_any_order_break_nothing_and_lose_no_request(
        set_up in prop::collection::vec(about_the_node(), 20..60),
        storm in prop::collection::vec((prop_oneof![1 => about_the_node(), 4 => about_requests()], span()), 0..200),
        policy in policies(),
    ) {
        let config = SchedulerConfig { function_queue_max: 4, node_queue_max: 12, policy, ahead: true };
        let (mut scheduler, mut ledger) = (Scheduler::new(config), Ledger::default());
        for event in set_up {
            ledger.tell(&mut scheduler, Moment::default(), event)?;
        }
        for (event, now) in storm {
            // The clock jumps forth and back.
            ledger.tell(&mut scheduler, Moment(now), event)?;
        }
        for device in (0..4).map(DeviceId) {
            ledger.tell(&mut scheduler, Moment(Duration::from_secs(1)), Event::DeviceLost { device })?;
        }
        prop_assert!(ledger.open.is_empty(), "no answer: {:?}", ledger.open);
        prop_assert_eq!(scheduler.waiting_len(), 0);
    }
}
