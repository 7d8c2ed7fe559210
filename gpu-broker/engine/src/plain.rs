//! A plain ONNX Runtime session: what a model is compared with, when it is prepared, in tests and in benchmarks.
//!
//! It owns its weights, knows nothing of devices, and is never used to answer a request.

use std::{ffi::CString, fmt, path::Path, sync::Arc};

use faaswap_device::{Device, DeviceError};
use faaswap_protocol::{Shape, Signature};
use ort::session::{Session, builder::GraphOptimizationLevel};

use crate::{
    EngineError, Input, InputData, Runtime, Target,
    raw::{self, Tensor},
};

/// A model as ONNX Runtime runs it by itself.
#[derive(Debug)]
pub struct PlainSession {
    session: Session,
    input_names: Vec<CString>,
    output_names: Vec<CString>,
}

impl PlainSession {
    /// Opens a model with all optimizations for a target.
    pub fn open_for(runtime: &Runtime, target: Target, graph: &Path, prepacking: bool) -> Result<Self, EngineError> {
        let builder = runtime.builder_for(target, None)?.with_optimization_level(GraphOptimizationLevel::All)?;
        Self::of(builder.with_prepacking(prepacking)?.commit_from_file(graph)?)
    }

    /// Opens a model with all optimizations. Prepared models run without prepacking, which changes last bits: compare
    /// outputs with a session without it.
    pub fn open(runtime: &Runtime, graph: &Path, prepacking: bool) -> Result<Self, EngineError> {
        Self::open_for(runtime, Target::Cpu, graph, prepacking)
    }

    pub(crate) fn of(session: Session) -> Result<Self, EngineError> {
        let names = |outlets: &[ort::value::Outlet]| outlets.iter().map(|o| raw::c_name(o.name())).collect();
        let (input_names, output_names): (Result<_, _>, Result<_, _>) =
            (names(session.inputs()), names(session.outputs()));
        Ok(Self { input_names: input_names?, output_names: output_names?, session })
    }

    /// Runs the model once and returns all outputs: shapes and bytes.
    pub fn run(&self, inputs: &[Input<'_>]) -> Result<Vec<(Shape, Vec<u8>)>, EngineError> {
        if inputs.len() != self.input_names.len() {
            let (want, have) = (self.input_names.len(), inputs.len());
            return Err(EngineError::Ort(format!("the model takes {want} inputs, {have} came")));
        }
        let tensors = inputs.iter().map(|input| match input.data {
            InputData::Bytes(bytes) => Tensor::input(bytes, input.dtype, input.shape),
            InputData::Region(region) | InputData::Registered(region, _) => {
                Tensor::region(region, input.dtype, input.shape)
            }
        });
        let tensors = tensors.collect::<Result<Vec<_>, _>>()?;
        let allocated: Vec<Option<Tensor<'_>>> = self.output_names.iter().map(|_| None).collect();
        let names: Vec<_> = self.output_names.iter().map(|name| name.as_c_str()).collect();
        let outputs = raw::run(&self.session, &self.input_names, &tensors, &names, &allocated)?;
        outputs.iter().flatten().map(read).collect()
    }
}

/// A plain session whose inputs and outputs lie on a GPU: what a program is timed against. They are all zeros.
pub struct OnDevice<'s> {
    run: raw::DeviceRun<'s>,
    addresses: Vec<usize>,
    device: Arc<dyn Device>,
}

impl<'s> OnDevice<'s> {
    /// Puts zeros for inputs and outputs of the session on the device.
    pub fn new(plain: &'s PlainSession, signature: &Signature, device: &Arc<dyn Device>) -> Result<Self, EngineError> {
        let cuda = device.as_cuda().ok_or(DeviceError::Invalid("a device without a GPU"))?;
        let run = raw::DeviceRun::new(&plain.session)?;
        let mut bound = Self { run, addresses: Vec::new(), device: Arc::clone(device) };
        let inputs = signature.inputs.iter().zip(&plain.input_names).map(|pair| (true, pair));
        let outputs = signature.outputs.iter().zip(&plain.output_names).map(|pair| (false, pair));
        for (is_input, (spec, name)) in inputs.chain(outputs) {
            let shape = spec.fixed_shape().ok_or(DeviceError::Invalid("a tensor without a fixed shape"))?;
            let size = shape.size(spec.dtype).ok().and_then(|size| size.as_len());
            let len = size.ok_or(DeviceError::Invalid("a tensor that is too large"))?;
            let address = cuda.allocate(len)?;
            bound.addresses.push(address);
            cuda.zero(address, len)?;
            let element = crate::onnx::element_of(spec.dtype);
            let tensor = raw::device_tensor(cuda.ordinal(), address, len, element, &raw::dims_of(&shape))?;
            match is_input {
                true => bound.run.bind_input(name, tensor)?,
                false => bound.run.bind_output(name, tensor)?,
            }
        }
        Ok(bound)
    }

    /// Runs once and waits for the end.
    pub fn run(&self) -> Result<(), EngineError> {
        self.run.queue()?;
        let cuda = self.device.as_cuda().ok_or(DeviceError::Invalid("a device without a GPU"))?;
        Ok(cuda.synchronize()?)
    }
}

impl fmt::Debug for OnDevice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnDevice").finish_non_exhaustive()
    }
}

impl Drop for OnDevice<'_> {
    fn drop(&mut self) {
        for &address in &self.addresses {
            if let Some(cuda) = self.device.as_cuda() {
                cuda.free(address);
            }
        }
    }
}

fn read(tensor: &Tensor<'_>) -> Result<(Shape, Vec<u8>), EngineError> {
    let (_, dims) = tensor.describe()?;
    let dims: Option<Vec<u64>> = dims.into_iter().map(|dim| u64::try_from(dim).ok()).collect();
    let shape = dims.and_then(|dims| Shape::new(dims).ok());
    let shape = shape.ok_or_else(|| EngineError::Ort("an output has an impossible shape".to_owned()))?;
    Ok((shape, tensor.bytes()?.to_vec()))
}
