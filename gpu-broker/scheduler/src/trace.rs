//! A history as text: every event with its moment and what was answered to it, one line each, so that it replays.
//!
//! Only the text is made and read here; where it is kept, and what is done about a difference, is for others. Every line
//! carries a check over itself and all lines before it: a changed, missing or added line is found where it is.
//!
//! ```text
//! faaswap-trace 3 policy=faaswap seed=0 function_queue_max=256 node_queue_max=16384 ahead=true #8c7b1c52
//! 81250 device_added 0 1048576 1 >  #0d2a5a1e
//! name function 4 team/ocr #5c1b9a77
//! 93411520 arrived 7 4 123411520 alone > swap_in 3 0 host; run 7 3 0 0 coming #e0a53b90
//! end stopped #51f0c3aa
//! ```

mod words;

use std::fmt::{self, Write as _};

use self::words::Words;
use crate::{
    event::{Action, Event, Moment},
    policy::PolicyKind,
    scheduler::SchedulerConfig,
};

/// The version of the format; another one is not read.
pub const VERSION: u32 = 3;
/// How a trace begins.
const MAGIC: &str = "faaswap-trace";
/// Between an event and the answer to it.
const ANSWERED: &str = " > ";
/// Before a line's check.
const CHECKED: &str = " #";
/// FNV-1a, 64 bits. It finds what was changed by accident; it is no signature.
const FNV_OFFSET: u64 = 0xCBF2_9CE4_8422_2325;
const FNV_PRIME: u64 = 0x0000_0100_0000_01B3;

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Named {
    /// A device.
    Device,
    /// A model.
    Model,
    /// A function.
    Function,
}

/// Why a trace ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Whoever recorded it has stopped.
    Stopped,
    /// It has the size that it may have.
    Full,
    /// Events came faster than they could be written.
    Behind,
    /// It could not be written any more.
    Failed,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// What people call a thing.
    Name {
        /// What kind of thing.
        of: Named,
        /// Which of its kind.
        id: u64,
        /// Its name.
        name: String,
    },
    /// One step of the scheduler.
    Step {
        /// When.
        now: Moment,
        /// What happened.
        event: Event,
        /// What was answered, as [`answer`] writes it.
        answer: String,
    },
    /// The end.
    End(Ending),
}

/// Why text is no trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TraceError {
    /// It begins as no trace does.
    NoTrace,
    /// It is of another version.
    Version {
        /// Which.
        found: u32,
    },
    /// The line is not what was written after the lines before it.
    Changed,
    /// The line says nothing that is known.
    Unknown {
        /// What stands there.
        text: String,
    },
}

impl fmt::Display for TraceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoTrace => write!(f, "this is no trace: it does not begin with {MAGIC}"),
            Self::Version { found } => write!(f, "the trace is of version {found}, only {VERSION} can be read"),
            Self::Changed => f.write_str("this line is not what was recorded after those before it"),
            Self::Unknown { text } => write!(f, "this says nothing that is known: {text}"),
        }
    }
}

impl std::error::Error for TraceError {}

/// The check over all lines so far.
#[derive(Clone, Copy, Debug)]
struct Check(u64);

impl Check {
    const fn new() -> Self {
        Self(FNV_OFFSET)
    }

    /// Takes in a line; gives the check that it carries.
    fn over(&mut self, line: &str) -> u64 {
        for byte in line.bytes() {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(FNV_PRIME);
        }
        (self.0 >> 32) ^ (self.0 & 0xFFFF_FFFF)
    }
}

/// Writes the lines of a trace, in order.
#[derive(Clone, Debug)]
pub struct Writer {
    check: Check,
}

impl Writer {
    /// Begins a trace of a scheduler with this configuration: its first line is appended to `out`.
    pub fn begin(config: &SchedulerConfig, out: &mut String) -> Self {
        let mut writer = Self { check: Check::new() };
        let (policy, seed) = (config.policy.name(), config.policy.seed());
        let (queues, ahead) = ((config.function_queue_max, config.node_queue_max), config.ahead);
        writer.seal(
            out,
            format_args!(
                "{MAGIC} {VERSION} policy={policy} seed={seed} function_queue_max={} node_queue_max={} ahead={ahead}",
                queues.0, queues.1
            ),
        );
        writer
    }

    /// Appends what people call a thing.
    pub fn name(&mut self, out: &mut String, of: Named, id: u64, name: &str) {
        let one_line = name.replace(|c: char| c.is_control(), " ");
        self.seal(out, format_args!("name {} {id} {one_line}", of.word()));
    }

    /// Appends one step.
    pub fn step(&mut self, out: &mut String, now: Moment, event: &Event, actions: &[Action]) {
        let (now, answer) = (words::nanos(now.0), answer(actions));
        self.seal(out, format_args!("{now} {}{ANSWERED}{answer}", words::Said(event)));
    }

    /// Appends why there is no more.
    pub fn end(&mut self, out: &mut String, why: Ending) {
        self.seal(out, format_args!("end {}", why.word()));
    }

    fn seal(&mut self, out: &mut String, line: fmt::Arguments<'_>) {
        let start = out.len();
        let _infallible = out.write_fmt(line);
        let check = self.check.over(&out[start..]);
        let _infallible = writeln!(out, "{CHECKED}{check:08x}");
    }
}

/// Reads the lines of a trace, in order.
#[derive(Clone, Debug)]
pub struct Reader {
    check: Check,
    config: SchedulerConfig,
}

impl Reader {
    /// Reads the first line.
    pub fn begin(first: &str) -> Result<Self, TraceError> {
        let mut words = Words::of(first);
        let (Some(MAGIC), Some(found)) = (words.word(), words.number()) else { return Err(TraceError::NoTrace) };
        if found != VERSION {
            return Err(TraceError::Version { found });
        }
        let mut check = Check::new();
        let mut words = Words::of(unsealed(&mut check, first)?);
        let config = words.pass(2).and_then(|()| {
            let (policy, seed) = (words.value("policy")?, words.value("seed")?.parse().ok()?);
            Some(SchedulerConfig {
                policy: PolicyKind::of(policy, seed)?,
                function_queue_max: words.value("function_queue_max")?.parse().ok()?,
                node_queue_max: words.value("node_queue_max")?.parse().ok()?,
                ahead: words.value("ahead")?.parse().ok()?,
            })
        });
        let config = config.ok_or_else(|| TraceError::Unknown { text: first.to_owned() })?;
        Ok(Self { check, config })
    }

    /// How the scheduler was configured.
    pub fn config(&self) -> SchedulerConfig {
        self.config
    }

    /// Reads the next line, without its end.
    pub fn line(&mut self, line: &str) -> Result<Line, TraceError> {
        let line = unsealed(&mut self.check, line)?;
        let unknown = || TraceError::Unknown { text: line.to_owned() };
        let mut words = Words::of(line);
        match words.word().ok_or_else(unknown)? {
            "name" => words.name().ok_or_else(unknown),
            "end" => words.word().and_then(Ending::of).map(Line::End).ok_or_else(unknown),
            _ => step(line).ok_or_else(unknown),
        }
    }
}

fn step(line: &str) -> Option<Line> {
    let (said, answer) = line.split_once(ANSWERED)?;
    let mut words = Words::of(said);
    let now = words.moment()?;
    Some(Line::Step { now, event: words.event()?, answer: answer.to_owned() })
}

/// The line without its check, which must be right.
fn unsealed<'a>(check: &mut Check, line: &'a str) -> Result<&'a str, TraceError> {
    let (said, found) = line.rsplit_once(CHECKED).ok_or(TraceError::Changed)?;
    let found = u64::from_str_radix(found, 16).map_err(|_| TraceError::Changed)?;
    if check.over(said) == found { Ok(said) } else { Err(TraceError::Changed) }
}

/// Actions as a trace writes them. Equal actions are equal text, and different ones are not.
pub fn answer(actions: &[Action]) -> String {
    let mut text = String::new();
    for (at, action) in actions.iter().enumerate() {
        let _infallible = write!(text, "{}{}", if at == 0 { "" } else { "; " }, words::Done(action));
    }
    text
}

impl Named {
    const ALL: [Self; 3] = [Self::Device, Self::Model, Self::Function];

    const fn word(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Model => "model",
            Self::Function => "function",
        }
    }
}

impl Ending {
    const ALL: [Self; 4] = [Self::Stopped, Self::Full, Self::Behind, Self::Failed];

    const fn word(self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Full => "full",
            Self::Behind => "behind",
            Self::Failed => "failed",
        }
    }

    fn of(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|ending| ending.word() == word)
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stopped => "the recording was stopped",
            Self::Full => "the trace has the size that it may have",
            Self::Behind => "events came faster than they could be written",
            Self::Failed => "it could not be written any more",
        })
    }
}
