//! Where models run: memory at fixed addresses, filled late and emptied for free.
//!
//! A model's weights get a range of addresses once, when it is bound ([`Device::reserve`]). Swapping in puts memory from
//! the device's bounded pool behind that range and copies the weights group after group; swapping out takes the memory
//! away. The range stays, so whatever holds addresses into it (a session, a captured graph) stays valid.
//!
//! [`cuda`] is a GPU, [`host`] the device without one. `conformance` states what every implementation must do.

#![expect(unsafe_code, reason = "one of the three fences: this crate maps memory and speaks to drivers")]

use std::{fmt, sync::Arc, time::Duration};

use faaswap_protocol::Bytes;

pub mod conformance;
pub mod cuda;
pub mod host;
pub mod links;
pub mod nvml;
mod pci;
mod range;
mod table;
mod weights;

pub use pci::PciAddress;
pub use range::GROUPS_MAX;
pub use table::RANGES_MAX;
pub use weights::{FillReport, Filler, Follower, HostWeights, Near, Notes, READS_IN_FLIGHT_MAX};

/// A reserved range of addresses on one device. Copies name the same range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RangeId(pub u32);

/// The compute stream that shall wait, as the driver's raw handle. The host device has none: there the caller waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream(pub usize);

impl Stream {
    /// The calling thread itself.
    pub const CALLER: Self = Self(0);
}

/// A stretch of a model's weights that is copied, and awaited, as one. Groups lie in order, without gaps between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// First byte in the weights.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// For logs and metrics: `host0`, `cuda0`.
    pub name: String,
    /// Memory for weights in all.
    pub capacity: Bytes,
    /// Memory is given out in chunks of this size.
    pub chunk: Bytes,
}

/// Memory by the device's own count, in whole chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// In all.
    pub capacity: Bytes,
    /// Behind ranges now.
    pub mapped: Bytes,
}

/// How a swap-in went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SwapReport {
    /// Bytes of weights copied.
    pub copied: Bytes,
    /// How long it waited for the link, and for earlier work there.
    pub waited: Duration,
    /// The part of its work spent queueing copies; zero where they are not queued.
    pub queueing: Duration,
    /// From the start of the work (not counting the wait for earlier work of the link) to the last byte.
    pub took: Duration,
    /// The part of it spent putting memory behind addresses.
    pub mapping: Duration,
}

/// A fault of a device, or a request that it cannot fulfil.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The pool does not hold enough chunks.
    #[error("{needed} of device memory needed, {free} free")]
    OutOfMemory {
        /// What the range takes in whole chunks.
        needed: Bytes,
        /// What the pool has.
        free: Bytes,
    },
    /// The operating system or driver refused.
    #[error("{call} failed: {reason}")]
    Failed {
        /// The call that failed.
        call: &'static str,
        /// What it said.
        reason: String,
    },
    /// The range is not there, or not in the state that the call needs.
    #[error("range {range:?} is {state}, not {wanted}")]
    State {
        /// Which range.
        range: RangeId,
        /// What it is.
        state: &'static str,
        /// What the call needs.
        wanted: &'static str,
    },
    /// The arguments contradict each other.
    #[error("{0}")]
    Invalid(&'static str),
    /// The device has failed for good; everything on it is lost.
    #[error("the device is lost")]
    Lost,
}

/// Bytes of weights that are read back at a time, to be compared.
pub const COMPARED_AT_A_TIME: usize = 1 << 20;

/// Called once, on a thread of the device, when a swap has ended.
pub type OnDone<T> = Box<dyn FnOnce(Result<T, DeviceError>) + Send>;

/// One device. Swaps are queued and done in the order in which they were asked for, by a thread of the device's own,
/// so that a swap-out followed by a swap-in may use the same memory without waiting in between.
pub trait Device: Send + Sync + fmt::Debug {
    /// What this device is.
    fn info(&self) -> &DeviceInfo;

    /// Whether the device has failed for good.
    fn is_lost(&self) -> bool;

    /// Gives the device up: it fails for good, as hardware may. Where it cannot be trusted, and for tests.
    fn fail(&self);

    /// Memory by the device's own count.
    fn memory(&self) -> DeviceMemory;

    /// Reserves addresses for weights of this size. Takes no device memory; touching the range faults.
    fn reserve(&self, weights: Bytes) -> Result<RangeId, DeviceError>;

    /// Gives the addresses back. The range must be swapped out and its holders gone.
    fn release(&self, range: RangeId) -> Result<(), DeviceError>;

    /// First address of the range.
    fn address(&self, range: RangeId) -> Result<usize, DeviceError>;

    /// Queues: put memory behind the range and copy the weights, group after group. Returns once it is queued.
    /// [`Device::await_group`] works from then on, and fails if the swap fails. Weights that are still being filled are
    /// copied as far as they are there; where filling them fails, so does the swap. Swaps behind it wait meanwhile.
    fn swap_in(
        &self,
        range: RangeId,
        weights: Arc<HostWeights>,
        groups: Arc<[Group]>,
        done: OnDone<SwapReport>,
    ) -> Result<(), DeviceError>;

    /// As [`Device::swap_in`], from another device that holds the same weights in `held`, where the two can reach each
    /// other; from host memory where they cannot, or where `held` is not wholly there. The weights stay in `held` until
    /// the copies have ended: a swap-out of it waits for them.
    fn swap_in_from(
        &self,
        (holder, held): (&dyn Device, RangeId),
        range: RangeId,
        weights: Arc<HostWeights>,
        groups: Arc<[Group]>,
        done: OnDone<SwapReport>,
    ) -> Result<(), DeviceError> {
        let _ = (holder, held);
        self.swap_in(range, weights, groups, done)
    }

    /// As [`Device::swap_in`], over this device's link and those of others at once, as far as it can reach them: for
    /// large weights, while the other links are idle. Over this one's alone where it reaches none.
    fn swap_in_over(
        &self,
        others: &[&dyn Device],
        range: RangeId,
        weights: Arc<HostWeights>,
        groups: Arc<[Group]>,
        done: OnDone<SwapReport>,
    ) -> Result<(), DeviceError> {
        let _ = others;
        self.swap_in(range, weights, groups, done)
    }

    /// Queues: take the memory away from the range. The caller sees to it that nothing runs on it.
    fn swap_out(&self, range: RangeId, done: OnDone<()>) -> Result<(), DeviceError>;

    /// Makes `stream` wait until the groups `0..=group` are there; on [`Stream::CALLER`] blocks the calling thread.
    fn await_group(&self, range: RangeId, group: u32, stream: Stream) -> Result<(), DeviceError>;

    /// Where it sits on its bus; `None` where it is on none.
    fn pci_address(&self) -> Option<PciAddress> {
        None
    }

    /// The device as one that runs programs of its own; `None` where the processor runs them.
    fn as_cuda(&self) -> Option<&cuda::CudaDevice> {
        None
    }

    /// Whether models of this kind are bound by it; `None` where they never are.
    fn knows_kind(&self, kind: &cuda::KindKey) -> Option<bool> {
        let _ = kind;
        None
    }

    /// A run is about to come: whoever sleeps there may wake up. Returns at once.
    fn expect_run(&self) {}

    /// Whether [`Device::reopen`] may bring the device back once it is lost.
    fn can_reopen(&self) -> bool {
        false
    }

    /// Brings a lost device back, empty: nothing that was bound to it is there any more. Blocks, for seconds.
    fn reopen(&self) -> Result<(), DeviceError> {
        Err(DeviceError::Lost)
    }

    /// Nothing will be asked of the device any more: whoever has it may leave what is there to the system.
    fn leave(&self) {}

    /// Readies weights in host memory for fast copies. Does nothing where nothing helps.
    fn prepare_weights(&self, weights: &HostWeights) -> Result<(), DeviceError> {
        let _ = weights;
        Ok(())
    }

    /// Reads weights back from device memory, to verify them. The range must be wholly swapped in.
    fn read_back(&self, range: RangeId, offset: u64, into: &mut [u8]) -> Result<(), DeviceError>;

    /// Reads all weights back and compares them with what was sent. Gives where the first piece lies that differs.
    fn differs_at(&self, range: RangeId, sent: &Arc<HostWeights>) -> Result<Option<u64>, DeviceError> {
        if sent.filled() < sent.len() {
            return Err(DeviceError::Invalid("weights are compared that are not all there"));
        }
        let mut there = vec![0; COMPARED_AT_A_TIME.min(sent.len())];
        let mut at = 0;
        for piece in sent.as_slice().chunks(COMPARED_AT_A_TIME) {
            let there = &mut there[..piece.len()];
            self.read_back(range, at, there)?;
            if there != piece {
                return Ok(Some(at));
            }
            at += piece.len() as u64;
        }
        Ok(None)
    }
}
