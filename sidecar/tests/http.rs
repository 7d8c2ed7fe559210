//! The Open Inference Protocol over HTTP, through real sockets, with a small broker behind the sidecar.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{io::Write, time::Duration};

use faaswap_protocol::Bytes;
use faaswap_sidecar::broker::{BrokerConfig, SlabSizes};
use http::Method;
use serde_json::{Value, json};
use support::{
    BODY_MAX, Sidecar,
    broker::{FakeBroker, doubler, mixed},
    clients::{Http, binary_body, bytes_of, floats, infer_path},
    config,
};

const DEADLINE: Duration = Duration::from_secs(10);

async fn doubling() -> (FakeBroker, Sidecar, Http) {
    let broker = FakeBroker::start(doubler());
    let sidecar = Sidecar::ready(config(broker.target(), DEADLINE)).await;
    let http = Http::new(sidecar.address);
    (broker, sidecar, http)
}

fn json_input(values: &[f32]) -> Value {
    json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [values.len() / 4, 4], "data": values}]})
}

fn binary_input(len: usize) -> Value {
    json!({
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [len / 4, 4], "parameters": {"binary_data_size": len * 4}}],
        "parameters": {"binary_data_output": true},
    })
}

#[tokio::test]
async fn json_goes_in_and_comes_out() {
    let (_broker, _sidecar, http) = doubling().await;
    let mut body = json_input(&[1.0, 2.0, 3.0, 4.5]);
    body["id"] = json!("call-7");
    let reply = http.infer(&body).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(reply.header("content-type"), "application/json");
    assert_eq!(
        reply.json(),
        json!({"model_name": "doubler", "model_version": "1", "id": "call-7", "outputs": [
            {"name": "y", "datatype": "FP32", "shape": [1, 4], "data": [2.0, 4.0, 6.0, 9.0]},
        ]})
    );
}

#[tokio::test]
async fn an_answer_says_where_its_time_went() {
    let (_broker, _sidecar, http) = doubling().await;
    let reply = http.infer(&json_input(&[0.0; 4])).await;
    assert_eq!(reply.header("faaswap-queue-us"), "11");
    assert_eq!(reply.header("faaswap-run-us"), "22");
    assert_eq!(reply.header("faaswap-swap-us"), "33");
    assert_eq!(reply.header("faaswap-resident"), "false");
}

#[tokio::test]
async fn binary_tensors_go_in_and_come_out_and_their_memory_is_released() {
    let (broker, _sidecar, http) = doubling().await;
    let input: Vec<f32> = (0..20_000_u16).map(f32::from).collect();
    for round in 1..=40 {
        let reply = http.infer_binary(&binary_input(input.len()), &bytes_of(&input)).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        assert_eq!(reply.header("content-type"), "application/octet-stream");
        let json_len: usize = reply.header("inference-header-content-length").parse().unwrap();
        let head: Value = serde_json::from_slice(&reply.body[..json_len]).unwrap();
        assert_eq!(head["outputs"][0]["parameters"]["binary_data_size"], 80_000);
        assert!(floats(&reply.body[json_len..]).iter().zip(&input).all(|(out, x)| *out == 2.0 * x));
        let seen = broker.until(|seen| seen.released == round).await;
        assert_eq!(seen.inputs[0].span.offset, 0, "slots are used again");
    }
}

#[tokio::test]
async fn a_raw_body_is_the_only_input() {
    let (_broker, _sidecar, http) = doubling().await;
    let input = bytes_of(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
    let headers = [("inference-header-content-length", "0")];
    let whole = http.post(&infer_path(), &headers, input.clone()).await;
    let chunked = http.post_chunked(&infer_path(), &headers, &input, 5).await;
    for reply in [whole, chunked] {
        assert_eq!(reply.status, 200, "{reply:?}");
        let json_len: usize = reply.header("inference-header-content-length").parse().unwrap();
        assert_eq!(floats(&reply.body[json_len..]), [2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0]);
    }
}

#[tokio::test]
async fn chunks_of_any_size_are_one_body() {
    let (_broker, _sidecar, http) = doubling().await;
    let input: Vec<f32> = (0..400_u16).map(f32::from).collect();
    let (length, body) = binary_body(&binary_input(input.len()), &bytes_of(&input));
    for size in [1, 7, 100, 1000, 10_000] {
        let headers = [("inference-header-content-length", &*length)];
        let reply = http.post_chunked(&infer_path(), &headers, &body, size).await;
        assert_eq!(reply.status, 200, "{size}: {reply:?}");
        let json_len: usize = reply.header("inference-header-content-length").parse().unwrap();
        assert!(floats(&reply.body[json_len..]).iter().zip(&input).all(|(out, x)| *out == 2.0 * x), "{size}");
        let json = http.post_chunked(&infer_path(), &[], json_input(&input).to_string().as_bytes(), size).await;
        assert_eq!(json.json()["outputs"][0]["data"][399], 798.0, "{size}");
    }
}

#[tokio::test]
async fn packed_bodies_are_unpacked_and_replies_are_packed_for_those_who_ask() {
    let (_broker, _sidecar, http) = doubling().await;
    let input: Vec<f32> = (0..4000_u16).map(f32::from).collect();
    let (length, binary) = binary_body(&binary_input(input.len()), &bytes_of(&input));
    let json = json_input(&input).to_string().into_bytes();
    for coding in ["gzip", "deflate"] {
        let reply = http.post(&infer_path(), &[("content-encoding", coding)], pack(coding, &json)).await;
        assert_eq!(reply.json()["outputs"][0]["data"][3999], 7998.0);
        let headers = [("content-encoding", coding), ("inference-header-content-length", &length)];
        let reply = http.post(&infer_path(), &headers, pack(coding, &binary)).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        let json_len: usize = reply.header("inference-header-content-length").parse().unwrap();
        assert_eq!(floats(&reply.body[json_len..])[3999], 7998.0);
        let reply = http.post(&infer_path(), &[("accept-encoding", coding)], json.clone()).await;
        assert_eq!(reply.header("content-encoding"), coding);
        let unpacked: Value = serde_json::from_slice(&unpack(coding, &reply.body)).unwrap();
        assert_eq!(unpacked["outputs"][0]["data"][3999], 7998.0);
    }
}

fn pack(coding: &str, bytes: &[u8]) -> Vec<u8> {
    let level = flate2::Compression::fast();
    if coding == "gzip" {
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), level);
        packer.write_all(bytes).unwrap();
        packer.finish().unwrap()
    } else {
        let mut packer = flate2::write::ZlibEncoder::new(Vec::new(), level);
        packer.write_all(bytes).unwrap();
        packer.finish().unwrap()
    }
}

fn unpack(coding: &str, bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    if coding == "gzip" {
        flate2::write::GzDecoder::new(&mut out).write_all(bytes).unwrap();
    } else {
        flate2::write::ZlibDecoder::new(&mut out).write_all(bytes).unwrap();
    }
    out
}

#[tokio::test]
async fn inputs_of_several_types_come_in_any_order_as_json_and_binary_mixed() {
    let broker = FakeBroker::start(mixed());
    let sidecar = Sidecar::ready(config(broker.target(), DEADLINE)).await;
    let http = Http::new(sidecar.address);
    let head = json!({
        "inputs": [
            {"name": "half", "datatype": "FP16", "shape": [2], "parameters": {"binary_data_size": 4}},
            {"name": "ids", "datatype": "INT64", "shape": [2], "data": [i64::MIN, i64::MAX]},
            {"name": "mask", "datatype": "BOOL", "shape": [3], "parameters": {"binary_data_size": 3}},
        ],
        "outputs": [
            {"name": "mask_out"},
            {"name": "half_out", "parameters": {"binary_data": true}},
            {"name": "ids_out", "parameters": {"binary_data": false}},
        ],
    });
    let reply = http.infer_binary(&head, &[1, 2, 3, 4, 1, 0, 1]).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    let json_len: usize = reply.header("inference-header-content-length").parse().unwrap();
    let outputs = serde_json::from_slice::<Value>(&reply.body[..json_len]).unwrap()["outputs"].clone();
    assert_eq!(outputs[0], json!({"name": "mask_out", "datatype": "BOOL", "shape": [3], "data": [true, false, true]}));
    assert_eq!(outputs[1]["parameters"]["binary_data_size"], 4);
    assert_eq!(outputs[2]["data"], json!([i64::MIN, i64::MAX]));
    assert_eq!(&reply.body[json_len..], [1, 2, 3, 4]);
}

#[tokio::test]
async fn the_server_and_the_model_describe_themselves() {
    let (_broker, _sidecar, http) = doubling().await;
    let server = http.get("/v2").await.json();
    assert_eq!(server["name"], "faaswap");
    assert!(server["extensions"].as_array().unwrap().contains(&json!("binary_tensor_data")));
    assert_eq!(http.get("/v2/health/live").await.json(), json!({"live": true}));
    assert_eq!(http.get("/v2/health/ready").await.json(), json!({"ready": true}));
    assert_eq!(http.get("/v2/models/doubler/ready").await.json(), json!({"name": "doubler", "ready": true}));
    assert_eq!(http.get("/v2/models").await.json(), json!({"models": ["doubler"]}));
    let tensor = |name| json!({"name": name, "datatype": "FP32", "shape": [-1, 4]});
    assert_eq!(
        http.get("/v2/models/doubler/versions/1").await.json(),
        json!({"name": "doubler", "versions": ["1"], "platform": "onnxruntime_onnx",
            "inputs": [tensor("x")], "outputs": [tensor("y")]})
    );
    let config = http.get("/v2/models/doubler/config").await.json();
    assert_eq!(config["max_batch_size"], 0);
    assert_eq!(config["input"][0], json!({"name": "x", "data_type": "TYPE_FP32", "dims": [-1, 4]}));
}

#[tokio::test]
async fn statistics_count_what_was_answered_and_what_failed() {
    let (_broker, _sidecar, http) = doubling().await;
    http.infer(&json_input(&[0.0; 4])).await;
    http.infer(&json_input(&[0.0; 4])).await;
    http.infer(&json!({})).await;
    for path in ["/v2/models/stats", "/v2/models/doubler/stats", "/v2/models/doubler/versions/1/stats"] {
        let stats = http.get(path).await.json()["model_stats"][0].clone();
        assert_eq!(stats["name"], "doubler");
        assert_eq!(stats["inference_count"], 2);
        assert_eq!(stats["inference_stats"]["success"]["count"], 2);
        assert_eq!(stats["inference_stats"]["fail"]["count"], 1);
        assert_eq!(stats["inference_stats"]["queue"], json!({"count": 2, "ns": 22_000}));
        assert_eq!(stats["inference_stats"]["compute_infer"], json!({"count": 2, "ns": 44_000}));
        assert_eq!(stats["memory_usage"], json!([{"type": "CPU", "id": 0, "byte_size": 5 << 20}]));
    }
}

#[tokio::test]
async fn the_repository_lists_the_model_and_does_not_unload_it() {
    let (_broker, _sidecar, http) = doubling().await;
    let ready = json!([{"name": "doubler", "version": "1", "state": "READY", "reason": ""}]);
    assert_eq!(http.post("/v2/repository/index", &[], "").await.json(), ready);
    assert_eq!(http.post("/v2/repository/index", &[], "{\"ready\":true}").await.json(), ready);
    let load = http.post("/v2/repository/models/doubler/load", &[], "{}").await;
    assert_eq!((load.status.as_u16(), load.body.len()), (200, 0));
    let unload = http.post("/v2/repository/models/doubler/unload", &[], "{}").await;
    assert_eq!(unload.status, 501);
    assert!(unload.error().contains("on demand"), "{unload:?}");
}

#[tokio::test]
async fn a_model_or_path_that_is_not_here_is_404_and_says_what_is() {
    let (_broker, _sidecar, http) = doubling().await;
    let other = http.post("/v2/models/resnet/infer", &[], json_input(&[0.0; 4]).to_string()).await;
    assert_eq!(other.status, 404);
    assert_eq!(other.error(), "unknown model 'resnet': this endpoint serves 'doubler'");
    let version = http.get("/v2/models/doubler/versions/2/ready").await;
    assert_eq!((version.status.as_u16(), version.error().contains("only version is 1")), (404, true));
    assert_eq!(http.get("/v2/nothing").await.status, 404);
    let outside = http.get("/").await;
    assert_eq!(outside.status, 404);
    assert!(outside.error().contains("no upstream is configured"), "{outside:?}");
}

#[tokio::test]
async fn a_wrong_verb_is_405_and_says_the_right_one() {
    let (_broker, _sidecar, http) = doubling().await;
    let get = http.get(&infer_path()).await;
    assert_eq!((get.status.as_u16(), get.header("allow")), (405, "POST"));
    assert!(get.error().contains("use POST"));
    let delete = http.call(Method::DELETE, "/v2/models/doubler", &[], "").await;
    assert_eq!((delete.status.as_u16(), delete.header("allow")), (405, "GET"));
}

#[tokio::test]
async fn a_body_over_the_limit_is_413_however_it_comes() {
    let (_broker, _sidecar, http) = doubling().await;
    let large = vec![b' '; BODY_MAX + 1];
    let announced = http.post(&infer_path(), &[], large.clone()).await;
    let chunked = http.post_chunked(&infer_path(), &[], &large, 100_000).await;
    let headers = [("inference-header-content-length", "10")];
    let binary = http.post_chunked(&infer_path(), &headers, &large, 100_000).await;
    let bomb = http.post(&infer_path(), &[("content-encoding", "gzip")], pack("gzip", &large)).await;
    for reply in [announced, chunked, bomb] {
        assert_eq!(reply.status, 413, "{reply:?}");
        assert!(reply.error().contains("1048576 bytes that are allowed"), "{reply:?}");
    }
    assert_eq!(binary.status, 400, "its JSON is wrong before it is too long: {binary:?}");
}

#[tokio::test]
async fn a_client_that_breaks_off_takes_no_room_with_it() {
    use tokio::io::AsyncWriteExt;
    let broker = FakeBroker::start(doubler());
    let slab = SlabSizes { request: Bytes::mib(1), response: Bytes::mib(2) };
    let sidecar = Sidecar::ready(BrokerConfig { slab, ..config(broker.target(), DEADLINE) }).await;
    let (length, body) = binary_body(&binary_input(25_000), &[0; 1000]);
    let mut broken = Vec::new();
    for _ in 0..20 {
        let mut socket = tokio::net::TcpStream::connect(sidecar.address).await.unwrap();
        let head = format!(
            "POST {} HTTP/1.1\r\nhost: x\r\ninference-header-content-length: {length}\r\ncontent-length: {}\r\n\r\n",
            infer_path(),
            body.len() - 1000 + 100_000
        );
        socket.write_all(head.as_bytes()).await.unwrap();
        socket.write_all(&body).await.unwrap();
        broken.push(socket);
    }
    let http = Http::new(sidecar.address);
    assert_eq!(http.infer(&json_input(&[0.0; 4])).await.status, 200, "half-sent requests keep nobody out");
    drop(broken);
    // Fits into the slab only if no broken request has kept its place.
    let input = vec![1.0; 250_000];
    let reply = http.infer_binary(&binary_input(input.len()), &bytes_of(&input)).await;
    assert_eq!(reply.status, 200, "{:?}", reply.headers);
    assert_eq!(broker.seen().requests, 2, "no broken request reaches the broker");
}
