//! A long run at one rate: does memory grow, on the devices or in the broker, and is every output right to the end?

use std::{
    fs,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{
    broker::Broker,
    options::Options,
    stage::{Live, Stage},
};
use crate::{
    Result,
    record::{Record, Records, Target},
};

/// How often memory is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// How long it runs where no time is named.
const SECONDS: u64 = 180;
/// What is left of the time for what comes after.
const SPARE: Duration = Duration::from_secs(10);
/// Part of the most that `density` has found to be carried.
pub(crate) const FULL_LOAD: f64 = 0.9;
/// Device memory that may be more at the end: what all models share is loaded by then.
const DEVICE_GROWTH_MB_MAX: f64 = 64.0;
/// The broker's own memory that may be more at the end, in parts of a hundred.
const BROKER_GROWTH_PERCENT_MAX: f64 = 5.0;

/// Memory at one moment, in bytes.
#[derive(Clone, Copy, Debug)]
struct Memory {
    at_s: f64,
    /// Of all devices, as NVML counts it; what is charged to models where there is no NVML.
    devices: f64,
    /// The broker's own.
    broker: f64,
}

impl Memory {
    fn of(broker: &Broker, at: Duration) -> Result<Self> {
        let metrics = broker.metrics()?;
        let seen = metrics.sum("faaswap_gpu_memory_used_bytes");
        let devices = if seen > 0.0 { seen } else { metrics.sum("faaswap_device_used_bytes") };
        Ok(Self { at_s: at.as_secs_f64(), devices, broker: broker.memory()? as f64 })
    }

    fn json(&self) -> Value {
        json!({"at_s": self.at_s, "devices_bytes": self.devices, "broker_bytes": self.broker})
    }
}

/// The rate that was asked for, else most of what `density` found.
fn rate(options: &Options) -> f64 {
    let found = fs::read(options.out.join("density.json")).ok();
    let found: Option<Value> = found.and_then(|text| serde_json::from_slice(&text).ok());
    let ours = found.as_ref().and_then(|found| {
        let policy = found["policies"].as_array()?.iter().find(|one| one["policy"] == options.policies[0].as_str())?;
        let steps = policy["steps"].as_array()?.iter();
        let carried = steps.filter(|step| step["compliant"].as_f64() >= step["functions"].as_f64().map(|n| n * 0.95));
        carried.filter_map(|step| step["rate"].as_f64()).max_by(f64::total_cmp)
    });
    match ours {
        Some(most) if options.rate_is_default => most * FULL_LOAD,
        Some(_) | None => options.rate,
    }
}

pub(crate) fn run(options: Options) -> Result<()> {
    let stage = Stage::set(options)?;
    let policy = stage.options.policies.first().cloned().unwrap_or_default();
    let mut live = stage.live(&policy, false)?;
    let wanted = if stage.options.seconds_are_default { SECONDS } else { stage.options.seconds };
    at_rate(&stage, &mut live, rate(&stage.options), wanted)?;
    live.verdict()
}

/// Serves this rate for so many seconds, or as many as are left, and looks at memory meanwhile.
pub(crate) fn at_rate(stage: &Stage, live: &mut Live, rate: f64, wanted: u64) -> Result<()> {
    let left = stage.options.left().saturating_sub(SPARE).as_secs();
    let seconds = wanted.min(left).max(1);
    let (mut seen, mut looked) = (Vec::new(), Instant::now());
    let (step, value) = live.step(stage, (rate, seconds), |broker, at, _| {
        if seen.is_empty() || looked.elapsed() >= LOOK_EVERY {
            looked = Instant::now();
            seen.extend(Memory::of(broker, at).ok());
        }
    })?;
    seen.push(Memory::of(&live.broker, Duration::from_secs(seconds))?);
    // By a quarter of the time, every model has been everywhere.
    let from = seen.iter().find(|memory| memory.at_s >= seconds as f64 / 4.0).copied().unwrap_or(seen[0]);
    let to = seen[seen.len() - 1];
    let (devices, broker) = ((to.devices - from.devices) / 1e6, (to.broker / from.broker.max(1.0) - 1.0) * 100.0);
    println!(
        "soak: {} outputs in {seconds} s, {} wrong; devices' memory {:.0} MB, {devices:+.1} MB; the broker's {:.0} MB, {broker:+.2} %",
        step.checked,
        step.wrong,
        to.devices / 1e6,
        to.broker / 1e6
    );
    let memory: Vec<_> = seen.iter().map(Memory::json).collect();
    let text = json!({"step": value, "memory": memory, "outputs_wrong": live.wrong});
    fs::write(stage.options.out.join("soak.json"), serde_json::to_vec_pretty(&text)?)?;
    let all = |name: &str, value, target| Record::of(name, "all", value, None, target);
    Records::new(&stage.options.out, "soak", stage.device.clone())?.add(&[
        all("soak_device_memory_growth", (devices, "MB"), Target::AtMost(DEVICE_GROWTH_MB_MAX))
            .counting(live.checked, live.wrong),
        all("soak_broker_memory_growth", (broker, "%"), Target::AtMost(BROKER_GROWTH_PERCENT_MAX)),
        all("soak_requests", (step.per_second(), "requests/s"), Target::Told),
    ])
}
