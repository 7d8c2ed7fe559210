//! What the sidecar's tests share: a small broker, a sidecar in this process, and clients.

#![allow(dead_code, unreachable_pub, reason = "each test program uses its part")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

pub mod broker;
pub mod clients;
pub mod files;
pub mod fronts;
#[path = "../../../tests/src/ports.rs"]
pub mod ports;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use faaswap_protocol::{Batching, Bytes, FunctionSpec, Late, ModelDigest, Priority, Slo, Tf32};
use faaswap_sidecar::{
    broker::{Broker, BrokerConfig, SlabSizes, Target},
    infer::Function,
    model::ModelSource,
    server::{self, Served},
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// The name of the function and its model in all tests.
pub const NAME: &str = "doubler";
/// The longest body that the test sidecars take.
pub const BODY_MAX: usize = 1 << 20;

pub fn digest() -> ModelDigest {
    ModelDigest([7; 32])
}

pub fn spec(deadline: Duration) -> FunctionSpec {
    FunctionSpec {
        name: NAME.parse().unwrap(),
        model: digest(),
        slo: Slo { deadline, percentile: 9800 },
        priority: Priority::Latency,
        late: Late::Serve,
        batching: Batching::default(),
        tf32: Tf32::default(),
    }
}

pub fn config(target: Target, deadline: Duration) -> BrokerConfig {
    let slab = SlabSizes { request: Bytes::mib(2), response: Bytes::mib(2) };
    let model = ModelSource::known(digest());
    BrokerConfig { slab, ..BrokerConfig::new(target, spec(deadline), model) }
}

/// A sidecar in this process.
pub struct Sidecar {
    pub address: SocketAddr,
    pub function: Arc<Function>,
    pub stop: CancellationToken,
    pub serving: tokio::task::JoinHandle<()>,
}

impl Sidecar {
    /// A sidecar whose function is not attached to any broker.
    pub async fn bare(upstream: Option<SocketAddr>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let function = Function::new(NAME.to_owned(), 8 * BODY_MAX);
        let upstream = upstream.map(|address| address.to_string().parse().unwrap());
        let served = Served {
            function: Arc::clone(&function),
            body_bytes_max: BODY_MAX,
            upstream,
            vision: None,
            prefetch: true,
        };
        let stop = CancellationToken::new();
        let serving = tokio::spawn(server::serve(listener, served, stop.clone(), Duration::ZERO));
        Self { address, function, stop, serving }
    }

    /// A sidecar that connects to a broker.
    pub async fn start(config: BrokerConfig) -> Self {
        let sidecar = Self::bare(None).await;
        sidecar.function.attach(Broker::start(config));
        sidecar
    }

    /// A sidecar whose function is ready.
    pub async fn ready(config: BrokerConfig) -> Self {
        let sidecar = Self::start(config).await;
        sidecar.function.broker().unwrap().until_ready().await.unwrap();
        sidecar
    }
}
