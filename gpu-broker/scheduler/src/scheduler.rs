//! The machine itself: what each event changes, and what follows from it.

use faaswap_protocol::Bytes;

use crate::{
    books::{Books, Stage},
    decision::{Decision, Decisions},
    event::{Action, DeviceId, Event, Form, FunctionKey, Moment, RequestKey},
    limits::WAKE_MIN,
    policy::{Chosen, PolicyKind, Trigger},
    time::At,
};

/// Limits of the queues, and the policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Most requests of one function that may wait.
    pub function_queue_max: usize,
    /// Most requests that may wait in all.
    pub node_queue_max: usize,
    /// Who decides.
    pub policy: PolicyKind,
    /// Whether models are brought before a request that is foreseen; only ours foresees any.
    pub ahead: bool,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self { function_queue_max: 256, node_queue_max: 16_384, policy: PolicyKind::default(), ahead: true }
    }
}

/// The scheduler of one node.
#[derive(Clone, Debug)]
pub struct Scheduler {
    pub(crate) books: Books,
    policy: Chosen,
    wake_at: At,
    /// When a failed swap-in may be tried again.
    retry_at: At,
}

impl Scheduler {
    /// A node without devices or functions.
    pub fn new(config: SchedulerConfig) -> Self {
        let (policy, eviction) = Chosen::of(config.policy);
        Self { books: Books::new(config, eviction), policy, wake_at: At::NEVER, retry_at: At::START }
    }

    /// Takes in one event and appends what must now be done to `actions`.
    ///
    /// Equal histories give equal actions: that is what makes a failure replayable.
    pub fn step(&mut self, now: Moment, event: Event, actions: &mut Vec<Action>) {
        self.books.advance(now);
        let trigger = self.take_in(event, actions);
        self.books.refuse_late(actions);
        let look_again = self.policy.as_policy().fill(&mut self.books, trigger, actions);
        self.ask_to_be_woken(look_again, actions);
    }

    /// Requests that wait, on the whole node.
    pub fn waiting_len(&self) -> usize {
        self.books.ready.waiting_len()
    }

    /// What is charged to a device now, and its capacity.
    pub fn charged(&self, device: DeviceId) -> Option<(Bytes, Bytes)> {
        let device = self.books.devices.get(self.books.place(device)?)?;
        Some((device.charged, device.capacity))
    }

    /// The last decisions with the parts of their predictions, oldest first.
    pub fn decisions(&self) -> impl Iterator<Item = &Decision> {
        Decisions::iter(&self.books.decisions)
    }

    fn take_in(&mut self, event: Event, actions: &mut Vec<Action>) -> Trigger {
        let books = &mut self.books;
        match event {
            Event::DeviceAdded { device, capacity, lanes } => books.add_device(device, capacity, lanes),
            Event::DeviceLost { device } => books.lose_device(device, actions),
            Event::ModelBound { model, device, charge } => books.bind(model, device, charge),
            Event::ModelMeasured { model, device, weights, run } => books.model_measured(model, device, weights, run),
            Event::LinkMeasured { link, bytes_per_s } => books.link_measured(link, bytes_per_s),
            Event::DeviceObserved { device, foreign_permille, clock_permille, foreign } => {
                books.device_observed(device, foreign_permille, clock_permille, foreign);
            }
            Event::ModelRemoved { model } => books.remove_model(model, actions),
            Event::FunctionAdded { function, model, slo, priority, late, batching } => {
                books.add_function(function, model, slo, (priority, late, batching));
            }
            Event::FunctionRemoved { function } => books.remove_function(function, actions),
            Event::PolicyChosen { policy } => {
                (self.policy, books.eviction) = Chosen::of(policy);
                books.config.policy = policy;
                books.begin_anew();
            }
            Event::Expected { function } => {
                if let Some(slot) = books.functions.find(function) {
                    self.policy.as_policy().expect(books, slot);
                }
            }
            Event::Arrived { request, function, deadline, form } => {
                return self.arrive(request, function, (deadline.into(), form), actions);
            }
            Event::Cancelled { request } => {
                // A run cannot be called back; its answer goes to whoever still listens.
                if books.requests.get(&request).is_some_and(|found| matches!(found.stage, Stage::Waiting)) {
                    books.refuse(request, faaswap_protocol::Refusal::Cancelled, actions);
                }
            }
            Event::SwapInDone { model, device, took } => {
                if let (Some(model), Some(place)) = (books.models.find(model), books.place(device)) {
                    books.swap_in_done(model, place, took, actions);
                }
            }
            Event::SwapInFailed { model, device } => {
                if let (Some(model), Some(place)) = (books.models.find(model), books.place(device)) {
                    books.swap_in_failed(model, place, actions);
                    self.retry_at = self.retry_at.max(books.next_retry(model));
                }
            }
            Event::SwapOutDone { model, device } if books.swap_out_done(model, device) => {}
            Event::SwapOutDone { .. } => return Trigger::Nothing,
            // The wish was granted: a further one must be said again.
            Event::Woken => self.wake_at = At::NEVER,
            Event::RunTried { request, verdict } => {
                books.run_tried(request, verdict);
                return Trigger::Nothing;
            }
            Event::RunDone { request, took } => {
                if let Some(model) = books.run_done(request, took, actions) {
                    self.policy.as_policy().ended(books, model);
                }
            }
            Event::DrainBegun => books.draining = true,
        }
        Trigger::Changed
    }

    fn arrive(
        &mut self,
        request: RequestKey,
        function: FunctionKey,
        (deadline, form): (At, Option<Form>),
        actions: &mut Vec<Action>,
    ) -> Trigger {
        if self.books.requests.contains_key(&request) {
            // The first of that name gets the answer: two answers to one name would be worse than none.
            return Trigger::Nothing;
        }
        let admitted = self.books.admit(function, deadline);
        match admitted.or_else(|refusal| self.books.displace(function, refusal, actions)) {
            Ok(slot) => {
                self.books.enqueue(request, slot, deadline, form);
                Trigger::Arrived(slot)
            }
            Err(refusal) => {
                actions.push(Action::Refuse { request, refusal });
                Trigger::Nothing
            }
        }
    }

    fn ask_to_be_woken(&mut self, look_again: At, actions: &mut Vec<Action>) {
        let retry = if self.retry_at > self.books.now { self.retry_at } else { At::NEVER };
        let next = look_again.min(self.books.next_lapse()).min(retry);
        if next == At::NEVER {
            self.wake_at = next;
            return;
        }
        let next = next.max(self.books.now + WAKE_MIN);
        if next != self.wake_at {
            actions.push(Action::WakeAt(next.into()));
        }
        self.wake_at = next;
    }
}
