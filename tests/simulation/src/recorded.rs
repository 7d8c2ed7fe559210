//! A broker's trace as a workload: its devices, models, functions and requests, for any policy to be tried on.
//!
//! Costs are what the trace shows. Where it shows nothing, they are what the scheduler itself would assume. Each function
//! gets weights of its own, as in all simulations; objectives count as p98, and late requests are served.

mod beside;

use std::collections::BTreeMap;

use faaswap_protocol::Bytes;
use faaswap_scheduler::{
    DeviceId, Event, FunctionKey, Link, ModelId, Moment, RequestKey,
    trace::{Line, Reader, TraceError},
};

use self::beside::{Ran, Runs};
use crate::{
    catalog::{DeviceSpec, ModelSpec, Nanos, NodeSpec, SECOND, nanos_at},
    scenario::Stage,
    workload::{FunctionSpec, Request, Workload},
};

/// Bytes a second of a host link that was neither probed nor used.
const LINK_UNKNOWN: u64 = 10_000_000_000;
/// A run that was neither measured nor seen.
const RUN_UNKNOWN: Nanos = 2_000_000;
/// The part of a model's runs, in hundredths, that are taken to have had nothing beside them.
const ALONE_PERCENT: usize = 10;
/// A model of which so many runs were seen takes what these took, and not what was measured before.
const RUNS_ENOUGH: usize = 9;
/// How much a run slows down per run beside it, where none had any.
const STRAIN_UNKNOWN: f64 = 0.6;

/// One model as the trace shows it.
#[derive(Default)]
struct Seen {
    charge: Bytes,
    weights: Option<Bytes>,
    measured: Option<Nanos>,
    /// Runs with the weights there.
    runs: Vec<Ran>,
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
    runs: Runs,
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
                reading.see_runs(nanos(now.0), &answer);
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
                if let Some((model, ran)) = self.runs.end(nanos(now.0), request, nanos(took)) {
                    self.models.entry(model).or_default().runs.push(ran);
                }
            }
            Event::DeviceLost { device } => self.runs.lose(device),
            Event::DeviceAdded { .. }
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

    /// Which runs began: `run REQUEST MODEL DEVICE LANE resident`, or `coming`.
    fn see_runs(&mut self, now: Nanos, answer: &str) {
        for action in answer.split("; ").filter(|action| action.starts_with("run ")) {
            let mut words = action.split(' ').skip(1).map(str::parse::<u64>);
            if let (Some(Ok(request)), Some(Ok(model)), Some(Ok(device))) = (words.next(), words.next(), words.next()) {
                let model = ModelId(u32::try_from(model).unwrap_or(u32::MAX));
                let device = DeviceId(u16::try_from(device).unwrap_or(u16::MAX));
                self.runs.begin(now, RequestKey(request), (model, device), action.ends_with(" resident"));
            }
        }
    }

    fn stage(mut self) -> Stage {
        let node = self.node();
        let places: BTreeMap<_, _> = self.models.keys().enumerate().map(|(place, model)| (*model, place)).collect();
        let all = self.models.values().flat_map(|seen| {
            let alone = seen.run();
            seen.runs.iter().map(move |ran| (alone, ran))
        });
        let strain = beside::strain(all).unwrap_or(STRAIN_UNKNOWN);
        let models: Vec<_> = self.models.values().map(|seen| seen.spec(strain)).collect();
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
            // What was faster than the host's link came over another.
            let beyond = copies.iter().filter_map(|&(bytes, took)| took.checked_sub(nanos_at(Bytes::new(bytes), link)));
            let beyond: Vec<_> = beyond.collect();
            // In whole microseconds: bytes over a speed leave a rest.
            let per_swap = median(&beyond).unwrap_or(0) / 1_000 * 1_000;
            DeviceSpec { link, per_swap, ..*spec }
        });
        let chunk = self.models.values().map(|seen| seen.charge.get()).fold(0, greatest_common);
        NodeSpec { devices: devices.collect(), shared, peers, chunk: Bytes::new(chunk.max(1)) }
    }
}

impl Seen {
    /// A run alone.
    fn run(&self) -> Nanos {
        // The shorter ones had nothing beside them. Of a few all may be wild, as while other models were being bound.
        let took: Vec<_> = self.runs.iter().map(|ran| ran.took).collect();
        let seen = quantile(&took, ALONE_PERCENT);
        let enough = seen.filter(|_| took.len() >= RUNS_ENOUGH);
        enough.or(self.measured).or(seen).unwrap_or(RUN_UNKNOWN)
    }

    fn spec(&self, strain: f64) -> ModelSpec {
        let weights = self.weights.unwrap_or(self.charge);
        // The functions have the deadlines.
        ModelSpec { name: "recorded", weights, run: self.run(), tail: 0, strain, deadline: 0 }
    }
}

fn per_second(bytes: u64, took: Nanos) -> u64 {
    let rate = u128::from(bytes) * u128::from(SECOND) / u128::from(took.max(1));
    u64::try_from(rate).unwrap_or(u64::MAX)
}

fn median(values: &[u64]) -> Option<u64> {
    quantile(values, 50)
}

fn quantile(values: &[u64], percent: usize) -> Option<u64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() * percent / 100).copied()
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
        let ran = |took| Ran { took, beside: 0.0 };
        let run = |runs: Vec<Nanos>, measured| {
            Seen { runs: runs.into_iter().map(ran).collect(), measured, ..Seen::default() }.run()
        };
        assert_eq!(run(vec![250_000_000, 1_000_000], Some(1_100_000)), 1_100_000);
        assert_eq!(run(vec![1_000_000; RUNS_ENOUGH], Some(1_100_000)), 1_000_000);
        assert_eq!(run(vec![3_000_000], None), 3_000_000);
        assert_eq!(run(Vec::new(), None), RUN_UNKNOWN);
    }
}
