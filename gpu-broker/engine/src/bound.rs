//! A prepared model on one device: reserved addresses, a session whose initializers lie there, and its runs.
//!
//! Whether the weights are there is the device's and the scheduler's business: Await nodes wait for them, and a run
//! whose swap-in failed fails. Sizes and places of tensors are checked here, before ONNX Runtime sees them.

mod home;
mod io;
mod on_gpu;
mod programmed;
mod session;
mod shapes;

use std::{
    ffi::CString,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use faaswap_device::{
    Device, DeviceError, Group, RangeId, Stream,
    cuda::{Constants, Origin, RunTimes},
};
use faaswap_protocol::{Bytes, Detail, Refusal};
use ort::session::{Session, builder::GraphOptimizationLevel};

pub use self::io::{AskPlace, Input, InputData, Place, RunOutput};
use self::{home::Home, shapes::Shapes};
use crate::{
    CudaTarget, EngineError, Manifest, Prepared, RunError, Runtime, Target,
    await_op::{self, Waiter},
    kind::Kind,
    program::Programs,
    raw::{self, Weights},
};

/// ONNX Runtime enters the domains of custom operators in a table of the process, and two sessions made at once stumble
/// over each other there (microsoft/onnxruntime#22663). That is so for the first ones only; but where later ones were made at once,
/// on four H100s, all models were bound later, not sooner. Seen once, on a machine of its own.
static MAKING: Mutex<()> = Mutex::new(());

/// A prepared model on one device.
pub struct Bound {
    // The order matters: the program goes first, then the session, then the tensors that it uses, then the addresses
    // under them.
    programs: Option<Programs>,
    /// Programs for shapes that requests tell, where the model has open dimensions and is on a GPU.
    shapes: Option<Shapes>,
    session: Option<Session>,
    /// What the program was captured of, where its kernels go with that.
    origin: Option<Origin>,
    /// Where a program was captured whose session stays.
    home: Option<Arc<Home>>,
    /// The lane of a GPU in which the session runs where there is no program.
    lane: Option<usize>,
    /// Why a session is kept on a GPU.
    kept: Option<String>,
    /// Whether the program is made of another model's of its kind.
    is_twin: bool,
    /// Device memory of a session that has no program.
    constants: Option<Constants>,
    /// What the session's initializers are: the weights, and constants of the model's own.
    supplied: Vec<Weights>,
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
        let range = self.waiter.range;
        match self.waiter.device.release(range) {
            Ok(()) => {}
            // Of a broker that ends: its models are not swapped out one by one.
            Err(error @ (DeviceError::State { .. } | DeviceError::Lost)) => {
                tracing::debug!(%error, ?range, "a range goes with its device");
            }
            Err(error) => tracing::error!(%error, ?range, "a range of a model that is gone cannot be released"),
        }
    }
}

impl Bound {
    /// Reserves addresses on the device and makes a session whose initializers lie there; on a GPU a program of that
    /// session, which may then go. Takes no device memory for weights.
    pub fn new(runtime: &Runtime, prepared: &Prepared, device: &Arc<dyn Device>) -> Result<Self, EngineError> {
        Self::bind(runtime, prepared, device, true)
    }

    /// The same; `learns` says whether the model's kind shall be learnt, if need be.
    fn bind(
        runtime: &Runtime,
        prepared: &Prepared,
        device: &Arc<dyn Device>,
        learns: bool,
    ) -> Result<Self, EngineError> {
        let target = target_on(device, prepared)?;
        let mut bound = Self::reserve(prepared, device)?;
        let Some(cuda) = device.as_cuda() else {
            bound.make_session(runtime, prepared, (target, None), None)?;
            return Ok(bound);
        };
        runtime.share_device_memory(device)?;
        let lane = cuda.next_lane(prepared.kind()?.map(|kind| &kind.key));
        if bound.bind_by_kind(prepared, device, lane)? {
            return Ok(bound);
        }
        let (runtime, prepared, there) = (runtime.clone(), prepared.clone(), Arc::clone(device));
        Home::run(device, move |home| {
            bound.bind_by_session((&runtime, &prepared), target, (&there, home), (lane, learns))?;
            Ok(bound)
        })?
    }

    /// Reserves addresses; nothing runs yet.
    fn reserve(prepared: &Prepared, device: &Arc<dyn Device>) -> Result<Self, EngineError> {
        let manifest = Arc::clone(prepared.manifest());
        let range = match manifest.weights_bytes {
            Bytes::ZERO => None,
            weights => {
                let id = device.reserve(weights)?;
                Some(Reserved { waiter: Waiter { device: Arc::clone(device), range: id } })
            }
        };
        let names = |specs: &[faaswap_protocol::TensorSpec]| specs.iter().map(|s| raw::c_name(&s.name)).collect();
        let input_names: Result<_, EngineError> = names(&manifest.signature.inputs);
        let output_names: Result<_, EngineError> = names(&manifest.signature.outputs);
        Ok(Self {
            programs: None,
            shapes: None,
            session: None,
            origin: None,
            home: None,
            lane: None,
            kept: None,
            constants: None,
            supplied: Vec::new(),
            is_twin: false,
            range,
            groups: prepared.groups(),
            input_names: input_names?,
            output_names: output_names?,
            manifest,
        })
    }

    /// Makes the session, on a GPU with its kernels on `stream`, and its own constants at the address that is told.
    fn make_session(
        &mut self,
        runtime: &Runtime,
        prepared: &Prepared,
        (target, stream): (Target, Option<Stream>),
        own: Option<(&Kind, usize)>,
    ) -> Result<(), EngineError> {
        let mut builder = runtime
            .builder_for(target, stream)?
            .with_optimization_level(GraphOptimizationLevel::Disable)?
            .with_prepacking(false)?
            .with_env_allocators()?
            // Patterns are kept per shape for ever, and the shared arena makes them pointless.
            .with_memory_pattern(false)?;
        let mut supplied = Vec::new();
        if let Some(reserved) = &self.range {
            let Waiter { device, range } = &reserved.waiter;
            if !self.manifest.await_types.is_empty() {
                builder = builder.with_operators(await_op::domain(&self.manifest.await_types, &reserved.waiter)?)?;
            }
            let place = device.as_cuda().map_or(raw::Place::Host, |cuda| raw::Place::Cuda(cuda.ordinal()));
            let base = device.address(*range)?;
            let (size, table) = (self.manifest.weights_bytes, &self.manifest.initializers);
            supplied.push(Weights::supply(&mut builder, place, base, size, table)?);
            if let Some((kind, base)) = own {
                let size = Bytes::of_len(kind.bytes.len());
                supplied.push(Weights::supply(&mut builder, place, base, size, &kind.table)?);
            }
        }
        let session = {
            let _alone = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
            builder.commit_from_file(prepared.graph_path())?
        };
        // The session before this one, if there was one, goes before its tensors.
        self.session = Some(session);
        self.supplied = supplied;
        Ok(())
    }

    /// Whether its program is made of another model's of its kind, without a session.
    pub fn is_twin(&self) -> bool {
        self.is_twin
    }

    /// On a GPU: in which lane its program runs; `None` where there is no program.
    pub fn program_lane(&self) -> Option<usize> {
        self.programs.as_ref().map(Programs::lane)
    }

    /// On a GPU: how many copies and fills of the program are kernels of ours, and how many are not.
    pub fn program_copies(&self) -> Option<(usize, usize)> {
        self.programs.as_ref().map(Programs::replaced)
    }

    /// On a GPU: how long the program takes by itself, without inputs and outputs; the weights must be there. For
    /// measurements.
    pub fn time_program(&self) -> Result<Option<std::time::Duration>, EngineError> {
        let Some(programs) = &self.programs else { return Ok(None) };
        Ok(Some(programs.begin()?.time_alone()?))
    }

    /// On a GPU: where the time of the program's last run went.
    pub fn last_run(&self) -> Option<RunTimes> {
        self.programs.as_ref().map(Programs::last_run)
    }

    /// On a GPU: why the model keeps a session, which costs it device memory; `None` where its program stands alone.
    pub fn kept_session(&self) -> Option<&str> {
        self.kept.as_deref()
    }

    /// On a GPU: how many kernels, copies and waits the program is made of; `None` where there is no program.
    pub fn program_nodes(&self) -> Option<usize> {
        self.programs.as_ref().map(Programs::nodes)
    }

    /// On a GPU: of how many kernels, copies and waits each part of the program is made, behind the number of groups that it waits
    /// for.
    pub fn program_parts(&self) -> Vec<(u32, usize)> {
        self.programs.as_ref().map(Programs::parts_nodes).unwrap_or_default()
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
        if let Some(programs) = &self.programs {
            return self.run_program(programs, inputs, wanted, place);
        }
        let known = self.shapes.as_ref().and_then(|shapes| shapes.program(inputs));
        if let Some(programs) = known {
            return self.run_program(&programs, inputs, wanted, place);
        }
        let cuda = self.range.as_ref().and_then(|reserved| reserved.waiter.device.as_cuda());
        let (Some(cuda), Some(lane)) = (cuda, self.lane) else { return self.run_session(inputs, wanted, place) };
        let run = || self.run_session(inputs, wanted, place);
        let outputs = cuda.in_lane(lane, run).map_err(RunError::failed)??;
        let all = outputs.iter().map(|output| usize::from(output.index)).eq(0..self.output_names.len());
        if let Some(shapes) = self.shapes.as_ref().filter(|_| all) {
            shapes.ran(inputs, &outputs);
        }
        Ok(outputs)
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
}

impl Drop for Bound {
    fn drop(&mut self) {
        let Some(device) = self.range.as_ref().map(|reserved| Arc::clone(&reserved.waiter.device)) else { return };
        if let Some(cuda) = device.as_cuda() {
            (self.programs, self.shapes) = (None, None);
            cuda.beside_captures(|| self.session = None);
        }
    }
}

/// What the model runs on there.
fn target_on(device: &Arc<dyn Device>, prepared: &Prepared) -> Result<Target, EngineError> {
    match (prepared.manifest().target, device.as_cuda()) {
        (Target::Cpu, None) => Ok(Target::Cpu),
        (Target::Cuda(wanted), Some(cuda)) => Ok(Target::Cuda(CudaTarget { ordinal: cuda.ordinal(), ..wanted })),
        (Target::Cpu, Some(_)) | (Target::Cuda(_), None) => {
            let reason = "it was prepared for another kind of device".to_owned();
            Err(EngineError::NotPrepared { path: prepared.graph_path(), reason })
        }
    }
}

fn invalid(reason: String) -> Refusal {
    Refusal::InputInvalid { reason: Detail::from(reason) }
}

impl fmt::Debug for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bound")
            .field("range", &self.range())
            .field("initializers", &self.supplied.iter().map(Weights::len).sum::<usize>())
            .field("groups", &self.groups.len())
            .finish_non_exhaustive()
    }
}
