//! A whole broker in a process of its own: this program again, told to be one.

use std::{
    fmt::Write as _,
    fs,
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use faaswap_protocol::Bytes;
use faaswap_tests::{http::Client, ports::free_port, process::Process};
use rustix::process::Signal;
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
/// Its socket's name.
const SOCKET: &str = "broker.sock";
/// Its trace's name.
const TRACE: &str = "scheduler.trace";
/// Weights in host memory beyond those of the functions: room for one that is being replaced.
const HOST_SPARE: Bytes = Bytes::mib(2048);

/// A running broker.
#[derive(Debug)]
pub(crate) struct Broker {
    process: Process,
    admin: SocketAddr,
    socket: PathBuf,
    trace: PathBuf,
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
        let admin = free_port()?;
        let config = folders.root().join(format!("broker-{policy}.toml"));
        fs::write(&config, settings(options, folders, (policy, weights, faults), admin)?)?;
        let program = std::env::current_exe()?;
        let process = Process::start(&format!("broker-{policy}"), &program, &options.out, |command| {
            command.args(["broker", "serve", "--config"]).arg(&config);
        })?;
        let mut broker = Self { process, admin, socket: folders.root().join(SOCKET), trace: options.out.join(TRACE) };
        let start = Instant::now();
        let is_ready =
            || Client::new(admin, PAGE_WITHIN).get("/readyz").is_ok_and(|reply| reply.status == 200).then_some(());
        broker.process.wait_for("the broker to be ready", READY_WITHIN, is_ready)?;
        println!("broker with {policy}: ready after {:.1} s", start.elapsed().as_secs_f64());
        Ok(broker)
    }

    /// Where the scheduler's events and actions are recorded.
    pub(crate) fn trace(&self) -> PathBuf {
        self.trace.clone()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.socket.clone()
    }

    /// One of the pages for operators.
    pub(crate) fn page(&self, path: &str) -> Result<String> {
        let reply = Client::new(self.admin, PAGE_WITHIN).get(path)?;
        if reply.status == 200 {
            Ok(reply.text())
        } else {
            Err(format!("{path}: {} {}", reply.status, reply.text()).into())
        }
    }

    /// Lets a device fail.
    pub(crate) fn fail(&self, device: &str) -> Result<()> {
        let reply = Client::new(self.admin, PAGE_WITHIN).post(&format!("/v1/devices/{device}/fail"), &[], &[])?;
        if reply.status == 200 { Ok(()) } else { Err(format!("{device} does not fail: {}", reply.text()).into()) }
    }

    /// Lets another policy decide from now on.
    pub(crate) fn choose(&self, policy: &str) -> Result<()> {
        let reply = Client::new(self.admin, PAGE_WITHIN).post(&format!("/v1/policy/{policy}"), &[], &[])?;
        if reply.status == 200 { Ok(()) } else { Err(format!("no other policy: {}", reply.text()).into()) }
    }

    pub(crate) fn models(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.page("/v1/models")?)?)
    }

    pub(crate) fn devices(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.page("/v1/devices")?)?)
    }

    pub(crate) fn metrics(&self) -> Result<Metrics> {
        Ok(Metrics(self.page("/metrics")?))
    }

    /// What it and its workers have of the machine's memory for themselves, in bytes.
    pub(crate) fn memory(&self) -> Result<u64> {
        self.processes()?.iter().map(|process| own_memory(process)).sum()
    }

    /// Processor time so far, its own and that of the workers there are.
    pub(crate) fn processor_seconds(&self) -> Result<f64> {
        self.processes()?.iter().map(|process| processor_seconds(process)).sum()
    }

    /// It, and the processes that it has started: its workers, once no model is prepared.
    fn processes(&self) -> Result<Vec<String>> {
        let broker = self.process.id().as_raw_nonzero().to_string();
        let is_child = |process: &String| stat(process).is_ok_and(|fields| fields.get(1) == Some(&broker));
        let all = fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let children: Vec<_> =
            all.filter(|name| name.starts_with(|c: char| c.is_ascii_digit())).filter(is_child).collect();
        Ok([vec![broker], children].concat())
    }

    pub(crate) fn log_tail(&self) -> String {
        self.process.log_tail()
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // These fail only where it has ended already; what does not end by itself is killed.
        let _told = self.process.signal(Signal::TERM);
        let _ended = self.process.wait(ENDS_WITHIN);
    }
}

/// What a process, by its number or `self`, has of the machine's memory for itself, in bytes.
pub(crate) fn own_memory(process: &str) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).ok_or("no RssAnon")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse::<u64>()?.saturating_mul(1024))
}

/// Processor time of a process, by its number or `self`.
pub(crate) fn processor_seconds(process: &str) -> Result<f64> {
    let fields = stat(process)?;
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    Ok((ticks(11) + ticks(12)) / rustix::param::clock_ticks_per_second() as f64)
}

/// What the system says of a process, from its state on, which is the third field.
fn stat(process: &str) -> Result<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    Ok(after_name.split_whitespace().map(str::to_owned).collect())
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
    set("socket", &folders.root().join(SOCKET).display())?;
    set("admin_listen", &admin)?;
    set("store_dir", &folders.store().display())?;
    set("store_max", &"100TiB")?;
    set("memory_dir", &folders.memory().display())?;
    set("host_memory", &format!("{}B", weights.get().saturating_add(HOST_SPARE.get())))?;
    set("onnxruntime", &library)?;
    set("policy", &policy)?;
    set("workers", &options.workers)?;
    set("trace", &options.out.join(TRACE).display())?;
    set("test_faults", &faults)?;
    for at in 0..options.devices.count() {
        let memory = options.memory.get();
        match options.devices {
            Devices::Gpus(_) => {
                writeln!(text, "[[device]]\nkind = \"gpu\"\nname = \"cuda{at}\"\ngpu = {at}\nmemory = \"{memory}B\"")?;
            }
            Devices::Hosts { link_mib, .. } => {
                let chunk = options.devices.chunk().get();
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
