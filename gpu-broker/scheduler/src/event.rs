//! What the scheduler hears and what it asks for.

use std::time::Duration;

use faaswap_protocol::{Batching, Bytes, Late, Priority, Refusal, Slo};

use crate::policy::PolicyKind;

/// A point in time: the span since the broker started. Made by whoever drives the scheduler, never read from a clock here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(pub Duration);

/// A device of this node, in configuration order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(pub u16);

/// A lane of a device: one model runs on it at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LaneId(pub u16);

/// A set of weights; functions with the same digest share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModelId(pub u32);

/// A function of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FunctionKey(pub u32);

/// A request of the node, never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestKey(pub u64);

/// What a request's inputs are like, as far as it matters for running it together with others: those of one model with
/// equal forms may share a run, where their functions allow that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Form(pub u32);

/// How the outputs of requests that shared a run compare to those of each alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// The same bits.
    Same,
    /// The same but for rounding.
    Close,
    /// Something else: the rows depend on each other.
    Other,
}

impl Verdict {
    /// Whether that is what a function takes.
    pub const fn serves(self, batching: Batching) -> bool {
        match batching {
            Batching::Off => false,
            Batching::Exact => matches!(self, Self::Same),
            Batching::On => !matches!(self, Self::Other),
        }
    }
}

/// Where weights are copied from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// Host memory, which holds every model.
    Host,
    /// Another device, which holds them too and keeps them until the copy has ended.
    Peer(DeviceId),
}

/// A path for weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Link {
    /// From host memory to a device, nothing beside it.
    Host {
        /// The device.
        to: DeviceId,
    },
    /// From host memory to a device while `beside` is copied to as well.
    HostBeside {
        /// The device.
        to: DeviceId,
        /// The other one.
        beside: DeviceId,
    },
    /// From device to device.
    Peer {
        /// The device that holds the weights.
        from: DeviceId,
        /// The device.
        to: DeviceId,
    },
}

/// What has happened. Facts about things that are not known (any more) are ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A device can be used.
    DeviceAdded {
        /// The device.
        device: DeviceId,
        /// Its memory for weights.
        capacity: Bytes,
        /// How many lanes it has.
        lanes: u16,
    },
    /// A device is gone with everything on it. Requests that ran there are refused.
    DeviceLost {
        /// The device.
        device: DeviceId,
    },
    /// A model can be swapped in and run on this device.
    ModelBound {
        /// The model.
        model: ModelId,
        /// Where.
        device: DeviceId,
        /// What it takes there while swapped in.
        charge: Bytes,
    },
    /// What was measured of a model on a device, for instance when it was bound there.
    ModelMeasured {
        /// The model.
        model: ModelId,
        /// Where.
        device: DeviceId,
        /// What a swap-in copies: less than the charge, which is whole chunks.
        weights: Bytes,
        /// How long a run takes with the weights there and nothing beside it; zero where that is not known.
        run: Duration,
    },
    /// A link was probed.
    LinkMeasured {
        /// Which.
        link: Link,
        /// Bytes a second; zero where there is no such path.
        bytes_per_s: u64,
    },
    /// What the driver says of a device.
    DeviceObserved {
        /// The device.
        device: DeviceId,
        /// How busy it is with work that is not ours, in thousandths.
        foreign_permille: u16,
        /// Its clock, in thousandths of the clock at which runs were measured: less when it throttles.
        clock_permille: u16,
        /// Memory that others took out of what was ours.
        foreign: Bytes,
    },
    /// An operator lets another policy decide from now on, without the debts that functions have from the time of the one
    /// before. What waits, runs, is on its way or was learned stays. The policy that decides already begins anew.
    PolicyChosen {
        /// The policy.
        policy: PolicyKind,
    },
    /// A hint: a request of this function is about to come.
    Expected {
        /// The function.
        function: FunctionKey,
    },
    /// A model will not be used again; it is swapped out wherever it still is.
    ModelRemoved {
        /// The model.
        model: ModelId,
    },
    /// A function may be called.
    FunctionAdded {
        /// The function.
        function: FunctionKey,
        /// Its model.
        model: ModelId,
        /// Its objective.
        slo: Slo,
        /// Whether somebody waits.
        priority: Priority,
        /// What to do with late requests.
        late: Late,
        /// Whether its requests may share runs, with each other and with those of functions of the same model.
        batching: Batching,
    },
    /// A function is gone: what waits is refused as cancelled, what runs may end.
    FunctionRemoved {
        /// The function.
        function: FunctionKey,
    },
    /// A request came in.
    Arrived {
        /// The request.
        request: RequestKey,
        /// Its function.
        function: FunctionKey,
        /// When its answer is due.
        deadline: Moment,
        /// With which others it may share a run; `None` for none.
        form: Option<Form>,
    },
    /// Nobody wants the answer any more. A waiting request is refused, a running one ends as it ends.
    Cancelled {
        /// The request.
        request: RequestKey,
    },
    /// The weights are there.
    SwapInDone {
        /// The model.
        model: ModelId,
        /// Where.
        device: DeviceId,
        /// How long the copy took, not counting the wait for copies before it.
        took: Duration,
    },
    /// The weights could not be brought. Runs that were waiting for them end as failed by themselves.
    SwapInFailed {
        /// The model.
        model: ModelId,
        /// Where.
        device: DeviceId,
    },
    /// The memory is free.
    SwapOutDone {
        /// The model.
        model: ModelId,
        /// Where.
        device: DeviceId,
    },
    /// A run was the first of so many requests of its form and model on its device: they were run one by one as well, and
    /// compared. Said before its end.
    RunTried {
        /// The request that the run was started for.
        request: RequestKey,
        /// What came of it; it holds for all such runs.
        verdict: Verdict,
    },
    /// A run ended, well or not; the executor has answered its requests.
    RunDone {
        /// The request that the run was started for.
        request: RequestKey,
        /// How long it took; zero where that says nothing, as when requests that shared it had to be run one by one.
        took: Duration,
    },
    /// No new requests; what is there is still served.
    DrainBegun,
    /// The moment of an [`Action::WakeAt`] has come.
    Woken,
}

/// What must now be done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Take the weights away. The device does its swaps in the order of these actions.
    SwapOut {
        /// The model.
        model: ModelId,
        /// Where.
        device: DeviceId,
    },
    /// Bring the weights.
    SwapIn {
        /// The model.
        model: ModelId,
        /// Where.
        device: DeviceId,
        /// The fastest place to copy from. Host memory has them too.
        source: Source,
    },
    /// Run the request, together with others that wait; where a swap-in of its model was asked for before, the run overlaps it.
    Run {
        /// The request. Its name stands for the run.
        request: RequestKey,
        /// Other requests that the same run answers: of its function, or of others with the same model.
        with: Vec<RequestKey>,
        /// Its model.
        model: ModelId,
        /// Where.
        device: DeviceId,
        /// On which lane.
        lane: LaneId,
        /// Whether the weights are there already.
        resident: bool,
    },
    /// Decline the request.
    Refuse {
        /// The request.
        request: RequestKey,
        /// Why.
        refusal: Refusal,
    },
    /// Send [`Event::Woken`] then, if nothing happens before. Replaces an earlier wish.
    WakeAt(Moment),
}
