//! What is always true between two steps. Tests and the simulator check it after every step, the broker in debug builds.

use std::collections::BTreeMap;

use crate::{
    event::{LaneId, ModelId},
    scheduler::{Scheduler, Stage},
};

/// Checks every invariant; the error names the one that is broken.
pub fn check(scheduler: &Scheduler) -> Result<(), String> {
    memory_is_never_oversold(scheduler)?;
    lanes_and_requests_agree(scheduler)?;
    stays_count_their_runs(scheduler)
}

/// BR-2: what is charged to a device never exceeds what it has.
pub fn memory_is_never_oversold(scheduler: &Scheduler) -> Result<(), String> {
    scheduler.devices.iter().try_for_each(|(id, device)| {
        let charged = device.charged();
        match device.capacity.checked_sub(charged) {
            Some(_) => Ok(()),
            None => Err(format!("BR-2: {charged} charged to {id:?} of {}", device.capacity)),
        }
    })
}

/// BR-3: a lane runs at most one request, and a request runs on at most one lane.
pub fn lanes_and_requests_agree(scheduler: &Scheduler) -> Result<(), String> {
    let mut running = BTreeMap::new();
    for (key, request) in &scheduler.requests {
        if let Stage::Running { device, lane, .. } = request.stage
            && let Some(other) = running.insert((device, lane), *key)
        {
            return Err(format!("BR-3: {key:?} and {other:?} run on {lane:?} of {device:?}"));
        }
    }
    for (id, device) in &scheduler.devices {
        for (lane, holds) in (0..).map(LaneId).zip(&device.lanes) {
            if running.get(&(*id, lane)) != holds.as_ref() {
                return Err(format!("BR-3: {lane:?} of {id:?} holds {holds:?}"));
            }
        }
    }
    Ok(())
}

/// BR-4: weights that a run uses are not taken away: each stay counts exactly the runs that are on it.
pub fn stays_count_their_runs(scheduler: &Scheduler) -> Result<(), String> {
    for (id, device) in &scheduler.devices {
        for (model, stay) in &device.stays {
            let uses = |m: ModelId, s| m == *model && s == stay.id;
            let runs = scheduler.requests.values().filter(|request| match request.stage {
                Stage::Running { device, model, stay, .. } => device == *id && uses(model, stay),
                Stage::Waiting => false,
            });
            if runs.count() != stay.in_flight as usize {
                return Err(format!("BR-4: {model:?} on {id:?} counts {} runs", stay.in_flight));
            }
        }
    }
    Ok(())
}
