//! Where the next run goes.

use std::collections::{BTreeMap, BTreeSet};

use faaswap_protocol::Bytes;

use crate::{
    device::{Device, Weights},
    event::{DeviceId, LaneId, ModelId},
};

/// A place for one run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// The weights are there, or on their way for another run.
    Here { device: DeviceId, lane: LaneId, resident: bool },
    /// The weights must be brought, after these models have left.
    SwapIn { device: DeviceId, lane: LaneId, victims: Vec<ModelId> },
    /// Lanes or copies of this model are busy; there is nothing to do but wait.
    Busy,
    /// A lane is idle, but models in flight hold the memory of this device, the one that comes closest.
    NoRoom { device: DeviceId },
}

/// Finds a place: where the weights are, else where bringing them evicts the fewest bytes.
///
/// A model that is held by busy lanes gets a second copy only where memory is free: a copy that others pay for with
/// theirs would start a chain of evictions.
pub(crate) fn place(
    model: ModelId,
    charges: &BTreeMap<DeviceId, Bytes>,
    devices: &BTreeMap<DeviceId, Device>,
    held_back: &BTreeSet<DeviceId>,
) -> Place {
    let bound = || {
        charges.iter().filter_map(|(&id, &charge)| {
            let device = devices.get(&id)?;
            (!held_back.contains(&id)).then_some((id, device, charge))
        })
    };
    let mut held = false;
    let mut here: Vec<_> = Vec::new();
    for (id, device, _) in bound() {
        let Some(stay) = device.stays.get(&model).filter(|stay| !stay.doomed) else { continue };
        held = true;
        if let Some(lane) = device.idle_lane() {
            let resident = stay.weights == Weights::Resident;
            here.push((!resident, stay.in_flight, id, lane, resident));
        }
    }
    if let Some((_, _, device, lane, resident)) = here.into_iter().min() {
        return Place::Here { device, lane, resident };
    }
    let mut swaps: Vec<_> = Vec::new();
    let mut no_room: Option<(Bytes, DeviceId)> = None;
    for (id, device, charge) in bound() {
        let Some(lane) = device.idle_lane() else { continue };
        match device.victims(charge) {
            Some(victims) if victims.is_empty() || !held => {
                let evicted: Bytes =
                    victims.iter().filter_map(|victim| device.stays.get(victim)).map(|stay| stay.charge).sum();
                swaps.push((evicted, device.copies_in_flight(), id, lane, victims));
            }
            Some(_) => {}
            None => no_room = no_room.max(Some((device.free(), id))),
        }
    }
    match (swaps.into_iter().min(), no_room) {
        (Some((_, _, device, lane, victims)), _) => Place::SwapIn { device, lane, victims },
        (None, Some((_, device))) if !held => Place::NoRoom { device },
        (None, _) => Place::Busy,
    }
}
