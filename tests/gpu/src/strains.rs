//! How much runs of different models slow each other down: what the simulator is told of a mix, and the scheduler learns.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use faaswap_device::{
    Device,
    cuda::{CudaConfig, CudaDevice},
};
use faaswap_protocol::Bytes;
use serde_json::json;

use crate::{
    Result,
    model::{self, Asked},
    record::{Record, Records, Target},
    stats::{median, median_ms},
};

/// Enough for each function to have one of its own.
const LANES: usize = 32;
/// How long each pair runs.
const EACH: Duration = Duration::from_millis(250);
/// Room for weights beyond their bytes, for each function.
const ROOM: u64 = 64 << 20;

/// A function whose weights are there, and what it answers.
struct Function {
    asked: Asked,
    expected: Vec<u8>,
}

impl Function {
    /// Runs until it is told to stop, or for a while; gives the times, and fails where an output is wrong.
    fn run(&self, stop: Option<&AtomicBool>) -> Result<Vec<Duration>> {
        let (mut times, until) = (Vec::new(), Instant::now() + EACH);
        while stop.map_or(Instant::now() < until, |stop| !stop.load(Ordering::Relaxed)) {
            let begun = Instant::now();
            let answer = self.asked.ask()?;
            times.push(begun.elapsed());
            if answer != self.expected {
                return Err("an output is wrong beside another model's run".into());
            }
        }
        Ok(times)
    }
}

/// The time of one's runs while the other's run beside it, and how many outputs were compared.
fn beside(one: &Function, other: &Function) -> Result<(f64, u64)> {
    let stop = AtomicBool::new(false);
    let (times, others) = thread::scope(|scope| {
        let running = scope.spawn(|| other.run(Some(&stop)));
        let times = one.run(None);
        stop.store(true, Ordering::Relaxed);
        (times, running.join().unwrap_or_else(|_| Err("a thread panicked".into())))
    });
    let (mut times, others) = (times?, others?);
    Ok((median_ms(&mut times), (times.len() + others.len()) as u64))
}

/// Each model's runs alone and beside each other one's, all with their weights there.
pub(crate) fn run(models: &Path, out: &Path) -> Result<()> {
    let runtime = model::runtime()?;
    let prepared = model::prepared(&models.join("prepared"))?;
    let prepared: Vec<_> = prepared.into_iter().filter(|(name, _)| name.ends_with("fp32")).collect();
    let memory = prepared.iter().map(|(_, one)| 2 * (one.manifest().weights_bytes.get() + ROOM)).sum();
    let config = CudaConfig { memory: Some(Bytes::new(memory)), lanes: LANES, ..model::config(0)? };
    let device: Arc<dyn Device> = CudaDevice::open(&config)?;
    let bind = |prepared| -> Result<Function> {
        let asked = Asked::new(&runtime, prepared, &device)?;
        asked.swap_in()?;
        let expected = asked.ask()?;
        Ok(Function { asked, expected })
    };
    let pairs = prepared.iter().map(|(_, one)| Ok([bind(one)?, bind(one)?])).collect::<Result<Vec<_>>>()?;
    let (mut rows, mut records) = (Vec::new(), Vec::new());
    for ((name, _), [one, _]) in prepared.iter().zip(&pairs) {
        let mut times = one.run(None)?;
        let (alone, mut checked, mut strains) = (median_ms(&mut times), times.len() as u64, Vec::new());
        for [_, other] in &pairs {
            let (took, more) = beside(one, other)?;
            checked += more;
            strains.push(took / alone - 1.0);
        }
        let told: Vec<_> = strains.iter().map(|strain| format!("{strain:6.2}")).collect();
        println!("strains: {name:20} {alone:7.3} ms alone, longer by {} of it beside each", told.join(" "));
        rows.push(json!({"model": name, "alone_ms": alone, "strains": strains}));
        let strain = (median(&mut strains), "of its run alone");
        records.push(Record::of("strain_beside_others", name, strain, None, Target::Told).counting(checked, 0));
    }
    for [one, other] in &pairs {
        one.asked.swap_out()?;
        other.asked.swap_out()?;
    }
    std::fs::write(out.join("strains.json"), serde_json::to_vec_pretty(&rows)?)?;
    Records::new(out, "strains", device.as_cuda().ok_or("no GPU")?.gpu_name()?)?.add(&records)
}
