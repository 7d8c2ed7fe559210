//! What the scheduler decides in plain situations.

mod harness;

use std::time::Duration;

use faaswap_protocol::{Bytes, Late, Refusal};
use faaswap_scheduler::{Action, Choice, DeviceId, Event, FunctionKey, ModelId, PolicyKind, RequestKey, Source};
use harness::{Node, ms, run, swap_in, swap_out};

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

/// A model that was asked for while it was leaving was brought back at once. The device refused that, since what was behind
/// its addresses was still being taken away, and the run that waited for the weights failed.
#[test]
fn a_model_comes_back_only_once_it_has_left() {
    let mut node = Node::new(&[(10, 1)], &[6, 6], Late::Serve);
    node.ask(1, 0, 50);
    node.finish_copy();
    node.finish_run(0);
    node.leaves_late = true;
    assert_eq!(node.ask(2, 1, 50), [swap_out(0, 0), swap_in(1, 0), run(2, 1, 0, 0, false)]);
    node.finish_copy();
    node.finish_run(0);
    assert_eq!(node.ask(3, 0, 50), [], "it is still leaving");
    let mut actions = Vec::new();
    assert!(node.finish_swap_out(&mut actions));
    assert_eq!(actions, [swap_out(1, 0), swap_in(0, 0), run(3, 0, 0, 0, false)]);
}

#[test]
fn the_request_that_is_due_first_goes_first() {
    let mut node = Node::new(&[(10, 1)], &[1, 1, 1], Late::Serve);
    for (request, deadline) in [(1, 50), (2, 40), (3, 30)] {
        node.ask(request, u32::try_from(request).expect("small") - 1, deadline);
        node.finish_copy();
    }
    node.finish_copy();
    node.finish_run(0);
    assert!(node.running.contains_key(&RequestKey(3)));
    node.finish_run(0);
    assert!(node.running.contains_key(&RequestKey(2)));
}

#[test]
fn weights_come_while_the_lane_is_busy_with_another_model() {
    let mut node = Node::new(&[(10, 1)], &[4, 4], Late::Serve);
    node.ask(1, 0, 50);
    node.finish_copy();
    assert_eq!(node.ask(2, 1, 50)[0], swap_in(1, 0));
    node.finish_copy();
    node.finish_run(0);
    assert_eq!(node.log.last(), Some(&run(2, 1, 0, 0, true)));
}

/// A copy of 20 ms and a run of 5 ms, which would end together if the run began after 15 ms.
#[test]
fn a_run_begins_a_little_before_its_copy_asks_for_it_where_a_lane_is_to_spare() {
    for (lanes, begins_ms) in [(1, 15), (2, 14), (8, 14)] {
        let mut node = Node::new(&[(1_000_000_000, lanes)], &[200_000_000], Late::Serve);
        let (device, link) = (DeviceId(0), faaswap_scheduler::Link::Host { to: DeviceId(0) });
        node.tell(Event::LinkMeasured { link, bytes_per_s: 10_000_000_000 });
        let (weights, run) = (Bytes::new(200_000_000), Duration::from_millis(5));
        node.tell(Event::ModelMeasured { model: ModelId(0), device, weights, run });
        let actions = node.ask(1, 0, 50);
        assert_eq!(actions[0], swap_in(0, 0));
        let wakes = actions
            .iter()
            .find_map(|action| if let Action::WakeAt(at) = action { Some(at.0.as_millis()) } else { None });
        assert_eq!(wakes, Some(begins_ms), "{lanes} lanes: {actions:?}");
    }
}

/// A copy of 20 ms keeps the link busy; the next one is asked for half a millisecond before it ends, and the third not yet.
#[test]
fn the_next_copy_is_asked_for_just_before_the_link_is_free() {
    let mut node = Node::new(&[(1_000_000_000, 2)], &[200_000_000; 3], Late::Serve);
    let (device, link) = (DeviceId(0), faaswap_scheduler::Link::Host { to: DeviceId(0) });
    node.tell(Event::LinkMeasured { link, bytes_per_s: 10_000_000_000 });
    let (weights, run) = (Bytes::new(200_000_000), Duration::from_millis(5));
    for model in (0..3).map(ModelId) {
        node.tell(Event::ModelMeasured { model, device, weights, run });
    }
    node.ask(1, 0, 100);
    assert_eq!(node.ask(2, 1, 200).iter().find(|action| matches!(action, Action::SwapIn { .. })), None);
    assert_eq!(node.ask(3, 2, 300).iter().find(|action| matches!(action, Action::SwapIn { .. })), None);
    let mut wakes = Vec::new();
    while !node.log.contains(&swap_in(1, 0)) {
        let wished =
            node.log.iter().rev().find_map(|action| if let Action::WakeAt(at) = action { Some(*at) } else { None });
        let wake = wished.filter(|at| *at > node.now).expect("a look at the link is wished for");
        wakes.push(wake.0.as_micros());
        node.now = wake;
        node.tell(Event::Woken);
    }
    assert_eq!(wakes.last(), Some(&19_500), "{wakes:?}");
    assert!(!node.log.contains(&swap_in(2, 0)));
}

#[test]
fn a_model_on_a_busy_device_is_copied_from_there_over_a_faster_link() {
    let mut node = Node::new(&[(10, 1), (10, 1)], &[4], Late::Serve);
    let (from, to) = (DeviceId(0), DeviceId(1));
    let link = faaswap_scheduler::Link::Peer { from, to };
    node.tell(Event::LinkMeasured { link, bytes_per_s: 300_000_000_000 });
    runs_take(&mut node, 10);
    node.ask(1, 0, 50);
    node.finish_copy();
    let copy = Action::SwapIn { model: ModelId(0), device: to, source: Source::Peer(from) };
    assert_eq!(node.ask(2, 0, 50)[0], copy);
}

/// Runs of the first model take so many milliseconds on two devices.
fn runs_take(node: &mut Node, ms: u64) {
    for device in [DeviceId(0), DeviceId(1)] {
        let (weights, run) = (Bytes::new(4), Duration::from_millis(ms));
        node.tell(Event::ModelMeasured { model: ModelId(0), device, weights, run });
    }
}

/// Seen on H100s: a few runs took ten times as long while models were being bound beside them. Their devices had learned that to run side
/// by side does not pay, ran one after the other from then on, and so never saw that it does.
#[test]
fn a_device_runs_side_by_side_again_some_time_after_wild_runs() {
    let mut node = Node::new(&[(10, 2)], &[4, 4], Late::Serve);
    for model in [0, 1].map(ModelId) {
        let (weights, run) = (Bytes::new(4), Duration::from_millis(10));
        node.tell(Event::ModelMeasured { model, device: DeviceId(0), weights, run });
    }
    let mut pairs = (0..).map(|nth| (2 * nth, 2 * nth + 1));
    let mut pair_takes = |node: &mut Node, took: u64| {
        let (one, other) = pairs.next().expect("there are always more");
        node.ask(one, 0, 1_000);
        node.ask(other, 1, 1_000);
        node.finish_copy();
        node.finish_copy();
        let at_once = node.running.len();
        while !node.running.is_empty() {
            node.now.0 += Duration::from_millis(took / at_once as u64);
            node.finish_run_after(0, Duration::from_millis(took));
        }
        at_once
    };
    for _ in 0..8 {
        pair_takes(&mut node, 100);
    }
    assert_eq!(pair_takes(&mut node, 10), 1, "it seems not to pay");
    node.now.0 += Duration::from_secs(10);
    assert_eq!(pair_takes(&mut node, 12), 2, "it may pay again");
}

/// A request that has waited for 2 s gets every 8th start, oldest first: with none older it starts within 8 starts,
/// once what runs has ended. Without this, small hot models would keep a large one out for ever.
#[test]
fn a_large_model_starts_within_the_stated_bound_however_hot_the_small_ones_are() {
    let mut node = Node::new(&[(10, 2)], &[4, 10, 4], Late::Serve);
    node.ask(1000, 0, 50);
    node.finish_copy();
    node.ask(1, 1, 20);
    let (mut starts_after, mut request) = (0, 2);
    for _ in 0..2_000 {
        node.now.0 += Duration::from_millis(2);
        for function in [0, 2] {
            let actions = node.ask(request, function, 50);
            request += 1;
            if node.now.0 > Duration::from_millis(2_002) {
                starts_after += actions.iter().filter(|action| matches!(action, Action::Run { .. })).count();
            }
        }
        node.finish_copy();
        if node.running.contains_key(&RequestKey(1)) {
            assert!(starts_after <= 8, "{starts_after} starts after it had waited too long");
            return;
        }
        node.finish_run(0);
    }
    panic!("it never started");
}

#[test]
fn every_decision_can_be_explained() {
    let mut node = Node::new(&[(10, 1)], &[6], Late::Serve);
    node.ask(1, 0, 50);
    let decision = node.scheduler.decisions().last().copied().expect("one was made");
    assert_eq!((decision.choice, decision.request), (Choice::Bring, Some(RequestKey(1))));
    assert_eq!((decision.device, decision.source), (Some(DeviceId(0)), Some(Source::Host)));
    assert!(decision.score.run > Duration::ZERO && decision.score.total >= decision.score.run);
}

#[test]
fn the_trace_of_decisions_is_bounded() {
    let mut node = Node::new(&[(10, 1)], &[6], Late::Serve);
    for request in 0..1_000 {
        node.ask(request, 0, 50);
        node.finish_copy();
        node.finish_run(0);
    }
    assert_eq!(node.scheduler.decisions().count(), 256);
}

#[test]
fn a_request_without_a_chance_is_refused_at_once_with_what_it_would_take() {
    let mut node = Node::new(&[(10, 1)], &[6], Late::Refuse);
    let measured = Event::ModelMeasured {
        model: ModelId(0),
        device: DeviceId(0),
        weights: Bytes::new(6),
        run: Duration::from_millis(40),
    };
    node.tell(measured);
    node.ask(1, 0, 50);
    let refused = node.ask(2, 0, 50);
    let Some(Action::Refuse { refusal: Refusal::DeadlineUnreachable { needed, left }, .. }) = refused.first() else {
        panic!("{refused:?}");
    };
    assert!(*needed >= Duration::from_millis(80) && *left == Duration::from_millis(50), "{needed:?} {left:?}");
}

#[test]
fn a_hint_brings_the_model_before_its_request_unless_somebody_waits() {
    let mut node = Node::new(&[(10, 1)], &[6, 6], Late::Serve);
    assert_eq!(node.tell(Event::Expected { function: FunctionKey(0) }), [swap_in(0, 0)]);
    node.finish_copy();
    assert_eq!(node.ask(1, 0, 50), [run(1, 0, 0, 0, true)]);
    assert_eq!(node.tell(Event::Expected { function: FunctionKey(1) }), [], "model 0 is in flight");
}

/// One request a second; then another model that needs all the memory is asked for once.
#[test]
fn a_model_that_is_asked_for_by_the_clock_is_brought_before_its_request() {
    let mut node = Node::new(&[(10, 1)], &[6, 10], Late::Serve);
    let asks = (1..=10).map(|second| (second * 1_000, 0)).chain([(10_500, 1)]);
    for (request, (at, function)) in asks.enumerate() {
        node.now = ms(at);
        node.ask(request as u64, function, 50);
        node.finish_copy();
        node.now = ms(at + 2);
        node.finish_run(0);
    }
    for at in 10_504..11_000 {
        node.now = ms(at);
        node.tell(Event::Woken);
        node.finish_copy();
    }
    node.now = ms(11_000);
    assert_eq!(node.ask(99, 0, 50)[0], run(99, 0, 0, 0, true));
    assert!(node.scheduler.decisions().any(|decision| decision.choice == Choice::BringAhead));
}

#[test]
fn a_model_that_cannot_be_brought_is_refused_after_some_tries_and_not_tried_for_ever() {
    let mut node = Node::new(&[(10, 1)], &[6, 3], Late::Serve);
    node.ask(7, 1, 1_000);
    node.finish_copy();
    node.ask(1, 0, 50);
    for _ in 0..100 {
        node.fail_copy();
        node.now.0 += Duration::from_millis(100);
        node.tell(Event::Woken);
    }
    assert_eq!(node.outcomes.get(&RequestKey(1)), Some(&"hardware_fault"));
}

#[test]
fn a_clock_that_jumps_back_stands_still() {
    let mut node = Node::new(&[(10, 1)], &[6], Late::Serve);
    node.now = ms(1_000);
    node.ask(1, 0, 50);
    node.now = ms(10);
    node.finish_copy();
    node.finish_run(0);
    node.ask(2, 0, 50);
    node.finish_run(0);
    assert_eq!(node.outcomes.len(), 2);
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
    runs_take(&mut node, 10);
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

/// Ours puts aside what cannot be in time any more; the other policies do not look there.
#[test]
fn what_one_policy_had_given_up_is_served_by_the_next() {
    for policy in PolicyKind::all(3) {
        let mut node = Node::new(&[(10, 1)], &[6, 6], Late::Serve);
        node.ask(1, 0, 50);
        node.finish_copy();
        node.now = ms(100);
        assert_eq!(node.ask(2, 1, 50), [], "{policy:?}: the lane is busy");
        node.ask(3, 0, 0);
        node.now = ms(200);
        node.tell(Event::Woken);
        node.tell(Event::PolicyChosen { policy });
        for _ in 0..8 {
            node.finish_run(0);
            node.finish_copy();
            node.now.0 += Duration::from_millis(10);
            node.tell(Event::Woken);
        }
        assert_eq!(node.outcomes.len(), 3, "{policy:?}: {:?}", node.outcomes);
    }
}
