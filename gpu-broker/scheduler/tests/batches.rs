//! Requests of one function share a run where that makes none of them late, and no one else.

mod harness;

use std::time::Duration;

use faaswap_scheduler::{DeviceId, Event, Form, RequestKey};
use harness::{ONE, RUN, busy, next};

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
fn forms_that_differ_and_functions_that_differ_go_apart() {
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
