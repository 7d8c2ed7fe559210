//! Models: loaded when the first function asks, kept warm for a while after the last one has gone.

use std::{sync::Arc, time::Instant};

use faaswap_protocol::{Bytes, CallId, FromBroker, FunctionSpec, Refusal, Signature};
use faaswap_scheduler::{DeviceId, Event, ModelId, trace::Named};

use super::{Core, Home, Model, PeerId, charge};
use crate::{
    limits::{REJECTED_FOR, REJECTED_MAX},
    load::{self, OnDevice, OnDeviceBound, Stage},
    turns::Wanted,
    variant::Variant,
};

/// A registration that waits for its model.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) from: PeerId,
    pub(super) call: CallId,
    pub(super) spec: FunctionSpec,
}

/// A model on its way.
#[derive(Debug)]
pub(super) struct Loading {
    stage: Arc<Stage>,
    wanted: Arc<Wanted>,
    waiters: Vec<Waiter>,
}

impl Loading {
    /// A connection waits no more.
    pub(super) fn forget(&mut self, peer: PeerId) {
        self.waiters.retain(|waiter| waiter.from != peer);
    }

    /// Loads it before others, where this call waits for it.
    pub(super) fn hurry(&self, peer: PeerId, call: CallId) {
        if self.waiters.iter().any(|waiter| (waiter.from, waiter.call) == (peer, call)) {
            self.wanted.hurry();
        }
    }
}

/// What loading gives: everything that runs need.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) bound: Vec<OnDeviceBound>,
    pub(crate) home: Home,
    pub(crate) signature: Arc<Signature>,
    pub(crate) weights: Bytes,
    /// Whether requests could be run together.
    pub(crate) by_rows: bool,
}

impl Core {
    pub(super) fn load(&mut self, variant: Variant, waiter: Waiter) {
        if let Some(loading) = self.loading.get_mut(&variant) {
            loading.waiters.push(waiter);
            return;
        }
        let stage = Arc::new(Stage::default());
        let wanted = Wanted::next();
        let (stage_too, wanted_too) = (Arc::clone(&stage), Arc::clone(&wanted));
        self.loading.insert(variant, Loading { stage: stage_too, wanted: wanted_too, waiters: vec![waiter] });
        let (loader, me) = (Arc::clone(&self.loader), self.me.clone());
        tokio::task::spawn_local(async move {
            let result = load::load(&loader, variant, &stage, &wanted).await;
            if let Some(core) = me.upgrade() {
                core.borrow_mut().load_ended(variant, result);
            }
        });
    }

    fn load_ended(&mut self, variant: Variant, result: Result<(Loaded, Vec<OnDevice>), Refusal>) {
        self.take_ended();
        let waiters = self.loading.remove(&variant).map(|loading| loading.waiters).unwrap_or_default();
        for waiter in &waiters {
            if let Some(entry) = self.peers.get_mut(&waiter.from) {
                entry.calls -= 1;
            }
        }
        match result {
            Ok((loaded, unbound)) => {
                let model = self.add_model(variant, loaded);
                self.bind_to_others(variant, model, unbound);
                for Waiter { from, call, spec } in waiters {
                    // What was true when the registration came may not be so any more.
                    match self.may_register(from, &spec) {
                        Ok(()) => self.registered(from, call, spec, model),
                        Err(refusal) => self.refuse_call(from, call, refusal),
                    }
                }
            }
            Err(refusal) => {
                if !refusal.is_passing() {
                    self.reject(variant, refusal.clone());
                }
                for Waiter { from, call, .. } in waiters {
                    self.refuse_call(from, call, refusal.clone());
                }
            }
        }
    }

    /// Binds a model to further devices, one after the other, while it is served already.
    fn bind_to_others(&self, variant: Variant, id: ModelId, devices: Vec<OnDevice>) {
        let (loader, me) = (Arc::clone(&self.loader), self.me.clone());
        tokio::task::spawn_local(async move {
            for device in devices {
                let name = device.1.device().info().name.clone();
                let bound = load::bind_too(&loader, variant, device).await;
                let Some(core) = me.upgrade() else { return };
                match bound {
                    Ok(bound) => core.borrow_mut().bound_too(id, bound),
                    Err(error) => {
                        tracing::warn!(%error, device = %name, model = ?variant.digest, "a model is not bound there: others serve it");
                    }
                }
            }
        });
    }

    /// Binds all models to a device that has come back, where it can hold them.
    pub(super) fn bind_all_to(&self, device: DeviceId) {
        let opened = self.loader.devices[usize::from(device.0)].clone();
        let there = opened.device();
        let lacks = |model: &Model| !model.leaving && model.loaded.bound.iter().all(|(on, _)| *on != device);
        let fits = |model: &Model| charge(model.loaded.weights, there.as_ref()) <= there.info().capacity;
        for (id, model) in self.models.iter().filter(|(_, model)| lacks(model) && fits(model)) {
            self.bind_to_others(model.variant, *id, vec![(device, opened.clone())]);
        }
    }

    /// A model that was not bound to this device is now.
    fn bound_too(&mut self, id: ModelId, (device, bound): OnDeviceBound) {
        self.take_ended();
        let is_new = |model: &&mut Model| model.loaded.bound.iter().all(|(on, _)| *on != device);
        let wanted = self.models.get_mut(&id).filter(|model| !model.leaving && !bound.bound.is_gone()).filter(is_new);
        let Some(model) = wanted else {
            // Nobody wants it any more, or it is bound to the device's life before this one.
            return self.gone.take_down(bound);
        };
        self.telemetry.bound(&bound.device.info().name, bound.bound.is_twin());
        model.loaded.bound.push((device, bound));
        let charge = charge(model.loaded.weights, self.devices[usize::from(device.0)].device.as_ref());
        self.happen(Event::ModelBound { model: id, device, charge });
        self.tell_model(id, device);
    }

    fn add_model(&mut self, variant: Variant, loaded: Loaded) -> ModelId {
        self.id_next += 1;
        let id = ModelId(u32::try_from(self.id_next & u64::from(u32::MAX)).unwrap_or(0));
        self.trace.name(Named::Model, id.0, &variant.digest.to_string());
        let devices: Vec<_> = loaded.bound.iter().map(|(device, _)| *device).collect();
        for (_, bound) in &loaded.bound {
            self.telemetry.bound(&bound.device.info().name, bound.bound.is_twin());
        }
        let weights = loaded.weights;
        let model = Model {
            variant,
            loaded,
            functions: 0,
            idle_since: Some(Instant::now()),
            on: Vec::new(),
            from_disk: None,
            swap_error: None,
            leaving: false,
        };
        self.models.insert(id, model);
        self.by_variant.insert(variant, id);
        for device in devices {
            let charge = charge(weights, self.devices[usize::from(device.0)].device.as_ref());
            self.happen(Event::ModelBound { model: id, device, charge });
            self.tell_model(id, device);
        }
        id
    }

    /// The reason for which a model was rejected not long ago.
    pub(super) fn rejection(&mut self, variant: &Variant) -> Option<Refusal> {
        let (refusal, since) = self.rejected.get(variant)?;
        if since.elapsed() < REJECTED_FOR {
            return Some(refusal.clone());
        }
        self.rejected.remove(variant);
        None
    }

    fn reject(&mut self, variant: Variant, refusal: Refusal) {
        if self.rejected.len() >= REJECTED_MAX {
            let oldest = self.rejected.iter().min_by_key(|(_, (_, since))| *since).map(|(variant, _)| *variant);
            oldest.map(|variant| self.rejected.remove(&variant));
        }
        self.rejected.insert(variant, (refusal, Instant::now()));
    }

    pub(super) fn tell_progress(&self) {
        for loading in self.loading.values() {
            for waiter in &loading.waiters {
                let stage = loading.stage.text().to_owned();
                self.say(waiter.from, &FromBroker::Preparing { call: waiter.call, stage });
            }
        }
    }

    /// Unloads what nobody has used for the configured time.
    pub(super) fn unload_idle(&mut self) {
        let keep = self.settings.keep_warm;
        let over = |since: Instant| since.elapsed() >= keep;
        let idle = |model: &Model| !model.leaving && model.idle_since.is_some_and(over);
        let gone: Vec<_> = self.models.iter().filter(|(_, model)| idle(model)).map(|(id, _)| *id).collect();
        for id in gone {
            if let Some(model) = self.models.get_mut(&id) {
                model.leaving = true;
                tracing::info!(model = ?model.variant.digest, "unloaded: no function uses it");
                self.by_variant.remove(&model.variant);
            }
            self.happen(Event::ModelRemoved { model: id });
            self.drop_model_that_left(id);
        }
    }

    /// Ends a model that was asked to leave once it is on no device any more.
    pub(super) fn drop_model_that_left(&mut self, id: ModelId) {
        if self.models.get(&id).is_some_and(|model| model.leaving && model.on.is_empty())
            && let Some(model) = self.models.remove(&id)
        {
            self.gone.take_down(model);
        }
    }
}
