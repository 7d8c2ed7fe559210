//! Where more is asked for than can be done.

mod harness;

use faaswap_protocol::{Batching, Late, Refusal};
use faaswap_scheduler::{Action, RequestKey};
use harness::{Node, RUN, busy};

/// [`busy`], and behind its run six requests of its function that could only have been in time at once: they are given up when
/// the run ends, and the oldest runs.
fn with_six_given_up() -> Node {
    let mut node = busy();
    for request in 1..=6 {
        node.ask(request, 0, 12);
    }
    node.now.0 += RUN;
    node.finish_run_after(0, RUN);
    for request in [7, 8] {
        node.ask(request, 0, 400);
    }
    node
}

fn refused(request: u64, refusal: Refusal) -> Action {
    Action::Refuse { request: RequestKey(request), refusal }
}

#[test]
fn what_was_given_up_yields_its_place_in_a_full_queue_the_newest_first() {
    let mut node = with_six_given_up();
    assert_eq!(node.running.keys().copied().collect::<Vec<_>>(), [RequestKey(1)]);
    node.ask(9, 0, 400);
    let full = || Refusal::FunctionQueueFull { limit: 8 };
    for (request, instead) in [(10, 6), (11, 5)] {
        assert_eq!(node.ask(request, 0, 400), [refused(instead, full())]);
    }
}

#[test]
fn where_nothing_was_given_up_a_full_queue_refuses_who_comes() {
    let mut node = busy();
    for request in 1..=8 {
        node.ask(request, 0, 400);
    }
    assert_eq!(node.ask(9, 0, 400), [refused(9, Refusal::FunctionQueueFull { limit: 8 })]);
}

#[test]
fn a_full_node_refuses_what_was_given_up_whosever_it_is() {
    let mut node = with_six_given_up();
    for function in [10, 11, 12] {
        node.add((function, 0), Late::Serve, Batching::Off);
        for request in 0..8 {
            node.ask(u64::from(function) * 10 + request, function, 400);
        }
    }
    node.ask(20, 1, 400);
    assert_eq!(node.ask(21, 1, 400), [refused(6, Refusal::NodeQueueFull { limit: 32 })]);
}
