//! What other threads tell the loop: runs and swaps that ended.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use faaswap_device::{DeviceError, SwapReport};
use faaswap_protocol::Span;
use faaswap_scheduler::{DeviceId, ModelId, RequestKey, Verdict};
use tokio::sync::Notify;

/// One thing that ended elsewhere.
#[derive(Debug)]
pub(crate) enum Ended {
    /// A run, and with it its only request.
    Run {
        request: RequestKey,
        took: Duration,
        outcome: Outcome,
    },
    /// A request of a run that has others and goes on.
    Answered {
        request: RequestKey,
        outcome: Outcome,
    },
    /// A run of several requests, by the one that it was started for; zero where they had to be run one by one.
    RunOver {
        request: RequestKey,
        took: Duration,
        /// What runs of so many give, where that was found out by this one.
        verdict: Option<Verdict>,
    },
    NearlyRead {
        model: ModelId,
    },
    SwapIn {
        model: ModelId,
        device: DeviceId,
        result: Result<SwapReport, DeviceError>,
    },
    SwapOut {
        model: ModelId,
        device: DeviceId,
        result: Result<(), DeviceError>,
    },
}

/// How a run ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// Answered; the spans are taken until the peer releases them.
    Answered { outputs: Vec<Span> },
    /// Refused, for the reason with this code.
    Refused(&'static str),
    /// It had been refused before it ended.
    GivenUp,
}

/// Holds at most one entry per request of a run, per lane, per queued swap and per model, which is what limits it.
#[derive(Debug, Default)]
pub(crate) struct Mailbox {
    ended: Mutex<VecDeque<Ended>>,
    wake: Notify,
}

impl Mailbox {
    pub(crate) fn post(&self, ended: Ended) {
        self.put(ended);
        self.ring();
    }

    /// Posts without waking the loop, which takes time that somebody may be waiting for: [`Mailbox::ring`] must follow.
    pub(crate) fn put(&self, ended: Ended) {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner).push_back(ended);
    }

    /// Wakes the loop for what was put.
    pub(crate) fn ring(&self) {
        self.wake.notify_one();
    }

    pub(crate) fn take(&self) -> Option<Ended> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    /// Waits until something was posted. For one waiter.
    pub(crate) async fn posted(&self) {
        self.wake.notified().await;
    }
}
