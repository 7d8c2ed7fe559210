//! Several GPUs: a model that one holds is brought to another from there and runs there while it comes, one heavy model comes over
//! several GPUs' links at once, and every GPU swaps at once.

use std::{path::Path, sync::Arc, time::Instant};

use faaswap_device::{
    Device,
    cuda::{self, CudaConfig, CudaDevice},
};
use faaswap_engine::{Prepared, Runtime};
use faaswap_protocol::Bytes;
use serde_json::json;

use crate::{
    Result,
    model::{self, Asked},
    prepared,
    record::{Record, Records, Target},
    stats::median,
};

const ROUNDS: usize = 15;
/// Device memory beside the weights: what does not fill its chunks.
const SPARE: Bytes = Bytes::mib(64);
/// Chunks that are mapped at a time: 128 MiB.
const MAPPED_CHUNKS: usize = 8;
/// The model that the goals are about.
const HEAVY: &str = "bert";

/// One model on every GPU, with an output that all must give.
struct Everywhere {
    /// The first GPU's holds the weights of the others.
    all: Vec<Asked>,
    expected: Vec<u8>,
    checked: u64,
    wrong: u64,
}

/// Each model: bare speed from GPU to GPU as a swap, a request that overlaps it beside a resident one, loads over several
/// links, and a swap on every GPU at once.
pub(crate) fn run(models: &Path, out: &Path, names: &[&str]) -> Result<()> {
    let count = cuda::count()?;
    if count < 2 {
        println!("peers: this needs two GPUs");
        return Ok(());
    }
    let runtime = model::runtime()?;
    let ordinals: Vec<u32> = (0..u32::try_from(count)?).collect();
    let all = prepared::all(models)?;
    let chosen: Vec<_> = names.iter().filter_map(|name| all.iter().find(|(of, _)| of == name)).collect();
    let largest = chosen.iter().map(|(_, prepared)| prepared.manifest().weights_bytes.get()).max().unwrap_or(0);
    let open = |&ordinal: &u32| -> Result<Arc<dyn Device>> {
        let (memory, peers, detours) = (Some(Bytes::new(largest + SPARE.get())), ordinals.clone(), ordinals.clone());
        Ok(CudaDevice::open(&CudaConfig { memory, lanes: 1, peers, detours, ..model::config(ordinal)? })?)
    };
    // Opened once, as a broker does.
    let devices = ordinals.iter().map(open).collect::<Result<Vec<_>>>()?;
    let plain = cuda::measure_links(&ordinals)?.peers[0][1].map(|peer| (peer.rate.0 / 1e9, "plain copy between GPUs"));
    let (mut records, mut kept) = (Vec::new(), Vec::new());
    for (name, prepared) in chosen {
        let mut all = Everywhere::bind(&runtime, prepared, &devices)?;
        let mut found = all.peer_to_peer(name, plain)?;
        found.extend(all.over_links(name)?);
        found.push(all.all_at_once(name)?);
        found.extend(all.mapping(name)?);
        // The requests of all figures were compared.
        let (checked, wrong) = (all.checked, all.wrong);
        found[0] = found[0].clone().counting(checked, wrong);
        kept.extend(found);
        records.push(json!({"model": name, "gpus": ordinals.len(), "wrong": wrong, "checked": checked}));
        let gpu = all.all[0].device.as_cuda().ok_or("no GPU")?.gpu_name()?;
        Records::new(out, "peers", gpu)?.add(&kept)?;
        std::fs::write(out.join("peers.json"), serde_json::to_vec_pretty(&records)?)?;
        if wrong > 0 {
            return Err(format!("{name}: {wrong} of {checked} outputs are wrong").into());
        }
    }
    Ok(())
}

impl Everywhere {
    fn bind(runtime: &Runtime, prepared: &Prepared, devices: &[Arc<dyn Device>]) -> Result<Self> {
        let mut all = vec![Asked::new(runtime, prepared, &devices[0])?];
        for device in &devices[1..] {
            let (weights, inputs) = (Arc::clone(&all[0].weights), Arc::clone(&all[0].inputs));
            all.push(Asked::with(runtime, prepared, device, weights, inputs)?);
        }
        all[0].swap_in()?;
        let expected = all[0].ask()?;
        all[0].swap_out()?;
        Ok(Self { all, expected, checked: 0, wrong: 0 })
    }

    /// Asks on one GPU, and compares; milliseconds since `start`.
    fn ask(&mut self, on: usize, start: Instant) -> Result<f64> {
        let output = self.all[on].ask()?;
        let took = start.elapsed().as_secs_f64() * 1e3;
        self.checked += 1;
        self.wrong += u64::from(output != self.expected);
        Ok(took)
    }

    fn peer_to_peer(&mut self, name: &str, plain: Option<(f64, &'static str)>) -> Result<Vec<Record>> {
        let (mut copies, mut requests, mut resident) = (Vec::new(), Vec::new(), Vec::new());
        self.all[0].swap_in()?;
        for _ in 0..ROUNDS {
            let (holder, asked) = (&self.all[0], &self.all[1]);
            let (from, to) = (holder.bound.range().ok_or("no weights")?, asked.bound.range().ok_or("no weights")?);
            let (tell, done) = model::reporter();
            let start = Instant::now();
            let (weights, groups) = (Arc::clone(&asked.weights), asked.bound.groups());
            asked.device.swap_in_from((holder.device.as_ref(), from), to, weights, groups, tell)?;
            requests.push(self.ask(1, start)?);
            copies.push(done.recv()??.took.as_secs_f64() * 1e3);
            resident.push(self.ask(1, Instant::now())?);
            self.all[1].swap_out()?;
        }
        self.all[0].swap_out()?;
        let bytes = self.all[0].weights.size().get() as f64;
        let (copy, request, resident) = (median(&mut copies), median(&mut requests), median(&mut resident));
        let speed = bytes / 1e6 / copy;
        println!(
            "peers: {name:20} {speed:6.1} GB/s, request {request:.3} ms, resident {resident:.3} ms ({:.3}x)",
            request / resident
        );
        let resident = Some((resident, "resident request"));
        let request = Record::of("peer_swap_request", name, (request, "ms"), resident, goal(name, 1.15));
        Ok(vec![request, Record::of("peer_swap_bandwidth", name, (speed, "GB/s"), plain, Target::AtLeast(0.85))])
    }

    /// The second GPU's model over its own link alone, and over those of one, two, and more others besides.
    fn over_links(&mut self, name: &str) -> Result<Vec<Record>> {
        const FIGURES: [&str; 3] = ["two_link_load", "three_link_load", "four_link_load"];
        let helpers: Vec<usize> = (0..self.all.len()).filter(|&other| other != 1).take(FIGURES.len()).collect();
        let mut took = vec![Vec::new(); helpers.len() + 1];
        for _ in 0..ROUNDS {
            for (links, took) in took.iter_mut().enumerate() {
                let asked = &self.all[1];
                let others: Vec<&dyn Device> =
                    helpers[..links].iter().map(|&other| self.all[other].device.as_ref()).collect();
                let (tell, done) = model::reporter();
                let to = asked.bound.range().ok_or("no weights")?;
                let (weights, groups) = (Arc::clone(&asked.weights), asked.bound.groups());
                asked.device.swap_in_over(&others, to, weights, groups, tell)?;
                self.ask(1, Instant::now())?;
                took.push(done.recv()??.took.as_secs_f64() * 1e3);
                self.all[1].swap_out()?;
            }
        }
        let medians: Vec<f64> = took.iter_mut().map(|took| median(took)).collect();
        let record = |(number, (&ms, figure)): (usize, (&f64, &'static str))| {
            println!("peers: {name:20} over {} links {ms:.3} ms ({:.3}x of one)", number + 2, ms / medians[0]);
            let target = if number == 0 { goal(name, 0.60) } else { Target::Told };
            Record::of(figure, name, (ms, "ms"), Some((medians[0], "one link")), target)
        };
        Ok(medians[1..].iter().zip(FIGURES).enumerate().map(record).collect())
    }

    /// How much longer a swap takes on all GPUs at once than on one alone, from host memory.
    fn all_at_once(&mut self, name: &str) -> Result<Record> {
        let (mut alone, mut together) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            for one in &self.all {
                alone.push(one.swap_in()?.took.as_secs_f64());
                one.swap_out()?;
            }
            let begun = self.all.iter().map(Asked::begin_swap_in).collect::<Result<Vec<_>>>()?;
            for done in begun {
                together.push(done.recv()??.took.as_secs_f64());
            }
            for on in 0..self.all.len() {
                self.ask(on, Instant::now())?;
                self.all[on].swap_out()?;
            }
        }
        let slower = median(&mut together) / median(&mut alone);
        let count = self.all.len();
        println!("peers: {name:20} a swap on each of {count} GPUs at once takes {slower:.3}x of one alone");
        let (figure, target) = if count == 2 {
            ("two_swaps_at_once", Target::AtMost(1.10))
        } else {
            ("swaps_on_all_at_once", Target::Told)
        };
        Ok(Record::of(figure, name, (slower, "of the time alone"), None, target))
    }
}

/// What is copied while memory is mapped on the first GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Beside {
    Nothing,
    /// A model to that GPU.
    Itself,
    /// A model to another one.
    Another,
}

impl Everywhere {
    /// How long it takes on one GPU to put memory behind addresses, make it accessible and take it away, while copies go there, or to
    /// another GPU of this process.
    fn mapping(&self, name: &str) -> Result<Vec<Record>> {
        let cuda = self.all[0].device.as_cuda().ok_or("no GPU")?;
        let mut all = Vec::new();
        for beside in [Beside::Nothing, Beside::Itself, Beside::Another] {
            let mut took = [const { Vec::new() }; 3];
            for _ in 0..ROUNDS {
                let copied = match beside {
                    Beside::Nothing => None,
                    Beside::Itself => Some(&self.all[0]),
                    Beside::Another => Some(&self.all[1]),
                };
                let done = copied.map(Asked::begin_swap_in).transpose()?;
                let timed = cuda.time_mapping(cuda::CHUNK_DEFAULT, MAPPED_CHUNKS)?;
                took.iter_mut().zip(timed).for_each(|(took, time)| took.push(time.as_secs_f64() * 1e3));
                if let (Some(done), Some(copied)) = (done, copied) {
                    done.recv()??;
                    copied.swap_out()?;
                }
            }
            let [map, open, unmap] = took.map(|mut took| median(&mut took));
            println!(
                "peers: {name:20} {MAPPED_CHUNKS} chunks beside copies to {beside:?}: mapped in {map:.3} ms, opened in {open:.3}, unmapped in {unmap:.3}"
            );
            all.push(map + open + unmap);
        }
        let alone = Some((all[0], "beside no copies"));
        let record = |figure, ms: f64| Record::of(figure, name, (ms, "ms"), alone, Target::Told);
        Ok(vec![record("mapping_beside_own_copies", all[1]), record("mapping_beside_others_copies", all[2])])
    }
}

/// The goals are about one model.
fn goal(name: &str, most: f64) -> Target {
    if name.starts_with(HEAVY) { Target::AtMost(most) } else { Target::Told }
}
