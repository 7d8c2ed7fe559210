//! Binding: several models at once, each in a lane for that, with something behind all of its addresses.

use std::sync::{Arc, PoisonError};

use super::CudaDevice;
use crate::{DeviceError, RangeId, range::State};

impl CudaDevice {
    /// Does work that binds a model, in the lane that it is told: with one chunk behind all of the model's range.
    pub fn bind<T, E: From<DeviceError>>(
        &self,
        range: Option<RangeId>,
        work: impl FnOnce(usize) -> Result<T, E>,
    ) -> Result<T, E> {
        let lane = self.binding_lane();
        self.shared.context.enter()?;
        let Some(range) = range else { return work(lane.number) };
        let addresses = {
            let mut books = self.shared.books()?;
            let found = books.ranges.get(range)?;
            if found.state != State::Out || found.lent {
                let (state, wanted) = (found.state.name(), State::Out.name());
                return Err(DeviceError::State { range, state, wanted }.into());
            }
            found.lent = true;
            let behind = std::mem::take(&mut found.behind);
            let addresses = Arc::clone(&found.addresses);
            drop(books);
            if let Err(error) = self.shared.noted(addresses.unmap_all(&behind)) {
                self.shared.change(range, |range| range.lent = false);
                return Err(error.into());
            }
            addresses
        };
        let chunk = self.shared.info.chunk.as_len().unwrap_or(usize::MAX);
        let lent = (0..addresses.len()).step_by(chunk).try_for_each(|at| addresses.map(at, &self.dummy, chunk));
        let lent = lent.and_then(|()| addresses.open(0, addresses.len()));
        let result = lent.map_err(E::from).and_then(|()| work(lane.number));
        let finished = self.finish(lane.number);
        let unmapped = addresses.unmap(0, addresses.len());
        self.shared.change(range, |range| range.lent = false);
        self.shared.noted(finished.and(unmapped))?;
        result
    }

    /// Does work of libraries that may wait for the whole device, as when a session is made, first run, or dropped: to do so
    /// spoils what other threads capture, so it is done while nobody does.
    pub fn beside_captures<T>(&self, work: impl FnOnce() -> T) -> T {
        let _nobody = self.capturing.read().unwrap_or_else(PoisonError::into_inner);
        work()
    }

    /// Does work while a range's weights are there and stay; `None` where they are not.
    pub fn while_resident<T, E: From<DeviceError>>(
        &self,
        range: RangeId,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<Option<T>, E> {
        let reading = self.shared.read_resident(range)?;
        let done = reading.map(|_reading| work());
        done.transpose()
    }

    /// Waits for a lane to bind in.
    fn binding_lane(&self) -> BindingLane<'_> {
        let mut free = self.binding.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(number) = free.pop() {
                return BindingLane { device: self, number };
            }
            free = self.bound.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A lane that is bound in, until this is dropped.
struct BindingLane<'d> {
    device: &'d CudaDevice,
    number: usize,
}

impl Drop for BindingLane<'_> {
    fn drop(&mut self) {
        self.device.binding.lock().unwrap_or_else(PoisonError::into_inner).push(self.number);
        self.device.bound.notify_one();
    }
}
