//! Events and actions as words, and events back from words.

use std::{fmt, str::SplitAsciiWhitespace, time::Duration};

use faaswap_protocol::{Batching, Bytes, Late, Priority, Slo};

use super::{Line, Named};
use crate::{
    event::{Action, DeviceId, Event, Form, FunctionKey, Link, ModelId, Moment, RequestKey, Source, Verdict},
    policy::PolicyKind,
};

/// Said of a request that shares its run with no other.
const ALONE: &str = "alone";

/// Nanoseconds; more than the scheduler can tell apart are as many as it can.
pub(super) fn nanos(span: Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}

/// An event in words.
pub(super) struct Said<'a>(pub(super) &'a Event);

impl fmt::Display for Said<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self.0 {
            Event::DeviceAdded { device, capacity, lanes } => {
                write!(f, "device_added {} {} {lanes}", device.0, capacity.get())
            }
            Event::DeviceLost { device } => write!(f, "device_lost {}", device.0),
            Event::ModelBound { model, device, charge } => {
                write!(f, "model_bound {} {} {}", model.0, device.0, charge.get())
            }
            Event::ModelMeasured { model, device, weights, run } => {
                write!(f, "model_measured {} {} {} {}", model.0, device.0, weights.get(), nanos(run))
            }
            Event::LinkMeasured { link, bytes_per_s } => write!(f, "link_measured {} {bytes_per_s}", Path(link)),
            Event::DeviceObserved { device, foreign_permille, clock_permille, foreign } => {
                let foreign = foreign.get();
                write!(f, "device_observed {} {foreign_permille} {clock_permille} {foreign}", device.0)
            }
            Event::PolicyChosen { policy } => write!(f, "policy_chosen {} {}", policy.name(), policy.seed()),
            Event::Expected { function } => write!(f, "expected {}", function.0),
            Event::ModelRemoved { model } => write!(f, "model_removed {}", model.0),
            Event::FunctionAdded { function, model, slo, priority, late, batching } => {
                let (deadline, percentile) = (nanos(slo.deadline), slo.percentile);
                let (priority, late) = (priority_word(priority), late_word(late));
                let (function, model, batching) = (function.0, model.0, batching_word(batching));
                write!(f, "function_added {function} {model} {deadline} {percentile} {priority} {late} {batching}")
            }
            Event::FunctionRemoved { function } => write!(f, "function_removed {}", function.0),
            Event::Arrived { request, function, deadline, form } => {
                write!(f, "arrived {} {} {} ", request.0, function.0, nanos(deadline.0))?;
                match form {
                    None => f.write_str(ALONE),
                    Some(form) => write!(f, "{}", form.0),
                }
            }
            Event::Cancelled { request } => write!(f, "cancelled {}", request.0),
            Event::SwapInDone { model, device, took } => {
                write!(f, "swap_in_done {} {} {}", model.0, device.0, nanos(took))
            }
            Event::SwapInFailed { model, device } => write!(f, "swap_in_failed {} {}", model.0, device.0),
            Event::SwapOutDone { model, device } => write!(f, "swap_out_done {} {}", model.0, device.0),
            Event::RunTried { request, verdict } => write!(f, "run_tried {} {}", request.0, verdict_word(verdict)),
            Event::RunDone { request, took } => write!(f, "run_done {} {}", request.0, nanos(took)),
            Event::DrainBegun => f.write_str("drain_begun"),
            Event::Woken => f.write_str("woken"),
        }
    }
}

/// An action in words.
pub(super) struct Done<'a>(pub(super) &'a Action);

impl fmt::Display for Done<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Action::SwapOut { model, device } => write!(f, "swap_out {} {}", model.0, device.0),
            Action::SwapIn { model, device, source } => match source {
                Source::Host => write!(f, "swap_in {} {} host", model.0, device.0),
                Source::Peer(from) => write!(f, "swap_in {} {} peer {}", model.0, device.0, from.0),
            },
            Action::Run { request, with, model, device, lane, resident } => {
                let weights = if *resident { "resident" } else { "coming" };
                write!(f, "run {} {} {} {} {weights}", request.0, model.0, device.0, lane.0)?;
                with.iter().try_for_each(|other| write!(f, " +{}", other.0))
            }
            Action::Refuse { request, refusal } => {
                write!(f, "refuse {} {} ({refusal})", request.0, refusal.code())
            }
            Action::WakeAt(at) => write!(f, "wake_at {}", nanos(at.0)),
        }
    }
}

struct Path(Link);

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Link::Host { to } => write!(f, "host {}", to.0),
            Link::HostBeside { to, beside } => write!(f, "beside {} {}", to.0, beside.0),
            Link::Peer { from, to } => write!(f, "peer {} {}", from.0, to.0),
        }
    }
}

const fn priority_word(priority: Priority) -> &'static str {
    match priority {
        Priority::Latency => "latency",
        Priority::Batch => "batch",
    }
}

const BATCHING: [Batching; 3] = [Batching::Off, Batching::Exact, Batching::On];

const fn batching_word(batching: Batching) -> &'static str {
    match batching {
        Batching::Off => "off",
        Batching::Exact => "exact",
        Batching::On => "on",
    }
}

const VERDICTS: [Verdict; 3] = [Verdict::Same, Verdict::Close, Verdict::Other];

const fn verdict_word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Same => "same",
        Verdict::Close => "close",
        Verdict::Other => "other",
    }
}

const fn late_word(late: Late) -> &'static str {
    match late {
        Late::Serve => "serve",
        Late::Refuse => "refuse",
    }
}

/// The words of a line, one after the other.
pub(super) struct Words<'a> {
    left: SplitAsciiWhitespace<'a>,
}

impl<'a> Words<'a> {
    pub(super) fn of(line: &'a str) -> Self {
        Self { left: line.split_ascii_whitespace() }
    }

    pub(super) fn word(&mut self) -> Option<&'a str> {
        self.left.next()
    }

    pub(super) fn number<T: std::str::FromStr>(&mut self) -> Option<T> {
        self.word()?.parse().ok()
    }

    /// Passes over so many words.
    pub(super) fn pass(&mut self, passed: usize) -> Option<()> {
        (0..passed).try_for_each(|_| self.word().map(drop))
    }

    /// What follows `key=` in the next word.
    pub(super) fn value(&mut self, key: &str) -> Option<&'a str> {
        self.word()?.strip_prefix(key)?.strip_prefix('=')
    }

    fn span(&mut self) -> Option<Duration> {
        self.number().map(Duration::from_nanos)
    }

    pub(super) fn moment(&mut self) -> Option<Moment> {
        self.span().map(Moment)
    }

    fn bytes(&mut self) -> Option<Bytes> {
        self.number().map(Bytes::new)
    }

    fn device(&mut self) -> Option<DeviceId> {
        self.number().map(DeviceId)
    }

    fn model(&mut self) -> Option<ModelId> {
        self.number().map(ModelId)
    }

    fn function(&mut self) -> Option<FunctionKey> {
        self.number().map(FunctionKey)
    }

    fn request(&mut self) -> Option<RequestKey> {
        self.number().map(RequestKey)
    }

    fn form(&mut self) -> Option<Option<Form>> {
        match self.word()? {
            ALONE => Some(None),
            form => form.parse().ok().map(Form).map(Some),
        }
    }

    fn link(&mut self) -> Option<Link> {
        match self.word()? {
            "host" => Some(Link::Host { to: self.device()? }),
            "beside" => Some(Link::HostBeside { to: self.device()?, beside: self.device()? }),
            "peer" => Some(Link::Peer { from: self.device()?, to: self.device()? }),
            _ => None,
        }
    }

    pub(super) fn name(&mut self) -> Option<Line> {
        let word = self.word()?;
        let of = Named::ALL.into_iter().find(|named| named.word() == word)?;
        let id = self.number()?;
        let name: Vec<_> = self.left.by_ref().collect();
        Some(Line::Name { of, id, name: name.join(" ") })
    }

    /// An event, and nothing after it.
    pub(super) fn event(&mut self) -> Option<Event> {
        let event = match self.word()? {
            "device_added" => {
                Event::DeviceAdded { device: self.device()?, capacity: self.bytes()?, lanes: self.number()? }
            }
            "device_lost" => Event::DeviceLost { device: self.device()? },
            "model_bound" => Event::ModelBound { model: self.model()?, device: self.device()?, charge: self.bytes()? },
            "model_measured" => {
                let (model, device) = (self.model()?, self.device()?);
                Event::ModelMeasured { model, device, weights: self.bytes()?, run: self.span()? }
            }
            "link_measured" => Event::LinkMeasured { link: self.link()?, bytes_per_s: self.number()? },
            "device_observed" => Event::DeviceObserved {
                device: self.device()?,
                foreign_permille: self.number()?,
                clock_permille: self.number()?,
                foreign: self.bytes()?,
            },
            "policy_chosen" => {
                let (name, seed) = (self.word()?, self.number()?);
                Event::PolicyChosen { policy: PolicyKind::of(name, seed)? }
            }
            "expected" => Event::Expected { function: self.function()? },
            "model_removed" => Event::ModelRemoved { model: self.model()? },
            "function_added" => self.function_added()?,
            "function_removed" => Event::FunctionRemoved { function: self.function()? },
            "arrived" => {
                let (request, function) = (self.request()?, self.function()?);
                Event::Arrived { request, function, deadline: self.moment()?, form: self.form()? }
            }
            "cancelled" => Event::Cancelled { request: self.request()? },
            "swap_in_done" => Event::SwapInDone { model: self.model()?, device: self.device()?, took: self.span()? },
            "swap_in_failed" => Event::SwapInFailed { model: self.model()?, device: self.device()? },
            "swap_out_done" => Event::SwapOutDone { model: self.model()?, device: self.device()? },
            "run_tried" => {
                let (request, word) = (self.request()?, self.word()?);
                let verdict = VERDICTS.into_iter().find(|one| verdict_word(*one) == word)?;
                Event::RunTried { request, verdict }
            }
            "run_done" => Event::RunDone { request: self.request()?, took: self.span()? },
            "drain_begun" => Event::DrainBegun,
            "woken" => Event::Woken,
            _ => return None,
        };
        self.word().is_none().then_some(event)
    }

    fn function_added(&mut self) -> Option<Event> {
        let (function, model) = (self.function()?, self.model()?);
        let slo = Slo { deadline: self.span()?, percentile: self.number()? };
        let (priority, late, batching) = (self.word()?, self.word()?, self.word()?);
        let priority = [Priority::Latency, Priority::Batch].into_iter().find(|one| priority_word(*one) == priority)?;
        let late = [Late::Serve, Late::Refuse].into_iter().find(|one| late_word(*one) == late)?;
        let batching = BATCHING.into_iter().find(|one| batching_word(*one) == batching)?;
        Some(Event::FunctionAdded { function, model, slo, priority, late, batching })
    }
}
