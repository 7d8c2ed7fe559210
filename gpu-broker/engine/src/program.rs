//! Models as programs on a GPU: how one is made of a session, and how it runs without it.
//!
//! Binding makes a session on a binding lane's stream, runs it once there (libraries choose and load their kernels),
//! and captures the run for the model's lane. Whether the session may go afterwards was found out when the model was
//! prepared.

use std::{ffi::CString, sync::Arc, time::Duration};

use faaswap_device::{
    Device, DeviceError, Group, RangeId,
    cuda::{Alone, Constants, Drawing, IO_ALIGN, IO_BYTES_MAX, Program, Registered, Run, RunTimes, Template},
};
use faaswap_protocol::{Bytes, Shape, Signature, TensorSpec};
use ort::session::Session;

use crate::{EngineError, onnx, raw};

/// Where a fixed tensor lies in its lane's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) offset: usize,
    pub(crate) len: usize,
    pub(crate) shape: Shape,
}

/// Where a model's inputs and outputs lie in its lane's memory: inputs first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct IoLayout {
    pub(crate) inputs: Vec<Slot>,
    pub(crate) outputs: Vec<Slot>,
    /// Where the inputs end.
    pub(crate) inputs_end: usize,
    /// Where the outputs end.
    pub(crate) end: usize,
}

impl IoLayout {
    /// `Err` says why the model has no program: a shape that only a request can tell.
    pub(crate) fn of(signature: &Signature) -> Result<Self, String> {
        let fixed = |spec: &TensorSpec| spec.fixed_shape().ok_or_else(|| format!("{} has no fixed shape", spec.name));
        let inputs = signature.inputs.iter().map(fixed).collect::<Result<Vec<_>, _>>()?;
        let outputs = signature.outputs.iter().map(fixed).collect::<Result<Vec<_>, _>>()?;
        Self::with(signature, &inputs, &outputs)
    }

    /// As above, with shapes that a request has told.
    pub(crate) fn with(signature: &Signature, inputs: &[Shape], outputs: &[Shape]) -> Result<Self, String> {
        let mut end = 0;
        let mut place = |(spec, shape): (&TensorSpec, &Shape)| {
            let len = shape.size(spec.dtype).ok().and_then(Bytes::as_len);
            let len = len.ok_or_else(|| format!("{} is too large", spec.name))?;
            let offset = end;
            end = (offset + len.max(1)).next_multiple_of(IO_ALIGN);
            if end > IO_BYTES_MAX {
                return Err(format!("inputs and outputs have more than {IO_BYTES_MAX} bytes"));
            }
            Ok(Slot { offset, len, shape: shape.clone() })
        };
        let inputs = signature.inputs.iter().zip(inputs).map(&mut place).collect::<Result<Vec<_>, _>>()?;
        let outputs = signature.outputs.iter().zip(outputs).map(&mut place).collect::<Result<Vec<_>, _>>()?;
        let inputs_end = outputs.first().map_or(end, |first| first.offset);
        Ok(Self { inputs, outputs, inputs_end, end })
    }
}

/// A program and what it needs. The program goes before the memory in it.
#[derive(Debug)]
pub(crate) struct Programs {
    program: Program,
    pub(crate) io: IoLayout,
    /// It gives the memory back in the end. `None` where a session that is kept has it.
    constants: Option<Constants>,
    pub(crate) device: Arc<dyn Device>,
}

impl Programs {
    /// A program of the model's kind, made for this one: its own constants are `first`, and `tensors` lie in its weights.
    pub(crate) fn twin(
        device: &Arc<dyn Device>,
        template: &Arc<Template>,
        io: IoLayout,
        (lane, range): (usize, RangeId),
        (tensors, first): (&[Group], &[u8]),
    ) -> Result<Self, DeviceError> {
        let cuda = device.as_cuda().ok_or(DeviceError::Invalid("a program on a device without a GPU"))?;
        cuda.io_address(lane, io.end)?;
        let constants = cuda.constants();
        let program = cuda.twin(template, lane, (range, tensors), &constants, first)?;
        Ok(Self { program, io, constants: Some(constants), device: Arc::clone(device) })
    }

    pub(crate) fn constants(&self) -> Option<&Constants> {
        self.constants.as_ref()
    }

    /// In which lane it runs.
    pub(crate) fn lane(&self) -> usize {
        self.program.lane()
    }

    pub(crate) fn nodes(&self) -> usize {
        self.program.nodes()
    }

    pub(crate) fn parts_nodes(&self) -> Vec<(u32, usize)> {
        self.program.parts_nodes()
    }

    pub(crate) fn replaced(&self) -> (usize, usize) {
        self.program.replaced()
    }

    pub(crate) fn last_run(&self) -> RunTimes {
        self.program.last()
    }

    /// Begins a run, alone in the program's lane.
    pub(crate) fn begin(&self) -> Result<Running<'_>, DeviceError> {
        let cuda = self.device.as_cuda().ok_or(DeviceError::Invalid("a program on a device without a GPU"))?;
        Ok(Running { run: cuda.begin(&self.program)?, io: &self.io })
    }

    /// Begins a run in the program's lane, which is the caller's already.
    pub(crate) fn begin_in<'p>(&'p self, alone: Alone<'p>) -> Result<Running<'p>, DeviceError> {
        let cuda = self.device.as_cuda().ok_or(DeviceError::Invalid("a program on a device without a GPU"))?;
        Ok(Running { run: cuda.begin_in(alone, &self.program)?, io: &self.io })
    }
}

/// A run of a program.
pub(crate) struct Running<'p> {
    run: Run<'p>,
    io: &'p IoLayout,
}

impl<'p> Running<'p> {
    /// The bytes of an input, to be written before [`Running::go`].
    pub(crate) fn input(&mut self, index: usize) -> Result<&mut [u8], DeviceError> {
        let slot = &self.io.inputs[index];
        self.run.bytes(slot.offset, slot.len)
    }

    /// Has an input read from an address in registered memory, where that can be; see [`Run::read_in_place`].
    pub(crate) fn read_in_place(
        &mut self,
        index: usize,
        memory: &'p Registered,
        address: usize,
    ) -> Result<bool, DeviceError> {
        let slot = &self.io.inputs[index];
        self.run.read_in_place((slot.offset, slot.len), memory, address)
    }

    /// Runs, behind the copies of the weights; see [`Run::go`].
    pub(crate) fn go(&mut self, weights: Option<(RangeId, Option<u32>)>) -> Result<(), DeviceError> {
        self.run.go(weights, (0, self.io.inputs_end), (self.io.inputs_end, self.io.end - self.io.inputs_end))
    }

    /// See [`Run::time_alone`].
    pub(crate) fn time_alone(&mut self) -> Result<Duration, DeviceError> {
        self.run.time_alone()
    }

    /// The bytes of an output, once it has run.
    pub(crate) fn output(&mut self, index: usize) -> Result<&[u8], DeviceError> {
        let slot = &self.io.outputs[index];
        Ok(self.run.bytes(slot.offset, slot.len)?)
    }
}

/// A session that a program is made of.
pub(crate) struct Made<'s> {
    pub(crate) session: &'s Session,
    pub(crate) signature: &'s Signature,
    pub(crate) input_names: &'s [CString],
    pub(crate) output_names: &'s [CString],
    pub(crate) groups: &'s [Group],
}

/// Makes a model's program for a lane of its session: inside of [`CudaDevice::bind`], in the lane for that, or in the lane itself
/// with the weights there. The session's stream is that of the lane in which it is made, which is the caller's. Each lane
/// comes with where its inputs and outputs are, asked of the device before the lane is taken.
pub(crate) fn make(
    device: &Arc<dyn Device>,
    made: &Made<'_>,
    io: IoLayout,
    (lane, here): (usize, usize),
    (alone, there): (&Alone<'_>, usize),
    constants: Option<Constants>,
) -> Result<(Programs, Drawing), EngineError> {
    let Made { session, signature, input_names, output_names, groups } = *made;
    let cuda = device.as_cuda().ok_or(DeviceError::Invalid("a program on a device without a GPU"))?;
    let bind = |base: usize| -> Result<raw::DeviceRun<'_>, EngineError> {
        let mut run = raw::DeviceRun::new(session)?;
        let tensor = |spec: &TensorSpec, slot: &Slot| {
            let element = onnx::element_of(spec.dtype);
            raw::device_tensor(cuda.ordinal(), base + slot.offset, slot.len, element, &raw::dims_of(&slot.shape))
        };
        for ((spec, slot), name) in signature.inputs.iter().zip(&io.inputs).zip(input_names) {
            run.bind_input(name, tensor(spec, slot)?)?;
        }
        for ((spec, slot), name) in signature.outputs.iter().zip(&io.outputs).zip(output_names) {
            run.bind_output(name, tensor(spec, slot)?)?;
        }
        Ok(run)
    };
    let binding = alone.lane();
    let warm = bind(there)?;
    cuda.clear_io(binding, io.end)?;
    cuda.beside_captures(|| -> Result<(), EngineError> {
        alone.run(|| warm.queue())?;
        Ok(cuda.finish(binding)?)
    })?;
    let run = bind(here)?;
    let (program, drawing) = cuda.capture(lane, binding, groups, || run.queue())?;
    Ok((Programs { program, io, constants, device: Arc::clone(device) }, drawing))
}
