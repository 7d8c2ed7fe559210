//! Serves the calls of the protocol over HTTP.
//!
//! An infer request is read, checked, run and answered here; heavy bodies are parsed and written on threads of their own,
//! so that small requests beside them are not kept waiting.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use faaswap_protocol::Timing;
use http::{HeaderMap, Request, StatusCode, header};
use serde::Serialize;
use tokio::sync::Semaphore;

use super::{
    body,
    encoding::Coding,
    reply::{self, InferReply, Reply},
    request::{self, HEADER_LENGTH, Parsed},
    route::{self, Call, ModelCall},
    views,
};
use crate::{
    broker::Known,
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
    heavy: Semaphore,
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
        Self { function, body_bytes_max, heavy: Semaphore::new(HEAVY_THREADS_MAX) }
    }

    /// Answers one request.
    pub async fn serve<B>(&self, request: Request<B>) -> Reply
    where
        B: http_body::Body<Data = Bytes> + Unpin,
        B::Error: std::fmt::Display,
    {
        let (parts, body) = request.into_parts();
        let answered = match route::route(&parts.method, parts.uri.path()) {
            Ok(Call::Model { name, version, call: ModelCall::Infer }) => {
                let began = Instant::now();
                let outcome = match self.function.expect_model(&name, version) {
                    Ok(()) => self.infer(&parts.headers, body).await,
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

    async fn infer<B>(&self, headers: &HeaderMap, body: B) -> Result<(Reply, Timing), Failure>
    where
        B: http_body::Body<Data = Bytes> + Unpin,
        B::Error: std::fmt::Display,
    {
        let known = self.function.known()?;
        let mut lent = self.function.bodies().open();
        let pieces = body::collect(body, self.body_bytes_max, &mut lent).await?;
        let Parsed { request, id, outputs } = self.parse(&known, headers, pieces, &mut lent).await?;
        let answer = self.function.infer(&request).await?;
        drop(request);
        drop(lent);
        let timing = answer.timing;
        let is_heavy = outputs.iter().any(|output| !output.binary)
            && answer.outputs.iter().map(|output| output.data.len()).sum::<usize>() > HEAVY_BYTES;
        let accepts = headers.get(header::ACCEPT_ENCODING).cloned();
        let function = Arc::clone(&self.function);
        let build = move || {
            let signature = &known.signature;
            let reply: InferReply = reply::of_answer(&function.model_name, id.as_deref(), signature, &outputs, answer)?;
            let accepts = accepts.map(|value| (header::ACCEPT_ENCODING, value)).into_iter().collect();
            reply.finish(&accepts)
        };
        let reply = if is_heavy { self.on_a_thread(build).await? } else { build()? };
        Ok((reply, timing))
    }

    async fn parse(
        &self,
        known: &Arc<Known>,
        headers: &HeaderMap,
        pieces: Vec<Bytes>,
        lent: &mut crate::infer::Lent<'_>,
    ) -> Result<Parsed, Failure> {
        let len = pieces.iter().map(Bytes::len).sum::<usize>();
        let coding = Coding::of_request(headers)?;
        if len <= HEAVY_BYTES && coding.is_none() || coding.is_none() && headers.contains_key(HEADER_LENGTH) {
            return request::parse(&known.signature, headers, pieces);
        }
        let known = Arc::clone(known);
        let bytes_max = self.body_bytes_max;
        let headers: HeaderMap = headers
            .get(HEADER_LENGTH)
            .map(|len| (HEADER_LENGTH.parse(), len.clone()))
            .into_iter()
            .filter_map(|(name, len)| Some((name.ok()?, len)))
            .collect();
        let work = move || {
            let (pieces, unpacked) = match coding {
                Some(coding) => {
                    let bytes = coding.unpack(pieces, bytes_max)?;
                    let len = bytes.len();
                    (vec![bytes], len)
                }
                None => (pieces, 0),
            };
            Ok((request::parse(&known.signature, &headers, pieces)?, unpacked))
        };
        let (parsed, unpacked) = self.on_a_thread(work).await?;
        lent.take(unpacked)?;
        Ok(parsed)
    }

    async fn on_a_thread<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let _turn = self.heavy.acquire().await.map_err(|error| Failure::Internal(error.to_string()))?;
        tokio::task::spawn_blocking(work)
            .await
            .unwrap_or_else(|error| Err(Failure::Internal(format!("the request could not be worked on: {error}"))))
    }
}
