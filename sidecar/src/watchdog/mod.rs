//! The function's front: the sidecar in the place of of-watchdog, with the handler behind it.
//!
//! It keeps of-watchdog's contract in `http` mode: settings, health, readiness, lock file, limit, time limits, headers,
//! and the order in which it stops. Beyond it: `/v2` is answered here, and readiness means that a request would be served.

pub mod front;
pub mod handler;
pub mod lock;
pub mod settings;

use std::sync::Arc;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub use self::settings::WatchdogSettings;
use self::{
    front::{Front, Gate},
    handler::{Handler, HandlerEnd},
    lock::Lock,
};
use crate::{
    app::AppError,
    limits::HANDLER_END_WITHIN,
    server::{self, Drain, Served},
};

/// Serves the front's port and watches over the handler until `stop` is cancelled and requests in flight have ended.
pub async fn run(
    listener: TcpListener,
    served: Served,
    settings: WatchdogSettings,
    sidecar_url: String,
    stop: CancellationToken,
) -> Result<(), AppError> {
    let lock = if settings.suppress_lock { None } else { Some(Lock::take(lock::path())?) };
    let handler = match settings.command.split_first() {
        Some((program, arguments)) => Some(Handler::start(program, arguments, &sidecar_url)?),
        None => None,
    };
    let function = Arc::clone(&served.function);
    let gate = Arc::new(Gate::new(&settings, served.upstream.clone(), lock, Arc::clone(&function)));
    let front = Front::new(Arc::clone(&gate), served.stack());
    // The handler hears of the stop at once, and serves on until it has drained, as of-watchdog's handlers do.
    let drain = Drain { grace: settings.healthcheck_interval, within: settings.write_timeout };
    let serving = server::serve_stack(listener, front, function, stop.clone(), drain);
    tokio::pin!(serving);
    let outcome = tokio::select! {
        () = stopped(&stop, &gate, handler.as_ref()) => { serving.await; Ok(()) }
        () = serving.as_mut() => Ok(()),
        end = crashed(handler.as_ref(), &stop) => Err(AppError::Handler(end)),
    };
    if let Some(handler) = handler {
        handler.end(HANDLER_END_WITHIN).await;
    }
    outcome
}

/// Ends once the stop has been passed on.
async fn stopped(stop: &CancellationToken, gate: &Gate, handler: Option<&Handler>) {
    stop.cancelled().await;
    gate.close();
    if let Some(handler) = handler {
        handler.terminate();
    }
}

/// Ends when the handler ends with a failure before anybody asked it to. One that ended well leaves its front behind,
/// as with of-watchdog; then readiness is what tells.
async fn crashed(handler: Option<&Handler>, stop: &CancellationToken) -> HandlerEnd {
    if let Some(handler) = handler {
        let end = handler.ended().await;
        if !stop.is_cancelled() && !end.is_success() {
            return end;
        }
        tracing::warn!(%end, "the handler ended; its front stays");
    }
    std::future::pending().await
}
