//! Whether slots are worth anything: the broker is ready and has a device that is not lost.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{
    net::TcpStream,
    sync::watch,
    time::{sleep, timeout},
};

/// How often the broker is asked.
const ASK_EVERY: Duration = Duration::from_secs(2);
/// How long an answer may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// Longest list of devices that is read.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// Tells of every change, for ever.
pub(super) async fn watch(admin: SocketAddr, healthy: watch::Sender<bool>) {
    loop {
        let now = timeout(ANSWER_WITHIN, is_healthy(admin)).await.ok().flatten().unwrap_or(false);
        healthy.send_if_modified(|known| {
            let changed = *known != now;
            if changed {
                tracing::info!(healthy = now, "slots changed health");
            }
            *known = now;
            changed
        });
        sleep(ASK_EVERY).await;
    }
}

async fn is_healthy(admin: SocketAddr) -> Option<bool> {
    get(admin, "/readyz").await?;
    let devices: Value = serde_json::from_slice(&get(admin, "/v1/devices").await?).ok()?;
    Some(devices.as_array()?.iter().any(|device| device["lost"] != true))
}

/// The page, where it is there.
async fn get(admin: SocketAddr, path: &str) -> Option<Bytes> {
    let stream = TcpStream::connect(admin).await.ok()?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.ok()?;
    let connection = tokio::spawn(connection);
    let request = http::Request::get(path).header("host", admin.to_string()).body(Empty::<Bytes>::new()).ok()?;
    let reply = sender.send_request(request).await.ok().filter(|reply| reply.status() == http::StatusCode::OK);
    let body = match reply {
        Some(reply) => Limited::new(reply.into_body(), ANSWER_BYTES_MAX).collect().await.ok(),
        None => None,
    };
    connection.abort();
    Some(body?.to_bytes())
}
