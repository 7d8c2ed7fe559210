//! What a broker and its workers say to each other. Both are the same program, so there are no versions.

use std::{path::PathBuf, time::Duration};

use faaswap_device::{DeviceError, PciAddress, SwapReport, cuda::KindKey};
use faaswap_protocol::{Bytes, DType, Detail, Refusal, Shape, SlabLayout, Span};
use serde::{Deserialize, Serialize};

/// What a worker shall be.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spec {
    /// Its device.
    pub device: DeviceSpec,
    /// Runs at a time.
    pub lanes: u16,
    /// ONNX Runtime's shared library.
    pub onnxruntime: PathBuf,
    /// Threads that work on one run.
    pub threads_per_run: usize,
    /// Most scratch memory of all runs together.
    pub scratch_max: Bytes,
    /// Memory for the inputs and outputs of one run.
    pub exchange: SlabLayout,
}

impl Spec {
    /// The same with as much memory as was found, for the next life: what is free by then may be something else.
    pub(crate) fn with_memory_of(mut self, facts: &Facts) -> Self {
        if let DeviceSpec::Gpu { memory, .. } = &mut self.device {
            let found = u64::try_from(facts.chunks).ok().and_then(|chunks| facts.chunk.get().checked_mul(chunks));
            *memory = found.map(Bytes::new).or(*memory);
        }
        self
    }
}

/// A worker's device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum DeviceSpec {
    /// The processor, with bounded memory.
    Host {
        /// For logs and metrics.
        name: String,
        /// Memory for weights.
        capacity: Bytes,
        /// Unit in which it is given out.
        chunk: Bytes,
        /// Speed of the link; as fast as the machine can where absent.
        link_bytes_per_second: Option<u64>,
    },
    /// A GPU.
    Gpu {
        /// For logs and metrics.
        name: String,
        /// Which, by the driver's count.
        ordinal: u32,
        /// Memory for weights; absent: what is free, less the reserve.
        memory: Option<Bytes>,
        /// What is left to everything else then.
        reserve: Bytes,
        /// Unit in which memory is given out; absent: what is usual.
        chunk: Option<Bytes>,
        /// Whether programs are made of others of their kind.
        twins: bool,
    },
}

impl DeviceSpec {
    /// The device's name.
    pub fn name(&self) -> &str {
        match self {
            Self::Host { name, .. } | Self::Gpu { name, .. } => name,
        }
    }
}

/// What a worker found when it opened its device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Memory for weights.
    pub capacity: Bytes,
    /// Unit in which it is given out.
    pub chunk: Bytes,
    /// How many such units a GPU's pool has.
    pub chunks: usize,
    /// Where the device sits on its bus.
    #[serde(with = "address")]
    pub pci: Option<PciAddress>,
    /// A GPU's compute capability.
    pub capability: Option<i32>,
}

/// A PCI address as text.
mod address {
    use faaswap_device::PciAddress;
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(at: &Option<PciAddress>, to: S) -> Result<S::Ok, S::Error> {
        at.map(|at| at.to_string()).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<PciAddress>, D::Error> {
        let text = Option::<String>::deserialize(from)?;
        text.map(|text| text.parse().map_err(|_| D::Error::custom("no PCI address"))).transpose()
    }
}

/// Weights that the broker has told a worker of.
pub(crate) type WeightsId = u64;
/// A model in a worker.
pub(crate) type ModelId = u32;
/// A question that is answered.
pub(crate) type Call = u64;

/// From the broker. Done in this order, or begun in it where it takes time.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum ToWorker {
    /// The first message.
    Open(Box<Spec>),
    /// A lane's socket and memory come with it.
    Lane,
    /// The file comes with it. Where not all bytes are there, `Filled` tells when they are.
    Weights {
        weights: WeightsId,
        size: Bytes,
        full: bool,
    },
    Filled {
        weights: WeightsId,
        until: Bytes,
    },
    NotFilled {
        weights: WeightsId,
        why: Fault,
    },
    /// Readies them for fast copies.
    Pin {
        call: Call,
        weights: WeightsId,
    },
    Forget {
        weights: WeightsId,
    },
    Bind {
        call: Call,
        model: ModelId,
        prepared: PathBuf,
    },
    Unbind {
        model: ModelId,
    },
    SwapIn {
        call: Call,
        model: ModelId,
        weights: WeightsId,
        from: Option<Held>,
    },
    SwapOut {
        call: Call,
        model: ModelId,
    },
    /// Another worker copies a model's weights from here, until they are returned.
    Lend {
        model: ModelId,
    },
    Return {
        model: ModelId,
    },
    /// Reads weights back and compares them.
    Compare {
        call: Call,
        model: ModelId,
        weights: WeightsId,
    },
    Knows {
        call: Call,
        kind: KindKey,
    },
    /// Asks for descriptors of the pool's chunks, for the workers of all other GPUs or of one.
    Share {
        call: Call,
        to: Option<u32>,
    },
    /// Some chunks of another GPU's pool; the last ones if so many have come.
    Chunks {
        gpu: u32,
        chunk: Bytes,
        of: u32,
    },
    /// Gives up another GPU's pool.
    ForgetPool {
        call: Call,
        gpu: u32,
    },
    /// Makes the device fail, for tests.
    Fail,
}

/// Where another worker holds weights: in which GPU's pool, and in which chunks of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Held {
    pub(crate) gpu: u32,
    pub(crate) chunks: Vec<u32>,
}

/// From a worker.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum FromWorker {
    Opened(Facts),
    /// It cannot be opened; the worker ends.
    Failed(String),
    Ended {
        call: Call,
        result: Result<Answer, Fault>,
    },
    /// Descriptors of some of the pool's chunks come with it; the answer to `Share` follows the last ones.
    Chunks {
        to: Option<u32>,
    },
}

/// What a call gives.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    Done,
    Bound {
        has_range: bool,
        is_twin: bool,
    },
    SwappedIn {
        report: Report,
        chunks: Vec<u32>,
        mapped: Bytes,
    },
    SwappedOut {
        mapped: Bytes,
    },
    /// Where the first piece lies that differs.
    Compared {
        differs_at: Option<u64>,
    },
    Knows(Option<bool>),
}

/// [`SwapReport`], as it travels.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    copied: Bytes,
    waited: Duration,
    queueing: Duration,
    took: Duration,
    mapping: Duration,
}

impl From<SwapReport> for Report {
    fn from(SwapReport { copied, waited, queueing, took, mapping }: SwapReport) -> Self {
        Self { copied, waited, queueing, took, mapping }
    }
}

impl From<Report> for SwapReport {
    fn from(Report { copied, waited, queueing, took, mapping }: Report) -> Self {
        Self { copied, waited, queueing, took, mapping }
    }
}

/// [`DeviceError`], or a reason in words, as it travels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Fault {
    Lost,
    OutOfMemory { needed: Bytes, free: Bytes },
    Other(String),
}

impl From<DeviceError> for Fault {
    fn from(error: DeviceError) -> Self {
        match error {
            DeviceError::Lost => Self::Lost,
            DeviceError::OutOfMemory { needed, free } => Self::OutOfMemory { needed, free },
            DeviceError::Failed { .. } | DeviceError::State { .. } | DeviceError::Invalid(_) => {
                Self::Other(error.to_string())
            }
        }
    }
}

impl From<Fault> for DeviceError {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Lost => Self::Lost,
            Fault::OutOfMemory { needed, free } => Self::OutOfMemory { needed, free },
            Fault::Other(reason) => Self::Failed { call: "what the device's process was asked for", reason },
        }
    }
}

/// To a lane, on its own socket.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum ToLane {
    Run(Ask),
    /// A run is about to come.
    Look,
}

/// One run.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Ask {
    /// So many messages of the broker come before it.
    pub(crate) after: u64,
    pub(crate) model: ModelId,
    /// Each in the lane's memory.
    pub(crate) inputs: Vec<(DType, Shape, Span)>,
    pub(crate) wanted: Vec<u16>,
}

/// What became of it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Ran {
    /// Positions in the signature, and where the outputs are in the lane's memory.
    Done(Vec<(u16, DType, Shape, Span)>),
    Refused(Refusal),
    Failed(Detail),
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn what_was_found_and_what_went_wrong_come_as_they_were_sent() {
        for pci in [None, Some("0000:06:00.0".parse().unwrap())] {
            let (capacity, chunk) = (Bytes::mib(100), Bytes::mib(16));
            let facts = Facts { capacity, chunk, chunks: 7, pci, capability: Some(90) };
            let bytes = postcard::to_allocvec(&FromWorker::Opened(facts.clone())).unwrap();
            let Ok(FromWorker::Opened(there)) = postcard::from_bytes(&bytes) else { panic!("another message") };
            assert_eq!(there, facts);
        }
        let full = DeviceError::OutOfMemory { needed: Bytes::mib(2), free: Bytes::mib(1) };
        for error in [DeviceError::Lost, full] {
            assert_eq!(DeviceError::from(Fault::from(error.clone())), error);
        }
        let told = DeviceError::from(Fault::from(DeviceError::Invalid("no such thing"))).to_string();
        assert!(told.contains("no such thing"), "{told}");
    }

    #[test]
    fn a_gpu_is_opened_anew_with_the_memory_that_it_had() {
        let (name, reserve, chunk) = ("cuda0".to_owned(), Bytes::mib(8192), None);
        let device = DeviceSpec::Gpu { name, ordinal: 0, memory: None, reserve, chunk, twins: true };
        let exchange = SlabLayout { request: Bytes::mib(1), response: Bytes::mib(1) };
        let (onnxruntime, scratch_max) = (PathBuf::new(), Bytes::mib(1));
        let spec = Spec { device, lanes: 4, onnxruntime, threads_per_run: 1, scratch_max, exchange };
        let facts = Facts { capacity: Bytes::mib(96), chunk: Bytes::mib(16), chunks: 7, pci: None, capability: None };
        let DeviceSpec::Gpu { memory, .. } = spec.with_memory_of(&facts).device else { panic!("another device") };
        assert_eq!(memory, Some(Bytes::mib(112)));
    }
}
