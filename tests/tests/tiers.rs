//! Real processes: a node whose host memory holds fewer models than are registered, and what its clients see of that.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use faaswap_tests::{
    cache,
    demo::functions::{Plain, compare},
    models,
    node::{Broker, BrokerOptions, DeviceOptions, Sidecar, SidecarOptions},
    oip::{Outcome, Request, Tensor},
    process::wait_for,
    random::Random,
};

/// How long a client waits; far more than any deadline here.
const PATIENCE: Duration = Duration::from_secs(60);
/// Reading 4 MiB from a busy machine's disk is well within this.
const SLO_MS: u64 = 20_000;
/// Side of the matrices: 4 MiB of weights.
const SIZE: u64 = 1024;
const FUNCTIONS: u64 = 5;

struct Function {
    sidecar: Sidecar,
    request: Request,
    expected: Vec<Tensor>,
}

impl Function {
    /// A function with a matrix of its own, and what a plain session answers.
    fn start(broker: &Broker, folder: &Path, seed: u64) -> Self {
        let name = format!("matrix-{seed}");
        let model = folder.join(format!("{name}.onnx"));
        models::write(&models::matmul(SIZE, seed), &model).unwrap();
        let mut random = Random::new(seed);
        let numbers: Vec<f32> = (0..SIZE).map(|_| random.signed()).collect();
        let inputs = [Tensor::f32("x", &[1, SIZE], &numbers)];
        let expected = Plain::open(&cache::runtime().unwrap(), &model).unwrap().run(&inputs).unwrap();
        let mut sidecar = Sidecar::start(broker, &SidecarOptions::new(&name, &model, SLO_MS)).unwrap();
        sidecar.wait_ready().unwrap();
        Self { sidecar, request: Request::new(&name, &inputs).unwrap(), expected }
    }

    /// Sends the request; fails on a wrong answer.
    fn ask(&self) -> Outcome {
        let outcome =
            self.request.send(&mut self.sidecar.client(PATIENCE)).expect("every request is answered or refused");
        if let Outcome::Answered(answer) = &outcome {
            assert_eq!(compare(&self.expected, &answer.outputs), None);
        }
        outcome
    }

    fn must_answer(&self) {
        match self.ask() {
            Outcome::Answered(_) => {}
            Outcome::Refused(status, why) => panic!("{} is refused with {status}: {why}", self.sidecar.function()),
        }
    }
}

/// Devices with so much memory each, where 4 MiB hold a model, and host memory for two models.
fn start(folder: &Path, devices: &[&str]) -> (Broker, Vec<Function>) {
    let devices = devices.iter().enumerate().map(|(i, memory)| DeviceOptions::new(&format!("host{i}"), memory));
    let settings = vec!["host_memory = \"9MiB\"".to_owned()];
    let broker = Broker::start(&BrokerOptions { settings, ..BrokerOptions::new(devices.collect()) }).unwrap();
    let functions = (1..=FUNCTIONS).map(|seed| Function::start(&broker, folder, seed)).collect();
    (broker, functions)
}

/// How many models are in host memory, by the broker's list.
fn in_host_memory(broker: &Broker) -> usize {
    let models = broker.admin("/v1/models").unwrap();
    models.as_array().unwrap().iter().filter(|model| model["in_host_memory"] == true).count()
}

#[test]
fn functions_beyond_host_memory_are_registered_and_answered_from_disk() {
    const ROUNDS: usize = 12;
    let folder = tempfile::tempdir().unwrap();
    let (mut broker, functions) = start(folder.path(), &["5MiB", "5MiB"]);
    assert_eq!(broker.admin("/v1/functions").unwrap().as_array().unwrap().len(), functions.len());
    for _ in 0..2 {
        thread::scope(|scope| {
            for function in &functions {
                scope.spawn(move || (0..ROUNDS).for_each(|_| function.must_answer()));
            }
        });
        assert!(broker.metric("faaswap_weights_read_bytes_total").unwrap() > 0.0, "some came from disk");
        assert!(in_host_memory(&broker) <= 2);
        let used = broker.metric("faaswap_host_weights_bytes").unwrap();
        assert!(used <= broker.metric("faaswap_host_weights_max_bytes").unwrap(), "{used}");
        assert!(broker.metric("faaswap_weights_failed_total").unwrap() == 0.0);
        // What was in memory is found there by the next broker; what was not is still on disk.
        broker.start_again().unwrap();
        broker.wait_ready().unwrap();
    }
}

/// The prepared weights of each model on disk.
fn prepared(broker: &Broker) -> Vec<PathBuf> {
    let folders = fs::read_dir(broker.folder().join("store/prepared")).unwrap();
    let largest = |folder: PathBuf| {
        let files = fs::read_dir(folder).unwrap().map(|file| file.unwrap().path());
        files.max_by_key(|file| fs::metadata(file).unwrap().len()).unwrap()
    };
    folders.map(|folder| largest(folder.unwrap().path())).collect()
}

#[test]
fn a_disk_that_fails_costs_the_functions_on_it_and_only_until_it_is_back() {
    let folder = tempfile::tempdir().unwrap();
    let (broker, functions) = start(folder.path(), &["5MiB", "5MiB"]);
    let files = prepared(&broker);
    assert_eq!(files.len(), functions.len());
    let aside = |file: &PathBuf| file.with_extension("aside");
    files.iter().for_each(|file| fs::rename(file, aside(file)).unwrap());
    let refused = functions.iter().filter(|function| match function.ask() {
        Outcome::Answered(_) => false,
        Outcome::Refused(_, why) => {
            assert!(why.contains("reading weights"), "{why}");
            true
        }
    });
    assert!(refused.count() >= functions.len() - 3, "host memory holds two, and one more may be on a device");
    files.iter().for_each(|file| fs::rename(aside(file), file).unwrap());
    functions.iter().for_each(Function::must_answer);
    assert!(broker.metric("faaswap_weights_failed_total").unwrap() > 0.0);
}

/// The prepared weights of one function.
fn weights_of(broker: &Broker, function: &Function) -> PathBuf {
    let list = broker.admin("/v1/functions").unwrap();
    let name = function.sidecar.function();
    let entry = list.as_array().unwrap().iter().find(|entry| entry["name"] == name).unwrap().clone();
    let hex = entry["model"].as_str().unwrap().trim_start_matches("sha256:").to_owned();
    let of_model = |file: &PathBuf| file.parent().unwrap().file_name().unwrap().to_string_lossy().starts_with(&hex);
    prepared(broker).into_iter().find(of_model).unwrap()
}

#[test]
fn who_waits_for_a_disk_keeps_nobody_else_from_the_device() {
    let folder = tempfile::tempdir().unwrap();
    // One device with one lane, which both functions need.
    let (broker, functions) = start(folder.path(), &["9MiB"]);
    let (here, away) = (&functions[0], &functions[4]);
    here.must_answer();
    let (file, aside) = (weights_of(&broker, away), folder.path().join("aside"));
    // A pipe stands for a slow disk: opening it lasts until somebody opens its other end.
    fs::copy(&file, &aside).unwrap();
    fs::remove_file(&file).unwrap();
    assert!(Command::new("mkfifo").arg(&file).status().unwrap().success());
    thread::scope(|scope| {
        let waiting = scope.spawn(|| away.must_answer());
        let in_flight = || Ok((broker.metric("faaswap_requests_in_flight")? >= 1.0).then_some(()));
        wait_for("the request to be taken", PATIENCE, in_flight).unwrap();
        (0..20).for_each(|_| here.must_answer());
        assert!(!waiting.is_finished());
        // The first try gets nothing from the pipe, and the next one finds the file.
        let pipe = folder.path().join("pipe");
        fs::rename(&file, &pipe).unwrap();
        fs::rename(&aside, &file).unwrap();
        drop(fs::OpenOptions::new().write(true).open(&pipe).unwrap());
    });
}
