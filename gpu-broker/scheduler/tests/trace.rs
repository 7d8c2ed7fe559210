//! A recorded history reads back as it was written, and gives the same actions again.

mod harness;

use std::time::Duration;

use faaswap_protocol::{Batching, Bytes, Late, Priority};
use faaswap_scheduler::{
    DeviceId, Event, Form, FunctionKey, Link, ModelId, Moment, PolicyKind, RequestKey, Scheduler, SchedulerConfig,
    Verdict,
    trace::{Ending, Line, Named, Reader, TraceError, VERSION, Writer, answer},
};
use harness::{SLO, ms};
use proptest::prelude::*;

/// One of each kind, with these numbers in them.
fn events(a: u64, b: u32, c: u16) -> Vec<Event> {
    let (device, model, function, request) = (DeviceId(c), ModelId(b), FunctionKey(b), RequestKey(a));
    let (span, bytes, other) = (Duration::from_nanos(a), Bytes::new(a), DeviceId(c / 2));
    let function_added = |priority, late, batching| Event::FunctionAdded {
        function,
        model,
        slo: faaswap_protocol::Slo { percentile: c, ..SLO },
        priority,
        late,
        batching,
    };
    vec![
        Event::DeviceAdded { device, capacity: bytes, lanes: c },
        Event::DeviceLost { device },
        Event::ModelBound { model, device, charge: bytes },
        Event::ModelMeasured { model, device, weights: bytes, run: span },
        Event::LinkMeasured { link: Link::Host { to: device }, bytes_per_s: a },
        Event::LinkMeasured { link: Link::HostBeside { to: device, beside: other }, bytes_per_s: a },
        Event::LinkMeasured { link: Link::Peer { from: device, to: other }, bytes_per_s: a },
        Event::DeviceObserved { device, foreign_permille: c, clock_permille: c / 3, foreign: bytes },
        Event::PolicyChosen { policy: PolicyKind::Lru },
        Event::PolicyChosen { policy: PolicyKind::Random { seed: a } },
        Event::Expected { function },
        Event::ModelRemoved { model },
        function_added(Priority::Latency, Late::Serve, Batching::Off),
        function_added(Priority::Batch, Late::Refuse, Batching::Exact),
        function_added(Priority::Batch, Late::Serve, Batching::On),
        Event::FunctionRemoved { function },
        Event::Arrived { request, function, deadline: Moment(span), form: None },
        Event::Arrived { request, function, deadline: Moment(span), form: Some(Form(b)) },
        Event::Cancelled { request },
        Event::SwapInDone { model, device, took: span },
        Event::SwapInFailed { model, device },
        Event::SwapOutDone { model, device },
        Event::RunTried { request, verdict: Verdict::Same },
        Event::RunTried { request, verdict: Verdict::Close },
        Event::RunTried { request, verdict: Verdict::Other },
        Event::RunDone { request, took: span },
        Event::DrainBegun,
        Event::Woken,
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    #[test]
    fn every_event_reads_back_as_it_was_written(a in any::<u64>(), b in any::<u32>(), c in any::<u16>()) {
        let config = SchedulerConfig { policy: PolicyKind::Random { seed: a }, ..SchedulerConfig::default() };
        let mut text = String::new();
        let mut writer = Writer::begin(&config, &mut text);
        for event in events(a, b, c) {
            writer.step(&mut text, Moment(Duration::from_nanos(a)), &event, &[]);
        }
        let mut lines = text.lines();
        let mut reader = Reader::begin(lines.next().unwrap_or_default()).expect("it was just written");
        prop_assert_eq!(reader.config(), config);
        for event in events(a, b, c) {
            let line = reader.line(lines.next().unwrap_or_default());
            let now = Moment(Duration::from_nanos(a));
            prop_assert_eq!(line, Ok(Line::Step { now, event, answer: String::new() }));
        }
        prop_assert_eq!(lines.next(), None);
    }
}

/// A short history of a node, and its trace.
fn recorded() -> String {
    let config = SchedulerConfig::default();
    let (mut scheduler, mut text) = (Scheduler::new(config), String::new());
    let mut writer = Writer::begin(&config, &mut text);
    writer.name(&mut text, Named::Function, 0, "team/ocr\nwith a line end");
    let (device, function, model) = (DeviceId(0), FunctionKey(0), ModelId(0));
    let arrived = |n, at| Event::Arrived { request: RequestKey(n), function, deadline: ms(at), form: None };
    let done = |n, took| Event::RunDone { request: RequestKey(n), took: Duration::from_millis(took) };
    let (slo, priority, late) = (SLO, Priority::Latency, Late::Refuse);
    let added = Event::FunctionAdded { function, model, slo, priority, late, batching: Batching::Off };
    let history = [
        (0, Event::DeviceAdded { device, capacity: Bytes::new(4), lanes: 1 }),
        (0, Event::ModelBound { model, device, charge: Bytes::new(2) }),
        (0, added),
        (5, arrived(1, 55)),
        (6, Event::SwapInDone { model, device, took: Duration::from_millis(1) }),
        (9, arrived(2, 59)),
        (10, done(1, 4)),
        (15, done(2, 5)),
        (20, arrived(3, 19)),
        (21, arrived(4, 60)),
        (22, Event::PolicyChosen { policy: PolicyKind::Random { seed: 7 } }),
        (23, arrived(5, 80)),
        (24, done(4, 3)),
        (25, Event::PolicyChosen { policy: PolicyKind::Torpor }),
        (26, done(5, 2)),
    ];
    for (at, event) in history {
        let mut actions = Vec::new();
        scheduler.step(ms(at), event, &mut actions);
        writer.step(&mut text, ms(at), &event, &actions);
    }
    writer.end(&mut text, Ending::Stopped);
    text
}

#[test]
fn a_replayed_history_gives_the_same_actions() {
    let text = recorded();
    let mut lines = text.lines();
    let mut reader = Reader::begin(lines.next().expect("a first line")).expect("a trace");
    let mut scheduler = Scheduler::new(reader.config());
    let mut answers = Vec::new();
    for line in lines {
        match reader.line(line).expect("as it was written") {
            Line::Step { now, event, answer: recorded } => {
                let mut actions = Vec::new();
                scheduler.step(now, event, &mut actions);
                assert_eq!(answer(&actions), recorded, "{line}");
                answers.push(recorded);
            }
            Line::Name { of, id, name } => {
                assert_eq!((of, id, name.as_str()), (Named::Function, 0, "team/ocr with a line end"));
            }
            Line::End(why) => assert_eq!(why, Ending::Stopped),
        }
    }
    let all = answers.join("\n");
    let all_of = [
        "swap_in 0 0 host; run 1 0 0 0 coming",
        "run 2 0 0 0 resident",
        "refuse 3 deadline_passed",
        "run 5 0 0 0 resident",
    ];
    for expected in all_of {
        assert!(all.contains(expected), "{expected} in {all}");
    }
}

#[test]
fn a_line_that_was_changed_added_or_left_out_is_found() {
    let text = recorded();
    let lines: Vec<_> = text.lines().collect();
    let read = |lines: &[String]| -> Option<usize> {
        let mut reader = Reader::begin(&lines[0]).expect("a trace");
        lines[1..].iter().position(|line| reader.line(line).is_err()).map(|at| at + 1)
    };
    let whole: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
    assert_eq!(read(&whole), None);
    for at in 2..whole.len() {
        let mut changed = whole.clone();
        changed[at] = changed[at].replacen(' ', "  ", 1);
        assert_eq!(read(&changed), Some(at), "{}", changed[at]);
        let mut shorter = whole.clone();
        shorter.remove(at - 1);
        assert_eq!(read(&shorter), Some(at - 1));
        let mut longer = whole.clone();
        longer.insert(at, whole[at - 1].clone());
        assert_eq!(read(&longer), Some(at));
    }
}

#[test]
fn what_is_no_trace_of_this_version_is_refused_with_the_reason() {
    let text = recorded();
    let first = text.lines().next().expect("a first line");
    let later = first.replacen(&format!(" {VERSION} "), " 70 ", 1);
    assert_eq!(Reader::begin(&later).err(), Some(TraceError::Version { found: 70 }));
    assert_eq!(Reader::begin("").err(), Some(TraceError::NoTrace));
    assert_eq!(Reader::begin("[1, 2]").err(), Some(TraceError::NoTrace));
    assert_eq!(Reader::begin(&first.replacen("256", "257", 1)).err(), Some(TraceError::Changed));
}
