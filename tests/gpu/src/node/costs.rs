//! What runs and swap-ins cost through the broker when nothing else goes on, and the node as the simulator takes it.

use std::{collections::BTreeMap, time::Duration};

use faaswap_protocol::Bytes;
use faaswap_simulation::{
    catalog::{DeviceSpec, ModelSpec, NodeSpec},
    figures::{STRAIN, STRAIN_OF_BERT},
};
use serde_json::{Value, json};

use super::{
    bases::Base,
    broker::Broker,
    fleet::{Ending, Fleet, Outcome},
    options::{Devices, Options},
    variants::Design,
};
use crate::{Result, stats::median};

/// Functions of each model that are asked, and how often when their weights are there.
const FUNCTIONS: usize = 8;
const RESIDENT_ASKS: usize = 3;
/// Two links together that carry less of what both carry alone share a path.
const SHARED_BELOW: f64 = 0.95;

/// One model's costs in milliseconds, in the broker and at the client.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cost {
    /// On the lane, where the weights were there.
    pub(crate) run_ms: f64,
    pub(crate) resident_ms: f64,
    /// With the copy. Absent where all weights stayed.
    pub(crate) swapped_run_ms: Option<f64>,
    pub(crate) swapped_ms: Option<f64>,
    pub(crate) wrong: u64,
    pub(crate) asked: u64,
}

/// Asks some functions of each model, one at a time.
pub(crate) fn measure(fleet: &Fleet, bases: &[Base], designs: &[Design], link: f64) -> Vec<Cost> {
    let of = |base: usize| designs.iter().enumerate().filter(move |(_, d)| d.base == base).map(|(at, _)| at);
    let measure = |base: usize| {
        // Far from each other: some are on a device, and others not.
        let far = (of(base).count() / FUNCTIONS).max(1);
        let asked = of(base).step_by(far).take(FUNCTIONS).flat_map(|function| [function; RESIDENT_ASKS + 1]);
        cost(&fleet.ask(asked), copy_time(&bases[base], link))
    };
    (0..bases.len()).map(measure).collect()
}

/// What a link of so many bytes a second takes for a model's weights.
pub(crate) fn copy_time(base: &Base, link: f64) -> Duration {
    Duration::try_from_secs_f64(base.weights().get() as f64 / link).unwrap_or_default()
}

fn cost(outcomes: &[Outcome], copy: Duration) -> Cost {
    let (mut resident, mut swapped) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    let mut cost = Cost::default();
    for outcome in outcomes {
        let Ending::Answered(answered) = &outcome.end else { continue };
        let brought = answered.was_brought(copy);
        let (of, inside) = if brought { (&mut swapped, answered.in_broker()) } else { (&mut resident, answered.ran) };
        of[0].push(inside.as_secs_f64() * 1e3);
        of[1].push(outcome.took.as_secs_f64() * 1e3);
        cost.wrong += u64::from(!answered.right);
        cost.asked += 1;
    }
    [cost.run_ms, cost.resident_ms] = resident.map(|mut all| median(&mut all));
    [cost.swapped_run_ms, cost.swapped_ms] = swapped.map(|mut all| (!all.is_empty()).then(|| median(&mut all)));
    cost
}

/// The models as the simulator takes them; a swap takes so much of the link beyond its bytes.
pub(crate) fn models(bases: &[Base], costs: &[Cost], (link, beyond_ms): (f64, f64)) -> Vec<ModelSpec> {
    let spec = |(base, cost): (&Base, &Cost)| {
        let copy_ms = base.weights().get() as f64 / link * 1e3 + beyond_ms;
        let run_ms = if cost.run_ms.is_finite() { cost.run_ms } else { copy_ms };
        let tail_ms = cost.swapped_run_ms.map_or(0.0, |swapped| (swapped - copy_ms.max(run_ms)).max(0.0));
        let strain = if base.name.starts_with("bert") { STRAIN_OF_BERT } else { STRAIN };
        let deadline = u64::try_from(base.deadline.as_nanos()).unwrap_or(u64::MAX);
        // A few names for as long as the process lives.
        let name: &'static str = base.name.clone().leak();
        ModelSpec { name, weights: base.weights(), run: nanos(run_ms), tail: nanos(tail_ms), strain, deadline }
    };
    bases.iter().zip(costs).map(spec).collect()
}

fn nanos(ms: f64) -> u64 {
    Duration::try_from_secs_f64(ms / 1e3).map_or(0, |t| u64::try_from(t.as_nanos()).unwrap_or(u64::MAX))
}

/// The links of a node as the broker has measured them, or as they were told to host devices.
#[derive(Clone, Debug)]
pub(crate) struct Links {
    /// Bytes a second of each device's link alone.
    pub(crate) alone: Vec<f64>,
    pub(crate) shared: Vec<(Vec<usize>, f64)>,
    pub(crate) peers: Vec<(usize, usize, f64)>,
}

impl Links {
    pub(crate) fn of(options: &Options, broker: &Broker) -> Result<Self> {
        if let Devices::Hosts { count, link_mib } = options.devices {
            let alone = vec![(link_mib << 20) as f64; count];
            return Ok(Self { alone, shared: Vec::new(), peers: Vec::new() });
        }
        let devices = broker.devices()?;
        let devices = devices.as_array().map(Vec::as_slice).unwrap_or_default();
        let place = |name: &Value| devices.iter().position(|device| device["name"] == *name);
        let (mut alone, mut together, mut peers) = (Vec::new(), BTreeMap::new(), Vec::new());
        let mut crowded = Vec::new();
        for (at, device) in devices.iter().enumerate() {
            let link = &device["link"];
            alone.push(link["from_host"].as_f64().unwrap_or(0.0));
            crowded.extend(link["from_host_with_all"].as_f64());
            for beside in link["beside"].as_array().into_iter().flatten() {
                let Some(other) = place(&beside["device"]) else { continue };
                beside["from_host"].as_f64().map(|speed| together.insert((at, other), speed));
                peers.extend(beside["from_gpu"].as_f64().map(|speed| (other, at, speed)));
            }
        }
        if alone.iter().any(|speed| *speed <= 0.0) {
            return Err("the broker does not tell the speed of each GPU's link".into());
        }
        let mut shared = shared(&alone, &together);
        let all: f64 = crowded.iter().sum();
        if crowded.len() == alone.len() && all < alone.iter().sum::<f64>() * SHARED_BELOW {
            shared.push(((0..alone.len()).collect(), all));
        }
        Ok(Self { shared, alone, peers })
    }

    /// What all links carry together.
    pub(crate) fn total(&self) -> f64 {
        // What all share stands beside the pairs; of two links, what both share is a pair.
        let (all, pairs): (Vec<_>, Vec<_>) = self.shared.iter().partition(|(links, _)| links.len() > 2);
        let in_a_pair: Vec<usize> = pairs.iter().flat_map(|(pair, _)| pair.clone()).collect();
        let single = self.alone.iter().enumerate().filter(|(at, _)| !in_a_pair.contains(at)).map(|(_, speed)| speed);
        let sum = single.sum::<f64>() + pairs.iter().map(|(_, speed)| speed).sum::<f64>();
        all.iter().fold(sum, |sum, (_, speed)| sum.min(*speed))
    }

    pub(crate) fn json(&self) -> Value {
        json!({"alone_bytes_per_s": self.alone, "shared": self.shared, "peers": self.peers})
    }
}

/// Pairs of links that are in each other's way, each link in one pair at most: the pairs that lose most.
fn shared(alone: &[f64], together: &BTreeMap<(usize, usize), f64>) -> Vec<(Vec<usize>, f64)> {
    let mut pairs: Vec<_> = together
        .iter()
        .filter(|((a, b), _)| a < b)
        .filter_map(|((a, b), speed)| Some((*a, *b, speed + together.get(&(*b, *a))?)))
        .filter(|(a, b, both)| *both < (alone[*a] + alone[*b]) * SHARED_BELOW)
        .collect();
    pairs.sort_by(|x, y| x.2.total_cmp(&y.2));
    let (mut taken, mut chosen) = (Vec::new(), Vec::new());
    for (a, b, both) in pairs {
        if !taken.contains(&a) && !taken.contains(&b) {
            taken.extend([a, b]);
            chosen.push((vec![a, b], both));
        }
    }
    chosen
}

/// The node as the simulator takes it.
pub(crate) fn node(options: &Options, broker: &Broker, links: &Links, beyond_ms: f64) -> Result<NodeSpec> {
    let devices = broker.devices()?;
    let whole = |speed: f64| nanos(speed / 1e6);
    let device = |at: usize| {
        let lanes = devices[at]["lanes"].as_u64().and_then(|lanes| u16::try_from(lanes).ok()).unwrap_or(1);
        let capacity = devices[at]["capacity_bytes"].as_u64().map_or(options.memory, Bytes::new);
        DeviceSpec { capacity, lanes, link: whole(links.alone[at]), per_swap: nanos(beyond_ms) }
    };
    Ok(NodeSpec {
        devices: (0..options.devices.count()).map(device).collect(),
        shared: links.shared.iter().map(|(pair, speed)| (pair.clone(), whole(*speed))).collect(),
        peers: links.peers.iter().map(|(from, to, speed)| (*from, *to, whole(*speed))).collect(),
        chunk: options.devices.chunk(),
    })
}

/// All costs as they are written down.
pub(crate) fn json_of(bases: &[Base], costs: &[Cost]) -> Value {
    let one = |(base, cost): (&Base, &Cost)| {
        json!({"model": base.name, "weights_bytes": base.weights().get(), "run_ms": cost.run_ms, "resident_ms": cost.resident_ms,
               "swapped_run_ms": cost.swapped_run_ms, "swapped_ms": cost.swapped_ms, "asked": cost.asked, "outputs_wrong": cost.wrong})
    };
    bases.iter().zip(costs).map(one).collect()
}

/// Prints them.
pub(crate) fn say(bases: &[Base], costs: &[Cost]) {
    println!(
        "  model                      MB   run ms  resident ms  swapped-in run ms  swapped-in ms   (one at a time; in the broker, at the client)"
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_that_slow_each_other_down_are_paired_once() {
        let alone = [50.0; 4];
        let together: BTreeMap<_, _> = (0..4)
            .flat_map(|a| (0..4).filter(move |b| *b != a).map(move |b| (a, b)))
            .map(|(a, b)| ((a, b), if a / 2 == b / 2 { 30.0 } else { 49.0 }))
            .collect();
        assert_eq!(shared(&alone, &together), [(vec![0, 1], 60.0), (vec![2, 3], 60.0)]);
    }
}
