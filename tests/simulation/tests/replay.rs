//! The simulation replays, keeps its invariants under faults, and bears out what is published.

use faaswap_protocol::Late;
use faaswap_scheduler::PolicyKind;
use faaswap_simulation::{
    catalog::{self, MS, SECOND},
    optimum, scenario,
    workload::{self, Workload},
    world::{Fault, Setting, simulate},
};

fn small(policy: PolicyKind, seed: u64) -> Setting {
    Setting { check: true, ..scenario::setting(policy, seed) }
}

fn few(seed: u64) -> Workload {
    workload::replay(&workload::published_counts(), &catalog::paper_models(), 48, 2, seed)
}

const GOLDEN: [(&str, u64); 5] = [
    ("faaswap", 0xc2ef_cec9_9bfb_56c7),
    ("torpor", 0x51dd_e49f_68f0_4939),
    ("lru", 0xf28d_07f8_eefd_6848),
    ("fifo", 0x765a_f739_3777_87b9),
    ("random", 0xc907_c4bc_7232_feee),
];

/// Golden: no chance and no logarithm goes into these, so they are the same on every machine. A change of a policy
/// changes its line; look at what `make simulate` says about it before you change the number.
#[test]
fn decisions_are_the_same_as_ever() {
    let models = catalog::paper_models();
    let workload = workload::adversarial(&models, 400, 5, 90 * MS, 20 * SECOND);
    let digests = scenario::policies(1).map(|(name, policy)| {
        let setting = Setting { noise: 0.0, ..scenario::setting(policy, 1) };
        (name, simulate(&catalog::paper_node(2), &models, &workload, &setting).digest)
    });
    assert_eq!(digests, GOLDEN);
}

#[test]
fn the_same_seed_gives_the_same_outcome_and_another_one_does_not() {
    let (node, models) = (catalog::paper_node(4), catalog::paper_models());
    for (_, policy) in scenario::policies(5) {
        let run = |seed| simulate(&node, &models, &few(seed), &scenario::setting(policy, seed));
        assert_eq!(run(5), run(5));
        assert_ne!(run(5).digest, run(6).digest);
    }
}

#[test]
fn every_request_is_answered_or_refused_whatever_breaks() {
    let (node, models) = (catalog::paper_node(4), catalog::paper_models());
    for (seed, late) in [(1, Late::Serve), (2, Late::Refuse)] {
        for (name, policy) in scenario::policies(seed) {
            let faults = vec![
                (5 * SECOND, Fault::Stuck { device: 1, until: 8 * SECOND }),
                (20 * SECOND, Fault::Slow { device: 2, permille: 200 }),
                (40 * SECOND, Fault::Lost { device: 0 }),
                (50 * SECOND, Fault::Stuck { device: 3, until: 51 * SECOND }),
            ];
            let workload = Workload { counted_from: 0, ..few(seed) };
            let setting = Setting { faults, late, batching: Some(0.3), ..small(policy, seed) };
            let outcome = simulate(&node, &models, &workload, &setting);
            let ended: u64 = outcome.functions.iter().map(|tally| u64::from(tally.answered + tally.refused)).sum();
            assert_eq!(ended, outcome.requests(), "{name}, SEED={seed}");
        }
    }
}

#[test]
fn a_swap_behind_a_busy_switch_takes_what_table_3_of_the_paper_says() {
    // BERT beside ResNet-152 on the same switch: 43 ms for ResNet-152 in the paper.
    let models = catalog::paper_models();
    let resnet = models.iter().position(|model| model.name == "resnet152").expect("it is there");
    let function = |model: usize| workload::FunctionSpec { model, deadline: models[model].deadline };
    let requests = (0..2).map(|function| workload::Request { at: 0, function }).collect();
    let functions = vec![function(models.len() - 1), function(resnet)];
    let workload = Workload { functions, requests, span: SECOND, counted_from: 0 };
    let setting = Setting { noise: 0.0, ..small(PolicyKind::Faaswap, 1) };
    let outcome = simulate(&catalog::paper_node(2), &models, &workload, &setting);
    let resnet_ms = outcome.latency_ms(500);
    assert!((resnet_ms - 43.0).abs() < 3.0, "{resnet_ms}");
}

#[test]
fn no_policy_copies_less_than_the_bound() {
    let (node, models) = (catalog::paper_node(4), catalog::paper_models());
    let workload = Workload { counted_from: 0, ..workload::replay(&workload::published_counts(), &models, 560, 2, 3) };
    let bound = optimum::bound(&node, &models, &workload);
    for (name, policy) in scenario::policies(3) {
        let outcome = simulate(&node, &models, &workload, &scenario::setting(policy, 3));
        let copied: f64 = outcome.devices.iter().map(|device| device.copied).sum();
        let least = bound.links * 24e9 * 120.0;
        assert!(copied >= least, "{name} copied {copied}, the bound is {least}");
    }
}

/// On machines where each swap takes something beyond its bytes, requests whose models come one by one take as much longer.
#[test]
fn what_a_swap_takes_beyond_its_bytes_is_waited_for() {
    let models = &catalog::paper_models()[..1];
    // Two functions in turn, and memory for one of them.
    let capacity = catalog::paper_node(1).charge(models[0].weights);
    let workload = workload::adversarial(models, 2, 1, 500 * MS, 20 * SECOND);
    let mean = |per_swap| {
        let mut node = catalog::paper_node(1);
        (node.devices[0].capacity, node.devices[0].per_swap) = (capacity, per_swap);
        let setting = Setting { noise: 0.0, ..small(PolicyKind::Lru, 1) };
        let outcome = simulate(&node, models, &workload, &setting);
        assert!(outcome.devices[0].swaps.0 > 10, "{:?}", outcome.devices[0].swaps);
        outcome.mean_ms()
    };
    let (without, with) = (mean(0), mean(100 * MS));
    // The copy of 5.9 ms lies behind the run of 25; with what comes on top it does not.
    let expected = 100.0 + 5.9 - 25.0;
    assert!((with - without - expected).abs() < 3.0, "{without} and {with}");
}

/// Runs of several requests pay where a further one costs less than a run; where it does not, nothing is lost by allowing them.
#[test]
fn sharing_runs_makes_no_function_miss_what_it_keeps_alone() {
    let met = |batching| {
        let outcome = scenario::batching(300.0, batching, PolicyKind::Faaswap, 1);
        (outcome.compliant(), outcome.functions.iter().map(|tally| u64::from(tally.met)).sum::<u64>())
    };
    let [none, fifth, whole] = [None, Some(0.2), Some(1.0)].map(met);
    assert!(fifth > none, "{fifth:?} against {none:?}");
    assert!(whole.0 >= none.0, "{whole:?} against {none:?}");
}

/// Half as much again as can be done: most functions are served as if nothing were. All of them late by a little would be
/// every function's miss.
#[test]
fn where_more_is_asked_for_than_can_be_done_most_functions_keep_their_objectives() {
    let (node, models, workload) = scenario::bus_bound(60.0, 1);
    let outcome = scenario::play(&node, &models, &workload, PolicyKind::Faaswap, 1);
    assert!(outcome.compliant_share() > 0.6, "{}", outcome.compliant());
}

/// Near what the node can do. What it was behind for then does not make a function late for good.
#[test]
fn functions_that_fell_behind_are_served_in_time_again_once_the_node_has_room() {
    let outcome = scenario::setback(37.0, PolicyKind::Faaswap, 1);
    assert!(outcome.compliant_share() > 0.95, "{}", outcome.compliant());
    assert!(outcome.missed() * 100 < outcome.requests(), "{} of {}", outcome.missed(), outcome.requests());
}

/// What a timer calls is brought before it calls, and nobody pays for that.
#[test]
fn requests_by_timers_find_their_weights_there_and_no_request_is_late_for_that() {
    for strangers in [false, true] {
        let [without, with] = [false, true].map(|ahead| scenario::prefetch(strangers, ahead, 1));
        assert!(without.resident_share() < 0.1 && with.resident_share() > 0.3, "{}", with.resident_share());
        assert!(with.mean_ms() < without.mean_ms());
        assert!(with.missed() <= without.missed() && with.compliant() >= without.compliant());
    }
}

#[test]
fn the_published_load_is_kept_by_ours_and_not_by_chance() {
    assert!(scenario::paper(scenario::Trace::HeldBack, 400, PolicyKind::Faaswap, 77).all_compliant());
    assert!(
        scenario::paper(scenario::Trace::HeldBack, 400, PolicyKind::Random { seed: 77 }, 77).compliant_share() < 0.5
    );
}
