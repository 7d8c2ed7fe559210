//! What a sidecar adds: the same requests through a sidecar's HTTP with binary tensors, through the broker's client, and
//! as the device ran them, in turn and in one run.

use std::{
    fs,
    net::SocketAddr,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use faaswap_device::{
    Device,
    cuda::{CudaConfig, CudaDevice},
    host::{HostConfig, HostDevice},
};
use faaswap_protocol::Bytes;
use faaswap_sidecar::{app, config};
use faaswap_tests::{
    http::Client,
    oip::{Answer, Outcome as Reply, Request, Tensor},
    ports::free_port,
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{
    bare::Exchange,
    bases::{self, Base},
    broker::Broker,
    costs,
    fleet::{Answered, Ending},
    options::{Devices, Options},
    stage::{Live, Stage},
    variants::Design,
};
use crate::{
    Result,
    model::{self, Asked},
    record::{Record, Records, Target},
    stats::median,
};

/// Models that are asked: a small, a middle and a large one.
const MODELS_MAX: usize = 3;
/// The function that is asked by both ways, and those that drive its weights out.
const ASKED: usize = 0;
const OTHERS: std::ops::Range<usize> = 1..4;
/// Requests of each kind to each model.
const ROUNDS: usize = 60;
const WARM_UP: usize = 5;
/// HTTP, the client, and the bare exchange.
const WAYS: usize = 3;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a sidecar may take to be ready, and how often it is asked.
const READY_WITHIN: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// What a sidecar and the broker may add to what the device takes.
const ADDED_MS_MAX: f64 = 0.35;

/// A sidecar in a thread of this process, with a runtime of its own as in its own process.
struct Sidecar {
    address: SocketAddr,
    stop: CancellationToken,
    thread: Option<thread::JoinHandle<()>>,
}

impl Sidecar {
    fn start(broker: &Broker, design: &Design) -> Result<Self> {
        let address = free_port()?;
        let file = broker.socket().with_file_name(format!("sidecar-{}.toml", design.name));
        let text = format!(
            "broker_socket = {:?}\nfunction = {:?}\nmodel = \"sha256:{}\"\nslo_ms = {}\nlisten = \"{address}\"\nmetrics_listen = \"off\"\n",
            broker.socket().display().to_string(),
            format!("{}-front", design.name),
            design.digest.hex(),
            design.deadline.as_millis().max(1),
        );
        fs::write(&file, text)?;
        let settings = config::Settings::load(Some(&file), &config::Start::default())?;
        let stop = CancellationToken::new();
        let told = stop.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let work = move || {
            if let Err(error) = runtime.block_on(app::run(settings, told)) {
                eprintln!("a sidecar ended: {error}");
            }
        };
        let thread = Some(thread::Builder::new().name("sidecar".to_owned()).spawn(work)?);
        let sidecar = Self { address, stop, thread };
        let start = Instant::now();
        while !Client::new(address, PATIENCE).get("/v2/health/ready").is_ok_and(|reply| reply.status == 200) {
            if start.elapsed() > READY_WITHIN {
                return Err(format!("{}: its sidecar is not ready after {READY_WITHIN:?}", design.name).into());
            }
            thread::sleep(LOOK_EVERY);
        }
        Ok(sidecar)
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            // One that has panicked has said so.
            let _ended = thread.join();
        }
    }
}

/// Milliseconds of requests that found their weights, or of those that did not.
#[derive(Debug, Default)]
struct Times {
    http: Vec<f64>,
    client: Vec<f64>,
    /// In the broker, from frame to frame, of both.
    broker: Vec<f64>,
    /// On the device alone, without a broker.
    device: Vec<f64>,
}

impl Times {
    fn json(&mut self) -> Value {
        let all = [&mut self.http, &mut self.client, &mut self.broker, &mut self.device];
        let [http, client, broker, device] = all.map(|all| median(all));
        json!({"http_ms": http, "client_ms": client, "broker_ms": broker, "device_ms": device,
               "http_added_ms": http - device, "client_added_ms": client - device, "broker_added_ms": broker - device,
               "requests": self.http.len()})
    }
}

/// One model's comparison.
struct Compared {
    name: String,
    resident: Times,
    swapped: Times,
    /// Milliseconds of as many bytes through a connection and a word to another thread, which sleeps as long as the broker took, asked in
    /// turn with the requests: first after the others, as those whose weights have left, and again at once.
    bare: [Vec<f64>; 2],
    checked: u64,
    wrong: u64,
}

fn request(base: &Base, design: &Design) -> Result<Request> {
    let specs = base.prepared.manifest().signature.inputs.iter().zip(&base.inputs);
    let tensors: Vec<_> = specs
        .map(|(spec, (dtype, shape, data))| Tensor {
            name: spec.name.clone(),
            dtype: *dtype,
            shape: shape.dims().to_vec(),
            data: data.clone(),
        })
        .collect();
    Ok(Request::new(&format!("{}-front", design.name), &tensors)?)
}

/// Asks one function by both ways and the bare exchange in turn, each time once when its weights have left, and once when they are there. The
/// device has room for one function's weights, so that asking the others drives them out.
fn compare(stage: &Stage, live: &Live) -> Result<Compared> {
    let (design, base) = (&stage.designs[ASKED], &stage.bases[0]);
    let golden = live.fleet.golden(ASKED).ok_or("a function was not registered")?;
    let sidecar = Sidecar::start(&live.broker, design)?;
    let (request, mut http) = (request(base, design)?, Client::new(sidecar.address, PATIENCE));
    let link = live.links.alone.first().copied().unwrap_or(f64::NAN);
    let copy = costs::copy_time(base, link);
    let (mut resident, mut swapped, mut bare) = (Times::default(), Times::default(), [Vec::new(), Vec::new()]);
    let (mut checked, mut wrong) = (0_u64, 0_u64);
    let asked_bytes = base.inputs.iter().map(|(_, _, data)| data.len()).sum();
    let mut exchange = Exchange::start(asked_bytes, golden.iter().map(Vec::len).sum())?;
    // What the last request took in the broker, so that the bare exchange is asked for as long: of those that are first, and of those after.
    let mut last = [Duration::ZERO; 2];
    for round in 0..WAYS * (WARM_UP + ROUNDS) {
        let (way, counts) = (round % WAYS, round >= WAYS * WARM_UP);
        live.fleet.ask(OTHERS);
        for (took, last) in bare.iter_mut().zip(&mut last) {
            let seen = match way {
                0 => over_http(&request, &mut http, golden)?,
                1 => by_client(live)?,
                _ => {
                    let ms = exchange.once(*last)?;
                    took.extend(counts.then_some(ms));
                    continue;
                }
            };
            checked += 1;
            wrong += u64::from(!seen.answered.right);
            *last = seen.answered.in_broker();
            if counts {
                let of = if seen.answered.was_brought(copy) { &mut swapped } else { &mut resident };
                of.broker.push(seen.answered.in_broker().as_secs_f64() * 1e3);
                if way == 0 { &mut of.http } else { &mut of.client }.push(seen.took_ms);
            }
        }
    }
    Ok(Compared { name: base.name.clone(), resident, swapped, bare, checked, wrong })
}

/// One answer.
struct Seen {
    took_ms: f64,
    answered: Answered,
}

fn over_http(request: &Request, http: &mut Client, golden: &[Vec<u8>]) -> Result<Seen> {
    let start = Instant::now();
    let reply = request.send(http)?;
    let took_ms = start.elapsed().as_secs_f64() * 1e3;
    match reply {
        Reply::Answered(Answer { outputs, resident, queue_us, run_us, .. }) => {
            let right = outputs.iter().map(|output| &output.data).eq(golden);
            let (queued, ran) = (Duration::from_micros(queue_us), Duration::from_micros(run_us));
            Ok(Seen { took_ms, answered: Answered { right, was_resident: resident, queued, ran } })
        }
        Reply::Refused(status, why) => Err(format!("refused over HTTP with {status}: {why}").into()),
    }
}

fn by_client(live: &Live) -> Result<Seen> {
    let outcome = live.fleet.ask([ASKED]).pop().ok_or("no answer")?;
    match outcome.end {
        Ending::Answered(answered) => Ok(Seen { took_ms: outcome.took.as_secs_f64() * 1e3, answered }),
        Ending::Refused(code) => Err(format!("refused: {code}").into()),
        Ending::Failed(why) => Err(why.into()),
    }
}

/// The same model on the same kind of device in this process: a request while its weights come, and one after it.
fn alone(stage: &Stage, one: &mut Compared) -> Result<()> {
    let device = open(&stage.options)?;
    let asked = Asked::new(&model::runtime()?, &stage.bases[0].prepared, &device)?;
    asked.swap_in()?;
    let expected = asked.ask()?;
    asked.swap_out()?;
    for _ in 0..ROUNDS {
        for times in [&mut one.swapped, &mut one.resident] {
            let start = Instant::now();
            // Once the weights are there, there is nothing to begin.
            let coming = if asked.device.memory().mapped == Bytes::ZERO { Some(asked.begin_swap_in()?) } else { None };
            one.wrong += u64::from(asked.ask()? != expected);
            times.device.push(start.elapsed().as_secs_f64() * 1e3);
            one.checked += 1;
            if let Some(coming) = coming {
                coming.recv()??;
            }
        }
        asked.swap_out()?;
    }
    Ok(())
}

fn open(options: &Options) -> Result<Arc<dyn Device>> {
    Ok(match options.devices {
        Devices::Gpus(_) => {
            CudaDevice::open(&CudaConfig { memory: Some(options.memory), lanes: 1, ..model::config(0)? })?
        }
        Devices::Hosts { link_mib, .. } => {
            let (chunk, link) = (options.devices.chunk(), Some(link_mib.saturating_mul(1 << 20)));
            HostDevice::new(HostConfig {
                chunk,
                link_bytes_per_second: link,
                ..HostConfig::new("alone", options.memory)
            })?
        }
    })
}

/// The smallest, a middle and the largest of the models, each on one device with room for one function's weights.
fn stages(options: &Options) -> Result<Vec<Options>> {
    let mut sizes: Vec<_> = bases::all(options)?.into_iter().map(|base| (base.weights(), base.name)).collect();
    sizes.sort();
    let last = sizes.len().saturating_sub(1);
    let mut chosen = vec![0, last / 2, last];
    chosen.dedup();
    let one = |at: usize| {
        let (weights, name) = sizes.get(at).cloned().ok_or("there is no model")?;
        // A GPU gives one part of 32 to none.
        let with_spare = Bytes::new(weights.get() + weights.get().div_ceil(31));
        let memory = with_spare.checked_round_up(options.devices.chunk()).unwrap_or(weights);
        let devices = match options.devices {
            Devices::Gpus(_) => Devices::Gpus(1),
            Devices::Hosts { link_mib, .. } => Devices::Hosts { count: 1, link_mib },
        };
        Ok(Options { only: Some(name), functions: Some(OTHERS.end), memory, devices, ..options.clone() })
    };
    chosen.into_iter().take(MODELS_MAX).map(one).collect()
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let mut found: Vec<Compared> = Vec::new();
    let mut device = String::new();
    for options in stages(options)? {
        let stage = Stage::set(options)?;
        let policy = stage.options.policies.first().cloned().unwrap_or_default();
        let mut one = {
            let live = stage.live(&policy, false)?;
            let one = compare(&stage, &live)?;
            Compared { checked: one.checked + live.checked, wrong: one.wrong + live.wrong, ..one }
        };
        // The broker has gone: the device is free.
        alone(&stage, &mut one)?;
        let (resident, swapped) = (one.resident.json(), one.swapped.json());
        println!("front: {} resident {resident}\n  swapped in {swapped}", one.name);
        device.clone_from(&stage.device);
        found.push(one);
    }
    write(options, &mut found, device)?;
    let wrong: u64 = found.iter().map(|one| one.wrong).sum();
    if wrong > 0 { Err(format!("{wrong} outputs are wrong").into()) } else { Ok(()) }
}

fn write(options: &Options, found: &mut [Compared], device: String) -> Result<()> {
    let (mut values, mut records) = (Vec::new(), Vec::new());
    for one in found {
        let (resident, swapped) = (one.resident.json(), one.swapped.json());
        let mut counted = Some((one.checked, one.wrong));
        for (kind, value) in [("resident", &resident), ("swapped_in", &swapped)] {
            let ways = [("http", Target::AtMost(ADDED_MS_MAX)), ("client", Target::Told), ("broker", Target::Told)];
            for (way, target) in ways {
                // Where no request was of this kind there is no figure.
                let Some(added) = value[format!("{way}_added_ms")].as_f64() else { continue };
                let (checked, wrong) = counted.take().unwrap_or((0, 0));
                let name = format!("front_{way}_added_{kind}");
                records.push(Record::of(&name, &one.name, (added, "ms"), None, target).counting(checked, wrong));
            }
        }
        let [first, again] = one.bare.each_mut().map(|all| median(all));
        for (figure, took) in [("front_bare_exchange", again), ("front_bare_exchange_first", first)] {
            records.push(Record::of(figure, &one.name, (took, "ms"), None, Target::Told));
        }
        println!("front: {} bare {again:.3} ms, {first:.3} after others", one.name);
        values.push(json!({"model": one.name, "resident": resident, "swapped_in": swapped, "bare_exchange_ms": again,
                           "bare_exchange_first_ms": first, "outputs_checked": one.checked, "outputs_wrong": one.wrong}));
    }
    fs::write(options.out.join("front.json"), serde_json::to_vec_pretty(&values)?)?;
    Records::new(&options.out, "front", device)?.add(&records)
}
