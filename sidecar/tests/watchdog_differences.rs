//! What our front means to do otherwise than the real of-watchdog, each seen at ours and, where it is there, at theirs.
//!
//! | what | ours | of-watchdog |
//! |---|---|---|
//! | a body whose length is known | keeps its `Content-Length` | is sent on as chunks |
//! | `Accept-Encoding`, where the client sent none | none | `gzip` |
//! | `/a//b/../c` | reaches the handler as it is | 301 to `/a/c` |
//! | WebSockets | not passed: `Upgrade` ends here | passed |
//! | `/_/ready` | 200 once model and handler are there | 200 as soon as it listens |
//! | `X-Duration-Seconds` on 429 | there | not there |
//! | `/_/health` with `suppress_lock` | 200 | 503, since the file that it looks for was never written |
//! | a value that makes no sense | ends with 64 and says all of them | the default is taken |
//!
//! Not seen here: the real one prefixes the handler's log lines and writes one for each request; ours does neither. It has
//! other modes than `http`, and `jwt_auth`.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::path::Path;

use http::Method;
use support::fronts::{Running, fronts, ours};

/// What is expected of a program.
fn meant<T>(program: &Path, of_ours: T, of_theirs: T) -> T {
    if program == ours() { of_ours } else { of_theirs }
}

/// What the handler found in a header.
async fn at_handler(running: &Running, name: &str, sent: &[(&str, &str)], body: &'static str) -> String {
    let reply = running.http.call(Method::POST, &format!("/header/{name}"), sent, body).await;
    assert_eq!(reply.status, 200);
    String::from_utf8(reply.body.to_vec()).unwrap()
}

#[tokio::test]
async fn what_the_handler_sees_of_a_request() {
    for program in fronts() {
        let running = Running::start(&program, &[]).await;
        assert_eq!(at_handler(&running, "content-length", &[], "0123456789").await, meant(&program, "10", "none"));
        assert_eq!(at_handler(&running, "accept-encoding", &[], "").await, meant(&program, "none", "gzip"));
        let upgrade = [("connection", "upgrade"), ("upgrade", "websocket")];
        assert_eq!(at_handler(&running, "upgrade", &upgrade, "").await, meant(&program, "none", "websocket"));
        assert_eq!(running.http.get("/a//b/../c").await.status.as_u16(), meant(&program, 200, 301));
    }
}

#[tokio::test]
async fn what_readiness_waits_for() {
    for program in fronts() {
        let mut running = Running::spawn(&program, &[("fprocess", "sleep 600")]).await;
        running.until(async |http| http.get("/_/health").await.status == 200).await;
        assert_eq!(running.http.get("/_/ready").await.status.as_u16(), meant(&program, 503, 200));
    }
}

#[tokio::test]
async fn what_is_said_of_a_request_that_was_not_taken() {
    for program in fronts() {
        let mut running = Running::start(&program, &[("max_inflight", "1")]).await;
        running.until(async |http| http.get("/_/ready").await.status == 200).await;
        let _busy = tokio::spawn({
            let http = running.http.clone();
            async move { http.get("/slow/30").await }
        });
        running.until(async |http| http.get("/_/ready").await.status == 429).await;
        let reply = running.http.get("/").await;
        assert_eq!(
            (reply.status.as_u16(), reply.headers.contains_key("x-duration-seconds")),
            (429, meant(&program, true, false))
        );
    }
}

#[tokio::test]
async fn health_without_a_lock_file() {
    for program in fronts() {
        let running = Running::start(&program, &[("suppress_lock", "true")]).await;
        assert!(!running.lock().exists());
        assert_eq!(running.http.get("/_/health").await.status.as_u16(), meant(&program, 200, 503));
    }
}

#[tokio::test]
async fn a_value_that_makes_no_sense() {
    for program in fronts() {
        let mut running = Running::spawn(&program, &[("exec_timeout", "soon")]).await;
        if program == ours() {
            assert_eq!(running.exit_code().await, Some(64));
        } else {
            running.until(async |http| http.get("/up").await.status == 200).await;
        }
    }
}
