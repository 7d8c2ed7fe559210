//! Requests: admitted, waiting, running, ended. Each leaves with exactly one answer or refusal.

use std::time::Duration;

use faaswap_protocol::{Batching, Late, Priority, Refusal};

use super::{Books, Request, Stage};
use crate::{
    batches::Sharing,
    cost::Ran,
    device::Running,
    event::{Action, Form, FunctionKey, RequestKey, Source, Verdict},
    model::{Model, Weights},
    ready::Waiting,
    slots::Slot,
    time::{At, Span},
};

impl Books {
    /// Whether a request may wait here, whatever the policy says.
    pub(crate) fn admit(&self, function: FunctionKey, deadline: At) -> Result<Slot, Refusal> {
        let slot = self.functions.find(function).ok_or(Refusal::UnknownFunction)?;
        let known = self.functions.get(slot).ok_or(Refusal::UnknownFunction)?;
        if self.draining {
            return Err(Refusal::Draining);
        }
        if known.late == Late::Refuse && deadline < self.now {
            return Err(Refusal::DeadlinePassed { late_by: (self.now - deadline).into() });
        }
        self.can_run(known.model)?;
        if known.waiting_len() >= self.config.function_queue_max {
            return Err(Refusal::FunctionQueueFull { limit: self.config.function_queue_max as u64 });
        }
        if self.ready.waiting_len() >= self.config.node_queue_max {
            return Err(Refusal::NodeQueueFull { limit: self.config.node_queue_max as u64 });
        }
        Ok(slot)
    }

    /// A full queue has room for one more where a request in it was given up: the newest of these is refused in its place, so
    /// that those that nobody can help keep out none that can be in time, and the oldest keep their turns.
    pub(crate) fn displace(
        &mut self,
        function: FunctionKey,
        refusal: Refusal,
        actions: &mut Vec<Action>,
    ) -> Result<Slot, Refusal> {
        let slot = self.functions.find(function);
        let given_up = if matches!(refusal, Refusal::FunctionQueueFull { .. }) {
            slot.and_then(|slot| Some(self.functions.get(slot)?.stale.back()?.request))
        } else if matches!(refusal, Refusal::NodeQueueFull { .. }) {
            self.ready.given_up.last().map(|(_, request)| *request)
        } else {
            None
        };
        let (Some(slot), Some(given_up)) = (slot, given_up) else { return Err(refusal) };
        self.refuse(given_up, refusal, actions);
        Ok(slot)
    }

    /// Whether some device could hold the model, however long it takes until it does.
    pub(crate) fn can_run(&self, model: Slot) -> Result<(), Refusal> {
        let known = self.models.get(model).filter(|known| !known.removed).ok_or(Refusal::HardwareFault)?;
        let mut nearest = None;
        for (home, device) in self.homes(known) {
            if home.charge <= device.capacity && !device.lanes.is_empty() {
                return Ok(());
            }
            let (needed, capacity) = nearest.unwrap_or((home.charge, device.capacity));
            nearest = Some((home.charge.min(needed), device.capacity.max(capacity)));
        }
        match nearest {
            Some((needed, capacity)) => Err(Refusal::ModelTooLarge { needed, capacity }),
            None => Err(Refusal::HardwareFault),
        }
    }

    /// Puts an admitted request into its queue.
    pub(crate) fn enqueue(&mut self, request: RequestKey, slot: Slot, deadline: At, form: Option<Form>) {
        let Some(function) = self.functions.get_mut(slot) else { return };
        let waiting = Waiting { request, arrived: self.now, deadline, form };
        self.ready.push(function, waiting);
        self.requests
            .insert(request, Request { function: function.key, waiting, stage: Stage::Waiting, given_up: false });
        let (model, shares) = (function.model, function.batch.batching != Batching::Off);
        if let Some(known) = self.models.get_mut(model) {
            known.waiting += 1;
            if let Some(form) = form.filter(|_| shares) {
                known.sharing.insert((form, deadline, request, slot));
            }
            known.demand.asked(self.now);
            if let Some(at) = known.foreseen.take() {
                self.calendar.remove(&(at, model));
            }
        }
        self.settle_all(model);
        self.relist(slot);
    }

    /// Takes a waiting request out of its queue, for whatever comes next; tells whether it was given up.
    fn dequeue(&mut self, slot: Slot, waiting: Waiting) -> bool {
        let Some(function) = self.functions.get_mut(slot) else { return false };
        let given_up = self.ready.take(function, waiting);
        if let Some(known) = self.models.get_mut(function.model) {
            known.waiting = known.waiting.saturating_sub(1);
            if let Some(form) = waiting.form {
                known.sharing.remove(&(form, waiting.deadline, waiting.request, slot));
            }
        }
        self.relist(slot);
        given_up
    }

    /// A request was in time, or was not and is not expected to be.
    fn record(&mut self, slot: Slot, met: bool) {
        let (now, threshold) = (self.now, self.threshold_permille);
        let Some(function) = self.functions.get_mut(slot) else { return };
        if function.priority == Priority::Latency {
            self.tally.add(function.is_high(threshold), met);
        }
        function.objective.record(now, met);
        self.relist(slot);
    }

    /// A request that was given up was in time: it counts as such. Else what is given up only for the sake of others would make
    /// for more of that, also when there are no others any more.
    fn amend(&mut self, slot: Slot) {
        let (now, threshold) = (self.now, self.threshold_permille);
        let Some(function) = self.functions.get_mut(slot) else { return };
        if function.priority == Priority::Latency {
            self.tally.amend(function.is_high(threshold));
        }
        function.objective.amend(now);
        self.relist(slot);
    }

    /// Declines a request, where it waits or ran.
    pub(crate) fn refuse(&mut self, request: RequestKey, refusal: Refusal, actions: &mut Vec<Action>) {
        self.decline(request, refusal, actions);
    }

    /// The same; tells of which function it was, unless it is recorded as missed already.
    fn decline(&mut self, request: RequestKey, refusal: Refusal, actions: &mut Vec<Action>) -> Option<Slot> {
        let found = self.requests.remove(&request)?;
        let slot = self.functions.find(found.function);
        let given_up = match (found.stage, slot) {
            (Stage::Waiting, Some(slot)) => self.dequeue(slot, found.waiting),
            _ => found.given_up,
        };
        actions.push(Action::Refuse { request, refusal });
        slot.filter(|_| !given_up)
    }

    /// A refusal that counts against the objective: the request wanted an answer and gets none in time.
    pub(crate) fn refuse_as_late(&mut self, request: RequestKey, refusal: Refusal, actions: &mut Vec<Action>) {
        if let Some(slot) = self.decline(request, refusal, actions) {
            self.record(slot, false);
        }
    }

    /// Refuses what became late while it waited, where its function wants that.
    pub(crate) fn refuse_late(&mut self, actions: &mut Vec<Action>) {
        while let Some(&(deadline, request)) = self.ready.refusable.first() {
            if deadline >= self.now {
                return;
            }
            let late_by = (self.now - deadline).into();
            self.refuse_as_late(request, Refusal::DeadlinePassed { late_by }, actions);
        }
    }

    /// The most urgent fresh request of a function cannot be in time any more. It is recorded as missed now: until it is
    /// answered may take long, and who decides whom to help must know before.
    pub(crate) fn give_up_head(&mut self, slot: Slot) {
        if let Some(function) = self.functions.get_mut(slot) {
            self.ready.give_up_head(function);
        }
        self.record(slot, false);
    }

    /// Starts a run on an idle lane of a device that has the weights, or gets them. `with` are requests of the same
    /// model that it answers too.
    pub(crate) fn start(
        &mut self,
        request: RequestKey,
        with: Vec<RequestKey>,
        (device, ends): (usize, At),
        actions: &mut Vec<Action>,
    ) -> bool {
        let Some(&Request { function, waiting, stage: Stage::Waiting, .. }) = self.requests.get(&request) else {
            return false;
        };
        let Some(slot) = self.functions.find(function) else { return false };
        let Some(model) = self.functions.get(slot).map(|function| function.model) else { return false };
        let Some(lane) = self.devices.get(device).and_then(|on| on.idle_lane()) else { return false };
        let now = self.now;
        let Some(known) = self.models.get_mut(model) else { return false };
        let id = known.id;
        let Some(stay) = known.stay_mut(device).filter(|stay| !stay.doomed) else { return false };
        stay.in_flight += 1;
        stay.last_used = now;
        stay.kept_until = At::START;
        let (stay_id, resident) = (stay.id, stay.weights == Weights::Resident);
        self.settle(model, device);
        let stage = Stage::Running { device, lane, model, stay: stay_id };
        let running = Running::new(request, with, now, ends, waiting.deadline);
        for one in running.requests() {
            self.sent_off(one, stage);
        }
        if let Some(on) = self.devices.get_mut(device) {
            let with = running.with.clone();
            on.begin(now, lane, running);
            actions.push(Action::Run { request, with, model: id, device: on.id, lane, resident });
        }
        true
    }

    /// A request leaves its queue for a lane.
    fn sent_off(&mut self, request: RequestKey, stage: Stage) {
        let Some(found) = self.requests.get_mut(&request) else { return };
        found.stage = stage;
        let waiting = found.waiting;
        let Some(slot) = self.functions.find(found.function) else { return };
        let given_up = self.dequeue(slot, waiting);
        if let Some(found) = self.requests.get_mut(&request) {
            found.given_up = given_up;
        }
        if let Some(function) = self.functions.get_mut(slot) {
            function.in_flight += 1;
        }
    }

    /// The executor has compared a run of several with runs of one.
    pub(crate) fn run_tried(&mut self, request: RequestKey, verdict: Verdict) {
        let Some(found) = self.requests.get(&request) else { return };
        let (Stage::Running { device, lane, model, .. }, Some(form)) = (found.stage, found.waiting.form) else {
            return;
        };
        let running = self.devices.get(device).and_then(|on| on.lanes.get(usize::from(lane.0))?.as_ref());
        // A run is told by the request that it was started for.
        let Some(size) = running.filter(|run| run.request == request).map(|run| run.requests().count()) else { return };
        if let Some(home) = self.models.get_mut(model).and_then(|known| known.home_mut(device)) {
            home.cost.batches.tried(form, size, verdict);
        }
    }

    /// A run ended; learns from it. Gives its model, where it has answered any function that is still there.
    pub(crate) fn run_done(&mut self, request: RequestKey, took: Duration, actions: &mut Vec<Action>) -> Option<Slot> {
        let found = self.requests.get(&request)?;
        let Stage::Running { device, lane, model, stay: stay_id } = found.stage else { return None };
        let now = self.now;
        let on = self.devices.get_mut(device)?;
        // A run is told by the request that it was started for.
        on.lanes.get(usize::from(lane.0))?.as_ref().filter(|running| running.request == request)?;
        let speed_permille = on.speed_permille;
        let (running, beside_permille) = on.end(now, lane)?;
        let size = running.requests().count();
        let stay = self.models.get_mut(model).and_then(|known| known.stay_mut(device));
        if let Some(stay) = stay.filter(|stay| stay.id == stay_id) {
            stay.in_flight = stay.in_flight.saturating_sub(1);
            stay.last_used = now;
            let weights_after = (stay.asked_until() > running.started).then(|| stay.asked_until() - running.started);
            let took = Span::from(took).min(now - running.started + Span::millis(1));
            if !took.is_zero() && stay.weights == Weights::Resident {
                self.learn_run(
                    model,
                    device,
                    Ran { ended: now, took, beside_permille, weights_after, speed_permille, size },
                );
            }
            self.settle(model, device);
            self.let_go_if_doomed(model, device, actions);
        }
        if took.is_zero() && size > 1 {
            self.came_apart((model, device), &running);
        }
        self.answered(model, &running)
    }

    /// The functions of a run's requests that are still there, each once.
    fn whose(&self, running: &Running) -> Vec<Slot> {
        let functions = running.requests().filter_map(|request| self.requests.get(&request));
        let mut whose: Vec<_> = functions.filter_map(|found| self.functions.find(found.function)).collect();
        whose.sort_unstable();
        whose.dedup();
        whose
    }

    /// The requests of a run that has ended leave, each by the books of its own function.
    fn answered(&mut self, model: Slot, running: &Running) -> Option<Slot> {
        let now = self.now;
        let mut answered = false;
        for request in running.requests() {
            let Some(found) = self.requests.remove(&request) else { continue };
            let Some(slot) = self.functions.find(found.function) else { continue };
            let Some(function) = self.functions.get_mut(slot) else { continue };
            function.in_flight = function.in_flight.saturating_sub(1);
            function.took(now - found.waiting.arrived);
            let met = now <= found.waiting.deadline;
            if !found.given_up {
                self.record(slot, met);
            } else if met {
                self.amend(slot);
            }
            answered = true;
        }
        answered.then_some(model)
    }

    /// A run's requests had to be run one by one.
    ///
    /// Where that follows from what runs of the size are known to give by now, none such is made again: no more is to be done.
    fn came_apart(&mut self, (model, device): (Slot, usize), running: &Running) {
        let (now, size, whose) = (self.now, running.requests().count(), self.whose(running));
        let form = self.requests.get(&running.request).and_then(|found| found.waiting.form);
        let strictest = whose.iter().filter_map(|slot| Some(self.functions.get(*slot)?.batch.batching)).min();
        let (Some(form), Some(batching)) = (form, strictest) else { return };
        let home = self.models.get(model).and_then(|known| known.home(device));
        if home.is_some_and(|home| !home.cost.batches.may_serve(size, Sharing { form, batching })) {
            return;
        }
        for slot in &whose {
            match self.functions.get_mut(*slot) {
                Some(function) if whose.len() > 1 => function.batch.came_apart_from_others(now),
                Some(function) => function.batch.came_apart(now, size),
                None => {}
            }
        }
    }

    fn learn_run(&mut self, model: Slot, device: usize, ran: Ran) {
        let Some(on) = self.devices.get_mut(device) else { return };
        let home = self.models.get_mut(model).and_then(|known| known.home_mut(device));
        if let Some(beside) = home.and_then(|home| home.cost.learn(ran, &on.strain)) {
            on.strain.learn(ran.ended, beside);
        }
    }

    /// The weights are there.
    pub(crate) fn swap_in_done(&mut self, model: Slot, device: usize, took: Duration, actions: &mut Vec<Action>) {
        let now = self.now;
        let stay = self.models.get_mut(model).and_then(|known| known.stay_mut(device));
        let Some(stay) = stay else { return };
        let Weights::Coming { source, contended, .. } = stay.weights else { return };
        stay.weights = Weights::Resident;
        stay.asked = now;
        let weights = self.models.get_mut(model).and_then(|known| known.home_mut(device)).map(|home| {
            home.failures = 0;
            home.cost.weights
        });
        let lender = self.copy_ended(model, device);
        if let Some(weights) = weights {
            match lender {
                Some(from) => self.links.learn_peer(now, (from, device), weights, took.into()),
                None if source == Source::Host && !contended => self.links.learn_host(device, weights, took.into()),
                None => {}
            }
        }
        self.give_back(model, lender);
        self.settle(model, device);
        self.let_go_if_doomed(model, device, actions);
    }

    /// Takes a copy off its device's list; gives the place of the device that it was read from.
    pub(crate) fn copy_ended(&mut self, model: Slot, device: usize) -> Option<usize> {
        let on = self.devices.get_mut(device)?;
        let at = on.copies.iter().position(|(other, _)| *other == model)?;
        let (_, source) = on.copies.remove(at)?;
        if on.copies.is_empty() {
            self.links.release(device, self.now);
        }
        match source {
            Source::Host => None,
            Source::Peer(from) => self.place(from),
        }
    }

    /// Refuses what waits for models that no device can run any more.
    pub(crate) fn refuse_stranded(&mut self, actions: &mut Vec<Action>) {
        let stranded = |found: &Request| {
            let slot = self.functions.find(found.function);
            let model = slot.and_then(|slot| self.functions.get(slot)).map(|function| function.model);
            matches!(found.stage, Stage::Waiting) && model.is_none_or(|model| self.can_run(model).is_err())
        };
        let hit: Vec<_> = self.requests.iter().filter(|(_, found)| stranded(found)).map(|(key, _)| *key).collect();
        for request in hit {
            self.refuse(request, Refusal::HardwareFault, actions);
        }
    }

    /// Refuses what waits for a model, because it cannot be brought anywhere.
    pub(crate) fn refuse_all_for(&mut self, model: Slot, actions: &mut Vec<Action>) {
        let runs_it = |found: &Request| {
            let function = self.functions.find(found.function).and_then(|slot| self.functions.get(slot));
            matches!(found.stage, Stage::Waiting) && function.is_some_and(|function| function.model == model)
        };
        let hit: Vec<_> = self.requests.iter().filter(|(_, found)| runs_it(found)).map(|(key, _)| *key).collect();
        for request in hit {
            self.refuse(request, Refusal::HardwareFault, actions);
        }
    }

    /// The next moment at which a waiting request is to be refused.
    pub(crate) fn next_lapse(&self) -> At {
        self.ready.refusable.first().map_or(At::NEVER, |(deadline, _)| *deadline + Span::millis(1))
    }
}

impl crate::model::Stay {
    /// When its weights were complete.
    fn asked_until(&self) -> At {
        match self.weights {
            Weights::Resident => self.asked,
            Weights::Coming { expected, .. } => expected,
        }
    }
}

impl Model {
    /// Whether its swap-ins have failed on every device, several times in a row.
    pub(crate) fn cannot_be_brought(&self, failures_max: u32) -> bool {
        self.stays.is_empty() && self.homes.iter().all(|home| home.failures >= failures_max)
    }
}
