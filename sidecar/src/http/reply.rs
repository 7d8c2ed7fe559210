//! Builds replies: JSON, errors, and the answer to an infer request with as few copies and writes as can be.
//!
//! Binary outputs go out from where the broker wrote them; only JSON is made here.

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use faaswap_protocol::{Signature, Timing};
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use serde::Serialize;
use tokio::{sync::OwnedSemaphorePermit, time::Sleep};

use super::{
    REFUSAL_HEADER,
    encoding::Coding,
    json_data,
    request::{HEADER_LENGTH, WantedOutput},
};
use crate::{broker::InferAnswer, failure::Failure, infer::MODEL_VERSION};

/// Any error of a body.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The body of a reply.
#[derive(Debug)]
pub enum ReplyBody {
    /// Ours: pieces that go out in one vectored write.
    Pieces(VecDeque<Bytes>),
    /// From tonic.
    Grpc(tonic::body::Body),
    /// From the handler behind the sidecar.
    Upstream(Incoming),
    /// Any of these that holds a place until it is sent, and breaks off when its time is over.
    Guarded(Box<Guarded>),
}

/// A body with a place and a time limit.
#[derive(Debug)]
pub struct Guarded {
    body: ReplyBody,
    place: Option<OwnedSemaphorePermit>,
    until: Option<Pin<Box<Sleep>>>,
}

/// A reply was not sent in the time that it may take.
#[derive(Debug, thiserror::Error)]
#[error("the reply took longer than the function's time limit")]
struct OverTime;

impl ReplyBody {
    /// This body, holding a place until it is sent, and breaking off at an instant.
    pub fn guarded(self, place: Option<OwnedSemaphorePermit>, until: Option<tokio::time::Instant>) -> Self {
        if self.is_end_stream() {
            return self;
        }
        let until = until.map(|until| Box::pin(tokio::time::sleep_until(until)));
        Self::Guarded(Box::new(Guarded { body: self, place, until }))
    }
}

impl Guarded {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        match polled {
            Poll::Pending if self.until.as_mut().is_some_and(|until| until.as_mut().poll(cx).is_ready()) => {
                self.place = None;
                Poll::Ready(Some(Err(Box::new(OverTime))))
            }
            Poll::Ready(None | Some(Err(_))) => {
                self.place = None;
                polled
            }
            Poll::Ready(Some(Ok(_))) | Poll::Pending => polled,
        }
    }
}

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.get_mut() {
            Self::Pieces(pieces) => Poll::Ready(pieces.pop_front().map(|piece| Ok(Frame::data(piece)))),
            Self::Grpc(body) => Pin::new(body).poll_frame(cx).map_err(Into::into),
            Self::Upstream(body) => Pin::new(body).poll_frame(cx).map_err(Into::into),
            Self::Guarded(guarded) => guarded.poll(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Pieces(pieces) => pieces.is_empty(),
            Self::Grpc(body) => body.is_end_stream(),
            Self::Upstream(body) => body.is_end_stream(),
            Self::Guarded(guarded) => guarded.body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Pieces(pieces) => {
                let len = pieces.iter().map(|piece| faaswap_protocol::Bytes::of_len(piece.len()).get()).sum();
                SizeHint::with_exact(len)
            }
            Self::Grpc(body) => body.size_hint(),
            Self::Upstream(body) => body.size_hint(),
            Self::Guarded(guarded) => guarded.body.size_hint(),
        }
    }
}

/// A reply of ours.
pub type Reply = Response<ReplyBody>;

const JSON: HeaderValue = HeaderValue::from_static("application/json");
const BINARY: HeaderValue = HeaderValue::from_static("application/octet-stream");

/// A reply with this body; JSON unless it is empty.
pub fn of_bytes(status: StatusCode, body: impl Into<Bytes>) -> Reply {
    let body = body.into();
    let mut reply = Response::new(ReplyBody::Pieces(if body.is_empty() { [].into() } else { [body].into() }));
    *reply.status_mut() = status;
    reply.headers_mut().insert(header::CONTENT_TYPE, JSON);
    reply
}

/// A reply with this value as JSON.
pub fn json(status: StatusCode, value: &impl Serialize) -> Reply {
    match serde_json::to_vec(value) {
        Ok(text) => of_bytes(status, text),
        Err(error) => failure(&Failure::Internal(format!("the reply cannot be written: {error}"))),
    }
}

/// The reply to a request that failed.
pub fn failure(failure: &Failure) -> Reply {
    #[derive(Serialize)]
    struct Error {
        error: String,
    }
    let verdict = failure.verdict();
    // Cannot fail: a struct with one string.
    let text = serde_json::to_vec(&Error { error: failure.to_string() }).unwrap_or_default();
    let mut reply = of_bytes(verdict.status, text);
    let headers = reply.headers_mut();
    headers.insert(REFUSAL_HEADER, HeaderValue::from_static(verdict.code));
    if let Some(seconds) = verdict.retry_after_s {
        headers.insert(header::RETRY_AFTER, seconds.into());
    }
    match failure {
        Failure::WrongVerb { allow } => {
            headers.insert(header::ALLOW, HeaderValue::from_static(allow));
        }
        // What is left of the body is not read, so the connection cannot be used again.
        Failure::TooLarge(_) | Failure::BodySlow | Failure::BodyBroken(_) => {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        Failure::Invalid(_)
        | Failure::NotFound(_)
        | Failure::Unsupported(_)
        | Failure::NotReady(_)
        | Failure::Busy(_)
        | Failure::Upstream(_)
        | Failure::Infer(_)
        | Failure::Internal(_) => {}
    }
    reply
}

/// Adds where the request's time went.
pub fn add_timing(headers: &mut HeaderMap, timing: &Timing) {
    let us = |time: std::time::Duration| HeaderValue::from(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    headers.insert("faaswap-queue-us", us(timing.queued));
    headers.insert("faaswap-run-us", us(timing.ran));
    headers.insert("faaswap-swap-us", us(timing.swapping));
    headers.insert("faaswap-resident", HeaderValue::from_static(if timing.was_resident { "true" } else { "false" }));
}

#[derive(Serialize)]
struct OutputHead<'a> {
    name: &'a str,
    datatype: &'static str,
    shape: &'a [u64],
    #[serde(skip_serializing_if = "Option::is_none")]
    parameters: Option<BinarySize>,
}

#[derive(Serialize)]
struct BinarySize {
    binary_data_size: usize,
}

/// What a reply to an infer request is made of.
#[derive(Debug)]
pub struct InferReply {
    json: Vec<u8>,
    binary: Option<Vec<Bytes>>,
    timing: Timing,
}

/// Writes the JSON of an answer and sets its binary outputs behind it.
pub fn of_answer(
    model_name: &str,
    id: Option<&str>,
    signature: &Signature,
    wanted: &[WantedOutput],
    answer: InferAnswer,
) -> Result<InferReply, Failure> {
    let mut out = Vec::with_capacity(256);
    let text = |out: &mut Vec<u8>, value: &str| {
        serde_json::to_writer(out, value).map_err(|error| Failure::Internal(error.to_string()))
    };
    out.extend_from_slice(b"{\"model_name\":");
    text(&mut out, model_name)?;
    out.extend_from_slice(b",\"model_version\":");
    text(&mut out, MODEL_VERSION)?;
    if let Some(id) = id {
        out.extend_from_slice(b",\"id\":");
        text(&mut out, id)?;
    }
    out.extend_from_slice(b",\"outputs\":[");
    let mut binary = wanted.iter().any(|output| output.binary).then(Vec::new);
    let mut tensors = answer.outputs;
    for (at, wanted) in wanted.iter().enumerate() {
        let spec = signature.outputs.get(usize::from(wanted.index));
        let tensor = tensors.iter().position(|tensor| tensor.index == wanted.index).map(|at| tensors.swap_remove(at));
        let (Some(spec), Some(tensor)) = (spec, tensor) else {
            return Err(Failure::Internal(format!("the broker left out output {}", wanted.index)));
        };
        if at > 0 {
            out.push(b',');
        }
        let parameters = wanted.binary.then_some(BinarySize { binary_data_size: tensor.data.len() });
        let head =
            OutputHead { name: &spec.name, datatype: tensor.dtype.oip(), shape: tensor.shape.dims(), parameters };
        serde_json::to_writer(&mut out, &head).map_err(|error| Failure::Internal(error.to_string()))?;
        match &mut binary {
            Some(binary) if wanted.binary => binary.push(tensor.data),
            Some(_) | None => {
                out.pop();
                out.extend_from_slice(b",\"data\":");
                json_data::write(&mut out, &spec.name, tensor.dtype, &tensor.data)?;
                out.push(b'}');
            }
        }
    }
    out.extend_from_slice(b"]}");
    Ok(InferReply { json: out, binary, timing: answer.timing })
}

impl InferReply {
    /// The reply as it goes out; packed where the client accepts that and it pays.
    pub fn finish(self, accepts: Option<&HeaderValue>) -> Result<Reply, Failure> {
        let json_len = self.json.len();
        let coding =
            if self.binary.is_none() { accepts.and_then(|wanted| Coding::of_reply(wanted, json_len)) } else { None };
        let json = match coding {
            Some(coding) => coding.pack(&self.json)?,
            None => self.json.into(),
        };
        let mut pieces = VecDeque::from([json]);
        let is_binary = self.binary.is_some();
        pieces.extend(self.binary.into_iter().flatten().filter(|piece| !piece.is_empty()));
        let mut reply = Response::new(ReplyBody::Pieces(pieces));
        let headers = reply.headers_mut();
        headers.insert(header::CONTENT_TYPE, if is_binary { BINARY } else { JSON });
        if is_binary {
            headers.insert(HEADER_LENGTH, HeaderValue::from(json_len));
        }
        if let Some(coding) = coding {
            headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static(coding.name()));
        }
        add_timing(headers, &self.timing);
        Ok(reply)
    }
}
