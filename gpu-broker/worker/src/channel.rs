//! A lane's way to the worker: inputs are copied to memory that both share, outputs from there.

use std::{os::fd::OwnedFd, sync::Arc, time::Duration};

use faaswap_device::DeviceError;
use faaswap_engine::{AskPlace, Input, InputData, Place, RunError, RunOutput};
use faaswap_protocol::{Bytes, DType, Detail, Refusal, Shape, SlabLayout, Span, limits::TENSOR_ALIGN};
use faaswap_slab::{Slab, SlabError};

use crate::{
    message::{Ask, ModelId, Ran, ToLane},
    wire::{Buffer, Wire},
};

/// How long a lane looks for an answer before it sleeps. Most runs take longer.
const ANSWER_LOOKS_FOR: Duration = Duration::ZERO;

/// The broker's end. For one run at a time.
#[derive(Debug)]
pub(crate) struct Channel {
    pub(crate) wire: Arc<Wire>,
    slab: Slab,
    buffer: Buffer,
    /// Whether the other end was gone when it was needed last.
    pub(crate) is_cut: bool,
}

/// What the worker needs for the other end: a socket, and the memory.
pub(crate) type OtherEnd = [OwnedFd; 2];

impl Channel {
    pub(crate) fn new(exchange: SlabLayout) -> Result<(Self, OtherEnd), DeviceError> {
        let failed = |call| move |reason: String| DeviceError::Failed { call, reason };
        let (wire, socket) = Wire::pair().map_err(|e| failed("socketpair")(e.to_string()))?;
        let (slab, memory) = Slab::create(exchange).map_err(|e| failed("making memory for a lane")(e.to_string()))?;
        Ok((Self { wire: Arc::new(wire), slab, buffer: Buffer::default(), is_cut: false }, [socket, memory]))
    }

    /// Runs a model once, as [`faaswap_engine::Bound::run`] does.
    pub(crate) fn run(
        &mut self,
        (model, after): (ModelId, u64),
        inputs: &[Input<'_>],
        wanted: &[u16],
        place: &mut AskPlace<'_>,
    ) -> Result<Vec<RunOutput>, RunError> {
        let inputs = self.copy_inputs(inputs)?;
        let ask = ToLane::Run(Ask { after, model, inputs, wanted: wanted.to_vec() });
        let told = self.wire.send(&ask, &[]);
        let ran = told.and_then(|()| self.wire.receive(&mut self.buffer, &mut Vec::new(), ANSWER_LOOKS_FOR));
        match ran {
            Ok(Some(Ran::Done(outputs))) => outputs.into_iter().map(|output| self.copy_output(output, place)).collect(),
            Ok(Some(Ran::Refused(refusal))) => Err(refusal.into()),
            Ok(Some(Ran::Failed(reason))) => Err(RunError::Failed(reason)),
            Ok(None) => Err(self.cut("it has ended")),
            Err(error) => Err(self.cut(&error.to_string())),
        }
    }

    /// Wakes the other end: a run is about to come.
    pub(crate) fn look(&self) {
        // Where it is gone the next run tells.
        let _ = self.wire.send(&ToLane::Look, &[]);
    }

    fn cut(&mut self, why: &str) -> RunError {
        self.is_cut = true;
        failed(format!("the device's process: {why}"))
    }

    fn copy_inputs(&self, inputs: &[Input<'_>]) -> Result<Vec<(DType, Shape, Span)>, RunError> {
        let most = self.slab.layout().request;
        let mut end = 0_u64;
        let copy = |input: &Input<'_>| {
            let len = Bytes::of_len(input.data.len()).get();
            let span = Span { offset: end, len };
            end = end.saturating_add(len).next_multiple_of(TENSOR_ALIGN);
            let too_large = |_| Refusal::SlabFull { needed: Bytes::new(end), size: most };
            let region = self.slab.request_region(span).map_err(too_large)?;
            let copied = match input.data {
                InputData::Region(from) | InputData::Registered(from, _) => region.copy_from(from),
                InputData::Bytes(from) => region.write(0, from),
            };
            copied.map_err(out_of_bounds)?;
            Ok((input.dtype, input.shape.clone(), span))
        };
        inputs.iter().map(copy).collect()
    }

    fn copy_output(
        &self,
        (index, dtype, shape, span): (u16, DType, Shape, Span),
        place: &mut AskPlace<'_>,
    ) -> Result<RunOutput, RunError> {
        let region = self.slab.response_region(span).map_err(out_of_bounds)?;
        let mut place = place(index, dtype, &shape, Bytes::new(span.len))?;
        match &mut place {
            Place::Region(to) => to.copy_from(&region),
            Place::Memory(to) => region.read(0, to),
        }
        .map_err(out_of_bounds)?;
        Ok(RunOutput { index, dtype, shape, place })
    }
}

#[expect(clippy::needless_pass_by_value, reason = "made for map_err")]
fn out_of_bounds(error: SlabError) -> RunError {
    failed(format!("a lane's memory: {error}"))
}

fn failed(reason: impl Into<Detail>) -> RunError {
    RunError::Failed(reason.into())
}
