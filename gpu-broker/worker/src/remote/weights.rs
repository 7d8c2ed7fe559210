//! Which weights a worker knows, and how far they are there.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use faaswap_device::{DeviceError, HostWeights};
use faaswap_protocol::Bytes;

use crate::{
    life::Life,
    message::{Fault, ToWorker, WeightsId},
};

/// How often it is looked how far weights are filled, and how many bytes more are told at least.
const FILLED_LOOK_EVERY: Duration = Duration::from_millis(20);
const FILLED_STEP: usize = 4 << 20;

/// What a worker knows of weights. It forgets them with this.
struct Known {
    life: Weak<Life>,
    id: WeightsId,
    followed: bool,
}

impl Drop for Known {
    fn drop(&mut self) {
        if let Some(life) = self.life.upgrade() {
            // A worker that is gone has forgotten everything.
            let _ = life.say(&ToWorker::Forget { weights: self.id }, &[]);
        }
    }
}

static WEIGHTS: AtomicU64 = AtomicU64::new(1);

/// What the worker calls these weights; tells it of them where it does not know them.
pub(super) fn known(life: &Arc<Life>, weights: &HostWeights) -> Result<WeightsId, DeviceError> {
    weights.with_notes(|notes| {
        if let Some(known) = notes.get(&life.number).and_then(|note| note.downcast_ref::<Known>()) {
            return Ok(known.id);
        }
        let id = WEIGHTS.fetch_add(1, Ordering::Relaxed);
        let file = weights.file().ok_or(DeviceError::Invalid("weights without bytes are swapped"))?;
        let full = weights.filled() == weights.len();
        life.say(&ToWorker::Weights { weights: id, size: weights.size(), full }, &[file])?;
        notes.retain(|_, note| note.downcast_ref::<Known>().is_none_or(|known| known.life.strong_count() > 0));
        notes.insert(life.number, Box::new(Known { life: Arc::downgrade(life), id, followed: full }));
        Ok(id)
    })
}

/// Tells the worker how far weights are filled, until they are, where nobody does so yet.
pub(super) fn follow(life: &Arc<Life>, weights: &Arc<HostWeights>, id: WeightsId) -> Result<(), DeviceError> {
    let begins = weights.with_notes(|notes| {
        let known = notes.get_mut(&life.number).and_then(|note| note.downcast_mut::<Known>());
        known.is_some_and(|known| !std::mem::replace(&mut known.followed, true))
    });
    if !begins {
        return Ok(());
    }
    let (life, weights) = (Arc::downgrade(life), Arc::clone(weights));
    let followed = thread::Builder::new().name("filled".to_owned()).spawn(move || tell_filled(&life, &weights, id));
    let failed = |e: std::io::Error| DeviceError::Failed { call: "starting a thread", reason: e.to_string() };
    followed.map(drop).map_err(failed)
}

fn tell_filled(life: &Weak<Life>, weights: &HostWeights, id: WeightsId) {
    let mut told = 0;
    while told < weights.len() {
        let wanted = (told + FILLED_STEP).min(weights.len());
        let filled = weights.wait_filled(wanted, FILLED_LOOK_EVERY);
        let Some(life) = life.upgrade().filter(|life| !life.is_lost()) else { return };
        let message = match filled {
            Ok(false) => continue,
            Ok(true) => {
                told = weights.filled();
                ToWorker::Filled { weights: id, until: Bytes::of_len(told) }
            }
            Err(error) => {
                told = weights.len();
                ToWorker::NotFilled { weights: id, why: Fault::from(error) }
            }
        };
        if life.say(&message, &[]).is_err() {
            return;
        }
    }
}
