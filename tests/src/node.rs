//! A node made of real processes: one broker and any number of sidecars, each with ports and folders of its own.

use std::{
    fmt::Write as _,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;

use crate::{
    Result, Trouble, cache,
    http::Client,
    ports::free_port,
    process::{Process, temporary_folder},
};

/// How long a broker may take to listen.
pub const BROKER_READY_WITHIN: Duration = Duration::from_secs(60);
/// How long a function may take from its sidecar's start until it can be called; its model may have to be prepared, on
/// a machine that prepares others too.
pub const FUNCTION_READY_WITHIN: Duration = Duration::from_secs(180);
/// Free memory below which weights are put on disk.
const MEMORY_BYTES_MIN: u64 = 512 << 20;
/// How long a page of ours may take.
const PAGE_WITHIN: Duration = Duration::from_secs(10);

/// A device of a broker.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// Its name.
    pub name: String,
    /// Memory, as the configuration writes it.
    pub memory: String,
    /// Unit of memory.
    pub chunk: String,
    /// Bandwidth of its link.
    pub link_mib_per_s: Option<u64>,
    /// Requests that run at a time.
    pub lanes: u16,
}

impl DeviceOptions {
    /// A device with one lane and small chunks.
    pub fn new(name: &str, memory: &str) -> Self {
        let (name, memory, chunk) = (name.to_owned(), memory.to_owned(), "256KiB".to_owned());
        Self { name, memory, chunk, link_mib_per_s: None, lanes: 1 }
    }
}

/// What a broker shall be like.
#[derive(Clone, Debug)]
pub struct BrokerOptions {
    /// Its devices.
    pub devices: Vec<DeviceOptions>,
    /// Whether it listens on TCP too.
    pub tcp: bool,
    /// More lines for its configuration, such as `keep_warm = "1s"`.
    pub settings: Vec<String>,
}

impl BrokerOptions {
    /// A broker with these devices.
    pub fn new(devices: Vec<DeviceOptions>) -> Self {
        Self { devices, tcp: false, settings: Vec::new() }
    }
}

/// A broker in a process.
#[derive(Debug)]
pub struct Broker {
    // The process goes first, then the folders under it.
    process: Process,
    program: PathBuf,
    config: PathBuf,
    admin: SocketAddr,
    tcp: Option<SocketAddr>,
    folder: TempDir,
    _memory: TempDir,
}

impl Broker {
    /// Starts one and waits until it listens.
    pub fn start(options: &BrokerOptions) -> Result<Self> {
        let folder = temporary_folder(&std::env::temp_dir())?;
        let memory = memory_folder()?;
        let admin = free_port()?;
        let tcp = options.tcp.then(free_port).transpose()?;
        let config = folder.path().join("faaswap.toml");
        fs::write(&config, toml(options, folder.path(), memory.path(), admin, tcp)?)?;
        let program = cache::program("faaswap-broker")?;
        let process = spawn(&program, &config, folder.path())?;
        let mut broker = Self { process, program, config, admin, tcp, folder, _memory: memory };
        broker.wait_ready()?;
        Ok(broker)
    }

    /// Waits until it takes connections.
    pub fn wait_ready(&mut self) -> Result<()> {
        let admin = self.admin;
        self.process.wait_for("the broker to be ready", BROKER_READY_WITHIN, || is_ready(admin, "/readyz"))
    }

    /// Starts it again, in the same folders and on the same ports.
    pub fn start_again(&mut self) -> Result<()> {
        self.process.kill();
        self.process = spawn(&self.program, &self.config, self.folder.path())?;
        Ok(())
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Its Unix socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("broker.sock")
    }

    /// Its port for peers without a Unix socket.
    pub fn tcp(&self) -> Option<SocketAddr> {
        self.tcp
    }

    /// Its folder, where logs are, too.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A page of its admin port as JSON.
    pub fn admin(&self, path: &str) -> Result<Value> {
        Client::new(self.admin, PAGE_WITHIN).get(path)?.json()
    }

    /// Makes a device fail for good; `test_faults` must be set.
    pub fn fail_device(&self, name: &str) -> Result<()> {
        let path = format!("/v1/devices/{name}/fail");
        match Client::new(self.admin, PAGE_WITHIN).post(&path, &[], &[])? {
            reply if reply.status == 200 => Ok(()),
            reply => Err(Trouble::new(format!("{name} does not fail: {}", reply.text()))),
        }
    }

    /// The sum of a metric over all its labels; 0 where it has not been counted yet.
    pub fn metric(&self, name: &str) -> Result<f64> {
        let text = Client::new(self.admin, PAGE_WITHIN).get("/metrics")?.text();
        Ok(metric_sum(&text, name))
    }
}

/// The sum over all lines of this name in the OpenMetrics text format.
pub fn metric_sum(text: &str, name: &str) -> f64 {
    let values = text.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let rest = if rest.starts_with('{') { &rest[rest.rfind('}')? + 1..] } else { rest };
        rest.strip_prefix(' ')?.split(' ').next()?.parse::<f64>().ok()
    });
    values.sum()
}

/// A folder in memory; on disk where a container was given too little of it.
fn memory_folder() -> Result<TempDir> {
    let shm = Path::new("/dev/shm");
    let free = rustix::fs::statvfs(shm).map_or(0, |shm| shm.f_bavail.saturating_mul(shm.f_frsize));
    if free >= MEMORY_BYTES_MIN { temporary_folder(shm) } else { temporary_folder(&std::env::temp_dir()) }
}

fn is_ready(address: SocketAddr, path: &str) -> Option<()> {
    let reply = Client::new(address, PAGE_WITHIN).get(path).ok()?;
    (reply.status == 200).then_some(())
}

fn spawn(program: &Path, config: &Path, folder: &Path) -> Result<Process> {
    Process::start("broker", program, folder, |command| {
        command.arg("serve").arg("--config").arg(config);
    })
}

fn toml(
    options: &BrokerOptions,
    folder: &Path,
    memory: &Path,
    admin: SocketAddr,
    tcp: Option<SocketAddr>,
) -> Result<String> {
    let mut text = String::new();
    let mut set = |key: &str, value: &str| text.push_str(&format!("{key} = {value:?}\n"));
    set("socket", &folder.join("broker.sock").to_string_lossy());
    set("store_dir", &folder.join("store").to_string_lossy());
    set("memory_dir", &memory.to_string_lossy());
    if !options.settings.iter().any(|line| line.starts_with("host_memory")) {
        set("host_memory", "2GiB");
    }
    set("onnxruntime", &cache::onnxruntime()?.to_string_lossy());
    set("admin_listen", &admin.to_string());
    // For whoever wants to see the same with devices in processes of their own.
    if let Some(workers) = std::env::var("FAASWAP_TEST_WORKERS")
        .ok()
        .filter(|_| !options.settings.iter().any(|line| line.starts_with("workers")))
    {
        set("workers", &workers);
    }
    set("tcp_listen", &tcp.map_or_else(|| "off".to_owned(), |tcp| tcp.to_string()));
    for line in &options.settings {
        text.push_str(line);
        text.push('\n');
    }
    for device in &options.devices {
        let DeviceOptions { name, memory, chunk, link_mib_per_s, lanes } = device;
        let link = link_mib_per_s.map_or_else(String::new, |speed| format!("link_mib_per_s = {speed}\n"));
        let table = format!("\n[[device]]\nname = {name:?}\nmemory = {memory:?}\nchunk = {chunk:?}\nlanes = {lanes}\n");
        // Writing to a string does not fail.
        let _infallible = write!(text, "{table}{link}");
    }
    Ok(text)
}

/// What a sidecar shall be like.
#[derive(Clone, Debug)]
pub struct SidecarOptions {
    /// Its function's name.
    pub function: String,
    /// Its model file.
    pub model: PathBuf,
    /// Its deadline.
    pub slo_ms: u64,
    /// More settings, such as `("FAASWAP_LATE", "refuse")`.
    pub env: Vec<(String, String)>,
}

impl SidecarOptions {
    /// A sidecar of this function.
    pub fn new(function: &str, model: &Path, slo_ms: u64) -> Self {
        Self { function: function.to_owned(), model: model.to_owned(), slo_ms, env: Vec::new() }
    }

    /// With one more setting.
    #[must_use]
    pub fn with(mut self, key: &str, value: &str) -> Self {
        self.env.push((key.to_owned(), value.to_owned()));
        self
    }
}

/// A sidecar in a process.
#[derive(Debug)]
pub struct Sidecar {
    process: Process,
    function: String,
    address: SocketAddr,
    metrics: SocketAddr,
}

impl Sidecar {
    /// Starts one against a broker's Unix socket. Its log goes to the broker's folder.
    pub fn start(broker: &Broker, options: &SidecarOptions) -> Result<Self> {
        let (address, metrics) = (free_port()?, free_port()?);
        let name = format!("sidecar-{}", options.function.replace('/', "_"));
        let process = Process::start(&name, &cache::program("faaswap-sidecar")?, broker.folder(), |command| {
            command
                .env("FAASWAP_BROKER_SOCKET", broker.socket())
                .env("FAASWAP_FUNCTION", &options.function)
                .env("FAASWAP_MODEL", &options.model)
                .env("FAASWAP_SLO_MS", options.slo_ms.to_string())
                .env("FAASWAP_LISTEN", address.to_string())
                .env("FAASWAP_METRICS_LISTEN", metrics.to_string())
                .env("FAASWAP_SLAB_REQUEST_MIB", "8")
                .env("FAASWAP_SLAB_RESPONSE_MIB", "8")
                .envs(options.env.iter().map(|(key, value)| (key, value)));
        })?;
        Ok(Self { process, function: options.function.clone(), address, metrics })
    }

    /// Waits until its function can be called.
    pub fn wait_ready(&mut self) -> Result<()> {
        let (address, what) = (self.address, format!("function {} to be ready", self.function));
        self.process.wait_for(&what, FUNCTION_READY_WITHIN, || is_ready(address, "/v2/health/ready"))
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Its function's name.
    pub fn function(&self) -> &str {
        &self.function
    }

    /// Where clients reach it.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where operators reach it.
    pub fn metrics(&self) -> SocketAddr {
        self.metrics
    }

    /// A client of it.
    pub fn client(&self, patience: Duration) -> Client {
        Client::new(self.address, patience)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::float_cmp, reason = "small whole numbers")]
    fn a_metric_is_summed_over_its_labels_and_not_mixed_with_longer_names() {
        let text = "# HELP a_total x\na_total{d=\"0\"} 2\na_total{d=\"1\"} 3\na_total_more 7\nb 4 1700000000\n";
        assert_eq!(metric_sum(text, "a_total"), 5.0);
        assert_eq!(metric_sum(text, "b"), 4.0);
        assert_eq!(metric_sum(text, "c"), 0.0);
    }
}
