//! A whole broker in a process of its own: this program again, told to be one.

use std::{
    fmt::Write as _,
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use faaswap_protocol::Bytes;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::{
    options::{Devices, Options},
    variants::Folders,
};
use crate::Result;

/// How long it may take to listen: memory on GPUs is taken, and links are measured.
const READY_WITHIN: Duration = Duration::from_secs(120);
/// How long it may take to end.
const ENDS_WITHIN: Duration = Duration::from_secs(40);
/// How long one of its pages may take.
const PAGE_WITHIN: Duration = Duration::from_secs(20);
/// How often it is looked at while it starts or ends.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Memory of a host device is given out in units of this size.
const HOST_CHUNK: Bytes = Bytes::new(256 << 10);
/// Weights in host memory beyond those of the functions: room for one that is being replaced.
const HOST_SPARE: Bytes = Bytes::mib(2048);

/// Brokers that run, and folders that they use: to be ended and removed when this process is told to end.
static RUNNING: Mutex<Vec<(Pid, PathBuf)>> = Mutex::new(Vec::new());

fn running() -> std::sync::MutexGuard<'static, Vec<(Pid, PathBuf)>> {
    RUNNING.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// From now on SIGTERM and SIGINT end this process with its brokers, and remove their folders.
pub(crate) fn end_together() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut term, mut int) = {
        let _inside = runtime.enter();
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
    };
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
        });
        // Held for good: nothing more is started.
        let running = running();
        for (pid, folder) in running.iter() {
            let _ended = kill_process(*pid, Signal::KILL);
            let _gone = fs::remove_dir_all(folder);
        }
        eprintln!("told to end");
        std::process::exit(1);
    })?;
    Ok(())
}

/// A running broker.
#[derive(Debug)]
pub(crate) struct Broker {
    child: Child,
    admin: SocketAddr,
    socket: PathBuf,
    log: PathBuf,
}

impl Broker {
    /// Starts one with a policy, and waits until it serves. Weights and prepared models are in its folders.
    pub(crate) fn start(
        options: &Options,
        folders: &Folders,
        policy: &str,
        weights: Bytes,
        faults: bool,
    ) -> Result<Self> {
        let admin = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let socket = folders.root.join("broker.sock");
        let config = folders.root.join(format!("broker-{policy}.toml"));
        fs::write(&config, settings(options, folders, (policy, weights, faults), admin)?)?;
        let log = options.out.join(format!("broker-{policy}.log"));
        let output = fs::File::create(&log)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["broker", "serve", "--config"]).arg(&config).stdin(Stdio::null());
        for (key, _) in std::env::vars_os().filter(|(key, _)| key.to_string_lossy().starts_with("FAASWAP_")) {
            command.env_remove(key);
        }
        // The lock is held while it starts, so that a signal between start and note does not miss it.
        let mut running = running();
        let child = command.stdout(output.try_clone()?).stderr(output).spawn()?;
        running.push((Pid::from_child(&child), folders.root.clone()));
        drop(running);
        let mut broker = Self { child, admin, socket, log };
        let start = Instant::now();
        while !broker.page("/readyz").is_ok_and(|page| page.starts_with("ready")) {
            if let Some(status) = broker.child.try_wait()? {
                return Err(format!("the broker ended with {status}: {}", broker.log_tail()).into());
            }
            if start.elapsed() > READY_WITHIN {
                return Err(format!("the broker is not ready after {READY_WITHIN:?}: {}", broker.log_tail()).into());
            }
            thread::sleep(LOOK_EVERY);
        }
        println!("broker with {policy}: ready after {:.1} s", start.elapsed().as_secs_f64());
        Ok(broker)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.socket.clone()
    }

    /// One of the pages for operators.
    pub(crate) fn page(&self, path: &str) -> Result<String> {
        self.ask("GET", path)
    }

    /// Lets a device fail.
    pub(crate) fn fail(&self, device: &str) -> Result<()> {
        self.ask("POST", &format!("/v1/devices/{device}/fail")).map(drop)
    }

    fn ask(&self, method: &str, path: &str) -> Result<String> {
        let mut stream = TcpStream::connect_timeout(&self.admin, PAGE_WITHIN)?;
        stream.set_read_timeout(Some(PAGE_WITHIN))?;
        write!(stream, "{method} {path} HTTP/1.0\r\nHost: broker\r\nContent-Length: 0\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let (head, body) = text.split_once("\r\n\r\n").ok_or("half a page")?;
        match head.split_whitespace().nth(1) {
            Some("200") => Ok(body.to_owned()),
            _ => Err(format!("{method} {path}: {}", head.lines().next().unwrap_or_default()).into()),
        }
    }

    pub(crate) fn devices(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.page("/v1/devices")?)?)
    }

    pub(crate) fn metrics(&self) -> Result<Metrics> {
        Ok(Metrics(self.page("/metrics")?))
    }

    /// What it has of the machine's memory for itself, in bytes; and what it has with all that it shares.
    pub(crate) fn memory(&self) -> Result<(u64, u64)> {
        let text = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let kib = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()).unwrap_or(0)
        };
        Ok((kib("RssAnon:") * 1024, kib("VmRSS:") * 1024))
    }

    /// Processor time so far.
    pub(crate) fn processor_seconds(&self) -> Result<f64> {
        processor_seconds(self.child.id())
    }

    pub(crate) fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(8)..].join("\n")
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let pid = Pid::from_child(&self.child);
        // These fail only where it has ended already.
        let _told = kill_process(pid, Signal::TERM);
        let start = Instant::now();
        while start.elapsed() < ENDS_WITHIN && matches!(self.child.try_wait(), Ok(None)) {
            thread::sleep(LOOK_EVERY);
        }
        let _killed = self.child.kill();
        let _gone = self.child.wait();
        running().retain(|(known, _)| *known != pid);
    }
}

/// Processor time of a process.
pub(crate) fn processor_seconds(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    Ok((ticks(11) + ticks(12)) / rustix::param::clock_ticks_per_second() as f64)
}

fn settings(
    options: &Options,
    folders: &Folders,
    (policy, weights, faults): (&str, Bytes, bool),
    admin: SocketAddr,
) -> Result<String> {
    let library = std::env::var("ORT_DYLIB_PATH").map_err(|_| "ORT_DYLIB_PATH names no ONNX Runtime")?;
    let mut text = String::new();
    let mut set = |name: &str, value: &dyn std::fmt::Display| writeln!(text, "{name} = \"{value}\"");
    set("socket", &folders.root.join("broker.sock").display())?;
    set("admin_listen", &admin)?;
    set("store_dir", &folders.store().display())?;
    set("store_max", &"100TiB")?;
    set("memory_dir", &folders.memory().display())?;
    set("host_memory", &format!("{}B", weights.get().saturating_add(HOST_SPARE.get())))?;
    set("onnxruntime", &library)?;
    set("policy", &policy)?;
    set("test_faults", &faults)?;
    for at in 0..options.devices.count() {
        let memory = options.memory.get();
        match options.devices {
            Devices::Gpus(_) => {
                writeln!(text, "[[device]]\nkind = \"gpu\"\nname = \"cuda{at}\"\ngpu = {at}\nmemory = \"{memory}B\"")?;
            }
            Devices::Hosts { link_mib, .. } => {
                let chunk = HOST_CHUNK.get();
                let memory = memory.next_multiple_of(chunk);
                writeln!(
                    text,
                    "[[device]]\nkind = \"host\"\nname = \"host{at}\"\nmemory = \"{memory}B\"\nchunk = \"{chunk}B\""
                )?;
                writeln!(text, "link_mib_per_s = {link_mib}")?;
            }
        }
    }
    Ok(text)
}

/// What a broker has counted.
#[derive(Debug)]
pub(crate) struct Metrics(String);

impl Metrics {
    /// The values of a metric, with its labels as they are written.
    pub(crate) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a str, f64)> {
        self.0.lines().filter_map(move |line| {
            let rest = line.strip_prefix(name)?;
            let (labels, value) = match rest.strip_prefix('{') {
                Some(rest) => rest.rsplit_once("} ")?,
                None => ("", rest.strip_prefix(' ')?),
            };
            Some((labels, value.trim().parse().ok()?))
        })
    }

    /// Its sum over all labels.
    pub(crate) fn sum(&self, name: &str) -> f64 {
        self.all(name).map(|(_, value)| value).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_found_with_their_labels() {
        let metrics = Metrics(
            "# HELP x\nfaaswap_a_total{device=\"d0\"} 3\nfaaswap_a_total{device=\"d1\"} 4.5\nfaaswap_ab 9\n".into(),
        );
        assert_eq!(
            metrics.all("faaswap_a_total").collect::<Vec<_>>(),
            [("device=\"d0\"", 3.0), ("device=\"d1\"", 4.5)]
        );
        assert!((metrics.sum("faaswap_ab") - 9.0).abs() < 1e-9);
    }
}
