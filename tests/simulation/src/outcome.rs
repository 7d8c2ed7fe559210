//! What came of a simulation: per function, per device, and as a whole.

use crate::catalog::{MS, Nanos, SECOND};

/// One function's requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Requests that came.
    pub asked: u32,
    /// Answers within the deadline.
    pub met: u32,
    /// Answers.
    pub answered: u32,
    /// Refusals.
    pub refused: u32,
}

impl Tally {
    /// Whether 98 of 100 were answered in time.
    pub fn is_compliant(&self) -> bool {
        u64::from(self.met) * 100 >= u64::from(self.asked) * 98
    }
}

/// One device's work.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Time with a run on some lane.
    pub busy: Nanos,
    /// Requests that it answered.
    pub answered: u64,
    /// Bytes that came over its host link.
    pub copied: f64,
    /// Swap-ins from the host, and from other devices.
    pub swaps: (u64, u64),
}

/// Everything.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// By place of the function.
    pub functions: Vec<Tally>,
    /// By place of the device.
    pub devices: Vec<Work>,
    /// Latencies of all answers in microseconds, sorted.
    pub latencies_us: Vec<u32>,
    /// Answers to requests that were started with their weights there.
    pub found_resident: u64,
    /// Latencies of all others in microseconds, sorted: their weights had to be brought.
    pub swapped_us: Vec<u32>,
    /// A digest of every event and action, to compare two runs.
    pub digest: u64,
    /// Events that the scheduler took in.
    pub steps: u64,
    /// What each step of the scheduler took on this machine, where that was asked for: the only thing here that does
    /// not follow from the seed.
    pub step_nanos: Vec<u32>,
    /// The scheduler's trace, where that was asked for.
    pub trace: String,
    /// The simulated span.
    pub span: Nanos,
}

impl Outcome {
    /// Functions that met their objective.
    pub fn compliant(&self) -> usize {
        self.functions.iter().filter(|tally| tally.is_compliant()).count()
    }

    /// Whether all did.
    pub fn all_compliant(&self) -> bool {
        self.compliant() == self.functions.len()
    }

    /// The share of functions that did.
    pub fn compliant_share(&self) -> f64 {
        ratio(self.compliant() as u64, self.functions.len() as u64)
    }

    /// All requests.
    pub fn requests(&self) -> u64 {
        self.functions.iter().map(|tally| u64::from(tally.asked)).sum()
    }

    /// Requests that were not answered in time.
    pub fn missed(&self) -> u64 {
        self.functions.iter().map(|tally| u64::from(tally.asked - tally.met)).sum()
    }

    /// The mean latency in milliseconds.
    pub fn mean_ms(&self) -> f64 {
        let sum: u64 = self.latencies_us.iter().map(|us| u64::from(*us)).sum();
        ratio(sum, 1_000) / ratio(self.latencies_us.len() as u64, 1).max(1.0)
    }

    /// The share of answers to requests that found their weights on a device.
    pub fn resident_share(&self) -> f64 {
        ratio(self.found_resident, self.latencies_us.len() as u64)
    }

    /// The median latency of answers whose weights had to be brought, in milliseconds.
    pub fn swapped_ms(&self) -> f64 {
        self.swapped_us.get(self.swapped_us.len() / 2).map_or(0.0, |us| f64::from(*us) / 1e3)
    }

    /// That part of answers came within this many milliseconds.
    pub fn latency_ms(&self, permille: usize) -> f64 {
        let last = self.latencies_us.len().saturating_sub(1);
        let at = (self.latencies_us.len() * permille).div_ceil(1000).saturating_sub(1).min(last);
        self.latencies_us.get(at).map_or(0.0, |us| f64::from(*us) / 1e3)
    }

    /// Deviation of the devices' answers over their mean.
    pub fn load_cov(&self) -> f64 {
        let loads: Vec<f64> = self.devices.iter().map(|device| ratio(device.busy, MS)).collect();
        let mean = loads.iter().sum::<f64>() / ratio(loads.len() as u64, 1).max(1.0);
        let variance =
            loads.iter().map(|load| (load - mean).powi(2)).sum::<f64>() / ratio(loads.len() as u64, 1).max(1.0);
        if mean > 0.0 { variance.sqrt() / mean } else { 0.0 }
    }

    /// Copies of weights from device to device, a second.
    pub fn peer_swaps_per_s(&self) -> f64 {
        ratio(self.devices.iter().map(|device| device.swaps.1).sum(), 1) / ratio(self.span, SECOND)
    }

    /// Puts the outcomes of several nodes together.
    pub fn merge(outcomes: Vec<Self>) -> Self {
        let mut all = Self::default();
        for one in outcomes {
            all.functions.extend(one.functions);
            all.devices.extend(one.devices);
            all.latencies_us.extend(one.latencies_us);
            all.swapped_us.extend(one.swapped_us);
            all.found_resident += one.found_resident;
            all.digest = all.digest.rotate_left(7) ^ one.digest;
            all.steps += one.steps;
            all.span = all.span.max(one.span);
        }
        all.latencies_us.sort_unstable();
        all.swapped_us.sort_unstable();
        all
    }
}

/// A quotient for tables.
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}
