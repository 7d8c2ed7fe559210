//! What was recorded becomes a workload, and gives what it was recorded from.

use faaswap_scheduler::{PolicyKind, trace::TraceError};
use faaswap_simulation::{
    catalog::{self, ModelSpec},
    recorded, scenario,
    workload::{self, Workload},
    world::{Setting, simulate},
};

#[test]
fn a_recorded_simulation_replays_as_a_workload_decision_by_decision() {
    // What a trace does not say: how copies and runs end out of step, and how runs slow each other down.
    let models: Vec<_> = catalog::paper_models().into_iter().map(|model| ModelSpec { tail: 0, ..model }).collect();
    let node = catalog::paper_node(4);
    let workload = Workload { counted_from: 0, ..workload::steady(&models, 300, 12.0, 1, 1) };
    let setting = Setting { noise: 0.0, record: true, ..scenario::setting(PolicyKind::Faaswap, 1) };
    let outcome = simulate(&node, &models, &workload, &setting);
    assert!(outcome.devices.iter().all(|device| device.swaps.0 > 20), "there is something to decide");

    let (again_on, again_models, again) = recorded::stage(&outcome.trace).expect("it was just written");
    assert_eq!((again_on.devices.len(), again_models.len()), (4, 300));
    assert!(again.requests == workload.requests);
    let replayed = simulate(&again_on, &again_models, &again, &setting);
    assert_eq!(replayed.digest, outcome.digest);
    assert!(replayed.latencies_us == outcome.latencies_us);
    let other =
        simulate(&again_on, &again_models, &again, &Setting { record: false, ..scenario::setting(PolicyKind::Lru, 1) });
    assert_ne!(other.digest, outcome.digest, "another policy decides differently on the same incident");
    assert!(other.trace.is_empty());

    let cut = &outcome.trace[..outcome.trace.len() / 2];
    let (_, _, half) = recorded::stage(cut).expect("what is there is good");
    assert!(!half.requests.is_empty() && half.requests.len() < workload.requests.len());
    assert_eq!(
        recorded::stage(&outcome.trace.replacen("arrived 7 ", "arrived 8 ", 1)).err(),
        Some(TraceError::Changed)
    );
}
