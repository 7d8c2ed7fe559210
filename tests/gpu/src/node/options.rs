//! What a run against a whole broker is told: `--name value` after its folders, or a variable `FAASWAP_NODE_NAME`.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use faaswap_device::cuda;
use faaswap_protocol::Bytes;

use crate::Result;

/// Memory for weights on each GPU, as in the published evaluation.
const GPU_MEMORY: Bytes = Bytes::new(25_000_000_000);
/// Memory for weights on each host device that stands for a GPU.
const HOST_MEMORY: Bytes = Bytes::mib(64);
/// Memory of a host device is given out in units of this size.
const HOST_CHUNK: Bytes = Bytes::new(256 << 10);
/// Speed of a host device's link where none is named: slow enough to be seen.
const HOST_LINK_MIB: u64 = 1024;
/// Longest run where no time is named.
const WITHIN: Duration = Duration::from_secs(540);
/// Chosen where no environment variable says otherwise.
const SECONDS: u64 = 40;

/// How a run is arranged.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// Folder of models, one folder each.
    pub(crate) models: PathBuf,
    pub(crate) out: PathBuf,
    /// Devices of the broker.
    pub(crate) devices: Devices,
    /// Memory for weights on each device.
    pub(crate) memory: Bytes,
    /// How many functions; as many as host memory has weights for where it is not named.
    pub(crate) functions: Option<usize>,
    /// Weights of all functions together; as many as free memory has room for where it is not named.
    pub(crate) weights_max: Option<Bytes>,
    /// Length of one step under load.
    pub(crate) seconds: u64,
    pub(crate) seconds_are_default: bool,
    /// Length of the first step, where that is longer.
    pub(crate) hold: u64,
    /// Rate of the second step, where it is not told by the first.
    pub(crate) then: Option<f64>,
    /// Seconds at nearly the most that is carried, at last, while memory is watched.
    pub(crate) soak: u64,
    /// When all must have ended.
    pub(crate) until: Instant,
    /// Policies of the broker, one after the other on the same requests.
    pub(crate) policies: Vec<String>,
    pub(crate) seed: u64,
    /// Requests of the trace are multiplied by that at first.
    pub(crate) rate: f64,
    pub(crate) rate_is_default: bool,
    /// Steps with other rates; 0 for the first rate only.
    pub(crate) steps: usize,
    /// Models of this type only, where they name one.
    pub(crate) dtype: String,
    /// That model only.
    pub(crate) only: Option<String>,
    /// Whether devices are in workers, as the broker's settings say it: `auto`, `on`, `off`.
    pub(crate) workers: String,
    /// The deadline of all functions, where it is not their model's.
    pub(crate) deadline: Option<Duration>,
    /// Where a folder for weights, sockets and prepared models is made: in memory.
    pub(crate) root: PathBuf,
}

/// What the broker serves with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Devices {
    /// So many GPUs.
    Gpus(usize),
    /// So many host devices with a link of this speed.
    Hosts { count: usize, link_mib: u64 },
}

impl Devices {
    pub(crate) fn count(self) -> usize {
        match self {
            Self::Gpus(count) | Self::Hosts { count, .. } => count,
        }
    }

    /// The same with fewer of them.
    pub(crate) fn with(self, count: usize) -> Self {
        match self {
            Self::Gpus(_) => Self::Gpus(count),
            Self::Hosts { link_mib, .. } => Self::Hosts { count, link_mib },
        }
    }

    /// The unit in which their memory is given out.
    pub(crate) fn chunk(self) -> Bytes {
        match self {
            Self::Gpus(_) => cuda::CHUNK_DEFAULT,
            Self::Hosts { .. } => HOST_CHUNK,
        }
    }

    pub(crate) fn is_host(self) -> bool {
        matches!(self, Self::Hosts { .. })
    }
}

/// `--name value` pairs, each name known, and `FAASWAP_NODE_NAME` for those that are not given.
struct Pairs<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Pairs<'a> {
    const NAMES: [&'static str; 20] = [
        "host",
        "gpus",
        "link-mib",
        "memory-mib",
        "functions",
        "weights-gb",
        "seconds",
        "hold",
        "then",
        "soak",
        "within",
        "policy",
        "seed",
        "rate",
        "steps",
        "dtype",
        "deadline-ms",
        "root",
        "only",
        "workers",
    ];

    fn read(args: &[&'a str]) -> Result<Self> {
        let mut pairs = Vec::new();
        for pair in args.chunks(2) {
            let name = pair[0].strip_prefix("--").filter(|name| Self::NAMES.contains(name));
            let (Some(name), Some(value)) = (name, pair.get(1)) else {
                return Err(format!(
                    "{} with a value is expected, not {pair:?}",
                    Self::NAMES.map(|n| format!("--{n}")).join(", ")
                )
                .into());
            };
            pairs.push((name, *value));
        }
        Ok(Self(pairs))
    }

    fn text(&self, name: &str) -> Option<String> {
        let given = self.0.iter().rev().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
        let variable = || format!("FAASWAP_NODE_{}", name.replace('-', "_").to_uppercase());
        given.or_else(|| std::env::var(variable()).ok()).filter(|text| !text.is_empty())
    }

    fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>> {
        let Some(text) = self.text(name) else { return Ok(None) };
        text.parse().map(Some).map_err(|_| format!("--{name}: `{text}` is no such number").into())
    }
}

impl Options {
    /// Reads what stands behind the subcommand and its folders.
    pub(crate) fn read(models: &Path, out: &Path, args: &[&str]) -> Result<Self> {
        let start = Instant::now();
        let pairs = Pairs::read(args)?;
        let devices = match pairs.number::<usize>("host")? {
            Some(count) => {
                Devices::Hosts { count: count.max(1), link_mib: pairs.number("link-mib")?.unwrap_or(HOST_LINK_MIB) }
            }
            None => {
                let there = usize::try_from(cuda::count()?)?;
                Devices::Gpus(pairs.number("gpus")?.unwrap_or(there).min(there))
            }
        };
        if devices.count() == 0 {
            return Err("there is no GPU; --host N takes host devices".into());
        }
        let memory = if devices.is_host() { HOST_MEMORY } else { GPU_MEMORY };
        let seconds = |name: &str| -> Result<Option<Duration>> {
            Ok(pairs.number(name)?.map(|s: f64| Duration::try_from_secs_f64(s).unwrap_or(WITHIN)))
        };
        Ok(Self {
            models: models.to_owned(),
            out: out.to_owned(),
            devices,
            workers: pairs.text("workers").unwrap_or_else(|| "auto".to_owned()),
            memory: pairs.number("memory-mib")?.map_or(memory, Bytes::mib),
            functions: pairs.number("functions")?,
            weights_max: pairs.number("weights-gb")?.map(|gb: u64| Bytes::new(gb.saturating_mul(1_000_000_000))),
            seconds: pairs.number("seconds")?.unwrap_or(SECONDS).max(1),
            seconds_are_default: pairs.text("seconds").is_none(),
            hold: pairs.number("hold")?.unwrap_or(0),
            then: pairs.number("then")?,
            soak: pairs.number("soak")?.unwrap_or(0),
            until: start + seconds("within")?.unwrap_or(WITHIN),
            policies: pairs
                .text("policy")
                .unwrap_or_else(|| "faaswap".to_owned())
                .split(',')
                .map(str::to_owned)
                .collect(),
            seed: pairs.number("seed")?.unwrap_or(1),
            rate: pairs.number("rate")?.unwrap_or(1.0),
            rate_is_default: pairs.text("rate").is_none(),
            steps: pairs.number("steps")?.unwrap_or(8),
            dtype: pairs.text("dtype").unwrap_or_else(|| "fp32".to_owned()),
            only: pairs.text("only"),
            deadline: pairs.number("deadline-ms")?.map(Duration::from_millis),
            root: pairs.text("root").map_or_else(|| PathBuf::from("/dev/shm"), PathBuf::from),
        })
    }

    /// What is left of the time.
    pub(crate) fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }
}
