//! Many functions on each GPU: bound, swapped, run in lanes at once, under constant eviction, every output checked.
//!
//! Functions of one model have weights of their own, so that an answer from another one's weights is seen. What an
//! answer must be is what the function said when it was first run, alone; and that is close to what a plain session says.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use faaswap_device::{
    Device, HostWeights,
    cuda::{self, CudaConfig, CudaDevice},
};
use faaswap_engine::{Prepared, Runtime};
use faaswap_protocol::{Bytes, DType};
use faaswap_simulation::random::Random;
use serde_json::json;

use crate::{
    Result,
    model::{self, Asked},
    record::{Record, Records, Target},
    stats::median_ms,
};

/// How a run of it is arranged.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) functions: usize,
    pub(crate) seconds: u64,
    /// Weights on the GPU.
    pub(crate) memory: Bytes,
    pub(crate) threads: usize,
}

/// A function: its program, and what it must answer.
pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) asked: Asked,
    pub(crate) expected: Vec<u8>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    resident: bool,
    /// Where its weights have left or are leaving: told when they have.
    leaving: Option<Receiver<()>>,
}

/// What is on the GPU, by when it was last used.
struct Books {
    free: u64,
    clock: u64,
    resident: BTreeMap<u64, usize>,
}

#[derive(Default)]
struct Counts {
    answers: AtomicU64,
    wrong: AtomicU64,
    swaps: AtomicU64,
    failed: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The weights with the lowest bit of every element turned by a pattern of `variant`; 0 leaves them as they are.
pub(crate) fn variant(prepared: &Prepared, variant: u64) -> Result<HostWeights> {
    let original = HostWeights::open(&prepared.weights_path())?;
    if variant == 0 {
        return Ok(original);
    }
    let mut bytes = original.as_slice().to_vec();
    let mut random = Random::new(variant);
    for weight in &prepared.manifest().initializers {
        let width = match faaswap_engine::onnx::dtype_of(weight.element) {
            Some(DType::F32) => 4,
            Some(DType::F16) => 2,
            Some(_) | None => continue,
        };
        let (start, len) = (usize::try_from(weight.offset)?, usize::try_from(weight.len)?);
        for element in bytes[start..start + len].chunks_exact_mut(width * 64) {
            let turn = random.bits();
            element.iter_mut().step_by(width).enumerate().for_each(|(i, low)| *low ^= (turn >> i & 1) as u8);
        }
    }
    Ok(HostWeights::from_bytes(&bytes)?)
}

/// Where two outputs differ first, and in how many bytes.
fn differences(one: &[u8], other: &[u8]) -> (usize, usize) {
    let places: Vec<_> = (0..one.len().max(other.len())).filter(|&at| one.get(at) != other.get(at)).collect();
    (places.first().copied().unwrap_or(0), places.len())
}

/// Functions that are bound at a time: their weights are made meanwhile, so more than a device binds.
const BINDING: usize = 4;

/// Binds one function and hears what it answers.
fn bind_one(
    runtime: &Runtime,
    device: &Arc<dyn Device>,
    (name, prepared): &(String, Prepared),
    (number, which): (usize, usize),
) -> Result<(Function, [Duration; 2])> {
    let making = Instant::now();
    let weights = Arc::new(variant(prepared, which as u64)?);
    device.prepare_weights(&weights)?;
    let made = making.elapsed();
    let inputs = Arc::new(model::inputs(&prepared.manifest().signature)?);
    let begun = Instant::now();
    let asked = Asked::with(runtime, prepared, device, weights, inputs)?;
    let bound = begun.elapsed();
    asked.swap_in()?;
    let expected = asked.ask()?;
    let again = asked.ask()?;
    asked.swap_out()?;
    if again != expected {
        let (at, count) = differences(&expected, &again);
        return Err(
            format!("{name}/{number}: its second answer is not its first: {count} bytes, from byte {at}").into()
        );
    }
    Ok((Function { name: format!("{name}/{number}"), asked, expected, state: Mutex::default() }, [made, bound]))
}

/// Binds all functions, some at a time; says how long that takes, and how much memory. Those of the first kinds come
/// first, alone: what they load is there for all others.
pub(crate) fn bind_all(
    runtime: &Runtime,
    device: &Arc<dyn Device>,
    all: &[(String, Prepared)],
    n: usize,
) -> Result<Vec<Function>> {
    let cuda = device.as_cuda().ok_or("no GPU")?;
    // What models share does not count: kernels that the first of each load, and the lanes' scratch memory.
    let used = || -> Result<i64> {
        let (free, shared) = (cuda.driver_memory()?.0, cuda.arenas().1);
        Ok(-i64::try_from(free.get())? - i64::try_from(shared.get())?)
    };
    let (next, until) = (AtomicU64::new(0), AtomicU64::new(n.min(2 * all.len()) as u64));
    let some = || -> Result<Vec<(usize, Function, [Duration; 2])>> {
        let mut mine = Vec::new();
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= until.load(Ordering::Relaxed) {
                next.fetch_sub(1, Ordering::Relaxed);
                return Ok(mine);
            }
            let i = usize::try_from(i)?;
            let (function, took) = bind_one(runtime, device, &all[i % all.len()], (i, i / all.len()))?;
            mine.push((i, function, took));
            if (i + 1).is_multiple_of(50) {
                println!("  {} functions bound", i + 1);
            }
        }
    };
    let at_once = || -> Result<Vec<(usize, Function, [Duration; 2])>> {
        let found: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = (0..BINDING).map(|_| scope.spawn(some)).collect();
            threads.into_iter().map(|t| t.join().unwrap_or_else(|_| Err("a thread panicked".into()))).collect()
        });
        Ok(found.into_iter().collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    };
    let mut functions = at_once()?;
    let (before, first, start) = (used()?, functions.len(), Instant::now());
    until.store(n as u64, Ordering::Relaxed);
    functions.extend(at_once()?);
    let (seconds, later) = (start.elapsed().as_secs_f64(), functions.len() - first);
    let each = (used()? - before) as f64 / later.max(1) as f64 / 1e6;
    let mut bound: Vec<_> = functions.iter().map(|(_, _, took)| took[1]).collect();
    let made: Duration = functions.iter().map(|(_, _, took)| took[0]).sum();
    println!(
        "bound {n} functions, {later} of them in {seconds:.1} s, {BINDING} at a time (median {:.1} ms each, {:.0} ms more for making \
         weights); {each:.2} MB of GPU memory each",
        median_ms(&mut bound),
        made.as_secs_f64() * 1e3 / n.max(1) as f64
    );
    functions.sort_by_key(|(i, ..)| *i);
    Ok(functions.into_iter().map(|(_, function, _)| function).collect())
}

/// Brings a function that is locked by the caller, evicting others that nobody has locked, least recently used first.
/// Whether weights had to be brought; the copies may still be under way.
fn bring(functions: &[Function], books: &Mutex<Books>, which: usize, state: &mut State) -> Result<Option<bool>> {
    if let Some(leaving) = state.leaving.take() {
        // A device that is lost says so to the swap-in.
        let _left = leaving.recv();
    }
    let mut books = lock(books);
    books.clock += 1;
    let now = books.clock;
    books.resident.retain(|_, of| *of != which);
    if !state.resident {
        let needed = charge(&functions[which]);
        let candidates: Vec<_> = books.resident.iter().map(|(at, of)| (*at, *of)).collect();
        for (at, of) in candidates {
            if books.free >= needed {
                break;
            }
            let Ok(mut victim) = functions[of].state.try_lock() else { continue };
            let range = functions[of].asked.bound.range().ok_or("no weights")?;
            let (left, leaving) = sync_channel(1);
            // Nobody listens where the run is over.
            let tell = move |_| {
                let _told = left.try_send(());
            };
            functions[of].asked.device.swap_out(range, Box::new(tell))?;
            (victim.resident, victim.leaving) = (false, Some(leaving));
            books.resident.remove(&at);
            books.free += charge(&functions[of]);
        }
        if books.free < needed {
            return Ok(None);
        }
        books.free -= needed;
        let swap = &functions[which].asked;
        let range = swap.bound.range().ok_or("no weights")?;
        swap.device.swap_in(range, Arc::clone(&swap.weights), swap.bound.groups(), Box::new(|_| {}))?;
    }
    books.resident.insert(now, which);
    let brought = !std::mem::replace(&mut state.resident, true);
    Ok(Some(brought))
}

fn charge(function: &Function) -> u64 {
    let chunk = function.asked.device.info().chunk.get();
    function.asked.weights.size().get().next_multiple_of(chunk)
}

fn work(functions: &[Function], books: &Mutex<Books>, counts: &Counts, seed: u64, until: Instant) -> Result<()> {
    let mut random = Random::new(seed);
    while Instant::now() < until {
        // Not all are asked equally often, as anywhere.
        let which = random.below(functions.len()).min(random.below(functions.len()));
        let Ok(mut state) = functions[which].state.try_lock() else { continue };
        let Some(brought) = bring(functions, books, which, &mut state)? else {
            // All memory is under functions that run.
            drop(state);
            thread::yield_now();
            continue;
        };
        counts.swaps.fetch_add(u64::from(brought), Ordering::Relaxed);
        match functions[which].asked.ask() {
            Ok(answer) => {
                counts.answers.fetch_add(1, Ordering::Relaxed);
                if answer != functions[which].expected && counts.wrong.fetch_add(1, Ordering::Relaxed) < 5 {
                    let (at, count) = differences(&functions[which].expected, &answer);
                    let name = &functions[which].name;
                    println!(
                        "WRONG: {name} answered another output than at first: {count} bytes differ, from byte {at}"
                    );
                }
            }
            Err(error) => {
                if counts.failed.fetch_add(1, Ordering::Relaxed) < 5 {
                    println!("FAILED: {}: {error}", functions[which].name);
                }
                return Err(error);
            }
        }
    }
    Ok(())
}

/// What happened on one GPU.
struct Stressed {
    gpu: String,
    functions: usize,
    seconds: f64,
    answers: u64,
    wrong: u64,
    failed: u64,
    swaps: u64,
    /// Device memory that was free before and not afterwards.
    grown: f64,
}

/// Constant eviction over all functions of one GPU, in as many lanes as there are threads.
fn stress_one(runtime: &Runtime, prepared: &[(String, Prepared)], ordinal: u32, plan: Plan) -> Result<Stressed> {
    let device: Arc<dyn Device> =
        CudaDevice::open(&CudaConfig { memory: Some(plan.memory), lanes: 8, ..model::config(ordinal)? })?;
    let cuda = device.as_cuda().ok_or("no GPU")?;
    let functions = bind_all(runtime, &device, prepared, plan.functions)?;
    let books = Mutex::new(Books { free: device.info().capacity.get(), clock: 0, resident: BTreeMap::new() });
    let counts = Counts::default();
    let (before, start) = (cuda.driver_memory()?.0, Instant::now());
    let until = start + Duration::from_secs(plan.seconds);
    let all: Vec<Result<()>> = thread::scope(|scope| {
        let (functions, books, counts) = (&functions, &books, &counts);
        let threads: Vec<_> = (0..plan.threads)
            .map(|i| scope.spawn(move || work(functions, books, counts, i as u64 + 1, until)))
            .collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|_| Err("a thread panicked".into()))).collect()
    });
    let seconds = start.elapsed().as_secs_f64();
    for function in &functions {
        if lock(&function.state).resident {
            function.asked.swap_out()?;
        }
    }
    let grown = before.get() as f64 - cuda.driver_memory()?.0.get() as f64;
    let count = |of: &AtomicU64| of.load(Ordering::Relaxed);
    let told = Stressed {
        gpu: cuda.gpu_name()?,
        functions: functions.len(),
        seconds,
        answers: count(&counts.answers),
        wrong: count(&counts.wrong),
        failed: count(&counts.failed),
        swaps: count(&counts.swaps),
        grown,
    };
    println!(
        "stress on GPU {ordinal}: {} answers of {} functions in {seconds:.0} s ({:.0}/s), {} swap-ins, {} wrong, {} failed, \
         GPU memory grew by {:.1} MB",
        told.answers,
        told.functions,
        told.answers as f64 / seconds,
        told.swaps,
        told.wrong,
        told.failed,
        grown / 1e6
    );
    all.into_iter().collect::<Result<Vec<()>>>()?;
    Ok(told)
}

/// Constant eviction on all GPUs at once.
pub(crate) fn stress(models: &Path, out: &Path, plan: Plan) -> Result<()> {
    let runtime = model::runtime()?;
    let prepared = model::prepared(&models.join("prepared"))?;
    let gpus = u32::try_from(cuda::count()?)?;
    let all: Vec<Result<Stressed>> = thread::scope(|scope| {
        let (runtime, prepared) = (&runtime, &prepared);
        let threads: Vec<_> =
            (0..gpus).map(|ordinal| scope.spawn(move || stress_one(runtime, prepared, ordinal, plan))).collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|_| Err("a thread panicked".into()))).collect()
    });
    let all = all.into_iter().collect::<Result<Vec<_>>>()?;
    let sum = |of: fn(&Stressed) -> u64| all.iter().map(of).sum::<u64>();
    let (answers, wrong) = (sum(|s| s.answers), sum(|s| s.wrong));
    let gpu = all.first().map(|first| first.gpu.clone()).ok_or("no GPU")?;
    let each: Vec<_> = all
        .iter()
        .map(|s| {
            json!({"functions": s.functions, "answers": s.answers, "wrong": s.wrong, "failed": s.failed,
                   "swaps_in": s.swaps, "seconds": s.seconds, "memory_grown_bytes": s.grown})
        })
        .collect();
    std::fs::write(out.join("stress.json"), serde_json::to_vec_pretty(&each)?)?;
    let grown = all.iter().map(|s| s.grown).fold(0.0, f64::max);
    Records::new(out, "stress", gpu)?.add(&[
        Record::of("stress_wrong_outputs", "all", (wrong as f64, "outputs"), None, Target::AtMost(0.0))
            .counting(answers, wrong),
        Record::of("stress_memory_growth", "all", (grown / 1e6, "MB"), None, Target::Told),
    ])?;
    if wrong > 0 { Err(format!("{wrong} of {answers} outputs are wrong").into()) } else { Ok(()) }
}
