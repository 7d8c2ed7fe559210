//! What must hold whatever happens, in whatever order.

mod harness;

use std::{collections::BTreeSet, time::Duration};

use faaswap_protocol::{Batching, Late};
use faaswap_scheduler::{DeviceId, Event, Form, FunctionKey, ModelId, PolicyKind, RequestKey, Verdict};
use harness::Node;
use proptest::{prelude::*, strategy::ValueTree};

#[derive(Clone, Debug)]
enum Step {
    Ask {
        function: u32,
        deadline_ms: u64,
    },
    /// One request of each function that may share runs of model 0.
    Burst {
        deadline_ms: u64,
    },
    FinishRun(usize),
    ComeApart(usize),
    TryRun(usize, Verdict),
    FinishCopy,
    Cancel(u64),
    Advance(u64),
    RemoveFunction(u32),
    FailCopy,
    Choose(PolicyKind),
    Unknown(u64),
}

fn policies() -> impl Strategy<Value = PolicyKind> {
    let random = PolicyKind::Random { seed: 3 };
    prop::sample::select(vec![PolicyKind::Faaswap, PolicyKind::Torpor, PolicyKind::Lru, PolicyKind::Fifo, random])
}

fn verdicts() -> impl Strategy<Value = Verdict> {
    prop::sample::select(vec![Verdict::Same, Verdict::Close, Verdict::Other])
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..9_u32, 0..60_u64).prop_map(|(function, deadline_ms)| Step::Ask { function, deadline_ms }),
        2 => (0..200_u64).prop_map(|deadline_ms| Step::Burst { deadline_ms }),
        5 => (0..8_usize).prop_map(Step::FinishRun),
        1 => (0..8_usize).prop_map(Step::ComeApart),
        1 => (0..8_usize, verdicts()).prop_map(|(nth, verdict)| Step::TryRun(nth, verdict)),
        4 => Just(Step::FinishCopy),
        1 => (0..80_u64).prop_map(Step::Cancel),
        3 => (0..30_u64).prop_map(Step::Advance),
        1 => (0..9_u32).prop_map(Step::RemoveFunction),
        1 => Just(Step::FailCopy),
        1 => policies().prop_map(Step::Choose),
        1 => any::<u64>().prop_map(Step::Unknown),
    ];
    prop::collection::vec(step, 0..120)
}

/// Functions 0 to 4 have a model each; 5 to 7 run those of others; there is no eighth.
fn play(policy: PolicyKind, steps: &[Step], late: Late) -> Node {
    let mut node = Node::with(policy, &[(10, 2), (7, 1)], &[6, 3, 5, 7, 2], late);
    for (function, model, batching) in [(5, 0, Batching::Exact), (6, 0, Batching::On), (7, 1, Batching::Off)] {
        node.add((function, model), late, batching);
    }
    for (request, step) in (0..).zip(steps) {
        match *step {
            Step::Ask { function, deadline_ms } => {
                let form = [None, Some(Form(1)), Some(Form(1)), Some(Form(2))];
                node.ask_with(request, function, deadline_ms, form[usize::try_from(request).expect("small") % 4]);
            }
            Step::Burst { deadline_ms } => {
                for (nth, function) in (0..).zip([0, 5, 6]) {
                    node.ask_with(1_000 + 3 * request + nth, function, deadline_ms, Some(Form(1)));
                }
            }
            Step::FinishRun(nth) => node.finish_run(nth),
            Step::ComeApart(nth) => node.finish_run_after(nth, Duration::ZERO),
            Step::TryRun(nth, verdict) => node.try_run(nth, verdict),
            Step::FinishCopy => node.finish_copy(),
            Step::Cancel(request) => drop(node.tell(Event::Cancelled { request: RequestKey(request) })),
            Step::Advance(by) => node.now.0 += Duration::from_millis(by),
            Step::RemoveFunction(n) => drop(node.tell(Event::FunctionRemoved { function: FunctionKey(n) })),
            Step::FailCopy => node.fail_copy(),
            Step::Choose(policy) => drop(node.tell(Event::PolicyChosen { policy })),
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Goal: no request is forgotten or answered twice, whatever happens in whatever order.
    #[test]
    fn every_request_gets_exactly_one_answer(steps in steps(), refuse in any::<bool>(), policy in policies()) {
        let mut node = play(policy, &steps, if refuse { Late::Refuse } else { Late::Serve });
        for _ in 0..10_000 {
            if node.running.is_empty() && node.copies.is_empty() && node.scheduler.waiting_len() == 0 {
                break;
            }
            node.finish_copy();
            node.finish_run(0);
            node.now.0 += Duration::from_millis(10);
            node.tell(Event::Woken);
        }
        prop_assert_eq!(node.scheduler.waiting_len(), 0, "nothing waits while lanes are idle");
        let answered: BTreeSet<_> = node.outcomes.keys().copied().collect();
        prop_assert_eq!(answered, node.asked);
    }

    #[test]
    fn equal_histories_give_equal_actions(steps in steps(), policy in policies()) {
        prop_assert_eq!(play(policy, &steps, Late::Serve).log, play(policy, &steps, Late::Serve).log);
    }
}

/// The two properties above would say little if what is drawn never made functions share a run.
#[test]
fn what_is_drawn_mixes_functions() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let drawn = (0..200).map(|_| steps().new_tree(&mut runner).expect("steps can be drawn").current());
    let mixed: usize = drawn.map(|steps| play(PolicyKind::Faaswap, &steps, Late::Serve).mixed).sum();
    assert!(mixed > 20, "{mixed} runs answered several functions");
}
