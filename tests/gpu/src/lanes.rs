//! Requests per second of resident functions of one model, by how many run at once; beside what PyTorch's CUDA graphs do in as many streams.

use std::{
    path::Path,
    sync::Arc,
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
    many::{Function, bind_all},
    model, prepared,
    record::{Record, Records, Target},
};

/// Lanes, and so the most that run at once.
const LANES: usize = 8;

/// Functions that are bound: more than there are lanes, for a kind that is learnt takes some of them in passing.
const BOUND: usize = 2 * LANES;

/// Each model with as many functions as there are lanes, each with weights of its own.
pub(crate) fn run(models: &Path, out: &Path, names: &[&str], seconds: u64) -> Result<()> {
    let runtime = model::runtime()?;
    let (all, torch) = (prepared::all(models)?, model::torch(models)?);
    let (mut records, mut kept) = (Vec::new(), Vec::new());
    for name in names {
        let Some((_, prepared)) = all.iter().find(|(of, _)| of == name) else { continue };
        let memory = Bytes::new((prepared.manifest().weights_bytes.get() + (64 << 20)) * LANES as u64);
        let device: Arc<dyn Device> =
            CudaDevice::open(&CudaConfig { memory: Some(memory), lanes: LANES, ..model::config(0)? })?;
        let functions = one_in_each(bind_all(&runtime, &device, &[((*name).to_owned(), prepared.clone())], BOUND)?)?;
        for function in &functions {
            function.asked.swap_in()?;
        }
        let (mut rates, mut answers) = (Vec::new(), 0);
        for at_once in [1_usize, 2, 4, LANES] {
            let until = Instant::now() + Duration::from_secs(seconds);
            let counts: Vec<Result<u64>> = thread::scope(|scope| {
                let one = |function: &Function| -> Result<u64> {
                    let mut n = 0;
                    while Instant::now() < until {
                        if function.asked.ask()? != function.expected {
                            return Err(format!("{}: wrong output in {at_once} lanes", function.name).into());
                        }
                        n += 1;
                    }
                    Ok(n)
                };
                let threads: Vec<_> = functions[..at_once].iter().map(|f| scope.spawn(move || one(f))).collect();
                threads.into_iter().map(|t| t.join().unwrap_or_else(|_| Err("a thread panicked".into()))).collect()
            });
            let count: u64 = counts.into_iter().collect::<Result<Vec<_>>>()?.iter().sum();
            answers += count;
            rates.push(count as f64 / seconds as f64);
        }
        functions.iter().try_for_each(|function| function.asked.swap_out())?;
        let [one, two, four, eight] = rates[..] else { return Err("four rates".into()) };
        println!(
            "lanes: {name:20} 1: {one:6.0}/s  2: {two:6.0}/s  4: {four:6.0}/s ({:.2}x)  8: {eight:6.0}/s",
            four / one
        );
        records.push(json!({"model": name, "per_s": rates}));
        let target = if name.starts_with("bert") { Target::AtLeast(1.6) } else { Target::AtLeast(2.2) };
        let record = Record::of("four_lanes", name, (four, "requests/s"), Some((one, "one lane")), target);
        kept.push(record.counting(answers, 0));
        let streams = &torch[*name]["streams_per_s"];
        if let (Some(one), Some(four)) = (streams["1"].as_f64(), streams["4"].as_f64()) {
            let reference = Some((one, "one stream"));
            kept.push(Record::of("four_streams_torch", name, (four, "requests/s"), reference, Target::Told));
        }
        Records::new(out, "lanes", device.as_cuda().ok_or("no GPU")?.gpu_name()?)?.add(&kept)?;
    }
    Ok(std::fs::write(out.join("lanes.json"), serde_json::to_vec_pretty(&records)?)?)
}

/// One of these functions in each lane.
fn one_in_each(functions: Vec<Function>) -> Result<Vec<Function>> {
    let mut of_lanes: [Option<Function>; LANES] = std::array::from_fn(|_| None);
    for function in functions {
        let lane = function.asked.bound.program_lane().and_then(|lane| of_lanes.get_mut(lane));
        lane.ok_or("a function without a program in a lane")?.get_or_insert(function);
    }
    of_lanes.into_iter().map(|function| function.ok_or_else(|| "a lane without a function".into())).collect()
}
