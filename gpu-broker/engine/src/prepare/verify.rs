//! Runs a prepared model once, late-bound on a host device of its own, and compares it with the original.
//!
//! What this process survives, a broker survives: the session is made while its weights are out, so a kernel that reads
//! weights when it is created dies here.

use std::{
    sync::{Arc, mpsc},
    time::Instant,
};

use faaswap_device::{
    Device, DeviceError, HostWeights,
    cuda::{self, CudaConfig, CudaDevice},
    host::{CHUNK_DEFAULT, HostConfig, HostDevice},
};
use faaswap_protocol::{Bytes, DType, Dim, Shape, Signature, TensorSpec};
use half::{bf16, f16};

use crate::{
    Bound, EngineError, Input, InputData, Manifest, Place, PlainSession, PrepareError, Prepared, RunError, RunOutput,
    Runtime, Target, limits::TRIAL_TENSOR_BYTES_MAX, raw::Aligned,
};

/// Sizes tried for open dimensions, one after the other: many models take any, some only multiples of their stride.
const OPEN_DIMS: [u64; 3] = [1, 32, 64];
/// Largest difference that counts as equal, absolute and relative: what another order of additions can make.
const TOLERANCE: f64 = 1e-3;

/// As above, for kernels that round products to 10 bits of fraction (TF32, fp16).
const TOLERANCE_ON_GPU: f64 = 1e-2;
/// Runs that are timed on a GPU, to tell layouts apart.
const TIMED_RUNS: usize = 25;
/// How often a program is run again after others have come and gone.
const CHURN: usize = 3;
/// Lanes where programs are made of others: two, for a kind is learnt from two of them.
const KIND_LANES: usize = 2;
/// Models that are bound until two of them are made of others.
const KIND_BOUND_MAX: usize = 8;

/// Made-up inputs and what the original model answers to them.
pub(super) struct Reference {
    inputs: Vec<(DType, Shape, Aligned)>,
    outputs: Vec<(Shape, Vec<u8>)>,
    /// Whether the original answers the same twice; random numbers cannot be compared.
    repeats: bool,
}

/// Why no programs are made of others of the model's kind.
#[derive(Debug)]
pub(super) enum Apart {
    /// It has no weights, or open dimensions.
    NoKind,
    Because(String),
}

impl From<String> for Apart {
    fn from(why: String) -> Self {
        Self::Because(why)
    }
}

/// What the trial run showed.
#[derive(Debug)]
pub(super) struct Trial {
    pub(super) run_us: u64,
    pub(super) max_abs_diff: Option<f64>,
    /// Outputs that came in the shape that the signature fixes.
    pub(super) shape_holds: Vec<bool>,
}

/// Asks the original model; `None` when it accepts none of the inputs that can be made up.
pub(super) fn ask_original(original: &PlainSession, signature: &Signature) -> Option<Reference> {
    let is_open = |spec: &TensorSpec| spec.dims.contains(&Dim::Any);
    let tries = if signature.inputs.iter().any(is_open) { &OPEN_DIMS[..] } else { &OPEN_DIMS[..1] };
    tries.iter().find_map(|&open| {
        let inputs = signature.inputs.iter().map(|spec| make_up(spec, open)).collect::<Option<Vec<_>>>()?;
        let ask = || original.run(&as_inputs(&inputs));
        let outputs = ask().inspect_err(|error| tracing::debug!(%error, open, "the original refuses a trial")).ok()?;
        let repeats = ask().is_ok_and(|again| again == outputs);
        Some(Reference { inputs, outputs, repeats })
    })
}

/// An input of small varied numbers; integers are zeros, which are valid positions everywhere.
fn make_up(spec: &TensorSpec, open: u64) -> Option<(DType, Shape, Aligned)> {
    let dims: Vec<u64> = spec.dims.iter().map(|dim| if let Dim::Fixed(n) = dim { *n } else { open }).collect();
    let shape = Shape::new(dims).ok()?;
    let size = shape.size(spec.dtype).ok()?;
    if size.get() > TRIAL_TENSOR_BYTES_MAX {
        return None;
    }
    let mut data = Aligned::new(size.as_len()?);
    let value = |i: usize| f32::from(u8::try_from(i * 37 % 255).expect("below 255")) / 255.0 - 0.5;
    let width = usize::try_from(spec.dtype.size()).ok()?;
    for (i, bytes) in data.as_mut_slice().chunks_exact_mut(width).enumerate() {
        match spec.dtype {
            DType::F32 => bytes.copy_from_slice(&value(i).to_le_bytes()),
            DType::F64 => bytes.copy_from_slice(&f64::from(value(i)).to_le_bytes()),
            DType::F16 => bytes.copy_from_slice(&f16::from_f32(value(i)).to_le_bytes()),
            DType::Bf16 => bytes.copy_from_slice(&bf16::from_f32(value(i)).to_le_bytes()),
            DType::Bool
            | DType::U8
            | DType::U16
            | DType::U32
            | DType::U64
            | DType::I8
            | DType::I16
            | DType::I32
            | DType::I64 => {}
        }
    }
    Some((spec.dtype, shape, data))
}

/// Binds the model while its weights are out, swaps them in, runs it while they arrive, compares.
pub(super) fn try_prepared(
    runtime: &Runtime,
    prepared: &Prepared,
    reference: Option<&Reference>,
) -> Result<Option<Trial>, PrepareError> {
    let device = device_for(prepared).map_err(EngineError::from)?;
    let bound = Bound::new(runtime, prepared, &device)
        .map_err(|e| PrepareError::rejected(format!("it cannot be bound: {e}")))?;
    let Some(reference) = reference else {
        return Ok(None);
    };
    let swapped = swap_in(&bound, prepared, &device).map_err(EngineError::from)?;
    let first = ask(&bound, reference);
    if let Some(swapped) = swapped {
        let done = swapped.recv().unwrap_or(Err(DeviceError::Lost));
        done.map_err(EngineError::from)?;
    }
    let differs =
        |why: String| PrepareError::rejected(format!("prepared, it does not run as the original does: {why}"));
    let outputs = first.map_err(|e| differs(e.to_string()))?;
    let max_abs_diff = compare(&outputs, reference, prepared).map_err(differs)?;
    let mut times = Vec::with_capacity(TIMED_RUNS);
    for _ in 0..if device.as_cuda().is_some() { TIMED_RUNS } else { 1 } {
        let start = Instant::now();
        ask(&bound, reference).map_err(|e| differs(e.to_string()))?;
        times.push(u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX));
    }
    times.sort_unstable();
    let run_us = times[times.len() / 2];
    let specs = &prepared.manifest().signature.outputs;
    let holds = |(spec, (shape, _)): (&TensorSpec, &(Shape, _))| spec.fixed_shape().as_ref() == Some(shape);
    let shape_holds = specs.iter().zip(&reference.outputs).map(holds).collect();
    swap_out(&bound, &device).map_err(EngineError::from)?;
    Ok(Some(Trial { run_us, max_abs_diff: reference.repeats.then_some(max_abs_diff), shape_holds }))
}

/// A device of its own, just large enough.
fn device_for(prepared: &Prepared) -> Result<Arc<dyn Device>, DeviceError> {
    // What is tried there are sessions.
    device_with(prepared, (1, false))
}

/// The same with so many lanes, where programs may be made of others.
fn device_with(prepared: &Prepared, (lanes, twins): (usize, bool)) -> Result<Arc<dyn Device>, DeviceError> {
    let weights = prepared.manifest().weights_bytes;
    // What a device keeps free is a smaller part.
    let spare = Bytes::new(weights.get() / 16);
    let capacity = |chunk: Bytes| {
        let all = weights.checked_add(spare).and_then(|all| all.checked_round_up(chunk)?.checked_add(chunk));
        all.unwrap_or(weights)
    };
    Ok(match prepared.manifest().target {
        Target::Cpu => {
            let capacity = capacity(CHUNK_DEFAULT);
            HostDevice::new(HostConfig { populate: false, ..HostConfig::new("prepare", capacity) })?
        }
        Target::Cuda(cuda) => {
            let ordinal = u32::try_from(cuda.ordinal).map_err(|_| DeviceError::Invalid("there is no such GPU"))?;
            let memory = Some(capacity(cuda::CHUNK_DEFAULT));
            // Programs that move with the weights are tried where each chunk lies elsewhere.
            let scattered = twins;
            CudaDevice::open(&CudaConfig { memory, lanes, twins, scattered, ..CudaConfig::new("prepare", ordinal) })?
        }
    })
}

/// Sees whether the model's program runs on when its session is gone, and others were made and have gone after it.
/// Some programs use kernels that only their session has loaded; running such a one may cost the whole context.
pub(super) fn outlives_its_session(
    runtime: &Runtime,
    prepared: &Prepared,
    reference: &Reference,
) -> Result<(), String> {
    let device = device_for(prepared).map_err(text)?;
    let alone =
        with(prepared, |manifest| (manifest.keep_session, manifest.kernels_go) = (None, false)).map_err(text)?;
    let bound = Bound::new(runtime, &alone, &device).map_err(text)?;
    if let Some(why) = bound.kept_session() {
        return Err(why.to_owned());
    }
    for _ in 0..CHURN {
        drop(Bound::new(runtime, &alone, &device).map_err(text)?);
        answers(&bound, (prepared, &device), reference)?;
    }
    Ok(())
}

/// Sees whether programs that are made of two others of the model's kind answer right, when those are gone. Tells whether their
/// kernels go with a session.
pub(super) fn binds_by_kind(runtime: &Runtime, prepared: &Prepared, reference: &Reference) -> Result<bool, Apart> {
    let device = device_with(prepared, (KIND_LANES, true)).map_err(text)?;
    let of_a_kind = with(prepared, |manifest| (manifest.keep_session, manifest.bind_apart) = (None, None));
    let of_a_kind = of_a_kind.map_err(text)?;
    let key = of_a_kind.kind_key().map_err(text)?.ok_or(Apart::NoKind)?;
    let cuda = device.as_cuda().ok_or(Apart::NoKind)?;
    // One in each lane, for each has memory of its own. Those that they are made of go once they are made.
    let (mut twins, mut others) = (Vec::new(), Vec::new());
    while twins.len() < KIND_LANES && twins.len() + others.len() < KIND_BOUND_MAX {
        let bound = Bound::new(runtime, &of_a_kind, &device).map_err(text)?;
        if bound.is_twin() { twins.push(bound) } else { others.push(bound) }
    }
    drop(others);
    if twins.len() < KIND_LANES {
        let why = cuda.apart(&key).unwrap_or_default();
        return Err(Apart::Because(format!("its programs differ in more than places: {why}")));
    }
    twins.iter().try_for_each(|twin| answers(twin, (prepared, &device), reference))?;
    Ok(cuda.kernels_go(&key).unwrap_or(true))
}

/// The same prepared model with another word about it.
fn with(prepared: &Prepared, change: impl FnOnce(&mut Manifest)) -> Result<Prepared, EngineError> {
    let mut manifest = Manifest::clone(prepared.manifest());
    change(&mut manifest);
    Prepared::untried(prepared.dir(), manifest)
}

#[expect(clippy::needless_pass_by_value, reason = "made for map_err")]
fn text(error: impl ToString) -> String {
    error.to_string()
}

/// Brings the weights, asks meanwhile, and compares.
fn answers(
    bound: &Bound,
    (prepared, device): (&Prepared, &Arc<dyn Device>),
    reference: &Reference,
) -> Result<(), String> {
    let swapped = swap_in(bound, prepared, device).map_err(text)?;
    let outputs = ask(bound, reference).map_err(text)?;
    if let Some(swapped) = swapped {
        swapped.recv().unwrap_or(Err(DeviceError::Lost)).map_err(text)?;
    }
    compare(&outputs, reference, prepared)?;
    swap_out(bound, device).map_err(text)
}

type Done = mpsc::Receiver<Result<(), DeviceError>>;

fn swap_in(bound: &Bound, prepared: &Prepared, device: &Arc<dyn Device>) -> Result<Option<Done>, DeviceError> {
    let Some(range) = bound.range() else { return Ok(None) };
    let weights = Arc::new(HostWeights::open(&prepared.weights_path())?);
    device.prepare_weights(&weights)?;
    let (tell, done) = mpsc::channel();
    let report = Box::new(move |result: Result<_, _>| drop(tell.send(result.map(drop))));
    device.swap_in(range, weights, bound.groups(), report)?;
    Ok(Some(done))
}

fn swap_out(bound: &Bound, device: &Arc<dyn Device>) -> Result<(), DeviceError> {
    let Some(range) = bound.range() else { return Ok(()) };
    let (tell, done) = mpsc::channel();
    device.swap_out(range, Box::new(move |result| drop(tell.send(result))))?;
    done.recv().unwrap_or(Err(DeviceError::Lost))
}

fn ask(bound: &Bound, reference: &Reference) -> Result<Vec<RunOutput>, RunError> {
    let memory = |_, _, _: &Shape, size: Bytes| Ok(Place::Memory(vec![0; size.as_len().unwrap_or(0)]));
    bound.run(&as_inputs(&reference.inputs), &[], &mut { memory })
}

fn as_inputs(inputs: &[(DType, Shape, Aligned)]) -> Vec<Input<'_>> {
    let inputs = inputs.iter();
    inputs.map(|(dtype, shape, data)| Input { dtype: *dtype, shape, data: InputData::Bytes(data.as_slice()) }).collect()
}

/// The largest difference; an error where an output is another one.
fn compare(outputs: &[RunOutput], reference: &Reference, prepared: &Prepared) -> Result<f64, String> {
    let mut worst = 0.0_f64;
    for (output, (shape, wanted)) in outputs.iter().zip(&reference.outputs) {
        let name = &prepared.manifest().signature.outputs[usize::from(output.index)].name;
        let Place::Memory(bytes) = &output.place else {
            return Err(format!("output {name} is not where it was asked to be"));
        };
        if &output.shape != shape || bytes.len() != wanted.len() {
            return Err(format!("output {name} is {} and not {shape}", output.shape));
        }
        if !reference.repeats || bytes == wanted {
            continue;
        }
        let diff = max_abs_diff(output.dtype, bytes, wanted);
        let tolerance = if prepared.manifest().target == Target::Cpu { TOLERANCE } else { TOLERANCE_ON_GPU };
        if diff.is_none_or(|(diff, largest)| diff > tolerance * largest.max(1.0)) {
            return Err(format!("output {name} differs by {:?}", diff.map(|d| d.0)));
        }
        worst = worst.max(diff.map_or(0.0, |d| d.0));
    }
    Ok(worst)
}

/// Whether two outputs are the same but for what another order of additions makes, on that kind of device.
pub fn is_close(target: Target, dtype: DType, ours: &[u8], theirs: &[u8]) -> bool {
    let tolerance = if target == Target::Cpu { TOLERANCE } else { TOLERANCE_ON_GPU };
    let within = |(diff, largest): (f64, f64)| diff <= tolerance * largest.max(1.0);
    ours == theirs || (ours.len() == theirs.len() && max_abs_diff(dtype, ours, theirs).is_some_and(within))
}

/// Largest difference and largest value; `None` where a value is a number here and none there, or for integers.
fn max_abs_diff(dtype: DType, ours: &[u8], theirs: &[u8]) -> Option<(f64, f64)> {
    let (ours, theirs) = (floats(dtype, ours)?, floats(dtype, theirs)?);
    let mut worst = (0.0_f64, 0.0_f64);
    for (a, b) in ours.into_iter().zip(theirs) {
        if a == b || (a.is_nan() && b.is_nan()) {
            continue;
        }
        let diff = (a - b).abs();
        if !diff.is_finite() {
            return None;
        }
        worst = (worst.0.max(diff), worst.1.max(b.abs()));
    }
    Some(worst)
}

/// A tensor's numbers; `None` where they are integers.
pub(super) fn floats(dtype: DType, bytes: &[u8]) -> Option<Vec<f64>> {
    fn each<const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> f64) -> Vec<f64> {
        bytes.as_chunks::<N>().0.iter().map(|&chunk| read(chunk)).collect()
    }
    match dtype {
        DType::F32 => Some(each(bytes, |b| f64::from(f32::from_le_bytes(b)))),
        DType::F64 => Some(each(bytes, f64::from_le_bytes)),
        DType::F16 => Some(each(bytes, |b| f16::from_le_bytes(b).to_f64())),
        DType::Bf16 => Some(each(bytes, |b| bf16::from_le_bytes(b).to_f64())),
        DType::Bool
        | DType::U8
        | DType::U16
        | DType::U32
        | DType::U64
        | DType::I8
        | DType::I16
        | DType::I32
        | DType::I64 => None,
    }
}
