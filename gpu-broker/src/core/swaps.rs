//! Swaps: asked of devices, and their ends.

use std::{sync::Arc, time::Instant};

use faaswap_device::DeviceError;
use faaswap_protocol::{Detail, Refusal};
use faaswap_scheduler::{DeviceId, Event, ModelId, RequestKey, Source};

use super::{Core, Home};
use crate::{lane::BoundModel, mailbox::Ended, verify::Stay};

impl Core {
    /// Begins a swap-in, from another device where the scheduler names one.
    pub(super) fn swap_in(&mut self, model: ModelId, device: DeviceId, source: Source) {
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
        let holder = match source {
            Source::Host => None,
            Source::Peer(holder) => self.bound(model, holder).map(|(bound, _)| bound),
        };
        let to = &self.devices[usize::from(device.0)].device;
        let asked = match holder.as_ref().and_then(|holder| Some((holder.device.as_ref(), holder.bound.range()?))) {
            Some(held) => to.swap_in_from(held, range, weights, groups, done),
            None => to.swap_in(range, weights, groups, done),
        };
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
        if let Some(model) = self.models.get_mut(&model).filter(|_| *error != DeviceError::Lost) {
            model.swap_error = Some(error.to_string());
        }
        self.events.push_back(Event::SwapInFailed { model, device });
    }

    /// A refusal with what is known here: where weights could not be brought, why not.
    pub(super) fn explained(&self, request: RequestKey, refusal: Refusal) -> Refusal {
        if refusal != Refusal::HardwareFault {
            return refusal;
        }
        let function = self.requests.get(&request).and_then(|request| self.functions.get(&request.function));
        let model = function.and_then(|function| self.models.get(&function.model));
        match model.and_then(|model| model.swap_error.clone()) {
            Some(why) => Refusal::RunFailed { reason: Detail::from(format!("its weights cannot be brought: {why}")) },
            None => refusal,
        }
    }

    pub(super) fn swap_out(&mut self, model: ModelId, device: DeviceId) {
        let Some((bound, _)) = self.bound(model, device) else { return };
        let Some(range) = bound.bound.range() else {
            self.events.push_back(Event::SwapOutDone { model, device });
            return;
        };
        let mailbox = Arc::clone(&self.mailbox);
        let held = bound.let_go();
        let done = Box::new(move |result| {
            drop(held);
            mailbox.post(Ended::SwapOut { model, device, result });
        });
        let asked = self.devices[usize::from(device.0)].device.swap_out(range, done);
        if let Err(error) = asked {
            self.swapped_out(model, device, Err(error));
            self.events.push_back(Event::SwapOutDone { model, device });
        }
    }

    pub(super) fn bound(&self, model: ModelId, device: DeviceId) -> Option<(Arc<BoundModel>, &Home)> {
        let loaded = &self.models.get(&model)?.loaded;
        let bound = loaded.bound.iter().find(|(on, _)| *on == device)?;
        Some((Arc::clone(&bound.1), &loaded.home))
    }

    pub(super) fn swapped_in(
        &mut self,
        model: ModelId,
        device: DeviceId,
        result: Result<faaswap_device::SwapReport, DeviceError>,
    ) {
        let entry = &self.devices[usize::from(device.0)];
        match result {
            Ok(report) => {
                self.telemetry.swapped_in(&entry.device.info().name, &report);
                if let Some(model) = self.models.get_mut(&model) {
                    model.swap_error = None;
                }
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

    pub(super) fn swapped_out(&mut self, model: ModelId, device: DeviceId, result: Result<(), DeviceError>) {
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

    pub(super) fn gone_from(&mut self, model: ModelId, device: DeviceId) {
        if let Some(model) = self.models.get_mut(&model) {
            model.on.retain(|on| *on != device);
        }
        self.drop_model_that_left(model);
    }
}
