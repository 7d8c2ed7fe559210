//! The kubelet's device plugin: counts this node's slots, and hands pods the way to the broker when they are given one.
//!
//! A process of its own beside the broker, so that a kubelet that restarts and a broker that restarts do not meet. A
//! slot is a place on the node, not a part of a GPU: which GPU runs what is the broker's to say, and no pod can name one.
//! With it no pod needs a hostPath, so functions may live where Pod Security is `restricted`.

mod health;
mod kubelet;
mod service;

use std::{io, net::SocketAddr, path::PathBuf, time::Duration};

use clap::Args;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// The messages of the kubelet's API, generated.
#[allow(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::wildcard_enum_match_arm,
    unused_qualifications
)]
pub mod v1beta1 {
    tonic::include_proto!("v1beta1");
}

/// Where the kubelet listens, in its folder.
pub const KUBELET_SOCKET: &str = "kubelet.sock";
/// Where we do.
pub const OUR_SOCKET: &str = "faaswap.sock";
/// What pods ask for.
pub const RESOURCE: &str = "faaswap.dev/slot";
/// The version of the API.
pub const VERSION: &str = "v1beta1";
/// Most slots of a node.
const SLOTS_MAX: u32 = 4096;
/// How much of the node's memory stands behind a slot where nothing is set: weights wait there.
const BYTES_PER_SLOT: u64 = 128 << 20;
/// How often the sockets are looked at: a kubelet that restarts removes ours.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Pause after a failure.
const AGAIN_AFTER: Duration = Duration::from_secs(2);

/// What the device plugin needs to know.
#[derive(Args, Clone, Debug)]
pub struct PluginSettings {
    /// The kubelet's folder for device plugins.
    #[arg(long, env = "FAASWAP_PLUGIN_DIR", default_value = "/var/lib/kubelet/device-plugins")]
    pub plugin_dir: PathBuf,
    /// The folder with the broker's socket, on the node and in pods.
    #[arg(long, env = "FAASWAP_SOCKET_DIR", default_value = "/run/faaswap")]
    pub socket_dir: PathBuf,
    /// A folder of the node that pods find at /models.
    #[arg(long, env = "FAASWAP_MODELS_DIR")]
    pub models_dir: Option<PathBuf>,
    /// Slots of this node; without it, one per 128 MiB of memory.
    #[arg(long, env = "FAASWAP_SLOTS", value_parser = clap::value_parser!(u32).range(1..=i64::from(SLOTS_MAX)))]
    pub slots: Option<u32>,
    /// The broker's admin port: slots are healthy while it is ready and has a device.
    #[arg(long, env = "FAASWAP_ADMIN", default_value = "127.0.0.1:9471")]
    pub admin: SocketAddr,
}

/// Why the plugin cannot serve now.
#[derive(Debug, thiserror::Error)]
pub enum PluginError {
    /// Our socket cannot be opened, or the kubelet's reached.
    #[error("{path}: {error}")]
    Socket {
        /// Which.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The kubelet declines.
    #[error("the kubelet declines: {0}")]
    Declined(Box<tonic::Status>),
    /// The connection to it does not work.
    #[error("the kubelet cannot be spoken to: {0}")]
    Connection(#[from] hyper::Error),
    /// It does not answer.
    #[error("the kubelet did not answer in time")]
    Silent,
}

impl PluginSettings {
    fn slot_count(&self) -> u32 {
        let memory = rustix::system::sysinfo();
        let bytes = u64::from(memory.mem_unit) * memory.totalram;
        let by_memory = u32::try_from(bytes / BYTES_PER_SLOT).unwrap_or(SLOTS_MAX);
        self.slots.unwrap_or(by_memory).clamp(1, SLOTS_MAX)
    }
}

/// Serves the kubelet until `stop` is cancelled; registers again whenever the kubelet starts again.
pub async fn run(settings: PluginSettings, stop: CancellationToken) {
    let (healthy, watched) = watch::channel(false);
    let slots = settings.slot_count();
    tracing::info!(slots, resource = RESOURCE, "device plugin starts");
    let watching = tokio::spawn(health::watch(settings.admin, healthy));
    let serving = async {
        loop {
            let pause = match kubelet::serve_one(&settings, slots, &watched).await {
                Ok(()) => Duration::ZERO,
                Err(error) => {
                    tracing::warn!(%error, "not registered with the kubelet");
                    AGAIN_AFTER
                }
            };
            tokio::time::sleep(pause).await;
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = serving => {}
    }
    watching.abort();
    // The kubelet then knows at once that there are no slots.
    let _absent = tokio::fs::remove_file(settings.plugin_dir.join(OUR_SOCKET)).await;
}
