//! Runs of a session: on the host device, and on a GPU where a model has no program.

use std::ffi::CStr;

use faaswap_protocol::Shape;

use super::{
    Bound,
    io::{AskPlace, Input, InputData, Place, RunOutput, ask_place},
};
use crate::{
    EngineError, RunError,
    raw::{self, Aligned, Tensor},
};

impl Bound {
    pub(super) fn run_session(
        &self,
        inputs: &[Input<'_>],
        wanted: &[u16],
        place: &mut AskPlace<'_>,
    ) -> Result<Vec<RunOutput>, RunError> {
        let session = self.session.as_ref().ok_or_else(|| RunError::failed("there is no session"))?;
        let copies = inputs.iter().enumerate().map(|(i, input)| self.private_copy(i, input));
        let copies = copies.collect::<Result<Vec<_>, _>>()?;
        let tensors = inputs.iter().zip(&copies).map(|(input, copy)| input_tensor(input, copy.as_ref()));
        let tensors = tensors.collect::<Result<Vec<_>, _>>().map_err(RunError::failed)?;
        let mut early = self.places_before(wanted, place)?;
        self.wait_before_run()?;
        let names: Vec<&CStr> = wanted.iter().map(|&i| self.output_names[usize::from(i)].as_c_str()).collect();
        let outputs = wanted.iter().zip(&mut early).map(|(&i, early)| self.bind_place(i, early));
        let outputs = outputs.collect::<Result<Vec<_>, _>>().map_err(RunError::failed)?;
        let fresh = raw::run(session, &self.input_names, &tensors, &names, &outputs).map_err(RunError::failed)?;
        // The tensors over places end here, so that the places can be handed out again.
        drop(outputs);
        let done = wanted.iter().zip(fresh).zip(early);
        done.map(|((&index, fresh), early)| self.hand_over(index, fresh, early, place)).collect()
    }

    /// A copy of an input that kernels must not read where it is: shared memory under values that choose addresses, or
    /// memory that is not aligned.
    fn private_copy(&self, index: usize, input: &Input<'_>) -> Result<Option<Aligned>, RunError> {
        match input.data {
            InputData::Region(region) | InputData::Registered(region, _) => {
                if !input.dtype.can_index() && self.manifest.inputs_in_place[index] {
                    return Ok(None);
                }
                let mut copy = Aligned::new(region.len());
                region.read(0, copy.as_mut_slice()).map_err(RunError::failed)?;
                Ok(Some(copy))
            }
            InputData::Bytes(bytes) if raw::is_aligned(bytes, input.dtype) => Ok(None),
            InputData::Bytes(bytes) => {
                let mut copy = Aligned::new(bytes.len());
                copy.as_mut_slice().copy_from_slice(bytes);
                Ok(Some(copy))
            }
        }
    }

    /// Places of outputs whose shapes are known.
    fn places_before(&self, wanted: &[u16], place: &mut AskPlace<'_>) -> Result<Vec<Option<(Shape, Place)>>, RunError> {
        let ask = |&index: &u16| {
            let position = usize::from(index);
            let spec = &self.manifest.signature.outputs[position];
            let Some(shape) = spec.fixed_shape().filter(|_| self.manifest.outputs_in_place[position]) else {
                return Ok(None);
            };
            let place = ask_place(place, index, spec.dtype, &shape)?;
            Ok(Some((shape, place)))
        };
        wanted.iter().map(ask).collect()
    }

    /// The tensor over a place, where kernels may write there directly.
    fn bind_place<'p>(
        &self,
        index: u16,
        early: &'p mut Option<(Shape, Place)>,
    ) -> Result<Option<Tensor<'p>>, EngineError> {
        let dtype = self.manifest.signature.outputs[usize::from(index)].dtype;
        match early {
            // Values that choose addresses are not written where a peer could change them before a kernel reads them back.
            Some((_, Place::Region(_))) if dtype.can_index() => Ok(None),
            Some((shape, Place::Region(region))) => Tensor::region(region, dtype, shape).map(Some),
            Some((shape, Place::Memory(bytes))) if raw::is_aligned(bytes, dtype) => {
                Tensor::output(bytes, dtype, shape).map(Some)
            }
            Some((_, Place::Memory(_))) | None => Ok(None),
        }
    }

    fn wait_before_run(&self) -> Result<(), RunError> {
        match (&self.range, self.manifest.await_before_run) {
            (Some(reserved), Some(group)) => reserved.waiter.wait(group).map_err(RunError::failed),
            _ => Ok(()),
        }
    }

    fn shape_of(&self, index: u16, tensor: &Tensor<'_>) -> Result<Shape, RunError> {
        let spec = &self.manifest.signature.outputs[usize::from(index)];
        let (dtype, dims) = tensor.describe().map_err(RunError::failed)?;
        let dims: Option<Vec<u64>> = dims.into_iter().map(|dim| u64::try_from(dim).ok()).collect();
        match dims.and_then(|dims| Shape::new(dims).ok()) {
            Some(shape) if dtype == Some(spec.dtype) => Ok(shape),
            _ => Err(RunError::failed(format!("output {} is not a tensor of {}", spec.name, spec.dtype))),
        }
    }

    /// An output in its place: written there by the run, or copied from where the run has put it.
    fn hand_over(
        &self,
        index: u16,
        fresh: Option<Tensor<'_>>,
        early: Option<(Shape, Place)>,
        ask: &mut AskPlace<'_>,
    ) -> Result<RunOutput, RunError> {
        let spec = &self.manifest.signature.outputs[usize::from(index)];
        let dtype = spec.dtype;
        let (tensor, place) = match (fresh, early) {
            (None, Some((shape, place))) => return Ok(RunOutput { index, dtype, shape, place }),
            (None, None) => return Err(RunError::failed(format!("output {} was not produced", spec.name))),
            (Some(tensor), None) => (tensor, None),
            (Some(tensor), Some((_, place))) => (tensor, Some(place)),
        };
        let shape = self.shape_of(index, &tensor)?;
        let mut place = place.map_or_else(|| ask_place(ask, index, dtype, &shape), Ok)?;
        let bytes = tensor.bytes().map_err(RunError::failed)?;
        if place.len() != bytes.len() {
            return Err(RunError::failed(format!("output {spec} came out as {shape}")));
        }
        match &mut place {
            Place::Region(region) => region.write(0, bytes).map_err(RunError::failed)?,
            Place::Memory(memory) => memory.copy_from_slice(bytes),
        }
        Ok(RunOutput { index, dtype, shape, place })
    }
}

fn input_tensor<'t>(input: &Input<'t>, copy: Option<&'t Aligned>) -> Result<Tensor<'t>, EngineError> {
    match (copy, input.data) {
        (Some(copy), _) => Tensor::input(copy.as_slice(), input.dtype, input.shape),
        (None, InputData::Region(region) | InputData::Registered(region, _)) => {
            Tensor::region(region, input.dtype, input.shape)
        }
        (None, InputData::Bytes(bytes)) => Tensor::input(bytes, input.dtype, input.shape),
    }
}
