//! What can be configured: a TOML file, and `FAASWAP_` variables over it. Every mistake is reported at once.

mod read;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use config::{Config, Environment, File, FileFormat};
use faaswap_device::cuda;
use faaswap_protocol::Bytes;
use faaswap_scheduler::PolicyKind;

use self::read::Reader;
use crate::limits::DEVICES_MAX;

/// Lanes of a GPU where no number is named: more run at once than one program fills, few enough to keep each quick.
const GPU_LANES: u16 = 4;
/// How rarely weights are read back: a large model's take tens of milliseconds of a link's other direction.
const VERIFY_EVERY: usize = 1000;
/// What chunks of a GPU's memory are multiples of.
const GPU_GRANULARITY: Bytes = Bytes::mib(2);
/// How yes and no are written.
const SWITCH: [(&str, bool); 4] = [("true", true), ("false", false), ("on", true), ("off", false)];

/// Whether devices have processes of their own.
const WORKERS: [(&str, Option<bool>); 3] = [("auto", None), ("on", Some(true)), ("off", Some(false))];

/// What the random policy's choices follow from.
pub(crate) const POLICY_SEED: u64 = 1;
/// Policies of the scheduler; all but the first are there to be compared with.
const POLICIES: [PolicyKind; 5] = PolicyKind::all(POLICY_SEED);

/// All mistakes of a configuration.
#[derive(Debug, thiserror::Error)]
#[error("the configuration has {} mistake(s):\n  {}", .0.len(), .0.join("\n  "))]
pub struct ConfigError(pub Vec<String>);

/// What a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// The processor, with bounded memory.
    Host {
        /// Speed of the link; as fast as the machine can where absent.
        link_mib_per_s: Option<u64>,
    },
    /// A GPU.
    Gpu {
        /// Which, by the driver's count.
        ordinal: u32,
        /// What is left to everything but weights, where no amount for them is named.
        reserve: Bytes,
    },
}

/// One device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSettings {
    /// For logs and metrics.
    pub name: String,
    /// What it is.
    pub kind: DeviceKind,
    /// Memory for weights; absent: what is usual for its kind.
    pub memory: Option<Bytes>,
    /// Unit in which it is given out; absent: what is usual for its kind.
    pub chunk: Option<Bytes>,
    /// Models that run at a time.
    pub lanes: u16,
}

/// Which devices to use where none is listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DevicesChoice {
    /// GPUs if there are any, else the host device.
    Auto,
    /// All GPUs.
    Gpu,
    /// The host device.
    Host,
}

/// The broker's settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Unix socket for sidecars.
    pub socket: PathBuf,
    /// Its mode: who may connect.
    pub socket_mode: u32,
    /// Port for peers that cannot pass file descriptors; absent: none.
    pub tcp_listen: Option<SocketAddr>,
    /// Port for operators: health, metrics, lists.
    pub admin_listen: Option<SocketAddr>,
    /// Folder for models on disk.
    pub store_dir: PathBuf,
    /// Most bytes of models in that folder.
    pub store_max: Bytes,
    /// Folder in memory (a tmpfs) for weights.
    pub memory_dir: PathBuf,
    /// Most bytes of weights there.
    pub host_memory: Bytes,
    /// ONNX Runtime's shared library.
    pub onnxruntime: PathBuf,
    /// Threads that work on one run.
    pub threads_per_run: usize,
    /// Most scratch memory of all runs together.
    pub scratch_max: Bytes,
    /// Largest model that may be uploaded.
    pub model_max: Bytes,
    /// Largest slab that a connection gets, both halves together.
    pub slab_max: Bytes,
    /// Most functions on this node.
    pub functions_max: usize,
    /// Most waiting requests of one function.
    pub function_queue_max: usize,
    /// Most waiting requests.
    pub node_queue_max: usize,
    /// How long a model stays loaded after its last function has gone.
    pub keep_warm: Duration,
    /// How long preparing one model may take.
    pub prepare_within: Duration,
    /// Models that are prepared at a time on the processor; on a GPU it is always one.
    pub prepare_parallel: usize,
    /// How long requests may take to end after SIGTERM.
    pub drain_within: Duration,
    /// Which devices to use where none is listed.
    pub devices_choice: DevicesChoice,
    /// Whether each device has a process of its own, so that its faults are nobody else's; absent: GPUs, where there are several.
    pub workers: Option<bool>,
    /// Memory for weights on each GPU that names none of its own; absent: what is free, less a reserve.
    pub gpu_memory: Option<Bytes>,
    /// Whether to serve with the host device where no GPU can be used.
    pub gpu_fallback: bool,
    /// Whether fp32 products on GPUs may be computed in TF32, as PyTorch's convolutions are, where a function does not say.
    pub tf32: bool,
    /// Whether GPUs bind models of a kind without a session of each, and move their programs to where weights are: else these are mapped at each swap-in.
    pub bind_by_kind: bool,
    /// One swap-in in so many is read back from its device and compared; 0 for none.
    pub verify_every: u64,
    /// Who decides what runs where.
    pub policy: PolicyKind,
    /// Whether models are brought before a request that a hint or a rhythm foretells.
    pub prefetch: bool,
    /// File in which the scheduler's events and actions are recorded; absent: none.
    pub trace: Option<PathBuf>,
    /// Most bytes of that file.
    pub trace_max: Bytes,
    /// Whether the admin port lets devices fail, to test what happens then.
    pub test_faults: bool,
    /// The devices that are listed.
    pub devices: Vec<DeviceSettings>,
}

impl Settings {
    /// Reads the file, where one is named, and the environment.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        let mut text = String::new();
        if let Some(path) = file {
            text = std::fs::read_to_string(path)
                .map_err(|e| ConfigError(vec![format!("{} cannot be read: {e}", path.display())]))?;
        }
        Self::from_parts(&text, Environment::with_prefix("FAASWAP"))
    }

    fn from_parts(text: &str, environment: Environment) -> Result<Self, ConfigError> {
        let build = |config: Result<Config, config::ConfigError>| config.map_err(|e| ConfigError(vec![e.to_string()]));
        let file = build(Config::builder().add_source(File::from_str(text, FileFormat::Toml)).build())?;
        let merged = Config::builder().add_source(file.clone()).add_source(environment.prefix_separator("_"));
        let merged = build(merged.build())?;
        let mut reader = Reader::new(&merged);
        let settings = Self::read(&mut reader);
        let devices = file.get_array("device").unwrap_or_default();
        let devices: Vec<_> = devices.into_iter().enumerate().map(|(i, value)| device(&mut reader, i, value)).collect();
        reader.refuse_unknown(&file, &["device"]);
        let settings = Self { devices, ..settings };
        settings.check(&mut reader);
        reader.finish(settings)
    }

    fn read(from: &mut Reader) -> Self {
        let uid = rustix::process::getuid().as_raw();
        Self {
            socket: from.path("socket", "/run/faaswap/broker.sock"),
            socket_mode: from.mode("socket_mode", 0o660),
            tcp_listen: from.address("tcp_listen", None),
            admin_listen: from.address("admin_listen", Some("127.0.0.1:9471")),
            store_dir: from.path("store_dir", "/var/lib/faaswap"),
            store_max: from.bytes("store_max", Bytes::mib(64 << 10)),
            memory_dir: from.path("memory_dir", &format!("/dev/shm/faaswap-{uid}")),
            host_memory: from.bytes("host_memory", half_of_memory()),
            onnxruntime: from.path("onnxruntime", &library_default()),
            threads_per_run: from.count("threads_per_run", 1, 1..=256),
            scratch_max: from.bytes("scratch_max", Bytes::mib(4096)),
            model_max: from.bytes("model_max", Bytes::mib(64 << 10)),
            slab_max: from.bytes("slab_max", Bytes::mib(256)),
            functions_max: from.count("functions_max", 4096, 1..=1 << 20),
            function_queue_max: from.count("function_queue_max", 256, 1..=1 << 20),
            node_queue_max: from.count("node_queue_max", 16_384, 1..=1 << 24),
            keep_warm: from.duration("keep_warm", Duration::from_secs(60)),
            prepare_within: from.duration("prepare_within", Duration::from_secs(600)),
            prepare_parallel: from.count("prepare_parallel", processors().div_ceil(2), 1..=256),
            drain_within: from.duration("drain_within", Duration::from_secs(25)),
            devices_choice: from.choice(
                "devices",
                DevicesChoice::Auto,
                &[("auto", DevicesChoice::Auto), ("gpu", DevicesChoice::Gpu), ("host", DevicesChoice::Host)],
            ),
            workers: from.choice("workers", None, &WORKERS),
            gpu_memory: from.optional_bytes("gpu_memory"),
            gpu_fallback: from.choice("gpu_fallback", false, &SWITCH),
            tf32: from.choice("tf32", true, &SWITCH),
            bind_by_kind: from.choice("bind_by_kind", true, &SWITCH),
            verify_every: from.count("verify_every", VERIFY_EVERY, 0..=usize::MAX) as u64,
            policy: from.choice("policy", PolicyKind::Faaswap, &POLICIES.map(|policy| (policy.name(), policy))),
            prefetch: from.choice("prefetch", true, &SWITCH),
            trace: from.optional_path("trace"),
            trace_max: from.bytes("trace_max", Bytes::mib(1024)),
            test_faults: from.choice("test_faults", false, &SWITCH),
            devices: Vec::new(),
        }
    }

    fn check(&self, reader: &mut Reader) {
        for (i, device) in self.devices.iter().enumerate() {
            if self.devices[..i].iter().any(|other| other.name == device.name) {
                reader.mistake(format!("two devices are named {}", device.name));
            }
            let unit = match device.kind {
                DeviceKind::Host { .. } => Bytes::of_len(rustix::param::page_size()),
                DeviceKind::Gpu { .. } => GPU_GRANULARITY,
            };
            if std::mem::discriminant(&device.kind) != std::mem::discriminant(&self.devices[0].kind) {
                reader.mistake(format!("device {}: all devices of a broker must be of one kind", device.name));
            }
            let Some(chunk) = device.chunk else { continue };
            if chunk == Bytes::ZERO || !chunk.get().is_multiple_of(unit.get()) {
                reader.mistake(format!("device {}: chunk must be a multiple of {unit}", device.name));
            } else if let Some(memory) = device.memory.filter(|memory| *memory < chunk) {
                reader.mistake(format!(
                    "device {}: memory ({memory}) must hold at least one chunk ({chunk})",
                    device.name
                ));
            }
        }
        if self.slab_max > faaswap_protocol::limits::SLAB_BYTES_MAX {
            reader.mistake(format!("slab_max: at most {}", faaswap_protocol::limits::SLAB_BYTES_MAX));
        }
        if !self.onnxruntime.is_file() {
            reader.mistake(format!(
                "onnxruntime: {} is no file; set it (or FAASWAP_ONNXRUNTIME) to libonnxruntime.so of version {}",
                self.onnxruntime.display(),
                faaswap_engine::ORT_VERSION
            ));
        }
    }
}

impl DeviceSettings {
    /// Which GPU it is, by the driver's count.
    pub(crate) fn ordinal(&self) -> Option<u32> {
        match self.kind {
            DeviceKind::Gpu { ordinal, .. } => Some(ordinal),
            DeviceKind::Host { .. } => None,
        }
    }

    /// What there is where nothing was configured: the processor as a device of 1 GiB.
    pub(crate) fn host0() -> Self {
        Self {
            name: "host0".to_owned(),
            kind: DeviceKind::Host { link_mib_per_s: None },
            memory: Some(Bytes::mib(1024)),
            chunk: Some(Bytes::mib(2)),
            lanes: 1,
        }
    }

    /// A GPU with the usual settings.
    pub(crate) fn gpu(ordinal: u32) -> Self {
        let kind = DeviceKind::Gpu { ordinal, reserve: cuda::RESERVE_DEFAULT };
        Self { name: format!("cuda{ordinal}"), kind, memory: None, chunk: None, lanes: GPU_LANES }
    }
}

fn device(reader: &mut Reader, index: usize, value: config::Value) -> DeviceSettings {
    let Ok(table) = value.into_table() else {
        reader.mistake(format!("device {index} is no table"));
        return DeviceSettings::host0();
    };
    let mut from = Reader::of_table(table, format!("device {index}: "));
    let default = match from.choice("kind", false, &[("host", false), ("gpu", true)]) {
        true => {
            let ordinal = from.count("gpu", index, 0..=DEVICES_MAX);
            let mut gpu = DeviceSettings::gpu(u32::try_from(ordinal).unwrap_or(0));
            if let DeviceKind::Gpu { reserve, .. } = &mut gpu.kind {
                *reserve = from.bytes("reserve", *reserve);
            }
            gpu
        }
        false => {
            let link_mib_per_s = from.optional_count("link_mib_per_s", 1..=1 << 30).map(|n| n as u64);
            let name = format!("host{index}");
            DeviceSettings { name, kind: DeviceKind::Host { link_mib_per_s }, ..DeviceSettings::host0() }
        }
    };
    let device = DeviceSettings {
        name: from.text("name", &default.name),
        memory: from.optional_bytes("memory").or(default.memory),
        chunk: from.optional_bytes("chunk").or(default.chunk),
        lanes: u16::try_from(from.count("lanes", usize::from(default.lanes), 1..=64)).unwrap_or(1),
        kind: default.kind,
    };
    from.refuse_unknown_in(&[]);
    reader.take_mistakes(from);
    device
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn half_of_memory() -> Bytes {
    let info = rustix::system::sysinfo();
    #[expect(clippy::useless_conversion, reason = "the width differs between targets")]
    let total = u64::from(info.totalram).saturating_mul(u64::from(info.mem_unit));
    Bytes::new(total / 2)
}

fn library_default() -> String {
    std::env::var("ORT_DYLIB_PATH").unwrap_or_else(|_| "/usr/lib/faaswap/libonnxruntime.so".to_owned())
}

#[cfg(test)]
mod tests;
