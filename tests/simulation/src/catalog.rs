//! Models and nodes: what was published of the paper's hardware, and what we measured on ours.

use faaswap_protocol::Bytes;

/// Nanoseconds; simulated time is an integer.
pub type Nanos = u64;
/// A millisecond.
pub const MS: Nanos = 1_000_000;
/// A second.
pub const SECOND: Nanos = 1_000_000_000;

/// One model on one kind of device.
#[derive(Clone, Copy, Debug)]
pub struct ModelSpec {
    /// Its name.
    pub name: &'static str,
    /// What a swap-in copies.
    pub weights: Bytes,
    /// A run with the weights there and nothing beside it.
    pub run: Nanos,
    /// A run behind a swap-in takes this on top of the longer of copy and run.
    pub tail: Nanos,
    /// How much a run slows down per run beside it.
    pub strain: f64,
    /// The deadline that its functions have.
    pub deadline: Nanos,
}

/// One device.
#[derive(Clone, Copy, Debug)]
pub struct DeviceSpec {
    /// Memory for weights.
    pub capacity: Bytes,
    /// Lanes.
    pub lanes: u16,
    /// Its host link alone, bytes a second.
    pub link: u64,
    /// What a swap-in takes of the link beyond its bytes.
    pub per_swap: Nanos,
}

/// One node.
#[derive(Clone, Debug)]
pub struct NodeSpec {
    /// Its devices.
    pub devices: Vec<DeviceSpec>,
    /// Devices that share a path to host memory, with what it carries in all.
    pub shared: Vec<(Vec<usize>, u64)>,
    /// Bytes a second from one device to another.
    pub peers: Vec<(usize, usize, u64)>,
    /// The unit in which memory is given out.
    pub chunk: Bytes,
}

impl NodeSpec {
    /// What a model takes on a device.
    pub fn charge(&self, weights: Bytes) -> Bytes {
        weights.checked_round_up(self.chunk).unwrap_or(weights)
    }

    /// Whether these are all of its devices, and more than a pair: what they share is what all host links carry at once.
    pub(crate) fn is_all_of_many(&self, devices: &[usize]) -> bool {
        devices.len() > 2 && devices.len() == self.devices.len()
    }
}

const GB: u64 = 1_000_000_000;

/// The paper's host link (PCIe 3 x16) as its Table 4 shows it, and what a pair of GPUs shares as its Table 3 shows it.
///
/// With these two numbers and a tail per model, all of Table 4 follows exactly, and Table 3 within 7%.
const V100_LINK: u64 = 9_600_000_000;
const V100_PAIR: u64 = 12 * GB;

/// The paper's models: megabytes of weights; run and host swap of its Table 4 in milliseconds; the deadline.
const PAPER: [(&str, f64, u64, u64, u64); 8] = [
    ("densenet169", 56.6, 25, 27, 80),
    ("densenet201", 80.0, 28, 30, 80),
    ("inception_v3", 95.2, 14, 17, 80),
    ("efficientnet_b0", 21.2, 12, 13, 80),
    ("resnet50", 102.2, 9, 13, 80),
    ("resnet101", 178.0, 14, 22, 80),
    ("resnet152", 240.8, 17, 25, 80),
    ("bert_large_qa", 1340.0, 43, 144, 200),
];

/// The paper's models on its hardware; one run at a time per GPU, so that `strain` is what it would be there: 1.
pub fn paper_models() -> Vec<ModelSpec> {
    let model = |&(name, mb, run, swap, deadline): &(&'static str, f64, u64, u64, u64)| {
        let weights = megabytes(mb);
        let copy = nanos_at(weights, V100_LINK);
        let (run, swap) = (run * MS, swap * MS);
        let tail = swap.saturating_sub(run.max(copy));
        ModelSpec { name, weights, run, tail, strain: 1.0, deadline: deadline * MS }
    };
    PAPER.iter().map(model).collect()
}

/// The paper's node: `gpus` V100s of which 25 GB each hold weights, in pairs behind a switch, with NVLinks of two speeds.
pub fn paper_node(gpus: usize) -> NodeSpec {
    let device = DeviceSpec { capacity: Bytes::new(25 * GB), lanes: 1, link: V100_LINK, per_swap: 0 };
    let pairs = (0..gpus / 2).map(|pair| (vec![2 * pair, 2 * pair + 1], V100_PAIR)).collect();
    let mut peers = Vec::new();
    for from in 0..gpus {
        for to in (0..gpus).filter(|to| *to != from) {
            let wide = from + to == gpus - 1;
            peers.push((from, to, if wide { 48 * GB } else { 24 * GB }));
        }
    }
    NodeSpec { devices: vec![device; gpus], shared: pairs, peers, chunk: Bytes::mib(32) }
}

/// Our models on an H100, measured: batch 1, host memory pinned. What was not measured is scaled by its bytes.
pub fn h100_models() -> Vec<ModelSpec> {
    let us = |us: u64| us * 1_000;
    let model =
        |name, mb, run, tail, strain| ModelSpec { name, weights: megabytes(mb), run, tail, strain, deadline: 50 * MS };
    vec![
        model("resnet50_fp16", 51.0, us(840), us(40), 0.28),
        model("resnet50", 102.0, us(2200), us(220), 0.16),
        model("resnet152", 240.8, us(5190), us(220), 0.16),
        model("bert_base", 434.0, us(1670), us(210), 0.40),
        model("bert_large_qa", 1340.0, us(5160), us(210), 0.40),
    ]
}

/// The paper's eight models on an H100, with its deadlines: measured where we have measured, else scaled by bytes.
pub fn h100_paper_models() -> Vec<ModelSpec> {
    const RUN_US: [u64; 8] = [2_420, 3_420, 2_050, 1_000, 2_200, 3_830, 5_190, 5_160];
    let model = |(&(name, mb, _, _, deadline), run): (&(&'static str, f64, u64, u64, u64), u64)| {
        let strain = if deadline > 100 { 0.40 } else { 0.16 };
        ModelSpec { name, weights: megabytes(mb), run: run * 1_000, tail: 220_000, strain, deadline: deadline * MS }
    };
    PAPER.iter().zip(RUN_US).map(model).collect()
}

/// H100s: 72 GB each hold weights; pairs of links reach 46.8 GB/s each, alone 54.7; 393 GB/s between any two GPUs.
pub fn h100_node(gpus: usize) -> NodeSpec {
    let device = DeviceSpec { capacity: Bytes::new(72 * GB), lanes: 4, link: 54_700_000_000, per_swap: 0 };
    let pairs = (0..gpus / 2).map(|pair| (vec![2 * pair, 2 * pair + 1], 93_600_000_000)).collect();
    let between = |from| (0..gpus).filter(move |to| *to != from).map(move |to| (from, to, 393 * GB));
    NodeSpec {
        devices: vec![device; gpus],
        shared: pairs,
        peers: (0..gpus).flat_map(between).collect(),
        chunk: Bytes::mib(32),
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "tables hold small positive numbers")]
fn megabytes(mb: f64) -> Bytes {
    Bytes::new((mb * 1e6) as u64)
}

/// The time for these bytes at that speed.
pub fn nanos_at(bytes: Bytes, bytes_per_s: u64) -> Nanos {
    u64::try_from(u128::from(bytes.get()) * u128::from(SECOND) / u128::from(bytes_per_s.max(1))).unwrap_or(u64::MAX)
}
