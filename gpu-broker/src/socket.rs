//! A connection's socket: one system call per read or write, and the outbox of what the peer has not taken yet.
//!
//! Any thread may send: a frame goes straight to the kernel where nothing waits before it, so an answer leaves on the
//! thread that made it. What the kernel does not take waits in the outbox, which the connection's task empties.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use bytes::{Buf, Bytes};
use faaswap_protocol::{
    FromBroker,
    limits::{MODEL_FILES_MAX, PAYLOAD_BYTES_MAX},
    wire,
};
use faaswap_slab::fds;
use rustix::net::SendFlags;
use tokio::{
    io::Interest,
    net::{TcpStream, UnixStream},
    sync::Notify,
};

use crate::limits::OUTBOX_BYTES_MAX;

/// Either kind of stream.
#[derive(Debug)]
pub(crate) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }

    async fn ready(&self, interest: Interest) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.ready(interest).await.map(drop),
            Self::Tcp(stream) => stream.ready(interest).await.map(drop),
        }
    }

    fn try_io<T>(&self, interest: Interest, io: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        match self {
            Self::Unix(stream) => stream.try_io(interest, io),
            Self::Tcp(stream) => stream.try_io(interest, io),
        }
    }

    /// Waits until something can be read.
    pub(crate) async fn readable(&self) -> io::Result<()> {
        self.ready(Interest::READABLE).await
    }

    /// Bytes that came, with the descriptors that came with them; 0 at the end of the stream.
    pub(crate) fn try_read(&self, into: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
        self.try_io(Interest::READABLE, || match self {
            Self::Unix(stream) => fds::recv(stream, into, fds, MODEL_FILES_MAX),
            Self::Tcp(stream) => {
                let flags = rustix::net::RecvFlags::DONTWAIT;
                Ok(rustix::io::retry_on_intr(|| rustix::net::recv(stream, &mut *into, flags))?.0)
            }
        })
    }
}

impl Socket {
    /// Ends the connection for both sides, whoever else still holds it.
    pub(crate) fn shut_down(&self) {
        // Fails only where the peer was faster.
        let _ = rustix::net::shutdown(self.fd(), rustix::net::Shutdown::Both);
    }
}

#[derive(Debug, Default)]
struct Waiting {
    frames: VecDeque<Bytes>,
    bytes: usize,
    /// When the peer last took something, or when something first had to wait.
    moved: Option<Instant>,
    /// Nothing more is sent: the connection is over, or about to be.
    closed: bool,
}

/// What is sent to one peer.
#[derive(Debug)]
pub(crate) struct Outbox {
    socket: Socket,
    waiting: Mutex<Waiting>,
    /// Wakes the connection's task: there is something to write, or to close.
    pub(crate) wake: Notify,
}

impl Outbox {
    pub(crate) fn new(socket: Socket) -> Self {
        Self { socket, waiting: Mutex::default(), wake: Notify::new() }
    }

    pub(crate) fn socket(&self) -> &Socket {
        &self.socket
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a message, or queues what cannot be sent at once. Never blocks. A peer with too much waiting is given up.
    pub(crate) fn send(&self, message: &FromBroker, payload: Vec<u8>) {
        let Some(frame) = encode(message, &payload) else { return };
        let mut waiting = self.waiting();
        if waiting.closed {
            return;
        }
        let mut parts = [Bytes::from(frame), Bytes::from(payload)];
        if waiting.frames.is_empty() && self.write_now(&mut parts).is_err() {
            waiting.closed = true;
        }
        for part in parts.into_iter().filter(|part| !part.is_empty()) {
            waiting.bytes += part.len();
            waiting.frames.push_back(part);
        }
        let most = PAYLOAD_BYTES_MAX as usize + OUTBOX_BYTES_MAX;
        if waiting.bytes > most {
            tracing::warn!(bytes = waiting.bytes, "peer cut off: too much waits for it to be read");
            waiting.closed = true;
        }
        if !waiting.frames.is_empty() || waiting.closed {
            waiting.moved.get_or_insert_with(Instant::now);
            self.wake.notify_one();
        }
    }

    /// Sends a message with a descriptor. Only for the first message of a connection, which always fits.
    pub(crate) fn send_with_fd(&self, message: &FromBroker, fd: &OwnedFd) -> io::Result<()> {
        let frame = encode(message, &[]).ok_or(io::ErrorKind::InvalidData)?;
        let sent = fds::send(self.socket.fd(), &frame, &[fd.as_fd()])?;
        if sent == frame.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    fn write_now(&self, parts: &mut [Bytes]) -> io::Result<()> {
        for part in parts {
            while !part.is_empty() {
                match self.write_some(part) {
                    Ok(written) => part.advance(written),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    fn write_some(&self, bytes: &[u8]) -> io::Result<usize> {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        Ok(rustix::io::retry_on_intr(|| rustix::net::send(self.socket.fd(), bytes, flags))?)
    }

    /// Writes what waits as the peer takes it; returns when nothing waits.
    pub(crate) async fn flush(&self) -> io::Result<()> {
        while self.has_waiting() {
            self.socket.ready(Interest::WRITABLE).await?;
            let step = self.socket.try_io(Interest::WRITABLE, || self.flush_some());
            match step {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }

    fn flush_some(&self) -> io::Result<()> {
        let mut waiting = self.waiting();
        while let Some(part) = waiting.frames.front_mut() {
            let written = self.write_some(part)?;
            part.advance(written);
            let done = part.is_empty();
            if done {
                waiting.frames.pop_front();
            }
            waiting.bytes -= written;
            waiting.moved = Some(Instant::now());
        }
        waiting.moved = None;
        Ok(())
    }

    pub(crate) fn has_waiting(&self) -> bool {
        !self.waiting().frames.is_empty()
    }

    /// Since when the peer has taken nothing of what waits for it.
    pub(crate) fn stalled_since(&self) -> Option<Instant> {
        self.waiting().moved
    }

    /// Sends nothing more, and wakes the connection's task to end.
    pub(crate) fn close(&self) {
        self.waiting().closed = true;
        self.wake.notify_one();
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.waiting().closed
    }
}

fn encode(message: &FromBroker, payload: &[u8]) -> Option<Vec<u8>> {
    let mut frame = Vec::with_capacity(128);
    let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    match wire::encode(message, len, &mut frame) {
        Ok(()) => Some(frame),
        Err(error) => {
            // Sizes are checked where messages are made, so this is a bug; a peer without an answer times out.
            tracing::error!(%error, "a message cannot be encoded");
            None
        }
    }
}
