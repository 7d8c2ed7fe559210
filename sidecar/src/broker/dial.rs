//! Opens a connection to the broker: finds an address that answers, says hello, maps the slab.

use std::{path::PathBuf, sync::Arc};

use faaswap_protocol::{Bytes, FromBroker, ToBroker, Transport, limits::WIRE_VERSION, wire};
use faaswap_slab::Slab;
use tokio::{
    net::{TcpStream, UnixStream},
    time::timeout,
};

use super::socket::{Frames, LinkError, Socket};
use crate::limits::{DIAL_WITHIN, WELCOME_WITHIN};

/// Where a broker may listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A Unix socket on this machine: tensors travel in shared memory.
    Socket(PathBuf),
    /// `host:port`: tensors travel in the frames.
    Address(String),
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Socket(path) => write!(f, "{}", path.display()),
            Self::Address(address) => f.write_str(address),
        }
    }
}

/// Wanted sizes of the two halves of the slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlabSizes {
    /// For inputs.
    pub request: Bytes,
    /// For outputs.
    pub response: Bytes,
}

impl Default for SlabSizes {
    /// Memory is taken only where tensors have been, so much room costs little.
    fn default() -> Self {
        Self { request: Bytes::mib(64), response: Bytes::mib(64) }
    }
}

/// An open connection that has not registered anything yet.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) socket: Arc<Socket>,
    pub(super) frames: Frames,
    pub(super) slab: Option<Slab>,
}

/// Tries the targets in order; the first that welcomes us is taken, else the last error is returned.
pub(super) async fn open(targets: &[Target], sizes: SlabSizes, agent: &str) -> Result<(Opened, Target), LinkError> {
    let mut last = LinkError::Closed;
    for target in targets {
        match open_one(target, sizes, agent).await {
            Ok(opened) => return Ok((opened, target.clone())),
            Err(error) => {
                tracing::debug!(%target, %error, "no broker here");
                last = error;
            }
        }
    }
    Err(last)
}

async fn open_one(target: &Target, sizes: SlabSizes, agent: &str) -> Result<Opened, LinkError> {
    let silent = |_| LinkError::Silent(DIAL_WITHIN, "it was dialled");
    let (socket, transport) = match target {
        Target::Socket(path) => {
            let stream = timeout(DIAL_WITHIN, UnixStream::connect(path)).await.map_err(silent)??;
            (Socket::Unix(stream), Transport::Slab { request: sizes.request, response: sizes.response })
        }
        Target::Address(address) => {
            let stream = timeout(DIAL_WITHIN, TcpStream::connect(address)).await.map_err(silent)??;
            stream.set_nodelay(true)?;
            (Socket::Tcp(stream), Transport::Inline)
        }
    };
    timeout(WELCOME_WITHIN, shake_hands(socket, transport, agent))
        .await
        .map_err(|_| LinkError::Silent(WELCOME_WITHIN, "it was greeted"))?
}

async fn shake_hands(socket: Socket, transport: Transport, agent: &str) -> Result<Opened, LinkError> {
    let hello = ToBroker::Hello { version: WIRE_VERSION, transport, agent: agent.to_owned() };
    let mut frame = Vec::new();
    wire::encode(&hello, 0, &mut frame)?;
    socket.write_all(&frame).await?;
    let mut frames = Frames::new();
    let mut fds = Vec::new();
    let welcome = frames.next_with_fds(&socket, &mut fds, 1).await?;
    let layout = match welcome {
        FromBroker::Welcome { version: WIRE_VERSION, slab } => slab,
        FromBroker::Welcome { .. } => return Err(LinkError::Unexpected("it speaks another version of the protocol")),
        FromBroker::Closing { refusal } => return Err(LinkError::Closing(refusal)),
        FromBroker::Draining => return Err(LinkError::Draining),
        FromBroker::ModelNeeded { .. }
        | FromBroker::Uploaded { .. }
        | FromBroker::Preparing { .. }
        | FromBroker::Registered { .. }
        | FromBroker::CallRefused { .. }
        | FromBroker::Answer { .. }
        | FromBroker::Refused { .. }
        | FromBroker::Pong { .. } => return Err(LinkError::Unexpected("no welcome after hello")),
    };
    let slab = match (transport, layout) {
        (Transport::Slab { .. }, Some(layout)) => {
            let fd = fds.pop().ok_or(LinkError::Unexpected("a slab without its file descriptor"))?;
            Some(Slab::open(fd, layout)?)
        }
        (Transport::Inline, None) => None,
        (Transport::Slab { .. }, None) | (Transport::Inline, Some(_)) => {
            return Err(LinkError::Unexpected("a welcome for the other transport"));
        }
    };
    Ok(Opened { socket: Arc::new(socket), frames, slab })
}
