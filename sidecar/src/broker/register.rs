//! Makes the function known on a fresh connection, uploading its model where the broker does not have it.
//!
//! Nobody else uses the connection meanwhile. Whether and when to try again is left to `mod`.

use std::{fs::File, io::Read, os::fd::AsFd, time::Duration};

use faaswap_protocol::{
    Bytes, CallId, FromBroker, FunctionId, FunctionSpec, Refusal, Signature, ToBroker, limits::UPLOAD_PART_BYTES_MAX,
    wire,
};
use tokio::{sync::watch, time::timeout};

use super::{
    dial::Opened,
    socket::{LinkError, Socket},
};
use crate::{
    limits::{REGISTER_SILENCE_MAX, UPLOAD_ANSWER_WITHIN, UPLOADS_MAX},
    model::{LocalFile, ModelSource},
};

/// What the broker says of a function that can be called.
#[derive(Debug)]
pub(super) struct Registered {
    pub(super) function: FunctionId,
    pub(super) signature: Signature,
    pub(super) weights: Bytes,
}

/// How far a registration is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    Uploading,
    Preparing(String),
}

/// Why a function could not be registered.
#[derive(Debug)]
pub(super) enum RegisterError {
    /// The connection is over.
    Link(LinkError),
    /// The broker declined; the connection stays.
    Refused(Refusal),
    /// The model's files are needed, and still to be fetched.
    FilesNeeded,
}

impl<E: Into<LinkError>> From<E> for RegisterError {
    fn from(error: E) -> Self {
        Self::Link(error.into())
    }
}

/// Registers the function; `progress` hears how it goes. Once a request is `missed`, the broker is told to hurry.
pub(super) async fn register(
    opened: &mut Opened,
    spec: &FunctionSpec,
    model: &ModelSource,
    mut missed: watch::Receiver<bool>,
    mut progress: impl FnMut(Progress),
) -> Result<Registered, RegisterError> {
    let mut uploads = 0;
    let mut call = 0;
    loop {
        call += 1;
        send(opened, &ToBroker::Register { call: CallId(call), function: spec.clone() }).await?;
        if let Some(registered) = outcome(opened, CallId(call), &mut missed, &mut progress).await? {
            return Ok(registered);
        }
        if uploads == UPLOADS_MAX {
            return Err(LinkError::Unexpected("it wants a model that it has got").into());
        }
        if model.files.is_empty() && model.remote.is_some() {
            return Err(RegisterError::FilesNeeded);
        }
        uploads += 1;
        call += 1;
        progress(Progress::Uploading);
        upload(opened, CallId(call), model).await?;
    }
}

/// Waits for the end of a registration; `None`: the model is needed.
#[expect(clippy::wildcard_enum_match_arm, reason = "`unexpected` names every message")]
async fn outcome(
    opened: &mut Opened,
    this: CallId,
    missed: &mut watch::Receiver<bool>,
    progress: &mut impl FnMut(Progress),
) -> Result<Option<Registered>, RegisterError> {
    let mut told = false;
    loop {
        let message = tokio::select! {
            biased;
            message = next(opened, REGISTER_SILENCE_MAX, "a function was registered") => message?,
            true = is_set(missed), if !told => {
                told = true;
                send(opened, &ToBroker::Hurry { call: this }).await?;
                continue;
            }
        };
        match message {
            FromBroker::Registered { call, function, signature, weights } if call == this => {
                return Ok(Some(Registered { function, signature, weights }));
            }
            FromBroker::ModelNeeded { call } if call == this => return Ok(None),
            FromBroker::Preparing { call, stage } if call == this => progress(Progress::Preparing(stage)),
            FromBroker::CallRefused { call, refusal } if call == this => return Err(RegisterError::Refused(refusal)),
            other => return Err(unexpected(other)),
        }
    }
}

/// Waits until it is; `false`: it never will be.
async fn is_set(flag: &mut watch::Receiver<bool>) -> bool {
    flag.wait_for(|set| *set).await.is_ok()
}

fn unexpected(message: FromBroker) -> RegisterError {
    RegisterError::Link(match message {
        FromBroker::Closing { refusal } => LinkError::Closing(refusal),
        FromBroker::Draining => LinkError::Draining,
        FromBroker::Welcome { .. }
        | FromBroker::ModelNeeded { .. }
        | FromBroker::Uploaded { .. }
        | FromBroker::Preparing { .. }
        | FromBroker::Registered { .. }
        | FromBroker::CallRefused { .. }
        | FromBroker::Answer { .. }
        | FromBroker::Refused { .. }
        | FromBroker::Pong { .. } => LinkError::Unexpected("another message in the middle of a registration"),
    })
}

#[expect(clippy::wildcard_enum_match_arm, reason = "`unexpected` names every message")]
async fn upload(opened: &mut Opened, this: CallId, model: &ModelSource) -> Result<(), RegisterError> {
    let failed = |reason: String| RegisterError::Refused(Refusal::UploadFailed { reason: reason.into() });
    if model.files.is_empty() {
        let reason = "the broker does not have this model, and only its digest is configured here";
        return Err(failed(reason.to_owned()));
    }
    let open = |file: &LocalFile| file.open().map_err(|error| failed(error.to_string()));
    let files = model.files.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    let announce = ToBroker::Upload {
        call: this,
        model: model.digest,
        files: model.files.iter().map(|f| f.file.clone()).collect(),
    };
    let sent = match &*opened.socket {
        Socket::Unix(_) => {
            let mut frame = Vec::new();
            wire::encode(&announce, 0, &mut frame)?;
            let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
            opened.socket.write_all_with_fds(&frame, &fds).await.map_err(LinkError::from)
        }
        Socket::Tcp(_) => match send(opened, &announce).await {
            Ok(()) => send_parts(opened, this, files).await,
            Err(error) => Err(error),
        },
    };
    if let Err(error) = sent {
        // A broker that declines an upload half-way has said why before it stopped reading.
        tracing::warn!(%error, "upload cut short");
    }
    match next(opened, UPLOAD_ANSWER_WITHIN, "a model was uploaded").await? {
        FromBroker::Uploaded { call } if call == this => Ok(()),
        FromBroker::CallRefused { call, refusal } if call == this => Err(RegisterError::Refused(refusal)),
        other => Err(unexpected(other)),
    }
}

/// Sends the files one after the other. A part never spans two files.
async fn send_parts(opened: &Opened, call: CallId, files: Vec<File>) -> Result<(), LinkError> {
    for mut file in files {
        loop {
            let (read, part) = tokio::task::spawn_blocking(move || {
                let mut part = Vec::new();
                let read = file.by_ref().take(u64::from(UPLOAD_PART_BYTES_MAX)).read_to_end(&mut part);
                (read.map(|_| file), part)
            })
            .await
            .map_err(std::io::Error::other)?;
            file = read?;
            if part.is_empty() {
                break;
            }
            let mut frame = Vec::with_capacity(64);
            wire::encode(&ToBroker::UploadPart { call }, u32::try_from(part.len()).unwrap_or(u32::MAX), &mut frame)?;
            opened.socket.write_all(&frame).await?;
            opened.socket.write_all(&part).await?;
        }
    }
    Ok(())
}

async fn send(opened: &Opened, message: &ToBroker) -> Result<(), LinkError> {
    let mut frame = Vec::new();
    wire::encode(message, 0, &mut frame)?;
    Ok(opened.socket.write_all(&frame).await?)
}

async fn next(opened: &mut Opened, within: Duration, doing: &'static str) -> Result<FromBroker, LinkError> {
    let frame = timeout(within, opened.frames.next(&opened.socket)).await;
    frame.map_err(|_| LinkError::Silent(within, doing))?.map(|(message, _)| message)
}
