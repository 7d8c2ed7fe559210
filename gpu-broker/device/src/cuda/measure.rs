//! Timings of a CUDA device's own doings, for benchmarks: nothing that serves requests calls these.

use std::time::{Duration, Instant};

use faaswap_protocol::Bytes;

use super::{
    CudaDevice,
    driver::{Addresses, Physical},
};
use crate::{DeviceError, HostWeights, RangeId, range::State};

impl CudaDevice {
    /// What the GPU is called, to stand beside figures.
    pub fn gpu_name(&self) -> Result<String, DeviceError> {
        self.shared.context.model_name()
    }

    /// Times one plain copy of the weights into a range that is swapped in: what a swap-in is measured against.
    pub fn time_plain_copy(&self, range: RangeId, weights: &HostWeights) -> Result<Duration, DeviceError> {
        let base = {
            let mut books = self.shared.books()?;
            let found = books.ranges.get(range)?;
            if found.state != State::Resident || found.weights != weights.size() {
                let (state, wanted) = (found.state.name(), State::Resident.name());
                return Err(DeviceError::State { range, state, wanted });
            }
            found.readers += 1;
            found.addresses.base()
        };
        let timed = (|| {
            self.shared.context.synchronize()?;
            let queue = &self.memory.lanes[self.own_lane()].queue;
            let started = Instant::now();
            // SAFETY: the weights are mapped and the range is, which has a reader; both outlive the wait below.
            unsafe { queue.copy_in(base, weights.as_ptr(), weights.len()) }?;
            self.shared.context.synchronize()?;
            Ok(started.elapsed())
        })();
        self.shared.change(range, |range| range.readers -= 1);
        self.shared.noted(timed)
    }

    /// Times how memory is put behind addresses, made accessible and taken away, in chunks of this size. For
    /// measurements; `chunks` of them are taken from the driver for it.
    pub fn time_mapping(&self, chunk: Bytes, chunks: usize) -> Result<[Duration; 3], DeviceError> {
        let context = &self.shared.context;
        context.enter()?;
        let size = chunk.as_len().ok_or(DeviceError::Invalid("a chunk larger than can be"))?;
        let memory = (0..chunks).map(|_| Physical::new(context, size)).collect::<Result<Vec<_>, _>>()?;
        let addresses = Addresses::reserve(context, size * chunks)?;
        let started = Instant::now();
        for (place, memory) in memory.iter().enumerate() {
            addresses.map(place * size, memory, size)?;
        }
        let mapped = Instant::now();
        addresses.open(0, size * chunks)?;
        let open = Instant::now();
        addresses.unmap(0, size * chunks)?;
        Ok([mapped - started, open - mapped, open.elapsed()])
    }
}
