//! The messages, in the order in which a connection sees them.
//!
//! A connection opens with [`ToBroker::Hello`] and [`FromBroker::Welcome`]. It then registers functions (uploading
//! models that the broker does not have) and sends requests. Each [`ToBroker::Infer`] gets exactly one
//! [`FromBroker::Answer`] or [`FromBroker::Refused`], in any order. Durations are relative: the ends share no clock.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{
    ids::{CallId, FunctionId, FunctionName, ModelDigest, RequestId},
    refusal::Refusal,
    tensor::{Signature, TensorSlice},
    units::Bytes,
};

/// How tensors travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Transport {
    /// In a slab of shared memory that the broker makes and passes with its welcome. Unix sockets only.
    Slab {
        /// Wanted size of the half that the sidecar writes.
        request: Bytes,
        /// Wanted size of the half that the broker writes.
        response: Bytes,
    },
    /// In the payload of each frame.
    Inline,
}

/// The two halves of a slab: `0..request` is written by the sidecar only, `request..request+response` by the broker
/// only. Spans in [`TensorSlice`] count from the start of the slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlabLayout {
    /// Size of the half that holds inputs.
    pub request: Bytes,
    /// Size of the half that holds outputs.
    pub response: Bytes,
}

/// A tail-latency objective: this share of requests within this time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slo {
    /// Latency that counts as met.
    pub deadline: Duration,
    /// Share of requests in hundredths of a percent, `1..=9999`: 9800 is p98.
    pub percentile: u16,
}

/// Whether a function's users wait for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// Somebody waits for the answer.
    #[default]
    Latency,
    /// Runs when nothing with a deadline wants the room.
    Batch,
}

/// What to do with a request whose deadline cannot be met.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Late {
    /// Answer it late.
    #[default]
    Serve,
    /// Refuse it as soon as that is known.
    Refuse,
}

/// Whether requests of a function may share a run with others of the same model, its own or those of functions that allow
/// it too. The stricter is the smaller; what several say is what the smallest of them says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Batching {
    /// Each runs alone.
    Off,
    /// Where that gives the same outputs, bit by bit, as it does alone.
    #[default]
    Exact,
    /// Where that gives the same outputs but for rounding.
    On,
}

/// Whether GPUs may compute a function's fp32 products in TF32: faster, with 10 bits of fraction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tf32 {
    /// As the node does.
    #[default]
    Node,
    /// They may.
    On,
    /// They compute them in fp32.
    Off,
}

/// What a sidecar says of its function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionSpec {
    /// The function's name, unique for this user on this node.
    pub name: FunctionName,
    /// The model that it runs.
    pub model: ModelDigest,
    /// The objective for its latency.
    pub slo: Slo,
    /// Whether somebody waits.
    pub priority: Priority,
    /// What to do with late requests.
    pub late: Late,
    /// Whether its requests may share runs.
    pub batching: Batching,
    /// How exact its fp32 products are on GPUs.
    pub tf32: Tf32,
}

/// One file of a model: `files[0]` is the ONNX graph, the others are its external data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelFile {
    /// File name as the graph names it: relative, no folders above.
    pub path: String,
    /// Its exact length.
    pub len: Bytes,
}

/// Where the time of one request went, as the broker saw it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    /// From the request's frame until it was given to a lane.
    pub queued: Duration,
    /// From the lane's start until the answer's frame, swap-in included.
    pub ran: Duration,
    /// How long weights were still being copied after the request was given to a lane.
    pub swapping: Duration,
    /// Whether the weights were there already when the request came.
    pub was_resident: bool,
}

/// What a sidecar says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToBroker {
    /// First message of a connection.
    Hello {
        /// [`WIRE_VERSION`](crate::limits::WIRE_VERSION) of the sidecar.
        version: u32,
        /// How its tensors shall travel.
        transport: Transport,
        /// Who this is, for logs: program and version, at most [`NAME_BYTES_MAX`](crate::limits::NAME_BYTES_MAX).
        agent: String,
    },
    /// Announces a function. Answered by `ModelNeeded`, or by any number of `Preparing` and one `Registered` or
    /// `CallRefused`.
    Register {
        /// Names this exchange.
        call: CallId,
        /// The function.
        function: FunctionSpec,
    },
    /// Sends a model: over a Unix socket with one file descriptor per file, otherwise followed by `UploadPart`s, file
    /// after file. Answered by `Uploaded` or `CallRefused`.
    Upload {
        /// Names this exchange.
        call: CallId,
        /// What the files must add up to.
        model: ModelDigest,
        /// The graph, then its external data.
        files: Vec<ModelFile>,
    },
    /// The next bytes of the upload `call`, as the frame's payload.
    UploadPart {
        /// The upload.
        call: CallId,
    },
    /// Takes a function back. No answer; its waiting requests are refused as cancelled.
    Unregister {
        /// The function.
        function: FunctionId,
    },
    /// Asks for one inference.
    Infer {
        /// Chosen by the sidecar, unique among its requests in flight.
        request: RequestId,
        /// Which function.
        function: FunctionId,
        /// Every input of the signature, once each.
        inputs: Vec<TensorSlice>,
        /// Positions of the wanted outputs; empty: all.
        outputs: Vec<u16>,
        /// Time left until the deadline; absent: the function's own deadline counts from now.
        time_left: Option<Duration>,
    },
    /// Takes a request back. It still gets its one answer or refusal.
    Cancel {
        /// The request.
        request: RequestId,
    },
    /// The outputs of this request were read: its part of the response slab is free.
    Release {
        /// The request.
        request: RequestId,
    },
    /// Asks for a `Pong`.
    Ping {
        /// Comes back.
        nonce: u64,
    },
    /// A request of this function is about to come: its inputs are on their way. A hint without an answer; weights may be
    /// there, and a broker that was asleep awake, by the time the request is.
    Expect {
        /// Which function.
        function: FunctionId,
        /// Whether it comes within a moment: its inputs are only being copied.
        soon: bool,
    },
    /// A request waits for the registration `call`: it goes before others. A hint without an answer.
    Hurry {
        /// The registration.
        call: CallId,
    },
}

/// What the broker says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromBroker {
    /// Accepts a connection; the slab's file descriptor comes with it.
    Welcome {
        /// [`WIRE_VERSION`](crate::limits::WIRE_VERSION) of the broker.
        version: u32,
        /// The slab, unless the transport is inline.
        slab: Option<SlabLayout>,
    },
    /// The broker does not have the model of this registration: upload it, then register again.
    ModelNeeded {
        /// The registration.
        call: CallId,
    },
    /// The model has arrived and is what it claims to be.
    Uploaded {
        /// The upload.
        call: CallId,
    },
    /// The registration is under way; said at least every two seconds.
    Preparing {
        /// The registration.
        call: CallId,
        /// What is being done.
        stage: String,
    },
    /// The function can be called.
    Registered {
        /// The registration.
        call: CallId,
        /// How requests name it.
        function: FunctionId,
        /// What it takes and gives.
        signature: Signature,
        /// Size of its weights.
        weights: Bytes,
    },
    /// A registration or upload was declined.
    CallRefused {
        /// The registration or upload.
        call: CallId,
        /// Why.
        refusal: Refusal,
    },
    /// The outputs of a request.
    Answer {
        /// The request.
        request: RequestId,
        /// In the order asked for; spans in the slab's response half or in the payload.
        outputs: Vec<TensorSlice>,
        /// Where the time went.
        timing: Timing,
    },
    /// A request was declined.
    Refused {
        /// The request.
        request: RequestId,
        /// Why.
        refusal: Refusal,
    },
    /// The broker takes nothing new and ends when what it has is answered: connect again later.
    Draining,
    /// Answers a ping.
    Pong {
        /// From the ping.
        nonce: u64,
    },
    /// The peer broke the protocol: the connection ends now.
    Closing {
        /// Why.
        refusal: Refusal,
    },
}
