//! One of several devices fails under load: whose requests that costs, and how long.
//!
//! The functions whose weights were on the lost device alone have to be brought to another one; all others should not notice.

use std::{
    collections::BTreeSet,
    fs,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{
    broker::Broker,
    fleet::{Ending, Outcome},
    options::{Devices, Options},
    stage::Stage,
    step::permille,
    variants::Design,
};
use crate::{
    Result,
    record::{Record, Records, Target},
};

/// When it fails, as a part of the time.
const FAILS_AT: f64 = 0.5;
/// Requests that are due within this time of the fault, once it has come, may be under way on the device.
const UNDER_WAY: Duration = Duration::from_millis(500);

/// What a group of functions saw after the fault.
#[derive(Debug, Default)]
struct After {
    functions: BTreeSet<usize>,
    asked: u64,
    met: u64,
    refused: u64,
    failed: u64,
    /// Of requests that were not under way when it happened.
    refused_later: u64,
    latencies: Vec<f64>,
    /// When each function's first answer came.
    resumed: Vec<f64>,
}

impl After {
    /// The fault was asked for at that time, and took so long to come.
    fn note(&mut self, outcome: &Outcome, design: &Design, (at, took): (Instant, Duration)) {
        let since = (outcome.due + outcome.late + outcome.took).saturating_duration_since(at).as_secs_f64() * 1e3;
        let latency = outcome.late + outcome.took;
        self.asked += 1;
        match &outcome.end {
            Ending::Answered(_) => {
                self.met += u64::from(latency <= design.deadline);
                self.latencies.push(latency.as_secs_f64() * 1e3);
                if self.functions.insert(outcome.function) {
                    self.resumed.push(since);
                }
            }
            Ending::Refused(_) => {
                self.refused += 1;
                self.refused_later += u64::from(outcome.due > at + took + UNDER_WAY);
            }
            Ending::Failed(_) => self.failed += 1,
        }
    }

    fn json(&mut self) -> Value {
        self.latencies.sort_unstable_by(f64::total_cmp);
        self.resumed.sort_unstable_by(f64::total_cmp);
        json!({"functions": self.functions.len(), "asked": self.asked, "met": self.met, "refused": self.refused,
               "refused_later": self.refused_later, "failed": self.failed, "p50_ms": permille(&self.latencies, 500),
               "p98_ms": permille(&self.latencies, 980), "max_ms": self.latencies.last(),
               "all_answered_after_ms": self.resumed.last()})
    }
}

/// Digests of the models whose weights are on this device and on no other.
fn only_on(broker: &Broker, device: &str) -> Result<BTreeSet<String>> {
    let models = broker.models()?;
    let only = |model: &&Value| model["on"].as_array().is_some_and(|on| on.len() == 1 && on[0] == device);
    let digest = |model: &Value| model["model"].as_str().map(|name| name.trim_start_matches("sha256:").to_owned());
    Ok(models.as_array().into_iter().flatten().filter(only).filter_map(digest).collect())
}

pub(crate) fn run(options: Options) -> Result<()> {
    if options.devices.count() < 2 {
        println!("lose: this needs two devices");
        return Ok(());
    }
    let stage = Stage::set(options)?;
    let device = match stage.options.devices {
        Devices::Gpus(_) => "cuda0",
        Devices::Hosts { .. } => "host0",
    };
    let policy = stage.options.policies.first().cloned().unwrap_or_default();
    let mut live = stage.live(&policy, true)?;
    let seconds = stage.options.seconds;
    let fails_at = Duration::from_secs(seconds).mul_f64(FAILS_AT);
    let mut fault: Option<Result<(Instant, Duration, BTreeSet<String>)>> = None;
    let mut outcomes = Vec::new();
    let (step, value) = live.step(&stage, (stage.options.rate, seconds), |broker, at, outcome| {
        outcomes.extend(outcome.cloned());
        if at >= fails_at && fault.is_none() {
            fault = Some(only_on(broker, device).and_then(|theirs| {
                let start = Instant::now();
                broker.fail(device)?;
                Ok((start, start.elapsed(), theirs))
            }));
        }
    })?;
    let (at, took, theirs) = fault.ok_or("the time was too short for a fault")??;
    let (mut lost, mut others) = (After::default(), After::default());
    for outcome in outcomes.iter().filter(|outcome| outcome.due + outcome.late + outcome.took > at) {
        let design = &stage.designs[outcome.function];
        let group = if theirs.contains(&design.digest.hex()) { &mut lost } else { &mut others };
        group.note(outcome, design, (at, took));
    }
    let before: Vec<_> = outcomes.iter().filter(|outcome| outcome.due + outcome.took < at).collect();
    let missed_before = before.iter().filter(|o| o.late + o.took > stage.designs[o.function].deadline).count();
    let (lost_value, others_value) = (lost.json(), others.json());
    let ms = took.as_secs_f64() * 1e3;
    println!(
        "lose: {device} made to fail in {ms:.0} ms with {} models only on it; before, {missed_before} of {} requests missed",
        theirs.len(),
        before.len()
    );
    println!("  the broker said at last:\n{}", live.broker.log_tail());
    println!("  theirs: {lost_value}");
    println!("  others: {others_value}");
    let devices = live.broker.devices()?;
    let text = json!({"device": device, "fail_ms": ms, "only_there": theirs.len(), "theirs": lost_value, "others": others_value,
                      "missed_before": missed_before, "asked_before": before.len(), "devices": devices, "step": value,
                      "outputs_wrong": live.wrong});
    fs::write(stage.options.out.join("lose.json"), serde_json::to_vec_pretty(&text)?)?;
    let all = |name: &str, value, target| Record::of(name, "all", value, None, target);
    let missed = (others.asked - others.met) as f64;
    Records::new(&stage.options.out, "lose", stage.device.clone())?.add(&[
        all("lose_others_missed", (missed, "requests"), Target::AtMost(0.0)).counting(live.checked, live.wrong),
        all("lose_refused", ((lost.refused + others.refused) as f64, "requests"), Target::Told),
        all(
            "lose_refused_later",
            ((lost.refused_later + others.refused_later) as f64, "requests"),
            Target::AtMost(0.0),
        ),
        all("lose_theirs_p98", (permille(&lost.latencies, 980), "ms"), Target::Told),
        all("lose_unanswered", (step.failed as f64, "requests"), Target::AtMost(0.0)),
    ])?;
    live.verdict()
}
