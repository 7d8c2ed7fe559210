//! The host device's swaps beside plain `memcpy`, and a run that overlaps its swap-in beside the longer of the two.

use std::{
    path::Path,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use faaswap_device::{
    Device, DeviceError, Group, HostWeights, RangeId, Stream, SwapReport,
    host::{HostConfig, HostDevice},
};
use faaswap_engine::{
    Bound, Input, InputData, Place, PlainSession, Prepared, Target,
    prepare::{self, PrepareJob},
};
use faaswap_protocol::{Bytes, DType, Shape};

use super::{Figures, p50, title};
use crate::{Result, Trouble, cache, models, process::temporary_folder, random::Random};

/// Size of the groups where only copies are measured.
const GROUP: u64 = 4 << 20;
/// Sizes of weights in MB; the last one is the figure.
const SIZES: [usize; 4] = [1, 10, 50, 200];
/// Copies of each size.
const ROUNDS: usize = 41;
/// Layers, side and batch of the model that is run while its weights arrive: 64 MiB.
const LAYERS: u64 = 64;
const SIDE: u64 = 512;
const BATCH: u64 = 24;

type Outcome<T> = mpsc::Receiver<std::result::Result<T, DeviceError>>;

pub(super) fn run(figures: &mut Figures) -> Result<()> {
    bandwidth(figures)?;
    pipelined(figures)
}

fn trouble(error: impl std::fmt::Display) -> Trouble {
    Trouble::new(error.to_string())
}

fn swap_in(
    device: &HostDevice,
    range: RangeId,
    weights: &Arc<HostWeights>,
    groups: &Arc<[Group]>,
) -> Result<Outcome<SwapReport>> {
    let (done, outcome) = mpsc::channel();
    let done = Box::new(move |result| drop(done.send(result)));
    device.swap_in(range, Arc::clone(weights), Arc::clone(groups), done).map_err(trouble)?;
    Ok(outcome)
}

fn swap_out(device: &HostDevice, range: RangeId) -> Result<()> {
    let (done, outcome) = mpsc::channel();
    device.swap_out(range, Box::new(move |result| drop(done.send(result)))).map_err(trouble)?;
    outcome.recv().map_err(trouble)?.map_err(trouble)
}

fn bandwidth(figures: &mut Figures) -> Result<()> {
    title("swap-in on the host device, no link limit (medians)");
    println!("      MB  memcpy GB/s  swap-in GB/s   ratio");
    for mb in SIZES {
        let bytes = mb * 1_000_000;
        let source: Vec<u8> = (0..bytes).map(|i| (i ^ (i >> 8) ^ (i >> 16)).to_le_bytes()[0]).collect();
        let mut target = vec![1; bytes];
        // Room for two, so that the other half of the pool is as cold as it would be on a busy node.
        let config = HostConfig::new("bench", Bytes::of_len(bytes * 2 + (4 << 20)));
        let device = HostDevice::new(config).map_err(trouble)?;
        let weights = Arc::new(HostWeights::from_bytes(&source).map_err(trouble)?);
        let range = device.reserve(weights.size()).map_err(trouble)?;
        let len = weights.size().get();
        let groups = (0..len.div_ceil(GROUP)).map(|i| Group { offset: i * GROUP, len: GROUP.min(len - i * GROUP) });
        let groups: Arc<[Group]> = groups.collect();
        let last = u32::try_from(groups.len() - 1).map_err(trouble)?;
        let (mut copied, mut swapped) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            let start = Instant::now();
            target.copy_from_slice(&source);
            std::hint::black_box(&mut target);
            copied.push(start.elapsed());
            let start = Instant::now();
            let outcome = swap_in(&device, range, &weights, &groups)?;
            device.await_group(range, last, Stream::CALLER).map_err(trouble)?;
            swapped.push(start.elapsed());
            outcome.recv().map_err(trouble)?.map_err(trouble)?;
            if round % 10 == 0 {
                target.fill(0);
                device.read_back(range, 0, &mut target).map_err(trouble)?;
                figures.check(target == source);
            }
            swap_out(&device, range)?;
        }
        let (copied, swapped) = (p50(&mut copied), p50(&mut swapped));
        let speed = |ms: f64| f64::from(u32::try_from(mb).unwrap_or(u32::MAX)) / ms;
        println!("  {mb:6} {:12.2} {:13.2} {:7.3}", speed(copied), speed(swapped), copied / swapped);
        figures.set("swap_bandwidth_ratio", copied / swapped);
    }
    Ok(())
}

fn pipelined(figures: &mut Figures) -> Result<()> {
    title("swap-in and run, pipelined (64 MiB in 64 layers, link as fast as the run and slower, medians)");
    let folder = temporary_folder(&std::env::temp_dir())?;
    let graph = folder.path().join("chain.onnx");
    models::write(&models::matmul_chain(SIDE, LAYERS, 5), &graph)?;
    let runtime = cache::runtime()?;
    let out_dir = folder.path().join("prepared");
    let job = PrepareJob {
        model_dir: folder.path().to_owned(),
        graph_file: "chain.onnx".to_owned(),
        out_dir: out_dir.clone(),
        group_bytes: Bytes::mib(4),
        target: Target::Cpu,
    };
    prepare::run(&runtime, &job).map_err(trouble)?;
    let prepared = Prepared::open(&out_dir)?;
    let mut random = Random::new(5);
    let x: Vec<u8> = (0..BATCH * SIDE).flat_map(|_| random.signed().to_le_bytes()).collect();
    let expected = plain(&graph, &x)?;
    println!("  link MiB/s   copy ms    run ms   both ms   ratio to the longer");
    let mut worst = 0.0_f64;
    let first = Chain::new(&prepared, None, &x, &expected)?.measure(figures)?;
    for share in [1.0, 0.5, 2.0] {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "MB/s"
        )]
        let speed = (prepared.manifest().weights_bytes.get() as f64 / (first.run / 1e3) * share) as u64;
        let took = Chain::new(&prepared, Some(speed), &x, &expected)?.measure(figures)?;
        let ratio = took.both / took.copy.max(took.run);
        println!("  {:10} {:9.2} {:9.2} {:9.2} {ratio:7.3}", speed >> 20, took.copy, took.run, took.both);
        worst = worst.max(ratio);
    }
    figures.set("pipelined_ratio", worst);
    Ok(())
}

fn plain(graph: &Path, x: &[u8]) -> Result<Vec<u8>> {
    let session = PlainSession::open(&cache::runtime()?, graph, false)?;
    let shape = Shape::new([BATCH, SIDE]).map_err(trouble)?;
    Ok(session.run(&[Input { dtype: DType::F32, shape: &shape, data: InputData::Bytes(x) }])?.remove(0).1)
}

/// Medians in milliseconds.
struct Took {
    copy: f64,
    run: f64,
    both: f64,
}

struct Chain<'a> {
    bound: Bound,
    device: Arc<HostDevice>,
    weights: Arc<HostWeights>,
    x: &'a [u8],
    expected: &'a [u8],
}

impl<'a> Chain<'a> {
    fn new(prepared: &Prepared, speed: Option<u64>, x: &'a [u8], expected: &'a [u8]) -> Result<Self> {
        let memory = Bytes::new(prepared.manifest().weights_bytes.get() + (16 << 20));
        let config = HostConfig { link_bytes_per_second: speed, ..HostConfig::new("bench", memory) };
        let device = HostDevice::new(config).map_err(trouble)?;
        let bound = Bound::new(&cache::runtime()?, prepared, &(Arc::clone(&device) as Arc<dyn Device>))?;
        let weights = Arc::new(HostWeights::open(&prepared.weights_path()).map_err(trouble)?);
        Ok(Self { bound, device, weights, x, expected })
    }

    fn run(&self, figures: &mut Figures) -> Result<Duration> {
        let shape = Shape::new([BATCH, SIDE]).map_err(trouble)?;
        let start = Instant::now();
        let input = Input { dtype: DType::F32, shape: &shape, data: InputData::Bytes(self.x) };
        let mut place =
            |_: u16, _: DType, _: &Shape, size: Bytes| Ok(Place::Memory(vec![0; size.as_len().unwrap_or(0)]));
        let outputs = self.bound.run(&[input], &[], &mut place).map_err(trouble)?;
        let took = start.elapsed();
        figures.check(matches!(&outputs[0].place, Place::Memory(bytes) if bytes == self.expected));
        Ok(took)
    }

    fn measure(&self, figures: &mut Figures) -> Result<Took> {
        let range = self.bound.range().ok_or_else(|| trouble("the model has no weights"))?;
        let groups = self.bound.groups();
        let (mut copy, mut run, mut both) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..21 {
            let start = Instant::now();
            let outcome = swap_in(&self.device, range, &self.weights, &groups)?;
            outcome.recv().map_err(trouble)?.map_err(trouble)?;
            copy.push(start.elapsed());
            run.push(self.run(figures)?);
            swap_out(&self.device, range)?;
            let start = Instant::now();
            let outcome = swap_in(&self.device, range, &self.weights, &groups)?;
            self.run(figures)?;
            both.push(start.elapsed());
            outcome.recv().map_err(trouble)?.map_err(trouble)?;
            swap_out(&self.device, range)?;
        }
        Ok(Took { copy: p50(&mut copy), run: p50(&mut run), both: p50(&mut both) })
    }
}
