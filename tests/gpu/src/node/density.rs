//! How many requests a node carries: many functions under the published requests at rising rates, on the same requests for each policy.

use std::{
    fs,
    time::{Duration, Instant},
};

use faaswap_engine::Runtime;
use faaswap_protocol::Bytes;
use faaswap_simulation::catalog::{ModelSpec, NodeSpec};
use serde_json::{Value, json};

use super::{
    bases::{self, Base},
    broker::{self, Broker},
    costs::{self, Cost, Links},
    fleet::{Ending, Fleet, Registered},
    options::Options,
    predict,
    step::{self, Step},
    variants::{self, Design, Folders},
};
use crate::{
    Result, model,
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
/// How long registering may take, for each function; and how long at least.
const REGISTERED_WITHIN_EACH: Duration = Duration::from_millis(700);
const REGISTERED_WITHIN: Duration = Duration::from_secs(60);
/// Largest difference to a plain session's output, beside the largest value; TF32 and fp16 have 10 bits of fraction.
const TOLERANCE: f64 = 1e-2;
const TOLERANCE_ON_HOST: f64 = 1e-3;

/// What all experiments with a broker begin with.
pub(crate) struct Stage {
    pub(crate) options: Options,
    pub(crate) bases: Vec<Base>,
    pub(crate) designs: Vec<Design>,
    pub(crate) folders: Folders,
    pub(crate) weights: Bytes,
    references: Vec<Vec<Vec<u8>>>,
    pub(crate) device: String,
}

impl Stage {
    /// Prepares the models, asks plain sessions, and writes the functions' weights.
    pub(crate) fn set(options: Options) -> Result<Self> {
        broker::end_together()?;
        fs::create_dir_all(&options.out)?;
        let folders = Folders::make(&options)?;
        let start = Instant::now();
        let bases = bases::all(&options)?;
        if bases.is_empty() {
            return Err("no model can be prepared".into());
        }
        println!("{} models prepared after {:.1} s", bases.len(), start.elapsed().as_secs_f64());
        let runtime: Runtime = model::runtime()?;
        let references = bases.iter().map(|base| bases::reference(&runtime, base)).collect::<Result<Vec<_>>>()?;
        println!("plain sessions answered after {:.1} s", start.elapsed().as_secs_f64());
        let designs = variants::designs(&options, &bases)?;
        let (flavour, device) = bases::flavour(&options)?;
        let weights = variants::write(&folders, flavour, &bases, &designs)?;
        Ok(Self { options, bases, designs, folders, weights, references, device })
    }

    /// Starts a broker and registers all functions with it.
    pub(crate) fn open(&self, policy: &str, faults: bool) -> Result<(Broker, Fleet, Registered)> {
        let broker = Broker::start(&self.options, &self.folders, policy, self.weights, faults)?;
        let fleet = Fleet::start(&broker.socket(), &self.bases, &self.designs)?;
        let count = u32::try_from(self.designs.len())?;
        let within = REGISTERED_WITHIN.max(REGISTERED_WITHIN_EACH * count).min(self.options.left());
        let registered = fleet.register(self.designs.len(), Instant::now() + within);
        println!(
            "  {} of {count} functions registered and bound in {:.1} s; {} requests were served meanwhile",
            registered.ready,
            registered.took.as_secs_f64(),
            registered.outcomes.len()
        );
        for why in registered.refused.iter().take(5) {
            println!("  declined: {why}");
        }
        if registered.ready == 0 {
            return Err(format!("no function could be registered: {}", broker.log_tail()).into());
        }
        Ok((broker, fleet, registered))
    }

    /// First answers that are not what a plain session says, of how many; and functions whose answer another of their
    /// model has given too.
    pub(crate) fn compare(&self, fleet: &Fleet) -> (u64, u64, usize) {
        let tolerance = if self.options.devices.is_host() { TOLERANCE_ON_HOST } else { TOLERANCE };
        let (mut wrong, mut checked) = (0, 0);
        let mut seen = std::collections::BTreeSet::new();
        let mut twice = 0;
        for (function, design) in self.designs.iter().enumerate() {
            let Some(golden) = fleet.golden(function) else { continue };
            twice += usize::from(!seen.insert((design.base, golden.clone())));
            if design.variant > 0 {
                continue;
            }
            let difference = bases::difference(&self.bases[design.base], golden, &self.references[design.base]);
            checked += 1;
            if difference.is_nan() || difference > tolerance {
                wrong += 1;
                println!("  WRONG: {} differs from a plain session by {difference:.2e}", design.name);
            }
        }
        println!(
            "  {checked} models' answers compared with a plain session's: {wrong} differ; {twice} functions answer as another one does"
        );
        (wrong, checked, twice)
    }
}

/// What one policy has carried.
struct Carried {
    policy: String,
    value: Value,
    best: Option<(f64, f64)>,
    /// The first step, at the rate that was asked for.
    first: Option<(f64, f64)>,
    checked: u64,
    wrong: u64,
    refused: u64,
    failed: u64,
    share_of_optimum: Option<f64>,
    registered_s: f64,
}

pub(crate) fn run(options: Options) -> Result<()> {
    let stage = Stage::set(options)?;
    let policies = stage.options.policies.clone();
    let mut carried = Vec::new();
    for (at, policy) in policies.iter().enumerate() {
        let share = stage.options.left() / u32::try_from(policies.len() - at)?;
        carried.push(carry(&stage, policy, Instant::now() + share)?);
        write(&stage, &carried)?;
    }
    say(&carried);
    let (wrong, checked): (u64, u64) = (carried.iter().map(|c| c.wrong).sum(), carried.iter().map(|c| c.checked).sum());
    if wrong > 0 { Err(format!("{wrong} of {checked} outputs are wrong").into()) } else { Ok(()) }
}

fn carry(stage: &Stage, policy: &str, until: Instant) -> Result<Carried> {
    let kind = predict::policy(policy, stage.options.seed)?;
    let (broker, fleet, registered) = stage.open(policy, false)?;
    let (mut wrong, mut checked, twice) = stage.compare(&fleet);
    let wrongly = |outcome: &&super::fleet::Outcome| matches!(outcome.end, Ending::Answered(a) if !a.right);
    checked += registered.outcomes.iter().filter(|o| matches!(o.end, Ending::Answered(_))).count() as u64;
    wrong += registered.outcomes.iter().filter(wrongly).count() as u64;
    let costs = costs::measure(&fleet, &stage.bases, &stage.designs);
    say_costs(&stage.bases, &costs);
    let links = Links::of(&stage.options, &broker)?;
    let link = links.alone.first().copied().unwrap_or(f64::NAN);
    let (node, models) = (costs::node(&stage.options, &broker, &links)?, costs::models(&stage.bases, &costs, link));
    let on = On { stage, broker: &broker, fleet: &fleet, node: &node, models: &models, links: links.total(), kind };
    let steps = search(&on, until)?;
    for (step, _) in &steps {
        wrong += step.wrong;
        checked += step.checked;
    }
    let good = |(step, _): &&(Step, Value)| step.compliant_share() >= COMPLIANT_SHARE;
    let best =
        steps.iter().filter(good).map(|(step, value)| (step, value)).max_by(|a, b| a.0.rate.total_cmp(&b.0.rate));
    let share = best.map(|(_, value)| {
        let bound = |name: &str| value["predicted"]["optimum"][name].as_f64().unwrap_or(f64::NAN);
        bound("links_by_rates").max(bound("devices"))
    });
    let gpus = stage.options.devices.count() as f64;
    let value = json!({
        "policy": policy, "functions": stage.designs.len(), "registered": registered.ready,
        "registered_s": registered.took.as_secs_f64(), "weights_bytes": stage.weights.get(), "answers_alike": twice,
        "links": links.json(), "costs": costs_json(&stage.bases, &costs),
        "steps": steps.iter().map(|(_, value)| value).collect::<Vec<_>>(),
        "requests_per_s_per_device": best.map(|(step, _)| step.per_second() / gpus), "share_of_optimum": share,
    });
    Ok(Carried {
        policy: policy.to_owned(),
        value,
        best: best.map(|(step, _)| (step.rate, step.per_second())),
        first: steps.first().map(|(step, _)| (step.compliant_share(), step.per_second())),
        checked,
        wrong,
        refused: steps.iter().map(|(step, _)| step.refused).sum(),
        failed: steps.iter().map(|(step, _)| step.failed).sum(),
        share_of_optimum: share,
        registered_s: registered.took.as_secs_f64(),
    })
}

/// Where steps are run.
struct On<'a> {
    stage: &'a Stage,
    broker: &'a Broker,
    fleet: &'a Fleet,
    node: &'a NodeSpec,
    models: &'a [ModelSpec],
    links: f64,
    kind: faaswap_scheduler::PolicyKind,
}

/// Raises the rate until too many functions miss their objective, then halves the interval.
fn search(on: &On<'_>, until: Instant) -> Result<Vec<(Step, Value)>> {
    let options = &on.stage.options;
    let (mut steps, mut good, mut bad) = (Vec::new(), None::<f64>, None::<f64>);
    let mut rate = options.rate;
    let enough = Duration::from_secs(options.seconds) + STEP_SPARE;
    for _ in 0..=options.steps {
        if !steps.is_empty() && until.saturating_duration_since(Instant::now()) < enough {
            println!("  no time for another rate");
            break;
        }
        let (step, value) = one(on, rate)?;
        let carried = step.compliant_share() >= COMPLIANT_SHARE;
        steps.push((step, value));
        if carried {
            good = Some(rate);
        } else {
            bad = Some(rate);
        }
        rate = match (good, bad) {
            (Some(good), Some(bad)) if bad / good < NEAR => break,
            (Some(good), Some(bad)) => (good * bad).sqrt(),
            (Some(good), None) => good * FASTER,
            (None, Some(bad)) => bad / FASTER,
            (None, None) => break,
        };
    }
    Ok(steps)
}

fn one(on: &On<'_>, rate: f64) -> Result<(Step, Value)> {
    let options = &on.stage.options;
    let workload = step::requests(on.models, &on.stage.designs, rate, (options.seconds, options.seed));
    let mut step = step::run(on.broker, on.fleet, &on.stage.designs, &workload, |_| {})?;
    step.rate = rate;
    step.say(on.links);
    let predicted = predict::predict(on.node, on.models, &workload, on.kind);
    let beside = predicted.beside(&step, &workload, on.links);
    predict::say(&beside);
    let mut value = step.json(on.links);
    value["predicted"] = predicted.json(&beside);
    Ok((step, value))
}

fn costs_json(bases: &[Base], costs: &[Cost]) -> Value {
    let one = |(base, cost): (&Base, &Cost)| {
        json!({"model": base.name, "weights_bytes": base.weights().get(), "run_ms": cost.run_ms, "resident_ms": cost.resident_ms,
               "swapped_run_ms": cost.swapped_run_ms, "swapped_ms": cost.swapped_ms, "asked": cost.asked, "outputs_wrong": cost.wrong})
    };
    bases.iter().zip(costs).map(one).collect()
}

fn say_costs(bases: &[Base], costs: &[Cost]) {
    println!(
        "  model                      MB   run ms  resident ms  swapped-in run ms  swapped-in ms   (one at a time; on the lane, at the client)"
    );
    for (base, cost) in bases.iter().zip(costs) {
        println!(
            "  {:22} {:6.0} {:8.3} {:12.3} {:18.3} {:14.3}",
            base.name,
            base.weights().get() as f64 / 1e6,
            cost.run_ms,
            cost.resident_ms,
            cost.swapped_run_ms.unwrap_or(f64::NAN),
            cost.swapped_ms.unwrap_or(f64::NAN)
        );
    }
}

fn say(carried: &[Carried]) {
    for one in carried {
        let best =
            one.best.map_or_else(|| "no rate".to_owned(), |(rate, per_s)| format!("x{rate:.2}, {per_s:.1} requests/s"));
        println!(
            "density {}: carries {best} ({:.2} of the optimum); {} outputs checked, {} wrong, {} refused, {} failed; registered in {:.1} s",
            one.policy,
            one.share_of_optimum.unwrap_or(f64::NAN),
            one.checked,
            one.wrong,
            one.refused,
            one.failed,
            one.registered_s
        );
    }
}

fn write(stage: &Stage, carried: &[Carried]) -> Result<()> {
    let out = &stage.options.out;
    let values: Vec<_> = carried.iter().map(|one| &one.value).collect();
    let wrong: u64 = carried.iter().map(|one| one.wrong).sum();
    let text = json!({"devices": stage.options.devices.count(), "host": stage.options.devices.is_host(), "policies": values,
                      "outputs_wrong": wrong});
    fs::write(out.join("density.json"), serde_json::to_vec_pretty(&text)?)?;
    let gpus = stage.options.devices.count() as f64;
    let torpor = carried.iter().find(|one| one.policy == "torpor").and_then(|one| one.best);
    let mut records = Vec::new();
    for one in carried {
        let figure = |name: &str| format!("{name}_{}", one.policy);
        let all = |name: &str, value: (f64, &'static str), reference, target| {
            Record::of(&figure(name), "all", value, reference, target)
        };
        let per_device = one.best.map_or(0.0, |(_, per_s)| per_s / gpus);
        let reference = torpor.filter(|_| one.policy != "torpor").map(|(_, per_s)| (per_s / gpus, "published policy"));
        records.push(
            all("density_requests", (per_device, "requests/s"), reference, Target::Told)
                .counting(one.checked, one.wrong),
        );
        records.extend(
            one.share_of_optimum.map(|share| all("density_of_optimum", (share, "of the optimum"), None, Target::Told)),
        );
        records
            .extend(one.first.map(|(share, _)| all("density_compliant", (share, "of functions"), None, Target::Told)));
        records.push(all("density_registered", (one.registered_s, "s"), None, Target::AtMost(180.0)));
        records.push(all(
            "density_unanswered",
            ((one.refused + one.failed) as f64, "requests"),
            None,
            Target::AtMost(0.0),
        ));
    }
    Records::new(out, "density", stage.device.clone())?.add(&records)
}
