//! Each model's swaps and runs beside their references, in one process, medians, every output checked.

use std::{
    fs,
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use faaswap_device::{
    Device,
    cuda::{CudaConfig, CudaDevice},
};
use faaswap_engine::{CudaTarget, Input, InputData, OnDevice, PlainSession, Prepared, Runtime, Target};
use faaswap_protocol::{Bytes, Signature};
use serde_json::{Value, json};

use crate::{
    Result, in_slab,
    model::{self, Asked},
    native, prepared,
    record::{self, Record, Records, Target as Goal},
    stats::{median, median_ms},
};

/// Weights on the GPU, as in the published evaluation.
const MEMORY: Bytes = Bytes::mib(25 << 10);
/// Most of the weights' size that chunks may take beyond it, in percent.
const CHUNK_WASTE_MAX: f64 = 5.0;
/// Largest difference to a plain session's output, beside the largest value: TF32 and fp16 have 10 bits of fraction.
const TOLERANCE: f64 = 1e-2;
/// Between a swap-out and the next swap-in: the link does meanwhile what it does when it is idle.
const BETWEEN: Duration = Duration::from_millis(10);
/// Functions of one model that are bound before memory is looked at: the first two of a kind have programs of their own, and the first four
/// after them in each of eight lanes bring what all others there launch.
const FORMER: usize = 39;
/// Functions of one model over which their memory is averaged.
const FURTHER: usize = 8;
const SWAPS: usize = 15;
const RUNS: usize = 40;

/// What was measured of one prepared model.
struct Measured {
    value: Value,
    resident_ms: f64,
    kept_percent: u64,
    /// What it answered.
    answer: Vec<u8>,
}

impl Measured {
    /// What the broker chooses a layout by: see [`faaswap_engine::Manifest::cost`].
    fn cost(&self) -> f64 {
        self.resident_ms * (1.0 + self.kept_percent as f64 / 100.0)
    }
}

fn measure(runtime: &Runtime, device: &Arc<dyn Device>, graph: &Path, prepared: &Prepared) -> Result<Measured> {
    let cuda = device.as_cuda().ok_or("no GPU")?;
    let first = Asked::new(runtime, prepared, device)?;
    let kept = first.bound.kept_session().map(str::to_owned);
    // The first model of a kind loads kernels, which all share; the second shows what a function costs.
    let start = Instant::now();
    let asked = Asked::with(runtime, prepared, device, Arc::clone(&first.weights), Arc::clone(&first.inputs))?;
    let bind_ms = start.elapsed().as_secs_f64() * 1e3;
    drop(first);

    let bytes = asked.weights.size().get() as f64;
    let (mut swaps, mut mapping, mut bare) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..SWAPS {
        let report = asked.swap_in()?;
        swaps.push(report.took.as_secs_f64() * 1e3);
        mapping.push(report.mapping.as_secs_f64() * 1e3);
        let range = asked.bound.range().ok_or("no weights")?;
        bare.push(cuda.time_plain_copy(range, &asked.weights)?.as_secs_f64() * 1e3);
        asked.swap_out()?;
        thread::sleep(BETWEEN);
    }
    let (swap_ms, map_ms, bare_ms) = (median(&mut swaps), median(&mut mapping), median(&mut bare));

    asked.swap_in()?;
    let expected = asked.ask()?;
    let mut wrong = 0_u64;
    let mut checked = 0_u64;
    let mut check = |right: bool| {
        checked += 1;
        wrong += u64::from(!right);
    };
    let mut resident: Vec<Duration> = Vec::new();
    for _ in 0..RUNS {
        let start = Instant::now();
        let output = asked.ask()?;
        resident.push(start.elapsed());
        check(output == expected);
    }
    let mut program: Vec<Duration> = Vec::new();
    for _ in 0..RUNS {
        program.extend(asked.bound.time_program()?);
    }
    let program_ms = median_ms(&mut program);
    let in_slab = in_slab::measure(&asked, &expected, RUNS)?;
    in_slab.right.iter().for_each(|&right| check(right));
    asked.swap_out()?;
    let resident_ms = median_ms(&mut resident);
    let (both_ms, parts) = swapped_in(&asked, &expected, &mut check)?;
    // What came after a pause is compared with a resident run after the same pause, too.
    asked.swap_in()?;
    let paced_ms = paced(&asked, &expected, &mut check)?;
    let bare_paced_ms = bare_paced(&asked)?;
    asked.swap_out()?;

    let Target::Cuda(target) = prepared.manifest().target else { return Err("prepared for the processor".into()) };
    let plain_target = Target::Cuda(CudaTarget { channels_last: false, ..target });
    let start = Instant::now();
    let plain = PlainSession::open_for(runtime, plain_target, graph, false)?;
    let inputs: Vec<_> = asked
        .inputs
        .iter()
        .map(|(dtype, shape, data)| Input { dtype: *dtype, shape, data: InputData::Bytes(data) })
        .collect();
    let theirs = plain.run(&inputs)?;
    let plain_load_ms = start.elapsed().as_secs_f64() * 1e3;
    let signature = &prepared.manifest().signature;
    let theirs: Vec<u8> = theirs.into_iter().flat_map(|(_, bytes)| bytes).collect();
    let difference = difference(signature, &expected, &theirs)?;
    check(difference < TOLERANCE);
    let on_device = OnDevice::new(&plain, signature, device)?;
    let mut plain_runs: Vec<Duration> = Vec::new();
    for _ in 0..RUNS {
        let start = Instant::now();
        on_device.run()?;
        plain_runs.push(start.elapsed());
    }
    let plain_ms = median_ms(&mut plain_runs);
    let (longer, longer_paced) = (bare_ms.max(resident_ms), bare_paced_ms.max(paced_ms));
    let value = json!({
        "bytes": bytes, "kept": kept, "nodes": asked.bound.program_nodes(), "copies": asked.bound.program_copies(), "bind_ms": bind_ms,
        "bare_copy_ms": bare_ms, "swap_ms": swap_ms, "map_ms": map_ms, "bandwidth_ratio": bare_ms / swap_ms,
        "resident_ms": resident_ms, "program_ms": program_ms, "plain_ms": plain_ms, "resident_ratio": program_ms / plain_ms,
        "pipelined_ms": both_ms, "pipelined_ratio": both_ms / longer,
        "resident_paced_ms": paced_ms, "bare_copy_paced_ms": bare_paced_ms, "pipelined_paced_ratio": both_ms / longer_paced, "plain_load_ms": plain_load_ms,
        "parts_ms": parts, "program_parts": asked.bound.program_parts(), "in_slab": in_slab.told(), "groups": asked.bound.groups().len(), "difference": difference, "outputs_checked": checked, "outputs_wrong": wrong,
    });
    Ok(Measured { value, resident_ms, kept_percent: prepared.manifest().kept_percent(), answer: expected })
}

/// The largest difference between all outputs, one after the other, of which each has a fixed shape.
fn difference(signature: &Signature, ours: &[u8], theirs: &[u8]) -> Result<f64> {
    let (mut at, mut most) = (0, 0.0_f64);
    for spec in &signature.outputs {
        let size = spec.fixed_shape().ok_or("an output has no fixed shape")?.size(spec.dtype)?;
        let end = at + size.as_len().ok_or("an output that is larger than memory")?;
        let (Some(one), Some(other)) = (ours.get(at..end), theirs.get(at..end)) else {
            return Err("an output is missing".into());
        };
        most = most.max(model::difference(spec.dtype, one, other));
        at = end;
    }
    Ok(most)
}

/// Requests whose weights are brought for them, after a pause each: their time, and where it goes: until the link has begun; from
/// there until all is copied, meanwhile queueing and mapping; until the program's first part is launched, until all is, from
/// there to the end; and what the device says of the run.
fn swapped_in(asked: &Asked, expected: &[u8], check: &mut impl FnMut(bool)) -> Result<(f64, [f64; 8])> {
    let mut both: Vec<Duration> = Vec::new();
    let mut parts: [Vec<Duration>; 8] = Default::default();
    for _ in 0..SWAPS {
        let start = Instant::now();
        let done = asked.begin_swap_in()?;
        let output = asked.ask()?;
        both.push(start.elapsed());
        check(output == expected);
        let (swap, run) = (done.recv()??, asked.bound.last_run().unwrap_or_default());
        let swap = [swap.waited, swap.took, swap.queueing, swap.mapping];
        let took = swap.into_iter().chain([run.until_first, run.until_launch, run.after, run.on_device]);
        parts.iter_mut().zip(took).for_each(|(all, one)| all.push(one));
        asked.swap_out()?;
        thread::sleep(BETWEEN);
    }
    Ok((median_ms(&mut both), parts.map(|mut all| median_ms(&mut all))))
}

/// Bare copies of the weights to where they are, after the same pause.
fn bare_paced(asked: &Asked) -> Result<f64> {
    let cuda = asked.device.as_cuda().ok_or("no GPU")?;
    let range = asked.bound.range().ok_or("no weights")?;
    let mut paced: Vec<Duration> = Vec::new();
    for _ in 0..SWAPS {
        thread::sleep(BETWEEN);
        paced.push(cuda.time_plain_copy(range, &asked.weights)?);
    }
    Ok(median_ms(&mut paced))
}

/// Requests whose weights are there, after the same pause.
fn paced(asked: &Asked, expected: &[u8], check: &mut impl FnMut(bool)) -> Result<f64> {
    let mut paced: Vec<Duration> = Vec::new();
    for _ in 0..SWAPS {
        thread::sleep(BETWEEN);
        let start = Instant::now();
        let output = asked.ask()?;
        paced.push(start.elapsed());
        check(output == expected);
    }
    Ok(median_ms(&mut paced))
}

/// What one more function takes of a device's memory while its weights are out, in bytes, and what of it is constants; and how many were
/// bound by their kind. (Of host memory `density` says it: here it would be taken from what others have left.)
struct OneMore {
    device: f64,
    constants: f64,
    twins: usize,
}

/// The driver gives memory out in pieces of 2 MiB, so several are bound.
fn one_more(runtime: &Runtime, device: &Arc<dyn Device>, prepared: &Prepared) -> Result<OneMore> {
    let cuda = device.as_cuda().ok_or("no GPU")?;
    // What the lanes have taken for all of their models does not count. Of the memory for constants, what is taken does: it
    // grows in larger pieces.
    let used = || -> Result<[f64; 2]> {
        let (constants, scratch) = cuda.arenas();
        let free = cuda.driver_memory()?.0.get() + scratch.get() + constants.get();
        let constants = cuda.constants_taken().get() as f64;
        Ok([constants - free as f64, constants])
    };
    let first = Asked::new(runtime, prepared, device)?;
    let more = || Asked::with(runtime, prepared, device, Arc::clone(&first.weights), Arc::clone(&first.inputs));
    let _former = (0..FORMER).map(|_| more()).collect::<Result<Vec<_>>>()?;
    let before = used()?;
    let others = (0..FURTHER).map(|_| more()).collect::<Result<Vec<_>>>()?;
    let after = used()?;
    let [device, constants] = [0, 1].map(|which| (after[which] - before[which]) / FURTHER as f64);
    Ok(OneMore { device, constants, twins: others.iter().filter(|asked| asked.bound.is_twin()).count() })
}

/// How long 128 MiB take to be mapped, made accessible and unmapped, in chunks of several sizes.
fn time_mapping(cuda: &CudaDevice) -> Result<Vec<Value>> {
    let mut mapping = Vec::new();
    for mib in [2_u64, 4, 8, 16, 32, 64] {
        let chunks = usize::try_from(128 / mib)?;
        let mut times = [Vec::new(), Vec::new(), Vec::new()];
        for _ in 0..9 {
            let took = cuda.time_mapping(Bytes::mib(mib), chunks)?;
            times.iter_mut().zip(took).for_each(|(all, one)| all.push(one));
        }
        let [map, open, unmap] = times.map(|mut all| median_ms(&mut all) * 1e3);
        println!("128 MiB in chunks of {mib:2} MiB: map {map:4.0} us, access {open:4.0} us, unmap {unmap:4.0} us");
        mapping.push(json!({"chunk_mib": mib, "map_us": map, "access_us": open, "unmap_us": unmap}));
    }
    Ok(mapping)
}

/// What was measured of a model, for who watches.
fn tell(name: &str, last: bool, value: &Value, torch: &Value, each: &OneMore) {
    let v = |key: &str| value[key].as_f64().unwrap_or(f64::NAN);
    let graph = torch["graph_ms"].as_f64().unwrap_or(f64::NAN);
    println!(
        "{name:20} {:5.0} {:5.1} {:10.3} {:7.3} {:7.3} {:6.3} {:8.3} {:6.3} {:8.0} {:6.2} {:6} {} {}{}",
        v("bytes") / 1e6,
        v("bytes") / 1e6 / v("bare_copy_ms"),
        v("bandwidth_ratio"),
        v("resident_ms"),
        v("resident_ratio"),
        v("program_ms") / graph,
        v("pipelined_ms"),
        v("pipelined_ratio"),
        v("bind_ms"),
        v("bind_bytes") / 1e6,
        v("outputs_wrong"),
        if last { "nhwc" } else { "nchw" },
        value["copies"],
        if value["kept"].is_null() { "" } else { " session kept" },
    );
    let v = |key: &str| &value[key];
    println!("{:20} parts {} groups {} program {}", "", v("parts_ms"), v("groups"), v("program_parts"));
    println!("{:20} inputs in a slab {}", "", value["in_slab"]);
    println!(
        "{:20} one more function: {:.2} MB of device memory, {:.2} of them constants; {} of {FURTHER} bound by their kind",
        "",
        each.device / 1e6,
        each.constants / 1e6,
        each.twins
    );
}

pub(crate) fn run(models: &Path, out: &Path) -> Result<()> {
    let runtime = model::runtime()?;
    let all = model::found(models)?;
    let torch = model::torch(models)?;
    let start = Instant::now();
    let all_prepared = prepared::prepare_all(&all, &models.join(prepared::FOLDER));
    println!("prepared {} in {:.0} s", all_prepared.len(), start.elapsed().as_secs_f64());
    let start = Instant::now();
    let device: Arc<dyn Device> = CudaDevice::open(&CudaConfig { memory: Some(MEMORY), ..model::config(0)? })?;
    println!("opened {} in {:.2} s", device.info().capacity, start.elapsed().as_secs_f64());
    let cuda = device.as_cuda().ok_or("no GPU")?;
    let mapping = time_mapping(cuda)?;
    let mut records = Vec::new();
    // Of all models' weights, and of the chunks that these take.
    let (mut weights, mut chunks) = (0, 0);
    let mut kept = Records::new(out, "figures", cuda.gpu_name()?)?;
    println!(
        "model                  MB  GB/s  swap/bare  run ms  /plain /graph  both ms  ratio  bind ms  MB/fn  wrong"
    );
    for (name, path) in &all {
        let mut best: Option<(bool, Measured, &Prepared)> = None;
        for (_, last, prepared) in all_prepared.iter().filter(|(of, ..)| of == name) {
            let measured = match prepared {
                Ok(prepared) => {
                    measure(&runtime, &device, &path.join("model.onnx"), prepared).map(|measured| (measured, prepared))
                }
                Err(error) => Err(error.to_string().into()),
            };
            match measured {
                Ok((measured, prepared)) => {
                    let layout = if *last { "nhwc" } else { "nchw" };
                    records.push(json!({"model": name, "layout": layout, "measured": measured.value.clone()}));
                    if best.as_ref().is_none_or(|(_, best, _)| measured.cost() < best.cost()) {
                        best = Some((*last, measured, prepared));
                    }
                }
                Err(error) => println!("{name} {}: {error}", if *last { "nhwc" } else { "nchw" }),
            }
        }
        let Some((last, mut best, prepared)) = best else { continue };
        let each = one_more(&runtime, &device, prepared)?;
        best.value["bind_bytes"] = json!(each.device);
        best.value["bind_constants_bytes"] = json!(each.constants);
        best.value["bind_twins"] = json!(each.twins);
        let (answer, native) = native::measure(cuda, &path.join("model.onnx"), prepared.dir(), best.answer.len())?;
        let is_wrong = difference(&prepared.manifest().signature, &best.answer, &answer)? >= TOLERANCE;
        best.value["native_bytes"] = json!(native);
        for (count, more) in [("outputs_checked", 1), ("outputs_wrong", u64::from(is_wrong))] {
            best.value[count] = json!(best.value[count].as_u64().unwrap_or(0) + more);
        }
        kept.add(&record::of_model(name, &best.value, &torch[name]))?;
        weights += prepared.manifest().weights_bytes.get();
        chunks += prepared.manifest().weights_bytes.get().next_multiple_of(device.info().chunk.get());
        tell(name, last, &best.value, &torch[name], &each);
        fs::write(
            out.join("figures.json"),
            serde_json::to_vec_pretty(&json!({"records": records, "mapping": mapping, "torch": torch}))?,
        )?;
    }
    let waste = (chunks as f64 / weights as f64 - 1.0) * 100.0;
    kept.add(&[Record::of("chunk_waste", "all", (waste, "%"), None, Goal::AtMost(CHUNK_WASTE_MAX))])?;
    let (constants, scratch) = cuda.arenas();
    println!("constants {constants}, scratch {scratch}, awaits that copied {}", faaswap_engine::await_copies());
    Ok(())
}
