//! Every way in which a client's request can fail, and the one place that turns it into an HTTP status and a gRPC code.
//!
//! | failure | HTTP | gRPC |
//! |---|---|---|
//! | the request makes no sense, or does not fit the model | 400 | `INVALID_ARGUMENT` |
//! | no such model, version or path | 404 | `NOT_FOUND` |
//! | wrong verb | 405 with `Allow` | - |
//! | the body did not come in time | 408 | - |
//! | the body or the tensors are too large | 413 | `RESOURCE_EXHAUSTED` |
//! | a call of the protocol that is not offered | 501 | `UNIMPLEMENTED` |
//! | not ready, no broker, overload, deadline passed or out of reach | 503 with `Retry-After` | `UNAVAILABLE` |
//! | the request's own time limit passed | 504 | `DEADLINE_EXCEEDED` |
//! | the handler behind the sidecar cannot be reached | 502 | - |
//! | the model cannot be served at all | 503 without `Retry-After` | `FAILED_PRECONDITION` |
//! | the model failed on this input, or a bug | 500 | `INTERNAL` |
//!
//! A deadline that passed is 503, not 504: the platform's gateways take 504 for a dead function and do not try again.

use std::fmt;

use faaswap_protocol::Refusal;
use http::StatusCode;

use crate::{broker::InferError, limits::RETRY_AFTER_S};

/// Why a request gets no answer.
#[derive(Debug)]
pub enum Failure {
    /// The request makes no sense.
    Invalid(String),
    /// What it names is not here.
    NotFound(String),
    /// The path exists for other verbs.
    WrongVerb {
        /// Those.
        allow: &'static str,
    },
    /// The body exceeds its limit.
    TooLarge(String),
    /// The body did not arrive in time.
    BodySlow,
    /// The body ended early or broke off.
    BodyBroken(String),
    /// A part of the protocol that is not offered.
    Unsupported(String),
    /// The function cannot be called yet.
    NotReady(String),
    /// The sidecar has too much in work.
    Busy(&'static str),
    /// The handler behind the sidecar cannot be reached.
    Upstream(String),
    /// The broker client has no answer.
    Infer(InferError),
    /// Something that cannot happen did.
    Internal(String),
}

/// What a failure means to a client: decided here and nowhere else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// For HTTP.
    pub status: StatusCode,
    /// For gRPC.
    pub grpc: tonic::Code,
    /// Stable: header, metric label and log field.
    pub code: &'static str,
    /// Seconds after which the same request may succeed.
    pub retry_after_s: Option<u64>,
}

const fn verdict(status: StatusCode, grpc: tonic::Code, code: &'static str) -> Verdict {
    Verdict { status, grpc, code, retry_after_s: None }
}

const fn passing(code: &'static str) -> Verdict {
    let retry_after_s = Some(RETRY_AFTER_S);
    Verdict { status: StatusCode::SERVICE_UNAVAILABLE, grpc: tonic::Code::Unavailable, code, retry_after_s }
}

impl Failure {
    /// The verdict on this failure.
    pub fn verdict(&self) -> Verdict {
        use tonic::Code;
        match self {
            Self::Invalid(_) => verdict(StatusCode::BAD_REQUEST, Code::InvalidArgument, "input_invalid"),
            Self::NotFound(_) => verdict(StatusCode::NOT_FOUND, Code::NotFound, "not_found"),
            Self::WrongVerb { .. } => verdict(StatusCode::METHOD_NOT_ALLOWED, Code::Unimplemented, "wrong_verb"),
            Self::TooLarge(_) => verdict(StatusCode::PAYLOAD_TOO_LARGE, Code::ResourceExhausted, "too_large"),
            Self::BodySlow => verdict(StatusCode::REQUEST_TIMEOUT, Code::DeadlineExceeded, "body_slow"),
            Self::BodyBroken(_) => verdict(StatusCode::BAD_REQUEST, Code::InvalidArgument, "body_broken"),
            Self::Unsupported(_) => verdict(StatusCode::NOT_IMPLEMENTED, Code::Unimplemented, "unsupported"),
            Self::NotReady(_) => passing("not_ready"),
            Self::Busy(_) => passing("sidecar_full"),
            Self::Upstream(_) => verdict(StatusCode::BAD_GATEWAY, Code::Unavailable, "upstream_unreachable"),
            Self::Infer(error) => of_infer_error(error),
            Self::Internal(_) => verdict(StatusCode::INTERNAL_SERVER_ERROR, Code::Internal, "internal"),
        }
    }
}

fn of_infer_error(error: &InferError) -> Verdict {
    use tonic::Code;
    match error {
        InferError::Refused(refusal) => of_refusal(refusal),
        InferError::NotReady(_) => passing("not_ready"),
        InferError::BrokerAway { .. } => passing("broker_away"),
        InferError::BrokerLost { .. } => passing("broker_lost"),
        InferError::WaitingFull => passing("waiting_full"),
        InferError::NoRoom { .. } => passing("slab_full"),
        InferError::TooLarge { .. } => verdict(StatusCode::PAYLOAD_TOO_LARGE, Code::ResourceExhausted, "too_large"),
        InferError::TimedOut(_) => verdict(StatusCode::GATEWAY_TIMEOUT, Code::DeadlineExceeded, "timed_out"),
    }
}

fn of_refusal(refusal: &Refusal) -> Verdict {
    use tonic::Code;
    let code = refusal.code();
    match refusal {
        Refusal::InputInvalid { .. } => verdict(StatusCode::BAD_REQUEST, Code::InvalidArgument, code),
        Refusal::RunFailed { .. } | Refusal::ProtocolViolation { .. } => {
            verdict(StatusCode::INTERNAL_SERVER_ERROR, Code::Internal, code)
        }
        Refusal::UnknownFunction => verdict(StatusCode::NOT_FOUND, Code::NotFound, code),
        Refusal::ModelRejected { .. }
        | Refusal::ModelTooLarge { .. }
        | Refusal::UploadFailed { .. }
        | Refusal::FunctionInvalid { .. }
        | Refusal::NameTaken => verdict(StatusCode::SERVICE_UNAVAILABLE, Code::FailedPrecondition, code),
        Refusal::Cancelled
        | Refusal::HostMemoryFull { .. }
        | Refusal::FunctionsFull { .. }
        | Refusal::DeadlinePassed { .. }
        | Refusal::DeadlineUnreachable { .. }
        | Refusal::FunctionQueueFull { .. }
        | Refusal::NodeQueueFull { .. }
        | Refusal::ConnectionFull { .. }
        | Refusal::SlabFull { .. }
        | Refusal::Draining
        | Refusal::HardwareFault => passing(code),
        Refusal::ModelSuspended { left } => {
            Verdict { retry_after_s: Some(left.as_secs().max(RETRY_AFTER_S)), ..passing(code) }
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(text)
            | Self::NotFound(text)
            | Self::TooLarge(text)
            | Self::BodyBroken(text)
            | Self::Unsupported(text)
            | Self::NotReady(text)
            | Self::Upstream(text)
            | Self::Internal(text) => f.write_str(text),
            Self::WrongVerb { allow } => write!(f, "method not allowed here, use {allow}"),
            Self::BodySlow => f.write_str("the request body did not arrive in time"),
            Self::Busy(text) => f.write_str(text),
            Self::Infer(error) => error.fmt(f),
        }
    }
}

impl From<InferError> for Failure {
    fn from(error: InferError) -> Self {
        Self::Infer(error)
    }
}

impl From<Failure> for tonic::Status {
    fn from(failure: Failure) -> Self {
        let verdict = failure.verdict();
        let mut status = Self::new(verdict.grpc, failure.to_string());
        status
            .metadata_mut()
            .insert(crate::http::REFUSAL_HEADER, tonic::metadata::MetadataValue::from_static(verdict.code));
        status
    }
}

/// Shorthand for the commonest failure.
pub(crate) fn invalid<T>(text: impl Into<String>) -> Result<T, Failure> {
    Err(Failure::Invalid(text.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_passing_refusal_tells_the_client_to_come_back() {
        let full = Failure::Infer(InferError::Refused(Refusal::FunctionQueueFull { limit: 3 })).verdict();
        assert_eq!((full.status.as_u16(), full.retry_after_s), (503, Some(RETRY_AFTER_S)));
        assert_eq!(full.code, "function_queue_full");
    }

    #[test]
    fn a_rejected_model_does_not_invite_retries() {
        let rejected = Refusal::ModelRejected { reason: "cyclic".into() };
        let rejected = Failure::Infer(InferError::Refused(rejected)).verdict();
        assert_eq!((rejected.status.as_u16(), rejected.retry_after_s), (503, None));
    }
}
