//! Requests of functions with the same model share a run where both functions allow it, and where it makes no one late.

mod harness;

use std::time::Duration;

use faaswap_protocol::{Batching, Late, Priority};
use faaswap_scheduler::{DeviceId, Event, Form, FunctionKey, ModelId, PolicyKind, RequestKey, Verdict};
use harness::{Node, ONE, RUN, SLO, busy, next};

/// [`busy`], and functions 10 and 11 that run model 0 as its function 0 does, and take so much.
fn with_others(batching: [Batching; 2]) -> Node {
    let mut node = busy();
    for (function, batching) in [10, 11].into_iter().zip(batching) {
        node.add((function, 0), Late::Serve, batching);
    }
    node
}

const EXACT: [Batching; 2] = [Batching::Exact; 2];

#[test]
fn functions_with_the_same_model_go_together_the_most_urgent_first() {
    let mut node = with_others([Batching::Exact, Batching::On]);
    for (request, function, deadline_ms) in [(1, 0, 400), (2, 11, 402), (3, 10, 401), (4, 1, 403)] {
        node.ask_with(request, function, deadline_ms, ONE);
    }
    assert_eq!(next(&mut node, 110, RUN), [1, 3]);
    assert_eq!(next(&mut node, 130, Duration::from_millis(12)), [2]);
    assert_eq!(next(&mut node, 140, RUN), [4], "which has another model");
}

#[test]
fn a_function_that_is_off_goes_alone_whatever_others_take() {
    let mut node = with_others([Batching::Off, Batching::On]);
    for (request, function) in [(1, 0), (2, 10), (3, 10), (4, 11)] {
        node.ask_with(request, function, 400 + request, ONE);
    }
    assert_eq!(next(&mut node, 110, RUN), [1, 4]);
    assert_eq!(next(&mut node, 130, RUN), [2]);
    assert_eq!(next(&mut node, 140, RUN), [3]);
}

#[test]
fn functions_that_want_the_same_bits_go_alone_where_runs_were_seen_to_round() {
    let mut node = with_others([Batching::On, Batching::On]);
    for (request, function) in [(1, 10), (2, 11)] {
        node.ask_with(request, function, 300 + request, ONE);
    }
    assert_eq!(next(&mut node, 110, RUN), [1, 2]);
    node.try_run(0, Verdict::Close);
    for (request, function) in [(3, 10), (4, 0), (5, 0), (6, 11)] {
        node.ask_with(request, function, 400 + request, ONE);
    }
    assert_eq!(next(&mut node, 130, Duration::from_millis(12)), [3, 6], "they take rounding");
    assert_eq!(next(&mut node, 150, Duration::from_millis(12)), [4]);
    assert_eq!(next(&mut node, 160, RUN), [5]);
}

/// Nothing is wrong with them: the size is known not to be for the strict one now.
#[test]
fn a_run_that_comes_apart_for_rounding_keeps_no_function_from_those_that_take_it() {
    let mut node = with_others([Batching::On, Batching::On]);
    for (request, function) in [(1, 0), (2, 10), (3, 10), (4, 11)] {
        node.ask_with(request, function, 400 + request, ONE);
    }
    assert_eq!(next(&mut node, 110, RUN), [1, 2], "not tried yet");
    node.try_run(0, Verdict::Close);
    assert_eq!(next(&mut node, 130, Duration::ZERO), [3, 4]);
}

#[test]
fn what_is_found_out_with_one_function_s_requests_holds_for_those_of_others() {
    let mut node = with_others(EXACT);
    for request in 1..=2 {
        node.ask_with(request, 0, 300 + request, ONE);
    }
    assert_eq!(next(&mut node, 110, RUN), [1, 2]);
    node.try_run(0, Verdict::Other);
    for (request, function) in [(3, 10), (4, 10), (5, 11)] {
        node.ask_with(request, function, 400 + request, ONE);
    }
    for (at, alone) in [(130, 3), (140, 4), (150, 5)] {
        let took = if alone == 3 { Duration::ZERO } else { RUN };
        assert_eq!(next(&mut node, at, took), [alone]);
    }
    for (request, function) in [(6, 10), (7, 11)] {
        node.ask_with(request, function, 400 + request, Some(Form(2)));
    }
    assert_eq!(next(&mut node, 160, RUN), [6, 7], "of another form");
}

/// Whose request it was is not known: nobody loses more than the company.
#[test]
fn functions_whose_run_came_apart_keep_to_themselves_for_a_while() {
    let mut node = with_others(EXACT);
    for (request, function) in [(1, 0), (2, 10), (3, 0), (4, 10), (5, 0), (6, 11), (7, 10)] {
        node.ask_with(request, function, 10_000 + request, ONE);
    }
    assert_eq!(next(&mut node, 110, RUN), [1, 2]);
    assert_eq!(next(&mut node, 130, Duration::ZERO), [3, 5], "the executor had to run them one by one");
    assert_eq!(next(&mut node, 150, Duration::from_millis(12)), [4, 7]);
    assert_eq!(next(&mut node, 170, Duration::from_millis(12)), [6]);
    for (request, function) in [(8, 0), (9, 10)] {
        node.ask_with(request, function, 10_000 + request, ONE);
    }
    assert_eq!(next(&mut node, 1_131, RUN), [8, 9]);
}

#[test]
fn no_run_is_longer_than_any_of_its_functions_or_those_that_it_leaves_behind_allow() {
    // Two at once are assumed to take 17 ms. The other one need not start behind a run that answers it.
    let mut node = with_others(EXACT);
    for (request, function, deadline_ms) in [(1, 0, 10 + 20), (2, 10, 10 + 21)] {
        node.ask_with(request, function, deadline_ms, ONE);
    }
    assert_eq!(next(&mut node, 110, RUN), [1, 2]);
    // Function 10 has another form, and must start within 15 ms to be in time: it can behind one, not behind two.
    let mut node = with_others(EXACT);
    node.ask_with(1, 0, 10 + 22, ONE);
    node.ask_with(2, 11, 10 + 24, ONE);
    node.ask_with(3, 10, 10 + 25, Some(Form(2)));
    assert_eq!(next(&mut node, 110, RUN), [1]);
}

#[test]
fn a_run_that_somebody_waits_for_is_not_made_longer_for_what_nobody_waits_for() {
    let mut node = with_others(EXACT);
    let (function, model, slo, late, batching) = (FunctionKey(12), ModelId(0), SLO, Late::Serve, Batching::Exact);
    node.functions.insert(function, (model, batching));
    node.tell(Event::FunctionAdded { function, model, slo, priority: Priority::Batch, late, batching });
    for (request, function) in [(1, 0), (2, 12), (3, 12)] {
        node.ask_with(request, function, 400 + request, ONE);
    }
    assert_eq!(next(&mut node, 110, RUN), [1]);
    assert_eq!(next(&mut node, 120, RUN), [2, 3], "but with each other");
}

#[test]
fn what_cannot_be_in_time_any_more_goes_after_what_can_and_together() {
    let mut node = with_others(EXACT);
    for (request, function, deadline_ms) in [(1, 10, 5), (2, 11, 6), (3, 0, 400), (4, 11, 401)] {
        node.ask_with(request, function, deadline_ms, ONE);
    }
    assert_eq!(next(&mut node, 110, RUN), [3, 4]);
    assert_eq!(next(&mut node, 130, Duration::from_millis(12)), [1, 2]);
}

/// The published policies start nothing of a function that has something in flight: so they show whose books were kept.
#[test]
fn each_request_is_booked_on_its_own_function_also_where_another_one_of_its_run_is_gone() {
    for gone in [None, Some(0), Some(10)] {
        let mut node = with_others(EXACT);
        for (request, function) in [(1, 0), (2, 10)] {
            node.ask_with(request, function, 400 + request, ONE);
        }
        assert_eq!(next(&mut node, 110, RUN), [1, 2]);
        if let Some(function) = gone.map(FunctionKey) {
            node.tell(Event::FunctionRemoved { function });
        }
        node.tell(Event::PolicyChosen { policy: PolicyKind::Torpor });
        next(&mut node, 130, Duration::from_millis(12));
        for (request, function) in [(3, 0), (4, 10)].into_iter().filter(|(_, function)| gone != Some(*function)) {
            node.ask_with(request, function, 400, ONE);
            assert!(node.running.contains_key(&RequestKey(request)), "function {function} has nothing in flight");
            node.finish_run(0);
        }
    }
}

#[test]
fn a_lost_device_refuses_the_requests_of_all_functions_of_a_run() {
    let mut node = with_others(EXACT);
    for (request, function) in [(1, 0), (2, 10)] {
        node.ask_with(request, function, 400 + request, ONE);
    }
    assert_eq!(next(&mut node, 110, RUN), [1, 2]);
    node.tell(Event::DeviceLost { device: DeviceId(0) });
    for request in [1, 2].map(RequestKey) {
        assert_eq!(node.outcomes[&request], "hardware_fault");
    }
}
