//! Keeps the function registered: connects, registers, watches the connection, and starts over when it ends.

use std::{
    hash::{BuildHasher, RandomState},
    sync::Arc,
};

use tokio::time::{Duration, sleep};

use super::{
    FunctionState, Known, Ready, Shared,
    dial::{self, Opened},
    link::Link,
    register::{self, Progress, RegisterError, Registered},
    socket::LinkError,
};
use crate::{
    fetch::{Patience, Remote, Stage},
    limits::{RECONNECT_PAUSE_MAX, RECONNECT_PAUSE_MIN, REGISTER_AGAIN_AFTER},
    model::ModelSource,
};

/// Runs until aborted.
pub(super) async fn keep_connected(shared: Arc<Shared>) {
    let mut pause = RECONNECT_PAUSE_MIN;
    let mut model = shared.config.model.clone();
    let mut patience = Patience::new();
    loop {
        match serve_one_connection(&shared, &mut model).await {
            Ended::AfterService => pause = RECONNECT_PAUSE_MIN,
            Ended::BeforeService => pause = (pause * 2).min(RECONNECT_PAUSE_MAX),
            Ended::ForFiles(remote) => {
                pause = RECONNECT_PAUSE_MIN;
                let told = |stage: Stage| drop(shared.states.send_replace(stage.into()));
                // Where it was given up, the broker is asked again: another pod may have brought the weights meanwhile.
                if let Some((_, files)) = patience.try_once(&remote, told).await {
                    (model.files, patience) = (files, Patience::new());
                }
            }
        }
        sleep(jittered(pause)).await;
    }
}

/// Whether a connection was of any use: only then is the broker dialled again quickly.
enum Ended {
    AfterService,
    BeforeService,
    /// The broker wants files that are not here yet. Nothing keeps a connection open for as long as that may take.
    ForFiles(Arc<Remote>),
}

async fn serve_one_connection(shared: &Arc<Shared>, model: &mut ModelSource) -> Ended {
    let config = &shared.config;
    let mut opened = match dial::open(&config.targets, config.slab, &config.agent).await {
        Ok((opened, target)) => {
            tracing::info!(%target, slab = opened.slab.is_some(), "connected to the broker");
            opened
        }
        Err(error) => {
            tracing::debug!(%error, "no broker");
            set_connecting(shared);
            return Ended::BeforeService;
        }
    };
    let registered = match register_patiently(shared, &mut opened, model).await {
        Ok(Some(registered)) => registered,
        Ok(None) => return model.remote.clone().map_or(Ended::BeforeService, Ended::ForFiles),
        Err(error) => {
            tracing::warn!(%error, "broker connection lost before the function was registered");
            set_connecting(shared);
            return Ended::BeforeService;
        }
    };
    if model.remote.is_some() {
        // The broker has them, by their digest; so another broker's may too.
        model.files.clear();
    }
    let link = publish(shared, registered, &opened);
    // On its own, so that a draining broker's last answers are read while the next broker is looked for.
    let reading = tokio::spawn({
        let link = Arc::clone(&link);
        async move {
            let end = link.run(opened.socket, opened.frames).await;
            tracing::warn!(error = %end, "broker connection ended");
        }
    });
    let _ends_with_us = AbortUnlessRetired { link: &link, reading: Some(reading) };
    link.until_retired().await;
    set_connecting(shared);
    Ended::AfterService
}

/// Ends the connection's reader when the client itself ends.
struct AbortUnlessRetired<'a> {
    link: &'a Link,
    reading: Option<tokio::task::JoinHandle<()>>,
}

impl Drop for AbortUnlessRetired<'_> {
    fn drop(&mut self) {
        if self.link.is_open()
            && let Some(reading) = self.reading.take()
        {
            reading.abort();
        }
    }
}

fn set_connecting(shared: &Shared) {
    shared.states.send_if_modified(|state| match state {
        FunctionState::Connecting => false,
        FunctionState::Fetching(_)
        | FunctionState::Unfetched(_)
        | FunctionState::Uploading
        | FunctionState::Preparing(_)
        | FunctionState::Ready(_)
        | FunctionState::Rejected(_) => {
            *state = FunctionState::Connecting;
            true
        }
    });
}

fn publish(shared: &Shared, registered: Registered, opened: &Opened) -> Arc<Link> {
    let Registered { function, signature, weights } = registered;
    let link = Link::new(function, Arc::clone(&opened.socket), opened.slab.clone());
    let known = Arc::clone(shared.known.get_or_init(|| Arc::new(Known { signature, weights })));
    tracing::info!(function = %shared.config.function.name, weights = %known.weights, "function is ready");
    shared.missed.send_replace(false);
    shared.states.send_replace(FunctionState::Ready(Ready { known, link: Arc::clone(&link) }));
    link
}

/// Registers, and while the broker declines stays to ask again, where that can help, or to see the broker go. `None`: the
/// broker needs the model's files, which are to be fetched.
async fn register_patiently(
    shared: &Arc<Shared>,
    opened: &mut Opened,
    model: &ModelSource,
) -> Result<Option<Registered>, LinkError> {
    loop {
        let told = |progress| {
            tracing::info!(?progress, "registering the function");
            shared.states.send_replace(match progress {
                Progress::Uploading => FunctionState::Uploading,
                Progress::Preparing(stage) => FunctionState::Preparing(stage),
            });
        };
        let config = &shared.config;
        match register::register(opened, &config.function, model, shared.missed.subscribe(), told).await {
            Ok(registered) => return Ok(Some(registered)),
            Err(RegisterError::FilesNeeded) => return Ok(None),
            Err(RegisterError::Link(error)) => return Err(error),
            Err(RegisterError::Refused(refusal)) => {
                tracing::error!(code = refusal.code(), %refusal, "the broker declined the function");
                let may_pass = refusal.is_passing() || (model.files.is_empty() && model.remote.is_none());
                shared.states.send_replace(FunctionState::Rejected(refusal));
                if may_pass {
                    sleep(REGISTER_AGAIN_AFTER).await;
                } else {
                    return Err(match opened.frames.next(&opened.socket).await {
                        Ok(_) => LinkError::Unexpected("a message to a function that it declined"),
                        Err(error) => error,
                    });
                }
            }
        }
    }
}

/// Between half of `pause` and all of it, so that a node's sidecars do not all come at once.
fn jittered(pause: Duration) -> Duration {
    let random = RandomState::new().hash_one(pause) % 1024;
    let share = u32::try_from(random).unwrap_or(0);
    pause / 2 + pause / 2 * share / 1024
}
