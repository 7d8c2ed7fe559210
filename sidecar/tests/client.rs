//! The client of the broker: registering, uploading, asking, and what happens when brokers go and come back.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use faaswap_protocol::{DType, ModelDigest, Refusal, Shape};
use faaswap_sidecar::{
    broker::{Broker, BrokerConfig, FunctionState, InferError, InferRequest, SlabSizes, Target, TensorInput},
    model::{ModelRef, ModelSource},
};
use sha2::{Digest, Sha256};
use support::{
    Sidecar,
    broker::{FakeBroker, Mood, TIMING, doubler, mixed},
    clients::{Http, bytes_of, floats},
    config, spec,
};

const DEADLINE: Duration = Duration::from_secs(10);

async fn client(broker: &FakeBroker) -> Broker {
    let client = Broker::start(config(broker.target(), DEADLINE));
    client.until_ready().await.unwrap();
    client
}

fn request(values: &[f32]) -> InferRequest {
    let shape = [u64::try_from(values.len() / 4).unwrap(), 4];
    InferRequest::default().input(0, DType::F32, &shape, Bytes::from(bytes_of(values))).unwrap()
}

#[tokio::test]
async fn an_inference_is_answered_from_the_slab_and_released_with_its_last_output() {
    let broker = FakeBroker::start(doubler());
    let client = client(&broker).await;
    let known = client.known().unwrap();
    assert_eq!((known.input("x"), known.output("y"), known.output("z")), (Some(0), Some(0), None));
    let answer = client.infer(&request(&[1.0, 2.0, 3.0, 4.0])).await.unwrap();
    assert_eq!(answer.timing, TIMING);
    assert_eq!((answer.outputs[0].dtype, answer.outputs[0].shape.dims()), (DType::F32, &[1, 4][..]));
    let data = answer.outputs[0].data.clone();
    drop(answer);
    assert_eq!(floats(&data), [2.0, 4.0, 6.0, 8.0]);
    let another = client.infer(&request(&[5.0; 4])).await.unwrap();
    assert_eq!(broker.seen().released, 0, "nothing is released while somebody holds its bytes");
    assert_eq!(floats(&data), [2.0, 4.0, 6.0, 8.0]);
    drop((data, another));
    broker.until(|seen| seen.released == 2).await;
}

#[tokio::test]
async fn many_requests_are_in_flight_and_answered_apart() {
    let broker = FakeBroker::start(doubler());
    let client = client(&broker).await;
    broker.set_mood(Mood::Hold);
    let tasks: Vec<_> = (0..200_u16)
        .map(|n| {
            let client = client.clone();
            tokio::spawn(async move {
                let answer = client.infer(&request(&[f32::from(n); 4])).await.unwrap();
                assert_eq!(floats(&answer.outputs[0].data), [2.0 * f32::from(n); 4]);
            })
        })
        .collect();
    broker.until(|seen| seen.requests == 200).await;
    broker.set_mood(Mood::Answer);
    for task in tasks {
        task.await.unwrap();
    }
}

#[tokio::test]
async fn inputs_wait_for_room_in_the_slab() {
    let broker = FakeBroker::start(doubler());
    let slab = SlabSizes { request: faaswap_protocol::Bytes::mib(2), response: faaswap_protocol::Bytes::mib(4) };
    let client = Broker::start(BrokerConfig { slab, ..config(broker.target(), DEADLINE) });
    client.until_ready().await.unwrap();
    broker.set_mood(Mood::Hold);
    // Three of them exceed the 2 MiB.
    let large = Arc::new(request(&vec![1.0; 200_000]));
    let tasks: Vec<_> = (0..3)
        .map(|_| {
            let (client, large) = (client.clone(), Arc::clone(&large));
            tokio::spawn(async move { client.infer(&large).await.map(|answer| answer.outputs[0].data.len()) })
        })
        .collect();
    broker.until(|seen| seen.requests == 2).await;
    assert_eq!(client.waiting(), 1);
    broker.set_mood(Mood::Answer);
    for task in tasks {
        assert_eq!(task.await.unwrap().unwrap(), 800_000);
    }
}

#[tokio::test]
async fn a_request_that_its_caller_drops_is_cancelled_and_gives_its_room_back() {
    let broker = FakeBroker::start(doubler());
    let client = client(&broker).await;
    broker.set_mood(Mood::Hold);
    let whole = vec![1.0; (2 << 20) / 4];
    for round in 1..=3 {
        let asking = tokio::spawn({
            let (client, request) = (client.clone(), request(&whole));
            async move { client.infer(&request).await.map(drop) }
        });
        broker.until(|seen| seen.requests == round).await;
        asking.abort();
        broker.until(|seen| seen.cancelled == round).await;
    }
}

#[tokio::test]
async fn a_time_limit_of_the_caller_ends_the_wait_and_the_broker_is_told_it() {
    let broker = FakeBroker::start(doubler());
    let client = client(&broker).await;
    client.infer(&request(&[1.0; 4])).await.map(drop).unwrap();
    assert_eq!(broker.seen().time_left, None, "without a limit the function's deadline counts");
    broker.set_mood(Mood::Hold);
    let limit = Duration::from_millis(30);
    let timed_out = client.infer(&request(&[1.0; 4]).within(limit)).await.map(drop).unwrap_err();
    assert!(matches!(timed_out, InferError::TimedOut(after) if after == limit), "{timed_out}");
    assert!(broker.seen().time_left.unwrap() <= limit);
}

#[tokio::test]
async fn without_a_slab_tensors_travel_in_the_frames() {
    let broker = FakeBroker::start_tcp(mixed()).await;
    let client = client(&broker).await;
    let input = |index, dtype, dims: &[u64], bytes: &[u8]| TensorInput {
        index,
        dtype,
        shape: Shape::new(dims).unwrap(),
        data: bytes.chunks(3).map(Bytes::copy_from_slice).collect(),
    };
    let request = InferRequest {
        inputs: vec![
            input(2, DType::F16, &[2], &[1, 2, 3, 4]),
            input(0, DType::I64, &[2], &[9; 16]),
            input(1, DType::Bool, &[70], &[1; 70]),
        ],
        outputs: vec![1, 2],
        timeout: None,
    };
    let answer = client.infer(&request).await.unwrap();
    assert_eq!(answer.outputs.iter().map(|output| output.index).collect::<Vec<_>>(), [1, 2]);
    assert_eq!((&answer.outputs[0].data[..], &answer.outputs[1].data[..]), (&[1; 70][..], &[1, 2, 3, 4][..]));
    assert_eq!(broker.seen().released, 0, "there is nothing to release");

    let sidecar = Sidecar::ready(config(broker.target(), DEADLINE)).await;
    let metadata = Http::new(sidecar.address).get("/v2/models/doubler").await.json();
    assert_eq!(metadata["inputs"][0]["name"], "ids");
}

#[tokio::test]
async fn large_tensors_travel_over_tcp_whole() {
    let broker = FakeBroker::start_tcp(doubler()).await;
    let client = client(&broker).await;
    let values: Vec<f32> = (0..2_000_000_u32).map(|n| f32::from_bits(n << 8) + 1.0).collect();
    let answer = client.infer(&request(&values)).await.unwrap();
    assert!(floats(&answer.outputs[0].data).iter().zip(&values).all(|(out, x)| *out == 2.0 * x));
}

async fn upload_to(broker: FakeBroker) {
    broker.forget_models();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.onnx");
    // More than one part over TCP.
    let graph: Vec<u8> = (0..9_000_000_u32).map(|n| n.to_le_bytes()[0]).collect();
    std::fs::write(&path, &graph).unwrap();
    let model = ModelSource::load(&ModelRef::File { graph: path, data: vec![] }).unwrap();
    assert_eq!(model.digest, ModelDigest(Sha256::digest(&graph).into()));
    let spec = faaswap_protocol::FunctionSpec { model: model.digest, ..spec(DEADLINE) };
    let client = Broker::start(BrokerConfig::new(broker.target(), spec, model));
    client.until_ready().await.unwrap();
    assert_eq!(broker.seen().uploads, 1);
    client.infer(&request(&[1.0; 4])).await.map(drop).unwrap();
}

#[tokio::test]
async fn a_model_that_the_broker_lacks_is_uploaded_by_descriptor() {
    upload_to(FakeBroker::start(doubler())).await;
}

#[tokio::test]
async fn a_model_that_the_broker_lacks_is_uploaded_in_parts_over_tcp() {
    upload_to(FakeBroker::start_tcp(doubler()).await).await;
}

#[tokio::test]
async fn a_digest_alone_cannot_be_uploaded_and_is_asked_for_again_later() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker.sock");
    let first = FakeBroker::at(&path, doubler());
    first.forget_models();
    let client = Broker::start(config(first.target(), DEADLINE));
    let refusal = client.until_ready().await.unwrap_err();
    assert_eq!(refusal.code(), "upload_failed");
    first.kill().await;
    let again = FakeBroker::at(&path, doubler());
    again.until(|seen| seen.registered == 1).await;
}

#[tokio::test]
async fn a_request_in_flight_survives_the_brokers_death() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker.sock");
    let first = FakeBroker::at(&path, doubler());
    let client = client(&first).await;
    first.set_mood(Mood::Hold);
    let asking = tokio::spawn({
        let client = client.clone();
        async move { client.infer(&request(&[1.0, 2.0, 3.0, 4.0])).await.map(|a| floats(&a.outputs[0].data)) }
    });
    first.until(|seen| seen.requests == 1).await;
    first.kill().await;
    let second = FakeBroker::at(&path, doubler());
    assert_eq!(asking.await.unwrap().unwrap(), [2.0, 4.0, 6.0, 8.0]);
    assert!(second.seen().time_left.is_some_and(|left| left <= DEADLINE), "what is left of the deadline is told");
}

#[tokio::test]
async fn a_binary_body_that_lay_in_the_slab_survives_the_brokers_death() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker.sock");
    let first = FakeBroker::at(&path, doubler());
    let sidecar = Sidecar::ready(config(first.target(), DEADLINE)).await;
    first.set_mood(Mood::Hold);
    let values: Vec<f32> = (0..30_000_u16).map(f32::from).collect();
    let asking = tokio::spawn({
        let (http, tensors) = (Http::new(sidecar.address), bytes_of(&values));
        let head = serde_json::json!({
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [7500, 4], "parameters": {"binary_data_size": 120_000}}],
            "parameters": {"binary_data_output": true},
        });
        async move { http.infer_binary(&head, &tensors).await }
    });
    first.until(|seen| seen.requests == 1).await;
    first.kill().await;
    let _second = FakeBroker::at(&path, doubler());
    let reply = asking.await.unwrap();
    assert_eq!(reply.status, 200, "{reply:?}");
    let json_len: usize = reply.header("inference-header-content-length").parse().unwrap();
    assert!(floats(&reply.body[json_len..]).iter().zip(&values).all(|(out, x)| *out == 2.0 * x));
}

#[tokio::test]
async fn requests_wait_for_an_absent_broker_until_their_deadline_and_no_longer() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker.sock");
    let first = FakeBroker::at(&path, doubler());
    let sidecar = Sidecar::ready(config(first.target(), Duration::from_millis(150))).await;
    let client = sidecar.function.broker().unwrap().clone();
    first.kill().await;
    client.function().wait_for(|state| matches!(state, FunctionState::Connecting)).await.unwrap();
    let http = Http::new(sidecar.address);
    let body =
        serde_json::json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]});
    let reply = http.infer(&body).await;
    assert_eq!((reply.status.as_u16(), reply.header("faaswap-refusal")), (503, "broker_away"), "{reply:?}");
    assert_eq!(reply.header("retry-after"), "1");
    assert_eq!(http.get("/v2/models/doubler").await.status, 200, "what is known of the model stays known");
    let _second = FakeBroker::at(&path, doubler());
    client.until_ready().await.unwrap();
    assert_eq!(http.infer(&body).await.status, 200, "service resumes by itself");
}

#[tokio::test]
async fn a_request_that_ends_every_connection_is_not_sent_for_ever() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker.sock");
    let mut broker = FakeBroker::at(&path, doubler());
    let client = client(&broker).await;
    broker.set_mood(Mood::Hold);
    let asking = tokio::spawn({
        let client = client.clone();
        async move { client.infer(&request(&[1.0; 4])).await.map(drop) }
    });
    for _ in 0..3 {
        broker.until(|seen| seen.requests == 1).await;
        broker.kill().await;
        broker = FakeBroker::at(&path, doubler());
        broker.set_mood(Mood::Hold);
    }
    let lost = asking.await.unwrap().unwrap_err();
    assert!(matches!(lost, InferError::BrokerLost { sends: 3 }), "{lost}");
}

#[tokio::test]
async fn a_broker_that_drains_passes_its_requests_to_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker.sock");
    let first = FakeBroker::at(&path, doubler());
    let client = client(&first).await;
    first.set_mood(Mood::Refuse(Refusal::Draining));
    let asking = tokio::spawn({
        let client = client.clone();
        async move { client.infer(&request(&[3.0; 4])).await.map(|a| floats(&a.outputs[0].data)) }
    });
    first.until(|seen| seen.requests == 1).await;
    let _second = FakeBroker::at(&path, doubler());
    assert_eq!(asking.await.unwrap().unwrap(), [6.0; 4]);
}

#[tokio::test]
async fn a_function_that_was_never_ready_is_told_so_at_once() {
    let client = Broker::start(config(Target::Socket("/nonexistent/broker.sock".into()), DEADLINE));
    let refused = client.infer(&request(&[1.0; 4])).await.map(drop).unwrap_err();
    assert!(matches!(refused, InferError::NotReady(FunctionState::Connecting)), "{refused}");
}

#[tokio::test]
async fn a_broker_is_told_to_hurry_once_a_request_waits() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker.sock");
    let broker = FakeBroker::at(&path, doubler());
    broker.set_mood(Mood::Slow);
    let client = Broker::start(config(broker.target(), DEADLINE));
    let mut states = client.function();
    states.wait_for(|state| matches!(state, FunctionState::Preparing(_))).await.unwrap();
    let refused = client.infer(&request(&[1.0; 4])).await.map(drop).unwrap_err();
    assert!(matches!(refused, InferError::NotReady(FunctionState::Preparing(_))), "{refused}");
    client.until_ready().await.unwrap();

    // One that came while the broker was away counts too, and one that waits is answered.
    broker.kill().await;
    let asking = tokio::spawn({
        let client = client.clone();
        async move { client.infer(&request(&[2.0; 4])).await.map(|answer| floats(&answer.outputs[0].data)) }
    });
    states.wait_for(|state| matches!(state, FunctionState::Connecting)).await.unwrap();
    let next = FakeBroker::at(&path, doubler());
    next.set_mood(Mood::Slow);
    next.until(|seen| seen.registered == 1).await;
    assert_eq!(asking.await.unwrap().unwrap(), [4.0; 4]);
}
