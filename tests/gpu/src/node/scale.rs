//! What one device carries, two, and more: the same functions with the same weights on brokers with as many devices.

use std::{fs, time::Instant};

use serde_json::{Value, json};

use super::{
    density::{From, most_carried, of_optimum, search},
    options::Options,
    stage::Stage,
};
use crate::{
    Result,
    record::{Record, Records, Target},
};

/// So many times the requests of one device shall more of them carry, by their number.
const OF_TIMES: [(usize, f64); 2] = [(2, 1.9), (4, 3.6)];
/// The second rate for more devices, as a part of what those before them carried, each.
const BEGINS_AT: f64 = 0.9;

/// What some devices carried.
struct Carried {
    devices: usize,
    /// Rate, and requests a second, of the most.
    best: Option<(f64, f64)>,
    /// The part that it used there of what nobody can do without.
    of_optimum: Option<f64>,
    /// Part of the functions that were compliant at the first rate, where that was the published one.
    first: Option<f64>,
    checked: u64,
    wrong: u64,
    value: Value,
}

/// One, two, four and so on, and all.
fn counts(all: usize) -> Vec<usize> {
    let mut counts: Vec<usize> = (0..).map(|power| 1 << power).take_while(|&count| count < all).collect();
    counts.push(all);
    counts
}

pub(crate) fn run(options: Options) -> Result<()> {
    let all = options.devices;
    let mut stage = Stage::set(options)?;
    let counts = counts(all.count());
    let mut carried: Vec<Carried> = Vec::new();
    for (at, &count) in counts.iter().enumerate() {
        let share = stage.options.left() / u32::try_from(counts.len() - at)?;
        let until = Instant::now() + share;
        stage.options.devices = all.with(count);
        println!("{count} of {} devices", all.count());
        let before = carried.last().and_then(|before| Some((before.best?.0, before.devices)));
        let rate = stage.options.rate;
        let then = before.map(|(best, devices)| best * count as f64 / devices as f64 * BEGINS_AT);
        carried.push(carry(&stage, From { rate, hold: 0, then: then.or(stage.options.then) }, until)?);
        write(&stage, &carried)?;
    }
    let (wrong, checked) = carried.iter().fold((0, 0), |sum, one| (sum.0 + one.wrong, sum.1 + one.checked));
    if wrong > 0 { Err(format!("{wrong} of {checked} outputs are wrong").into()) } else { Ok(()) }
}

fn carry(stage: &Stage, from: From, until: Instant) -> Result<Carried> {
    let policy = stage.options.policies.first().ok_or("no policy is named")?;
    let mut live = stage.live(policy, false)?;
    let steps = search(stage, &mut live, from, until)?;
    let most = most_carried(&steps);
    let (best, of_optimum) =
        (most.map(|(step, _)| (step.rate, step.per_second())), most.map(|(_, value)| of_optimum(value)));
    let first = steps.first().filter(|(step, _)| step.rate <= 1.0).map(|(step, _)| step.compliant_share());
    let devices = stage.options.devices.count();
    let told = best.map_or_else(|| "no rate".to_owned(), |(rate, per_s)| format!("x{rate:.2}, {per_s:.1} requests/s"));
    println!("scale: {devices} devices carry {told}; {} outputs checked, {} wrong", live.checked, live.wrong);
    let value = json!({
        "devices": devices, "registered_s": live.registered.took.as_secs_f64(), "links": live.links.json(),
        "steps": steps.iter().map(|(_, value)| value).collect::<Vec<_>>(),
    });
    Ok(Carried { devices, best, of_optimum, first, checked: live.checked, wrong: live.wrong, value })
}

fn write(stage: &Stage, carried: &[Carried]) -> Result<()> {
    let values: Vec<_> = carried.iter().map(|one| &one.value).collect();
    let wrong: u64 = carried.iter().map(|one| one.wrong).sum();
    let text = json!({"functions": stage.designs.len(), "weights_bytes": stage.weights.get(), "by_devices": values, "outputs_wrong": wrong});
    fs::write(stage.options.out.join("scale.json"), serde_json::to_vec_pretty(&text)?)?;
    let one = carried.iter().find(|one| one.devices == 1).and_then(|one| one.best);
    let records: Vec<_> = carried.iter().flat_map(|of| records(of, one.map(|(_, per_s)| per_s))).collect();
    Records::new(&stage.options.out, "scale", stage.device.clone())?.add(&records)
}

fn records(of: &Carried, one: Option<f64>) -> Vec<Record> {
    let name = format!("{} devices", of.devices);
    let per_s = (of.best.map_or(0.0, |(_, per_s)| per_s), "requests/s");
    let times = OF_TIMES.iter().find(|(devices, _)| *devices == of.devices);
    let target = times.map_or(Target::Told, |(_, least)| Target::AtLeast(*least));
    let reference = one.map(|per_s| (per_s, "one device"));
    let mut records =
        vec![Record::of("scale_requests", &name, per_s, reference, target).counting(of.checked, of.wrong)];
    let first = of.first.map(|share| Record::of("scale_compliant", &name, (share, "of functions"), None, Target::Told));
    let share = of.of_optimum.map(|share| (share, "of the optimum"));
    records.extend(share.map(|share| Record::of("scale_of_optimum", &name, share, None, Target::Told)));
    records.extend(first);
    records
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_devices_double_and_end_with_all() {
        assert_eq!(
            [1, 2, 4, 6, 8].map(counts),
            [vec![1], vec![1, 2], vec![1, 2, 4], vec![1, 2, 4, 6], vec![1, 2, 4, 8]]
        );
    }
}
