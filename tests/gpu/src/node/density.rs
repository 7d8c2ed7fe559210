//! How many requests a node carries: many functions under the published requests at rising rates, on the same requests for
//! each policy.

use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{
    costs,
    options::Options,
    predict, soak,
    stage::{Live, Stage},
    step::{Step, permille},
};
use crate::{
    Result,
    record::{Record, Records, Target},
};

/// Functions that must be compliant for a rate to count as carried.
const COMPLIANT_SHARE: f64 = 0.95;
/// From one rate to the next while they are carried.
const FASTER: f64 = 1.5;
/// Rates that are nearer to each other are the same.
const NEAR: f64 = 1.06;
/// What a step takes beside its own time: requests that are still out, pages that are read.
const STEP_SPARE: Duration = Duration::from_secs(8);
/// What a function that is bound to a device may take of host memory beyond its weights.
const HOST_MEMORY_EACH_MB_MAX: f64 = 4.0;
/// All functions shall be registered and bound in that time.
const REGISTERED_S_MAX: f64 = 180.0;
/// The policy that others are compared with.
const PUBLISHED: &str = "torpor";

/// What one policy has carried.
struct Carried {
    policy: String,
    value: Value,
    /// Rate, and requests a second, of the most that it carries.
    best: Option<(f64, f64)>,
    /// Part of the functions that were compliant at the rate that was asked for.
    first: Option<f64>,
    checked: u64,
    wrong: u64,
    unanswered: u64,
    share_of_optimum: Option<f64>,
    registered_s: f64,
    memory_each_mb: f64,
    /// What was simulated beside it.
    predicted: Vec<Record>,
}

pub(crate) fn run(options: Options) -> Result<()> {
    let stage = Stage::set(options)?;
    let policies = stage.options.policies.clone();
    let first = policies.first().ok_or("no policy is named")?;
    // Registering takes longer than all else, so one broker serves all policies.
    let mut live = stage.live(first, true)?;
    let (mut carried, mut counted) = (Vec::new(), (0, 0));
    for (at, policy) in policies.iter().enumerate() {
        // What is asked for besides is not shared.
        let hold = Duration::from_secs(if at == 0 { stage.options.hold } else { 0 });
        let left = stage.options.left().saturating_sub(hold + Duration::from_secs(stage.options.soak));
        let share = hold + left / u32::try_from(policies.len() - at)?;
        println!("policy {policy}");
        live.choose(policy, stage.options.seed)?;
        carried.push(carry(&stage, &mut live, (policy, at == 0), counted, Instant::now() + share)?);
        counted = (live.checked, live.wrong);
        write(&stage, &carried)?;
    }
    carried.iter().for_each(say);
    if let (Some((most, _)), 1..) = (carried[0].best, stage.options.soak) {
        live.choose(first, stage.options.seed)?;
        println!("policy {first}, {:.0} % of what it carries", soak::FULL_LOAD * 100.0);
        soak::at_rate(&stage, &mut live, most * soak::FULL_LOAD, stage.options.soak)?;
    }
    let trace = live.broker.trace();
    let (wrong, checked) = (live.wrong, live.checked);
    // The trace ends with the broker.
    drop(live);
    replay(&trace)?;
    match (wrong, checked) {
        (0, _) => Ok(()),
        (1.., _) => Err(format!("{wrong} of {checked} outputs are wrong").into()),
    }
}

/// Lets the scheduler decide again what it decided on this machine.
fn replay(trace: &Path) -> Result<()> {
    let told = Command::new(std::env::current_exe()?).args(["broker", "replay"]).arg(trace).output()?;
    print!("{}{}", String::from_utf8_lossy(&told.stdout), String::from_utf8_lossy(&told.stderr));
    if told.status.success() { Ok(()) } else { Err("the recorded decisions are not those of a replay".into()) }
}

/// Outputs up to `counted` were compared for another policy.
fn carry(
    stage: &Stage,
    live: &mut Live,
    (policy, is_first): (&str, bool),
    counted: (u64, u64),
    until: Instant,
) -> Result<Carried> {
    let options = &stage.options;
    let from = From { rate: options.rate, hold: if is_first { options.hold } else { 0 }, then: options.then };
    let steps = search(stage, live, from, until)?;
    let best = most_carried(&steps);
    let share_of_optimum = best.map(|(_, value)| of_optimum(value));
    let devices = stage.options.devices.count() as f64;
    let meanwhile = live.registered.latencies();
    let value = json!({
        "answered_while_registering": {"count": meanwhile.len(), "p50_ms": permille(&meanwhile, 500), "p98_ms": permille(&meanwhile, 980)},
        "policy": policy, "functions": stage.designs.len(), "registered": live.registered.ready,
        "registered_s": live.registered.took.as_secs_f64(), "weights_bytes": stage.weights.get(),
        "host_memory_per_function_mb": live.registered.memory_each_mb,
        "answers_alike": live.answers_alike, "links": live.links.json(), "costs": costs::json_of(&stage.bases, &live.costs),
        "steps": steps.iter().map(|(_, value)| value).collect::<Vec<_>>(),
        "requests_per_s_per_device": best.map(|(step, _)| step.per_second() / devices), "share_of_optimum": share_of_optimum,
    });
    Ok(Carried {
        policy: policy.to_owned(),
        value,
        best: best.map(|(step, _)| (step.rate, step.per_second())),
        first: steps.first().map(|(step, _)| step.compliant_share()),
        checked: live.checked - counted.0,
        wrong: live.wrong - counted.1,
        unanswered: steps.iter().map(|(step, _)| step.refused + step.failed).sum(),
        share_of_optimum,
        registered_s: live.registered.took.as_secs_f64(),
        memory_each_mb: live.registered.memory_each_mb,
        predicted: best.or(steps.first()).map_or_else(Vec::new, |(_, value)| predict::records(policy, value)),
    })
}

/// Where a search begins.
#[derive(Clone, Copy, Debug)]
pub(super) struct From {
    pub(super) rate: f64,
    /// Length of the first step, where that is longer.
    pub(super) hold: u64,
    /// Rate of the second step, where the first is carried and it is higher.
    pub(super) then: Option<f64>,
}

/// What part of what nobody can do without a step has used, of the links or of the devices, whichever is more.
pub(super) fn of_optimum(value: &Value) -> f64 {
    let bound = |name: &str| value["predicted"]["optimum"][name].as_f64().unwrap_or(f64::NAN);
    bound("links_by_rates").max(bound("devices"))
}

/// The step with the highest rate that was carried.
pub(super) fn most_carried(steps: &[(Step, Value)]) -> Option<&(Step, Value)> {
    let good = steps.iter().filter(|(step, _)| step.compliant_share() >= COMPLIANT_SHARE);
    good.max_by(|a, b| a.0.rate.total_cmp(&b.0.rate))
}

/// Raises the rate until too many functions miss their objective, then halves the interval.
pub(super) fn search(stage: &Stage, live: &mut Live, from: From, until: Instant) -> Result<Vec<(Step, Value)>> {
    let options = &stage.options;
    let (mut steps, mut good, mut bad) = (Vec::new(), None::<f64>, None::<f64>);
    let mut rate = from.rate;
    let enough = Duration::from_secs(options.seconds) + STEP_SPARE;
    for _ in 0..=options.steps {
        if !steps.is_empty() && until.saturating_duration_since(Instant::now()) < enough {
            println!("  no time for another rate");
            break;
        }
        let seconds = if steps.is_empty() { from.hold.max(options.seconds) } else { options.seconds };
        let (step, value) = live.step(stage, (rate, seconds), |_, _, _| {})?;
        match step.compliant_share() >= COMPLIANT_SHARE {
            true => good = Some(rate),
            false => bad = Some(rate),
        }
        steps.push((step, value));
        let second = from.then.filter(|_| steps.len() == 1);
        rate = match (good, bad) {
            (Some(_), None) if second.is_some_and(|second| second > rate) => second.unwrap_or(rate),
            (Some(good), Some(bad)) if bad / good < NEAR => break,
            (Some(good), Some(bad)) => (good * bad).sqrt(),
            (Some(good), None) => good * FASTER,
            (None, Some(bad)) => bad / FASTER,
            (None, None) => break,
        };
    }
    Ok(steps)
}

fn say(one: &Carried) {
    let best =
        one.best.map_or_else(|| "no rate".to_owned(), |(rate, per_s)| format!("x{rate:.2}, {per_s:.1} requests/s"));
    println!(
        "density {}: carries {best} ({:.2} of the optimum); {} outputs checked, {} wrong, {} not answered; registered in {:.1} s",
        one.policy,
        one.share_of_optimum.unwrap_or(f64::NAN),
        one.checked,
        one.wrong,
        one.unanswered,
        one.registered_s
    );
}

fn write(stage: &Stage, carried: &[Carried]) -> Result<()> {
    let out = &stage.options.out;
    let values: Vec<_> = carried.iter().map(|one| &one.value).collect();
    let wrong: u64 = carried.iter().map(|one| one.wrong).sum();
    let (count, is_host) = (stage.options.devices.count(), stage.options.devices.is_host());
    let text = json!({"devices": count, "host": is_host, "policies": values, "outputs_wrong": wrong});
    fs::write(out.join("density.json"), serde_json::to_vec_pretty(&text)?)?;
    let published = carried.iter().find(|one| one.policy == PUBLISHED).and_then(|one| one.best);
    let records: Vec<_> = carried.iter().flat_map(|one| records(one, published, count)).collect();
    Records::new(out, "density", stage.device.clone())?.add(&records)
}

fn records(one: &Carried, published: Option<(f64, f64)>, devices: usize) -> Vec<Record> {
    let devices = devices as f64;
    // What is compared here are policies, where other figures compare models.
    let all = |name: &str, value: (f64, &'static str), reference, target| {
        Record::of(name, &one.policy, value, reference, target)
    };
    let per_device = (one.best.map_or(0.0, |(_, per_s)| per_s / devices), "requests/s");
    let reference =
        published.filter(|_| one.policy != PUBLISHED).map(|(_, per_s)| (per_s / devices, "published policy"));
    let mut records =
        vec![all("density_requests", per_device, reference, Target::Told).counting(one.checked, one.wrong)];
    let share = one.share_of_optimum.map(|share| (share, "of the optimum"));
    records.extend(share.map(|share| all("density_of_optimum", share, None, Target::Told)));
    records.extend(one.first.map(|share| all("density_compliant", (share, "of functions"), None, Target::Told)));
    let registered = (one.registered_s, "s");
    records.push(all("density_registered", registered, None, Target::AtMost(REGISTERED_S_MAX)));
    let memory = (one.memory_each_mb, "MB");
    records.push(all("host_memory_per_function", memory, None, Target::AtMost(HOST_MEMORY_EACH_MB_MAX)));
    records.extend(one.predicted.clone());
    records.push(all("density_unanswered", (one.unanswered as f64, "requests"), None, Target::AtMost(0.0)));
    records
}
