//! Timings of a CUDA device's own doings, for benchmarks: nothing that serves requests calls these.

use std::time::{Duration, Instant};

use faaswap_protocol::Bytes;

use super::{
    CudaDevice,
    driver::{Addresses, Physical},
};
use crate::{DeviceError, HostWeights, RangeId};

impl CudaDevice {
    /// What the GPU is called, to stand beside figures.
    pub fn gpu_name(&self) -> Result<String, DeviceError> {
        self.shared.context.model_name()
    }

    /// Times plain copies of the weights, one for all that lies in a row, into a range that is swapped in: what a swap-in is measured against.
    pub fn time_plain_copy(&self, range: RangeId, weights: &HostWeights) -> Result<Duration, DeviceError> {
        let pieces = {
            let mut books = self.shared.books()?;
            let found = books.ranges.get(range)?;
            let placed = found.resident(range)?;
            if found.weights != weights.size() {
                return Err(DeviceError::Invalid("the weights have another size than the range"));
            }
            found.readers += 1;
            placed.pieces(0..weights.size().get())
        };
        let timed = (|| {
            self.shared.context.synchronize()?;
            let queue = &self.memory.lanes[self.own_lane()].queue;
            let started = Instant::now();
            let mut from = weights.as_ptr();
            for (to, len) in pieces {
                let len = usize::try_from(len).unwrap_or(0);
                // SAFETY: the piece lies in the weights, which are mapped, and in chunks of the range, which has a reader; both outlive
                // the wait below.
                unsafe { queue.copy_in(to, from, len) }?;
                from = from.wrapping_add(len);
            }
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
