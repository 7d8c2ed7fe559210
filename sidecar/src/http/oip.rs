//! Serves the calls of the protocol over HTTP.
//!
//! An infer request is read, checked, run and answered here; heavy bodies are parsed and written on threads of their own,
//! so that small requests beside them are not kept waiting.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use faaswap_protocol::Timing;
use http::{Request, StatusCode, header};
use serde::Serialize;
use tokio::sync::Semaphore;

use super::{
    body::BodyReader,
    intake::{self, Head, TakenIn},
    reply::{self, InferReply, Reply},
    request::Parsed,
    route::{self, Call, ModelCall},
    views,
};
use crate::{
    failure::Failure,
    infer::Function,
    limits::{HEAVY_BYTES, HEAVY_THREADS_MAX},
    metrics::Protocol,
};

/// The protocol over HTTP.
#[derive(Debug)]
pub struct Oip {
    function: Arc<Function>,
    body_bytes_max: usize,
    heavy: Heavy,
}

#[derive(Serialize)]
struct Live {
    live: bool,
}

#[derive(Serialize)]
struct ServerReady {
    ready: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

#[derive(Serialize)]
struct ModelReady<'a> {
    name: &'a str,
    ready: bool,
}

impl Oip {
    /// Serves this function; no body may be longer.
    pub fn new(function: Arc<Function>, body_bytes_max: usize) -> Self {
        Self { function, body_bytes_max, heavy: Heavy::new() }
    }

    /// Answers one request.
    pub async fn serve<B>(&self, request: Request<B>) -> Reply
    where
        B: http_body::Body<Data = Bytes> + Unpin,
        B::Error: std::fmt::Display,
    {
        let (parts, body) = request.into_parts();
        let mut body = BodyReader::new(body, self.body_bytes_max, parts.headers.contains_key(header::EXPECT));
        let answered = match route::route(&parts.method, parts.uri.path()) {
            Ok(Call::Model { name, version, call: ModelCall::Infer }) => {
                let began = Instant::now();
                let head = self.function.expect_model(&name, version).and_then(|()| Head::of(&parts.headers));
                drop(name);
                drop(parts);
                let outcome = match head {
                    Ok(head) => self.infer(head, &mut body).await,
                    Err(failure) => Err(failure),
                };
                match &outcome {
                    Ok((_, timing)) => self.function.note(Protocol::http, began, Ok(timing)),
                    Err(failure) => self.function.note(Protocol::http, began, Err(failure)),
                }
                outcome.map(|(reply, _)| reply)
            }
            Ok(call) => self.view(call),
            Err(failure) => Err(failure),
        };
        body.discard().await;
        answered.unwrap_or_else(|failure| reply::failure(&failure))
    }

    fn view(&self, call: Call<'_>) -> Result<Reply, Failure> {
        let function = &*self.function;
        Ok(match call {
            Call::Server => reply::json(StatusCode::OK, &views::SERVER),
            Call::Live => reply::json(StatusCode::OK, &Live { live: true }),
            Call::Ready => self.server_ready(),
            Call::Models => reply::json(StatusCode::OK, &views::Models { models: [&function.model_name] }),
            Call::AllStats => reply::json(StatusCode::OK, &views::stats(function)),
            Call::Index => reply::json(StatusCode::OK, &[views::index(function)]),
            Call::Load(name) => {
                function.expect_model(&name, "")?;
                function.expect_ready()?;
                reply::of_bytes(StatusCode::OK, "")
            }
            Call::Unload(name) => {
                function.expect_model(&name, "")?;
                return Err(Failure::Unsupported(crate::infer::UNLOAD_IS_NOT_OURS.to_owned()));
            }
            Call::Model { name, version, call } => {
                function.expect_model(&name, version)?;
                match call {
                    ModelCall::Metadata => {
                        reply::json(StatusCode::OK, &views::model(&function.model_name, &function.known()?))
                    }
                    ModelCall::Config => {
                        reply::json(StatusCode::OK, &views::config(&function.model_name, &function.known()?))
                    }
                    ModelCall::Stats => reply::json(StatusCode::OK, &views::stats(function)),
                    ModelCall::Ready => {
                        function.expect_ready()?;
                        reply::json(StatusCode::OK, &ModelReady { name: &function.model_name, ready: true })
                    }
                    ModelCall::Infer => return Err(Failure::Internal("an inference is no view".to_owned())),
                }
            }
        })
    }

    fn server_ready(&self) -> Reply {
        if self.function.is_ready() {
            return reply::json(StatusCode::OK, &ServerReady { ready: true, error: None });
        }
        let failure = Failure::NotReady(self.function.state_text());
        let mut reply = reply::failure(&failure);
        let body = ServerReady { ready: false, error: Some(failure.to_string()) };
        *reply.body_mut() = reply::json(StatusCode::OK, &body).into_body();
        reply
    }

    async fn infer<B>(&self, head: Head, body: &mut BodyReader<B>) -> Result<(Reply, Timing), Failure>
    where
        B: http_body::Body<Data = Bytes> + Unpin,
        B::Error: std::fmt::Display,
    {
        let known = self.function.known()?;
        let mut lent = self.function.bodies().open();
        let accepts = head.accepts.clone();
        let TakenIn { parsed, draft } =
            intake::take_in((&self.function, &self.heavy), &known, head, body, &mut lent).await?;
        let Parsed { request, id, outputs } = parsed;
        let answer = self.function.infer(&request, draft).await?;
        drop(request);
        drop(lent);
        let timing = answer.timing;
        let is_heavy = outputs.iter().any(|output| !output.binary)
            && answer.outputs.iter().map(|output| output.data.len()).sum::<usize>() > HEAVY_BYTES;
        let function = Arc::clone(&self.function);
        let build = move || {
            let signature = &known.signature;
            let reply: InferReply = reply::of_answer(&function.model_name, id.as_deref(), signature, &outputs, answer)?;
            reply.finish(accepts.as_ref())
        };
        let reply = if is_heavy { self.heavy.run(build).await? } else { build()? };
        Ok((reply, timing))
    }
}

/// Does heavy work on threads of its own, a few pieces at a time.
#[derive(Debug)]
pub struct Heavy {
    turns: Semaphore,
}

impl Heavy {
    pub(super) fn new() -> Self {
        Self { turns: Semaphore::new(HEAVY_THREADS_MAX) }
    }

    /// Waits for a turn, then for the work.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let _turn = self.turns.acquire().await.map_err(|error| Failure::Internal(error.to_string()))?;
        tokio::task::spawn_blocking(work)
            .await
            .unwrap_or_else(|error| Err(Failure::Internal(format!("the request could not be worked on: {error}"))))
    }
}
