//! Functions: who may register what under which name, and when a registration is done.

use faaswap_protocol::{Batching, CallId, Detail, FromBroker, FunctionId, FunctionSpec, Refusal};
use faaswap_scheduler::{Event, FunctionKey, ModelId, trace::Named};

use super::{Core, Function, Owner, PeerId, models::Waiter};
use crate::limits::{CALLS_MAX, FUNCTIONS_PER_CONNECTION_MAX};

/// A percentile in hundredths of a percent lies below this.
const PERCENTILE_MAX: u16 = 9999;

impl Core {
    /// Registers a function, now or once its model is loaded.
    pub(super) fn register(&mut self, from: PeerId, call: CallId, spec: FunctionSpec) {
        if let Err(refusal) = self.may_register(from, &spec) {
            return self.refuse_call(from, call, refusal);
        }
        let variant = self.loader.machine.variant(spec.model, spec.tf32);
        if let Some(&model) = self.by_variant.get(&variant) {
            return self.registered(from, call, spec, model);
        }
        if let Some(refusal) = self.rejection(&variant) {
            return self.refuse_call(from, call, refusal);
        }
        if !self.loading.contains_key(&variant) && !self.loader.has(&variant) {
            return self.say(from, &FromBroker::ModelNeeded { call });
        }
        if let Some(entry) = self.peers.get_mut(&from) {
            entry.calls += 1;
        }
        self.load(variant, Waiter { from, call, spec });
    }

    pub(super) fn may_register(&self, from: PeerId, spec: &FunctionSpec) -> Result<(), Refusal> {
        let Some(entry) = self.peers.get(&from) else { return Err(Refusal::Cancelled) };
        if self.draining {
            return Err(Refusal::Draining);
        }
        let invalid = |reason: &str| Err(Refusal::FunctionInvalid { reason: Detail::from(reason) });
        if spec.slo.percentile == 0 || spec.slo.percentile > PERCENTILE_MAX {
            return invalid("the percentile of an SLO is 0.01 to 99.99");
        }
        if spec.slo.deadline.is_zero() {
            return invalid("the deadline of an SLO is more than 0");
        }
        if entry.calls >= CALLS_MAX || entry.functions.len() >= FUNCTIONS_PER_CONNECTION_MAX {
            return Err(Refusal::FunctionsFull { limit: FUNCTIONS_PER_CONNECTION_MAX as u64 });
        }
        let same_name = self.by_name.get(spec.name.as_str()).into_iter().flatten();
        let mut owners = same_name.filter_map(|key| self.functions.get(key)).map(|function| function.owner);
        if owners.any(|owner| owner != entry.owner) {
            return Err(Refusal::NameTaken);
        }
        if self.functions.len() >= self.settings.functions_max {
            return Err(Refusal::FunctionsFull { limit: self.settings.functions_max as u64 });
        }
        Ok(())
    }

    /// Makes the function callable on this connection.
    pub(super) fn registered(&mut self, from: PeerId, call: CallId, spec: FunctionSpec, model: ModelId) {
        let Some((owner, id)) = self.peers.get_mut(&from).map(|entry| {
            entry.function_next += 1;
            (entry.owner, FunctionId(entry.function_next))
        }) else {
            return;
        };
        let (signature, weights) = match self.models.get(&model) {
            Some(model) => (model.loaded.signature.as_ref().clone(), model.loaded.weights),
            None => return,
        };
        tracing::info!(function = %spec.name, model = ?spec.model, %weights, "registered");
        let key = self.function(owner, spec, model);
        if let Some(entry) = self.peers.get_mut(&from) {
            entry.functions.insert(id, key);
        }
        self.telemetry.registration("registered");
        self.say(from, &FromBroker::Registered { call, function: id, signature, weights });
    }

    /// The function of that specification: replicas on one node share it.
    fn function(&mut self, owner: Owner, spec: FunctionSpec, model: ModelId) -> FunctionKey {
        let same_name = self.by_name.entry(spec.name.to_string()).or_default();
        let same = same_name.iter().copied().find(|key| {
            self.functions.get(key).is_some_and(|f| f.spec == spec && f.owner == owner && f.model == model)
        });
        if let Some(key) = same {
            if let Some(function) = self.functions.get_mut(&key) {
                function.users += 1;
            }
            return key;
        }
        self.id_next += 1;
        let key = FunctionKey(u32::try_from(self.id_next & u64::from(u32::MAX)).unwrap_or(0));
        same_name.push(key);
        self.trace.name(Named::Function, key.0, spec.name.as_str());
        if let Some(model) = self.models.get_mut(&model) {
            model.functions += 1;
            model.idle_since = None;
        }
        let by_rows = self.models.get(&model).is_some_and(|model| model.loaded.by_rows);
        let batching = if by_rows { spec.batching } else { Batching::Off };
        let (slo, priority, late) = (spec.slo, spec.priority, spec.late);
        let refused = std::collections::HashMap::new();
        self.functions.insert(key, Function { owner, spec, model, users: 1, answered: 0, refused, slo_met: 0 });
        self.happen(Event::FunctionAdded { function: key, model, slo, priority, late, batching });
        key
    }

    /// Takes a function back from a connection. Its requests from there are cancelled.
    pub(super) fn unregister(&mut self, from: PeerId, id: FunctionId) {
        let Some(entry) = self.peers.get_mut(&from) else { return };
        let Some(key) = entry.functions.remove(&id) else { return };
        let waiting: Vec<_> = entry.in_flight.values().copied().collect();
        for request in waiting {
            if self.requests.get(&request).is_some_and(|r| r.function == key) {
                self.cancelled(request);
            }
        }
        self.leave(key);
    }

    /// One user of the function less.
    pub(super) fn leave(&mut self, key: FunctionKey) {
        let Some(function) = self.functions.get_mut(&key) else { return };
        function.users -= 1;
        if function.users > 0 {
            return;
        }
        self.happen(Event::FunctionRemoved { function: key });
        let Some(function) = self.functions.remove(&key) else { return };
        let name = function.spec.name.as_str();
        if let Some(same_name) = self.by_name.get_mut(name) {
            same_name.retain(|other| *other != key);
            if same_name.is_empty() {
                self.by_name.remove(name);
                self.telemetry.forget(name, function.refused.into_keys().chain(["answered"]));
            }
        }
        if let Some(model) = self.models.get_mut(&function.model) {
            model.functions -= 1;
            if model.functions == 0 {
                model.idle_since = Some(std::time::Instant::now());
            }
        }
    }

    pub(super) fn refuse_call(&self, from: PeerId, call: CallId, refusal: Refusal) {
        tracing::info!(code = refusal.code(), %refusal, "registration or upload refused");
        self.telemetry.registration(refusal.code());
        self.say(from, &FromBroker::CallRefused { call, refusal });
    }

    pub(super) fn say(&self, to: PeerId, message: &FromBroker) {
        if let Some(entry) = self.peers.get(&to) {
            entry.peer.outbox.send(message, Vec::new());
        }
    }
}
