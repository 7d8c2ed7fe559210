//! Requests: replayed from counts per minute, or generated. Equal seeds give equal requests.

use crate::{
    catalog::{ModelSpec, Nanos, SECOND},
    random::Random,
};

/// The counts of the published trace, one function a line.
const PUBLISHED: &str = include_str!("../traces/requests_per_minute_120x20.csv");
const MINUTE: Nanos = 60 * SECOND;
/// A node is warm after that.
const WARM_UP: Nanos = MINUTE;

/// One function: its model by place in the catalogue, and its deadline.
#[derive(Clone, Copy, Debug)]
pub struct FunctionSpec {
    /// Which model.
    pub model: usize,
    /// Within what it must be answered.
    pub deadline: Nanos,
}

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Request {
    /// When it comes.
    pub at: Nanos,
    /// Its function by place.
    pub function: usize,
}

/// What a node is asked.
#[derive(Clone, Debug)]
pub struct Workload {
    /// The functions.
    pub functions: Vec<FunctionSpec>,
    /// The requests in order of time.
    pub requests: Vec<Request>,
    /// How long it lasts.
    pub span: Nanos,
    /// Requests before that warm the node and are not counted: functions are not all started in one moment.
    pub counted_from: Nanos,
}

/// Requests of each function in each minute.
pub type Counts = Vec<Vec<f64>>;

/// Reads counts from lines of comma-separated numbers; a line that is none is left out.
pub fn parse_counts(text: &str) -> Counts {
    let line = |line: &str| line.split(',').map(|cell| cell.trim().parse().ok()).collect::<Option<Vec<f64>>>();
    text.lines()
        .filter_map(line)
        .filter(|counts| counts.iter().all(|count| count.is_finite() && *count >= 0.0))
        .collect()
}

/// The published counts.
pub fn published_counts() -> Counts {
    parse_counts(PUBLISHED)
}

/// Counts that nobody has seen: a mean per function, drifting and bursting from minute to minute.
pub fn drawn_counts(seed: u64, lines: usize, minutes: usize) -> Counts {
    let mut random = Random::new(seed).fork(1);
    let line = |_| {
        let mean = (9.8 * (0.45 * random.normal()).exp()).clamp(2.0, 30.0);
        let mut drift = 0.0;
        let minute = |_| {
            drift = 0.7 * drift + 0.25 * random.normal();
            let burst = if random.unit() < 0.03 { 2.5 } else { 1.0 };
            mean * f64::exp(drift) * burst
        };
        (0..minutes).map(minute).collect()
    };
    (0..lines).map(line).collect()
}

/// `n` functions that draw lines of the counts with replacement; each minute's requests are a Poisson process.
pub fn replay(counts: &Counts, models: &[ModelSpec], n: usize, minutes: usize, seed: u64) -> Workload {
    let random = Random::new(seed);
    let (mut lines, mut times) = (random.fork(2), random.fork(3));
    let functions = deal(models, n);
    let mut requests = Vec::new();
    for function in 0..n {
        let line = &counts[lines.below(counts.len())];
        let start = lines.below(line.len().saturating_sub(minutes) + 1);
        for minute in 0..minutes {
            let rate = line.get(start + minute).copied().unwrap_or(0.0);
            poisson(&mut times, rate, MINUTE, |at| {
                requests.push(Request { at: minute as u64 * MINUTE + at, function });
            });
        }
    }
    finish(functions, requests, minutes as u64 * MINUTE)
}

/// `n` functions that are asked steadily, so many times a minute each.
pub fn steady(models: &[ModelSpec], n: usize, per_minute: f64, minutes: usize, seed: u64) -> Workload {
    let mut times = Random::new(seed).fork(4);
    let span = minutes as u64 * MINUTE;
    let mut requests = Vec::new();
    for function in 0..n {
        #[expect(clippy::cast_precision_loss, reason = "minutes are few")]
        poisson(&mut times, per_minute * minutes as f64, span, |at| requests.push(Request { at, function }));
    }
    finish(deal(models, n), requests, span)
}

/// As popular as Zipf's law says, each asked in bursts: quiet for long, then often for a short while.
///
/// `per_minute` is the mean over all functions; the exponent is the popularity's.
pub fn bursty(models: &[ModelSpec], n: usize, exponent: f64, per_minute: f64, minutes: usize, seed: u64) -> Workload {
    const BURST: f64 = 20.0;
    const SHARE_OF_TIME: f64 = 0.2;
    let random = Random::new(seed);
    let (mut order, mut times) = (random.fork(5), random.fork(6));
    let mut functions = deal(models, n);
    // Popularity must not follow the models' order.
    for at in (1..n).rev() {
        functions.swap(at, order.below(at + 1));
    }
    let span = minutes as u64 * MINUTE;
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    let (count, seconds) = (n as f64, span as f64 / SECOND as f64);
    let weight = |rank: usize| f64::powf(f64::from(u32::try_from(rank + 1).unwrap_or(u32::MAX)), -exponent);
    let total: f64 = (0..n).map(weight).sum();
    let mut requests = Vec::new();
    for function in 0..n {
        let per_second = (per_minute / 60.0 * count * weight(function) / total).min(40.0);
        let (mut at, mut busy) = (times.unit() * BURST, times.unit() < SHARE_OF_TIME);
        let mut from = 0.0;
        while from < seconds {
            let rate = per_second * if busy { 4.0 } else { 0.25 };
            let until = (from + at).min(seconds);
            let mut next = from + times.exponential(1.0 / rate.max(1e-9));
            while next < until {
                requests.push(Request { at: nanos(next), function });
                next += times.exponential(1.0 / rate.max(1e-9));
            }
            from = until;
            busy = !busy;
            at = times.exponential(if busy { BURST } else { BURST * (1.0 - SHARE_OF_TIME) / SHARE_OF_TIME });
        }
    }
    finish(functions, requests, span)
}

/// `n` functions that timers call: each every so often, from a moment of its own on, early or late by some `jitter`.
pub fn timers(models: &[ModelSpec], n: usize, every: Nanos, jitter: Nanos, span: Nanos, seed: u64) -> Workload {
    let mut times = Random::new(seed).fork(9);
    let mut requests = Vec::new();
    for function in 0..n {
        let phase = times.below(usize::try_from(every).unwrap_or(usize::MAX)) as Nanos + jitter;
        let turns = (0..).map(|turn| phase + turn * every).take_while(|at| at + jitter < span);
        for at in turns {
            let off = times.below(usize::try_from(2 * jitter + 1).unwrap_or(usize::MAX)) as Nanos;
            requests.push(Request { at: at + off - jitter, function });
        }
    }
    finish(deal(models, n), requests, span)
}

/// The worst for a cache: all functions one after the other, round and round, in waves of `wave` at once.
pub fn adversarial(models: &[ModelSpec], n: usize, wave: usize, every: Nanos, span: Nanos) -> Workload {
    let (mut requests, mut at, mut function) = (Vec::new(), 0, 0);
    while at < span {
        for _ in 0..wave {
            requests.push(Request { at, function });
            function = (function + 1) % n.max(1);
        }
        at += every;
    }
    finish(deal(models, n), requests, span)
}

/// Models in turn.
fn deal(models: &[ModelSpec], n: usize) -> Vec<FunctionSpec> {
    let function = |at: usize| {
        let model = at % models.len();
        FunctionSpec { model, deadline: models[model].deadline }
    };
    (0..n).map(function).collect()
}

fn finish(functions: Vec<FunctionSpec>, mut requests: Vec<Request>, span: Nanos) -> Workload {
    requests.sort_unstable();
    Workload { functions, requests, span, counted_from: WARM_UP.min(span / 2) }
}

fn poisson(random: &mut Random, mean: f64, span: Nanos, mut each: impl FnMut(Nanos)) {
    #[expect(clippy::cast_precision_loss, reason = "spans are below 2^53")]
    let seconds = span as f64 / 1e9;
    if mean <= 0.0 {
        return;
    }
    let mut at = random.exponential(seconds / mean);
    while at < seconds {
        each(nanos(at));
        at += random.exponential(seconds / mean);
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "times of a simulation are small and positive"
)]
fn nanos(seconds: f64) -> Nanos {
    (seconds * 1e9) as Nanos
}
