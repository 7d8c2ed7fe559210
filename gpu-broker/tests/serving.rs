//! What a well-behaved peer may rely on.

#![allow(
    clippy::unwrap_used,
    clippy::cast_sign_loss,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::wildcard_enum_match_arm,
    clippy::needless_pass_by_value,
    clippy::type_complexity,
    reason = "tests"
)]

mod common;

use std::{collections::BTreeSet, fs, time::Duration};

use common::{Broker, Client, digest, model::Linear, spec, wait_for};
use faaswap_protocol::{CallId, FromBroker, FunctionId, FunctionSpec, Refusal, Tf32, ToBroker};

const TWO_SMALL_DEVICES: &str = "[[device]]\nmemory = \"1MiB\"\nchunk = \"64KiB\"\nlink_mib_per_s = 200\n\
                                 [[device]]\nmemory = \"768KiB\"\nchunk = \"64KiB\"\nlanes = 2";
const ONE_SLOW_LINK: &str = "[[device]]\nmemory = \"8MiB\"\nchunk = \"64KiB\"\nlink_mib_per_s = 2";

#[test]
fn every_answer_is_right_while_more_models_than_fit_swap_over_two_devices() {
    let broker = Broker::start(TWO_SMALL_DEVICES);
    let models: Vec<_> = (0..10).map(|seed| Linear { size: 256, seed }).collect();
    let mut client = Client::greeted(&broker);
    let functions: Vec<_> = models
        .iter()
        .map(|model| client.register_file(&format!("f{}", model.seed), &model.write(broker.dir.path())).unwrap())
        .collect();
    let mut residencies = BTreeSet::new();
    for round in 0..300 {
        let which = (round * 7 + round / 10) % models.len();
        for repeat in 0..2 {
            let input = models[which].input(round + repeat);
            client.ask(functions[which], &[1, 256], &input);
            let answer = client.answer().1.unwrap();
            assert_eq!(answer.floats(), models[which].expected(&input), "round {round}");
            residencies.insert(answer.timing.was_resident);
        }
        for device in broker_devices(&broker, round) {
            assert!(device.0 <= device.1, "{device:?}");
        }
    }
    assert_eq!(residencies.len(), 2, "some were resident, some were swapped in");
    assert!(swaps_in(&broker) >= 10.0, "ten models need as many swap-ins at least");
}

#[test]
fn a_function_is_served_once_it_is_bound_to_one_device_and_bound_to_the_others_meanwhile() {
    let broker = Broker::start(TWO_SMALL_DEVICES);
    let mut client = Client::greeted(&broker);
    let models: Vec<_> = (0..4).map(|seed| Linear { size: 64, seed }).collect();
    for model in &models {
        client.say(&ToBroker::Hurry { call: CallId(u32::MAX) }, &[]);
        let function = client.register_file(&format!("f{}", model.seed), &model.write(broker.dir.path())).unwrap();
        let input = model.input(1);
        client.ask(function, &[1, 64], &input);
        assert_eq!(client.answer().1.unwrap().floats(), model.expected(&input));
    }
    let bound = || -> Vec<usize> {
        let models = broker.get("/v1/models");
        models.as_array().unwrap().iter().map(|model| model["bound"].as_array().unwrap().len()).collect()
    };
    wait_for("all models are bound to both devices", || bound() == [2; 4]);
    for (number, model) in models.iter().enumerate() {
        let input = model.input(2);
        let function = FunctionId(u32::try_from(number).unwrap() + 1);
        client.ask(function, &[1, 64], &input);
        assert_eq!(client.answer().1.unwrap().floats(), model.expected(&input));
    }
}

#[test]
fn functions_that_come_after_a_device_was_lost_are_served_by_the_other() {
    // One in a worker would come back.
    let broker = Broker::start(&format!("workers = \"off\"\ntest_faults = true\n{TWO_SMALL_DEVICES}"));
    assert_eq!(broker.post("/v1/devices/host0/fail").0, 200);
    let mut client = Client::greeted(&broker);
    for seed in 0..4 {
        let model = Linear { size: 64, seed };
        let function = client.register_file(&format!("f{seed}"), &model.write(broker.dir.path())).unwrap();
        let input = model.input(1);
        client.ask(function, &[1, 64], &input);
        assert_eq!(client.answer().1.unwrap().floats(), model.expected(&input));
    }
    let models = broker.get("/v1/models");
    assert!(models.as_array().unwrap().iter().all(|model| model["bound"] == serde_json::json!(["host1"])), "{models}");
}

#[test]
fn hints_change_no_answer_whoever_gives_them_and_however_many() {
    let broker = Broker::start(TWO_SMALL_DEVICES);
    let model = Linear { size: 128, seed: 3 };
    let mut client = Client::greeted(&broker);
    let function = client.register_file("hinted", &model.write(broker.dir.path())).unwrap();
    let input = model.input(1);
    for hints in [0, 1, 500] {
        for _ in 0..hints {
            client.say(&ToBroker::Expect { function, soon: hints == 1 }, &[]);
            client.say(&ToBroker::Expect { function: FunctionId(u32::MAX), soon: true }, &[]);
        }
        client.ask(function, &[1, 128], &input);
        assert_eq!(client.answer().1.unwrap().floats(), model.expected(&input), "after {hints} hints");
    }
    let mut stranger = Client::greeted(&broker);
    stranger.say(&ToBroker::Expect { function, soon: false }, &[]);
    assert!(stranger.is_served());
}

#[test]
fn a_hint_brings_weights_before_their_request_and_the_decision_says_so() {
    let broker = Broker::start(TWO_SMALL_DEVICES);
    let model = Linear { size: 256, seed: 4 };
    let mut client = Client::greeted(&broker);
    let function = client.register_file("hinted", &model.write(broker.dir.path())).unwrap();
    assert!(broker.get("/v1/models")[0]["on"].as_array().unwrap().is_empty(), "nobody has asked yet");
    client.say(&ToBroker::Expect { function, soon: false }, &[]);
    wait_for("the weights are brought", || swaps_in(&broker) >= 1.0);
    let input = model.input(1);
    client.ask(function, &[1, 256], &input);
    let answer = client.answer().1.unwrap();
    assert_eq!(answer.floats(), model.expected(&input));
    assert!(answer.timing.was_resident);
    let decisions = broker.get("/v1/decisions");
    let choices: Vec<_> = decisions.as_array().unwrap().iter().map(|d| d["choice"].as_str().unwrap()).collect();
    assert_eq!(choices, ["bring_ahead", "run"], "{decisions}");
    assert_eq!((&decisions[1]["function"], &decisions[0]["from"]), (&"hinted".into(), &"host".into()), "{decisions}");
}

#[test]
fn another_policy_may_be_chosen_while_requests_come_where_policies_are_compared() {
    let plain = Broker::start(TWO_SMALL_DEVICES);
    assert_eq!(plain.post("/v1/policy/lru").0, 404, "whoever reads metrics may not");
    let broker = Broker::start(&format!("test_faults = true\n{TWO_SMALL_DEVICES}"));
    let model = Linear { size: 64, seed: 5 };
    let mut client = Client::greeted(&broker);
    let function = client.register_file("decided", &model.write(broker.dir.path())).unwrap();
    let input = model.input(1);
    for policy in ["lru", "random", "faaswap"] {
        assert_eq!(broker.post(&format!("/v1/policy/{policy}")), (200, format!("{policy} decides\n")));
        client.ask(function, &[1, 64], &input);
        assert_eq!(client.answer().1.unwrap().floats(), model.expected(&input));
    }
    let (status, said) = broker.post("/v1/policy/best");
    assert_eq!(status, 400);
    assert!(said.contains("`best`") && said.contains("faaswap, torpor, lru, fifo, random"), "{said}");
}

/// Swap-ins on all devices.
fn swaps_in(broker: &Broker) -> f64 {
    ["host0", "host1"].map(|name| broker.metric(&format!("faaswap_swaps_in_total{{device=\"{name}\"}}"))).iter().sum()
}

/// Mapped bytes and capacity of each device, now and then.
fn broker_devices(broker: &Broker, round: usize) -> Vec<(u64, u64)> {
    if !round.is_multiple_of(50) {
        return Vec::new();
    }
    let devices = broker.get("/v1/devices");
    let number = |device: &serde_json::Value, key: &str| device[key].as_u64().unwrap();
    devices.as_array().unwrap().iter().map(|d| (number(d, "mapped_bytes"), number(d, "capacity_bytes"))).collect()
}

#[test]
fn requests_of_many_connections_are_answered_in_any_order_each_with_its_own_outputs() {
    let broker = Broker::start(TWO_SMALL_DEVICES);
    std::thread::scope(|scope| {
        for seed in 0..6 {
            let broker = &broker;
            scope.spawn(move || {
                let model = Linear { size: 128, seed };
                let mut client = Client::inline(broker);
                let function = client.register_file(&format!("f{seed}"), &model.write(broker.dir.path())).unwrap();
                for round in 0..20 {
                    let asked: Vec<_> = (0..8)
                        .map(|i| (client.ask(function, &[1, 128], &model.input(round * 8 + i)), round * 8 + i))
                        .collect();
                    let mut open: BTreeSet<_> = asked.iter().map(|(id, _)| *id).collect();
                    while !open.is_empty() {
                        let (id, answer) = client.answer();
                        assert!(open.remove(&id), "answered twice");
                        let salt = asked.iter().find(|(asked, _)| *asked == id).unwrap().1;
                        assert_eq!(answer.unwrap().floats(), model.expected(&model.input(salt)));
                    }
                }
            });
        }
    });
}

#[test]
fn functions_with_the_same_weights_share_one_copy_in_host_memory_and_on_a_device() {
    let broker = Broker::start("[[device]]\nmemory = \"1MiB\"\nchunk = \"64KiB\"");
    let model = Linear { size: 256, seed: 1 };
    let file = model.write(broker.dir.path());
    let mut client = Client::greeted(&broker);
    for name in ["a", "b", "c"] {
        let function = client.register_file(name, &file).unwrap();
        client.ask(function, &[1, 256], &model.input(0));
        assert_eq!(client.answer().1.unwrap().floats(), model.expected(&model.input(0)));
    }
    let models = broker.get("/v1/models");
    assert_eq!(models.as_array().unwrap().len(), 1);
    assert_eq!(models[0]["functions"], 3);
    assert_eq!(broker.get("/v1/devices")[0]["mapped_bytes"], 256 * 256 * 4);
    assert_eq!(broker.metric("faaswap_host_weights_bytes"), 256.0 * 256.0 * 4.0);
    assert_eq!(broker.metric("faaswap_swaps_in_total{device=\"host0\"}"), 1.0);
}

#[test]
fn on_host_devices_functions_share_a_model_whatever_they_say_of_tf32_and_are_answered_the_same() {
    let mut broker = Broker::start("[[device]]\nmemory = \"1MiB\"\nchunk = \"64KiB\"");
    let model = Linear { size: 256, seed: 9 };
    let file = model.write(broker.dir.path());
    let all = [("node", Tf32::Node), ("off", Tf32::Off), ("on", Tf32::On)];
    for restarted in [false, true] {
        if restarted {
            broker.kill_and_restart();
        }
        let mut client = Client::greeted(&broker);
        for (salt, (name, tf32)) in all.into_iter().enumerate() {
            let spec = FunctionSpec { tf32, ..spec(name, digest(&file)) };
            let (function, _) = client.register(&spec, &[("model.onnx", &file)]).unwrap();
            client.ask(function, &[1, 256], &model.input(salt));
            assert_eq!(client.answer().1.unwrap().floats(), model.expected(&model.input(salt)), "{name}");
        }
        let (functions, models) = (broker.get("/v1/functions"), broker.get("/v1/models"));
        for (index, (name, _)) in all.iter().enumerate() {
            assert_eq!((&functions[index]["name"], &functions[index]["tf32"]), (&(*name).into(), &(*name).into()));
        }
        assert_eq!((models.as_array().unwrap().len(), &models[0]["functions"]), (1, &3.into()), "{models}");
        assert!(models[0].as_object().unwrap()["tf32"].is_null(), "{models}");
        assert_eq!(broker.metric("faaswap_host_weights_bytes"), 256.0 * 256.0 * 4.0);
    }
}

#[test]
fn a_cancelled_request_gets_its_one_refusal_and_the_others_their_answers() {
    let broker = Broker::start(ONE_SLOW_LINK);
    let model = Linear { size: 512, seed: 1 };
    let mut client = Client::greeted(&broker);
    let function = client.register_file("f", &model.write(broker.dir.path())).unwrap();
    // The first waits for its weights for half a second, the others for the first.
    let asked: Vec<_> = (0..3).map(|_| client.ask(function, &[1, 512], &model.input(0))).collect();
    client.say(&ToBroker::Cancel { request: asked[1] }, &[]);
    let (first, refusal) = client.answer();
    assert_eq!((first, refusal.err()), (asked[1], Some(Refusal::Cancelled)));
    for _ in 0..2 {
        assert_eq!(client.answer().1.unwrap().floats(), model.expected(&model.input(0)));
    }
    assert!(client.is_served());
}

#[test]
fn a_request_refused_for_its_shape_says_what_was_expected() {
    let broker = Broker::start("[[device]]\nmemory = \"1MiB\"\nchunk = \"64KiB\"");
    let model = Linear { size: 64, seed: 1 };
    let mut client = Client::greeted(&broker);
    let function = client.register_file("f", &model.write(broker.dir.path())).unwrap();
    client.ask(function, &[1, 65], &[0.0; 65]);
    let refusal = client.answer().1.err().unwrap();
    assert!(refusal.to_string().contains("x FP32[-1,64] is expected, FP32 [1,65] came"), "{refusal}");
    client.ask(FunctionId(99), &[1, 64], &[0.0; 64]);
    assert_eq!(client.answer().1.err(), Some(Refusal::UnknownFunction));
    client.ask(function, &[2, 64], &[0.0; 128]);
    assert_eq!(client.answer().1.unwrap().floats().len(), 128, "any batch is accepted");
}

#[test]
fn a_peer_that_goes_leaves_nothing_behind() {
    let broker = Broker::start(ONE_SLOW_LINK);
    let model = Linear { size: 512, seed: 1 };
    let file = model.write(broker.dir.path());
    let mut client = Client::greeted(&broker);
    let function = client.register_file("f", &file).unwrap();
    for _ in 0..20 {
        client.ask(function, &[1, 512], &model.input(0));
    }
    assert!(client.is_served(), "all frames have been read");
    drop(client);
    wait_for("the function to be gone", || broker.get("/v1/functions").as_array().unwrap().is_empty());
    wait_for("its requests to be gone", || broker.metric("faaswap_requests_in_flight") == 0.0);
    assert_eq!(broker.metric("faaswap_requests_waiting"), 0.0);
    let mut next = Client::greeted(&broker);
    let function = next.register_file("f", &file).unwrap();
    next.ask(function, &[1, 512], &model.input(3));
    assert_eq!(next.answer().1.unwrap().floats(), model.expected(&model.input(3)));
}

#[test]
fn a_broker_that_is_asked_to_end_answers_what_it_has_and_takes_nothing_new() {
    let mut broker = Broker::start(ONE_SLOW_LINK);
    let model = Linear { size: 512, seed: 1 };
    let mut client = Client::greeted(&broker);
    let function = client.register_file("f", &model.write(broker.dir.path())).unwrap();
    let early = client.ask(function, &[1, 512], &model.input(0));
    assert!(client.is_served());
    broker.terminate();
    while client.hear() != FromBroker::Draining {}
    let late = client.ask(function, &[1, 512], &model.input(0));
    let mut answers = [client.answer(), client.answer()];
    answers.sort_by_key(|(id, _)| *id);
    let [(first, answer), (second, refusal)] = answers;
    assert_eq!((first, second), (early, late));
    assert_eq!(answer.unwrap().floats(), model.expected(&model.input(0)));
    assert_eq!(refusal.err(), Some(Refusal::Draining));
    assert!(client.try_hear().is_none(), "the connection ends");
    assert!(broker.wait().success());
    assert!(!broker.socket().exists());
}

#[test]
fn after_a_restart_a_model_is_served_without_being_sent_again() {
    let mut broker = Broker::start("[[device]]\nmemory = \"1MiB\"\nchunk = \"64KiB\"");
    let model = Linear { size: 64, seed: 1 };
    let file = model.write(broker.dir.path());
    Client::greeted(&broker).register_file("f", &file).unwrap();
    broker.kill_and_restart();
    let mut client = Client::greeted(&broker);
    // Without files: an upload would fail.
    let (function, _) = client.register(&spec("f", digest(&file)), &[]).unwrap();
    client.ask(function, &[1, 64], &model.input(0));
    assert_eq!(client.answer().1.unwrap().floats(), model.expected(&model.input(0)));
}

#[test]
fn a_model_that_nobody_uses_is_unloaded_and_can_come_back() {
    let broker = Broker::start("keep_warm = \"1ms\"\n[[device]]\nmemory = \"1MiB\"\nchunk = \"64KiB\"");
    let model = Linear { size: 64, seed: 1 };
    let file = model.write(broker.dir.path());
    for _ in 0..2 {
        let mut client = Client::greeted(&broker);
        let function = client.register_file("f", &file).unwrap();
        client.ask(function, &[1, 64], &model.input(0));
        assert_eq!(client.answer().1.unwrap().floats(), model.expected(&model.input(0)));
        drop(client);
        wait_for("the model to be unloaded", || broker.get("/v1/models").as_array().unwrap().is_empty());
        assert_eq!(broker.get("/v1/devices")[0]["mapped_bytes"], 0);
    }
}

#[test]
fn a_late_request_is_refused_where_the_function_prefers_that() {
    let broker = Broker::start(ONE_SLOW_LINK);
    let model = Linear { size: 512, seed: 1 };
    let file = model.write(broker.dir.path());
    let mut client = Client::greeted(&broker);
    let mut strict = spec("f", digest(&file));
    strict.late = faaswap_protocol::Late::Refuse;
    let (function, _) = client.register(&strict, &[("model.onnx", &file)]).unwrap();
    client.ask(function, &[1, 512], &model.input(0));
    let late = client.ask_in(function, &[1, 512], &model.input(0), Some(Duration::from_millis(1)));
    let (first, refusal) = client.answer();
    assert_eq!(first, late);
    // Whether it has passed, or only cannot be met any more, is a matter of microseconds.
    let passed = |why: &Refusal| matches!(why, Refusal::DeadlinePassed { .. } | Refusal::DeadlineUnreachable { .. });
    assert!(refusal.as_ref().is_err_and(passed));
    assert!(client.answer().1.is_ok());
}

#[test]
fn a_slab_that_is_full_of_unread_outputs_refuses_and_recovers() {
    let broker = Broker::start("[[device]]\nmemory = \"1MiB\"\nchunk = \"64KiB\"");
    let model = Linear { size: 64, seed: 1 };
    let mut client = Client::greeted(&broker);
    let function = client.register_file("f", &model.write(broker.dir.path())).unwrap();
    // 4 MiB of response slab hold three outputs of 1.25 MiB.
    let rows = 5 * 1024;
    let input: Vec<f32> = (0..rows).flat_map(|_| model.input(0)).collect();
    let mut unread = Vec::new();
    let refusal = loop {
        client.ask(function, &[rows as u64, 64], &input);
        match client.hear() {
            FromBroker::Answer { request, .. } => unread.push(request),
            FromBroker::Refused { refusal, .. } => break refusal,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(unread.len(), 3);
    assert!(matches!(refusal, Refusal::SlabFull { .. }), "{refusal}");
    for request in unread {
        client.say(&ToBroker::Release { request }, &[]);
    }
    client.ask(function, &[rows as u64, 64], &input);
    assert_eq!(client.answer().1.unwrap().floats()[..64], model.expected(&model.input(0)));
}

#[test]
fn a_second_broker_does_not_take_the_socket_of_a_living_one() {
    let broker = Broker::start("[[device]]\nmemory = \"1MiB\"\nchunk = \"64KiB\"");
    let config = broker.dir.path().join("second.toml");
    let text = fs::read_to_string(broker.dir.path().join("faaswap.toml")).unwrap();
    fs::write(&config, text.replace("/memory\"", "/memory2\"").replace("/store\"", "/store2\"")).unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_faaswap-broker"))
        .args(["serve", "--config"])
        .arg(&config)
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("another broker is listening"));
    assert!(Client::greeted(&broker).is_served());
}

#[test]
fn mistakes_in_the_configuration_end_with_64_and_all_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("bad.toml");
    fs::write(&config, "host_memory = \"much\"\nonnxruntime = \"/nowhere\"\ncolour = 1").unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_faaswap-broker"))
        .args(["serve", "--config"])
        .arg(&config)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(64));
    let said = String::from_utf8_lossy(&output.stderr);
    for word in ["3 mistake(s)", "host_memory", "/nowhere", "colour is no setting"] {
        assert!(said.contains(word), "{word} in {said}");
    }
}
