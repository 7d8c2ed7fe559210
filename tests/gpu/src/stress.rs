//! Many functions on each GPU, swapped and run in lanes at once, under constant eviction, every output checked, memory watched.

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
    Device,
    cuda::{self, CudaConfig, CudaDevice},
};
use faaswap_engine::{Prepared, Runtime};
use faaswap_protocol::Bytes;
use faaswap_simulation::random::Random;
use serde_json::json;

use crate::{
    Result,
    many::{self, Function, differences},
    model,
    node::own_memory,
    prepared,
    record::{Record, Records, Target},
};

/// Most that memory may grow, in percent.
const GROWTH_MAX: f64 = 1.0;

/// How a run of it is arranged.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) functions: usize,
    pub(crate) seconds: u64,
    /// Weights on the GPU.
    pub(crate) memory: Bytes,
    pub(crate) threads: usize,
}

#[derive(Default)]
struct State {
    resident: bool,
    /// Where its weights have left or are leaving: told when they have.
    leaving: Option<Receiver<()>>,
}

/// A function, and where its weights are.
struct Held {
    function: Function,
    state: Mutex<State>,
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

/// Brings a function that is locked by the caller, evicting others that nobody has locked, least recently used first.
/// Whether weights had to be brought; the copies may still be under way.
fn bring(functions: &[Held], books: &Mutex<Books>, which: usize, state: &mut State) -> Result<Option<bool>> {
    if let Some(leaving) = state.leaving.take() {
        // A device that is lost says so to the swap-in.
        let _left = leaving.recv();
    }
    let mut books = lock(books);
    books.clock += 1;
    let now = books.clock;
    books.resident.retain(|_, of| *of != which);
    if !state.resident {
        let needed = charge(&functions[which].function);
        let candidates: Vec<_> = books.resident.iter().map(|(at, of)| (*at, *of)).collect();
        for (at, of) in candidates {
            if books.free >= needed {
                break;
            }
            let Ok(mut victim) = functions[of].state.try_lock() else { continue };
            let range = functions[of].function.asked.bound.range().ok_or("no weights")?;
            let (left, leaving) = sync_channel(1);
            // Nobody listens where the run is over.
            let tell = move |_| {
                let _told = left.try_send(());
            };
            functions[of].function.asked.device.swap_out(range, Box::new(tell))?;
            (victim.resident, victim.leaving) = (false, Some(leaving));
            books.resident.remove(&at);
            books.free += charge(&functions[of].function);
        }
        if books.free < needed {
            return Ok(None);
        }
        books.free -= needed;
        let swap = &functions[which].function.asked;
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

fn work(functions: &[Held], books: &Mutex<Books>, counts: &Counts, seed: u64, until: Instant) -> Result<()> {
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
        match functions[which].function.asked.ask() {
            Ok(answer) => {
                counts.answers.fetch_add(1, Ordering::Relaxed);
                if answer != functions[which].function.expected && counts.wrong.fetch_add(1, Ordering::Relaxed) < 5 {
                    let (at, count) = differences(&functions[which].function.expected, &answer);
                    let name = &functions[which].function.name;
                    println!(
                        "WRONG: {name} answered another output than at first: {count} bytes differ, from byte {at}"
                    );
                }
            }
            Err(error) => {
                if counts.failed.fetch_add(1, Ordering::Relaxed) < 5 {
                    println!("FAILED: {}: {error}", functions[which].function.name);
                }
                return Err(error);
            }
        }
    }
    Ok(())
}

/// One GPU with all of its functions.
struct Node {
    ordinal: u32,
    device: Arc<dyn Device>,
    functions: Vec<Held>,
}

/// What happened on one GPU.
struct Stressed {
    seconds: f64,
    answers: u64,
    wrong: u64,
    failed: u64,
    swaps: u64,
}

impl Node {
    fn bind(runtime: &Runtime, prepared: &[(String, Prepared)], ordinal: u32, plan: Plan) -> Result<Self> {
        let device: Arc<dyn Device> =
            CudaDevice::open(&CudaConfig { memory: Some(plan.memory), lanes: 8, ..model::config(ordinal)? })?;
        let bound = many::bind_all(runtime, &device, prepared, plan.functions)?;
        let functions = bound.into_iter().map(|function| Held { function, state: Mutex::default() }).collect();
        Ok(Self { ordinal, device, functions })
    }

    /// Device memory in use, by the driver.
    fn used(&self) -> Result<u64> {
        let (free, total) = self.device.as_cuda().ok_or("no GPU")?.driver_memory()?;
        Ok(total.get().saturating_sub(free.get()))
    }

    /// Constant eviction over all functions.
    fn stress(&self, plan: Plan) -> Result<Stressed> {
        let capacity = self.device.info().capacity.get();
        let books = Mutex::new(Books { free: capacity, clock: 0, resident: BTreeMap::new() });
        let (counts, start) = (Counts::default(), Instant::now());
        let until = start + Duration::from_secs(plan.seconds);
        let all: Vec<Result<()>> = thread::scope(|scope| {
            let (functions, books, counts) = (&self.functions, &books, &counts);
            let threads: Vec<_> = (0..plan.threads)
                .map(|i| scope.spawn(move || work(functions, books, counts, i as u64 + 1, until)))
                .collect();
            threads.into_iter().map(|t| t.join().unwrap_or_else(|_| Err("a thread panicked".into()))).collect()
        });
        let seconds = start.elapsed().as_secs_f64();
        for held in &self.functions {
            if lock(&held.state).resident {
                held.function.asked.swap_out()?;
            }
        }
        let count = |of: &AtomicU64| of.load(Ordering::Relaxed);
        let (answers, wrong) = (count(&counts.answers), count(&counts.wrong));
        let (failed, swaps) = (count(&counts.failed), count(&counts.swaps));
        println!(
            "stress on GPU {}: {answers} answers of {} functions in {seconds:.0} s ({:.0}/s), {swaps} swap-ins, {wrong} wrong, \
             {failed} failed",
            self.ordinal,
            self.functions.len(),
            answers as f64 / seconds,
        );
        all.into_iter().collect::<Result<Vec<()>>>()?;
        Ok(Stressed { seconds, answers, wrong, failed, swaps })
    }
}

/// Memory in use: of each GPU, and of this process beside what it shares.
struct Memory {
    gpus: Vec<u64>,
    process: u64,
}

impl Memory {
    fn seen(nodes: &[Node]) -> Result<Self> {
        Ok(Self { gpus: nodes.iter().map(Node::used).collect::<Result<_>>()?, process: own_memory("self")? })
    }

    /// By how many percent the GPU that grew most, and the process, have grown since.
    fn growth(&self, later: &Self) -> [f64; 2] {
        let percent = |before: u64, after: u64| (after as f64 / before.max(1) as f64 - 1.0) * 100.0;
        let gpus = self.gpus.iter().zip(&later.gpus).map(|(before, after)| percent(*before, *after));
        [gpus.fold(f64::NEG_INFINITY, f64::max), percent(self.process, later.process)]
    }
}

/// Does work for each GPU on a thread of its own, and other work meanwhile on this one.
fn on_each<G: Sync, T: Send, M>(
    gpus: &[G],
    work: impl Fn(&G) -> Result<T> + Sync,
    meanwhile: impl FnOnce() -> M,
) -> Result<(Vec<T>, M)> {
    let (done, met): (Vec<Result<T>>, M) = thread::scope(|scope| {
        let threads: Vec<_> = gpus.iter().map(|gpu| scope.spawn(|| work(gpu))).collect();
        let met = meanwhile();
        let join = |thread: thread::ScopedJoinHandle<'_, _>| thread.join();
        (threads.into_iter().map(|t| join(t).unwrap_or_else(|_| Err("a thread panicked".into()))).collect(), met)
    });
    Ok((done.into_iter().collect::<Result<_>>()?, met))
}

/// Constant eviction on all GPUs at once, once all functions are bound on each.
pub(crate) fn run(models: &Path, out: &Path, plan: Plan) -> Result<()> {
    let runtime = model::runtime()?;
    let prepared = prepared::all(models)?;
    let ordinals: Vec<u32> = (0..u32::try_from(cuda::count()?)?).collect();
    let (nodes, ()) = on_each(&ordinals, |&ordinal| Node::bind(&runtime, &prepared, ordinal, plan), || ())?;
    let part = Duration::from_secs(plan.seconds) / 10;
    let (all, seen) = on_each(
        &nodes,
        |node| node.stress(plan),
        || {
            // All is in use by then, and still is.
            thread::sleep(part);
            let before = Memory::seen(&nodes)?;
            thread::sleep(part * 8);
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(before.growth(&Memory::seen(&nodes)?))
        },
    )?;
    let [gpu_growth, process_growth] = seen?;
    let sum = |of: fn(&Stressed) -> u64| all.iter().map(of).sum::<u64>();
    let (answers, wrong) = (sum(|s| s.answers), sum(|s| s.wrong));
    println!(
        "memory grew by {gpu_growth:+.3} % on the GPU where it did most, by {process_growth:+.3} % in the process"
    );
    let each = all.iter().zip(&nodes).map(|(s, node)| {
        json!({"functions": node.functions.len(), "answers": s.answers, "wrong": s.wrong, "failed": s.failed,
               "swaps_in": s.swaps, "seconds": s.seconds})
    });
    std::fs::write(out.join("stress.json"), serde_json::to_vec_pretty(&each.collect::<Vec<_>>())?)?;
    let gpu = nodes.first().and_then(|node| node.device.as_cuda()).ok_or("no GPU")?.gpu_name()?;
    let percent = |figure, value| Record::of(figure, "all", (value, "%"), None, Target::AtMost(GROWTH_MAX));
    Records::new(out, "stress", gpu)?.add(&[
        Record::of("stress_wrong_outputs", "all", (wrong as f64, "outputs"), None, Target::AtMost(0.0))
            .counting(answers, wrong),
        percent("stress_memory_growth", gpu_growth),
        percent("stress_process_growth", process_growth),
    ])?;
    if wrong > 0 { Err(format!("{wrong} of {answers} outputs are wrong").into()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_that_of_the_gpu_that_grew_most() {
        let memory = |gpus: [u64; 2], process| Memory { gpus: gpus.to_vec(), process };
        let [gpus, process] = memory([1000, 2000], 400).growth(&memory([990, 2010], 396));
        assert!((gpus - 0.5).abs() < 1e-9 && (process + 1.0).abs() < 1e-9, "{gpus} {process}");
    }

    #[test]
    fn what_fails_on_one_gpu_is_told() {
        let work = |gpu: &u32| if *gpu == 1 { Err("broken".into()) } else { Ok(*gpu) };
        assert!(on_each(&[0, 1], work, || ()).is_err());
        assert_eq!(on_each(&[0, 2], work, || 7).ok(), Some((vec![0, 2], 7)));
    }
}
