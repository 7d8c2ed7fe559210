//! A broker's trace as a workload: its devices, models, functions and requests, for any policy to be tried on.
//!
//! Costs are what the trace shows. Where it shows nothing, they are what the scheduler itself would assume. Each function
//! gets weights of its own, as in all simulations; objectives count as p98, and late requests are served.

use std::collections::BTreeMap;

use faaswap_protocol::Bytes;
use faaswap_scheduler::{
    DeviceId, Event, FunctionKey, Link, ModelId, Moment, RequestKey,
    trace::{Line, Reader, TraceError},
};

use crate::{
    catalog::{DeviceSpec, ModelSpec, Nanos, NodeSpec, SECOND, nanos_at},
    scenario::Stage,
    workload::{FunctionSpec, Request, Workload},
};

/// Bytes a second of a host link that was neither probed nor used.
const LINK_UNKNOWN: u64 = 10_000_000_000;
/// A run that was neither measured nor seen.
const RUN_UNKNOWN: Nanos = 2_000_000;
/// A model of which so many runs were seen takes what these took, and not what was measured before.
const RUNS_ENOUGH: usize = 9;
/// How much a run slows down per run beside it: a trace does not say.
const STRAIN_UNKNOWN: f64 = 0.6;

/// One model as the trace shows it.
#[derive(Default)]
struct Seen {
    charge: Bytes,
    weights: Option<Bytes>,
    measured: Option<Nanos>,
    /// Runs with the weights there.
    runs: Vec<Nanos>,
}

#[derive(Default)]
struct Reading {
    devices: Vec<(DeviceId, DeviceSpec)>,
    alone: BTreeMap<DeviceId, u64>,
    beside: BTreeMap<(DeviceId, DeviceId), u64>,
    peers: Vec<(DeviceId, DeviceId, u64)>,
    /// Bytes and time of each copy.
    copies: BTreeMap<DeviceId, Vec<(u64, Nanos)>>,
    models: BTreeMap<ModelId, Seen>,
    functions: Vec<(FunctionKey, ModelId, Nanos)>,
    requests: Vec<(Nanos, RequestKey, FunctionKey)>,
    /// Requests that run with their weights there, and their models.
    running: BTreeMap<RequestKey, ModelId>,
}

/// Reads a trace as far as it goes.
pub fn stage(text: &str) -> Result<Stage, TraceError> {
    let mut lines = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
    let mut reader = Reader::begin(lines.next().unwrap_or_default())?;
    let mut reading = Reading::default();
    for line in lines {
        match reader.line(line)? {
            Line::Name { .. } => {}
            Line::End(_) => break,
            Line::Step { now, event, answer } => {
                reading.hear(now, event);
                reading.see_runs(&answer);
            }
        }
    }
    Ok(reading.stage())
}

impl Reading {
    fn hear(&mut self, now: Moment, event: Event) {
        match event {
            Event::DeviceAdded { device, capacity, lanes } if !self.devices.iter().any(|(id, _)| *id == device) => {
                self.devices.push((device, DeviceSpec { capacity, lanes, link: LINK_UNKNOWN, per_swap: 0 }));
            }
            Event::LinkMeasured { link, bytes_per_s } => match link {
                Link::Host { to } => drop(self.alone.insert(to, bytes_per_s)),
                Link::HostBeside { to, beside } => drop(self.beside.insert((to, beside), bytes_per_s)),
                Link::Peer { from, to } => self.peers.push((from, to, bytes_per_s)),
            },
            Event::ModelBound { model, charge, .. } => self.models.entry(model).or_default().charge = charge,
            Event::ModelMeasured { model, weights, run, .. } => {
                let seen = self.models.entry(model).or_default();
                seen.weights = Some(weights);
                seen.measured = Some(nanos(run)).filter(|run| *run > 0);
            }
            Event::FunctionAdded { function, model, slo, .. } => {
                self.functions.push((function, model, nanos(slo.deadline)));
            }
            Event::Arrived { request, function, .. } => self.requests.push((nanos(now.0), request, function)),
            Event::SwapInDone { model, device, took } => {
                let weights = self.models.get(&model).and_then(|seen| seen.weights).map_or(0, Bytes::get);
                if !took.is_zero() {
                    self.copies.entry(device).or_default().push((weights, nanos(took)));
                }
            }
            Event::RunDone { request, took } => {
                if let Some(seen) = self.running.remove(&request).and_then(|model| self.models.get_mut(&model)) {
                    seen.runs.push(nanos(took));
                }
            }
            Event::DeviceAdded { .. }
            | Event::DeviceLost { .. }
            | Event::DeviceObserved { .. }
            | Event::PolicyChosen { .. }
            | Event::Expected { .. }
            | Event::ModelRemoved { .. }
            | Event::FunctionRemoved { .. }
            | Event::Cancelled { .. }
            | Event::SwapInFailed { .. }
            | Event::SwapOutDone { .. }
            | Event::RunTried { .. }
            | Event::DrainBegun
            | Event::Woken => {}
        }
    }

    /// Which runs began with their weights there: `run REQUEST MODEL DEVICE LANE resident`.
    fn see_runs(&mut self, answer: &str) {
        for action in answer.split("; ").filter(|action| action.starts_with("run ") && action.ends_with(" resident")) {
            let mut words = action.split(' ').skip(1).map(str::parse::<u64>);
            if let (Some(Ok(request)), Some(Ok(model))) = (words.next(), words.next()) {
                self.running.insert(RequestKey(request), ModelId(u32::try_from(model).unwrap_or(u32::MAX)));
            }
        }
    }

    fn stage(mut self) -> Stage {
        let node = self.node();
        let places: BTreeMap<_, _> = self.models.keys().enumerate().map(|(place, model)| (*model, place)).collect();
        let models: Vec<_> = self.models.into_values().map(|seen| seen.spec()).collect();
        let mut functions = Vec::new();
        let mut function_places = BTreeMap::new();
        for (function, model, deadline) in self.functions {
            if let Some(&model) = places.get(&model) {
                function_places.insert(function, functions.len());
                functions.push(FunctionSpec { model, deadline });
            }
        }
        let known =
            |(at, _, function): &(Nanos, _, _)| Some(Request { at: *at, function: *function_places.get(function)? });
        let mut requests: Vec<_> = self.requests.iter().filter_map(known).collect();
        requests.sort_unstable();
        let span = requests.last().map_or(0, |last| last.at) + SECOND;
        (node, models, Workload { functions, requests, span, counted_from: 0 })
    }

    fn node(&mut self) -> NodeSpec {
        let place = |id: DeviceId| self.devices.iter().position(|(other, _)| *other == id);
        let peers = self.peers.iter().filter(|(_, _, rate)| *rate > 0);
        let peers = peers.filter_map(|&(from, to, rate)| Some((place(from)?, place(to)?, rate))).collect();
        let mut shared = Vec::new();
        for (&(a, b), rate) in self.beside.iter().filter(|((a, b), _)| a < b) {
            let back = self.beside.get(&(b, a)).unwrap_or(rate);
            if let (Some(a), Some(b)) = (place(a), place(b)) {
                shared.push((vec![a, b], rate.saturating_add(*back)));
            }
        }
        let devices = self.devices.iter().map(|(id, spec)| {
            let copies = self.copies.get(id).map_or(&[][..], Vec::as_slice);
            let rates: Vec<_> = copies.iter().map(|&(bytes, took)| per_second(bytes, took)).collect();
            let link = self.alone.get(id).copied().or(median(&rates)).unwrap_or(LINK_UNKNOWN);
            let beyond: Vec<_> =
                copies.iter().map(|&(bytes, took)| took.saturating_sub(nanos_at(Bytes::new(bytes), link))).collect();
            // In whole microseconds: bytes over a speed leave a rest.
            let per_swap = median(&beyond).unwrap_or(0) / 1_000 * 1_000;
            DeviceSpec { link, per_swap, ..*spec }
        });
        let chunk = self.models.values().map(|seen| seen.charge.get()).fold(0, greatest_common);
        NodeSpec { devices: devices.collect(), shared, peers, chunk: Bytes::new(chunk.max(1)) }
    }
}

impl Seen {
    fn spec(self) -> ModelSpec {
        // Of a few runs half may be wild, as while other models were being bound.
        let seen = median(&self.runs);
        let enough = seen.filter(|_| self.runs.len() >= RUNS_ENOUGH);
        let run = enough.or(self.measured).or(seen).unwrap_or(RUN_UNKNOWN);
        let weights = self.weights.unwrap_or(self.charge);
        // The functions have the deadlines.
        ModelSpec { name: "recorded", weights, run, tail: 0, strain: STRAIN_UNKNOWN, deadline: 0 }
    }
}

fn per_second(bytes: u64, took: Nanos) -> u64 {
    let rate = u128::from(bytes) * u128::from(SECOND) / u128::from(took.max(1));
    u64::try_from(rate).unwrap_or(u64::MAX)
}

fn median(values: &[u64]) -> Option<u64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied()
}

fn greatest_common(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { greatest_common(b, a % b) }
}

fn nanos(span: std::time::Duration) -> Nanos {
    u64::try_from(span.as_nanos()).unwrap_or(Nanos::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_wild_runs_do_not_make_a_model_slow() {
        let run = |runs: Vec<Nanos>, measured| Seen { runs, measured, ..Seen::default() }.spec().run;
        assert_eq!(run(vec![250_000_000, 1_000_000], Some(1_100_000)), 1_100_000);
        assert_eq!(run(vec![1_000_000; RUNS_ENOUGH], Some(1_100_000)), 1_000_000);
        assert_eq!(run(vec![3_000_000], None), 3_000_000);
        assert_eq!(run(Vec::new(), None), RUN_UNKNOWN);
    }
}
