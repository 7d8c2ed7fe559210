//! The loop's state: the one place where deciding and touching meet.
//!
//! One thread owns it. Things happen ([`Event`]), the scheduler answers with [`Action`]s, and these are done here, in
//! order. Nothing in here waits: what takes time is a task or a thread, and its end is an event again.

mod disk;
mod functions;
mod models;
mod peers;
mod report;
mod requests;

use std::{
    cell::RefCell,
    collections::{HashMap, VecDeque},
    rc::{Rc, Weak},
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use faaswap_device::{Device, DeviceError};
use faaswap_protocol::{Bytes, FunctionId, FunctionSpec, ModelDigest, Refusal, RequestId, Span};
use faaswap_scheduler::{
    Action, DeviceId, Event, FunctionKey, LaneId, ModelId, Moment, RequestKey, Scheduler, SchedulerConfig,
};
use tokio::sync::Notify;

pub(crate) use self::{
    models::Loaded,
    peers::Next,
    report::{DeviceReport, Report},
};
use self::{models::Loading, peers::UploadParts};
use crate::{
    config::Settings,
    lane::{Ask, BoundModel, Lane, Peer, Run},
    limits::QUIET_FOR,
    load::Loader,
    mailbox::{Ended, Mailbox, Outcome},
    store::Home,
    telemetry::{Telemetry, level},
    verify::{Stay, Verifier},
};

/// A device with its lanes.
#[derive(Debug)]
pub(crate) struct DeviceEntry {
    pub(crate) device: Arc<dyn Device>,
    pub(crate) lanes: Vec<Lane>,
    pub(crate) lost: bool,
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
    digest: ModelDigest,
    loaded: Loaded,
    functions: usize,
    /// Since when no function uses it.
    idle_since: Option<Instant>,
    /// Devices that it is on, or on the way to or from.
    on: Vec<DeviceId>,
    from_disk: Option<disk::FromDisk>,
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
    events: VecDeque<Event>,
    devices: Vec<DeviceEntry>,
    models: HashMap<ModelId, Model>,
    by_digest: HashMap<ModelDigest, ModelId>,
    loading: HashMap<ModelDigest, Loading>,
    rejected: HashMap<ModelDigest, (Refusal, Instant)>,
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
}

impl Core {
    pub(crate) fn new(
        settings: Arc<Settings>,
        telemetry: Arc<Telemetry>,
        mailbox: Arc<Mailbox>,
        loader: Arc<Loader>,
        verifier: Arc<Verifier>,
        devices: Vec<DeviceEntry>,
    ) -> Rc<RefCell<Self>> {
        let scheduler = Scheduler::new(SchedulerConfig {
            function_queue_max: settings.function_queue_max,
            node_queue_max: settings.node_queue_max,
            ..SchedulerConfig::default()
        });
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
                events: VecDeque::new(),
                devices,
                models: HashMap::new(),
                by_digest: HashMap::new(),
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
            })
        });
        core.borrow_mut().add_devices();
        core
    }

    fn add_devices(&mut self) {
        for index in 0..self.devices.len() {
            let entry = &self.devices[index];
            let (capacity, lanes) = (entry.device.info().capacity, entry.lanes.len());
            let lanes = u16::try_from(lanes).unwrap_or(u16::MAX);
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
            for action in actions.drain(..) {
                self.act(action);
            }
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::SwapOut { model, device } => self.swap_out(model, device),
            // Host memory has every model; copies between devices come with a device that can do them.
            Action::SwapIn { model, device, source: _ } => self.swap_in(model, device),
            Action::Run { request, model, device, lane, resident } => self.run(request, model, device, lane, resident),
            Action::Refuse { request, refusal } => self.refuse(request, refusal),
            Action::WakeAt(at) => {
                self.wake_at = Some(at);
                self.alarm.notify_one();
            }
        }
    }

    fn swap_in(&mut self, model: ModelId, device: DeviceId) {
        let Some((bound, home)) = self.bound(model, device) else {
            self.events.push_back(Event::SwapInFailed { model, device });
            return;
        };
        *bound.copied_at() = None;
        let Some(range) = bound.bound.range() else {
            self.events.push_back(Event::SwapInDone { model, device, took: std::time::Duration::ZERO });
            return;
        };
        let held = home.hold().map_err(|error| DeviceError::from(&error));
        let weights = match held.and_then(|held| bound.hold(held)) {
            Ok(weights) => weights,
            Err(error) => return self.swap_in_failed(model, device, &error),
        };
        let mailbox = Arc::clone(&self.mailbox);
        let to = Arc::clone(&bound);
        let stay = self.verifier.wants_next().then(|| Stay {
            device: Arc::clone(&bound.device),
            range,
            weights: Arc::clone(&weights),
        });
        let verifier = Arc::clone(&self.verifier);
        let done = Box::new(move |result: Result<_, DeviceError>| {
            *to.copied_at() = Some(Instant::now());
            to.copied(result.is_ok());
            if let Some(stay) = stay.filter(|_| result.is_ok()) {
                verifier.look_at(stay);
            }
            mailbox.post(Ended::SwapIn { model, device, result });
        });
        let groups = bound.bound.groups();
        let asked = self.devices[usize::from(device.0)].device.swap_in(range, weights, groups, done);
        match asked {
            Ok(()) => {
                if let Some(model) = self.models.get_mut(&model) {
                    model.on.push(device);
                }
            }
            Err(error) => {
                bound.copied(false);
                self.swap_in_failed(model, device, &error);
            }
        }
    }

    fn swap_in_failed(&mut self, model: ModelId, device: DeviceId, error: &DeviceError) {
        let name = &self.devices[usize::from(device.0)].device.info().name;
        tracing::error!(%error, device = %name, "a model could not be swapped in");
        self.telemetry.swap_failed(name);
        self.events.push_back(match error {
            DeviceError::Lost
            | DeviceError::OutOfMemory { .. }
            | DeviceError::Failed { .. }
            | DeviceError::State { .. }
            | DeviceError::Invalid(_) => Event::SwapInFailed { model, device },
        });
    }

    fn swap_out(&mut self, model: ModelId, device: DeviceId) {
        let Some((bound, _)) = self.bound(model, device) else { return };
        let Some(range) = bound.bound.range() else { return };
        let mailbox = Arc::clone(&self.mailbox);
        let held = bound.let_go();
        let done = Box::new(move |result| {
            drop(held);
            mailbox.post(Ended::SwapOut { model, device, result });
        });
        let asked = self.devices[usize::from(device.0)].device.swap_out(range, done);
        if let Err(error) = asked {
            self.swapped_out(model, device, Err(error));
        }
    }

    fn bound(&self, model: ModelId, device: DeviceId) -> Option<(Arc<BoundModel>, &Home)> {
        let loaded = &self.models.get(&model)?.loaded;
        let bound = loaded.bound.iter().find(|(on, _)| *on == device)?;
        Some((Arc::clone(&bound.1), &loaded.home))
    }

    fn run(&mut self, request: RequestKey, model: ModelId, device: DeviceId, lane: LaneId, resident: bool) {
        let bound = self.bound(model, device).map(|(bound, _)| bound);
        let handed = match (self.requests.get_mut(&request), bound) {
            (Some(found), Some(model)) => {
                found.resident = resident;
                let run = Run { ask: Arc::clone(&found.ask), model, resident };
                let lanes = &self.devices[usize::from(device.0)].lanes;
                lanes.get(usize::from(lane.0)).is_some_and(|lane| lane.run(run))
            }
            (None, _) | (_, None) => false,
        };
        if !handed {
            // A lane that the scheduler believes to be idle takes a run; where it does not, the request must not hang.
            tracing::error!(?request, ?device, ?lane, "a run could not be handed to its lane");
            self.refuse(request, Refusal::HardwareFault);
            self.events.push_back(Event::RunDone { request, took: std::time::Duration::ZERO });
        }
    }

    /// Takes in what has ended on other threads. Called before anything that a peer says is looked at.
    pub(crate) fn take_ended(&mut self) {
        while let Some(ended) = self.mailbox.take() {
            match ended {
                Ended::Run { request, took, outcome } => {
                    self.run_ended(request, outcome);
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

    fn swapped_in(
        &mut self,
        model: ModelId,
        device: DeviceId,
        result: Result<faaswap_device::SwapReport, DeviceError>,
    ) {
        let entry = &self.devices[usize::from(device.0)];
        match result {
            Ok(report) => {
                self.telemetry.swapped_in(&entry.device.info().name, &report);
                self.happen(Event::SwapInDone { model, device, took: report.took });
            }
            Err(error) => {
                self.gone_from(model, device);
                self.swap_in_failed(model, device, &error);
                self.happen(Event::Woken);
                self.look_for_lost_devices();
            }
        }
    }

    fn swapped_out(&mut self, model: ModelId, device: DeviceId, result: Result<(), DeviceError>) {
        let name = &self.devices[usize::from(device.0)].device.info().name;
        match result {
            Ok(()) => self.telemetry.swapped_out(name),
            Err(error) => {
                tracing::error!(%error, device = %name, "a model could not be swapped out");
                self.telemetry.swap_failed(name);
                self.look_for_lost_devices();
            }
        }
        self.gone_from(model, device);
    }

    /// Tells the scheduler of devices that have failed for good: what ran there is refused, what waits goes elsewhere.
    fn look_for_lost_devices(&mut self) {
        for index in 0..self.devices.len() {
            let entry = &mut self.devices[index];
            if entry.lost || !entry.device.is_lost() {
                continue;
            }
            entry.lost = true;
            let name = entry.device.info().name.clone();
            tracing::error!(device = %name, "the device is lost: its requests are refused, others take over its functions");
            self.telemetry.device_lost(&name);
            self.happen(Event::DeviceLost { device: device_id(index) });
        }
        if self.devices.iter().all(|entry| entry.lost) {
            self.broken.notify_one();
        }
    }

    /// Where other devices have taken over, a lost one is brought back when nobody would notice.
    fn start_anew_when_quiet(&mut self) {
        if self.is_busy() || !self.loading.is_empty() || !self.devices.iter().any(|entry| entry.lost) {
            self.quiet_since = None;
        } else if self.quiet_since.get_or_insert_with(Instant::now).elapsed() >= QUIET_FOR {
            self.broken.notify_one();
        }
    }

    fn gone_from(&mut self, model: ModelId, device: DeviceId) {
        if let Some(model) = self.models.get_mut(&model) {
            model.on.retain(|on| *on != device);
        }
        self.drop_model_that_left(model);
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

    /// Whether everything was answered and taken by its peer.
    pub(crate) fn is_drained(&self) -> bool {
        self.requests.is_empty() && self.peers.values().all(|entry| !entry.peer.outbox.has_waiting())
    }

    /// Ends all connections.
    pub(crate) fn close_all(&self) {
        self.peers.values().for_each(|entry| entry.peer.outbox.close());
    }

    /// What is done every second.
    pub(crate) fn keep_house(&mut self) {
        self.take_ended();
        self.look_for_lost_devices();
        self.start_anew_when_quiet();
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
