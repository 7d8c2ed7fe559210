//! What the broker's memory does over many requests, and what functions cost that nobody calls.

use std::{
    fs,
    path::PathBuf,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use faaswap_engine::{Input, InputData, PlainSession};
use faaswap_protocol::{DType, Shape};
use rustix::process::Pid;
use tokio::task::JoinSet;

use super::{Figures, service, title};
use crate::{
    Result, Trouble, cache, models,
    node::{Broker, BrokerOptions, DeviceOptions},
    process::temporary_folder,
};

/// Requests over which memory must stay flat, the first of which are not counted.
const REQUESTS: usize = 100_000;
const SETTLED_AFTER: usize = 10_000;
const IN_FLIGHT: usize = 16;
/// Models that take turns on a device that holds half of them.
const MODELS: u64 = 4;
const SIDE: u64 = 128;
/// Functions that nobody calls.
const FUNCTIONS: u64 = 1000;
const IDLE_SIDE: u64 = 64;
/// How long idleness is watched.
const WATCH: Duration = Duration::from_secs(10);

/// Resident memory of a process in KiB.
pub(super) fn rss_kib(pid: Pid) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse().ok());
    number.ok_or_else(|| Trouble::new("the process has no memory"))
}

/// Processor time of a process in seconds.
fn cpu_seconds(pid: Pid) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()))?;
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    #[expect(clippy::cast_precision_loss, reason = "100, usually")]
    let per_second = rustix::param::clock_ticks_per_second() as f64;
    Ok((ticks(11) + ticks(12)) / per_second)
}

pub(super) fn many_requests(figures: &mut Figures) -> Result<()> {
    title(&format!("broker memory over {REQUESTS} requests, {IN_FLIGHT} in flight, {MODELS} models swapping"));
    let folder = temporary_folder(&std::env::temp_dir())?;
    let mut broker = Broker::start(&BrokerOptions::new(vec![DeviceOptions::new("host0", "512KiB")]))?;
    let runtime = service::runtime()?;
    let pid = broker.process().id();
    let x: Vec<u8> = (0..SIDE).flat_map(|i| (f32::from(u8::try_from(i).unwrap_or(0)) / 50.0).to_le_bytes()).collect();
    let shape = Shape::new([1, SIDE]).map_err(|e| Trouble::new(e.to_string()))?;
    let (mut clients, mut expected) = (Vec::new(), Vec::new());
    for seed in 0..MODELS {
        let path = folder.path().join(format!("{seed}.onnx"));
        models::write(&models::matmul(SIDE, seed), &path)?;
        let plain = PlainSession::open(&cache::runtime()?, &path, false)?;
        expected
            .push(plain.run(&[Input { dtype: DType::F32, shape: &shape, data: InputData::Bytes(&x) }])?.remove(0).1);
        clients.push(runtime.block_on(async {
            let client = service::start(&broker, &format!("m{seed}"), &path)?;
            service::ready(&client).await?;
            Ok::<_, Trouble>(Arc::new(client))
        })?);
    }
    let request = service::request(DType::F32, &[1, SIDE], Bytes::from(x))?;
    let mut settled = 0.0;
    let start = Instant::now();
    for batch in 0..REQUESTS / IN_FLIGHT {
        // Bursts of one model: some requests find it resident, the first of a burst swaps it in.
        let which = batch / 4 % clients.len();
        let (client, expected) = (&clients[which], &expected[which]);
        let answers = runtime.block_on(async {
            let mut asked = JoinSet::new();
            for _ in 0..IN_FLIGHT {
                let (client, request) = (Arc::clone(client), request.clone());
                asked.spawn(async move { service::infer(&client, &request).await.map(|answer| answer.outputs) });
            }
            asked.join_all().await
        });
        for outputs in answers {
            figures.check(outputs?[0].data[..] == expected[..]);
        }
        if batch * IN_FLIGHT <= SETTLED_AFTER {
            settled = rss_kib(pid)?;
        }
    }
    let took = start.elapsed().as_secs_f64();
    let end = rss_kib(pid)?;
    let growth = (end / settled - 1.0) * 100.0;
    let swaps = broker.metric("faaswap_swaps_in_total")?;
    println!("  RSS {settled:.0} KiB after {SETTLED_AFTER}, {end:.0} KiB at the end: {growth:+.2} %");
    #[expect(clippy::cast_precision_loss, reason = "a count")]
    let rate = REQUESTS as f64 / took;
    println!("  {rate:.0} requests/s, {swaps:.0} swaps in");
    figures.set("rss_growth_percent", growth);
    Ok(())
}

pub(super) fn idle_functions(figures: &mut Figures) -> Result<()> {
    title(&format!("{FUNCTIONS} registered functions that nobody calls, each with a model of its own"));
    let folder = temporary_folder(&std::env::temp_dir())?;
    let paths: Vec<PathBuf> = (0..FUNCTIONS).map(|seed| folder.path().join(format!("{seed}.onnx"))).collect();
    for (path, seed) in paths.iter().zip(0..) {
        models::write(&models::matmul(IDLE_SIDE, seed), path)?;
    }
    let mut broker = Broker::start(&BrokerOptions::new(vec![DeviceOptions::new("host0", "8MiB")]))?;
    let runtime = service::runtime()?;
    let cold = register(&runtime, &broker, &paths)?;
    println!("  first time, every model prepared: {:.1} s", cold.as_secs_f64());
    figures.set("idle_first_start_s", cold.as_secs_f64());
    broker.start_again()?;
    broker.wait_ready()?;
    let before = rss_kib(broker.process().id())?;
    let warm = runtime.block_on(async {
        let start = Instant::now();
        let clients = start_all(&broker, &paths).await?;
        Ok::<_, Trouble>((start.elapsed(), clients))
    })?;
    let pid = broker.process().id();
    let after = rss_kib(pid)?;
    let weights = broker.metric("faaswap_host_weights_bytes")? / 1024.0;
    #[expect(clippy::cast_precision_loss, reason = "a thousand")]
    let functions = FUNCTIONS as f64;
    let each = (after - before - weights) / functions;
    // The clients sleep too: nothing is driven while this thread does.
    let used = cpu_seconds(pid)?;
    thread::sleep(WATCH);
    let share = (cpu_seconds(pid)? - used) / WATCH.as_secs_f64() * 100.0;
    println!("  start-up with prepared models: {:.1} s", warm.0.as_secs_f64());
    println!("  RSS {before:.0} KiB before, {after:.0} KiB after, {weights:.0} KiB of it weights: {each:.1} KiB each");
    println!("  idle processor time: {share:.2} % of a core");
    figures.set("idle_start_s", warm.0.as_secs_f64());
    figures.set("idle_function_rss_kb", each * 1.024);
    figures.set("idle_cpu_percent", share);
    one_of_them(figures, &runtime, &warm.1, &paths)
}

type Clients = Vec<faaswap_sidecar::broker::Broker>;

fn register(runtime: &tokio::runtime::Runtime, broker: &Broker, paths: &[PathBuf]) -> Result<Duration> {
    runtime.block_on(async {
        let start = Instant::now();
        start_all(broker, paths).await?;
        Ok(start.elapsed())
    })
}

/// Starts a client for each model and waits until all can be called.
async fn start_all(broker: &Broker, paths: &[PathBuf]) -> Result<Clients> {
    let mut clients = Vec::new();
    for (path, index) in paths.iter().zip(0..) {
        clients.push(service::start(broker, &format!("idle-{index}"), path)?);
    }
    for client in &clients {
        service::ready(client).await?;
    }
    Ok(clients)
}

/// They are idle, not dead: some are called.
fn one_of_them(
    figures: &mut Figures,
    runtime: &tokio::runtime::Runtime,
    clients: &Clients,
    paths: &[PathBuf],
) -> Result<()> {
    let x: Vec<u8> = (0..IDLE_SIDE).flat_map(|_| 0.5_f32.to_le_bytes()).collect();
    let shape = Shape::new([1, IDLE_SIDE]).map_err(|e| Trouble::new(e.to_string()))?;
    let request = service::request(DType::F32, &[1, IDLE_SIDE], Bytes::from(x.clone()))?;
    for (client, path) in clients.iter().zip(paths).step_by(50) {
        let answer = runtime.block_on(service::infer(client, &request))?;
        let plain = PlainSession::open(&cache::runtime()?, path, false)?;
        let input = Input { dtype: DType::F32, shape: &shape, data: InputData::Bytes(&x) };
        figures.check(answer.outputs[0].data[..] == plain.run(&[input])?[0].1[..]);
    }
    Ok(())
}
