//! The program itself: configuration and exit codes, ports, the handler behind it, and how it stops.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{convert::Infallible, net::SocketAddr, process::Stdio, time::Duration};

use bytes::Bytes;
use faaswap_protocol::DType;
use faaswap_sidecar::limits::ANNOUNCED_AFTER;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use support::{
    Sidecar,
    broker::{FakeBroker, Mood, doubler},
    clients::Http,
};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    net::TcpListener,
    process::{Child, ChildStderr, Command},
};

fn program() -> Command {
    let mut program = Command::new(env!("CARGO_BIN_EXE_faaswap-sidecar"));
    program.env_clear().kill_on_drop(true).stderr(Stdio::piped()).stdout(Stdio::piped());
    program
}

/// A running sidecar.
struct Running {
    child: Child,
    log: Lines<BufReader<ChildStderr>>,
    metrics: SocketAddr,
    service: SocketAddr,
}

impl Running {
    async fn start(broker: &FakeBroker, more: &[(&str, &str)]) -> Self {
        let mut child = program()
            .env("FAASWAP_BROKER_SOCKET", broker.socket())
            .env("FAASWAP_FUNCTION", support::NAME)
            .env("FAASWAP_MODEL", support::digest().to_string())
            .env("FAASWAP_SLAB_REQUEST_MIB", "2")
            .env("FAASWAP_SLAB_RESPONSE_MIB", "2")
            .env("FAASWAP_LISTEN", "127.0.0.1:0")
            .env("FAASWAP_METRICS_LISTEN", "127.0.0.1:0")
            .env("FAASWAP_DRAIN_GRACE_MS", "0")
            .env("FAASWAP_LOG_FORMAT", "json")
            .envs(more.iter().copied())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
        let service = listening(&mut log, "service").await;
        let metrics = listening(&mut log, "metrics").await;
        Self { child, log, metrics, service }
    }

    async fn ended(&mut self) -> Option<i32> {
        while let Ok(Some(_)) = self.log.next_line().await {}
        self.child.wait().await.unwrap().code()
    }

    fn terminate(&self) {
        let pid = rustix::process::Pid::from_raw(self.child.id().unwrap().try_into().unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }
}

/// The address that the log names for a port.
async fn listening(log: &mut Lines<BufReader<ChildStderr>>, port: &str) -> SocketAddr {
    while let Some(line) = log.next_line().await.unwrap() {
        let line: serde_json::Value = serde_json::from_str(&line).expect(&line);
        if line["fields"]["message"] == "listening" && line["fields"]["port"] == port {
            return line["fields"]["address"].as_str().unwrap().parse().unwrap();
        }
    }
    panic!("the sidecar ended before it listened");
}

#[tokio::test]
async fn every_mistake_of_the_configuration_is_shown_and_the_exit_code_is_64() {
    let output = program().env("FAASWAP_SLO_MS", "soon").arg("--check").output().await.unwrap();
    assert_eq!(output.status.code(), Some(64));
    let said = String::from_utf8(output.stderr).unwrap();
    for expected in ["3 mistake(s)", "function is not set", "model is not set", "slo_ms: 'soon'"] {
        assert!(said.contains(expected), "{expected} is missing in {said}");
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("sidecar.toml");
    std::fs::write(&file, format!("function = 'f'\nmodel = '{}'\ncolor = 1", support::digest())).unwrap();
    let output = program().arg("--config").arg(&file).output().await.unwrap();
    assert_eq!(output.status.code(), Some(64));
    assert!(String::from_utf8(output.stderr).unwrap().contains("color is no setting"));
    std::fs::write(&file, format!("function = 'f'\nmodel = '{}'", support::digest())).unwrap();
    let fine = program().arg("--check").arg("--config").arg(&file).status().await.unwrap();
    assert_eq!(fine.code(), Some(0));
    assert_eq!(program().arg("--colour").status().await.unwrap().code(), Some(64));
}

#[tokio::test]
async fn a_port_that_is_taken_ends_the_sidecar_with_the_reason() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let digest = support::digest().to_string();
    let address = taken.local_addr().unwrap().to_string();
    let variables = [("FAASWAP_FUNCTION", "f"), ("FAASWAP_MODEL", &*digest), ("FAASWAP_LISTEN", &*address)];
    let output = program().envs(variables).output().await.unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains(&format!("cannot listen on {address}")), "{said}");
}

#[tokio::test]
async fn probes_and_metrics_have_a_port_of_their_own() {
    let broker = FakeBroker::start(doubler());
    broker.register_with(Err(faaswap_protocol::Refusal::ModelRejected { reason: "cyclic".into() }));
    let rejected = Running::start(&broker, &[]).await;
    let probe = Http::new(rejected.metrics);
    assert_eq!(probe.get("/livez").await.status, 200);
    assert_eq!(probe.get("/readyz").await.status, 503);
    broker.register_with(Ok(()));
    let running = Running::start(&broker, &[]).await;
    broker.until(|seen| seen.registered == 1).await;
    let http = Http::new(running.service);
    let body =
        serde_json::json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]});
    while http.infer(&body).await.status == 503 {
        tokio::task::yield_now().await;
    }
    let operator = Http::new(running.metrics);
    assert_eq!(operator.get("/readyz").await.status, 200);
    let metrics = operator.get("/metrics").await;
    assert!(metrics.header("content-type").starts_with("application/openmetrics-text"));
    let text = String::from_utf8(metrics.body.to_vec()).unwrap();
    for line in [
        "faaswap_sidecar_requests_total{protocol=\"http\",outcome=\"ok\"} 1",
        "faaswap_sidecar_answers_total{resident=\"false\"} 1",
        "faaswap_sidecar_function_state{state=\"ready\"} 1",
        "faaswap_sidecar_requests_waiting 0",
    ] {
        assert!(text.contains(line), "{line} is missing in\n{text}");
    }
    assert!(text.ends_with("# EOF\n"));
    assert_eq!(http.get("/metrics").await.status, 404, "operators' pages are not on the clients' port");
}

#[tokio::test]
async fn sigterm_lets_requests_in_flight_finish_and_takes_no_new_ones() {
    let broker = FakeBroker::start(doubler());
    let mut running = Running::start(&broker, &[]).await;
    broker.until(|seen| seen.registered == 1).await;
    broker.set_mood(Mood::Hold);
    let http = Http::new(running.service);
    let body =
        serde_json::json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]});
    while Http::new(running.service).get("/v2/health/ready").await.status != 200 {
        tokio::task::yield_now().await;
    }
    let asking = tokio::spawn({
        let (http, body) = (http.clone(), body.clone());
        async move { http.infer(&body).await }
    });
    broker.until(|seen| seen.requests == 1).await;
    running.terminate();
    // The port closes while the request is still in flight.
    while tokio::net::TcpStream::connect(running.service).await.is_ok() {
        tokio::task::yield_now().await;
    }
    broker.set_mood(Mood::Answer);
    let reply = asking.await.unwrap();
    assert_eq!(reply.json()["outputs"][0]["data"][3], 8.0);
    assert_eq!(running.ended().await, Some(0));
}

/// A handler that says what it was asked.
async fn handler() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let service = hyper::service::service_fn(|request: Request<Incoming>| async move {
                let (parts, body) = request.into_parts();
                let body = body.collect().await.unwrap().to_bytes();
                let host = parts.headers["host"].to_str().unwrap();
                let connection = parts.headers.contains_key("x-hop");
                let said = format!("{} {} {host} {connection} {}", parts.method, parts.uri, body.len());
                let response = Response::builder().status(207).header("x-from", "handler").header("keep-alive", "9");
                Ok::<_, Infallible>(response.body(Full::new(Bytes::from(said))).unwrap())
            });
            tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
        }
    });
    address
}

#[tokio::test]
async fn what_is_not_of_the_protocol_goes_to_the_handler_and_back() {
    let sidecar = Sidecar::bare(Some(handler().await)).await;
    let http = Http::new(sidecar.address);
    let headers = [("connection", "x-hop"), ("x-hop", "1")];
    let reply = http.call(Method::PUT, "/v2x/a%20b?q=1", &headers, vec![7; 300_000]).await;
    assert_eq!((reply.status.as_u16(), reply.header("x-from")), (207, "handler"));
    assert_eq!(reply.header("keep-alive"), "", "what concerns one hop stays there");
    let said = String::from_utf8(reply.body.to_vec()).unwrap();
    assert_eq!(said, format!("PUT /v2x/a%20b?q=1 {} false 300000", sidecar.address));
    let chunked = http.post_chunked("/", &[], &[1; 5000], 7).await;
    assert!(String::from_utf8(chunked.body.to_vec()).unwrap().ends_with("false 5000"));
    assert_eq!(http.get("/v2/health/live").await.status, 200, "the protocol stays here");
}

/// Waits until weights may have left since the function became ready: before that no request is announced.
async fn until_weights_may_have_left(running: &Running) {
    while Http::new(running.metrics).get("/readyz").await.status != 200 {
        tokio::task::yield_now().await;
    }
    tokio::time::sleep(ANNOUNCED_AFTER).await;
}

/// How many hints the broker had before this inference. What is said on a connection is heard in order.
async fn expected_until_now(broker: &FakeBroker, running: &Running) -> usize {
    let body =
        serde_json::json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]});
    assert_eq!(Http::new(running.service).infer(&body).await.status, 200);
    broker.seen().expected
}

#[tokio::test]
async fn the_broker_hears_of_what_goes_to_the_handler_unless_told_otherwise() {
    let upstream = handler().await.to_string();
    for (prefetch, hints) in [("true", 2), ("false", 0)] {
        let broker = FakeBroker::start(doubler());
        let variables = [("FAASWAP_UPSTREAM", upstream.as_str()), ("FAASWAP_PREFETCH", prefetch)];
        let running = Running::start(&broker, &variables).await;
        until_weights_may_have_left(&running).await;
        for _ in 0..2 {
            assert_eq!(Http::new(running.service).get("/any").await.status.as_u16(), 207);
        }
        for probe in [("user-agent", "kube-probe/1.36"), ("k-network-probe", "queue")] {
            let reply = Http::new(running.service).call(Method::GET, "/any", &[probe], "").await;
            assert_eq!(reply.status.as_u16(), 207, "no inference comes of {probe:?}");
        }
        assert_eq!(expected_until_now(&broker, &running).await, hints, "{prefetch}");
    }
}

/// What Knative's queue-proxy 1.9 sends, as its client writes it.
fn recorded(action: &str) -> String {
    let body = format!(r#"{{ "action": "{action}" }}"#);
    let length = body.len();
    format!(
        "POST /concurrency-state HTTP/1.1\r\nHost: 127.0.0.1:9465\r\nUser-Agent: Go-http-client/1.1\r\n\
         Content-Length: {length}\r\nToken: eyJhbGciOi\r\nAccept-Encoding: gzip\r\n\r\n{body}"
    )
}

#[tokio::test]
async fn knatives_hints_are_always_answered_with_200_and_a_resume_reaches_the_broker() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let broker = FakeBroker::start(doubler());
    broker.register_with(Err(faaswap_protocol::Refusal::NameTaken));
    let running = Running::start(&broker, &[]).await;
    let say = async |action: &str| {
        let mut socket = tokio::net::TcpStream::connect(running.metrics).await.unwrap();
        socket.write_all(recorded(action).as_bytes()).await.unwrap();
        let mut head = [0; 15];
        socket.read_exact(&mut head).await.unwrap();
        assert_eq!(std::str::from_utf8(&head).unwrap(), "HTTP/1.1 200 OK", "{action}");
    };
    // Before the function is ready, too: another answer would end the pod.
    say("pause").await;
    say("resume").await;
    broker.register_with(Ok(()));
    until_weights_may_have_left(&running).await;
    for action in ["pause", "resume", "pause", "terminating"] {
        say(action).await;
    }
    assert_eq!(expected_until_now(&broker, &running).await, 1);
    let http = Http::new(running.metrics);
    let nonsense = http.post("/concurrency-state", &[], "pause").await;
    assert_eq!((nonsense.status.as_u16(), http.get("/concurrency-state").await.status.as_u16()), (400, 405));
    assert_eq!(http.post("/concurrency-state", &[], vec![b' '; 5000]).await.status.as_u16(), 413);
}

#[tokio::test]
async fn a_handler_that_is_not_there_is_502() {
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let sidecar = Sidecar::bare(Some(closed)).await;
    let reply = Http::new(sidecar.address).get("/").await;
    assert_eq!((reply.status.as_u16(), reply.header("faaswap-refusal")), (502, "upstream_unreachable"));
    assert!(reply.error().contains(&closed.to_string()), "{reply:?}");
}

#[tokio::test]
async fn a_connection_that_says_nothing_sensible_is_closed_and_others_go_on() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let broker = FakeBroker::start(doubler());
    let sidecar = Sidecar::ready(support::config(broker.target(), Duration::from_secs(10))).await;
    let many_headers = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(1000));
    let long_line = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(2 << 20));
    for nonsense in ["\0\0\0\0\0\0\0\0\r\n\r\n", "GET\r\n\r\n", &many_headers, &long_line] {
        let mut socket = tokio::net::TcpStream::connect(sidecar.address).await.unwrap();
        // It may be closed before all was said.
        let _partly = socket.write_all(nonsense.as_bytes()).await;
        let mut said = Vec::new();
        let _reset = socket.read_to_end(&mut said).await;
        assert!(said.is_empty() || said.starts_with(b"HTTP/1.1 4"), "{}", String::from_utf8_lossy(&said));
    }
    let client = sidecar.function.broker().unwrap();
    let request = faaswap_sidecar::broker::InferRequest::default();
    let request = request.input(0, DType::F32, &[0, 4], Bytes::new()).unwrap();
    assert_eq!(client.infer(&request).await.unwrap().outputs[0].data.len(), 0, "an empty tensor is one");
}
