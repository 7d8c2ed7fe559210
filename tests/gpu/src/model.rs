//! Models: prepared in processes of their own, as the broker does it, and asked with made-up inputs.

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use faaswap_device::{Device, DeviceError, HostWeights, OnDone, SwapReport, cuda::CudaConfig};
use faaswap_engine::{
    Bound, CudaTarget, Input, InputData, Place, Prepared, Runtime, RuntimeOptions, Target,
    prepare::{self, PrepareJob},
};
use faaswap_protocol::{Bytes, DType, Shape, Signature};

use half::f16;

use crate::Result;

/// Later groups' size.
const GROUP_BYTES: Bytes = Bytes::mib(8);
/// Longest time to prepare one model in one layout: a hang shall not cost the rest of a run.
const PREPARES_WITHIN: Duration = Duration::from_secs(150);

pub(crate) fn runtime() -> Result<Runtime> {
    let library = std::env::var_os("ORT_DYLIB_PATH").ok_or("ORT_DYLIB_PATH names no ONNX Runtime")?;
    Ok(Runtime::load(Path::new(&library), RuntimeOptions::default())?)
}

/// What PyTorch was measured to do on this machine (`export.py`); null where it was not.
pub(crate) fn torch(models: &Path) -> Result<serde_json::Value> {
    match fs::read_to_string(models.join("torch.json")) {
        Ok(text) => Ok(serde_json::from_str(&text)?),
        Err(_) => Ok(serde_json::Value::Null),
    }
}

/// Prepares one model; the job comes as JSON.
pub(crate) fn prepare_from_stdin() -> Result<()> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    let job: PrepareJob = serde_json::from_str(&text)?;
    prepare::run(&runtime()?, &job)?;
    Ok(())
}

/// Prepares a model in a process of its own. What ends that process does not end this one; what it had written by then
/// counts.
pub(crate) fn prepare(model: &Path, out: &Path, channels_last: bool) -> Result<Prepared> {
    prepare_for(model, out, Target::Cuda(CudaTarget { channels_last, ..CudaTarget::new(0) }))
}

/// The same for any target.
pub(crate) fn prepare_for(model: &Path, out: &Path, target: Target) -> Result<Prepared> {
    let job = PrepareJob {
        model_dir: model.to_owned(),
        graph_file: "model.onnx".to_owned(),
        out_dir: out.to_owned(),
        group_bytes: GROUP_BYTES,
        target,
    };
    fs::create_dir_all(out)?;
    let log = fs::File::create(out.join("prepare.log"))?;
    let mut child =
        Command::new(std::env::current_exe()?).arg("prepare-model").stdin(Stdio::piped()).stderr(log).spawn()?;
    serde_json::to_writer(child.stdin.take().ok_or("no pipe")?, &job)?;
    let status = wait(&mut child, out)?;
    let log = fs::read_to_string(out.join("prepare.log")).unwrap_or_default();
    match Prepared::open(out) {
        Ok(prepared) => {
            if !status.success() {
                let last = log.lines().last().unwrap_or_default();
                println!("    {}: trying its program ended with {status}: {last}", out.display());
            }
            Ok(prepared)
        }
        Err(error) => Err(format!("{error}; {status}; {}", log.trim_end()).into()),
    }
}

/// Waits for a child that prepares, and ends one that takes too long.
fn wait(child: &mut Child, out: &Path) -> Result<ExitStatus> {
    let until = Instant::now() + PREPARES_WITHIN;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() >= until {
            println!("    {}: still preparing after {PREPARES_WITHIN:?}; ending it", out.display());
            child.kill()?;
            return Ok(child.wait()?);
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Inputs of small varied numbers; integers are positions below a thousand, or ones for masks.
pub(crate) fn inputs(signature: &Signature) -> Result<Vec<(DType, Shape, Vec<u8>)>> {
    let one = |spec: &faaswap_protocol::TensorSpec| {
        let shape = spec.fixed_shape().ok_or_else(|| format!("{spec} has no fixed shape"))?;
        let count = usize::try_from(shape.elements()?)?;
        let value = |i: usize| (i * 37 % 255) as f32 / 255.0 - 0.5;
        let bytes = match spec.dtype {
            DType::F32 => (0..count).flat_map(|i| value(i).to_le_bytes()).collect(),
            DType::F16 => (0..count).flat_map(|i| f16::from_f32(value(i)).to_le_bytes()).collect(),
            DType::I64 if spec.name == "mask" => (0..count).flat_map(|_| 1_i64.to_le_bytes()).collect(),
            DType::I64 => (0..i64::try_from(count)?).flat_map(|i| (i * 13 % 1000).to_le_bytes()).collect(),
            other @ (DType::Bool
            | DType::U8
            | DType::U16
            | DType::U32
            | DType::U64
            | DType::I8
            | DType::I16
            | DType::I32
            | DType::Bf16
            | DType::F64) => return Err(format!("no inputs of type {other} can be made up").into()),
        };
        Ok((spec.dtype, shape, bytes))
    };
    signature.inputs.iter().map(one).collect()
}

/// The largest difference of two tensors beside the largest value.
pub(crate) fn difference(dtype: DType, ours: &[u8], theirs: &[u8]) -> f64 {
    let floats = |bytes: &[u8]| -> Vec<f64> {
        if dtype == DType::F32 {
            return bytes.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect();
        }
        bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f64()).collect()
    };
    let (ours, theirs) = (floats(ours), floats(theirs));
    if ours.len() != theirs.len() {
        return f64::INFINITY;
    }
    let largest = theirs.iter().fold(f64::MIN_POSITIVE, |most, x| most.max(x.abs()));
    let worst = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs());
    worst.fold(0.0, |most, x| if x.is_nan() { f64::INFINITY } else { most.max(x) }) / largest
}

/// What a device calls when something is done, and where that is heard.
pub(crate) fn reporter<T: Send + 'static>() -> (OnDone<T>, mpsc::Receiver<std::result::Result<T, DeviceError>>) {
    let (tell, done) = mpsc::channel();
    (Box::new(move |result| drop(tell.send(result))), done)
}

/// A bound model with its weights and the inputs that it is asked with.
pub(crate) struct Asked {
    pub(crate) bound: Bound,
    pub(crate) weights: Arc<HostWeights>,
    pub(crate) device: Arc<dyn Device>,
    pub(crate) inputs: Arc<Vec<(DType, Shape, Vec<u8>)>>,
}

impl Asked {
    pub(crate) fn new(runtime: &Runtime, prepared: &Prepared, device: &Arc<dyn Device>) -> Result<Self> {
        Self::with_inputs(runtime, prepared, device, inputs(&prepared.manifest().signature)?)
    }

    /// With inputs of the caller's.
    pub(crate) fn with_inputs(
        runtime: &Runtime,
        prepared: &Prepared,
        device: &Arc<dyn Device>,
        inputs: Vec<(DType, Shape, Vec<u8>)>,
    ) -> Result<Self> {
        let weights = Arc::new(HostWeights::open(&prepared.weights_path())?);
        device.prepare_weights(&weights)?;
        Self::with(runtime, prepared, device, weights, Arc::new(inputs))
    }

    pub(crate) fn with(
        runtime: &Runtime,
        prepared: &Prepared,
        device: &Arc<dyn Device>,
        weights: Arc<HostWeights>,
        inputs: Arc<Vec<(DType, Shape, Vec<u8>)>>,
    ) -> Result<Self> {
        let bound = Bound::new(runtime, prepared, device)?;
        Ok(Self { bound, weights, device: Arc::clone(device), inputs })
    }

    /// Begins a swap-in; the receiver hears of its end.
    pub(crate) fn begin_swap_in(&self) -> Result<mpsc::Receiver<std::result::Result<SwapReport, DeviceError>>> {
        let (report, done) = reporter();
        let range = self.bound.range().ok_or("no weights")?;
        self.device.swap_in(range, Arc::clone(&self.weights), self.bound.groups(), report)?;
        Ok(done)
    }

    pub(crate) fn swap_in(&self) -> Result<SwapReport> {
        Ok(self.begin_swap_in()?.recv()??)
    }

    pub(crate) fn swap_out(&self) -> Result<()> {
        let (report, done) = reporter();
        let range = self.bound.range().ok_or("no weights")?;
        self.device.swap_out(range, report)?;
        Ok(done.recv()??)
    }

    /// One request: all outputs' bytes, one after the other.
    pub(crate) fn ask(&self) -> Result<Vec<u8>> {
        let inputs = self.inputs.iter();
        let inputs: Vec<_> =
            inputs.map(|(dtype, shape, data)| Input { dtype: *dtype, shape, data: InputData::Bytes(data) }).collect();
        self.ask_with(&inputs)
    }

    /// One request with inputs of the caller's.
    pub(crate) fn ask_with(&self, inputs: &[Input<'_>]) -> Result<Vec<u8>> {
        let memory = |_, _, _: &Shape, size: Bytes| Ok(Place::Memory(vec![0; size.as_len().unwrap_or(0)]));
        let outputs = self.bound.run(inputs, &[], &mut { memory })?;
        let bytes = outputs.into_iter().flat_map(|output| match output.place {
            Place::Memory(bytes) => bytes,
            Place::Region(_) => Vec::new(),
        });
        Ok(bytes.collect())
    }
}

/// The folders of models, by name.
pub(crate) fn found(models: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(models)? {
        let path = entry?.path();
        if path.join("model.onnx").exists() {
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
            found.push((name.unwrap_or_default(), path));
        }
    }
    found.sort();
    Ok(found)
}

/// The usual device, with a chunk size of `FAASWAP_GPU_CHUNK_MIB`, and so many models bound at once as
/// `FAASWAP_GPU_BINDING` says, where these are set.
pub(crate) fn config(ordinal: u32) -> Result<CudaConfig> {
    let mut config = CudaConfig::new(format!("cuda{ordinal}"), ordinal);
    if let Ok(mib) = std::env::var("FAASWAP_GPU_CHUNK_MIB") {
        config.chunk = Bytes::mib(mib.parse()?);
    }
    if let Ok(binding) = std::env::var("FAASWAP_GPU_BINDING") {
        config.binding = binding.parse()?;
    }
    Ok(config)
}
