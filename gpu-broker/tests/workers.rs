//! Devices in processes of their own: they serve as those of the broker's own process do, and their faults are nobody else's.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::{
    collections::BTreeSet,
    fs,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use common::{Broker, Client, model::Linear, wait_for};
use faaswap_protocol::{FunctionId, Refusal};
use rustix::process::{Pid, Signal, kill_process};

/// Room for three models of size 256 each.
const TWO_WORKERS: &str = "workers = \"on\"\ntest_faults = true\n\
    [[device]]\nname = \"host0\"\nkind = \"host\"\nmemory = \"1MiB\"\nchunk = \"64KiB\"\n\
    [[device]]\nname = \"host1\"\nkind = \"host\"\nmemory = \"1MiB\"\nchunk = \"64KiB\"";

const SIZE: usize = 256;

fn models(count: usize) -> Vec<Linear> {
    (0..count).map(|seed| Linear { size: SIZE, seed }).collect()
}

fn register(client: &mut Client, broker: &Broker, models: &[Linear]) -> Vec<FunctionId> {
    let path = broker.dir.path();
    models.iter().map(|m| client.register_file(&format!("f{}", m.seed), &m.write(path)).unwrap()).collect()
}

/// Processes of the broker's that have a device each.
fn workers(broker: &Broker) -> BTreeSet<i32> {
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", broker.id())).unwrap_or_default();
    let of_threads = fs::read_dir(format!("/proc/{}/task", broker.id())).unwrap().filter_map(Result::ok);
    let of_threads = of_threads.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let all = of_threads.chain([children]).collect::<Vec<_>>().join(" ");
    all.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

fn lost(broker: &Broker) -> Vec<bool> {
    broker.get("/v1/devices").as_array().unwrap().iter().map(|device| device["lost"] == true).collect()
}

fn all_are_bound_to_both(broker: &Broker) -> bool {
    let models = broker.get("/v1/models");
    models.as_array().unwrap().iter().all(|model| model["bound"].as_array().unwrap().len() == 2)
}

/// Asks until it is answered; only refusals for the fault may come before.
fn ask_through_a_fault(client: &mut Client, model: &Linear, function: FunctionId, seed: usize) {
    let input = model.input(seed);
    loop {
        client.ask(function, &[1, SIZE as u64], &input);
        match client.answer().1 {
            Ok(answer) => return assert_eq!(answer.floats(), model.expected(&input)),
            Err(refusal) => assert_eq!(refusal, Refusal::HardwareFault),
        }
    }
}

#[test]
fn models_that_do_not_fit_at_once_are_swapped_between_two_workers_and_answer_right() {
    let broker = Broker::start(TWO_WORKERS);
    assert_eq!(workers(&broker).len(), 2);
    let mut client = Client::greeted(&broker);
    let models = models(10);
    let functions = register(&mut client, &broker, &models);
    for round in 0..60 {
        let which = (round * 7) % models.len();
        let input = models[which].input(round);
        client.ask(functions[which], &[1, SIZE as u64], &input);
        assert_eq!(client.answer().1.unwrap().floats(), models[which].expected(&input), "round {round}");
    }
    let mapped = broker.get("/v1/devices");
    let mapped: Vec<_> = mapped.as_array().unwrap().iter().map(|d| d["mapped_bytes"].as_u64().unwrap()).collect();
    assert!(mapped.iter().all(|bytes| (1..=1 << 20).contains(bytes)), "{mapped:?}");
}

#[test]
fn weights_that_come_from_disk_are_followed_by_workers() {
    const LARGE: usize = 1024;
    // Two models' weights of 4 MiB in host memory, three on each device.
    let devices = TWO_WORKERS.replace("memory = \"1MiB\"", "memory = \"12MiB\"");
    let broker = Broker::start(&format!("host_memory = \"9MiB\"\n{devices}"));
    let mut client = Client::greeted(&broker);
    let models: Vec<_> = (0..9).map(|seed| Linear { size: LARGE, seed }).collect();
    let functions = register(&mut client, &broker, &models);
    for round in 0..27 {
        let which = (round * 4) % models.len();
        let input = models[which].input(round);
        client.ask(functions[which], &[1, LARGE as u64], &input);
        assert_eq!(client.answer().1.unwrap().floats(), models[which].expected(&input), "round {round}");
    }
    let from_disk = broker.metric("faaswap_weights_read_bytes_total");
    // All but the two that host memory has room for, at least; how often each depends on which stay on the devices.
    assert!(from_disk >= f64::from((7 * 4) << 20), "{from_disk} bytes came from disk");
}

#[test]
fn a_device_that_fails_costs_no_other_anything_and_comes_back_by_itself() {
    let mut broker = Broker::start(TWO_WORKERS);
    let models = models(4);
    let mut client = Client::greeted(&broker);
    let functions = register(&mut client, &broker, &models);
    wait_for("all models are bound to both", || all_are_bound_to_both(&broker));
    for fault in 0..3 {
        let before = workers(&broker);
        let failed = AtomicBool::new(false);
        thread::scope(|scope| {
            let (broker, failed, models) = (&broker, &failed, &models);
            // Each of these asks one function over a connection of its own, from before the fault until long after it.
            for model in models {
                scope.spawn(move || {
                    let mut client = Client::greeted(broker);
                    let file = model.write(broker.dir.path());
                    let function = client.register_file(&format!("f{}", model.seed), &file).unwrap();
                    let mut left = 50;
                    for seed in 0.. {
                        ask_through_a_fault(&mut client, model, function, seed);
                        left -= i32::from(failed.load(Ordering::SeqCst));
                        if left == 0 {
                            return;
                        }
                    }
                });
            }
            if fault < 2 {
                assert_eq!(broker.post("/v1/devices/host0/fail").0, 200);
            } else {
                let victim = before.iter().next().and_then(|&pid| Pid::from_raw(pid)).unwrap();
                kill_process(victim, Signal::KILL).unwrap();
            }
            failed.store(true, Ordering::SeqCst);
        });
        wait_for("another process has the device", || {
            let now = workers(&broker);
            now.len() == 2 && now != before && lost(&broker) == [false; 2]
        });
        wait_for("all models are bound to both again", || all_are_bound_to_both(&broker));
        assert!(broker.is_alive());
        // The connection from before all faults is as it was.
        for (model, function) in models.iter().zip(&functions) {
            ask_through_a_fault(&mut client, model, *function, 7);
        }
    }
}

#[test]
fn workers_end_with_their_broker_however_it_ends() {
    let mut broker = Broker::start(TWO_WORKERS);
    let first = workers(&broker);
    broker.kill_and_restart();
    let is_gone = |pid: &i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z ")
    };
    wait_for("workers of a broker that was killed end", || first.iter().all(is_gone));
    let second = workers(&broker);
    assert!(second.is_disjoint(&first) && second.len() == 2);
    broker.terminate();
    assert!(broker.wait().success());
    wait_for("workers of a broker that has ended end", || second.iter().all(is_gone));
}

#[test]
fn a_device_that_cannot_be_opened_is_told_by_its_name() {
    let refused =
        Broker::refused("workers = \"on\"\n[[device]]\nname = \"huge\"\nkind = \"host\"\nmemory = \"1000000GiB\"");
    assert!(refused.contains("device huge") && !refused.contains("panicked"), "{refused}");
}
