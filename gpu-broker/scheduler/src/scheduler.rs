//! The machine itself: what each event changes, and what follows from it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use faaswap_protocol::{Bytes, Late, Refusal};

use crate::{
    device::{Device, Stay, StayId, Weights},
    event::{Action, DeviceId, Event, FunctionKey, LaneId, ModelId, Moment, RequestKey},
    placement::{Place, place},
    queue::Queues,
};

/// Limits of the queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Most requests of one function that may wait.
    pub function_queue_max: usize,
    /// Most requests that may wait in all.
    pub node_queue_max: usize,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self { function_queue_max: 256, node_queue_max: 16_384 }
    }
}

/// Where a request is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Stage {
    Waiting,
    Running { device: DeviceId, lane: LaneId, model: ModelId, stay: StayId },
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) function: FunctionKey,
    pub(crate) deadline: Moment,
    pub(crate) stage: Stage,
}

/// The scheduler of one node.
#[derive(Clone, Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    pub(crate) devices: BTreeMap<DeviceId, Device>,
    /// What each model takes on each device where it is bound.
    pub(crate) bound: BTreeMap<ModelId, BTreeMap<DeviceId, Bytes>>,
    pub(crate) queues: Queues,
    pub(crate) requests: BTreeMap<RequestKey, Request>,
    draining: bool,
    next_stay: u64,
    wake_at: Option<Moment>,
}

impl Scheduler {
    /// A node without devices or functions.
    pub fn new(config: SchedulerConfig) -> Self {
        Self {
            config,
            devices: BTreeMap::new(),
            bound: BTreeMap::new(),
            queues: Queues::default(),
            requests: BTreeMap::new(),
            draining: false,
            next_stay: 0,
            wake_at: None,
        }
    }

    /// Takes in one event and appends what must now be done to `actions`.
    ///
    /// Equal histories give equal actions: that is what makes a failure replayable.
    pub fn step(&mut self, now: Moment, event: Event, actions: &mut Vec<Action>) {
        self.take_in(now, event, actions);
        self.refuse_late(now, actions);
        self.fill_idle_lanes(now, actions);
        self.ask_to_be_woken(actions);
    }

    /// Requests that wait, on the whole node.
    pub fn waiting_len(&self) -> usize {
        self.queues.waiting_len()
    }

    /// What is charged to a device now, and its capacity.
    pub fn charged(&self, device: DeviceId) -> Option<(Bytes, Bytes)> {
        self.devices.get(&device).map(|device| (device.charged(), device.capacity))
    }

    fn take_in(&mut self, now: Moment, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::DeviceAdded { device, capacity, lanes } => {
                self.devices.entry(device).or_insert_with(|| Device::new(capacity, lanes));
            }
            Event::DeviceLost { device } => self.lose(device, actions),
            Event::ModelBound { model, device, charge } => {
                self.bound.entry(model).or_default().insert(device, charge);
            }
            Event::ModelRemoved { model } => self.remove_model(model, actions),
            Event::FunctionAdded { function, model, slo, priority, late } => {
                self.queues.add(function, model, slo, priority, late);
            }
            Event::FunctionRemoved { function } => {
                for request in self.queues.remove(function) {
                    self.requests.remove(&request);
                    actions.push(Action::Refuse { request, refusal: Refusal::Cancelled });
                }
            }
            Event::Arrived { request, function, deadline } => match self.admit(now, function, deadline) {
                Ok(()) => {
                    self.requests.insert(request, Request { function, deadline, stage: Stage::Waiting });
                    self.queues.push(function, deadline, request);
                }
                Err(refusal) => actions.push(Action::Refuse { request, refusal }),
            },
            Event::Cancelled { request } => self.cancel(request, actions),
            Event::SwapInDone { model, device, took: _ } => {
                if let Some(stay) = self.stay_mut(device, model) {
                    stay.weights = Weights::Resident;
                    self.let_go_if_doomed(device, model, actions);
                }
            }
            Event::SwapInFailed { model, device } => {
                if let Some(device) = self.devices.get_mut(&device) {
                    device.stays.remove(&model);
                }
            }
            // The memory was uncharged when the swap-out was decided, see `device`.
            Event::SwapOutDone { .. } | Event::Woken => {}
            Event::RunDone { request, took } => self.run_done(now, request, took, actions),
            Event::DrainBegun => self.draining = true,
        }
    }

    fn admit(&self, now: Moment, function: FunctionKey, deadline: Moment) -> Result<(), Refusal> {
        let known = self.queues.get(function).ok_or(Refusal::UnknownFunction)?;
        if self.draining {
            return Err(Refusal::Draining);
        }
        if known.late == Late::Refuse && deadline < now {
            return Err(Refusal::DeadlinePassed { late_by: now.0.saturating_sub(deadline.0) });
        }
        self.can_run(known.model)?;
        if self.queues.waiting_for(function) >= self.config.function_queue_max {
            return Err(Refusal::FunctionQueueFull { limit: self.config.function_queue_max as u64 });
        }
        if self.queues.waiting_len() >= self.config.node_queue_max {
            return Err(Refusal::NodeQueueFull { limit: self.config.node_queue_max as u64 });
        }
        Ok(())
    }

    /// Whether some device could hold the model, however long it takes until it does.
    fn can_run(&self, model: ModelId) -> Result<(), Refusal> {
        let charges = self.bound.get(&model).into_iter().flatten();
        let places: Vec<_> =
            charges.filter_map(|(id, charge)| Some((*charge, self.devices.get(id)?.capacity))).collect();
        if places.iter().any(|(charge, capacity)| charge <= capacity) {
            return Ok(());
        }
        match (places.iter().map(|place| place.0).min(), places.iter().map(|place| place.1).max()) {
            (Some(needed), Some(capacity)) => Err(Refusal::ModelTooLarge { needed, capacity }),
            _ => Err(Refusal::HardwareFault),
        }
    }

    fn cancel(&mut self, request: RequestKey, actions: &mut Vec<Action>) {
        let Some(&Request { function, deadline, stage }) = self.requests.get(&request) else { return };
        match stage {
            // ## Waiting => gone
            Stage::Waiting => {
                self.queues.take(function, deadline, request);
                self.requests.remove(&request);
                actions.push(Action::Refuse { request, refusal: Refusal::Cancelled });
            }
            // A run cannot be called back; its answer goes to whoever still listens.
            Stage::Running { .. } => {}
        }
    }

    fn run_done(&mut self, now: Moment, request: RequestKey, _took: Duration, actions: &mut Vec<Action>) {
        let Some(&Request { stage: Stage::Running { device, lane, model, stay: stay_id }, .. }) =
            self.requests.get(&request)
        else {
            return;
        };
        self.requests.remove(&request);
        let Some(on) = self.devices.get_mut(&device) else { return };
        if let Some(slot) = on.lanes.get_mut(usize::from(lane.0)) {
            *slot = None;
        }
        if let Some(stay) = on.stays.get_mut(&model).filter(|stay| stay.id == stay_id) {
            stay.in_flight -= 1;
            stay.last_used = now;
            self.let_go_if_doomed(device, model, actions);
        }
    }

    fn lose(&mut self, device: DeviceId, actions: &mut Vec<Action>) {
        if self.devices.remove(&device).is_none() {
            return;
        }
        for charges in self.bound.values_mut() {
            charges.remove(&device);
        }
        let ran_there = |request: &Request| matches!(request.stage, Stage::Running { device: on, .. } if on == device);
        let hit: Vec<_> = self.requests.iter().filter(|(_, r)| ran_there(r)).map(|(key, _)| *key).collect();
        for request in hit {
            self.requests.remove(&request);
            actions.push(Action::Refuse { request, refusal: Refusal::HardwareFault });
        }
        let stranded: Vec<_> = self.queues.waiting().filter(|(model, ..)| self.can_run(*model).is_err()).collect();
        for (_, function, deadline, request) in stranded {
            self.queues.take(function, deadline, request);
            self.requests.remove(&request);
            actions.push(Action::Refuse { request, refusal: Refusal::HardwareFault });
        }
    }

    fn remove_model(&mut self, model: ModelId, actions: &mut Vec<Action>) {
        for device in self.bound.remove(&model).unwrap_or_default().into_keys() {
            if let Some(stay) = self.stay_mut(device, model) {
                stay.doomed = true;
                self.let_go_if_doomed(device, model, actions);
            }
        }
    }

    fn let_go_if_doomed(&mut self, device: DeviceId, model: ModelId, actions: &mut Vec<Action>) {
        if self.stay_mut(device, model).is_some_and(|stay| stay.doomed && stay.can_leave()) {
            self.swap_out(device, model, actions);
        }
    }

    fn swap_out(&mut self, device: DeviceId, model: ModelId, actions: &mut Vec<Action>) {
        if let Some(on) = self.devices.get_mut(&device) {
            on.stays.remove(&model);
            actions.push(Action::SwapOut { model, device });
        }
    }

    fn stay_mut(&mut self, device: DeviceId, model: ModelId) -> Option<&mut Stay> {
        self.devices.get_mut(&device)?.stays.get_mut(&model)
    }

    /// Refuses what became late while it waited, where its function wants that.
    fn refuse_late(&mut self, now: Moment, actions: &mut Vec<Action>) {
        while let Some((deadline, request, function)) = self.queues.next_refusable() {
            if deadline >= now {
                return;
            }
            self.queues.take(function, deadline, request);
            self.requests.remove(&request);
            let late_by = now.0.saturating_sub(deadline.0);
            actions.push(Action::Refuse { request, refusal: Refusal::DeadlinePassed { late_by } });
        }
    }

    /// Starts runs until no lane is idle or nothing that waits has a place.
    fn fill_idle_lanes(&mut self, now: Moment, actions: &mut Vec<Action>) {
        while self.devices.values().any(|device| device.idle_lane().is_some()) {
            let Some((request, place)) = self.next_start(now) else { return };
            self.start(now, request, place, actions);
        }
    }

    /// The most urgent request that has a place now.
    ///
    /// An overdue request that finds lanes but no memory holds its device back from less urgent ones: the models in
    /// flight there end, nothing new starts, and then there is room. Without this, a large model could starve.
    fn next_start(&self, now: Moment) -> Option<(RequestKey, Place)> {
        let mut held_back = BTreeSet::new();
        let nowhere = BTreeMap::new();
        for (_, function, deadline, request) in self.queues.due() {
            let charges = self.bound.get(&function.model).unwrap_or(&nowhere);
            match place(function.model, charges, &self.devices, &held_back) {
                found @ (Place::Here { .. } | Place::SwapIn { .. }) => return Some((request, found)),
                Place::NoRoom { device } if deadline <= now => {
                    held_back.insert(device);
                }
                Place::NoRoom { .. } | Place::Busy => {}
            }
        }
        None
    }

    fn start(&mut self, now: Moment, request: RequestKey, place: Place, actions: &mut Vec<Action>) {
        let Some(&Request { function, deadline, .. }) = self.requests.get(&request) else { return };
        let Some(model) = self.queues.get(function).map(|function| function.model) else { return };
        let (device, lane, resident) = match place {
            Place::Here { device, lane, resident } => (device, lane, resident),
            Place::SwapIn { device, lane, victims } => {
                for victim in victims {
                    self.swap_out(device, victim, actions);
                }
                self.swap_in(now, device, model, actions);
                (device, lane, false)
            }
            Place::Busy | Place::NoRoom { .. } => return,
        };
        let Some(on) = self.devices.get_mut(&device) else { return };
        let Some(stay) = on.stays.get_mut(&model) else { return };
        stay.in_flight += 1;
        stay.last_used = now;
        let stay = stay.id;
        if let Some(slot) = on.lanes.get_mut(usize::from(lane.0)) {
            *slot = Some(request);
        }
        self.queues.take(function, deadline, request);
        let stage = Stage::Running { device, lane, model, stay };
        self.requests.insert(request, Request { function, deadline, stage });
        actions.push(Action::Run { request, model, device, lane, resident });
    }

    fn swap_in(&mut self, now: Moment, device: DeviceId, model: ModelId, actions: &mut Vec<Action>) {
        let charge = self.bound.get(&model).and_then(|charges| charges.get(&device)).copied();
        let (Some(charge), Some(on)) = (charge, self.devices.get_mut(&device)) else { return };
        let id = StayId(self.next_stay);
        self.next_stay += 1;
        let stay = Stay { id, weights: Weights::Coming, charge, in_flight: 0, last_used: now, doomed: false };
        on.stays.insert(model, stay);
        actions.push(Action::SwapIn { model, device });
    }

    fn ask_to_be_woken(&mut self, actions: &mut Vec<Action>) {
        let next = self.queues.next_refusable().map(|(deadline, _, _)| Moment(deadline.0 + Duration::from_millis(1)));
        if let Some(moment) = next
            && self.wake_at != next
        {
            actions.push(Action::WakeAt(moment));
        }
        self.wake_at = next;
    }
}
