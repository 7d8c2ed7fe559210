//! A broker process of one's own, and a client that speaks the protocol frame by frame, so that it can also misspeak.

#![allow(dead_code, unreachable_pub, reason = "each test program uses a part of it")]
#![allow(
    clippy::float_cmp,
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    clippy::wildcard_enum_match_arm,
    reason = "tests"
)]

pub mod broker;
pub mod bursts;
pub mod client;
pub mod model;

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

pub use broker::Broker;
pub use client::{Answer, Client};
use faaswap_protocol::{Batching, FunctionSpec, Late, ModelDigest, Priority, Slo, Tf32};
use sha2::{Digest, Sha256};

/// Longest wait for anything that must come.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub fn wait_for(what: &str, mut happened: impl FnMut() -> bool) {
    let since = Instant::now();
    while !happened() {
        assert!(since.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn digest(file: &Path) -> ModelDigest {
    ModelDigest(Sha256::digest(fs::read(file).unwrap()).into())
}

pub fn spec(name: &str, model: ModelDigest) -> FunctionSpec {
    FunctionSpec {
        name: name.parse().unwrap(),
        model,
        slo: Slo { deadline: Duration::from_secs(30), percentile: 9800 },
        priority: Priority::Latency,
        late: Late::Serve,
        batching: Batching::default(),
        tf32: Tf32::default(),
    }
}
