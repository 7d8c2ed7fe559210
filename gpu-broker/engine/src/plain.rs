//! A plain ONNX Runtime session: what a model is compared with, when it is prepared, in tests and in benchmarks.
//!
//! It owns its weights, knows nothing of devices, and is never used to answer a request.

use std::{ffi::CString, path::Path};

use faaswap_protocol::Shape;
use ort::session::{Session, builder::GraphOptimizationLevel};

use crate::{
    EngineError, Input, InputData, Runtime,
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
    /// Opens a model with all optimizations. Prepared models run without prepacking, which changes last bits: compare
    /// outputs with a session without it.
    pub fn open(runtime: &Runtime, graph: &Path, prepacking: bool) -> Result<Self, EngineError> {
        let builder = runtime.session_builder()?.with_optimization_level(GraphOptimizationLevel::All)?;
        Self::of(builder.with_prepacking(prepacking)?.commit_from_file(graph)?)
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
            InputData::Region(region) => Tensor::region(region, input.dtype, input.shape),
        });
        let tensors = tensors.collect::<Result<Vec<_>, _>>()?;
        let allocated: Vec<Option<Tensor<'_>>> = self.output_names.iter().map(|_| None).collect();
        let names: Vec<_> = self.output_names.iter().map(|name| name.as_c_str()).collect();
        let outputs = raw::run(&self.session, &self.input_names, &tensors, &names, &allocated)?;
        outputs.iter().flatten().map(read).collect()
    }
}

fn read(tensor: &Tensor<'_>) -> Result<(Shape, Vec<u8>), EngineError> {
    let (_, dims) = tensor.describe()?;
    let dims: Option<Vec<u64>> = dims.into_iter().map(|dim| u64::try_from(dim).ok()).collect();
    let shape = dims.and_then(|dims| Shape::new(dims).ok());
    let shape = shape.ok_or_else(|| EngineError::Ort("an output has an impossible shape".to_owned()))?;
    Ok((shape, tensor.bytes()?.to_vec()))
}
