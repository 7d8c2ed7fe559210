//! FaaSwap at work on one machine without a GPU: many functions with real models share two small host devices.
//!
//! Everything runs as it would on a node: one broker process, one sidecar process per function, HTTP in between. What
//! the demo adds are requests, and a plain ONNX Runtime session to compare each answer with.

pub mod files;
pub mod functions;
pub mod image;
pub mod load;
pub mod report;
pub mod sound;
pub mod text;
pub mod variant;

use std::{
    fs,
    io::{self, IsTerminal, Write},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use faaswap_protocol::Bytes;

use self::{
    functions::{Knowledge, Plan},
    load::Subject,
    report::{NodeFacts, Summary},
};
use crate::{
    Result, Trouble, cache,
    node::{Broker, BrokerOptions, DeviceOptions, Sidecar, SidecarOptions},
    process,
};

/// Memory of each of the two devices: together less than half of all weights, each more than the largest model's.
const DEVICE_MEMORY: &str = "16MiB";
/// Bandwidth of each device's link: slow enough that swaps show.
const LINK_MIB_PER_S: u64 = 1000;
/// Share of the processors that plain runs of all requests would take: the rest is for HTTP, swaps and bursts.
const UTILIZATION_MAX: f64 = 0.3;
/// How often progress is shown.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// What can be asked of the demo.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How long requests are sent.
    pub seconds: u64,
    /// Where all chance comes from.
    pub seed: u64,
}

/// Runs the demo; an error where anything was wrong.
pub fn run(options: Options) -> Result<()> {
    process::end_together()?;
    let folder = cache::root().join("target/demo");
    fs::create_dir_all(&folder)?;
    let scratch = process::temporary_folder(&std::env::temp_dir())?;
    say("writing the models of all functions");
    let plans = functions::plan(scratch.path())?;
    say("starting a broker with two host devices");
    let mut broker = Broker::start(&broker_options())?;
    let outcome = serve(options, &broker, plans, &folder);
    if outcome.is_err() {
        println!("{}", broker.process().log_tail());
    }
    outcome
}

fn broker_options() -> BrokerOptions {
    let device =
        |name: &str| DeviceOptions { link_mib_per_s: Some(LINK_MIB_PER_S), ..DeviceOptions::new(name, DEVICE_MEMORY) };
    BrokerOptions::new(vec![device("host0"), device("host1")])
}

fn serve(options: Options, broker: &Broker, plans: Vec<Plan>, folder: &Path) -> Result<()> {
    say(&format!("starting {} functions with a sidecar each; the broker prepares their models", plans.len()));
    let deploy = |plan: &Plan| {
        let slo_ms = u64::try_from(plan.slo.as_millis())?;
        Sidecar::start(broker, &SidecarOptions::new(&plan.name, &plan.model, slo_ms))
    };
    let mut sidecars = plans.iter().map(deploy).collect::<Result<Vec<_>>>()?;
    for (number, sidecar) in sidecars.iter_mut().enumerate() {
        sidecar.wait_ready()?;
        show(&format!("  {} of {} functions are ready", number + 1, plans.len()));
    }
    say("");
    let facts = NodeFacts::ask(broker)?;
    let (weights, memory) = (Bytes::new(facts.weights_bytes), Bytes::new(facts.device_bytes));
    say(&format!("all weights are {weights}, the devices' memory is {memory}"));
    say("asking plain ONNX Runtime sessions for the answers that must come");
    let subjects = examine(options, plans, folder)?;
    let requests: usize = subjects.0.iter().map(|subject| subject.times.len()).sum();
    say(&format!("sending {requests} requests in bursts for {} s (seed {})", options.seconds, options.seed));
    let start = Instant::now();
    let (subjects, knowledge) = subjects;
    load::run(&subjects, &sidecars, PROGRESS_EVERY, |time| progress(broker, &subjects, time))?;
    let summary = Summary::of(&subjects, facts, broker, start.elapsed().as_secs_f64(), options.seed)?;
    report::print_answers(&subjects, &knowledge)?;
    summary.print();
    let file = folder.join("summary.json");
    summary.save(&file)?;
    println!("The same for programs: {}", file.strip_prefix(cache::root()).unwrap_or(&file).display());
    match summary.failures() {
        failures if failures.is_empty() => Ok(()),
        failures => {
            println!();
            report::print_complaints(&subjects);
            Err(Trouble::new(failures.join("; ")))
        }
    }
}

/// Makes up the requests of all functions with the answers that they must get.
fn examine(options: Options, plans: Vec<Plan>, folder: &Path) -> Result<(Vec<Subject>, Knowledge)> {
    let runtime = cache::runtime()?;
    let knowledge = Knowledge::gather(&runtime, folder)?;
    let duration = Duration::from_secs(options.seconds);
    let mut subjects = Vec::with_capacity(plans.len());
    let mut work = 0.0;
    for (plan, number) in plans.into_iter().zip(1..) {
        let (exams, took) = functions::exams(&runtime, &knowledge, &plan)?;
        let seed = options.seed.wrapping_mul(1000).wrapping_add(number);
        let times = load::arrivals(seed, plan.burst, duration);
        work += f64::from(u32::try_from(times.len())?) * took.as_secs_f64();
        subjects.push((plan, exams, times, seed));
    }
    let processors = thread::available_parallelism().map_or(1, usize::from).min(2);
    let room = duration.as_secs_f64() * f64::from(u32::try_from(processors)?) * UTILIZATION_MAX;
    let subjects = subjects.into_iter().map(|(plan, exams, mut times, seed)| {
        load::thin(&mut times, room / work.max(f64::MIN_POSITIVE), seed);
        Subject::new(plan, exams, times)
    });
    Ok((subjects.collect(), knowledge))
}

fn progress(broker: &Broker, subjects: &[Subject], time: Duration) {
    let total = |count: fn(&load::Tally) -> usize| subjects.iter().map(|s| count(&s.tally())).sum::<usize>();
    let swaps = broker.metric("faaswap_swaps_in_total").unwrap_or_default();
    println!(
        "  {:>3} s: {:>5} answered, {} refused, {} wrong, {swaps:.0} swap-ins",
        time.as_secs(),
        total(load::Tally::answered),
        total(|tally| tally.refused),
        total(|tally| tally.wrong)
    );
}

fn say(what: &str) {
    println!("{what}");
}

/// Shows a line that the next one replaces, where somebody watches.
fn show(what: &str) {
    if io::stdout().is_terminal() {
        print!("\r{what}");
        // A closed terminal is no reason to stop.
        let _closed = io::stdout().flush();
    }
}
