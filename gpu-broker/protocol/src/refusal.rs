//! The closed list of reasons for which a request or a registration is declined.
//!
//! A refusal is an answer, not an accident: it has a stable code and the numbers that an operator needs.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{limits::DETAIL_BYTES_MAX, units::Bytes};

/// An explanation in words, cut to [`DETAIL_BYTES_MAX`].
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String")]
pub struct Detail(String);

impl From<String> for Detail {
    fn from(mut text: String) -> Self {
        text.truncate(text.floor_char_boundary(DETAIL_BYTES_MAX));
        Self(text)
    }
}

impl From<&str> for Detail {
    fn from(text: &str) -> Self {
        Self::from(text.to_owned())
    }
}

impl fmt::Display for Detail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Detail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// Why something was declined. Append only: the position of a variant is its number on the wire.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum Refusal {
    /// The request names a function that is not registered on this connection.
    #[error("no such function is registered on this connection")]
    UnknownFunction,
    /// The model cannot be served at all; trying again will not help.
    #[error("the model is rejected: {reason}")]
    ModelRejected {
        /// What is wrong with it.
        reason: Detail,
    },
    /// The weights exceed the memory of every place where the model could run.
    #[error("the model needs {needed} and no more than {capacity} can be had")]
    ModelTooLarge {
        /// What the weights take.
        needed: Bytes,
        /// The most that one model may take on this node.
        capacity: Bytes,
    },
    /// Host memory for weights is used up.
    #[error("host memory for weights is full: {needed} needed, {left} left")]
    HostMemoryFull {
        /// What the weights take.
        needed: Bytes,
        /// What is left.
        left: Bytes,
    },
    /// The files that were sent are not the model that was named, or could not be stored.
    #[error("the upload failed: {reason}")]
    UploadFailed {
        /// What went wrong.
        reason: Detail,
    },
    /// The registration itself makes no sense.
    #[error("the function cannot be registered: {reason}")]
    FunctionInvalid {
        /// What is wrong, and what is allowed.
        reason: Detail,
    },
    /// The function's name belongs to another user id.
    #[error("the function name belongs to another user on this node")]
    NameTaken,
    /// The node serves as many functions as it may.
    #[error("this node already serves {limit} functions")]
    FunctionsFull {
        /// The most functions on this node.
        limit: u64,
    },
    /// An input is not what the model takes.
    #[error("invalid input: {reason}")]
    InputInvalid {
        /// Which input, what was expected, what came.
        reason: Detail,
    },
    /// The deadline had passed before the request could start.
    #[error("the deadline passed {late_by:?} ago")]
    DeadlinePassed {
        /// How long ago.
        late_by: Duration,
    },
    /// The deadline cannot be met, and the function prefers to hear so early.
    #[error("the deadline cannot be met: {needed:?} needed, {left:?} left")]
    DeadlineUnreachable {
        /// Predicted time to the answer.
        needed: Duration,
        /// Time until the deadline.
        left: Duration,
    },
    /// The function has too many requests waiting: the one that came, or one that could not be in time any more, in whose place it waits.
    #[error("{limit} requests of this function are waiting already")]
    FunctionQueueFull {
        /// The most that may wait.
        limit: u64,
    },
    /// The node has too many requests waiting: likewise.
    #[error("{limit} requests are waiting on this node already")]
    NodeQueueFull {
        /// The most that may wait.
        limit: u64,
    },
    /// The connection has too many requests in flight.
    #[error("{limit} requests are in flight on this connection already")]
    ConnectionFull {
        /// The most that may be in flight.
        limit: u64,
    },
    /// The outputs do not fit into what is free of the response half of the slab.
    #[error("the outputs need {needed} and {size} of response slab are too few or not yet released")]
    SlabFull {
        /// What the outputs take.
        needed: Bytes,
        /// The size of the response half.
        size: Bytes,
    },
    /// The sidecar took the request back.
    #[error("the request was cancelled")]
    Cancelled,
    /// The broker is shutting down and takes nothing new.
    #[error("the broker is shutting down")]
    Draining,
    /// The model failed on this input.
    #[error("the model failed: {reason}")]
    RunFailed {
        /// What the runtime said.
        reason: Detail,
    },
    /// The hardware under the request failed; the function goes on elsewhere.
    #[error("the hardware failed under the request")]
    HardwareFault,
    /// The peer broke the protocol; the connection ends after this.
    #[error("protocol violation: {reason}")]
    ProtocolViolation {
        /// What was wrong with the frame.
        reason: Detail,
    },
    /// The model was running when hardware failed lately, more than once.
    #[error("the model was running when the hardware failed, more than once: it is not run for {left:?}")]
    ModelSuspended {
        /// Until it is tried again.
        left: Duration,
    },
}

impl Refusal {
    /// The stable code: metric label, log field and wire text are this one string.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::UnknownFunction => "unknown_function",
            Self::ModelRejected { .. } => "model_rejected",
            Self::ModelTooLarge { .. } => "model_too_large",
            Self::HostMemoryFull { .. } => "host_memory_full",
            Self::UploadFailed { .. } => "upload_failed",
            Self::FunctionInvalid { .. } => "function_invalid",
            Self::NameTaken => "name_taken",
            Self::FunctionsFull { .. } => "functions_full",
            Self::InputInvalid { .. } => "input_invalid",
            Self::DeadlinePassed { .. } => "deadline_passed",
            Self::DeadlineUnreachable { .. } => "deadline_unreachable",
            Self::FunctionQueueFull { .. } => "function_queue_full",
            Self::NodeQueueFull { .. } => "node_queue_full",
            Self::ConnectionFull { .. } => "connection_full",
            Self::SlabFull { .. } => "slab_full",
            Self::Cancelled => "cancelled",
            Self::Draining => "draining",
            Self::RunFailed { .. } => "run_failed",
            Self::HardwareFault => "hardware_fault",
            Self::ProtocolViolation { .. } => "protocol_violation",
            Self::ModelSuspended { .. } => "model_suspended",
        }
    }

    /// Whether the same request may succeed later without anybody changing anything.
    pub const fn is_passing(&self) -> bool {
        match self {
            Self::HostMemoryFull { .. }
            | Self::FunctionsFull { .. }
            | Self::DeadlinePassed { .. }
            | Self::DeadlineUnreachable { .. }
            | Self::FunctionQueueFull { .. }
            | Self::NodeQueueFull { .. }
            | Self::ConnectionFull { .. }
            | Self::SlabFull { .. }
            | Self::Draining
            | Self::HardwareFault
            | Self::ModelSuspended { .. } => true,
            Self::UnknownFunction
            | Self::ModelRejected { .. }
            | Self::ModelTooLarge { .. }
            | Self::UploadFailed { .. }
            | Self::FunctionInvalid { .. }
            | Self::NameTaken
            | Self::InputInvalid { .. }
            | Self::Cancelled
            | Self::RunFailed { .. }
            | Self::ProtocolViolation { .. } => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_explanation_is_cut_between_characters() {
        let detail = Detail::from("ä".repeat(DETAIL_BYTES_MAX));
        assert!(detail.to_string().len() <= DETAIL_BYTES_MAX);
    }
}
