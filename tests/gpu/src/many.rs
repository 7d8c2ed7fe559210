//! Many functions on one GPU, bound some at a time.
//!
//! Functions of one model have weights of their own, so that an answer from another one's weights is seen. What an
//! answer must be is what the function said when it was first run, alone; and that is close to what a plain session says.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use faaswap_device::{Device, HostWeights};
use faaswap_engine::{Prepared, Runtime};
use faaswap_protocol::DType;
use faaswap_simulation::random::Random;

use crate::{
    Result,
    model::{self, Asked},
    stats::median_ms,
};

/// A function: its program, and what it must answer.
pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) asked: Asked,
    pub(crate) expected: Vec<u8>,
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
pub(crate) fn differences(one: &[u8], other: &[u8]) -> (usize, usize) {
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
    Ok((Function { name: format!("{name}/{number}"), asked, expected }, [made, bound]))
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
