//! The contract of of-watchdog in `http` mode: the same cases for our front and, where it is installed, for the real
//! program. `tests/tools/fetch-go` installs it where Go and its module can be had; else those cases say that they skip.
//!
//! Differences that are meant, and so are not cases: the real one sends every body on as chunks, adds
//! `Accept-Encoding`, prefixes the handler's log lines, passes WebSockets, and is ready before the handler listens;
//! ours keeps `Content-Length`, leaves log lines alone, and is ready once model and handler are.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use http::Method;
use support::{
    broker::{FakeBroker, doubler},
    clients::{Http, Reply},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    time::sleep,
};

/// How long anything may take on a busy machine.
const SOON: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(10);

/// Our front, and the real one where there is one.
fn fronts() -> Vec<PathBuf> {
    let ours = PathBuf::from(env!("CARGO_BIN_EXE_faaswap-sidecar"));
    let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.cache/go/bin/of-watchdog");
    let theirs = std::env::var_os("FAASWAP_OF_WATCHDOG").map_or(installed, PathBuf::from);
    if theirs.is_file() {
        return vec![ours, theirs];
    }
    eprintln!("SKIPPED for of-watchdog: {} is not there; our front alone is tested", theirs.display());
    vec![ours]
}

async fn free_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

struct Running {
    child: Child,
    http: Http,
    front: SocketAddr,
    metrics: SocketAddr,
    folder: TempDir,
    _broker: FakeBroker,
}

impl Running {
    /// A front with its handler, both serving.
    async fn start(program: &Path, more: &[(&str, &str)]) -> Self {
        let mut running = Self::spawn(program, more).await;
        running.until(async |http| http.get("/up").await.status == 200).await;
        running
    }

    async fn spawn(program: &Path, more: &[(&str, &str)]) -> Self {
        let (front, handler, metrics) = (free_port().await, free_port().await, free_port().await);
        let folder = tempfile::tempdir().unwrap();
        let broker = FakeBroker::start(doubler());
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/handler.py");
        let child = Command::new(program)
            .env_clear()
            .envs([("PATH", std::env::var("PATH").unwrap())])
            .env("TMPDIR", folder.path())
            .env("mode", "http")
            .env("port", front.port().to_string())
            .env("fprocess", format!("python3 {} {}", script.display(), handler.port()))
            .env("upstream_url", format!("http://{handler}"))
            .env("exec_timeout", "20s")
            .env("write_timeout", "1s")
            .env("FAASWAP_BROKER_SOCKET", broker.socket())
            .env("FAASWAP_FUNCTION", support::NAME)
            .env("FAASWAP_MODEL", support::digest().to_string())
            .env("FAASWAP_LISTEN", "127.0.0.1:0")
            .env("FAASWAP_METRICS_LISTEN", metrics.to_string())
            .envs(more.iter().copied())
            .kill_on_drop(true)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut running = Self { child, http: Http::new(front), front, metrics, folder, _broker: broker };
        running.until(async |http| http.get("/_/health").await.status == 200).await;
        running
    }

    /// Asks until it is so.
    async fn until(&mut self, so: impl AsyncFn(&Http) -> bool) {
        let waiting = async {
            loop {
                if TcpStream::connect(self.front).await.is_ok() && so(&self.http).await {
                    return;
                }
                assert_eq!(self.child.try_wait().unwrap(), None, "the front ended");
                sleep(POLL).await;
            }
        };
        tokio::time::timeout(SOON, waiting).await.expect("it becomes so");
    }

    fn terminate(&self) {
        let pid = rustix::process::Pid::from_raw(self.child.id().unwrap().try_into().unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }

    /// Makes the handler end with this code. Whether that is answered depends on who is quicker.
    async fn end_handler(&self, code: u8) {
        let mut stream = TcpStream::connect(self.front).await.unwrap();
        let request = format!("GET /exit/{code} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let _answer_or_reset = stream.read_to_end(&mut Vec::new()).await;
    }

    async fn exit_code(&mut self) -> Option<i32> {
        tokio::time::timeout(SOON, self.child.wait()).await.expect("it ends").unwrap().code()
    }

    fn lock(&self) -> PathBuf {
        self.folder.path().join(".lock")
    }
}

fn seen(reply: &Reply) -> (u16, String) {
    (reply.status.as_u16(), reply.header("x-openfaas-internal").to_owned())
}

/// What of-watchdog says where the function is at fault.
fn internal(status: u16) -> (u16, String) {
    (status, "of-watchdog".to_owned())
}

#[tokio::test]
async fn requests_reach_the_handler_as_they_are_and_replies_say_how_long_they_took() {
    for program in fronts() {
        let running = Running::start(&program, &[]).await;
        let headers = [("x-call-id", "7"), ("user-agent", "kube-probe/1.36")];
        let reply = running.http.call(Method::PUT, "/a%20b?q=1&r", &headers, vec![7; 70_000]).await;
        assert_eq!(reply.body, "PUT /a%20b?q=1&r 7 True 70000");
        assert_eq!((reply.status.as_u16(), reply.header("x-from")), (200, "handler"));
        assert!(reply.header("x-duration-seconds").parse::<f64>().unwrap() > 0.0, "{reply:?}");
        assert_eq!(running.http.get("/teapot").await.status, 418);
        let chunked = running.http.post_chunked("/", &[], &[1; 5000], 7).await;
        assert_eq!(chunked.body, "POST / None True 5000");
    }
}

#[tokio::test]
async fn health_and_readiness_are_answered_by_the_front() {
    for program in fronts() {
        let mut running = Running::start(&program, &[]).await;
        running.until(async |http| http.get("/_/ready").await.status == 200).await;
        let health = running.http.get("/_/health").await;
        assert_eq!((health.status.as_u16(), health.body.trim_ascii()), (200, &b"OK"[..]));
        assert_eq!(running.http.post("/_/health", &[], "").await.status, 405);
        std::fs::remove_file(running.lock()).expect("the lock file is there");
        assert_eq!(running.http.get("/_/health").await.status, 503, "probes by file and by HTTP agree");
    }
}

#[tokio::test]
async fn readiness_can_be_the_handlers() {
    for program in fronts() {
        let mut running = Running::start(&program, &[("ready_path", "/teapot")]).await;
        running.until(async |http| http.get("/_/ready").await.status == 418).await;
    }
}

#[tokio::test]
async fn a_request_that_takes_too_long_is_504_and_a_client_may_ask_for_less() {
    for program in fronts() {
        let running = Running::start(&program, &[("exec_timeout", "300ms")]).await;
        let late = running.http.get("/slow/30").await;
        assert_eq!((seen(&late), late.body.len()), (internal(504), 0));
        let patient = Running::start(&program, &[]).await;
        let late = patient.http.call(Method::GET, "/slow/30", &[("x-timeout", "200ms")], "").await;
        assert_eq!(seen(&late), internal(504));
    }
}

#[tokio::test]
async fn more_requests_than_max_inflight_are_429_and_so_is_readiness() {
    for program in fronts() {
        let mut running = Running::start(&program, &[("max_inflight", "1")]).await;
        running.until(async |http| http.get("/_/ready").await.status == 200).await;
        let slow = tokio::spawn({
            let http = running.http.clone();
            async move { http.get("/slow/3").await }
        });
        running.until(async |http| http.get("/_/ready").await.status == 429).await;
        assert_eq!(running.http.get("/").await.status, 429);
        assert_eq!(running.http.get("/_/health").await.status, 200, "a busy function is not to be killed");
        assert_eq!(slow.await.unwrap().status, 200);
        assert_eq!(running.http.get("/").await.status, 200);
    }
}

#[tokio::test]
async fn sigterm_turns_health_off_serves_on_and_ends_with_0() {
    for program in fronts() {
        let mut running = Running::start(&program, &[("healthcheck_interval", "1s")]).await;
        assert!(running.lock().exists());
        running.terminate();
        running.until(async |http| http.get("/_/health").await.status == 503).await;
        assert!(!running.lock().exists());
        assert_eq!(running.http.get("/").await.status, 200, "new requests are served while routers learn");
        assert_eq!(running.exit_code().await, Some(0));
    }
}

#[tokio::test]
async fn a_handler_that_crashes_takes_the_front_along_and_one_that_ends_well_does_not() {
    for program in fronts() {
        let mut running = Running::start(&program, &[]).await;
        running.end_handler(3).await;
        assert_eq!(running.exit_code().await, Some(1));
        let running = Running::start(&program, &[]).await;
        running.end_handler(0).await;
        assert_eq!(seen(&running.http.get("/").await), internal(500));
        assert_eq!(running.http.get("/_/health").await.status, 200);
    }
}

// === What only our front does ===

fn ours() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_faaswap-sidecar"))
}

#[tokio::test]
async fn the_protocol_is_answered_at_the_front_and_at_the_url_that_the_handler_is_given() {
    let mut running = Running::start(&ours(), &[("max_inflight", "1")]).await;
    running.until(async |http| http.get("/_/ready").await.status == 200).await;
    let url = running.http.get("/url").await;
    let url = String::from_utf8(url.body.to_vec()).unwrap();
    let beside = Http::new(url.strip_prefix("http://").unwrap().parse().unwrap());
    let _busy = tokio::spawn({
        let http = running.http.clone();
        async move { http.get("/slow/30").await }
    });
    running.until(async |http| http.get("/_/ready").await.status == 429).await;
    let body =
        serde_json::json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]});
    assert_eq!(running.http.infer(&body).await.status, 429, "the limit holds for every request from outside");
    assert_eq!(
        beside.infer(&body).await.json()["outputs"][0]["data"][3],
        8.0,
        "a handler's own requests are let through"
    );
    assert_eq!(beside.get("/").await.status, 404, "a handler does not reach itself there");
}

#[tokio::test]
async fn metrics_have_of_watchdogs_names() {
    let running = Running::start(&ours(), &[]).await;
    running.http.get("/teapot").await;
    let text = Http::new(running.metrics).get("/metrics").await;
    let text = String::from_utf8(text.body.to_vec()).unwrap();
    for line in ["http_requests_total{code=\"418\",method=\"GET\"} 1", "http_requests_in_flight 0"] {
        assert!(text.contains(line), "{line} is missing in\n{text}");
    }
    assert!(text.contains("http_request_duration_seconds_count{code=\"418\",method=\"GET\"} 1"), "{text}");
}

#[tokio::test]
async fn a_function_without_its_model_lives_and_says_why_it_is_not_ready() {
    let mut running = Running::spawn(&ours(), &[("FAASWAP_MODEL", "/not/there.onnx")]).await;
    running
        .until(async |http| String::from_utf8_lossy(&http.get("/_/ready").await.body).contains("/not/there.onnx"))
        .await;
    assert_eq!(running.http.get("/_/ready").await.status, 503);
    assert_eq!(running.http.get("/_/health").await.status, 200, "the liveness probe must not kill it");
    running.terminate();
    assert_eq!(running.exit_code().await, Some(0));
}

#[tokio::test]
async fn the_health_check_by_exit_code_follows_the_lock_file() {
    let folder = tempfile::tempdir().unwrap();
    let check = || Command::new(ours()).arg("--run-healthcheck").env("TMPDIR", folder.path()).status();
    assert_eq!(check().await.unwrap().code(), Some(1));
    std::fs::write(folder.path().join(".lock"), []).unwrap();
    assert_eq!(check().await.unwrap().code(), Some(0));
}

#[tokio::test]
async fn settings_that_make_no_sense_are_all_named() {
    let output = Command::new(ours())
        .env_clear()
        .envs([("fprocess", "x"), ("mode", "streaming"), ("exec_timeout", "soon"), ("port", "99999")])
        .envs([("ready_path", "ready"), ("suppress_lock", "perhaps"), ("FAASWAP_MODEL", "m.onnx")])
        .output()
        .await
        .unwrap();
    assert_eq!(output.status.code(), Some(64));
    let said = String::from_utf8(output.stderr).unwrap();
    for expected in ["mode: 'streaming'", "exec_timeout: 'soon'", "port: '99999'", "ready_path: 'ready'"] {
        assert!(said.contains(expected), "{expected} is missing in {said}");
    }
    assert!(said.contains("upstream_url is not set") && said.contains("suppress_lock: 'perhaps'"), "{said}");
}
