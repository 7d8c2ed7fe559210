//! How long a new pod takes whose model the node knows: from the start of the sidecar's process to its first inference.
//!
//! Between starts another model takes the device, so the first inference also brings the weights back from host memory.

use std::{
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use faaswap_engine::{Input, InputData, PlainSession};
use faaswap_protocol::{DType, Shape};
use faaswap_sidecar::model::{ModelRef, ModelSource};

use super::{Figures, p50, p98, title};
use crate::{
    Result, Trouble, cache, models,
    node::{Broker, BrokerOptions, DeviceOptions, Sidecar, SidecarOptions},
    oip::{Outcome, Request, Tensor},
    process::temporary_folder,
    random::Random,
};

/// 105 MB of weights, as a ResNet-50 has.
const SIDE: u64 = 1024;
const LAYERS: u64 = 25;
/// Room for one of the two.
const DEVICE: &str = "160MiB";
/// Starts of each kind.
const STARTS: usize = 20;
/// How often the new pod is asked.
const ASK_EVERY: Duration = Duration::from_millis(1);
const PATIENCE: Duration = Duration::from_secs(60);

struct Asked {
    request: Request,
    expected: Vec<u8>,
}

impl Asked {
    fn of(function: &str, model: &Path) -> Result<Self> {
        let mut random = Random::new(7);
        let values: Vec<f32> = (0..SIDE).map(|_| random.signed()).collect();
        let tensor = Tensor::f32("x", &[1, SIDE], &values);
        let shape = Shape::new([1, SIDE]).map_err(|e| Trouble::new(e.to_string()))?;
        let input = Input { dtype: DType::F32, shape: &shape, data: InputData::Bytes(&tensor.data) };
        let expected = PlainSession::open(&cache::runtime()?, model, false)?.run(&[input])?.remove(0).1;
        Ok(Self { request: Request::new(function, &[tensor])?, expected })
    }

    /// Asks until there is an answer; whether it is right.
    fn until_answered(&self, sidecar: &mut Sidecar, start: Instant) -> Result<bool> {
        let mut client = sidecar.client(PATIENCE);
        loop {
            if let Ok(Outcome::Answered(answer)) = self.request.send(&mut client) {
                return Ok(answer.outputs[0].data == self.expected);
            }
            if start.elapsed() > PATIENCE || sidecar.process().ended().is_some() {
                return Err(Trouble::new(format!("no inference\n{}", sidecar.process().log_tail())));
            }
            thread::sleep(ASK_EVERY);
        }
    }
}

pub(super) fn run(figures: &mut Figures) -> Result<()> {
    title(
        "a new pod whose model the node knows: from its sidecar's start to its first inference (105 MB, host device)",
    );
    let folder = temporary_folder(&std::env::temp_dir())?;
    let write = |name: &str, seed: u64| -> Result<PathBuf> {
        let path = folder.path().join(name);
        models::write(&models::matmul_chain(SIDE, LAYERS, seed), &path)?;
        Ok(path)
    };
    let (model, other) = (write("model.onnx", 1)?, write("other.onnx", 2)?);
    let source = ModelSource::load(&ModelRef::File { graph: model.clone(), data: Vec::new() });
    let digest = source.map_err(|e| Trouble::new(e.to_string()))?.digest.to_string();
    let mut device = DeviceOptions::new("host0", DEVICE);
    device.chunk = "1MiB".to_owned();
    let broker = Broker::start(&BrokerOptions::new(vec![device]))?;
    let (asked, asked_other) = (Asked::of("pod", &model)?, Asked::of("other", &other)?);
    let mut beside = Sidecar::start(&broker, &SidecarOptions::new("other", &other, 10_000))?;
    beside.wait_ready()?;
    let by_file = SidecarOptions::new("pod", &model, 10_000);
    let by_digest = by_file.clone().with("FAASWAP_MODEL", &digest);
    // The first pod of all: the model is handed over and prepared.
    let start = Instant::now();
    figures.check(asked.until_answered(&mut Sidecar::start(&broker, &by_file)?, start)?);
    println!("  the node does not know the model: {:.0} ms", start.elapsed().as_secs_f64() * 1e3);

    let mut times = [Vec::new(), Vec::new()];
    let swaps = broker.metric("faaswap_swaps_in_total")?;
    for _ in 0..STARTS {
        for (options, times) in [&by_digest, &by_file].into_iter().zip(&mut times) {
            figures.check(asked_other.until_answered(&mut beside, Instant::now())?);
            let start = Instant::now();
            let mut pod = Sidecar::start(&broker, options)?;
            figures.check(asked.until_answered(&mut pod, start)?);
            times.push(start.elapsed());
        }
    }
    let swaps = broker.metric("faaswap_swaps_in_total")? - swaps;
    for (name, times) in ["digest", "file"].into_iter().zip(&mut times) {
        let slowest = times.iter().max().map_or(f64::NAN, |slowest| slowest.as_secs_f64() * 1e3);
        let (at50, at98) = (p50(times), p98(times));
        println!("  by {name:6}: p50 {at50:.1} ms, p98 {at98:.1} ms, slowest {slowest:.1} ms of {STARTS}");
        figures.set(&format!("cold_pod_by_{name}_p50_ms"), at50);
        figures.set(&format!("cold_pod_by_{name}_p98_ms"), at98);
    }
    println!("  {swaps:.0} swaps in, {} starts", 2 * STARTS);
    Ok(())
}
