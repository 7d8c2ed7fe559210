//! The loop's state: the one place where deciding and touching meet.
//!
//! One thread owns it. Things happen ([`Event`]), the scheduler answers with [`Action`]s, and these are done here, in
//! order. Nothing in here waits: what takes time is a task or a thread, and its end is an event again.

mod disk;
mod functions;
mod knowledge;
mod losses;
mod models;
mod peers;
mod report;
mod requests;
mod runs;
mod swaps;

use std::{
    cell::RefCell,
    collections::{HashMap, VecDeque},
    io,
    rc::{Rc, Weak},
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use faaswap_device::Device;
use faaswap_protocol::{Bytes, FunctionId, FunctionSpec, Refusal, RequestId, Span};
use faaswap_scheduler::{
    Action, DeviceId, Event, FunctionKey, ModelId, Moment, PolicyKind, RequestKey, Scheduler, SchedulerConfig,
    trace::Named,
};
use faaswap_worker::Gone;
use tokio::sync::Notify;

pub(crate) use self::{
    knowledge::DecisionReport,
    models::Loaded,
    peers::Next,
    report::{DeviceReport, Report},
};
use self::{models::Loading, peers::UploadParts};
use crate::{
    config::Settings,
    lane::{Ask, Lane, Peer},
    load::Loader,
    mailbox::{Ended, Mailbox, Outcome},
    store::Home,
    suspects::Suspects,
    telemetry::{Telemetry, level},
    trace::Trace,
    variant::Variant,
    verify::Verifier,
};

/// A device with its lanes.
#[derive(Debug)]
pub(crate) struct DeviceEntry {
    pub(crate) device: Arc<dyn Device>,
    pub(crate) lanes: Vec<Lane>,
    pub(crate) lost: bool,
    /// Whether what ran when it was lost is suspected already.
    pub(crate) suspected: bool,
}

/// A connection, never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct PeerId(pub(crate) u64);

/// Whose functions these are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// A user id, as the kernel tells it.
    User(u32),
    /// Whoever comes over TCP.
    Remote,
}

#[derive(Debug)]
struct PeerEntry {
    peer: Arc<Peer>,
    owner: Owner,
    agent: String,
    functions: HashMap<FunctionId, FunctionKey>,
    function_next: u32,
    in_flight: HashMap<RequestId, RequestKey>,
    inline_bytes: u64,
    unreleased: HashMap<RequestId, Vec<Span>>,
    /// Registrations and uploads under way.
    calls: usize,
    upload: Option<UploadParts>,
}

#[derive(Debug)]
struct Function {
    owner: Owner,
    spec: FunctionSpec,
    model: ModelId,
    /// Connections that have registered it.
    users: usize,
    answered: u64,
    refused: HashMap<&'static str, u64>,
    slo_met: u64,
}

#[derive(Debug)]
struct Model {
    variant: Variant,
    loaded: Loaded,
    functions: usize,
    /// Since when no function uses it.
    idle_since: Option<Instant>,
    /// Devices that it is on, or on the way to or from.
    on: Vec<DeviceId>,
    from_disk: Option<disk::FromDisk>,
    /// Why its last swap-in failed, if it did.
    swap_error: Option<String>,
    leaving: bool,
}

#[derive(Debug)]
struct Request {
    ask: Arc<Ask>,
    from: PeerId,
    function: FunctionKey,
    resident: bool,
}

/// The state of the loop.
#[derive(Debug)]
pub(crate) struct Core {
    me: Weak<RefCell<Self>>,
    settings: Arc<Settings>,
    telemetry: Arc<Telemetry>,
    mailbox: Arc<Mailbox>,
    loader: Arc<Loader>,
    verifier: Arc<Verifier>,
    started: Instant,
    scheduler: Scheduler,
    trace: Trace,
    events: VecDeque<Event>,
    devices: Vec<DeviceEntry>,
    models: HashMap<ModelId, Model>,
    by_variant: HashMap<Variant, ModelId>,
    loading: HashMap<Variant, Loading>,
    rejected: HashMap<Variant, (Refusal, Instant)>,
    functions: HashMap<FunctionKey, Function>,
    by_name: HashMap<String, Vec<FunctionKey>>,
    peers: HashMap<PeerId, PeerEntry>,
    requests: HashMap<RequestKey, Request>,
    id_next: u64,
    wake_at: Option<Moment>,
    /// Tells the timer that `wake_at` has changed.
    pub(crate) alarm: Rc<Notify>,
    /// Since when there has been nothing to do.
    quiet_since: Option<Instant>,
    /// Tells that it is time to start anew: devices are lost, and nobody would be disturbed.
    pub(crate) broken: Rc<Notify>,
    /// Tells the loop that a request is about to come.
    pub(crate) expected: Rc<Notify>,
    draining: bool,
    gone: Gone,
    suspects: Suspects,
    /// Runs of several requests that are not over. They are so a moment after their last answer.
    shared_runs: usize,
}

impl Core {
    pub(crate) fn new(
        settings: Arc<Settings>,
        telemetry: Arc<Telemetry>,
        mailbox: Arc<Mailbox>,
        loader: Arc<Loader>,
        verifier: Arc<Verifier>,
        devices: Vec<DeviceEntry>,
    ) -> io::Result<Rc<RefCell<Self>>> {
        let config = SchedulerConfig {
            function_queue_max: settings.function_queue_max,
            node_queue_max: settings.node_queue_max,
            policy: settings.policy,
            ahead: settings.prefetch,
        };
        let scheduler = Scheduler::new(config);
        let trace = match &settings.trace {
            Some(path) => Trace::begin(path, settings.trace_max, &config)?,
            None => Trace::default(),
        };
        let (suspects, gone) = (Suspects::open(&settings.store_dir), Gone::start()?);
        let core = Rc::new_cyclic(|me| {
            RefCell::new(Self {
                me: me.clone(),
                settings,
                telemetry,
                mailbox,
                loader,
                verifier,
                started: Instant::now(),
                scheduler,
                trace,
                events: VecDeque::new(),
                devices,
                models: HashMap::new(),
                by_variant: HashMap::new(),
                loading: HashMap::new(),
                rejected: HashMap::new(),
                functions: HashMap::new(),
                by_name: HashMap::new(),
                peers: HashMap::new(),
                requests: HashMap::new(),
                id_next: 1,
                wake_at: None,
                alarm: Rc::new(Notify::new()),
                quiet_since: None,
                broken: Rc::new(Notify::new()),
                expected: Rc::new(Notify::new()),
                draining: false,
                gone,
                suspects,
                shared_runs: 0,
            })
        });
        core.borrow_mut().add_devices();
        Ok(core)
    }

    fn add_devices(&mut self) {
        for index in 0..self.devices.len() {
            let entry = &self.devices[index];
            let (capacity, lanes) = (entry.device.info().capacity, entry.lanes.len());
            let lanes = u16::try_from(lanes).unwrap_or(u16::MAX);
            self.trace.name(Named::Device, device_id(index).0, &entry.device.info().name);
            self.happen(Event::DeviceAdded { device: device_id(index), capacity, lanes });
        }
    }

    fn now(&self) -> Moment {
        Moment(self.started.elapsed())
    }

    fn new_id(&mut self) -> u64 {
        self.id_next += 1;
        self.id_next
    }

    /// Tells the scheduler, does what it answers, and whatever follows from that.
    fn happen(&mut self, event: Event) {
        self.events.push_back(event);
        let mut actions = Vec::new();
        while let Some(event) = self.events.pop_front() {
            let now = self.now();
            self.scheduler.step(now, event, &mut actions);
            self.trace.step(now, event, &actions);
            for action in actions.drain(..) {
                self.act(action);
            }
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::SwapOut { model, device } => self.swap_out(model, device),
            Action::SwapIn { model, device, source } => self.swap_in(model, device, source),
            Action::Run { request, with, model, device, lane, resident } => {
                self.run(request, &with, model, (device, lane), resident);
            }
            Action::Refuse { request, refusal } => {
                let refusal = self.explained(request, refusal);
                self.refuse(request, refusal);
            }
            Action::WakeAt(at) => {
                self.wake_at = Some(at);
                self.alarm.notify_one();
            }
        }
    }

    /// Takes in what has ended on other threads. Called before anything that a peer says is looked at.
    pub(crate) fn take_ended(&mut self) {
        while let Some(ended) = self.mailbox.take() {
            match ended {
                Ended::Run { request, took, outcome } => {
                    self.suspect_what_runs();
                    self.suspects.ends(&request);
                    self.run_ended(request, outcome);
                    self.happen(Event::RunDone { request, took });
                    self.look_for_lost_devices();
                }
                Ended::Answered { request, outcome } => self.run_ended(request, outcome),
                Ended::RunOver { request, took, verdict } => {
                    self.suspect_what_runs();
                    self.suspects.ends(&request);
                    self.shared_runs -= 1;
                    if let Some(verdict) = verdict {
                        self.happen(Event::RunTried { request, verdict });
                    }
                    if took.is_zero() {
                        self.telemetry.shared_runs_apart.inc();
                    }
                    self.happen(Event::RunDone { request, took });
                    self.look_for_lost_devices();
                }
                Ended::NearlyRead { model } => self.nearly_read(model),
                Ended::SwapIn { model, device, result } => self.swapped_in(model, device, result),
                Ended::SwapOut { model, device, result } => {
                    self.swapped_out(model, device, result);
                    self.happen(Event::SwapOutDone { model, device });
                }
            }
        }
    }

    /// The timer's turn.
    pub(crate) fn woken(&mut self) {
        self.wake_at = None;
        self.happen(Event::Woken);
    }

    /// When the timer shall ring.
    pub(crate) fn alarm_at(&self) -> Option<Instant> {
        self.wake_at.and_then(|at| self.started.checked_add(at.0))
    }

    /// Lets another policy decide.
    pub(crate) fn choose(&mut self, policy: PolicyKind) {
        tracing::info!(policy = policy.name(), "an operator has chosen the policy");
        self.happen(Event::PolicyChosen { policy });
    }

    /// Takes nothing new from now on.
    pub(crate) fn drain(&mut self) {
        self.draining = true;
        self.wait_for_no_disk();
        self.happen(Event::DrainBegun);
        for entry in self.peers.values() {
            entry.peer.outbox.send(&faaswap_protocol::FromBroker::Draining, Vec::new());
        }
    }

    /// Whether some request has no answer yet.
    pub(crate) fn is_busy(&self) -> bool {
        !self.requests.is_empty()
    }

    /// Whether everything was answered and taken by its peer, and all is over that has answered it. What a lost device still
    /// does is not waited for.
    pub(crate) fn is_drained(&self) -> bool {
        let are_over = self.shared_runs == 0 || self.devices.iter().any(|entry| entry.lost);
        self.requests.is_empty() && are_over && self.peers.values().all(|entry| !entry.peer.outbox.has_waiting())
    }

    /// Ends all connections, the trace, and workers: models go with them.
    pub(crate) fn close_all(&mut self) {
        self.peers.values().for_each(|entry| entry.peer.outbox.close());
        self.trace.end();
        self.devices.iter().for_each(|entry| entry.device.leave());
    }

    /// Leaves what is on devices, and pinned for them, to the system, which takes all of it when this process is replaced. To
    /// give it back would be a call for each of many thousand things, and on a lost device each of them fails.
    pub(crate) fn leave_devices_behind(&mut self) {
        std::mem::forget(std::mem::take(&mut self.models));
        std::mem::forget(Arc::clone(&self.loader.memory));
        self.devices.iter().for_each(|entry| std::mem::forget(Arc::clone(&entry.device)));
    }

    /// What is done every second.
    pub(crate) fn keep_house(&mut self) {
        self.take_ended();
        self.look_for_lost_devices();
        self.start_anew_when_quiet();
        self.tell_observations();
        self.cut_off_stalled();
        self.tell_progress();
        self.unload_idle();
        self.gauge();
    }

    /// Brings the gauges up to date.
    pub(crate) fn gauge(&self) {
        let t = &self.telemetry;
        t.connections.set(level(self.peers.len()));
        t.functions.set(level(self.functions.len()));
        t.models.set(level(self.models.len()));
        t.waiting.set(level(self.scheduler.waiting_len()));
        t.in_flight.set(level(self.requests.len()));
        let seen = &self.verifier.seen;
        t.verified(seen.same.load(Ordering::Relaxed), seen.damaged.load(Ordering::Relaxed));
        t.host_weights.set(i64::try_from(self.loader.memory.used().0.get()).unwrap_or(i64::MAX));
        for (index, entry) in self.devices.iter().enumerate() {
            let (used, _) = self.scheduler.charged(device_id(index)).unwrap_or_default();
            t.device(&entry.device.info().name, used.get(), entry.device.info().capacity.get());
        }
    }
}

/// The scheduler's name of a device is its place in the configuration.
pub(crate) fn device_id(index: usize) -> DeviceId {
    DeviceId(u16::try_from(index).unwrap_or(u16::MAX))
}

/// What a model takes on a device: its weights in whole chunks.
pub(crate) fn charge(weights: Bytes, device: &dyn Device) -> Bytes {
    weights.checked_round_up(device.info().chunk).unwrap_or(Bytes::new(u64::MAX))
}
