//! The gRPC half of the Open Inference Protocol, and the standard health service.
//!
//! Messages are turned into the shared core's terms in `convert`; calls that are not offered answer `UNIMPLEMENTED` by
//! the generated defaults. Sockets are not opened here: gRPC shares the port with HTTP.

pub mod convert;

use std::{
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::Request;
use tonic::{
    Response, Status,
    codegen::{
        BoxStream, Service,
        tokio_stream::{self, StreamExt},
    },
};

use self::{
    health::{
        HealthCheckRequest, HealthCheckResponse,
        health_check_response::ServingStatus,
        health_server::{Health, HealthServer},
    },
    inference::{
        ModelConfigRequest, ModelConfigResponse, ModelInferRequest, ModelInferResponse, ModelMetadataRequest,
        ModelMetadataResponse, ModelReadyRequest, ModelReadyResponse, ModelStatisticsRequest, ModelStatisticsResponse,
        ModelStreamInferResponse, RepositoryIndexRequest, RepositoryIndexResponse, RepositoryModelLoadRequest,
        RepositoryModelLoadResponse, RepositoryModelUnloadRequest, RepositoryModelUnloadResponse, ServerLiveRequest,
        ServerLiveResponse, ServerMetadataRequest, ServerMetadataResponse, ServerReadyRequest, ServerReadyResponse,
        grpc_inference_service_server::{GrpcInferenceService, GrpcInferenceServiceServer},
    },
};
use crate::{
    failure::Failure,
    http::reply::{BoxError, Reply, ReplyBody},
    infer::{self, Function, UNLOAD_IS_NOT_OURS},
    limits::STREAM_ANSWERS_MAX,
    metrics::Protocol,
};

/// The messages of the protocol, generated.
#[allow(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::wildcard_enum_match_arm,
    unused_qualifications
)]
pub mod inference {
    tonic::include_proto!("inference");
}

/// The messages of the health service, generated.
#[allow(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::wildcard_enum_match_arm,
    unused_qualifications
)]
pub mod health {
    tonic::include_proto!("grpc.health.v1");
}

/// Room in a message for everything but tensors.
const HEAD_BYTES_MAX: usize = 1 << 20;

/// Serves gRPC requests.
#[derive(Clone, Debug)]
pub struct Grpc {
    inference: GrpcInferenceServiceServer<Calls>,
    health: HealthServer<Calls>,
}

#[derive(Clone, Debug)]
struct Calls {
    function: Arc<Function>,
}

impl Grpc {
    /// Serves this function; no message may be longer than a body over HTTP, and its head.
    pub fn new(function: Arc<Function>, body_bytes_max: usize) -> Self {
        let calls = Calls { function };
        let inference = GrpcInferenceServiceServer::new(calls.clone())
            .max_decoding_message_size(body_bytes_max.saturating_add(HEAD_BYTES_MAX))
            .max_encoding_message_size(usize::MAX);
        Self { inference, health: HealthServer::new(calls) }
    }

    /// Answers one request.
    pub fn serve<B>(&self, request: Request<B>) -> impl Future<Output = Result<Reply, Infallible>> + Send + use<B>
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError> + Send,
    {
        let request = request.map(tonic::body::Body::new);
        let path = request.uri().path();
        let answer = if path.starts_with("/inference.GRPCInferenceService/") {
            Ok(self.inference.clone().call(request))
        } else if path.starts_with("/grpc.health.v1.Health/") {
            Ok(self.health.clone().call(request))
        } else {
            Err(Status::unimplemented(format!("no such call: {path}")))
        };
        async move {
            let reply = match answer {
                Ok(answer) => answer.await?,
                Err(status) => status.into_http(),
            };
            Ok(reply.map(ReplyBody::Grpc))
        }
    }
}

impl Calls {
    async fn infer(
        &self,
        message: ModelInferRequest,
        limit: Option<Duration>,
    ) -> Result<(ModelInferResponse, faaswap_protocol::Timing), Status> {
        let began = Instant::now();
        let outcome = self.try_infer(message, limit).await;
        match outcome {
            Ok((response, timing)) => {
                self.function.note(Protocol::grpc, began, Ok(&timing));
                Ok((response, timing))
            }
            Err(failure) => {
                self.function.note(Protocol::grpc, began, Err(&failure));
                Err(failure.into())
            }
        }
    }

    async fn try_infer(
        &self,
        message: ModelInferRequest,
        limit: Option<Duration>,
    ) -> Result<(ModelInferResponse, faaswap_protocol::Timing), Failure> {
        self.function.expect_model(&message.model_name, &message.model_version)?;
        let known = self.function.known()?;
        let mut lent = self.function.bodies().open();
        lent.take(message.raw_input_contents.iter().map(Bytes::len).sum())?;
        let id = message.id.clone();
        let mut request = convert::request(&known.signature, message)?;
        request.timeout = [request.timeout, limit].into_iter().flatten().min();
        let answer = self.function.infer(&request, None).await?;
        let timing = answer.timing;
        Ok((convert::response(&self.function.model_name, id, &known.signature, answer)?, timing))
    }
}

/// The deadline that the client set on the call.
fn limit_of<T>(request: &tonic::Request<T>) -> Option<Duration> {
    let text = request.metadata().get("grpc-timeout")?.to_str().ok()?;
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number: u64 = number.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number.saturating_mul(3600)),
        "M" => Duration::from_secs(number.saturating_mul(60)),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

#[tonic::async_trait]
impl GrpcInferenceService for Calls {
    async fn server_live(&self, _: tonic::Request<ServerLiveRequest>) -> Result<Response<ServerLiveResponse>, Status> {
        Ok(Response::new(ServerLiveResponse { live: true }))
    }

    async fn server_ready(
        &self,
        _: tonic::Request<ServerReadyRequest>,
    ) -> Result<Response<ServerReadyResponse>, Status> {
        Ok(Response::new(ServerReadyResponse { ready: self.function.is_ready() }))
    }

    async fn model_ready(
        &self,
        request: tonic::Request<ModelReadyRequest>,
    ) -> Result<Response<ModelReadyResponse>, Status> {
        let ModelReadyRequest { name, version } = request.into_inner();
        self.function.expect_model(&name, &version)?;
        Ok(Response::new(ModelReadyResponse { ready: self.function.is_ready() }))
    }

    async fn server_metadata(
        &self,
        _: tonic::Request<ServerMetadataRequest>,
    ) -> Result<Response<ServerMetadataResponse>, Status> {
        Ok(Response::new(ServerMetadataResponse {
            name: infer::SERVER_NAME.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            extensions: infer::EXTENSIONS.map(str::to_owned).to_vec(),
        }))
    }

    async fn model_metadata(
        &self,
        request: tonic::Request<ModelMetadataRequest>,
    ) -> Result<Response<ModelMetadataResponse>, Status> {
        let ModelMetadataRequest { name, version } = request.into_inner();
        self.function.expect_model(&name, &version)?;
        Ok(Response::new(convert::metadata(name, &self.function.known()?.signature)))
    }

    async fn model_config(
        &self,
        request: tonic::Request<ModelConfigRequest>,
    ) -> Result<Response<ModelConfigResponse>, Status> {
        let ModelConfigRequest { name, version } = request.into_inner();
        self.function.expect_model(&name, &version)?;
        let config = convert::config(name, &self.function.known()?.signature);
        Ok(Response::new(ModelConfigResponse { config: Some(config) }))
    }

    async fn model_statistics(
        &self,
        request: tonic::Request<ModelStatisticsRequest>,
    ) -> Result<Response<ModelStatisticsResponse>, Status> {
        let ModelStatisticsRequest { name, version } = request.into_inner();
        if !name.is_empty() {
            self.function.expect_model(&name, &version)?;
        }
        Ok(Response::new(ModelStatisticsResponse { model_stats: vec![convert::statistics(&self.function)] }))
    }

    async fn model_infer(
        &self,
        request: tonic::Request<ModelInferRequest>,
    ) -> Result<Response<ModelInferResponse>, Status> {
        let limit = limit_of(&request);
        let (response, timing) = self.infer(request.into_inner(), limit).await?;
        let mut response = Response::new(response);
        let mut headers = http::HeaderMap::new();
        crate::http::reply::add_timing(&mut headers, &timing);
        *response.metadata_mut() = tonic::metadata::MetadataMap::from_headers(headers);
        Ok(response)
    }

    /// Answers each message of the stream, in order; a failed one fails alone.
    async fn model_stream_infer(
        &self,
        request: tonic::Request<tonic::Streaming<ModelInferRequest>>,
    ) -> Result<Response<BoxStream<ModelStreamInferResponse>>, Status> {
        let mut messages = request.into_inner();
        let (answers, stream) = tokio::sync::mpsc::channel(STREAM_ANSWERS_MAX);
        let calls = self.clone();
        tokio::spawn(async move {
            while let Some(Ok(message)) = messages.next().await {
                let id = message.id.clone();
                let answer = tokio::select! {
                    answer = calls.infer(message, None) => answer,
                    () = answers.closed() => return,
                };
                let answer = match answer {
                    Ok((response, _)) => {
                        ModelStreamInferResponse { infer_response: Some(response), ..Default::default() }
                    }
                    Err(status) => ModelStreamInferResponse {
                        error_message: status.message().to_owned(),
                        infer_response: Some(ModelInferResponse { id, ..Default::default() }),
                    },
                };
                if answers.send(Ok(answer)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(tokio_stream::wrappers::ReceiverStream::new(stream))))
    }

    async fn repository_index(
        &self,
        request: tonic::Request<RepositoryIndexRequest>,
    ) -> Result<Response<RepositoryIndexResponse>, Status> {
        let ready_only = request.into_inner().ready;
        Ok(Response::new(convert::index(&self.function, ready_only)))
    }

    async fn repository_model_load(
        &self,
        request: tonic::Request<RepositoryModelLoadRequest>,
    ) -> Result<Response<RepositoryModelLoadResponse>, Status> {
        self.function.expect_model(&request.into_inner().model_name, "")?;
        self.function.expect_ready()?;
        Ok(Response::new(RepositoryModelLoadResponse {}))
    }

    async fn repository_model_unload(
        &self,
        request: tonic::Request<RepositoryModelUnloadRequest>,
    ) -> Result<Response<RepositoryModelUnloadResponse>, Status> {
        self.function.expect_model(&request.into_inner().model_name, "")?;
        Err(Failure::Unsupported(UNLOAD_IS_NOT_OURS.to_owned()).into())
    }
}

#[tonic::async_trait]
impl Health for Calls {
    /// Without a service: whether this process serves. With the inference service: whether the function is ready.
    async fn check(
        &self,
        request: tonic::Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let status = match request.into_inner().service.as_str() {
            "" => ServingStatus::Serving,
            "inference.GRPCInferenceService" if self.function.is_ready() => ServingStatus::Serving,
            "inference.GRPCInferenceService" => ServingStatus::NotServing,
            other => return Err(Status::not_found(format!("unknown service '{other}'"))),
        };
        Ok(Response::new(HealthCheckResponse { status: status.into() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_s_deadline_is_read_in_every_unit() {
        let limit = |text: &'static str| {
            let mut request = tonic::Request::new(());
            request.metadata_mut().insert("grpc-timeout", tonic::metadata::MetadataValue::from_static(text));
            limit_of(&request)
        };
        assert_eq!(limit("5S"), Some(Duration::from_secs(5)));
        assert_eq!(limit("250m"), Some(Duration::from_millis(250)));
        assert_eq!(limit("7u"), Some(Duration::from_micros(7)));
        assert_eq!(limit("x"), None);
        assert_eq!(limit("5Q"), None);
    }
}
