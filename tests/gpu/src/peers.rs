//! Two GPUs: a model that one holds is brought to the other from there, and runs there while it comes.

use std::{path::Path, sync::Arc, sync::mpsc, time::Instant};

use faaswap_device::{
    Device,
    cuda::{self, CudaConfig, CudaDevice},
};
use faaswap_protocol::Bytes;
use serde_json::json;

use crate::{
    Result,
    model::{self, Asked},
    record::{Record, Records, Target},
    stats::median,
};

const ROUNDS: usize = 15;

/// Each model: bare speed from GPU to GPU as a swap, and a request that overlaps it beside a resident one.
pub(crate) fn run(models: &Path, out: &Path, names: &[&str]) -> Result<()> {
    if cuda::count()? < 2 {
        println!("peers: this needs two GPUs");
        return Ok(());
    }
    let runtime = model::runtime()?;
    let (mut records, mut kept) = (Vec::new(), Vec::new());
    for name in names {
        let all = model::prepared(&models.join("prepared"))?;
        let Some((_, prepared)) = all.into_iter().find(|(of, _)| of == name) else { continue };
        let memory = Some(Bytes::new(prepared.manifest().weights_bytes.get() + (64 << 20)));
        let open = |ordinal: u32| -> Result<Arc<dyn Device>> {
            let config =
                CudaConfig { memory, lanes: 1, peers: vec![0, 1], detours: vec![0, 1], ..model::config(ordinal)? };
            Ok(CudaDevice::open(&config)?)
        };
        let (holder, other) = (open(0)?, open(1)?);
        let plain =
            cuda::measure_links(&[0, 1])?.peers[0][1].map(|peer| (peer.rate.0 / 1e9, "plain copy between GPUs"));
        let held = Asked::new(&runtime, &prepared, &holder)?;
        let asked = Asked::with(&runtime, &prepared, &other, Arc::clone(&held.weights), Arc::clone(&held.inputs))?;
        held.swap_in()?;
        let expected = held.ask()?;
        let (from, to) = (held.bound.range().ok_or("no weights")?, asked.bound.range().ok_or("no weights")?);
        let (mut copies, mut requests, mut resident, mut wrong) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for _ in 0..ROUNDS {
            let (tell, done) = mpsc::channel();
            let report = Box::new(move |result| drop(tell.send(result)));
            let start = Instant::now();
            let weights = Arc::clone(&asked.weights);
            other.swap_in_from((holder.as_ref(), from), to, weights, asked.bound.groups(), report)?;
            wrong += usize::from(asked.ask()? != expected);
            requests.push(start.elapsed().as_secs_f64() * 1e3);
            copies.push(done.recv()??.took.as_secs_f64() * 1e3);
            let start = Instant::now();
            wrong += usize::from(asked.ask()? != expected);
            resident.push(start.elapsed().as_secs_f64() * 1e3);
            asked.swap_out()?;
        }
        let (mut one, mut two) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            one.push(asked.swap_in()?.took.as_secs_f64() * 1e3);
            asked.swap_out()?;
            let (tell, done) = mpsc::channel();
            let report = Box::new(move |result| drop(tell.send(result)));
            let (weights, groups) = (Arc::clone(&asked.weights), asked.bound.groups());
            other.swap_in_over_both(holder.as_ref(), to, weights, groups, report)?;
            wrong += usize::from(asked.ask()? != expected);
            two.push(done.recv()??.took.as_secs_f64() * 1e3);
            asked.swap_out()?;
        }
        let together = both_at_once(&held, &asked)?;
        let (one, two) = (median(&mut one), median(&mut two));
        println!("peers: {name:20} over one link {one:.3} ms, over two {two:.3} ms ({:.3}x)", two / one);
        let bytes = asked.weights.size().get() as f64;
        let (copy, request, resident) = (median(&mut copies), median(&mut requests), median(&mut resident));
        println!(
            "peers: {name:20} {:6.1} GB/s, request {request:.3} ms, resident {resident:.3} ms ({:.3}x), {wrong} wrong",
            bytes / 1e6 / copy,
            request / resident
        );
        records.push(json!({"model": name, "gb_per_s": bytes / 1e6 / copy, "request_ms": request,
            "resident_ms": resident, "one_link_ms": one, "two_links_ms": two, "wrong": wrong, "checked": 3 * ROUNDS}));
        let target = if name.starts_with("bert") { Target::AtMost(1.15) } else { Target::Told };
        let request = (request, "ms");
        let request = Record::of("peer_swap_request", name, request, Some((resident, "resident request")), target);
        let speed = (bytes / 1e6 / copy, "GB/s");
        kept.push(Record::of("peer_swap_bandwidth", name, speed, plain, Target::AtLeast(0.85)));
        kept.push(request.counting(3 * ROUNDS as u64, wrong as u64));
        let target = if name.starts_with("bert") { Target::AtMost(0.60) } else { Target::Told };
        println!("peers: {name:20} a swap on each GPU at once takes {together:.3}x of one alone");
        let slower = (together, "of the time alone");
        kept.push(Record::of("two_swaps_at_once", name, slower, None, Target::AtMost(1.10)));
        kept.push(Record::of("two_link_load", name, (two, "ms"), Some((one, "one link")), target));
        Records::new(out, "peers", holder.as_cuda().ok_or("no GPU")?.gpu_name()?)?.add(&kept)?;
        std::fs::write(out.join("peers.json"), serde_json::to_vec_pretty(&records)?)?;
        if wrong > 0 {
            return Err(format!("{name}: {wrong} wrong outputs after a swap from the other GPU").into());
        }
    }
    Ok(())
}

/// How much longer a swap takes on both GPUs at once than on one alone, from host memory.
fn both_at_once(held: &Asked, asked: &Asked) -> Result<f64> {
    let (mut alone, mut together) = (Vec::new(), Vec::new());
    held.swap_out()?;
    for _ in 0..ROUNDS {
        for one in [held, asked] {
            alone.push(one.swap_in()?.took.as_secs_f64());
            one.swap_out()?;
        }
        let begun = [held.begin_swap_in()?, asked.begin_swap_in()?];
        for done in begun {
            together.push(done.recv()??.took.as_secs_f64());
        }
        held.swap_out()?;
        asked.swap_out()?;
    }
    Ok(median(&mut together) / median(&mut alone))
}
