//! What bad input gets: a status, a stable code, and `{"error": ...}` saying what was expected.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::time::Duration;

use faaswap_protocol::{Bytes, Refusal};
use faaswap_sidecar::broker::Target;
use serde_json::{Value, json};
use support::{
    Sidecar,
    broker::{FakeBroker, Mood, doubler, mixed},
    clients::{Http, Reply, binary_body, infer_path},
    config,
};

const DEADLINE: Duration = Duration::from_secs(10);

struct World {
    broker: FakeBroker,
    _sidecar: Sidecar,
    http: Http,
}

async fn world() -> World {
    let broker = FakeBroker::start(doubler());
    let sidecar = Sidecar::ready(config(broker.target(), DEADLINE)).await;
    let http = Http::new(sidecar.address);
    World { broker, _sidecar: sidecar, http }
}

fn expect(reply: &Reply, status: u16, code: &str, text: &str) {
    assert_eq!(reply.status, status, "{text}: {reply:?}");
    assert_eq!(reply.header("faaswap-refusal"), code, "{text}");
    assert_eq!(reply.header("content-type"), "application/json");
    let error = reply.error();
    assert!(error.contains(text), "{text:?} is not in {error:?}");
}

/// A request for the doubler with one field of its input replaced.
fn with(field: &str, value: Value) -> Value {
    let mut input = json!({"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]});
    input[field] = value;
    json!({ "inputs": [input] })
}

#[tokio::test]
async fn json_that_is_none_is_refused_with_its_place() {
    let world = world().await;
    for (body, text) in [
        ("", "EOF while parsing a value at line 1 column 0"),
        ("{\"inputs\": [", "EOF while parsing a list at line 1 column 12"),
        ("{\"inputs\": 3}", "expected a sequence at line 1 column 12"),
        ("[]", "failed to parse the request JSON"),
        ("{}", "the request has no 'inputs'"),
        ("{\"inputs\": []}{", "trailing characters"),
        ("\u{0}\u{1}", "expected value at line 1 column 1"),
    ] {
        expect(&world.http.post(&infer_path(), &[], body).await, 400, "input_invalid", text);
    }
    let latin = world.http.post(&infer_path(), &[], &b"{\"id\": \"\xff\", \"inputs\": []}"[..]).await;
    expect(&latin, 400, "input_invalid", "failed to parse the request JSON");
    let deep = "[".repeat(100_000);
    expect(&world.http.post(&infer_path(), &[], deep).await, 400, "input_invalid", "failed to parse");
}

#[tokio::test]
async fn names_types_and_shapes_that_do_not_fit_are_refused_with_what_fits() {
    let world = world().await;
    for (field, value, text) in [
        ("name", json!("z"), "unexpected inference input 'z': the model takes x FP32[-1,4]"),
        ("datatype", json!("FP64"), "data-type is 'FP64', but the model expects 'FP32'"),
        ("datatype", json!("BYTES"), "data-type is 'BYTES', but the model expects 'FP32'"),
        ("shape", json!([4]), "unexpected shape for input 'x': expected [-1,4], got [4]"),
        ("shape", json!([1, 5]), "unexpected shape for input 'x': expected [-1,4], got [1,5]"),
        ("shape", json!([2, 4]), "holds 4 elements, expected 8"),
        ("shape", json!([-1, 4]), "a dimension is 0 or more"),
        ("shape", json!([1.5, 4]), "a dimension: a whole number from 0 to 9223372036854775807"),
        ("shape", json!(["1", 4]), "a dimension: a whole number"),
        ("shape", json!([i64::MAX, 4]), "the tensor's size in bytes overflows"),
        ("shape", json!([1_u64 << 61, 4]), "the tensor's size in bytes overflows"),
        ("shape", json!([1_u64 << 63, 4]), "a whole number from 0 to 9223372036854775807"),
        ("shape", json!(vec![1; 17]), "a tensor has at most 16 dimensions"),
        ("data", json!([1, 2, 3]), "holds 3 elements, expected 4"),
        ("data", json!([1, 2, 3, "4"]), "holds a string, expected FP32"),
        ("data", json!([1, 2, 3, null]), "holds null, which is no FP32"),
        ("data", json!([[1, 2], [3, 4]]), "written flat or nested as its shape"),
        ("data", json!({"0": 1}), "holds an object, expected FP32"),
        ("data", json!([1, 2, 3, 1e39]), "which is no FP32"),
    ] {
        let reply = world.http.infer(&with(field, value)).await;
        expect(&reply, 400, "input_invalid", text);
    }
    let twice = json!({"inputs": [with("name", json!("x"))["inputs"][0], with("name", json!("x"))["inputs"][0]]});
    expect(&world.http.infer(&twice).await, 400, "input_invalid", "input 'x' is given twice");
    let none = json!({"inputs": []});
    expect(&world.http.infer(&none).await, 400, "input_invalid", "missing: x FP32[-1,4]");
    let mut output = with("name", json!("x"));
    output["outputs"] = json!([{"name": "q"}]);
    expect(
        &world.http.infer(&output).await,
        400,
        "input_invalid",
        "unexpected inference output 'q': the model gives y",
    );
    output["outputs"] = json!([{"name": "y"}, {"name": "y"}]);
    expect(&world.http.infer(&output).await, 400, "input_invalid", "output 'y' is asked for twice");
    assert_eq!(world.broker.seen().requests, 0, "nothing of this reaches the broker");
}

#[tokio::test]
async fn nan_as_text_is_pointed_to_the_binary_extension() {
    let world = world().await;
    for word in ["NaN", "Infinity", "-Infinity"] {
        let body = with("data", json!("DATA")).to_string().replace("\"DATA\"", &format!("[1, 2, {word}, 4]"));
        let reply = world.http.post(&infer_path(), &[], body).await;
        expect(&reply, 400, "input_invalid", "binary tensor extension");
    }
}

#[tokio::test]
async fn both_data_and_binary_or_none_is_refused() {
    let world = world().await;
    let both = with("parameters", json!({"binary_data_size": 16}));
    expect(&world.http.infer_binary(&both, &[0; 16]).await, 400, "input_invalid", "must set only one of");
    let mut neither = with("name", json!("x"));
    neither["inputs"][0].as_object_mut().unwrap().remove("data");
    expect(&world.http.infer(&neither).await, 400, "input_invalid", "none is set for input 'x'");
    let shared = with("parameters", json!({"shared_memory_region": "r"}));
    expect(&world.http.infer(&shared).await, 400, "input_invalid", "shared memory region, which is not supported");
}

fn binary(size: u64) -> Value {
    json!({"inputs": [
        {"name": "x", "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": size}},
    ]})
}

#[tokio::test]
async fn a_header_length_that_is_none_is_refused_with_the_range() {
    let world = world().await;
    let (_, body) = binary_body(&binary(16), &[0; 16]);
    let range = format!("in range (0, {}), got: ", body.len());
    for length in ["-1", "x", "", "1e2", "+5", "99999999999999999999", &(body.len() + 1).to_string()] {
        let reply = world.http.post(&infer_path(), &[("inference-header-content-length", length)], body.clone()).await;
        expect(&reply, 400, "input_invalid", &format!("{range}{length}"));
    }
    let chunked = [("inference-header-content-length", "100000")];
    let reply = world.http.post_chunked(&infer_path(), &chunked, &body, 10).await;
    expect(&reply, 400, "input_invalid", &format!("{range}100000"));
    let short = world.http.post(&infer_path(), &[("inference-header-content-length", "5")], body).await;
    expect(&short, 400, "input_invalid", "failed to parse the request JSON");
}

#[tokio::test]
async fn binary_data_of_the_wrong_size_is_refused_with_both_numbers() {
    let world = world().await;
    let wrong = "unexpected total byte size 12 for input 'x', expecting 16 for FP32 of shape [1,4]";
    expect(&world.http.infer_binary(&binary(12), &[0; 12]).await, 400, "input_invalid", wrong);
    let huge = world.http.infer_binary(&binary(u64::MAX), &[0; 12]).await;
    expect(&huge, 400, "input_invalid", "expecting 16");
    for (len, text) in [
        (12, "16 bytes of binary data were announced and 12 came"),
        (0, "16 bytes of binary data were announced and 0 came"),
        (17, "1 bytes are left over after the last input"),
    ] {
        let (length, body) = binary_body(&binary(16), &vec![0; len]);
        let headers = [("inference-header-content-length", &*length)];
        expect(&world.http.post(&infer_path(), &headers, body.clone()).await, 400, "input_invalid", text);
        expect(&world.http.post_chunked(&infer_path(), &headers, &body, 9).await, 400, "input_invalid", text);
    }
    let raw = world.http.post(&infer_path(), &[("inference-header-content-length", "0")], vec![0; 15]).await;
    expect(&raw, 400, "input_invalid", "expecting a multiple of 16 for FP32 [-1,4]");
    assert_eq!(world.broker.seen().requests, 0, "nothing of this reaches the broker");
}

#[tokio::test]
async fn bytes_that_are_no_bool_and_types_that_json_cannot_carry_are_refused() {
    let broker = FakeBroker::start(mixed());
    let sidecar = Sidecar::ready(config(broker.target(), DEADLINE)).await;
    let http = Http::new(sidecar.address);
    let request = |mask: Value| {
        let mut mask_input = json!({"name": "mask", "datatype": "BOOL", "shape": [2]});
        mask_input.as_object_mut().unwrap().extend(mask.as_object().unwrap().clone());
        json!({"inputs": [
            {"name": "ids", "datatype": "INT64", "shape": [1], "data": [1]},
            mask_input,
            {"name": "half", "datatype": "FP16", "shape": [2], "parameters": {"binary_data_size": 4}},
        ]})
    };
    let all_binary = |mut request: Value| {
        request["parameters"] = json!({"binary_data_output": true});
        request
    };
    let bad = all_binary(request(json!({"parameters": {"binary_data_size": 2}})));
    expect(
        &http.infer_binary(&bad, &[0, 2, 0, 0, 0, 0]).await,
        400,
        "input_invalid",
        "holds the byte 2, expected 0 or 1",
    );
    let text = all_binary(request(json!({"data": [true, 7]})));
    expect(&http.infer_binary(&text, &[0; 4]).await, 400, "input_invalid", "holds 7, which is no BOOL");
    let json_out = request(json!({"data": [true, false]}));
    let reply = http.infer_binary(&json_out, &[0; 4]).await;
    expect(&reply, 400, "input_invalid", "output 'half_out' is FP16, which JSON cannot carry");
    let raw = http.post(&infer_path(), &[("inference-header-content-length", "0")], vec![0; 8]).await;
    expect(&raw, 400, "input_invalid", "needs a model with one input, this one has 3");
    assert_eq!(broker.seen().requests, 0, "nothing of this reaches the broker");
}

#[tokio::test]
async fn an_encoding_that_is_not_spoken_or_is_broken_is_refused() {
    let world = world().await;
    let body = with("name", json!("x")).to_string();
    let brotli = world.http.post(&infer_path(), &[("content-encoding", "br")], body.clone()).await;
    expect(&brotli, 400, "input_invalid", "'br' is not supported, use gzip or deflate");
    let broken = world.http.post(&infer_path(), &[("content-encoding", "gzip")], body).await;
    expect(&broken, 400, "input_invalid", "the gzip body cannot be unpacked");
}

#[tokio::test]
async fn inputs_that_exceed_the_slab_are_413() {
    let broker = FakeBroker::start(doubler());
    let mut config = config(broker.target(), DEADLINE);
    config.slab.request = Bytes::kib(64);
    let sidecar = Sidecar::ready(config).await;
    let http = Http::new(sidecar.address);
    let head = json!({"inputs": [
        {"name": "x", "datatype": "FP32", "shape": [5000, 4], "parameters": {"binary_data_size": 80_000}},
    ]});
    let reply = http.infer_binary(&head, &vec![0; 80_000]).await;
    expect(&reply, 413, "too_large", "the inputs take 80000 bytes and at most 65536");
}

#[tokio::test]
async fn a_function_that_is_not_ready_is_503_with_retry_after() {
    let bare = Sidecar::bare(None).await;
    let lonely = Sidecar::start(config(Target::Socket("/nonexistent/broker.sock".into()), DEADLINE)).await;
    for (sidecar, text) in [(&bare, "the model is being read"), (&lonely, "connecting to the broker")] {
        let http = Http::new(sidecar.address);
        let reply = http.infer(&with("name", json!("x"))).await;
        expect(&reply, 503, "not_ready", text);
        assert_eq!(reply.header("retry-after"), "1");
        let ready = http.get("/v2/models/doubler/ready").await;
        assert_eq!((ready.status.as_u16(), ready.header("retry-after")), (503, "1"));
        assert_eq!(http.get("/v2/models/doubler").await.status, 503);
        let health = http.get("/v2/health/ready").await;
        assert_eq!((health.status.as_u16(), &health.json()["ready"]), (503, &json!(false)));
        assert_eq!(http.get("/v2/health/live").await.status, 200);
        let index = http.post("/v2/repository/index", &[], "").await.json();
        assert_eq!(index[0]["state"], "LOADING");
    }
}

#[tokio::test]
async fn a_function_that_the_broker_rejects_says_why_and_invites_no_retries() {
    let broker = FakeBroker::start(doubler());
    broker.register_with(Err(Refusal::ModelRejected { reason: "the graph is cyclic".into() }));
    let sidecar = Sidecar::start(config(broker.target(), DEADLINE)).await;
    let refused = sidecar.function.broker().unwrap().until_ready().await.unwrap_err();
    assert_eq!(refused.code(), "model_rejected");
    let http = Http::new(sidecar.address);
    let reply = http.infer(&with("name", json!("x"))).await;
    expect(&reply, 503, "model_rejected", "the graph is cyclic");
    assert_eq!(reply.header("retry-after"), "");
    let index = http.post("/v2/repository/index", &[], "").await.json();
    assert_eq!(index[0]["state"], "UNAVAILABLE");
    assert!(index[0]["reason"].as_str().unwrap().contains("cyclic"), "{index}");
}

#[tokio::test]
async fn what_the_broker_refuses_reaches_the_client_with_its_code() {
    let world = world().await;
    for (refusal, status, retry) in [
        (Refusal::FunctionQueueFull { limit: 7 }, 503, "1"),
        (Refusal::DeadlinePassed { late_by: Duration::from_millis(5) }, 503, "1"),
        (Refusal::InputInvalid { reason: "input 0 is odd".into() }, 400, ""),
        (Refusal::RunFailed { reason: "division by zero".into() }, 500, ""),
        (Refusal::HardwareFault, 503, "1"),
        (Refusal::ModelSuspended { left: Duration::from_secs(600) }, 503, "600"),
    ] {
        world.broker.set_mood(Mood::Refuse(refusal.clone()));
        let reply = world.http.infer(&with("name", json!("x"))).await;
        expect(&reply, status, refusal.code(), &refusal.to_string());
        assert_eq!(reply.header("retry-after"), retry);
    }
}
