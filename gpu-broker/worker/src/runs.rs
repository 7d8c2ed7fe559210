//! A lane of a worker: does one run at a time, with inputs and outputs in memory that it shares with the broker.

use std::{os::fd::OwnedFd, sync::Arc, time::Duration};

use faaswap_device::{Device, cuda::Registered};
use faaswap_engine::{Bound, Input, InputData, Place, RunError, RunOutput};
use faaswap_protocol::{Bytes, Detail, Refusal, SlabLayout, Span, limits::TENSOR_ALIGN};
use faaswap_slab::{Region, Slab, SlabError};

use crate::{
    message::{Ask, Ran, ToLane},
    serve::Worker,
    wire::{Buffer, Wire},
};

/// How long a lane looks for its next run before it sleeps: to wake it takes longer than many runs that wait.
const ASK_LOOKS_FOR: Duration = Duration::from_micros(60);
/// The same where a run was said to be about to come.
const EXPECTED_LOOKS_FOR: Duration = Duration::from_micros(150);
/// How much of the memory for inputs GPUs read by themselves: it stays in the machine, used or not.
const REGISTERED_MAX: Bytes = Bytes::mib(16);

/// The worker's end.
pub(crate) struct Lane {
    wire: Wire,
    slab: Slab,
    /// The start of the memory for inputs, where a GPU reads it by itself.
    registered: Option<Registered>,
}

impl Lane {
    pub(crate) fn new(
        socket: OwnedFd,
        memory: OwnedFd,
        exchange: SlabLayout,
        device: &dyn Device,
    ) -> Result<Self, SlabError> {
        let slab = Slab::open(memory, exchange)?;
        let start = slab.request_region(Span { offset: 0, len: exchange.request.min(REGISTERED_MAX).get() })?;
        let registered = start.fault_in().map(|()| faaswap_engine::register(device, &start));
        let registered = registered.map_or(None, |registered| {
            registered.inspect_err(|error| tracing::warn!(%error, "inputs are copied once more")).unwrap_or_default()
        });
        Ok(Self { wire: Wire::of(socket), slab, registered })
    }

    /// Until the broker goes.
    pub(crate) fn serve(self, worker: &Worker) {
        let (mut buffer, mut looks) = (Buffer::default(), ASK_LOOKS_FOR);
        loop {
            let ask = match self.wire.receive(&mut buffer, &mut Vec::new(), looks) {
                Ok(Some(ToLane::Run(ask))) => ask,
                Ok(Some(ToLane::Look)) => {
                    looks = EXPECTED_LOOKS_FOR;
                    continue;
                }
                Ok(None) => return,
                Err(error) => return tracing::error!(%error, "a lane of a device's process ends"),
            };
            looks = ASK_LOOKS_FOR;
            let model = worker.model_after(&ask);
            let ran = match &model {
                Some(model) => self.run(model, &ask),
                None => Ran::Failed(Detail::from("the device's process does not know the model")),
            };
            worker.end_if_lost();
            if let Err(error) = self.wire.send(&ran, &[]) {
                return tracing::debug!(%error, "nobody waits for a run's end");
            }
            // Nobody waits for this; the next run in this lane does, once.
            if let Some(model) = model.filter(|model| model.is_unsettled()) {
                model.settle();
            }
        }
    }

    fn run(&self, model: &Arc<Bound>, ask: &Ask) -> Ran {
        match self.try_run(model, ask) {
            Ok(outputs) => Ran::Done(outputs),
            Err(RunError::Refused(refusal)) => Ran::Refused(refusal),
            Err(RunError::Failed(reason)) => Ran::Failed(reason),
        }
    }

    fn try_run(&self, model: &Bound, ask: &Ask) -> Result<Vec<Output>, RunError> {
        let region = |(_, _, span): &(_, _, Span)| self.slab.request_region(*span);
        let regions: Vec<Region> = ask.inputs.iter().map(region).collect::<Result<_, _>>().map_err(out_of_bounds)?;
        let inputs: Vec<_> = ask
            .inputs
            .iter()
            .zip(&regions)
            .map(|((dtype, shape, _), region)| {
                let data = match &self.registered {
                    Some(memory) => InputData::Registered(region, memory),
                    None => InputData::Region(region),
                };
                Input { dtype: *dtype, shape, data }
            })
            .collect();
        let mut places = Places { slab: &self.slab, end: 0, taken: Vec::new() };
        let outputs = model.run(&inputs, &ask.wanted, &mut |index, _, _, size| places.place(index, size))?;
        let told = |RunOutput { index, dtype, shape, .. }: RunOutput| {
            let span = places.taken.iter().find(|(of, _)| *of == index).map(|(_, span)| *span);
            let span = span.ok_or_else(|| RunError::Failed(Detail::from("an output has no place")))?;
            Ok((index, dtype, shape, span))
        };
        outputs.into_iter().map(told).collect()
    }
}

type Output = (u16, faaswap_protocol::DType, faaswap_protocol::Shape, Span);

/// Places for a run's outputs, one behind the other.
struct Places<'s> {
    slab: &'s Slab,
    /// How much is taken.
    end: u64,
    taken: Vec<(u16, Span)>,
}

impl Places<'_> {
    fn place(&mut self, index: u16, size: Bytes) -> Result<Place, Refusal> {
        let SlabLayout { request, response } = self.slab.layout();
        let full = Refusal::SlabFull { needed: size, size: response };
        let span = Span { offset: request.get() + self.end, len: size.get() };
        let region = self.slab.response_region(span).map_err(|_| full)?;
        self.end = (self.end + size.get()).next_multiple_of(TENSOR_ALIGN);
        self.taken.push((index, span));
        Ok(Place::Region(region))
    }
}

#[expect(clippy::needless_pass_by_value, reason = "made for map_err")]
fn out_of_bounds(error: SlabError) -> RunError {
    RunError::Failed(Detail::from(format!("a lane's memory: {error}")))
}
