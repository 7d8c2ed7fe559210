//! The Open Inference Protocol over gRPC, on the port that HTTP uses too.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::time::Duration;

use bytes::Bytes;
use faaswap_protocol::Refusal;
use faaswap_sidecar::{
    broker::Target,
    grpc::{
        health::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient},
        inference::{
            InferTensorContents, ModelConfigRequest, ModelInferRequest, ModelMetadataRequest, ModelReadyRequest,
            ModelStatisticsRequest, RepositoryIndexRequest, RepositoryModelUnloadRequest, ServerLiveRequest,
            ServerMetadataRequest, ServerReadyRequest, TraceSettingRequest,
            model_infer_request::{InferInputTensor, InferRequestedOutputTensor},
        },
    },
};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use support::{
    Sidecar,
    broker::{FakeBroker, Mood, doubler, mixed},
    clients::{Grpc, Http, bytes_of, floats, grpc},
    config,
};
use tonic::{Code, codegen::tokio_stream::StreamExt};

const DEADLINE: Duration = Duration::from_secs(10);

async fn doubling() -> (FakeBroker, Sidecar, Grpc) {
    let broker = FakeBroker::start(doubler());
    let sidecar = Sidecar::ready(config(broker.target(), DEADLINE)).await;
    let client = grpc(sidecar.address);
    (broker, sidecar, client)
}

fn tensor(name: &str, datatype: &str, shape: &[i64]) -> InferInputTensor {
    InferInputTensor { name: name.into(), datatype: datatype.into(), shape: shape.into(), ..Default::default() }
}

fn raw(values: &[f32]) -> ModelInferRequest {
    ModelInferRequest {
        model_name: support::NAME.into(),
        id: "call-7".into(),
        inputs: vec![tensor("x", "FP32", &[i64::try_from(values.len() / 4).unwrap(), 4])],
        raw_input_contents: vec![Bytes::from(bytes_of(values))],
        ..Default::default()
    }
}

#[tokio::test]
async fn raw_tensors_go_in_and_come_out() {
    let (broker, _sidecar, mut client) = doubling().await;
    let values: Vec<f32> = (0..20_000_u16).map(f32::from).collect();
    let response = client.model_infer(raw(&values)).await.unwrap();
    let time = |name: &str| response.metadata().get(name).unwrap().to_str().unwrap().to_owned();
    assert_eq!((time("faaswap-queue-us"), time("faaswap-run-us")), ("11".into(), "22".into()));
    assert_eq!((time("faaswap-swap-us"), time("faaswap-resident")), ("33".into(), "false".into()));
    let message = response.into_inner();
    assert_eq!((message.id.as_str(), message.model_name.as_str()), ("call-7", "doubler"));
    assert_eq!(message.outputs[0].name, "y");
    assert_eq!(message.outputs[0].shape, [5000, 4]);
    assert!(floats(&message.raw_output_contents[0]).iter().zip(&values).all(|(out, x)| *out == 2.0 * x));
    broker.until(|seen| seen.released == 1).await;
}

#[tokio::test]
async fn typed_contents_of_every_kind_are_taken() {
    let broker = FakeBroker::start(mixed());
    let sidecar = Sidecar::ready(config(broker.target(), DEADLINE)).await;
    let mut client = grpc(sidecar.address);
    let mut ids = tensor("ids", "INT64", &[2]);
    ids.contents = Some(InferTensorContents { int64_contents: vec![i64::MIN, 5], ..Default::default() });
    let mut mask = tensor("mask", "BOOL", &[3]);
    mask.contents = Some(InferTensorContents { bool_contents: vec![true, false, true], ..Default::default() });
    let mut half = tensor("half", "FP16", &[2]);
    half.contents = Some(InferTensorContents { fp32_contents: vec![1.0, 2.0], ..Default::default() });
    let request = |inputs| ModelInferRequest { model_name: support::NAME.into(), inputs, ..Default::default() };
    let refused = client.model_infer(request(vec![ids, mask, half])).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("input 'half' is FP16: send it in raw_input_contents"), "{refused}");

    let mut all =
        request(vec![tensor("ids", "INT64", &[1]), tensor("mask", "BOOL", &[1]), tensor("half", "FP16", &[2])]);
    all.raw_input_contents = vec![Bytes::from(9_i64.to_le_bytes().to_vec()), vec![1].into(), vec![1, 2, 3, 4].into()];
    all.outputs = vec![InferRequestedOutputTensor { name: "half_out".into(), ..Default::default() }];
    let message = client.model_infer(all).await.unwrap().into_inner();
    assert_eq!(message.raw_output_contents, [Bytes::from_static(&[1, 2, 3, 4])]);

    let doubling = FakeBroker::start(doubler());
    let sidecar = Sidecar::ready(config(doubling.target(), DEADLINE)).await;
    let mut x = tensor("x", "FP32", &[1, 4]);
    x.contents = Some(InferTensorContents { fp32_contents: vec![1.0, 2.0, 3.0, 4.0], ..Default::default() });
    let message = grpc(sidecar.address).model_infer(request(vec![x])).await.unwrap().into_inner();
    assert_eq!(floats(&message.raw_output_contents[0]), [2.0, 4.0, 6.0, 8.0]);
}

#[tokio::test]
async fn bad_requests_get_a_code_and_a_reason() {
    let (broker, _sidecar, mut client) = doubling().await;
    let good = || raw(&[1.0; 4]);
    let cases: [(ModelInferRequest, Code, &str); 7] = [
        (ModelInferRequest { model_name: "z".into(), ..good() }, Code::NotFound, "serves 'doubler'"),
        (ModelInferRequest { model_version: "2".into(), ..good() }, Code::NotFound, "only version is 1"),
        (ModelInferRequest { inputs: vec![], ..good() }, Code::InvalidArgument, "missing: x FP32[-1,4]"),
        (
            ModelInferRequest { inputs: vec![tensor("x", "FP32", &[i64::MAX, 4])], ..good() },
            Code::InvalidArgument,
            "overflows",
        ),
        (
            ModelInferRequest { inputs: vec![tensor("x", "FP32", &[2, 4])], ..good() },
            Code::InvalidArgument,
            "expecting 32 for FP32 of shape [2,4]",
        ),
        (
            ModelInferRequest { raw_input_contents: vec![Bytes::new(), Bytes::new()], ..good() },
            Code::InvalidArgument,
            "expected 1 raw inputs but got 2",
        ),
        (
            ModelInferRequest { raw_input_contents: vec![], ..good() },
            Code::InvalidArgument,
            "unexpected total byte size 0",
        ),
    ];
    for (request, code, text) in cases {
        let status = client.model_infer(request).await.unwrap_err();
        assert_eq!(status.code(), code, "{text}");
        assert!(status.message().contains(text), "{text:?} is not in {status}");
    }
    assert_eq!(broker.seen().requests, 0, "nothing of this reaches the broker");
}

#[tokio::test]
async fn a_refusal_has_its_code_in_the_metadata() {
    let (broker, _sidecar, mut client) = doubling().await;
    for (refusal, code) in [
        (Refusal::FunctionQueueFull { limit: 7 }, Code::Unavailable),
        (Refusal::RunFailed { reason: "division by zero".into() }, Code::Internal),
    ] {
        broker.set_mood(Mood::Refuse(refusal.clone()));
        let status = client.model_infer(raw(&[1.0; 4])).await.unwrap_err();
        assert_eq!(status.code(), code);
        assert_eq!(status.metadata().get("faaswap-refusal").unwrap(), refusal.code());
        assert_eq!(status.message(), refusal.to_string());
    }
}

#[tokio::test]
async fn a_call_that_is_over_its_deadline_is_taken_back() {
    let (broker, _sidecar, mut client) = doubling().await;
    broker.set_mood(Mood::Hold);
    let mut request = tonic::Request::new(raw(&[1.0; 4]));
    request.set_timeout(Duration::from_millis(30));
    let status = client.model_infer(request).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    let seen = broker.until(|seen| seen.cancelled == 1).await;
    assert!(seen.time_left.unwrap() <= Duration::from_millis(30), "the broker was told the limit");
}

#[tokio::test]
async fn a_stream_is_answered_message_by_message_and_a_bad_one_fails_alone() {
    let (_broker, _sidecar, mut client) = doubling().await;
    let bad = ModelInferRequest { inputs: vec![], id: "bad".into(), ..raw(&[1.0; 4]) };
    let messages = vec![raw(&[1.0; 4]), bad, raw(&[3.0; 4])];
    let mut answers =
        client.model_stream_infer(tonic::codegen::tokio_stream::iter(messages)).await.unwrap().into_inner();
    let first = answers.next().await.unwrap().unwrap();
    assert_eq!(floats(&first.infer_response.unwrap().raw_output_contents[0]), [2.0; 4]);
    let second = answers.next().await.unwrap().unwrap();
    assert!(second.error_message.contains("missing: x"), "{second:?}");
    assert_eq!(second.infer_response.unwrap().id, "bad");
    let third = answers.next().await.unwrap().unwrap();
    assert_eq!(floats(&third.infer_response.unwrap().raw_output_contents[0]), [6.0; 4]);
    assert!(answers.next().await.is_none());
}

#[tokio::test]
async fn the_other_calls_answer_as_over_http() {
    let (_broker, sidecar, mut client) = doubling().await;
    let name = || support::NAME.to_owned();
    assert!(client.server_live(ServerLiveRequest {}).await.unwrap().into_inner().live);
    assert!(client.server_ready(ServerReadyRequest {}).await.unwrap().into_inner().ready);
    let ready = ModelReadyRequest { name: name(), ..Default::default() };
    assert!(client.model_ready(ready).await.unwrap().into_inner().ready);
    assert_eq!(client.server_metadata(ServerMetadataRequest {}).await.unwrap().into_inner().name, "faaswap");
    let metadata = ModelMetadataRequest { name: name(), ..Default::default() };
    let metadata = client.model_metadata(metadata).await.unwrap().into_inner();
    assert_eq!((metadata.inputs[0].name.as_str(), metadata.inputs[0].shape.as_slice()), ("x", &[-1, 4][..]));
    let config = ModelConfigRequest { name: name(), ..Default::default() };
    let config = client.model_config(config).await.unwrap().into_inner().config.unwrap();
    assert_eq!((config.max_batch_size, config.output[0].data_type), (0, 11));
    client.model_infer(raw(&[1.0; 4])).await.unwrap();
    let stats = client.model_statistics(ModelStatisticsRequest::default()).await.unwrap().into_inner().model_stats;
    assert_eq!((stats[0].inference_count, stats[0].memory_usage[0].byte_size), (1, 5 << 20));
    let index = client.repository_index(RepositoryIndexRequest::default()).await.unwrap().into_inner();
    assert_eq!((index.models[0].name.as_str(), index.models[0].state.as_str()), ("doubler", "READY"));
    let unload = RepositoryModelUnloadRequest { model_name: name(), ..Default::default() };
    assert_eq!(client.repository_model_unload(unload).await.unwrap_err().code(), Code::Unimplemented);
    assert_eq!(client.trace_setting(TraceSettingRequest::default()).await.unwrap_err().code(), Code::Unimplemented);
    let over_http = Http::new(sidecar.address).get("/v2/models/stats").await.json();
    assert_eq!(over_http["model_stats"][0]["inference_count"], 1, "both protocols count together");
}

#[tokio::test]
async fn the_standard_health_service_tells_the_process_from_the_function() {
    let health = |address| {
        let client = Client::builder(TokioExecutor::new()).http2_only(true).build_http::<tonic::body::Body>();
        HealthClient::with_origin(client, format!("http://{address}").parse().unwrap())
    };
    let check = |service: &str| HealthCheckRequest { service: service.to_owned() };
    let (_broker, sidecar, _client) = doubling().await;
    let nobody = Target::Socket("/nonexistent/broker.sock".into());
    let lonely = Sidecar::start(config(nobody, DEADLINE)).await;
    for (address, function) in [(sidecar.address, ServingStatus::Serving), (lonely.address, ServingStatus::NotServing)]
    {
        let mut client = health(address);
        assert_eq!(client.check(check("")).await.unwrap().into_inner().status(), ServingStatus::Serving);
        let of_function = client.check(check("inference.GRPCInferenceService")).await.unwrap().into_inner();
        assert_eq!(of_function.status(), function);
        assert_eq!(client.check(check("other")).await.unwrap_err().code(), Code::NotFound);
    }
}
