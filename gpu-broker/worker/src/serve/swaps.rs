//! Swaps, as the broker asks for them.

use std::sync::Arc;

use faaswap_device::{DeviceError, HostWeights, RangeId};
use faaswap_engine::Bound;

use super::Worker;
use crate::message::{Answer, Call, Fault, Held, ModelId, WeightsId};

impl Worker {
    /// A model and its weights' range.
    fn swapped(&self, model: ModelId) -> Result<(Arc<Bound>, RangeId), Fault> {
        let bound = self.models().get(&model).map(Arc::clone);
        let found = bound.and_then(|bound| bound.range().map(|range| (bound, range)));
        found.ok_or_else(|| Fault::Other("a model without weights is swapped".to_owned()))
    }

    pub(super) fn swap_in(self: &Arc<Self>, call: Call, model: ModelId, weights: WeightsId, from: Option<Held>) {
        let begun = self.swapped(model).and_then(|(bound, range)| {
            let weights = self.weights(weights)?;
            Ok(self.begin(call, (&bound, range), weights, from)?)
        });
        if let Err(fault) = begun {
            self.answer(call, Err(fault));
        }
    }

    fn begin(
        self: &Arc<Self>,
        call: Call,
        (bound, range): (&Bound, RangeId),
        weights: Arc<HostWeights>,
        from: Option<Held>,
    ) -> Result<(), DeviceError> {
        let worker = Arc::clone(self);
        let done = Box::new(move |result: Result<_, DeviceError>| {
            let (chunks, mapped) = (worker.chunks(range), worker.device.memory().mapped);
            let told = |report: faaswap_device::SwapReport| Answer::SwappedIn { report: report.into(), chunks, mapped };
            worker.answer(call, result.map(told).map_err(Fault::from));
        });
        let groups = bound.groups();
        match (from, self.device.as_cuda()) {
            (Some(Held { gpu, chunks }), Some(cuda)) => {
                cuda.swap_in_from_pool((gpu, &chunks), range, (weights, groups), done)
            }
            (Some(_) | None, _) => self.device.swap_in(range, weights, groups, done),
        }
    }

    /// Where a range's weights are in the pool, for other workers.
    fn chunks(&self, range: RangeId) -> Vec<u32> {
        self.device.as_cuda().map(|cuda| cuda.chunks_of(range)).unwrap_or_default()
    }

    pub(super) fn swap_out(self: &Arc<Self>, call: Call, model: ModelId) {
        let worker = Arc::clone(self);
        let done = Box::new(move |result: Result<(), DeviceError>| {
            let mapped = worker.device.memory().mapped;
            worker.answer(call, result.map(|()| Answer::SwappedOut { mapped }).map_err(Fault::from));
        });
        let begun = self.swapped(model).and_then(|(_, range)| Ok(self.device.swap_out(range, done)?));
        if let Err(fault) = begun {
            self.answer(call, Err(fault));
        }
    }

    pub(super) fn lend(&self, model: ModelId) {
        if let (Ok((_, range)), Some(cuda)) = (self.swapped(model), self.device.as_cuda()) {
            cuda.keep_for_reader(range);
        }
    }

    pub(super) fn take_back(&self, model: ModelId) {
        if let (Ok((_, range)), Some(cuda)) = (self.swapped(model), self.device.as_cuda()) {
            cuda.reader_has_gone(range);
        }
    }

    pub(super) fn compare(&self, model: ModelId, weights: WeightsId) -> Result<Answer, Fault> {
        let (_, range) = self.swapped(model)?;
        let differs_at = self.device.differs_at(range, &self.weights(weights)?)?;
        Ok(Answer::Compared { differs_at })
    }
}
