//! What the engine's tests share: the runtime, the real models, a device, and runs whose inputs are made up.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "each test file uses a part of it"
)]

pub mod build;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
};

use faaswap_device::{
    Device, HostWeights,
    host::{HostConfig, HostDevice},
};
use faaswap_engine::{
    Bound, Input, InputData, Manifest, Place, PlainSession, PrepareError, Prepared, RunError, Runtime, RuntimeOptions,
    Target,
    prepare::{self, PrepareJob},
};
use faaswap_protocol::{Bytes, DType, Shape};

/// A path under the workspace's cache, or where the variable says.
pub fn cached(variable: &str, path: &str) -> PathBuf {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.cache").join(path);
    let path = std::env::var_os(variable).map_or(default, PathBuf::from);
    assert!(path.exists(), "{} is missing: run `make fetch` first", path.display());
    path
}

pub fn runtime() -> Runtime {
    let library = cached("ORT_DYLIB_PATH", "ort/libonnxruntime.so.1.31.1");
    Runtime::load(&library, RuntimeOptions::default()).unwrap()
}

pub fn real_model(name: &str) -> PathBuf {
    let path = cached("FAASWAP_MODELS_DIR", "models").join(name);
    assert!(path.exists(), "{} is missing: run `make fetch` first", path.display());
    path
}

pub fn job(graph: &Path, out: &Path) -> PrepareJob {
    PrepareJob {
        model_dir: graph.parent().unwrap().to_owned(),
        graph_file: graph.file_name().unwrap().to_str().unwrap().to_owned(),
        out_dir: out.to_owned(),
        group_bytes: Bytes::mib(1),
        target: Target::Cpu,
    }
}

pub fn prepare(graph: &Path, out: &Path) -> Result<Manifest, PrepareError> {
    prepare::run(&runtime(), &job(graph, out))
}

/// A tensor made up from a seed: floats between -0.5 and 0.5, integers from 0 to 1.
#[derive(Clone, Debug)]
pub struct Made {
    pub dtype: DType,
    pub shape: Shape,
    words: Vec<u64>,
    len: usize,
}

impl Made {
    pub fn new(dtype: DType, dims: &[u64], seed: usize) -> Self {
        let shape = Shape::new(dims).unwrap();
        let len = shape.size(dtype).unwrap().as_len().unwrap();
        let width = usize::try_from(dtype.size()).unwrap();
        let mut bytes = Vec::with_capacity(len + 8);
        for i in 0..len / width {
            let hash = i.wrapping_add(seed * 7919).wrapping_mul(2_654_435_761) >> 7 & 0xff;
            let float = f32::from(u8::try_from(hash).unwrap()) / 255.0 - 0.5;
            match dtype {
                DType::F32 => bytes.extend(float.to_le_bytes()),
                DType::F64 => bytes.extend(f64::from(float).to_le_bytes()),
                DType::F16 => bytes.extend(half::f16::from_f32(float).to_le_bytes()),
                DType::Bf16 => bytes.extend(half::bf16::from_f32(float).to_le_bytes()),
                DType::Bool
                | DType::U8
                | DType::U16
                | DType::U32
                | DType::U64
                | DType::I8
                | DType::I16
                | DType::I32
                | DType::I64 => bytes.extend(&((hash % 2) as u64).to_le_bytes()[..width]),
            }
        }
        Self::from_bytes(dtype, dims, &bytes)
    }

    pub fn from_bytes(dtype: DType, dims: &[u64], bytes: &[u8]) -> Self {
        let len = bytes.len();
        let mut padded = bytes.to_vec();
        padded.resize(len.next_multiple_of(8), 0);
        let words = padded.as_chunks::<8>().0.iter().map(|&word| u64::from_le_bytes(word)).collect();
        Self { dtype, shape: Shape::new(dims).unwrap(), words, len }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.truncate(self.len);
        bytes
    }
}

/// Runs `f` with the tensors as inputs.
pub fn with_inputs<T>(tensors: &[Made], f: impl FnOnce(&[Input<'_>]) -> T) -> T {
    let bytes: Vec<Vec<u8>> = tensors.iter().map(Made::bytes).collect();
    let inputs = tensors.iter().zip(&bytes);
    let inputs = inputs.map(|(t, bytes)| Input { dtype: t.dtype, shape: &t.shape, data: InputData::Bytes(bytes) });
    f(&inputs.collect::<Vec<_>>())
}

/// A prepared model on a device, with its weights.
pub struct Loaded {
    pub bound: Bound,
    pub device: Arc<HostDevice>,
    pub weights: Arc<HostWeights>,
}

pub fn device(bytes: Bytes) -> Arc<HostDevice> {
    HostDevice::new(HostConfig { populate: false, ..HostConfig::new("test", bytes) }).unwrap()
}

pub fn load(out: &Path) -> Loaded {
    let prepared = Prepared::open(out).unwrap();
    let device = device(Bytes::new(prepared.manifest().weights_bytes.get() + (4 << 20)));
    let bound = Bound::new(&runtime(), &prepared, &(Arc::clone(&device) as Arc<dyn Device>)).unwrap();
    Loaded { bound, device, weights: Arc::new(HostWeights::open(&prepared.weights_path()).unwrap()) }
}

impl Loaded {
    /// Queues a swap-in; the receiver hears when it has ended.
    pub fn swap_in(&self) -> mpsc::Receiver<()> {
        let (tell, done) = mpsc::channel();
        if let Some(range) = self.bound.range() {
            let report = Box::new(move |result: Result<_, _>| {
                result.expect("the swap-in succeeds");
                tell.send(()).unwrap();
            });
            self.device.swap_in(range, Arc::clone(&self.weights), self.bound.groups(), report).unwrap();
        }
        done
    }

    pub fn swap_out(&self) {
        let Some(range) = self.bound.range() else { return };
        let (tell, done) = mpsc::channel();
        self.device.swap_out(range, Box::new(move |result| tell.send(result).unwrap())).unwrap();
        done.recv().unwrap().unwrap();
    }

    pub fn run(&self, inputs: &[Input<'_>]) -> Result<Vec<(Shape, Vec<u8>)>, RunError> {
        run(&self.bound, inputs, &[])
    }
}

pub fn run(bound: &Bound, inputs: &[Input<'_>], wanted: &[u16]) -> Result<Vec<(Shape, Vec<u8>)>, RunError> {
    let outputs =
        bound.run(inputs, wanted, &mut |_, _, _, size| Ok(Place::Memory(vec![0xAB; size.as_len().unwrap()])))?;
    let bytes = outputs.into_iter().map(|output| match output.place {
        Place::Memory(bytes) => (output.shape, bytes),
        Place::Region(_) => panic!("memory was asked for"),
    });
    Ok(bytes.collect())
}

/// Prepares the model, runs it over several swaps while weights arrive, and compares each output with a plain session's.
pub fn equals_a_plain_session(graph: &Path, tensors: &[Made]) -> Manifest {
    let out = tempfile::tempdir().unwrap();
    let manifest = prepare(graph, out.path()).unwrap();
    let plain = PlainSession::open(&runtime(), graph, false).unwrap();
    let wanted = with_inputs(tensors, |inputs| plain.run(inputs)).unwrap();
    let loaded = load(out.path());
    for round in 0..3 {
        let swapped = loaded.swap_in();
        let pipelined = with_inputs(tensors, |inputs| loaded.run(inputs)).unwrap();
        assert!(pipelined == wanted, "{}: round {round}, pipelined", graph.display());
        let _ended_or_nothing_to_swap = swapped.recv();
        let resident = with_inputs(tensors, |inputs| loaded.run(inputs)).unwrap();
        assert!(resident == wanted, "{}: round {round}, resident", graph.display());
        loaded.swap_out();
    }
    manifest
}
