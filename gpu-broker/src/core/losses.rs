//! Devices that fail for good, what is suspected then, and how they come back: one in a worker by itself, while others serve; one of
//! this process with a process that starts anew.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Instant, SystemTime},
};

use faaswap_device::Device;
use faaswap_scheduler::Event;

use super::{Core, Model, device_id};
use crate::{
    limits::{QUIET_FOR, REOPEN_PAUSE, REOPEN_PAUSE_MAX},
    suspects::Lost,
};

impl Core {
    /// Where a device was lost since the last look, whatever runs there now may have been at fault: on any device of this process, for a
    /// fault costs it all of them.
    pub(super) fn suspect_what_runs(&mut self) {
        for index in 0..self.devices.len() {
            let entry = &mut self.devices[index];
            if entry.lost || entry.suspected || !entry.device.is_lost() {
                continue;
            }
            entry.suspected = true;
            let lost = if entry.device.can_reopen() { Lost::One(device_id(index)) } else { Lost::All };
            let damaged = self.verifier.seen.damaged.load(Ordering::Relaxed);
            self.suspects.device_lost(lost, damaged, (Instant::now(), SystemTime::now()));
        }
    }

    /// Tells the scheduler of devices that have failed for good: what ran there is refused, what waits goes elsewhere.
    pub(super) fn look_for_lost_devices(&mut self) {
        self.suspect_what_runs();
        for index in 0..self.devices.len() {
            let entry = &mut self.devices[index];
            if entry.lost || !entry.device.is_lost() {
                continue;
            }
            entry.lost = true;
            let (device, name) = (Arc::clone(&entry.device), entry.device.info().name.clone());
            tracing::error!(device = %name, "the device is lost: its requests are refused, others take over its functions");
            self.telemetry.device_lost(&name);
            self.happen(Event::DeviceLost { device: device_id(index) });
            if device.can_reopen() {
                self.bring_back(index, device);
            }
        }
        if self.devices.iter().all(|entry| entry.lost && !entry.device.can_reopen()) {
            self.broken.notify_one();
        }
    }

    /// Where other devices have taken over, a lost one is brought back when nobody would notice.
    pub(super) fn start_anew_when_quiet(&mut self) {
        let needed = self.devices.iter().any(|entry| entry.lost && !entry.device.can_reopen());
        if self.is_busy() || !self.loading.is_empty() || !needed {
            self.quiet_since = None;
        } else if self.quiet_since.get_or_insert_with(Instant::now).elapsed() >= QUIET_FOR {
            self.broken.notify_one();
        }
    }

    /// Opens a device anew, beside the loop. One that fails again and again is given time.
    fn bring_back(&self, index: usize, device: Arc<dyn Device>) {
        let me = self.me.clone();
        tokio::task::spawn_local(async move {
            let name = device.info().name.clone();
            let mut pause = REOPEN_PAUSE;
            loop {
                let begun = Instant::now();
                let opening = Arc::clone(&device);
                match tokio::task::spawn_blocking(move || opening.reopen()).await {
                    Ok(Ok(())) => {
                        let Some(core) = me.upgrade() else { return };
                        tracing::info!(device = %name, took = ?begun.elapsed(), "the device is back: models are bound to it");
                        return core.borrow_mut().device_is_back(index);
                    }
                    Ok(Err(error)) => {
                        tracing::error!(%error, device = %name, ?pause, "the device cannot be opened anew");
                    }
                    // The runtime ends.
                    Err(_) => return,
                }
                tokio::time::sleep(pause).await;
                pause = pause.saturating_mul(2).min(REOPEN_PAUSE_MAX);
            }
        });
    }

    /// A lost device is there again, with nothing on it: models are bound to it, one after the other.
    fn device_is_back(&mut self, index: usize) {
        self.take_ended();
        self.look_for_lost_devices();
        let id = device_id(index);
        let mut gone = Vec::new();
        for model in self.models.values_mut() {
            model.on.retain(|on| *on != id);
            // One may have been bound to it since it was opened.
            gone.extend(model.loaded.bound.extract_if(.., |(on, bound)| *on == id && bound.bound.is_gone()));
        }
        // Nothing of it is on any device, but each has taken memory of ours.
        self.gone.take_down(gone);
        let entry = &mut self.devices[index];
        (entry.lost, entry.suspected) = (false, false);
        let (capacity, lanes) = (entry.device.info().capacity, entry.lanes.len());
        let lanes = u16::try_from(lanes).unwrap_or(u16::MAX);
        self.happen(Event::DeviceAdded { device: id, capacity, lanes });
        let telemetry = Arc::clone(&self.telemetry);
        self.tell_links(telemetry.gpus());
        let has_left = |model: &Model| model.leaving && model.on.is_empty();
        let left: Vec<_> = self.models.iter().filter(|(_, model)| has_left(model)).map(|(id, _)| *id).collect();
        left.into_iter().for_each(|model| self.drop_model_that_left(model));
        self.bind_all_to(id);
    }
}
