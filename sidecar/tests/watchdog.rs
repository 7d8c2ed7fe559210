//! The contract of of-watchdog in `http` mode: the same cases for our front and, where it is installed, for the real
//! program, where `FAASWAP_OF_WATCHDOG` names one, `make fetch-go` could install it, or `PATH` has it; else they say that
//! they skip it. What is meant to differ is in `watchdog_differences.rs`.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use http::Method;
use support::{
    clients::{Http, Reply},
    fronts::{Running, fronts, ours},
};
use tokio::process::Command;

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
        for probe in ["/_/health", "/_/ready"] {
            assert_eq!(running.http.post(probe, &[], "").await.status, 405, "{probe}");
        }
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
async fn a_readiness_probe_that_the_handler_answers_takes_no_place_from_requests() {
    for program in fronts() {
        let mut running = Running::start(&program, &[("ready_path", "/slow/0.5"), ("max_inflight", "1")]).await;
        running.until(async |http| http.get("/_/ready").await.status == 200).await;
        let probe = tokio::spawn({
            let http = running.http.clone();
            async move { http.get("/_/ready").await }
        });
        let handler = Http::new(running.handler);
        while handler.get("/slow-begun").await.body != "2" {
            tokio::task::yield_now().await;
        }
        assert_eq!(running.http.get("/").await.status, 200, "the one place is free");
        assert_eq!(probe.await.unwrap().status, 200);
    }
}

#[tokio::test]
async fn the_long_names_of_the_handlers_variables_win() {
    for program in fronts() {
        let short = [("fprocess", "/not/there"), ("upstream_url", "http://127.0.0.1:1")];
        let mut running = Running::spawn_named(&program, ["function_process", "http_upstream_url"], &short).await;
        running.until(async |http| http.get("/up").await.status == 200).await;
    }
}

#[tokio::test]
async fn the_folder_of_the_lock_file_is_made_where_it_is_missing() {
    for program in fronts() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("not/yet");
        let _running = Running::start(&program, &[("TMPDIR", missing.to_str().unwrap())]).await;
        assert!(missing.join(".lock").is_file());
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
    let mut running = Running::spawn(&ours(), &[("ready_path", "/up")]).await;
    running.until(async |http| http.get("/_/ready").await.status == 200).await;
    running.http.get("/teapot").await;
    let text = Http::new(running.metrics).get("/metrics").await;
    let text = String::from_utf8(text.body.to_vec()).unwrap();
    for line in ["http_requests_total{code=\"418\",method=\"GET\"} 1", "http_requests_in_flight 0"] {
        assert!(text.contains(line), "{line} is missing in\n{text}");
    }
    assert!(text.contains("http_request_duration_seconds_count{code=\"418\",method=\"GET\"} 1"), "{text}");
    assert!(!text.contains("http_requests_total{code=\"200\""), "probes are not counted:\n{text}");
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
