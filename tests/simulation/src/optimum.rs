//! What no policy can beat: the load that links and devices would carry for one that knows the future.
//!
//! All memory counts as one cache that evicts what is needed again last (Belady); each miss is copied once, all links
//! are always busy, and no run waits. Deadlines are left out. A node cannot serve more than this on average.
//!
//! Where requests are independent of each other, nobody can know the future. There the best is to keep what is asked for
//! most, for good, and that is the bound to compare with.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    catalog::{ModelSpec, Nanos, NodeSpec},
    outcome::ratio,
    workload::Workload,
};

/// Parts of what there is that the workload needs at least; more than 1 cannot be served.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bound {
    /// Of the host links, where the future is known.
    pub links: f64,
    /// Of the host links, where only the rates are known.
    pub links_by_rates: f64,
    /// Of the devices' time, at their best number of lanes.
    pub devices: f64,
}

/// The bound for a workload.
pub fn bound(node: &NodeSpec, models: &[ModelSpec], workload: &Workload) -> Bound {
    let seconds = ratio(workload.span - workload.counted_from, 1_000_000_000);
    let copied = ratio(missed_bytes(node, models, workload), 1);
    let counted = workload.requests.iter().filter(|request| request.at >= workload.counted_from);
    let lanes = f64::from(node.devices.first().map_or(1, |device| device.lanes));
    let work: f64 = counted
        .map(|request| {
            let model = &models[workload.functions[request.function].model];
            let at_once = 1.0 + model.strain * (lanes - 1.0);
            ratio(model.run, 1_000_000_000) * (at_once / lanes).min(1.0)
        })
        .sum();
    let devices = ratio(node.devices.len() as u64, 1);
    let by_rates = ratio(bytes_beyond_the_most_asked(node, models, workload), 1);
    let per_second = seconds * link_speed(node);
    Bound { links: copied / per_second, links_by_rates: by_rates / per_second, devices: work / seconds / devices }
}

/// Bytes a second over all host links at once.
fn link_speed(node: &NodeSpec) -> f64 {
    let alone: f64 = node.devices.iter().map(|device| ratio(device.link, 1)).sum();
    // What all share bounds what pairs do.
    let (all, pairs): (Vec<_>, Vec<_>) = node.shared.iter().partition(|(devices, _)| node.is_all_of_many(devices));
    let shared: f64 = pairs.iter().map(|(_, total)| ratio(*total, 1)).sum();
    let speed = if pairs.is_empty() { alone } else { shared.min(alone) };
    all.iter().fold(speed, |speed, (_, total)| speed.min(ratio(*total, 1)))
}

fn missed_bytes(node: &NodeSpec, models: &[ModelSpec], workload: &Workload) -> u64 {
    let capacity: u64 = node.devices.iter().map(|device| device.capacity.get()).sum();
    let next = next_uses(workload);
    let mut inside: BTreeMap<usize, Nanos> = BTreeMap::new();
    let mut by_next: BTreeSet<(Nanos, usize)> = BTreeSet::new();
    let (mut used, mut missed) = (0_u64, 0_u64);
    for (request, &again) in workload.requests.iter().zip(&next) {
        let size = |function: usize| models[workload.functions[function].model].weights.get();
        let function = request.function;
        if let Some(old) = inside.insert(function, again) {
            by_next.remove(&(old, function));
        } else {
            used += size(function);
            missed += if request.at >= workload.counted_from { size(function) } else { 0 };
        }
        by_next.insert((again, function));
        while used > capacity {
            let Some((_, victim)) = by_next.pop_last() else { break };
            inside.remove(&victim);
            used -= size(victim);
        }
    }
    missed
}

/// What is copied where the models that are asked for most stay for good, and each other request is a copy.
fn bytes_beyond_the_most_asked(node: &NodeSpec, models: &[ModelSpec], workload: &Workload) -> u64 {
    let capacity: u64 = node.devices.iter().map(|device| device.capacity.get()).sum();
    let mut asked = vec![0_u64; workload.functions.len()];
    for request in workload.requests.iter().filter(|request| request.at >= workload.counted_from) {
        asked[request.function] += 1;
    }
    let size = |function: usize| models[workload.functions[function].model].weights.get();
    let mut order: Vec<_> = (0..asked.len()).collect();
    order.sort_by_key(|function| std::cmp::Reverse(asked[*function]));
    let (mut used, mut copied) = (0, 0);
    for function in order {
        // The model at the edge counts in part: a bound may.
        let kept = size(function).min(capacity - used);
        used += kept;
        copied += asked[function] * (size(function) - kept);
    }
    copied
}

/// For each request, when its function is asked next.
fn next_uses(workload: &Workload) -> Vec<Nanos> {
    let mut upcoming = vec![Nanos::MAX; workload.functions.len()];
    let mut next = vec![Nanos::MAX; workload.requests.len()];
    for (at, request) in workload.requests.iter().enumerate().rev() {
        next[at] = std::mem::replace(&mut upcoming[request.function], request.at);
    }
    next
}
