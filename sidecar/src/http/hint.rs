//! Hints that a pod's traffic begins or ends, from whoever stands before it.
//!
//! The form is that of Knative's `concurrency-state-endpoint`, which its versions up to 1.9 had: a POST of
//! `{"action": "resume"}` before the first request, `"pause"` after the last. A queue-proxy that is answered otherwise than
//! with 200 ends its pod, so there is no other answer to what can be read. Its token is not looked at: a hint costs nothing
//! that a request would not.

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use serde::Deserialize;

use super::{body::BodyReader, reply};
use crate::{failure::Failure, infer::Function, limits::HINT_BYTES_MAX};

/// Where hints come, on the operators' port.
pub const PATH: &str = "/concurrency-state";

#[derive(Deserialize)]
struct Hint {
    action: String,
}

/// Answers one hint.
pub async fn serve<B>(function: &Function, request: Request<B>) -> reply::Reply
where
    B: http_body::Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    match take(function, request).await {
        Ok(()) => reply::of_bytes(StatusCode::OK, ""),
        Err(failure) => reply::failure(&failure),
    }
}

async fn take<B>(function: &Function, request: Request<B>) -> Result<(), Failure>
where
    B: http_body::Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    if request.method() != Method::POST {
        return Err(Failure::WrongVerb { allow: "POST" });
    }
    let mut body = BodyReader::new(request.into_body(), HINT_BYTES_MAX, false);
    let body = super::rest::join(body.collect(&mut function.bodies().open()).await?);
    let hint: Hint = serde_json::from_slice(&body)
        .map_err(|error| Failure::Invalid(format!("this is no {{\"action\": \"resume\"}}: {error}")))?;
    tracing::debug!(action = hint.action, "hint");
    // To pause needs nothing: weights give way to others' when those need room, and not before.
    if hint.action == "resume" {
        function.announce();
    }
    Ok(())
}
