//! Requests for one model share a run where that makes none of them late, and no one else.

mod harness;

use std::time::Duration;

use faaswap_protocol::{Bytes, Late, Priority};
use faaswap_scheduler::{Action, BATCH_MAX, DeviceId, Event, Form, FunctionKey, ModelId, RequestKey};
use harness::{Node, SLO, ms};

const ONE: Option<Form> = Some(Form(1));
const RUN: Duration = Duration::from_millis(10);

/// Models 0 and 1 on one lane, 10 ms a run, both there; request 0 of function 0 runs.
fn busy() -> Node {
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
fn next(node: &mut Node, at_ms: u64, took: Duration) -> Vec<u64> {
    node.now = ms(at_ms);
    node.log.clear();
    node.finish_run_after(0, took);
    let run = node.log.iter().find_map(|action| match action {
        Action::Run { request, with, .. } => Some((request, with)),
        Action::SwapIn { .. } | Action::SwapOut { .. } | Action::Refuse { .. } | Action::WakeAt(_) => None,
    });
    run.map(|(request, with)| std::iter::once(request).chain(with).map(|one| one.0).collect()).unwrap_or_default()
}

#[test]
fn what_has_queued_up_goes_together_in_sizes_that_were_seen_to_pay() {
    let mut node = busy();
    let (mut sizes, mut asked) = (Vec::new(), 0);
    for round in 0..6 {
        while node.scheduler.waiting_len() < 8 {
            asked += 1;
            node.ask_with(asked, 0, 1000, ONE);
        }
        // A run costs 8 ms and 2 for each request.
        let size = u64::try_from(node.joined.values().map(Vec::len).sum::<usize>()).expect("small") + 1;
        sizes.push(next(&mut node, 110 + 30 * round, Duration::from_millis(8 + 2 * size)).len());
    }
    assert_eq!(sizes, [2, 4, 8, 8, 8, 8], "no more than eight may wait here");
}

#[test]
fn forms_that_differ_and_models_that_differ_go_apart() {
    let mut node = busy();
    node.ask_with(1, 0, 400, ONE);
    node.ask_with(2, 0, 401, Some(Form(2)));
    node.ask(3, 0, 402);
    node.ask_with(4, 1, 403, ONE);
    node.ask_with(5, 0, 404, ONE);
    assert_eq!(next(&mut node, 110, RUN), [1, 5]);
    for alone in [2, 3, 4] {
        assert_eq!(next(&mut node, 120 + 10 * alone, RUN), [alone]);
    }
}

/// One more function with model 0.
fn share(node: &mut Node, function: u32, batch_max: u16) {
    let (function, model) = (FunctionKey(function), ModelId(0));
    let (slo, priority, late) = (SLO, Priority::Latency, Late::Serve);
    node.tell(Event::FunctionAdded { function, model, slo, priority, late, batch_max });
}

#[test]
fn functions_with_identical_weights_share_a_run_where_both_allow_it() {
    let mut node = busy();
    share(&mut node, 7, BATCH_MAX);
    share(&mut node, 8, 1);
    node.ask_with(1, 0, 400, ONE);
    node.ask_with(2, 8, 401, ONE);
    node.ask_with(3, 7, 402, ONE);
    node.ask_with(4, 7, 403, Some(Form(2)));
    assert_eq!(next(&mut node, 110, RUN), [1, 3]);
    for alone in [2, 4] {
        assert_eq!(next(&mut node, 120 + 10 * alone, RUN), [alone]);
    }
}

#[test]
fn the_most_urgent_of_all_functions_join() {
    let mut node = busy();
    share(&mut node, 7, BATCH_MAX);
    for (request, function, deadline) in [(1, 0, 400), (2, 0, 900), (3, 7, 500), (4, 7, 450)] {
        node.ask_with(request, function, deadline, ONE);
    }
    assert_eq!(next(&mut node, 110, RUN), [1, 4]);
    assert_eq!(next(&mut node, 130, Duration::from_millis(12)), [3, 2]);
}

#[test]
fn who_is_left_out_is_not_made_late_by_those_who_join() {
    // Runs of two take 17 ms; request 3 of function 7 must start 10 ms before its deadline.
    for (left_ms, expected) in [(22, vec![1]), (40, vec![1, 2])] {
        let mut node = busy();
        share(&mut node, 7, BATCH_MAX);
        node.ask_with(1, 0, 10 + 18, ONE);
        node.ask_with(2, 0, 10 + 19, ONE);
        node.ask_with(3, 7, 10 + left_ms, ONE);
        assert_eq!(next(&mut node, 110, RUN), expected, "{left_ms} ms are left to the one that is left out");
    }
}

#[test]
fn each_function_of_a_run_that_came_apart_leaves_it_alone() {
    let mut node = busy();
    share(&mut node, 7, BATCH_MAX);
    for n in 1..=4 {
        node.ask_with(n, if n % 2 == 0 { 7 } else { 0 }, 10_000, ONE);
    }
    assert_eq!(next(&mut node, 110, RUN), [1, 2]);
    assert_eq!(next(&mut node, 140, Duration::ZERO), [3], "the executor had to run them one by one");
    assert_eq!(next(&mut node, 150, RUN), [4]);
}

#[test]
fn no_run_is_longer_than_its_most_urgent_request_allows() {
    // Two at once are assumed to take 17 ms.
    for (left_ms, expected) in [(16, vec![1]), (18, vec![1, 2])] {
        let mut node = busy();
        node.ask_with(1, 0, 10 + left_ms, ONE);
        node.ask_with(2, 0, 500, ONE);
        assert_eq!(next(&mut node, 110, RUN), expected, "{left_ms} ms are left");
    }
}

#[test]
fn no_run_is_longer_than_another_function_s_most_urgent_request_allows() {
    // The other one must start by its deadline less 10 ms; its function can afford no miss.
    for (left_ms, expected) in [(25, vec![1]), (40, vec![1, 2])] {
        let mut node = busy();
        for n in [1, 2] {
            node.ask_with(n, 0, 10 + 15 + 2 * n, ONE);
        }
        node.ask_with(3, 1, 10 + left_ms, ONE);
        assert_eq!(next(&mut node, 110, RUN), expected, "{left_ms} ms are left to the other");
    }
}

#[test]
fn what_came_apart_is_not_put_together_again_at_once() {
    let mut node = busy();
    for n in 1..=6 {
        node.ask_with(n, 0, 10_000, ONE);
    }
    assert_eq!(next(&mut node, 110, RUN), [1, 2]);
    assert_eq!(next(&mut node, 140, Duration::ZERO), [3], "the executor had to run them one by one");
    assert_eq!(next(&mut node, 150, RUN), [4]);
    assert_eq!(next(&mut node, 1_200, RUN), [5, 6]);
}

#[test]
fn a_lost_device_refuses_every_request_of_its_runs() {
    let mut node = busy();
    for n in 1..=3 {
        node.ask_with(n, 0, 1000, ONE);
    }
    assert_eq!(next(&mut node, 110, RUN), [1, 2]);
    node.tell(Event::DeviceLost { device: DeviceId(0) });
    for request in [1, 2, 3].map(RequestKey) {
        assert_eq!(node.outcomes[&request], "hardware_fault");
    }
}

#[test]
fn only_the_request_that_a_run_was_started_for_ends_it() {
    let mut node = busy();
    for n in 1..=2 {
        node.ask_with(n, 0, 1000, ONE);
    }
    assert_eq!(next(&mut node, 110, RUN), [1, 2]);
    node.ask(3, 0, 1000);
    assert_eq!(node.tell(Event::RunDone { request: RequestKey(2), took: RUN }), []);
    assert_eq!(next(&mut node, 130, RUN), [3]);
}
