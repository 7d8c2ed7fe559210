//! Real processes: models that differ in their weights alone are prepared once, and each answers by its own weights.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::{fs, path::Path, time::Duration};

use faaswap_tests::{
    cache,
    demo::functions::{Plain, compare},
    models,
    node::{Broker, BrokerOptions, DeviceOptions, Sidecar, SidecarOptions},
    oip::{Outcome, Request, Tensor},
    process::temporary_folder,
    random::Random,
};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);
const SLO_MS: u64 = 20_000;
const SIZE: u64 = 128;
const LAYERS: u64 = 4;
const VARIANTS: u64 = 4;

#[test]
fn variants_of_a_model_are_prepared_by_the_first_and_answer_by_their_own_weights() {
    let folder = temporary_folder(&std::env::temp_dir()).unwrap();
    let broker = Broker::start(&BrokerOptions::new(vec![DeviceOptions::new("host0", "2MiB")])).unwrap();
    let mut random = Random::new(5);
    let numbers: Vec<f32> = (0..SIZE).map(|_| random.signed()).collect();
    let inputs = [Tensor::f32("x", &[1, SIZE], &numbers)];
    let mut answers = Vec::new();
    for seed in 0..VARIANTS {
        let model = folder.path().join(format!("variant-{seed}.onnx"));
        models::write(&models::matmul_chain(SIZE, LAYERS, seed), &model).unwrap();
        let expected = Plain::open(&cache::runtime().unwrap(), &model).unwrap().run(&inputs).unwrap();
        let name = format!("variant-{seed}");
        let mut sidecar = Sidecar::start(&broker, &SidecarOptions::new(&name, &model, SLO_MS)).unwrap();
        sidecar.wait_ready().unwrap();
        let answer = Request::new(&name, &inputs).unwrap().send(&mut sidecar.client(PATIENCE)).unwrap();
        let Outcome::Answered(answer) = answer else { panic!("{answer:?}") };
        assert_eq!(compare(&expected, &answer.outputs), None, "variant {seed}");
        answers.push(answer.outputs);
    }
    answers.dedup();
    assert_eq!(answers.len() as u64, VARIANTS, "they are different models");
    let store = broker.folder().join("store");
    let manifests: Vec<Value> = entries(&store.join("prepared")).iter().map(|dir| manifest(dir)).collect();
    let tried = manifests.iter().filter(|manifest| !manifest["trial_max_abs_diff"].is_null()).count();
    assert_eq!((manifests.len() as u64, tried), (VARIANTS, 1), "the first was tried, the others follow it");
    let kinds: Vec<_> = entries(&store.join("kin")).iter().flat_map(|target| entries(target)).collect();
    assert_eq!(kinds.len(), 1, "{kinds:?}");
}

fn entries(dir: &Path) -> Vec<std::path::PathBuf> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect()
}

fn manifest(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join("manifest.json")).unwrap()).unwrap()
}
