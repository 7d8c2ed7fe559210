//! What a front adds to a request that it passes on, how soon it serves, and what it holds while nobody asks: the sidecar,
//! beside the real of-watchdog and Knative's queue-proxy where they are there, each before a handler of its own.

use std::{
    ffi::OsString,
    fs,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use super::{Figures, idle::rss_kib, p50, p98, title};
use crate::{
    Result, Trouble, cache,
    http::Client,
    models,
    node::{Broker, BrokerOptions, DeviceOptions},
    ports::free_port,
    process::{Process, temporary_folder},
};

/// Bodies, and how many requests of each count.
const BODIES: [(&str, usize, usize); 2] = [("1 kB", 1000, 3000), ("600 kB", 600_000, 1000)];
/// Requests before them that do not.
const WARM_UP: usize = 100;
/// Requests to one front before the next one's turn.
const BLOCK: usize = 20;
/// Starts of each front.
const STARTS: usize = 20;
/// How often one that starts is asked.
const ASK_EVERY: Duration = Duration::from_millis(1);
/// Until memory is what it stays.
const SETTLE: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(30);
/// Ports that others have fixed: of-watchdog's metrics; queue-proxy's admin, autoscaling and user metrics.
const WATCHDOG_PORTS: &[u16] = &[8081];
const QUEUE_PORTS: &[u16] = &[8022, 9090, 9091];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Bare,
    Sidecar,
    Watchdog,
    Queue,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Bare => "the handler alone",
            Self::Sidecar => "sidecar as front",
            Self::Watchdog => "of-watchdog",
            Self::Queue => "Knative's queue-proxy",
        }
    }

    fn key(self) -> &'static str {
        match self {
            Self::Bare => "bare",
            Self::Sidecar => "sidecar",
            Self::Watchdog => "of_watchdog",
            Self::Queue => "queue_proxy",
        }
    }

    /// Where the program is and which ports it must have; `None`: it is not to be had here.
    fn program(self) -> Result<Option<PathBuf>> {
        let (variable, name, ports) = match self {
            Self::Bare => return Ok(Some(std::env::current_exe()?)),
            Self::Sidecar => return sidecar().map(Some),
            Self::Watchdog => ("FAASWAP_OF_WATCHDOG", "of-watchdog", WATCHDOG_PORTS),
            Self::Queue => ("FAASWAP_QUEUE_PROXY", "queue", QUEUE_PORTS),
        };
        let given = std::env::var_os(variable).map(PathBuf::from);
        let path = given.unwrap_or_else(|| cache::root().join(".cache/go/bin").join(name));
        if !path.is_file() {
            println!("  {} is not there ({variable}): it is left out", self.name());
            return Ok(None);
        }
        if let Some(taken) = ports.iter().find(|port| TcpListener::bind(("0.0.0.0", **port)).is_err()) {
            println!("  {} is left out: somebody has its port {taken}", self.name());
            return Ok(None);
        }
        Ok(Some(path))
    }
}

/// The release build, or another one, such as a static one as the image has it.
fn sidecar() -> Result<PathBuf> {
    std::env::var_os("FAASWAP_SIDECAR").map_or_else(|| cache::program("faaswap-sidecar"), |path| Ok(path.into()))
}

/// What all fronts share.
struct Bench {
    broker: Broker,
    folder: tempfile::TempDir,
    model: PathBuf,
    handler: PathBuf,
}

/// A front that runs. The handler goes with it.
struct Front {
    kind: Kind,
    address: SocketAddr,
    process: Process,
    _handler: Option<Process>,
}

impl Bench {
    fn new() -> Result<Self> {
        let broker = Broker::start(&BrokerOptions::new(vec![DeviceOptions::new("host0", "16MiB")]))?;
        let folder = temporary_folder(&std::env::temp_dir())?;
        let model = folder.path().join("conv.onnx");
        models::write(&models::conv(1), &model)?;
        Ok(Self { broker, folder, model, handler: std::env::current_exe()? })
    }

    fn start(&self, kind: Kind, program: &Path) -> Result<Front> {
        let address = free_port()?;
        if kind == Kind::Bare {
            return Ok(Front { kind, address, process: self.handler(address)?, _handler: None });
        }
        let at = free_port()?;
        let mut env: Vec<(&str, OsString)> = vec![("TMPDIR", self.folder.path().into())];
        let mut handler = None;
        if kind == Kind::Queue {
            handler = Some(self.handler(at)?);
            env.extend(queue(address, at).map(|(key, value)| (key, value.into())));
        } else {
            env.extend([
                ("mode", "http".into()),
                ("port", address.port().to_string().into()),
                ("fprocess", format!("{} --echo {at}", self.handler.display()).into()),
                ("upstream_url", format!("http://{at}").into()),
                ("FAASWAP_BROKER_SOCKET", self.broker.socket().into()),
                ("FAASWAP_FUNCTION", "front".into()),
                ("FAASWAP_MODEL", self.model.clone().into()),
                ("FAASWAP_LISTEN", "127.0.0.1:0".into()),
                ("FAASWAP_METRICS_LISTEN", "127.0.0.1:0".into()),
            ]);
        }
        let process = Process::start(kind.key(), program, self.broker.folder(), |command| {
            command.envs(env);
        })?;
        Ok(Front { kind, address, process, _handler: handler })
    }

    fn handler(&self, address: SocketAddr) -> Result<Process> {
        Process::start("handler", &self.handler, self.broker.folder(), |command| {
            command.arg("--echo").arg(address.to_string());
        })
    }
}

/// What Knative's controller tells queue-proxy, with the annotation `features.knative.dev/http-full-duplex: Enabled`:
/// without it, one reply in some hundreds to a large body breaks off.
fn queue(address: SocketAddr, handler: SocketAddr) -> [(&'static str, String); 15] {
    let user = handler.port();
    let probe = format!("{{\"tcpSocket\": {{\"port\": {user}, \"host\": \"127.0.0.1\"}}, \"successThreshold\": 1}}");
    [
        ("CONTAINER_CONCURRENCY", "0".to_owned()),
        ("ENABLE_HTTP_FULL_DUPLEX", "true".to_owned()),
        ("QUEUE_SERVING_PORT", address.port().to_string()),
        ("QUEUE_SERVING_TLS_PORT", "0".to_owned()),
        ("USER_PORT", user.to_string()),
        ("REVISION_TIMEOUT_SECONDS", "30".to_owned()),
        ("REVISION_RESPONSE_START_TIMEOUT_SECONDS", "30".to_owned()),
        ("SERVING_READINESS_PROBE", probe),
        ("SERVING_LOGGING_CONFIG", String::new()),
        ("SERVING_LOGGING_LEVEL", "info".to_owned()),
        ("SERVING_NAMESPACE", "default".to_owned()),
        ("SERVING_CONFIGURATION", "front".to_owned()),
        ("SERVING_REVISION", "front-00001".to_owned()),
        ("SERVING_POD", "front-00001-x".to_owned()),
        ("SERVING_POD_IP", "127.0.0.1".to_owned()),
    ]
}

impl Front {
    /// Asks until the answer is 200; how long that took since `start`.
    fn until(&mut self, path: &str, start: Instant) -> Result<Duration> {
        loop {
            // Whoever does not listen yet refuses at once.
            if Client::new(self.address, PATIENCE).get(path).is_ok_and(|reply| reply.status == 200) {
                return Ok(start.elapsed());
            }
            if start.elapsed() > PATIENCE || self.process.ended().is_some() {
                return Err(Trouble::new(format!("{path} is not answered\n{}", self.process.log_tail())));
            }
            thread::sleep(ASK_EVERY);
        }
    }
}

pub(super) fn run(figures: &mut Figures) -> Result<()> {
    title("fronts: what each adds to a request that the handler answers (keep-alive, the body comes back)");
    let bench = Bench::new()?;
    let mut programs = Vec::new();
    for kind in [Kind::Bare, Kind::Sidecar, Kind::Watchdog, Kind::Queue] {
        if let Some(program) = kind.program()? {
            programs.push((kind, program));
        }
    }
    let mut fronts = Vec::new();
    for (kind, program) in &programs {
        let mut front = bench.start(*kind, program)?;
        front.until("/", Instant::now())?;
        if *kind == Kind::Sidecar {
            front.until("/_/ready", Instant::now())?;
        }
        fronts.push(front);
    }
    thread::sleep(SETTLE);
    let idle: Vec<f64> = fronts.iter().map(|front| rss_kib(front.process.id())).collect::<Result<_>>()?;
    println!("                                  p50 ms   p98 ms   added p50   added p98");
    for (name, bytes, rounds) in BODIES {
        pass(figures, &fronts, name, bytes, rounds)?;
    }
    thread::sleep(SETTLE);
    for (front, idle) in fronts.iter().zip(idle) {
        let after = rss_kib(front.process.id())?;
        println!("  {:21} RSS {idle:6.0} KiB idle, {after:6.0} KiB after these requests", front.kind.name());
        figures.set(&format!("front_{}_rss_kib", front.kind.key()), idle);
    }
    drop(fronts);
    starts(figures, &bench, &programs)?;
    let size = fs::metadata(sidecar()?)?.len();
    println!("  the sidecar's program: {} KiB; FAASWAP_SIDECAR names another, such as a static one", size >> 10);
    Ok(())
}

fn pass(figures: &mut Figures, fronts: &[Front], name: &str, bytes: usize, rounds: usize) -> Result<()> {
    let body: Vec<u8> = (0..=250).cycle().take(bytes).collect();
    let mut clients: Vec<_> = fronts.iter().map(|front| Client::new(front.address, PATIENCE)).collect();
    let mut times = vec![Vec::new(); fronts.len()];
    for block in 0..(WARM_UP + rounds) / BLOCK {
        for (client, times) in clients.iter_mut().zip(&mut times) {
            if block == WARM_UP / BLOCK {
                times.clear();
            }
            for _ in 0..BLOCK {
                let start = Instant::now();
                let reply = client.post("/", &[], &[&body])?;
                times.push(start.elapsed());
                figures.check(reply.status == 200 && reply.body == body);
            }
        }
    }
    let (bare50, bare98) = (p50(&mut times[0]), p98(&mut times[0]));
    for (front, times) in fronts.iter().zip(&mut times) {
        let (at50, at98) = (p50(times), p98(times));
        let label = format!("{}, {name}", front.kind.name());
        if front.kind == Kind::Bare {
            println!("  {label:30} {at50:7.3} {at98:8.3}");
            continue;
        }
        println!("  {label:30} {at50:7.3} {at98:8.3} {:11.3} {:11.3}", at50 - bare50, at98 - bare98);
        let key = format!("front_{}_{}", front.kind.key(), name.replace(' ', "_"));
        figures.set(&format!("{key}_added_p50_ms"), at50 - bare50);
        figures.set(&format!("{key}_added_p98_ms"), at98 - bare98);
    }
    Ok(())
}

/// From the start of the process; the handler's own start, which the front does, is part of it.
fn starts(figures: &mut Figures, bench: &Bench, programs: &[(Kind, PathBuf)]) -> Result<()> {
    let mut times = vec![(Vec::new(), Vec::new(), Vec::new()); programs.len()];
    for _ in 0..STARTS {
        for ((kind, program), (listens, answers, ready)) in programs.iter().zip(&mut times) {
            if matches!(kind, Kind::Bare | Kind::Queue) {
                continue;
            }
            let start = Instant::now();
            let mut front = bench.start(*kind, program)?;
            listens.push(front.until("/_/health", start)?);
            answers.push(front.until("/", start)?);
            ready.push(front.until("/_/ready", start)?);
        }
    }
    for ((kind, _), (listens, answers, ready)) in programs.iter().zip(&mut times) {
        if !listens.is_empty() {
            let (listens, answers, ready) = (p50(listens), p50(answers), p50(ready));
            println!(
                "  {:21} p50 of {STARTS} starts: health {listens:.1} ms, the handler's first answer {answers:.1} ms, \
                 ready {ready:.1} ms",
                kind.name()
            );
            figures.set(&format!("front_{}_first_answer_ms", kind.key()), answers);
            figures.set(&format!("front_{}_ready_ms", kind.key()), ready);
        }
    }
    Ok(())
}
