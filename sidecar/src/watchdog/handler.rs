//! The handler's process: started once, told to stop, killed if it does not. A new one is the platform's to start, with
//! a new pod's counters and a clean slate.

use std::{
    fmt,
    process::ExitStatus,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    process::{Child, Command},
    sync::Mutex,
    time::timeout,
};

use crate::app::AppError;

/// How the handler ended.
#[derive(Debug)]
pub struct HandlerEnd(Option<ExitStatus>);

impl HandlerEnd {
    /// Whether it says that all is well.
    pub fn is_success(&self) -> bool {
        self.0.is_some_and(|status| status.success())
    }
}

impl fmt::Display for HandlerEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(status) => status.fmt(f),
            None => f.write_str("its end cannot be awaited"),
        }
    }
}

/// A running handler.
#[derive(Debug)]
pub struct Handler {
    id: Option<Pid>,
    /// Once its end was awaited, its number may be another process's.
    is_over: AtomicBool,
    child: Mutex<Child>,
}

impl Handler {
    /// Starts it with our environment, our output, and the address of its inference service.
    pub fn start(program: &str, arguments: &[String], sidecar_url: &str) -> Result<Self, AppError> {
        let mut command = Command::new(program);
        command.args(arguments).env("FAASWAP_SIDECAR_URL", sidecar_url).kill_on_drop(true);
        let child = command.spawn().map_err(|error| AppError::Start { program: program.to_owned(), error })?;
        let id = child.id().and_then(|id| Pid::from_raw(id.try_into().ok()?));
        tracing::info!(program, pid = child.id(), "handler started");
        Ok(Self { id, is_over: AtomicBool::new(false), child: Mutex::new(child) })
    }

    /// Waits for its end.
    pub async fn ended(&self) -> HandlerEnd {
        let status = self.child.lock().await.wait().await.ok();
        self.is_over.store(true, Ordering::Relaxed);
        HandlerEnd(status)
    }

    /// Asks it to stop. It may serve on; see [`Handler::end`].
    pub fn terminate(&self) {
        if let Some(id) = self.id
            && !self.is_over.load(Ordering::Relaxed)
        {
            // Fails only where it has ended already.
            let _ended = kill_process(id, Signal::TERM);
        }
    }

    /// Gives it so long to end by itself, then kills it.
    pub async fn end(self, within: Duration) {
        self.terminate();
        if timeout(within, self.ended()).await.is_err() {
            tracing::warn!(waited_s = within.as_secs(), "handler killed: it did not end by itself");
        }
    }
}
