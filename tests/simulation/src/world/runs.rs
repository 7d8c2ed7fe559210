//! Runs in the simulation: they slow each other down, and wait for weights that are still coming.

use std::time::Duration;

use faaswap_scheduler::{Event, ModelId, RequestKey};

use super::{Happening, World};
use crate::catalog::{ModelSpec, Nanos};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Computing,
    AwaitingWeights,
    Tail,
}

#[derive(Clone, Copy, Debug)]
struct Run {
    request: RequestKey,
    model: ModelId,
    started: Nanos,
    /// Its weights were there when it was started.
    resident: bool,
    /// The weights came after its start.
    pipelined: bool,
    phase: Phase,
    left: f64,
    rate: f64,
    version: u64,
}

/// The lanes of a device.
#[derive(Clone, Debug)]
pub(super) struct Runs {
    lanes: Vec<Option<Run>>,
    since: Nanos,
    versions: u64,
}

impl Runs {
    pub(super) fn new(lanes: u16) -> Self {
        Self { lanes: vec![None; usize::from(lanes)], since: 0, versions: 0 }
    }

    pub(super) fn lose(&mut self) {
        self.lanes.fill(None);
    }

    #[expect(clippy::cast_precision_loss, reason = "spans are below 2^53")]
    fn advance(&mut self, now: Nanos) -> Nanos {
        let passed = now - self.since;
        self.since = now;
        let busy = self.lanes.iter().any(Option::is_some);
        for run in self.lanes.iter_mut().flatten() {
            run.left = (run.left - run.rate * passed as f64).max(0.0);
        }
        if busy { passed } else { 0 }
    }
}

impl World<'_> {
    pub(super) fn model(&self, model: ModelId) -> ModelSpec {
        self.models[self.workload.functions[model.0 as usize].model]
    }

    pub(super) fn begin_run(
        &mut self,
        request: RequestKey,
        with: &[RequestKey],
        model: ModelId,
        (device, lane): (usize, usize),
        resident: bool,
    ) {
        self.advance_runs(device);
        let further = f64::from(u32::try_from(with.len()).unwrap_or(u32::MAX));
        let work = self.noisy(self.model(model).run) * (1.0 + further * self.setting.batching.unwrap_or(1.0));
        self.joined.insert(request, with.to_vec());
        let pipelined = !resident && self.links.is_coming(device, model);
        let run = Run {
            request,
            model,
            started: self.now,
            resident,
            pipelined,
            phase: Phase::Computing,
            left: work,
            rate: 1.0,
            version: 0,
        };
        let place = &mut self.runs[device].lanes[lane];
        assert!(place.is_none(), "lane {lane} of device {device} is taken");
        *place = Some(run);
        self.reschedule_runs(device);
    }

    #[expect(clippy::cast_precision_loss, reason = "spans are below 2^53")]
    fn noisy(&mut self, span: Nanos) -> f64 {
        let factor = (1.0 + self.setting.noise * self.noise.normal()).clamp(0.5, 2.0);
        span as f64 * factor
    }

    fn advance_runs(&mut self, device: usize) {
        let busy = self.runs[device].advance(self.now);
        self.outcome.devices[device].busy += busy;
    }

    /// Enters the next turn of every run anew: rates may have changed.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small positive times")]
    fn reschedule_runs(&mut self, device: usize) {
        let working = |run: &&Run| run.phase != Phase::AwaitingWeights;
        let count = self.runs[device].lanes.iter().flatten().filter(working).count();
        let beside = f64::from(u32::try_from(count.saturating_sub(1)).unwrap_or(u32::MAX));
        for lane in 0..self.runs[device].lanes.len() {
            let Some(run) = self.runs[device].lanes[lane] else { continue };
            let rate = 1.0 / (1.0 + self.model(run.model).strain * beside);
            let runs = &mut self.runs[device];
            runs.versions += 1;
            let version = runs.versions;
            if let Some(run) = &mut runs.lanes[lane] {
                run.version = version;
                run.rate = if run.phase == Phase::AwaitingWeights { 0.0 } else { rate };
            }
            if run.phase != Phase::AwaitingWeights {
                let at = self.now + (run.left / rate).ceil() as Nanos;
                self.enter(at, Happening::RunTurns { device, lane, version });
            }
        }
    }

    /// A run has done its computing, or its tail.
    pub(super) fn run_turns(&mut self, device: usize, lane: usize, version: u64) {
        let current = self.runs[device].lanes[lane].filter(|run| run.version == version);
        if current.is_none() {
            return;
        }
        self.advance_runs(device);
        let Some(run) = self.runs[device].lanes[lane] else { return };
        match run.phase {
            // ## Computing => AwaitingWeights
            Phase::Computing if run.pipelined && self.links.is_coming(device, run.model) => {
                self.turn(device, lane, Phase::AwaitingWeights, 0.0);
            }
            // ## Computing => Tail
            Phase::Computing if run.pipelined => self.begin_tail(device, lane, run.model),
            // ## Computing | Tail => over
            Phase::Computing | Phase::Tail => self.run_over(device, lane, run),
            Phase::AwaitingWeights => {}
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "spans are below 2^53")]
    fn begin_tail(&mut self, device: usize, lane: usize, model: ModelId) {
        let tail = self.model(model).tail as f64;
        self.turn(device, lane, Phase::Tail, tail);
    }

    fn turn(&mut self, device: usize, lane: usize, phase: Phase, left: f64) {
        if let Some(run) = &mut self.runs[device].lanes[lane] {
            (run.phase, run.left) = (phase, left);
        }
        self.reschedule_runs(device);
    }

    fn run_over(&mut self, device: usize, lane: usize, run: Run) {
        self.runs[device].lanes[lane] = None;
        self.reschedule_runs(device);
        for request in self.requests_of(run) {
            self.answered(device, request, run.resident);
        }
        let took = Duration::from_nanos(self.now - run.started);
        self.tell(Event::RunDone { request: run.request, took });
    }

    /// All requests of a run that is over.
    fn requests_of(&mut self, run: Run) -> Vec<RequestKey> {
        let mut requests = self.joined.remove(&run.request).unwrap_or_default();
        requests.push(run.request);
        requests
    }

    fn answered(&mut self, device: usize, request: RequestKey, resident: bool) {
        if let Some((function, arrived)) = self.arrived.remove(&request)
            && self.counts(arrived)
        {
            let latency = self.now - arrived;
            let tally = &mut self.outcome.functions[function];
            tally.answered += 1;
            tally.met += u32::from(latency <= self.workload.functions[function].deadline);
            self.outcome.devices[device].answered += 1;
            let latency_us = u32::try_from(latency / 1_000).unwrap_or(u32::MAX);
            self.outcome.latencies_us.push(latency_us);
            if resident {
                self.outcome.found_resident += 1;
            } else {
                self.outcome.swapped_us.push(latency_us);
            }
        }
    }

    /// Runs that wait for these weights go on.
    pub(super) fn weights_came(&mut self, device: usize, model: ModelId) {
        self.advance_runs(device);
        for lane in 0..self.runs[device].lanes.len() {
            if let Some(run) = self.runs[device].lanes[lane]
                && run.model == model
                && run.phase == Phase::AwaitingWeights
            {
                self.begin_tail(device, lane, model);
            }
        }
    }

    /// Runs behind weights that did not come end without an answer in time.
    pub(super) fn weights_failed(&mut self, device: usize, model: ModelId) {
        self.advance_runs(device);
        for lane in 0..self.runs[device].lanes.len() {
            if let Some(run) = self.runs[device].lanes[lane].filter(|run| run.model == model && run.pipelined) {
                self.runs[device].lanes[lane] = None;
                self.reschedule_runs(device);
                for request in self.requests_of(run) {
                    if let Some((function, arrived)) = self.arrived.remove(&request) {
                        self.outcome.functions[function].refused += u32::from(self.counts(arrived));
                    }
                }
                self.tell(Event::RunDone { request: run.request, took: Duration::ZERO });
            }
        }
    }
}
