//! Devices, models and functions that come, go and fail.

use std::time::Duration;

use faaswap_protocol::{Batching, Bytes, Late, Priority, Refusal, Slo};

use super::Books;
use crate::{
    cost::Cost,
    device::Device,
    event::{Action, DeviceId, FunctionKey, Link, ModelId},
    limits::{DEVICES_MAX, FAILURES_MAX, RETRY_AFTER},
    model::{Home, Model, Weights},
    ready::Function,
    slots::Slot,
    time::At,
};

impl Books {
    pub(crate) fn add_device(&mut self, device: DeviceId, capacity: Bytes, lanes: u16) {
        let fresh = Device::new(device, capacity, lanes);
        match self.devices.iter().position(|other| other.id == device) {
            Some(place) if self.devices[place].lost => {
                self.devices[place] = fresh;
                self.links.add(place);
            }
            Some(_) => {}
            None if self.devices.len() < DEVICES_MAX => {
                self.devices.push(fresh);
                self.links.add(self.devices.len() - 1);
            }
            None => {}
        }
    }

    pub(crate) fn lose_device(&mut self, device: DeviceId, actions: &mut Vec<Action>) {
        let Some(place) = self.place(device) else { return };
        for at in 0..self.devices[place].copies.len() {
            let (model, source) = self.devices[place].copies[at];
            if let crate::event::Source::Peer(from) = source {
                self.give_back(model, self.place(from));
            }
        }
        let on = &mut self.devices[place];
        on.lost = true;
        on.copies.clear();
        let ran: Vec<_> = on
            .lanes
            .iter_mut()
            .filter_map(Option::take)
            .flat_map(|running| running.requests().collect::<Vec<_>>())
            .collect();
        on.busy = 0;
        let there: Vec<Slot> = self.models.iter().filter(|(_, m)| m.home(place).is_some()).map(|(s, _)| s).collect();
        for model in there {
            if let Some(known) = self.models.get_mut(model) {
                known.homes.retain(|home| home.device != place);
            }
            self.drop_stay(model, place);
        }
        for request in ran {
            let function = self.requests.get(&request).map(|found| found.function);
            let slot = function.and_then(|key| self.functions.find(key));
            if let Some(function) = slot.and_then(|slot| self.functions.get_mut(slot)) {
                function.in_flight = function.in_flight.saturating_sub(1);
            }
            self.refuse(request, Refusal::HardwareFault, actions);
        }
        self.refuse_stranded(actions);
    }

    pub(crate) fn bind(&mut self, model: ModelId, device: DeviceId, charge: Bytes) {
        let Some(place) = self.place(device) else { return };
        let slot = self.models.find_or_insert(model, || Model::new(model));
        let Some(known) = self.models.get_mut(slot) else { return };
        known.removed = false;
        match known.home_mut(place) {
            // What is charged already stays as it was charged.
            Some(home) => home.charge = charge,
            None => {
                let cost = Cost::prior(charge);
                known.homes.push(Home {
                    device: place,
                    charge,
                    cost,
                    failures: 0,
                    retry_at: At::START,
                    leaving: false,
                });
            }
        }
    }

    pub(crate) fn model_measured(&mut self, model: ModelId, device: DeviceId, weights: Bytes, run: Duration) {
        let (Some(place), Some(slot)) = (self.place(device), self.models.find(model)) else { return };
        if let Some(home) = self.models.get_mut(slot).and_then(|known| known.home_mut(place)) {
            home.cost.measured(weights.min(home.charge), run.into());
        }
        self.settle(slot, place);
    }

    pub(crate) fn remove_model(&mut self, model: ModelId, actions: &mut Vec<Action>) {
        let Some(slot) = self.models.find(model) else { return };
        let Some(known) = self.models.get_mut(slot) else { return };
        known.removed = true;
        let devices: Vec<_> = known.stays.iter().map(|stay| stay.device).collect();
        known.stays.iter_mut().for_each(|stay| stay.doomed = true);
        self.refuse_all_for(slot, actions);
        for device in devices {
            self.let_go_if_doomed(slot, device, actions);
        }
        self.forget_model_if_gone(slot);
    }

    pub(crate) fn add_function(
        &mut self,
        key: FunctionKey,
        model: ModelId,
        slo: Slo,
        (priority, late, batching): (Priority, Late, Batching),
    ) {
        if self.functions.find(key).is_some() {
            return;
        }
        let slot = self.models.find_or_insert(model, || Model { removed: true, ..Model::new(model) });
        if let Some(known) = self.models.get_mut(slot) {
            known.functions += 1;
            known.deadline = known.deadline.min(slo.deadline.into());
        }
        self.functions.find_or_insert(key, || Function::new(key, slot, slo, (priority, late, batching)));
    }

    pub(crate) fn remove_function(&mut self, key: FunctionKey, actions: &mut Vec<Action>) {
        let Some(slot) = self.functions.find(key) else { return };
        let Some(function) = self.functions.get(slot) else { return };
        let model = function.model;
        let waiting: Vec<_> = function.fresh.iter().chain(&function.stale).map(|waiting| waiting.request).collect();
        for request in waiting {
            self.refuse(request, Refusal::Cancelled, actions);
        }
        self.functions.remove(key);
        if let Some(known) = self.models.get_mut(model) {
            known.functions = known.functions.saturating_sub(1);
        }
        self.forget_model_if_gone(model);
    }

    pub(crate) fn swap_in_failed(&mut self, model: Slot, device: usize, actions: &mut Vec<Action>) {
        let stay = self.models.get(model).and_then(|known| known.stay(device));
        if !stay.is_some_and(|stay| matches!(stay.weights, Weights::Coming { .. })) {
            return;
        }
        let lender = self.copy_ended(model, device);
        self.give_back(model, lender);
        let now = self.now;
        if let Some(home) = self.models.get_mut(model).and_then(|known| known.home_mut(device)) {
            home.retry_at = now + RETRY_AFTER * (1 << home.failures.min(FAILURES_MAX));
            home.failures = home.failures.saturating_add(1);
        }
        self.drop_stay(model, device);
        if self.models.get(model).is_some_and(|known| known.cannot_be_brought(FAILURES_MAX)) {
            self.refuse_all_for(model, actions);
        }
    }

    /// The memory was uncharged when the swap-out was decided, see `device`; but only now can the model come back.
    /// Tells whether somebody may have waited for that.
    pub(crate) fn swap_out_done(&mut self, model: ModelId, device: DeviceId) -> bool {
        let (Some(place), Some(slot)) = (self.place(device), self.models.find(model)) else { return false };
        let Some(known) = self.models.get_mut(slot) else { return false };
        let waited_for = known.waiting > 0;
        known.home_mut(place).is_some_and(|home| std::mem::take(&mut home.leaving)) && waited_for
    }

    /// When the next swap-in of a model may be tried after failures.
    pub(crate) fn next_retry(&self, model: Slot) -> At {
        let homes = self.models.get(model).map(|known| known.homes.iter().map(|home| home.retry_at));
        homes.and_then(Iterator::max).unwrap_or(At::START)
    }

    pub(crate) fn link_measured(&mut self, link: Link, bytes_per_s: u64) {
        match link {
            Link::Host { to } => {
                if let Some(to) = self.place(to) {
                    self.links.host_measured(to, bytes_per_s);
                }
            }
            Link::HostBeside { to, beside } => {
                if let (Some(to), Some(beside)) = (self.place(to), self.place(beside)) {
                    self.links.beside_measured(to, beside, bytes_per_s);
                }
            }
            Link::Peer { from, to } => {
                if let (Some(from), Some(to)) = (self.place(from), self.place(to)) {
                    self.links.peer_measured(from, to, bytes_per_s);
                }
            }
        }
    }

    /// What the driver says is a hint: out of range is taken as the nearest that makes sense.
    pub(crate) fn device_observed(&mut self, device: DeviceId, foreign: u16, clock: u16, taken: Bytes) {
        let Some(place) = self.place(device) else { return };
        let (ours, clock) = (1000 - u64::from(foreign.min(750)), u64::from(clock.clamp(200, 1000)));
        self.devices[place].speed_permille = ours * clock / 1000;
        self.devices[place].foreign = taken.min(self.devices[place].capacity);
    }
}
