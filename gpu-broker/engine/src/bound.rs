//! A prepared model on one device: reserved addresses, a session whose initializers lie there, and its runs.
//!
//! Whether the weights are there is the device's and the scheduler's business: Await nodes wait for them, and a run
//! whose swap-in failed fails. Sizes and places of tensors are checked here, before ONNX Runtime sees them.

use std::{
    ffi::{CStr, CString},
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use faaswap_device::{Device, Group, RangeId};
use faaswap_protocol::{Bytes, DType, Detail, Refusal, Shape};
use faaswap_slab::Region;
use ort::session::{Session, builder::GraphOptimizationLevel};

use crate::{
    EngineError, Manifest, Prepared, RunError, Runtime,
    await_op::{self, Waiter},
    raw::{self, Aligned, Tensor, Weights},
};

/// Where an input's bytes are.
#[derive(Clone, Copy, Debug)]
pub enum InputData<'a> {
    /// In memory that the peer can still write.
    Region(&'a Region),
    /// In memory of ours.
    Bytes(&'a [u8]),
}

impl InputData<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Region(region) => region.len(),
            Self::Bytes(bytes) => bytes.len(),
        }
    }
}

/// One input of a run.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// Its element type.
    pub dtype: DType,
    /// Its dimensions.
    pub shape: &'a Shape,
    /// Its bytes.
    pub data: InputData<'a>,
}

/// Where an output shall go.
#[derive(Debug)]
pub enum Place {
    /// Into shared memory.
    Region(Region),
    /// Into memory of ours, as long as the output.
    Memory(Vec<u8>),
}

impl Place {
    fn len(&self) -> usize {
        match self {
            Self::Region(region) => region.len(),
            Self::Memory(bytes) => bytes.len(),
        }
    }
}

/// One output of a run, in its place.
#[derive(Debug)]
pub struct RunOutput {
    /// Its position in the signature.
    pub index: u16,
    /// Its element type.
    pub dtype: DType,
    /// Its dimensions.
    pub shape: Shape,
    /// Where it is.
    pub place: Place,
}

/// Asks where an output of this position, type, shape and size shall go.
type AskPlace<'f> = dyn FnMut(u16, DType, &Shape, Bytes) -> Result<Place, Refusal> + 'f;

/// ONNX Runtime enters the domains of custom operators in a table of the process, and two sessions made at once stumble
/// over each other there.
static MAKING: Mutex<()> = Mutex::new(());

/// A prepared model on one device.
pub struct Bound {
    // The order matters: the session goes first, then the tensors that it uses, then the addresses under them.
    session: Session,
    weights: Option<Weights>,
    range: Option<Reserved>,
    manifest: Arc<Manifest>,
    groups: Arc<[Group]>,
    input_names: Vec<CString>,
    output_names: Vec<CString>,
}

/// A range of addresses that is given back when it is dropped.
struct Reserved {
    waiter: Waiter,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if let Err(error) = self.waiter.device.release(self.waiter.range) {
            tracing::error!(%error, range = ?self.waiter.range, "a range of a model that is gone cannot be released");
        }
    }
}

impl Bound {
    /// Reserves addresses on the device and makes a session whose initializers lie there. Takes no device memory.
    pub fn new(runtime: &Runtime, prepared: &Prepared, device: Arc<dyn Device>) -> Result<Self, EngineError> {
        let manifest = Arc::clone(prepared.manifest());
        let mut builder = runtime
            .session_builder()?
            .with_optimization_level(GraphOptimizationLevel::Disable)?
            .with_prepacking(false)?
            .with_env_allocators()?
            // Patterns are kept per shape for ever, and the shared arena makes them pointless.
            .with_memory_pattern(false)?;
        let mut range = None;
        let mut weights = None;
        if manifest.weights_bytes != Bytes::ZERO {
            let id = device.reserve(manifest.weights_bytes)?;
            let reserved = range.insert(Reserved { waiter: Waiter { device, range: id } });
            if !manifest.await_types.is_empty() {
                builder = builder.with_operators(await_op::domain(&manifest.await_types, &reserved.waiter)?)?;
            }
            let base = reserved.waiter.device.address(id)?;
            weights = Some(Weights::supply(&mut builder, base, manifest.weights_bytes, &manifest.initializers)?);
        }
        let session = {
            let _alone = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
            builder.commit_from_file(prepared.graph_path())?
        };
        let names = |specs: &[faaswap_protocol::TensorSpec]| specs.iter().map(|s| raw::c_name(&s.name)).collect();
        let input_names: Result<_, EngineError> = names(&manifest.signature.inputs);
        let output_names: Result<_, EngineError> = names(&manifest.signature.outputs);
        let groups = prepared.groups();
        Ok(Self { session, weights, range, groups, input_names: input_names?, output_names: output_names?, manifest })
    }

    /// The range to swap in and out; `None` when the model has no weights to swap.
    pub fn range(&self) -> Option<RangeId> {
        self.range.as_ref().map(|reserved| reserved.waiter.range)
    }

    /// The groups to swap in.
    pub fn groups(&self) -> Arc<[Group]> {
        Arc::clone(&self.groups)
    }

    /// What is known of the model.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Runs the model once: `inputs` in the signature's order, the outputs at the positions in `wanted` (none: all).
    ///
    /// Asks `place` where each output shall go, once per output: before the run where its shape is fixed, after it
    /// where the run decides. May be called from several threads at once. The weights must be there or on their way,
    /// and must not be swapped out before this returns.
    pub fn run(
        &self,
        inputs: &[Input<'_>],
        wanted: &[u16],
        place: &mut AskPlace<'_>,
    ) -> Result<Vec<RunOutput>, RunError> {
        self.check_inputs(inputs)?;
        let all: Vec<u16>;
        let wanted = if wanted.is_empty() {
            all = (0..u16::try_from(self.output_names.len()).unwrap_or(u16::MAX)).collect();
            &all
        } else {
            wanted
        };
        self.check_wanted(wanted)?;
        let copies = inputs.iter().enumerate().map(|(i, input)| self.private_copy(i, input));
        let copies = copies.collect::<Result<Vec<_>, _>>()?;
        let tensors = inputs.iter().zip(&copies).map(|(input, copy)| input_tensor(input, copy.as_ref()));
        let tensors = tensors.collect::<Result<Vec<_>, _>>().map_err(RunError::failed)?;
        let mut early = self.places_before(wanted, place)?;
        self.wait_before_run()?;
        let names: Vec<&CStr> = wanted.iter().map(|&i| self.output_names[usize::from(i)].as_c_str()).collect();
        let outputs = wanted.iter().zip(&mut early).map(|(&i, early)| self.bind_place(i, early));
        let outputs = outputs.collect::<Result<Vec<_>, _>>().map_err(RunError::failed)?;
        let fresh = raw::run(&self.session, &self.input_names, &tensors, &names, &outputs).map_err(RunError::failed)?;
        // The tensors over places end here, so that the places can be handed out again.
        drop(outputs);
        let done = wanted.iter().zip(fresh).zip(early);
        done.map(|((&index, fresh), early)| self.hand_over(index, fresh, early, place)).collect()
    }

    fn check_inputs(&self, inputs: &[Input<'_>]) -> Result<(), Refusal> {
        let specs = &self.manifest.signature.inputs;
        if inputs.len() != specs.len() {
            return Err(invalid(format!("the model takes {} inputs, {} came", specs.len(), inputs.len())));
        }
        for (input, spec) in inputs.iter().zip(specs) {
            if input.dtype != spec.dtype || !spec.accepts(input.shape) {
                return Err(invalid(format!("{spec} is expected, {} {} came", input.dtype, input.shape)));
            }
            let size = input.shape.size(input.dtype).map_err(|e| invalid(format!("{}: {e}", spec.name)))?;
            if size.as_len() != Some(input.data.len()) {
                let (len, shape) = (input.data.len(), input.shape);
                return Err(invalid(format!("{} of shape {shape} has {} bytes, {len} came", spec.name, size.get())));
            }
        }
        Ok(())
    }

    fn check_wanted(&self, wanted: &[u16]) -> Result<(), Refusal> {
        let mut seen = vec![false; self.output_names.len()];
        for &index in wanted {
            match seen.get_mut(usize::from(index)) {
                None => return Err(invalid(format!("the model has {} outputs, not one at {index}", seen.len()))),
                Some(true) => return Err(invalid(format!("output {index} is asked for twice"))),
                Some(new) => *new = true,
            }
        }
        Ok(())
    }

    /// A copy of an input that kernels must not read where it is: shared memory under values that choose addresses, or
    /// memory that is not aligned.
    fn private_copy(&self, index: usize, input: &Input<'_>) -> Result<Option<Aligned>, RunError> {
        match input.data {
            InputData::Region(region) => {
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
        (None, InputData::Region(region)) => Tensor::region(region, input.dtype, input.shape),
        (None, InputData::Bytes(bytes)) => Tensor::input(bytes, input.dtype, input.shape),
    }
}

fn ask_place(place: &mut AskPlace<'_>, index: u16, dtype: DType, shape: &Shape) -> Result<Place, RunError> {
    let size = shape.size(dtype).map_err(RunError::failed)?;
    let given = place(index, dtype, shape, size)?;
    if size.as_len() == Some(given.len()) {
        return Ok(given);
    }
    Err(RunError::failed(format!("output {index} needs {} bytes, its place has {}", size.get(), given.len())))
}

fn invalid(reason: String) -> Refusal {
    Refusal::InputInvalid { reason: Detail::from(reason) }
}

impl fmt::Debug for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bound")
            .field("range", &self.range())
            .field("initializers", &self.weights.as_ref().map_or(0, Weights::len))
            .field("groups", &self.groups.len())
            .finish_non_exhaustive()
    }
}
