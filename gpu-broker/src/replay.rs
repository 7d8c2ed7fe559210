//! Replays a recorded trace: the same scheduler, the same events, and whether it does the same again.

use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::Path,
    time::Duration,
};

use faaswap_scheduler::{
    Action, Event, FunctionKey, Moment, PolicyKind, RequestKey, Scheduler,
    trace::{Ending, Line, Named, Reader, TraceError, answer},
};

use crate::limits::TRACE_LINE_BYTES_MAX;

/// The share of answers that latencies are shown for, in thousandths.
const SHOWN_PERMILLE: usize = 980;

/// Why a trace cannot be replayed at all.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The file.
    #[error("the trace cannot be read: {0}")]
    Io(#[from] io::Error),
    /// What stands at its beginning.
    #[error(transparent)]
    Trace(#[from] TraceError),
}

/// A step that was decided differently.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Its line in the trace.
    pub line: u64,
    /// When it was.
    pub at: Moment,
    /// What had happened.
    pub event: Event,
    /// What was answered then.
    pub recorded: String,
    /// What is answered now.
    pub replayed: String,
}

/// What became of a function's requests.
#[derive(Clone, Debug, Default)]
struct Tally {
    arrived: u64,
    refused: u64,
    /// From arrival to the end of the run.
    latencies: Vec<Duration>,
}

/// What a replay has shown.
#[derive(Clone, Debug)]
pub struct Replayed {
    /// Who decided.
    pub policy: PolicyKind,
    /// Steps of the scheduler.
    pub events: u64,
    /// Why the trace ends; `None` where it was cut off.
    pub ending: Option<Ending>,
    /// The first step that was decided differently.
    pub difference: Option<Difference>,
    /// How many were.
    pub different: u64,
    /// A line that is not what was recorded; what follows it was not looked at.
    pub changed: Option<(u64, TraceError)>,
    until: Moment,
    runs: u64,
    resident_runs: u64,
    swap_ins: u64,
    swap_outs: u64,
    functions: BTreeMap<FunctionKey, Tally>,
    names: BTreeMap<FunctionKey, String>,
    open: BTreeMap<RequestKey, (FunctionKey, Moment)>,
    /// What else a run answers, by the request that it was started for.
    shared: BTreeMap<RequestKey, Vec<RequestKey>>,
}

impl Replayed {
    fn new(policy: PolicyKind) -> Self {
        Self {
            policy,
            events: 0,
            ending: None,
            difference: None,
            different: 0,
            changed: None,
            until: Moment::default(),
            runs: 0,
            resident_runs: 0,
            swap_ins: 0,
            swap_outs: 0,
            functions: BTreeMap::new(),
            names: BTreeMap::new(),
            open: BTreeMap::new(),
            shared: BTreeMap::new(),
        }
    }

    /// Whether every step was decided as it was recorded.
    pub fn is_same(&self) -> bool {
        self.difference.is_none() && self.changed.is_none()
    }

    fn saw(&mut self, now: Moment, event: &Event) {
        self.events += 1;
        self.until = now;
        if let Event::Arrived { request, function, .. } = *event {
            self.functions.entry(function).or_default().arrived += 1;
            self.open.insert(request, (function, now));
        }
        if let Event::RunDone { request, .. } = *event {
            for one in self.shared.remove(&request).unwrap_or_default().into_iter().chain([request]) {
                if let Some((function, arrived)) = self.open.remove(&one) {
                    self.functions.entry(function).or_default().latencies.push(now.0.saturating_sub(arrived.0));
                }
            }
        }
    }

    fn did(&mut self, action: &Action) {
        match *action {
            Action::Run { request, ref with, resident, .. } => {
                self.runs += 1;
                self.resident_runs += u64::from(resident);
                if !with.is_empty() {
                    self.shared.insert(request, with.clone());
                }
            }
            Action::SwapIn { .. } => self.swap_ins += 1,
            Action::SwapOut { .. } => self.swap_outs += 1,
            Action::Refuse { request, .. } => {
                self.shared.remove(&request);
                if let Some((function, _)) = self.open.remove(&request) {
                    self.functions.entry(function).or_default().refused += 1;
                }
            }
            Action::WakeAt(_) => {}
        }
    }
}

/// Replays the trace in this file.
pub fn replay(path: &Path) -> Result<Replayed, ReplayError> {
    let mut lines = Lines { file: BufReader::new(File::open(path)?), text: Vec::new(), line: 0 };
    let first = lines.next()?.unwrap_or_default();
    let mut reader = Reader::begin(&first)?;
    let config = reader.config();
    let (mut scheduler, mut replayed) = (Scheduler::new(config), Replayed::new(config.policy));
    let mut actions = Vec::new();
    while let Some(text) = lines.next()? {
        match reader.line(&text) {
            Ok(Line::Name { of: Named::Function, id, name }) => {
                if let Ok(id) = u32::try_from(id) {
                    replayed.names.insert(FunctionKey(id), name);
                }
            }
            Ok(Line::Name { of: Named::Device | Named::Model, .. }) => {}
            Ok(Line::End(why)) => {
                replayed.ending = Some(why);
                break;
            }
            Ok(Line::Step { now, event, answer: recorded }) => {
                actions.clear();
                scheduler.step(now, event, &mut actions);
                replayed.saw(now, &event);
                actions.iter().for_each(|action| replayed.did(action));
                let again = answer(&actions);
                if again != recorded {
                    replayed.different += 1;
                    let line = lines.line;
                    let found = || Difference { line, at: now, event, recorded, replayed: again };
                    replayed.difference.get_or_insert_with(found);
                }
            }
            Err(error) => {
                replayed.changed = Some((lines.line, error));
                break;
            }
        }
    }
    Ok(replayed)
}

/// The lines of a file that may have been cut off: what has no end is no line.
struct Lines {
    file: BufReader<File>,
    text: Vec<u8>,
    line: u64,
}

impl Lines {
    fn next(&mut self) -> io::Result<Option<String>> {
        self.text.clear();
        (&mut self.file).take(TRACE_LINE_BYTES_MAX).read_until(b'\n', &mut self.text)?;
        if self.text.pop() != Some(b'\n') {
            return Ok(None);
        }
        self.line += 1;
        // What is not UTF-8 was not written so, and the check over the line says so.
        Ok(Some(String::from_utf8_lossy(&self.text).into_owned()))
    }
}

impl fmt::Display for Replayed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (events, until, policy) = (self.events, self.until.0, self.policy.name());
        let ending = self.ending.map_or_else(|| "cut off: there is no more of it".to_owned(), |why| why.to_string());
        writeln!(f, "{events} events in {:.3} s, decided by {policy}; {ending}", until.as_secs_f64())?;
        let sum = |of: fn(&Tally) -> u64| self.functions.values().map(of).sum::<u64>();
        let answered = sum(|tally| tally.latencies.len() as u64);
        let (arrived, refused, open) = (sum(|tally| tally.arrived), sum(|tally| tally.refused), self.open.len());
        writeln!(f, "{arrived} requests: {answered} ran, {refused} were refused, {open} are open")?;
        let (runs, resident) = (self.runs, self.resident_runs);
        let (ins, outs) = (self.swap_ins, self.swap_outs);
        writeln!(f, "{runs} runs, {resident} of them with their weights there; {ins} swap-ins, {outs} swap-outs")?;
        for (key, tally) in &self.functions {
            let unnamed = format!("function {}", key.0);
            let name = self.names.get(key).unwrap_or(&unnamed);
            let p98 = p98(&tally.latencies).map_or_else(|| "-".to_owned(), |ms| format!("{ms:.2} ms"));
            writeln!(f, "  {name}: {} requests, {} refused, p98 {p98}", tally.arrived, tally.refused)?;
        }
        if let Some((line, error)) = &self.changed {
            writeln!(f, "line {line} was changed: {error}; what follows it was not replayed")?;
        }
        match &self.difference {
            None => write!(f, "all {events} steps were decided as they were recorded"),
            Some(first) => {
                writeln!(f, "{} steps were decided differently, the first in line {}:", self.different, first.line)?;
                writeln!(f, "  at {:.6} s: {:?}", first.at.0.as_secs_f64(), first.event)?;
                writeln!(f, "  recorded: {}", or_nothing(&first.recorded))?;
                write!(f, "  replayed: {}", or_nothing(&first.replayed))
            }
        }
    }
}

fn or_nothing(answer: &str) -> &str {
    if answer.is_empty() { "nothing" } else { answer }
}

/// What that share of answers took at most, in milliseconds.
fn p98(latencies: &[Duration]) -> Option<f64> {
    let mut sorted = latencies.to_vec();
    sorted.sort_unstable();
    let at = (sorted.len() * SHOWN_PERMILLE).div_ceil(1000).saturating_sub(1);
    sorted.get(at).map(|latency| latency.as_secs_f64() * 1e3)
}
