//! Bursts of requests that queue up, so that some share runs.

use std::{collections::BTreeMap, path::Path};

use faaswap_protocol::{Batching, FunctionId, FunctionSpec, Refusal, RequestId};

use super::{Answer, Broker, Client, digest, spec};

/// A slow link, so that requests queue up behind the first one, which waits for its weights.
pub const ONE_LANE: &str = "[[device]]\nmemory = \"8MiB\"\nchunk = \"64KiB\"\nlink_mib_per_s = 2";
pub const ROUNDS: usize = 12;
/// So many are sent where none had to wait for another one until then: a busy machine may send slower than it runs.
pub const ROUNDS_MAX: usize = 500;

pub fn register(client: &mut Client, name: &str, file: &Path, batching: Batching) -> FunctionId {
    let spec = FunctionSpec { batching, ..spec(name, digest(file)) };
    client.register(&spec, &[("model.onnx", file)]).unwrap().0
}

/// Rounds until such a metric has grown.
pub fn rounds<'a>(broker: &'a Broker, metric: &'a str) -> impl Iterator<Item = usize> + 'a {
    let before = broker.metric(metric);
    (0..ROUNDS_MAX).take_while(move |round| *round < ROUNDS || broker.metric(metric) == before)
}

/// The answers to so many requests, whichever comes first.
pub fn answers(client: &mut Client, count: usize) -> BTreeMap<RequestId, Result<Answer, Refusal>> {
    let answers: BTreeMap<_, _> = (0..count).map(|_| client.answer()).collect();
    assert_eq!(answers.len(), count, "each is answered once");
    answers
}

pub fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
