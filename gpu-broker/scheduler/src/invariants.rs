//! What is always true between two steps. Tests and the simulator check it after every step, the broker in debug builds.

use std::collections::BTreeMap;

use faaswap_protocol::Bytes;

use crate::{
    books::{Books, Stage},
    model::Weights,
    scheduler::Scheduler,
};

/// Checks every invariant; the error names the one that is broken.
pub fn check(scheduler: &Scheduler) -> Result<(), String> {
    memory_is_never_oversold(scheduler)?;
    lanes_and_requests_agree(scheduler)?;
    stays_count_their_runs(scheduler)?;
    orders_hold_what_they_order(&scheduler.books)
}

/// BR-2: what is charged to a device never exceeds what it has.
pub fn memory_is_never_oversold(scheduler: &Scheduler) -> Result<(), String> {
    let books = &scheduler.books;
    for (place, device) in books.devices.iter().enumerate().filter(|(_, device)| !device.lost) {
        let stays = || books.models.iter().filter_map(|(_, model)| model.stay(place));
        let charged: Bytes = stays().map(|stay| stay.charge).sum();
        let pinned: Bytes = stays().filter(|stay| !stay.can_leave()).map(|stay| stay.charge).sum();
        if charged > device.capacity || charged != device.charged || pinned != device.pinned {
            let (id, booked) = (device.id, (device.charged, device.pinned));
            return Err(format!("BR-2: {charged}, {pinned} in flight, at {id:?} of {}: {booked:?}", device.capacity));
        }
    }
    Ok(())
}

/// BR-3: a lane runs at most one request, and a request runs on at most one lane.
pub fn lanes_and_requests_agree(scheduler: &Scheduler) -> Result<(), String> {
    let mut running = BTreeMap::new();
    for (key, request) in &scheduler.books.requests {
        if let Stage::Running { device, lane, .. } = request.stage
            && let Some(other) = running.insert((device, usize::from(lane.0)), *key)
        {
            return Err(format!("BR-3: {key:?} and {other:?} run on {lane:?} of {device:?}"));
        }
    }
    for (place, device) in scheduler.books.devices.iter().enumerate() {
        for (lane, holds) in device.lanes.iter().enumerate() {
            if running.get(&(place, lane)).copied() != holds.as_ref().map(|holds| holds.request) {
                return Err(format!("BR-3: lane {lane} of {:?} holds {holds:?}", device.id));
            }
        }
        if device.busy != device.lanes.iter().flatten().count() {
            return Err(format!("BR-3: {:?} counts {} busy lanes", device.id, device.busy));
        }
    }
    Ok(())
}

/// BR-4: weights that a run uses are not taken away: each stay counts exactly the runs that are on it.
pub fn stays_count_their_runs(scheduler: &Scheduler) -> Result<(), String> {
    let books = &scheduler.books;
    let mut counted = BTreeMap::new();
    for request in books.requests.values() {
        if let Stage::Running { device, model, stay, .. } = request.stage {
            *counted.entry((model, device, stay.0)).or_insert(0_u32) += 1;
        }
    }
    for (slot, model) in books.models.iter() {
        for stay in &model.stays {
            let runs = counted.get(&(slot, stay.device, stay.id.0)).copied().unwrap_or(0);
            let lent = books.devices.iter().flat_map(|device| &device.copies).filter(|(copied, source)| {
                *copied == slot && *source == crate::event::Source::Peer(books.devices[stay.device].id)
            });
            if runs != stay.in_flight || lent.count() != stay.lent as usize {
                return Err(format!("BR-4: {:?} counts {} runs, {runs} are there", model.id, stay.in_flight));
            }
        }
    }
    Ok(())
}

/// BR-5: what can leave is in its device's order, what is copied is in its device's list, what waits is in its queue.
fn orders_hold_what_they_order(books: &Books) -> Result<(), String> {
    for (place, device) in books.devices.iter().enumerate().filter(|(_, device)| !device.lost) {
        let stays = || books.models.iter().filter_map(|(slot, model)| Some((slot, model.stay(place)?)));
        let leaving: Vec<_> = stays().filter_map(|(slot, stay)| Some((stay.listed?, slot))).collect();
        let listed = leaving.iter().all(|entry| device.leaving.contains(entry));
        let all = stays().all(|(_, stay)| stay.can_leave() == stay.listed.is_some());
        if !listed || !all || leaving.len() != device.leaving.len() {
            return Err(format!("BR-5: the order of eviction at {:?}", device.id));
        }
        if stays().filter(|(_, stay)| stay.weights != Weights::Resident).count() != device.copies.len() {
            return Err(format!("BR-5: {} copies at {:?}", device.copies.len(), device.id));
        }
    }
    let waiting = books.requests.values().filter(|request| matches!(request.stage, Stage::Waiting)).count();
    let queued: usize = books.functions.iter().map(|(_, function)| function.waiting_len()).sum();
    if waiting != queued || waiting != books.ready.by_age.len() {
        return Err(format!("BR-5: {waiting} wait, {queued} are queued"));
    }
    Ok(())
}
