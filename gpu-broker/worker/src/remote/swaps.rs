//! Swaps in a worker, from host memory or from another worker's GPU.

use std::sync::{Arc, Weak, atomic::Ordering};

use faaswap_device::{DeviceError, HostWeights, OnDone, RangeId, SwapReport};
use faaswap_protocol::Bytes;

use super::{RemoteDevice, unexpected, weights};
use crate::{
    life::Life,
    message::{Answer, Held, ModelId, ToWorker},
};

impl RemoteDevice {
    /// Begins a swap-in, from another worker's GPU where that holds the weights.
    pub(super) fn begin(
        &self,
        held: Option<(Arc<Self>, RangeId)>,
        range: RangeId,
        of: &Arc<HostWeights>,
        done: OnDone<SwapReport>,
    ) -> Result<(), DeviceError> {
        let (life, model) = self.found(range)?;
        let id = weights::known(&life, of)?;
        weights::follow(&life, of, id)?;
        let lent = held.and_then(|(holder, range)| holder.lend(range));
        let from = lent.as_ref().map(|lent| lent.held.clone());
        let (device, mapped_of, stay) = (self.me.clone(), Arc::downgrade(&life), self.next_stay(range));
        let told = move |answer: Result<Answer, DeviceError>| {
            drop(lent);
            done(answer.and_then(|answer| {
                let Answer::SwappedIn { report, chunks, mapped } = answer else { return Err(unexpected(&answer)) };
                note_mapped(&mapped_of, mapped);
                if let Some(device) = device.upgrade()
                    && let Some(found) = device.ranges().get_mut(&range).filter(|found| found.stay == stay)
                {
                    found.chunks = chunks;
                }
                Ok(report.into())
            }));
        };
        life.call(|call| ToWorker::SwapIn { call, model, weights: id, from }, Box::new(told))
    }

    /// Weights come, or leave: where they were is not true any more. Gives the number of what begins.
    fn next_stay(&self, range: RangeId) -> u64 {
        self.ranges().get_mut(&range).map_or(0, |found| {
            found.chunks = Vec::new();
            found.stay += 1;
            found.stay
        })
    }

    /// Ends a stay.
    pub(super) fn leave(&self, range: RangeId, done: OnDone<()>) -> Result<(), DeviceError> {
        let (life, model) = self.found(range)?;
        self.next_stay(range);
        let mapped_of = Arc::downgrade(&life);
        let told = move |answer: Result<Answer, DeviceError>| {
            done(answer.and_then(|answer| {
                let Answer::SwappedOut { mapped } = answer else { return Err(unexpected(&answer)) };
                note_mapped(&mapped_of, mapped);
                Ok(())
            }));
        };
        life.call(|call| ToWorker::SwapOut { call, model }, Box::new(told))
    }

    /// Has weights stay where they are for a reader, where all of them are there.
    fn lend(&self, range: RangeId) -> Option<Lent> {
        let (life, model) = self.found(range).ok()?;
        let gpu = self.gpu()?;
        let chunks = self.ranges().get(&range).map(|found| found.chunks.clone()).filter(|chunks| !chunks.is_empty())?;
        life.say(&ToWorker::Lend { model }, &[]).ok()?;
        Some(Lent { life, model, held: Held { gpu, chunks } })
    }
}

/// Weights that another worker copies, until this is dropped.
struct Lent {
    life: Arc<Life>,
    model: ModelId,
    held: Held,
}

impl Drop for Lent {
    fn drop(&mut self) {
        // One that is gone keeps nothing.
        let _ = self.life.say(&ToWorker::Return { model: self.model }, &[]);
    }
}

fn note_mapped(life: &Weak<Life>, mapped: Bytes) {
    if let Some(life) = life.upgrade() {
        life.mapped.store(mapped.get(), Ordering::Relaxed);
    }
}
