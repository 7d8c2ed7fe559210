//! A broker's trace replays; one that was changed does not; one that was cut off replays as far as it goes.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use common::{Broker, Client, model::Linear};
use faaswap_protocol::ToBroker;
use faaswap_scheduler::{
    PolicyKind, Scheduler,
    trace::{Line, Reader, VERSION, Writer},
};

const RECORDED: &str = "trace = \"{dir}/trace\"\n[[device]]\nmemory = \"512KiB\"\nchunk = \"64KiB\"\nlink_mib_per_s = 50\n\
                        [[device]]\nmemory = \"512KiB\"\nchunk = \"64KiB\"\nlanes = 2";

/// Serves requests of five functions, more than fit, some of them cancelled; the broker and its trace.
fn recorded() -> (Broker, PathBuf) {
    let broker = Broker::start(RECORDED);
    let models: Vec<_> = (0..5).map(|seed| Linear { size: 256, seed }).collect();
    let mut client = Client::greeted(&broker);
    let files: Vec<_> = models.iter().map(|model| model.write(broker.dir.path())).collect();
    let functions: Vec<_> =
        files.iter().enumerate().map(|(n, file)| client.register_file(&format!("f{n}"), file).unwrap()).collect();
    let input = models[0].input(1);
    for round in 0..40 {
        let asked: Vec<_> = (0..4).map(|n| client.ask(functions[(round + n * n) % 5], &[1, 256], &input)).collect();
        if round % 8 == 0 {
            client.say(&ToBroker::Cancel { request: asked[3] }, &[]);
        }
        // Cancelled or answered: one way or the other.
        asked.iter().for_each(|_| drop(client.answer()));
    }
    client.say(&ToBroker::Unregister { function: functions[4] }, &[]);
    assert!(client.is_served());
    let trace = broker.dir.path().join("trace");
    (broker, trace)
}

/// What the program says of a trace, and with which code it ends.
fn replayed(trace: &Path) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_faaswap-broker")).arg("replay").arg(trace).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(said).unwrap())
}

fn number_before(said: &str, what: &str) -> u64 {
    let (before, _) = said.split_once(what).unwrap_or_else(|| panic!("{what} in {said}"));
    before.rsplit([' ', '\n']).next().unwrap().parse().unwrap()
}

#[test]
fn a_broker_s_trace_replays_and_what_was_changed_in_it_is_found() {
    let (mut broker, trace) = recorded();
    broker.terminate();
    assert!(broker.wait().success());
    let (code, said) = replayed(&trace);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(number_before(&said, " requests: "), 160, "{said}");
    assert!(number_before(&said, " swap-ins,") >= 5 && said.contains("f3: 32 requests, "), "{said}");
    assert_eq!(number_before(&said, " are open"), 0, "also of those that have shared a run: {said}");
    assert!(number_before(&said, " were refused") <= 5, "no more than were cancelled: {said}");
    assert!(said.contains("the recording was stopped") && said.contains("decided as they were recorded"), "{said}");

    let log = fs::read_to_string(broker.dir.path().join("broker.log")).unwrap();
    assert!(!log.contains("could not be swapped in"), "models that are leaving are left alone until they have left");

    let text = fs::read_to_string(&trace).unwrap();
    let other = trace.with_file_name("other");
    let arrived = text.lines().position(|line| line.contains(" arrived ")).unwrap();
    let earlier = |line: &str| format!("1{line}\n");
    let changed =
        text.lines().enumerate().map(|(n, line)| if n == arrived { earlier(line) } else { format!("{line}\n") });
    fs::write(&other, changed.collect::<String>()).unwrap();
    let (code, said) = replayed(&other);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains(&format!("line {} was changed", arrived + 1)), "{said}");

    fs::write(&other, decided_by(PolicyKind::Random { seed: 3 }, &text)).unwrap();
    let (code, said) = replayed(&other);
    assert_eq!(code, Some(1), "{said}");
    for expected in ["steps were decided differently, the first in line ", "  recorded: ", "  replayed: "] {
        assert!(said.contains(expected), "{expected} in {said}");
    }

    let cut = &text[..text.len() * 2 / 3];
    fs::write(&other, cut).unwrap();
    let (code, said) = replayed(&other);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("cut off: there is no more of it"), "{said}");
    let steps = cut.matches(" > ").count() as u64;
    assert!((steps - 1..=steps).contains(&number_before(&said, " events in")), "{steps} of {said}");

    fs::write(&other, text.replacen(&format!(" {VERSION} "), " 90 ", 1)).unwrap();
    let (code, said) = replayed(&other);
    assert_eq!((code, said.contains("the trace is of version 90")), (Some(65), true), "{said}");
    assert_eq!(replayed(&trace.with_file_name("none")).0, Some(65));
}

/// The same events with the actions of another policy, each line with its right check.
fn decided_by(policy: PolicyKind, text: &str) -> String {
    let mut lines = text.lines();
    let mut reader = Reader::begin(lines.next().unwrap()).unwrap();
    let mut scheduler = Scheduler::new(faaswap_scheduler::SchedulerConfig { policy, ..reader.config() });
    let mut forged = String::new();
    let mut writer = Writer::begin(&reader.config(), &mut forged);
    for line in lines {
        match reader.line(line).unwrap() {
            Line::Name { of, id, name } => writer.name(&mut forged, of, id, &name),
            Line::End(why) => writer.end(&mut forged, why),
            Line::Step { now, event, .. } => {
                let mut actions = Vec::new();
                scheduler.step(now, event, &mut actions);
                writer.step(&mut forged, now, &event, &actions);
            }
        }
    }
    forged
}

#[test]
fn the_trace_of_a_broker_that_was_killed_is_kept_and_replays_as_far_as_it_goes() {
    let (mut broker, trace) = recorded();
    common::wait_for("some of it to be written", || fs::metadata(&trace).unwrap().len() > 10_000);
    broker.kill_and_restart();
    let (code, said) = replayed(&trace.with_file_name("trace.1"));
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("cut off") && number_before(&said, " events in") > 100, "{said}");
}
