//! A client of a running broker without HTTP, driven from a plain thread.

use std::{path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use faaswap_protocol::{Batching, DType, FunctionSpec, Late, Priority, Slo, Tf32};
use faaswap_sidecar::{
    broker::{Broker as Client, BrokerConfig, InferAnswer, InferRequest, Known, SlabSizes, Target},
    model::{ModelRef, ModelSource},
};
use tokio::runtime::Runtime;

use crate::{Result, Trouble, node::Broker};

/// Long enough to show that something hangs, not that it is slow.
const PATIENCE: Duration = Duration::from_secs(60);

/// A runtime with the one thread of whoever blocks on it, as in a sidecar.
pub(super) fn runtime() -> Result<Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// Registers a model as a function. Must be called inside the runtime.
pub(super) fn start(broker: &Broker, name: &str, model: &Path) -> Result<Client> {
    start_with(broker, name, model, Batching::default())
}

/// The same, with a say in whether its requests may share runs.
pub(super) fn start_with(broker: &Broker, name: &str, model: &Path, batching: Batching) -> Result<Client> {
    let model = ModelRef::File { graph: model.to_owned(), data: Vec::new() };
    let model = ModelSource::load(&model).map_err(|e| Trouble::new(e.to_string()))?;
    let function = FunctionSpec {
        name: name.parse().map_err(|e| Trouble::new(format!("{name}: {e}")))?,
        model: model.digest,
        slo: Slo { deadline: PATIENCE, percentile: 9800 },
        priority: Priority::Latency,
        late: Late::Serve,
        batching,
        tf32: Tf32::default(),
    };
    let mut config = BrokerConfig::new(Target::Socket(broker.socket()), function, model);
    config.slab = SlabSizes { request: faaswap_protocol::Bytes::mib(32), response: faaswap_protocol::Bytes::mib(32) };
    Ok(Client::start(config))
}

/// Waits until the function can be called.
pub(super) async fn ready(client: &Client) -> Result<Arc<Known>> {
    client.until_ready().await.map_err(|refusal| Trouble::new(format!("the function was refused: {refusal}")))
}

/// A request with one input.
pub(super) fn request(dtype: DType, dims: &[u64], data: Bytes) -> Result<InferRequest> {
    let request = InferRequest::default().input(0, dtype, dims, data).map_err(|e| Trouble::new(e.to_string()))?;
    Ok(request.within(PATIENCE))
}

/// Sends a request and waits for its answer.
pub(super) async fn infer(client: &Client, request: &InferRequest) -> Result<InferAnswer> {
    client.infer(request).await.map_err(|e| Trouble::new(format!("no answer: {e}")))
}
