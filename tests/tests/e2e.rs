//! Real processes and sockets: what clients of sidecars see when brokers and sidecars die, drain, swap, and refuse.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use faaswap_engine::onnx::{ModelProto, element};
use faaswap_tests::{
    cache,
    demo::functions::{Plain, compare},
    models,
    node::{Broker, BrokerOptions, DeviceOptions, Sidecar, SidecarOptions},
    oip::{Outcome, Request, Tensor},
    process::wait_for,
    random::Random,
};
use prost::Message;
use rustix::process::Signal;
use serde_json::Value;

/// How long a client waits; far more than any deadline here.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long something that must happen may take on a busy machine.
const SOON: Duration = Duration::from_secs(60);
/// Deadline of most functions here.
const SLO_MS: u64 = 3000;
/// Side of the matrices: 4 MiB of weights per layer.
const SIZE: u64 = 1024;
/// How often a device is lost until a model must be suspended.
const FAULTS_MAX: usize = 6;

/// A function under test with a request whose answer is known.
struct Known {
    model: PathBuf,
    request: Request,
    expected: Vec<Tensor>,
}

impl Known {
    /// Writes the model and asks a plain session what it answers.
    fn new(folder: &Path, function: &str, model: &ModelProto, rows: u64, seed: u64) -> Self {
        let path = folder.join(format!("{}.onnx", function.replace('/', "_")));
        models::write(model, &path).unwrap();
        Self::of_file(path, function, rows, seed)
    }

    fn of_file(model: PathBuf, function: &str, rows: u64, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let numbers: Vec<f32> = (0..rows * SIZE).map(|_| random.signed()).collect();
        let inputs = [Tensor::f32("x", &[rows, SIZE], &numbers)];
        let expected = Plain::open(&cache::runtime().unwrap(), &model).unwrap().run(&inputs).unwrap();
        Self { model, request: Request::new(function, &inputs).unwrap(), expected }
    }

    fn start(&self, broker: &Broker, function: &str) -> Sidecar {
        let mut sidecar = Sidecar::start(broker, &SidecarOptions::new(function, &self.model, SLO_MS)).unwrap();
        sidecar.wait_ready().unwrap();
        sidecar
    }

    /// Sends the request; fails on a wrong answer.
    fn ask(&self, sidecar: &Sidecar) -> Outcome {
        let outcome = self.request.send(&mut sidecar.client(PATIENCE)).expect("every request is answered or refused");
        if let Outcome::Answered(answer) = &outcome {
            assert_eq!(compare(&self.expected, &answer.outputs), None);
        }
        outcome
    }

    fn must_answer(&self, sidecar: &Sidecar) {
        match self.ask(sidecar) {
            Outcome::Answered(_) => {}
            Outcome::Refused(status, why) => panic!("{} is refused with {status}: {why}", sidecar.function()),
        }
    }
}

fn broker(devices: &[&str], settings: &[&str]) -> Broker {
    let devices = devices.iter().enumerate().map(|(i, memory)| DeviceOptions::new(&format!("host{i}"), memory));
    let settings = settings.iter().map(|&line| line.to_owned()).collect();
    Broker::start(&BrokerOptions { settings, ..BrokerOptions::new(devices.collect()) }).unwrap()
}

/// The entry of this function on the broker's list.
fn on_list(broker: &Broker, function: &str) -> Option<Value> {
    let list = broker.admin("/v1/functions").unwrap();
    list.as_array().unwrap().iter().find(|entry| entry["name"] == function).cloned()
}

#[test]
fn what_a_function_says_of_tf32_reaches_the_broker() {
    let folder = tempfile::tempdir().unwrap();
    let broker = broker(&["16MiB"], &[]);
    let known = Known::new(folder.path(), "exact", &models::matmul(SIZE, 1), 1, 2);
    let options = |function| SidecarOptions::new(function, &known.model, SLO_MS).with("FAASWAP_MODEL_NAME", "exact");
    for (function, options, shown) in [
        ("silent", options("silent"), "node"),
        ("fast", options("fast").with("FAASWAP_TF32", "on"), "on"),
        ("exact", options("exact").with("FAASWAP_TF32", "off"), "off"),
    ] {
        let mut sidecar = Sidecar::start(&broker, &options).unwrap();
        sidecar.wait_ready().unwrap();
        known.must_answer(&sidecar);
        assert_eq!(on_list(&broker, function).unwrap()["tf32"], shown);
    }
}

#[test]
fn a_killed_broker_costs_no_answer_and_service_resumes_by_itself() {
    let folder = tempfile::tempdir().unwrap();
    let mut broker = broker(&["16MiB"], &[]);
    let known = Known::new(folder.path(), "steady", &models::matmul(SIZE, 1), 1, 1);
    let sidecar = known.start(&broker, "steady");
    let (stop, answered, refused) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    match known.ask(&sidecar) {
                        Outcome::Answered(_) => answered.fetch_add(1, Ordering::Relaxed),
                        Outcome::Refused(status, why) => {
                            assert_eq!(status, 503, "{why}");
                            refused.fetch_add(1, Ordering::Relaxed)
                        }
                    };
                }
            });
        }
        for _ in 0..3 {
            wait_for_more(&answered);
            broker.start_again().unwrap();
            let restarted = Instant::now();
            wait_for_more(&answered);
            println!("the first answers came {:?} after the restart", restarted.elapsed());
        }
        stop.store(true, Ordering::Relaxed);
    });
    println!("{answered:?} answered, {refused:?} refused");
    assert!(on_list(&broker, "steady").is_some(), "the function has registered again");
}

#[test]
fn functions_of_a_lost_device_go_to_the_other_and_without_any_the_broker_starts_anew() {
    let folder = tempfile::tempdir().unwrap();
    let mut broker = broker(&["16MiB", "16MiB"], &["test_faults = true"]);
    let known = Known::new(folder.path(), "mobile", &models::matmul(SIZE, 1), 1, 1);
    let sidecar = known.start(&broker, "mobile");
    let process = broker.process().id();
    known.must_answer(&sidecar);
    for lost in ["host0", "host1"] {
        broker.fail_device(lost).unwrap();
        // What was running there may be refused; what comes later is not.
        wait_for("an answer", SOON, || Ok(matches!(known.ask(&sidecar), Outcome::Answered(_)).then_some(()))).unwrap();
        for _ in 0..20 {
            known.must_answer(&sidecar);
        }
    }
    assert_eq!(broker.process().ended(), None, "the process has replaced itself");
    assert_eq!(broker.process().id(), process);
    // One whose worker is started anew is back a moment later, while others answer.
    wait_for("all devices", SOON, || {
        let devices = broker.admin("/v1/devices")?;
        Ok(devices.as_array().is_some_and(|all| all.iter().all(|device| device["lost"] == false)).then_some(()))
    })
    .unwrap();
}

#[test]
fn a_model_that_runs_whenever_a_device_is_lost_is_suspended_and_others_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let broker = broker(&["64MiB"], &["test_faults = true"]);
    let heavy = Known::new(folder.path(), "suspect", &models::matmul_chain(SIZE, 3, 1), 512, 1);
    let light = Known::new(folder.path(), "other", &models::matmul(SIZE, 2), 1, 2);
    let (suspect, other) = (heavy.start(&broker, "suspect"), light.start(&broker, "other"));
    light.must_answer(&other);
    let (suspended, began) = (AtomicBool::new(false), Instant::now());
    thread::scope(|scope| {
        // So many that one waits for the lane whenever one leaves it.
        for _ in 0..6 {
            scope.spawn(|| {
                while !suspended.load(Ordering::Relaxed) && began.elapsed() < PATIENCE {
                    if let Outcome::Refused(status, why) = heavy.ask(&suspect) {
                        assert_eq!(status, 503, "{why}");
                        suspended.fetch_or(why.contains("when the hardware failed"), Ordering::Relaxed);
                    }
                }
            });
        }
        // Twice is enough where it ran alone each time.
        for _ in 0..FAULTS_MAX {
            wait_for("the device", SOON, || Ok((broker.admin("/v1/devices")?[0]["lost"] == false).then_some(())))
                .unwrap();
            wait_for("a request in flight", SOON, || {
                let in_flight = broker.metric("faaswap_requests_in_flight")?;
                Ok((in_flight >= 1.0 || suspended.load(Ordering::Relaxed)).then_some(()))
            })
            .unwrap();
            if suspended.load(Ordering::Relaxed) {
                break;
            }
            // With its only device gone the broker starts anew at once, maybe before it has answered this. It does not refuse it.
            if let Err(cut_off) = broker.fail_device("host0") {
                assert!(!cut_off.to_string().contains("does not fail"), "{cut_off}");
            }
            wait_for("an answer", SOON, || Ok(matches!(light.ask(&other), Outcome::Answered(_)).then_some(())))
                .unwrap();
        }
        wait_for("the suspension", SOON, || Ok(suspended.load(Ordering::Relaxed).then_some(()))).unwrap();
    });
    for _ in 0..20 {
        light.must_answer(&other);
    }
    assert!(matches!(heavy.ask(&suspect), Outcome::Refused(503, _)));
    let models = broker.admin("/v1/models").unwrap();
    let suspended = models.as_array().unwrap().iter().filter(|model| model["suspended_s"].as_u64().is_some()).count();
    assert_eq!(suspended, 1, "{models}");
}

#[test]
fn devices_fail_on_request_only_where_that_is_configured() {
    let broker = broker(&["16MiB"], &[]);
    let refused = broker.fail_device("host0").unwrap_err();
    assert!(refused.to_string().contains("test_faults is off"), "{refused}");
}

fn wait_for_more(count: &AtomicUsize) {
    let goal = count.load(Ordering::Relaxed) + 50;
    wait_for("more answers", SOON, || Ok((count.load(Ordering::Relaxed) >= goal).then_some(()))).unwrap();
}

#[test]
fn while_the_broker_is_away_requests_wait_and_are_refused_at_their_deadline() {
    let folder = tempfile::tempdir().unwrap();
    let mut broker = broker(&["16MiB"], &[]);
    let known = Known::new(folder.path(), "patient", &models::matmul(SIZE, 1), 1, 1);
    let options = SidecarOptions::new("patient", &known.model, 300);
    let mut sidecar = Sidecar::start(&broker, &options).unwrap();
    sidecar.wait_ready().unwrap();
    broker.process().kill();
    match known.ask(&sidecar) {
        Outcome::Refused(503, _) => {}
        other @ (Outcome::Answered(_) | Outcome::Refused(..)) => panic!("nobody is there to answer, but: {other:?}"),
    }
    let ready = sidecar.client(PATIENCE).get("/v2/health/ready").unwrap();
    assert_ne!(ready.status, 200, "a function without a broker is not ready");
    let live = sidecar.client(PATIENCE).get("/v2/health/live").unwrap();
    assert_eq!(live.status, 200, "but its sidecar lives");
    broker.start_again().unwrap();
    sidecar.wait_ready().unwrap();
    known.must_answer(&sidecar);
}

#[test]
fn a_killed_sidecar_leaves_nothing_behind_and_the_others_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let broker = broker(&["64MiB"], &["keep_warm = \"1s\""]);
    let heavy = Known::new(folder.path(), "doomed", &models::matmul_chain(SIZE, 3, 1), 512, 1);
    let light = Known::new(folder.path(), "other", &models::matmul(SIZE, 2), 1, 2);
    let (mut doomed, other) = (heavy.start(&broker, "doomed"), light.start(&broker, "other"));
    heavy.must_answer(&doomed);
    let address = doomed.address();
    thread::scope(|scope| {
        for _ in 0..8 {
            let request = &heavy.request;
            // Whatever the client gets: its server is about to be killed.
            scope.spawn(move || request.send(&mut faaswap_tests::http::Client::new(address, PATIENCE)).is_ok());
        }
        let in_flight = || Ok((broker.metric("faaswap_requests_in_flight")? >= 2.0).then_some(()));
        wait_for("requests in flight", SOON, in_flight).unwrap();
        doomed.process().kill();
    });
    light.must_answer(&other);
    let gone = || {
        let clean = on_list(&broker, "doomed").is_none()
            && broker.metric("faaswap_connections")? == 1.0
            && broker.metric("faaswap_requests_in_flight")? == 0.0
            && broker.metric("faaswap_requests_waiting")? == 0.0
            && broker.admin("/v1/models")?.as_array().is_some_and(|models| models.len() == 1);
        Ok(clean.then_some(()))
    };
    wait_for("everything of the killed sidecar to be gone", SOON, gone).unwrap();
    light.must_answer(&other);
    let again = heavy.start(&broker, "doomed");
    heavy.must_answer(&again);
}

#[test]
fn sigterm_lets_requests_in_flight_end_at_the_broker_and_at_a_sidecar() {
    // Each takes so long that the first is not answered before the last has come, and all fit into the slab.
    const REQUESTS: usize = 3;
    const ROWS: u64 = 512;
    let folder = tempfile::tempdir().unwrap();
    let mut broker = broker(&["64MiB"], &[]);
    let known = Known::new(folder.path(), "draining", &models::matmul_chain(SIZE, 8, 1), ROWS, 1);
    for whom in ["sidecar", "broker"] {
        let mut sidecar = known.start(&broker, "draining");
        let (address, answered) = (sidecar.address(), AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..REQUESTS {
                scope.spawn(|| {
                    let outcome = known.request.send(&mut faaswap_tests::http::Client::new(address, PATIENCE));
                    match outcome.expect("a draining program answers what it has taken") {
                        Outcome::Answered(answer) => {
                            assert_eq!(compare(&known.expected, &answer.outputs), None);
                            answered.fetch_add(1, Ordering::Relaxed);
                        }
                        Outcome::Refused(status, why) => assert_eq!(status, 503, "{why}"),
                    }
                });
            }
            let in_flight = || Ok((broker.metric("faaswap_requests_in_flight")? >= 3.0).then_some(()));
            wait_for("all requests to be in flight", SOON, in_flight).unwrap();
            let process = if whom == "sidecar" { sidecar.process() } else { broker.process() };
            process.signal(Signal::TERM).unwrap();
        });
        assert_eq!(answered.into_inner(), REQUESTS, "all were taken before the {whom} was told to end");
        let process = if whom == "sidecar" { sidecar.process() } else { broker.process() };
        let status = process.wait(SOON).unwrap();
        assert!(status.success(), "{whom} ended with {status}");
    }
}

#[test]
fn six_functions_swap_over_two_devices_that_hold_one_each_and_no_answer_is_wrong() {
    const FUNCTIONS: usize = 6;
    const ROUNDS: usize = 25;
    let folder = tempfile::tempdir().unwrap();
    let broker = broker(&["5MiB", "5MiB"], &["verify_every = 1"]);
    let names: Vec<_> = (0..FUNCTIONS).map(|i| format!("swap/{i}")).collect();
    let known: Vec<_> = names
        .iter()
        .zip(1..)
        .map(|(name, seed)| Known::new(folder.path(), name, &models::matmul(SIZE, seed), 2, seed))
        .collect();
    let sidecars: Vec<_> = known.iter().zip(&names).map(|(known, name)| known.start(&broker, name)).collect();
    thread::scope(|scope| {
        for seed in 0..4 {
            let (known, sidecars) = (&known, &sidecars);
            scope.spawn(move || {
                let mut random = Random::new(seed);
                for _ in 0..ROUNDS {
                    let at = random.below(FUNCTIONS);
                    known[at].must_answer(&sidecars[at]);
                }
            });
        }
    });
    let swaps = broker.metric("faaswap_swaps_in_total").unwrap();
    assert!(swaps >= 6.0, "six models cannot have been on two devices with {swaps} swap-ins");
    assert!(broker.metric("faaswap_weights_verified").unwrap() >= 1.0, "weights were read back");
    assert_eq!(broker.metric("faaswap_weights_damaged").unwrap(), 0.0);
    let devices = broker.admin("/v1/devices").unwrap();
    for device in devices.as_array().unwrap() {
        assert!(device["charged_bytes"].as_u64() <= device["capacity_bytes"].as_u64(), "{device}");
    }
}

#[test]
fn functions_with_the_same_weights_share_one_copy() {
    let folder = tempfile::tempdir().unwrap();
    let broker = broker(&["16MiB"], &[]);
    let first = Known::new(folder.path(), "first", &models::matmul(SIZE, 1), 1, 1);
    let second = Known::of_file(first.model.clone(), "second", 1, 2);
    let (one, two) = (first.start(&broker, "first"), second.start(&broker, "second"));
    first.must_answer(&one);
    second.must_answer(&two);
    let models = broker.admin("/v1/models").unwrap();
    let models = models.as_array().unwrap();
    assert_eq!(models.len(), 1, "{models:?}");
    assert_eq!(models[0]["functions"], 2);
    let weights = models[0]["weights_bytes"].as_u64().unwrap();
    assert_eq!(weights, SIZE * SIZE * 4);
    let device = &broker.admin("/v1/devices").unwrap()[0];
    let mapped = device["mapped_bytes"].as_u64().unwrap();
    assert!((weights..2 * weights).contains(&mapped), "one copy of {weights} bytes, but {mapped} are mapped");
    let on_host = broker.metric("faaswap_host_weights_bytes").unwrap();
    assert!((4_194_304.0..2.0 * 4_194_304.0).contains(&on_host), "{on_host} bytes in host memory");
}

/// Model files that no broker can serve, each with a word of the reason that must be given.
fn hostile_files(folder: &Path) -> Vec<(&'static str, PathBuf, &'static str)> {
    let good = models::matmul(SIZE, 1).encode_to_vec();
    let external = |location: &str| {
        let mut model = models::matmul(SIZE, 1);
        model.graph.as_mut().unwrap().initializer[0].set_external(location, 0, SIZE * SIZE * 4);
        model.encode_to_vec()
    };
    let changed = |change: fn(&mut ModelProto)| {
        let mut model = models::matmul(SIZE, 1);
        change(&mut model);
        model.encode_to_vec()
    };
    let cyclic = changed(|model| {
        let graph = model.graph.as_mut().unwrap();
        graph.node = vec![models::node("Add", &["x", "b"], "a"), models::node("Add", &["a", "w"], "b")];
        graph.output[0].name = Some("b".to_owned());
    });
    let huge = changed(|model| model.graph.as_mut().unwrap().initializer[0].dims = vec![i64::MAX, i64::MAX]);
    let text = changed(|model| {
        let tensor = &mut model.graph.as_mut().unwrap().initializer[0];
        tensor.data_type = Some(element::STRING);
    });
    let files = [
        ("truncated", good[..good.len() / 2].to_vec(), "no ONNX model"),
        ("no-model", b"#!/bin/sh\nexec nothing\n".to_vec(), "no ONNX model"),
        ("cyclic", cyclic, "cycle"),
        ("huge-dims", huge, "no possible size"),
        ("text-weights", text, "string"),
        ("missing-data", external("nowhere.bin"), "nowhere.bin"),
        ("outside-data", external("../../../../etc/hostname"), "etc/hostname"),
        ("too-large", models::matmul_chain(SIZE, 6, 1).encode_to_vec(), "24.0 MiB"),
    ];
    let write = |(name, bytes, word): (&'static str, Vec<u8>, &'static str)| {
        let path = folder.join(format!("{name}.onnx"));
        fs::write(&path, bytes).unwrap();
        (name, path, word)
    };
    files.into_iter().map(write).collect()
}

#[test]
fn hostile_models_are_refused_with_the_reason_and_the_others_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let broker = broker(&["16MiB"], &[]);
    let known = Known::new(folder.path(), "good", &models::matmul(SIZE, 1), 1, 1);
    let good = known.start(&broker, "good");
    for (name, path, word) in hostile_files(folder.path()) {
        let mut sidecar = Sidecar::start(&broker, &SidecarOptions::new(name, &path, SLO_MS)).unwrap();
        let (address, page) = (sidecar.address(), "/v2/health/ready");
        let reason = sidecar.process().wait_for("a refusal", SOON, || {
            let reply = faaswap_tests::http::Client::new(address, PATIENCE).get(page).ok()?;
            assert_ne!(reply.status, 200, "{name} is served");
            Some(reply.text()).filter(|text| text.contains("declined"))
        });
        let reason = reason.unwrap();
        println!("{name}: {reason}");
        assert!(reason.contains(word), "{name}: `{word}` is missing in {reason}");
        match known.request.send(&mut sidecar.client(PATIENCE)).unwrap() {
            Outcome::Refused(404 | 503, _) => {}
            other @ (Outcome::Answered(_) | Outcome::Refused(..)) => panic!("{name}: {other:?}"),
        }
        known.must_answer(&good);
    }
}
