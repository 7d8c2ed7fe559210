//! The operators' port: health, metrics, and lists of what is there.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Path, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use faaswap_device::Device;
use faaswap_scheduler::PolicyKind;
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot, watch},
};

use crate::{config::POLICY_SEED, core::Report, telemetry::Telemetry};

/// What the loop is asked.
#[derive(Debug)]
pub(crate) enum Question {
    /// What there is now.
    Report(oneshot::Sender<Report>),
    /// Another policy shall decide; answered once it does.
    Choose(PolicyKind, oneshot::Sender<()>),
}

/// Most questions to the loop that wait.
pub(crate) const QUESTIONS_MAX: usize = 16;

#[derive(Clone)]
struct Shared {
    telemetry: Arc<Telemetry>,
    ready: watch::Receiver<bool>,
    asks: mpsc::Sender<Question>,
    /// Devices that may be made to fail; none unless tests are configured.
    may_fail: Arc<[Arc<dyn Device>]>,
}

/// Serves until the process ends.
pub(crate) async fn serve(
    listener: TcpListener,
    telemetry: Arc<Telemetry>,
    ready: watch::Receiver<bool>,
    asks: mpsc::Sender<Question>,
    may_fail: Arc<[Arc<dyn Device>]>,
) {
    let app = Router::new()
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/v1/functions", get(async |State(shared): State<Shared>| list(shared, |r| Json(r.functions)).await))
        .route("/v1/models", get(async |State(shared): State<Shared>| list(shared, |r| Json(r.models)).await))
        .route("/v1/decisions", get(async |State(shared): State<Shared>| list(shared, |r| Json(r.decisions)).await))
        .route("/v1/devices", get(devices))
        .route("/v1/policy/{name}", post(choose))
        .route("/v1/devices/{name}/fail", post(fail))
        .with_state(Shared { telemetry, ready, asks, may_fail });
    if let Err(error) = axum::serve(listener, app).await {
        tracing::error!(%error, "the admin port is closed");
    }
}

async fn readyz(State(shared): State<Shared>) -> Response {
    if *shared.ready.borrow() {
        "ready\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "starting or draining\n").into_response()
    }
}

async fn devices(State(shared): State<Shared>) -> Response {
    let telemetry = Arc::clone(&shared.telemetry);
    list(shared, |report| Json(telemetry.gpus().beside(report.devices))).await
}

async fn metrics(State(shared): State<Shared>) -> Response {
    // Asking for a report brings the gauges up to date.
    if ask(&shared).await.is_none() {
        return (StatusCode::SERVICE_UNAVAILABLE, "ending\n").into_response();
    }
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], shared.telemetry.text()).into_response()
}

async fn fail(State(shared): State<Shared>, Path(name): Path<String>) -> Response {
    match shared.may_fail.iter().find(|device| device.info().name == name) {
        Some(device) => {
            let device = Arc::clone(device);
            // A GPU takes a moment to fail.
            let failed = tokio::task::spawn_blocking(move || device.fail()).await;
            if failed.is_ok() { "failed\n".into_response() } else { StatusCode::INTERNAL_SERVER_ERROR.into_response() }
        }
        None => (StatusCode::NOT_FOUND, "no such device, or test_faults is off\n").into_response(),
    }
}

async fn choose(State(shared): State<Shared>, Path(name): Path<String>) -> Response {
    // Whoever reads metrics reaches this port, without a name: only where policies are compared may they be changed.
    if shared.may_fail.is_empty() {
        return (StatusCode::NOT_FOUND, "policies are changed where test_faults is on\n").into_response();
    }
    let Some(policy) = PolicyKind::of(&name, POLICY_SEED) else {
        let known = PolicyKind::all(POLICY_SEED).map(PolicyKind::name).join(", ");
        return (StatusCode::BAD_REQUEST, format!("there is no policy `{name}`, but {known}\n")).into_response();
    };
    let (answer, chosen) = oneshot::channel();
    let asked = shared.asks.send(Question::Choose(policy, answer)).await.is_ok();
    if asked && chosen.await.is_ok() {
        format!("{name} decides\n").into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "ending\n").into_response()
    }
}

async fn list<T: IntoResponse>(shared: Shared, part: impl FnOnce(Report) -> T) -> Response {
    match ask(&shared).await {
        Some(report) => part(report).into_response(),
        None => (StatusCode::SERVICE_UNAVAILABLE, "ending\n").into_response(),
    }
}

async fn ask(shared: &Shared) -> Option<Report> {
    let (answer, asked) = oneshot::channel();
    shared.asks.send(Question::Report(answer)).await.ok()?;
    asked.await.ok()
}
