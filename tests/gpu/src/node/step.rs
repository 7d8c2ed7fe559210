//! One stretch of load at one rate, and what came of it.

use std::time::{Duration, Instant};

use faaswap_simulation::{
    catalog::{ModelSpec, Nanos},
    outcome::Tally,
    workload::{self, Counts, Workload},
};
use serde_json::{Value, json};

use super::{
    broker::{Broker, processor_seconds},
    fleet::{Answered, Ending, Fleet, Outcome},
    swaps::Swaps,
    variants::Design,
};
use crate::Result;

/// Requests at the beginning that are answered and checked and not counted, as a part of the time, and at most so long.
const WARM_UP_PART: u32 = 4;
const WARM_UP_MAX: Duration = Duration::from_secs(15);
/// How often is said how it goes.
const SAY_EVERY: Duration = Duration::from_secs(10);
/// What is told in words of what went wrong, each time.
const COMPLAINTS_MAX: usize = 5;
/// Requests that are sent later than that, one of a hundred, say that the clients are what is slow.
const SENT_LATE_MAX: Duration = Duration::from_millis(2);

/// Of fewer requests than that not one may be late, at the p98.
const FEW: u32 = 50;

/// What came of a stretch.
#[derive(Debug, Default)]
pub(crate) struct Step {
    /// The trace's requests times that.
    pub(crate) rate: f64,
    /// By function; counted requests only.
    pub(crate) functions: Vec<Tally>,
    /// Milliseconds from when they were due, of counted answers, sorted.
    pub(crate) latencies: Vec<f64>,
    /// On the lane: those whose weights were there when they got it, and those whose weights were still coming; sorted.
    pub(crate) resident: Vec<f64>,
    pub(crate) swapped: Vec<f64>,
    /// Milliseconds that requests were sent later than they were due, sorted.
    pub(crate) sent_late: Vec<f64>,
    /// Of all requests, counted or not.
    pub(crate) checked: u64,
    pub(crate) wrong: u64,
    pub(crate) refused: u64,
    pub(crate) failed: u64,
    pub(crate) complaints: Vec<String>,
    /// Counted time in seconds.
    pub(crate) seconds: f64,
    /// Bytes and models that came to the devices in it.
    pub(crate) swapped_bytes: f64,
    pub(crate) swaps: f64,
    /// All that came in it.
    pub(crate) swap: Swaps,
    /// Processors that broker and clients were using.
    pub(crate) broker_cores: f64,
    pub(crate) client_cores: f64,
}

/// The value below which so many of a thousand lie.
pub(crate) fn permille(sorted: &[f64], of: usize) -> f64 {
    let at = (sorted.len() * of).div_ceil(1000).saturating_sub(1);
    sorted.get(at).copied().unwrap_or(f64::NAN)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The published requests of so many functions, times `rate`, in so many seconds. Equal seeds give equal requests.
pub(crate) fn requests(models: &[ModelSpec], designs: &[Design], rate: f64, (seconds, seed): (u64, u64)) -> Workload {
    let published = workload::published_counts();
    let counts: Counts = published.iter().map(|line| line.iter().map(|count| count * rate).collect()).collect();
    let minutes = usize::try_from(seconds.div_ceil(60)).unwrap_or(usize::MAX);
    // A long run goes through the trace more than once.
    let counts: Counts =
        counts.iter().map(|line| line.iter().copied().cycle().take(minutes.max(line.len())).collect()).collect();
    let span = Duration::from_secs(seconds);
    let mut workload = workload::replay(&counts, models, designs.len(), minutes, seed);
    workload.span = nanos(span);
    workload.counted_from = nanos((span / WARM_UP_PART).min(WARM_UP_MAX));
    workload.requests.retain(|request| request.at < nanos(span));
    for (function, design) in workload.functions.iter_mut().zip(designs) {
        function.deadline = nanos(design.deadline);
    }
    workload
}

fn nanos(time: Duration) -> Nanos {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Where counters stood.
struct Counters {
    at: Instant,
    swaps: Swaps,
    broker: f64,
    clients: f64,
}

impl Counters {
    fn read(broker: &Broker) -> Result<Self> {
        let swaps = Swaps::read(&broker.metrics()?);
        Ok(Self { at: Instant::now(), swaps, broker: broker.processor_seconds()?, clients: processor_seconds("self")? })
    }
}

/// Puts a workload to the broker; `each` is called with each outcome, and with none now and then, and the time since the start.
pub(crate) fn run(
    broker: &Broker,
    fleet: &Fleet,
    designs: &[Design],
    workload: &Workload,
    mut each: impl FnMut(Duration, Option<&Outcome>),
) -> Result<Step> {
    let times: Vec<_> = workload.requests.iter().map(|r| (Duration::from_nanos(r.at), r.function)).collect();
    let mut step = Step { functions: vec![Tally::default(); designs.len()], ..Step::default() };
    let warm = Duration::from_nanos(workload.counted_from);
    let (start, mut said) = (Instant::now(), Instant::now());
    let mut from: Option<Result<Counters>> = None;
    let unsent = fleet.drive(&times, |outcome| {
        let now = start.elapsed();
        if let Some(outcome) = &outcome {
            step.note(outcome, designs, outcome.due.saturating_duration_since(start) >= warm);
        }
        if now >= warm && from.is_none() {
            from = Some(Counters::read(broker));
        }
        if said.elapsed() >= SAY_EVERY {
            said = Instant::now();
            println!("    {:3.0} s: {} answers, {} wrong", now.as_secs_f64(), step.checked, step.wrong);
        }
        each(now, outcome.as_ref());
    });
    let (from, to) = (from.unwrap_or_else(|| Counters::read(broker))?, Counters::read(broker)?);
    let seconds = to.at.saturating_duration_since(from.at).as_secs_f64().max(f64::MIN_POSITIVE);
    step.failed += unsent as u64;
    step.seconds = (Duration::from_nanos(workload.span) - warm).as_secs_f64();
    step.swap = to.swaps.since(from.swaps);
    (step.swapped_bytes, step.swaps) = (step.swap.bytes / seconds, step.swap.count / seconds);
    step.broker_cores = (to.broker - from.broker) / seconds;
    step.client_cores = (to.clients - from.clients) / seconds;
    for all in [&mut step.latencies, &mut step.resident, &mut step.swapped, &mut step.sent_late] {
        all.sort_unstable_by(f64::total_cmp);
    }
    Ok(step)
}

impl Step {
    fn note(&mut self, outcome: &Outcome, designs: &[Design], counts: bool) {
        let design = &designs[outcome.function];
        let latency = outcome.late + outcome.took;
        let mut tally = Tally { asked: 1, ..Tally::default() };
        match &outcome.end {
            Ending::Answered(answered) => {
                self.checked += 1;
                if !answered.right {
                    self.wrong += 1;
                    self.complain(format!("WRONG: {} answered another output than at first", design.name));
                }
                (tally.answered, tally.met) = (1, u32::from(latency <= design.deadline));
                if counts {
                    self.latencies.push(ms(latency));
                    self.note_lane(*answered);
                }
            }
            Ending::Refused(code) => {
                self.refused += 1;
                tally.refused = 1;
                self.complain(format!("refused: {}: {code}", design.name));
            }
            Ending::Failed(why) => {
                self.failed += 1;
                self.complain(format!("FAILED: {}: {why}", design.name));
            }
        }
        if counts {
            self.sent_late.push(ms(outcome.late));
            let of = &mut self.functions[outcome.function];
            of.asked += tally.asked;
            of.met += tally.met;
            of.answered += tally.answered;
            of.refused += tally.refused;
        }
    }

    fn note_lane(&mut self, answered: Answered) {
        let of = if answered.was_resident { &mut self.resident } else { &mut self.swapped };
        of.push(ms(answered.ran));
    }

    fn complain(&mut self, what: String) {
        if self.complaints.len() < COMPLAINTS_MAX {
            println!("    {what}");
            self.complaints.push(what);
        }
    }

    pub(crate) fn compliant(&self) -> usize {
        self.functions.iter().filter(|tally| tally.is_compliant()).count()
    }

    /// Functions that are not, and had fewer requests than may have a late one: how long a stretch is decides of these.
    pub(crate) fn missed_of_few(&self) -> usize {
        self.functions.iter().filter(|tally| !tally.is_compliant() && tally.asked < FEW).count()
    }

    pub(crate) fn compliant_share(&self) -> f64 {
        self.compliant() as f64 / self.functions.len().max(1) as f64
    }

    pub(crate) fn asked(&self) -> u64 {
        self.functions.iter().map(|tally| u64::from(tally.asked)).sum()
    }

    /// Counted answers within their deadline, of all counted requests.
    pub(crate) fn met_share(&self) -> f64 {
        self.functions.iter().map(|tally| f64::from(tally.met)).sum::<f64>() / (self.asked().max(1) as f64)
    }

    /// Counted requests a second.
    pub(crate) fn per_second(&self) -> f64 {
        self.asked() as f64 / self.seconds
    }

    /// Whether requests left on time.
    pub(crate) fn clients_keep_up(&self) -> bool {
        permille(&self.sent_late, 990) <= ms(SENT_LATE_MAX)
    }

    /// Part of the links' time that copies take at these bytes a second.
    pub(crate) fn link_load(&self, links: f64) -> f64 {
        self.swapped_bytes / links
    }

    pub(crate) fn json(&self, links: f64) -> Value {
        json!({
            "rate": self.rate, "requests_per_s": self.per_second(), "compliant": self.compliant(), "missed_of_few": self.missed_of_few(),
            "functions": self.functions.len(), "met_share": self.met_share(),
            "p50_ms": permille(&self.latencies, 500), "p98_ms": permille(&self.latencies, 980),
            "p99_ms": permille(&self.latencies, 990), "max_ms": self.latencies.last(),
            "lane_weights_there": {"count": self.resident.len(), "p50_ms": permille(&self.resident, 500), "p98_ms": permille(&self.resident, 980)},
            "lane_beside_copy": {"count": self.swapped.len(), "p50_ms": permille(&self.swapped, 500), "p98_ms": permille(&self.swapped, 980)},
            "sent_late_p50_ms": permille(&self.sent_late, 500), "sent_late_p99_ms": permille(&self.sent_late, 990),
            "clients_keep_up": self.clients_keep_up(), "broker_cores": self.broker_cores, "client_cores": self.client_cores,
            "swaps_per_s": self.swaps, "swap": self.swap.json(), "swapped_gb_per_s": self.swapped_bytes / 1e9, "link_load": self.link_load(links),
            "outputs_checked": self.checked, "outputs_wrong": self.wrong, "refused": self.refused, "failed": self.failed,
            "complaints": self.complaints,
        })
    }

    pub(crate) fn say(&self, links: f64) {
        println!(
            "  x{:.2}: {:.1} requests/s, {}/{} functions compliant ({} that are not had fewer than {FEW} requests; {:.2} % in time), p50 {:.2} ms, p98 {:.2} ms; on the lane {} with their weights there {:.2} ms, \
             {} beside their copy {:.2} ms; {:.1} swaps/s, links {:.0} %; {} wrong of {}, {} refused, {} failed",
            self.rate,
            self.per_second(),
            self.compliant(),
            self.functions.len(),
            self.missed_of_few(),
            self.met_share() * 100.0,
            permille(&self.latencies, 500),
            permille(&self.latencies, 980),
            self.resident.len(),
            permille(&self.resident, 500),
            self.swapped.len(),
            permille(&self.swapped, 500),
            self.swaps,
            self.link_load(links) * 100.0,
            self.wrong,
            self.checked,
            self.refused,
            self.failed,
        );
        self.swap.say();
        if !self.clients_keep_up() {
            println!(
                "  the clients are late themselves: one request of a hundred left {:.1} ms late or more, with {:.1} cores in use \
                 by clients and {:.1} by the broker",
                permille(&self.sent_late, 990),
                self.client_cores,
                self.broker_cores
            );
        }
    }
}
