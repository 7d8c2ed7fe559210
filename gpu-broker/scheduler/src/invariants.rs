//! What is always true between two steps. Tests and the simulator check it after every step, the broker in debug builds.

use std::collections::{BTreeMap, BTreeSet};

use faaswap_protocol::{Batching, Bytes};

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

/// BR-3: a lane has at most one run, and a request is in at most one.
pub fn lanes_and_requests_agree(scheduler: &Scheduler) -> Result<(), String> {
    let mut running: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for (key, request) in &scheduler.books.requests {
        if let Stage::Running { device, lane, .. } = request.stage {
            running.entry((device, usize::from(lane.0))).or_default().insert(*key);
        }
    }
    for (place, device) in scheduler.books.devices.iter().enumerate() {
        for (lane, holds) in device.lanes.iter().enumerate() {
            let held = holds.as_ref().map(|holds| holds.requests().collect::<Vec<_>>()).unwrap_or_default();
            let there = running.remove(&(place, lane)).unwrap_or_default();
            // As many as there are, and each of them: none is held twice.
            if there.len() != held.len() || !held.iter().all(|request| there.contains(request)) {
                return Err(format!("BR-3: lane {lane} of {:?} holds {holds:?}, {there:?} run there", device.id));
            }
        }
        if device.busy != device.lanes.iter().flatten().count() {
            return Err(format!("BR-3: {:?} counts {} busy lanes", device.id, device.busy));
        }
    }
    if let Some((lane, requests)) = running.first_key_value() {
        return Err(format!("BR-3: {requests:?} run on lane {lane:?}, which there is not"));
    }
    Ok(())
}

/// BR-4: weights that a run uses are not taken away: each stay counts exactly the runs that are on it.
pub fn stays_count_their_runs(scheduler: &Scheduler) -> Result<(), String> {
    let books = &scheduler.books;
    let mut counted = BTreeMap::new();
    for (key, request) in &books.requests {
        let Stage::Running { device, lane, model, stay } = request.stage else { continue };
        let running = books.devices[device].lanes.get(usize::from(lane.0)).and_then(Option::as_ref);
        if running.is_some_and(|running| running.request == *key) {
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
    let stale = books.functions.iter().flat_map(|(_, function)| &function.stale);
    let given_up: BTreeSet<_> = stale.map(|late| (late.arrived, late.request)).collect();
    if given_up != books.ready.given_up {
        return Err(format!("BR-5: {given_up:?} were given up, listed are {:?}", books.ready.given_up));
    }
    lists_hold_what_may_share_runs(books)
}

/// What waits and may share a run is in its model's list, and nothing else is.
fn lists_hold_what_may_share_runs(books: &Books) -> Result<(), String> {
    let mut sharing: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for (at, function) in books.functions.iter().filter(|(_, function)| function.batch.batching != Batching::Off) {
        let waiting = function.fresh.iter().chain(&function.stale);
        let entries = waiting.filter_map(|waits| Some((waits.form?, waits.deadline, waits.request, at)));
        sharing.entry(function.model).or_default().extend(entries);
    }
    for (slot, model) in books.models.iter() {
        let may = sharing.remove(&slot).unwrap_or_default();
        if may != model.sharing {
            return Err(format!("BR-5: {may:?} may share runs of {:?}, listed are {:?}", model.id, model.sharing));
        }
    }
    Ok(())
}
