//! Measures the host device's swaps beside plain `memcpy` of the same bytes, in one run.
//!
//! `cargo run --release -p faaswap-device --example swap_bandwidth [SIZE_MB...]`; medians, one line a size. The reference
//! copies between two buffers of this process whose pages are there already.

use std::{
    env,
    error::Error,
    sync::{Arc, mpsc},
    time::Instant,
};

use faaswap_device::{
    Device, DeviceError, Group, HostWeights, RangeId, Stream, SwapReport,
    host::{HostConfig, HostDevice},
};
use faaswap_protocol::Bytes;

const GROUP: u64 = 4 << 20;

/// What one size took, in microseconds.
#[derive(Default)]
struct Took {
    memcpy: Vec<f64>,
    swap_in: Vec<f64>,
    asked_to_done: Vec<f64>,
    first_group: Vec<f64>,
    mapping: Vec<f64>,
    swap_out: Vec<f64>,
}

struct Bench {
    device: Arc<HostDevice>,
    range: RangeId,
    weights: Arc<HostWeights>,
    groups: Arc<[Group]>,
}

impl Bench {
    fn swap_in(&self, took: &mut Took) -> Result<(), Box<dyn Error>> {
        let (done, outcome) = mpsc::channel::<Result<SwapReport, DeviceError>>();
        let (weights, groups) = (Arc::clone(&self.weights), Arc::clone(&self.groups));
        let asked = Instant::now();
        self.device.swap_in(self.range, weights, groups, Box::new(move |result| drop(done.send(result))))?;
        self.device.await_group(self.range, 0, Stream::CALLER)?;
        took.first_group.push(micros(asked));
        let last = u32::try_from(self.groups.len())? - 1;
        self.device.await_group(self.range, last, Stream::CALLER)?;
        took.asked_to_done.push(micros(asked));
        let report = outcome.recv()??;
        took.swap_in.push(report.took.as_secs_f64() * 1e6);
        took.mapping.push(report.mapping.as_secs_f64() * 1e6);
        Ok(())
    }

    fn swap_out(&self, took: &mut Took) -> Result<(), Box<dyn Error>> {
        let (done, outcome) = mpsc::channel();
        let asked = Instant::now();
        self.device.swap_out(self.range, Box::new(move |result| drop(done.send(result))))?;
        outcome.recv()??;
        took.swap_out.push(micros(asked));
        Ok(())
    }
}

fn micros(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e6
}

fn median(samples: &mut [f64]) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().unwrap_or(f64::NAN)
}

fn measure(bytes: usize) -> Result<Took, Box<dyn Error>> {
    let source: Vec<u8> = (0..bytes).map(|i| i.to_le_bytes()[0]).collect();
    let mut target = vec![1; bytes];
    // Room for two, so that the other half of the pool is as cold as it would be on a busy node.
    let capacity = Bytes::of_len(bytes * 2 + (4 << 20));
    let device = HostDevice::new(HostConfig::new("bench", capacity))?;
    let weights = Arc::new(HostWeights::from_bytes(&source)?);
    let len = Bytes::of_len(bytes).get();
    let groups = (0..len.div_ceil(GROUP)).map(|i| Group { offset: i * GROUP, len: GROUP.min(len - i * GROUP) });
    let bench = Bench { range: device.reserve(weights.size())?, device, weights, groups: groups.collect() };
    let mut took = Took::default();
    let rounds = (2 << 30) / bytes;
    for round in 0..rounds.clamp(11, 201) {
        let started = Instant::now();
        target.copy_from_slice(&source);
        std::hint::black_box(&mut target);
        took.memcpy.push(micros(started));
        bench.swap_in(&mut took)?;
        if round == 0 {
            bench.device.read_back(bench.range, 0, &mut target)?;
            assert!(target == source, "the device holds other bytes than the weights");
        }
        bench.swap_out(&mut took)?;
    }
    Ok(took)
}

fn main() -> Result<(), Box<dyn Error>> {
    let asked: Vec<f64> = env::args().skip(1).map(|mb| mb.parse()).collect::<Result<_, _>>()?;
    let sizes = if asked.is_empty() { vec![0.5, 1.0, 5.0, 10.0, 20.0, 50.0, 100.0, 400.0] } else { asked };
    println!("      MB  memcpy GB/s  swap-in GB/s  ratio  asked-to-there us (fixed)  first group us  map us  out us");
    for mb in sizes {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "sizes given by a person")]
        let bytes = (mb * 1e6) as usize;
        let mut took = measure(bytes)?;
        let (memcpy, swap_in) = (median(&mut took.memcpy), median(&mut took.swap_in));
        let whole = median(&mut took.asked_to_done);
        println!(
            "{mb:8.1} {:12.2} {:13.2} {:6.2} {whole:18.1} {:7.1} {:15.1} {:7.1} {:7.1}",
            mb * 1e3 / memcpy,
            mb * 1e3 / swap_in,
            memcpy / swap_in,
            whole - swap_in,
            median(&mut took.first_group),
            median(&mut took.mapping),
            median(&mut took.swap_out),
        );
    }
    Ok(())
}
