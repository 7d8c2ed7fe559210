//! A broker connection's bytes: a Unix or TCP socket, frames read from it, frames written to it.
//!
//! Writing is tried at once by the task that has something to say; only what the kernel does not take is queued for the
//! connection's own task. The queue needs no bound of its own: each frame in it belongs to a request in flight, and
//! those are counted. What the messages mean is left to `link` and `register`.

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    os::fd::{BorrowedFd, OwnedFd},
    sync::Mutex,
};

use bytes::{Buf, Bytes, BytesMut};
use faaswap_protocol::{FromBroker, ToBroker, wire};
use tokio::{
    io::Interest,
    net::{TcpStream, UnixStream},
    sync::Notify,
};

use crate::limits::{READ_BYTES, WRITE_PIECES_MAX};

/// Why a connection is over.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The operating system says so.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The broker sent bytes that are no frame.
    #[error("the broker broke the protocol: {0}")]
    Wire(#[from] wire::WireError),
    /// The broker sent a message that has no place here.
    #[error("the broker broke the protocol: {0}")]
    Unexpected(&'static str),
    /// The slab is not what the broker announced.
    #[error("the slab cannot be used: {0}")]
    Slab(#[from] faaswap_slab::SlabError),
    /// The broker closed the connection.
    #[error("the broker closed the connection")]
    Closed,
    /// The broker closed the connection and said why.
    #[error("the broker ended the connection: {0}")]
    Closing(faaswap_protocol::Refusal),
    /// The broker said nothing for too long.
    #[error("the broker was silent for {0:?} while {1}")]
    Silent(std::time::Duration, &'static str),
    /// The broker is shutting down.
    #[error("the broker is shutting down")]
    Draining,
}

/// The two kinds of stream.
#[derive(Debug)]
pub(super) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    fn try_write(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.try_write_vectored(pieces),
            Self::Tcp(stream) => stream.try_write_vectored(pieces),
        }
    }

    fn try_read(&self, buffer: &mut BytesMut) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.try_read_buf(buffer),
            Self::Tcp(stream) => stream.try_read_buf(buffer),
        }
    }

    async fn readable(&self) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.readable().await,
            Self::Tcp(stream) => stream.readable().await,
        }
    }

    async fn writable(&self) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.writable().await,
            Self::Tcp(stream) => stream.writable().await,
        }
    }

    /// Writes all of it. For the opening of a connection, when nobody else writes.
    pub(super) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            self.writable().await?;
            match self.try_write(&[IoSlice::new(bytes)]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => bytes = &bytes[written..],
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Writes all of it and passes file descriptors along. Unix sockets only.
    pub(super) async fn write_all_with_fds(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let Self::Unix(stream) = self else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        let sent = stream.async_io(Interest::WRITABLE, || faaswap_slab::fds::send(stream, bytes, fds)).await?;
        self.write_all(&bytes[sent..]).await
    }
}

/// Reads frames. Safe to cancel: what has arrived stays in the buffer.
#[derive(Debug)]
pub(super) struct Frames {
    buffer: BytesMut,
}

impl Frames {
    pub(super) fn new() -> Self {
        Self { buffer: BytesMut::with_capacity(READ_BYTES) }
    }

    /// The next message and its payload.
    pub(super) async fn next(&mut self, socket: &Socket) -> Result<(FromBroker, Bytes), LinkError> {
        loop {
            let missing = match self.take()? {
                Ok(frame) => return Ok(frame),
                Err(missing) => missing,
            };
            self.buffer.reserve(missing.max(READ_BYTES));
            match socket.try_read(&mut self.buffer) {
                Ok(0) => return Err(LinkError::Closed),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => socket.readable().await?,
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// The next message of a Unix connection, with the file descriptors that came along.
    pub(super) async fn next_with_fds(
        &mut self,
        socket: &Socket,
        fds: &mut Vec<OwnedFd>,
        fds_max: usize,
    ) -> Result<FromBroker, LinkError> {
        let Socket::Unix(stream) = socket else {
            return self.next(socket).await.map(|(message, _)| message);
        };
        loop {
            if let Ok((message, _)) = self.take()? {
                return Ok(message);
            }
            let mut chunk = [0; 512];
            let read = stream
                .async_io(Interest::READABLE, || faaswap_slab::fds::recv(stream, &mut chunk, fds, fds_max))
                .await?;
            match chunk.get(..read) {
                None | Some([]) => return Err(LinkError::Closed),
                Some(bytes) => self.buffer.extend_from_slice(bytes),
            }
        }
    }

    /// A whole frame from the buffer, or the number of bytes that it lacks.
    fn take(&mut self) -> Result<Result<(FromBroker, Bytes), usize>, LinkError> {
        let Some(&head) = self.buffer.first_chunk::<{ wire::HEAD_LEN }>() else {
            return Ok(Err(wire::HEAD_LEN - self.buffer.len()));
        };
        let head = wire::Head::decode(head)?;
        let lens = (usize::try_from(head.message_len), usize::try_from(head.payload_len));
        let (Ok(message_len), Ok(payload_len)) = lens else {
            return Err(LinkError::Unexpected("a frame too long for this machine"));
        };
        let len = wire::HEAD_LEN + message_len + payload_len;
        if self.buffer.len() < len {
            return Ok(Err(len - self.buffer.len()));
        }
        let message = wire::decode(&self.buffer[wire::HEAD_LEN..wire::HEAD_LEN + message_len])?;
        self.buffer.advance(wire::HEAD_LEN + message_len);
        Ok(Ok((message, self.buffer.split_to(payload_len).freeze())))
    }
}

/// The writing half of an open connection.
#[derive(Debug)]
pub(super) struct Writer {
    socket: std::sync::Arc<Socket>,
    queue: Mutex<VecDeque<Bytes>>,
    queued: Notify,
}

impl Writer {
    pub(super) fn new(socket: std::sync::Arc<Socket>) -> Self {
        Self { socket, queue: Mutex::default(), queued: Notify::new() }
    }

    /// Sends a message, or queues it when the kernel's buffer is full. A broken socket is found by the reader.
    pub(super) fn send(&self, message: &ToBroker, payload: &[Bytes]) -> Result<(), wire::WireError> {
        let payload_len = payload.iter().map(Bytes::len).sum::<usize>();
        let payload_len = u32::try_from(payload_len).unwrap_or(u32::MAX);
        let mut frame = Vec::with_capacity(256);
        wire::encode(message, payload_len, &mut frame)?;
        let mut queue = self.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let idle = queue.is_empty();
        queue.push_back(frame.into());
        queue.extend(payload.iter().filter(|piece| !piece.is_empty()).cloned());
        if idle && write_some(&self.socket, &mut queue).is_ok() && !queue.is_empty() {
            self.queued.notify_one();
        }
        Ok(())
    }

    /// Writes what was queued, for as long as the connection lives.
    pub(super) async fn flush_forever(&self) -> io::Error {
        loop {
            self.queued.notified().await;
            loop {
                if let Err(e) = self.socket.writable().await {
                    return e;
                }
                let mut queue = self.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                if let Err(e) = write_some(&self.socket, &mut queue) {
                    return e;
                }
                if queue.is_empty() {
                    break;
                }
            }
        }
    }
}

/// Writes until the queue is empty or the kernel takes no more. After an error the queue is dropped: nobody will read it.
fn write_some(socket: &Socket, queue: &mut VecDeque<Bytes>) -> io::Result<()> {
    while !queue.is_empty() {
        let mut pieces = [IoSlice::new(&[]); WRITE_PIECES_MAX];
        let count = queue.iter().zip(&mut pieces).map(|(bytes, slot)| *slot = IoSlice::new(bytes)).count();
        match socket.try_write(&pieces[..count]) {
            Ok(written) => advance(queue, written),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(e) => {
                queue.clear();
                return Err(e);
            }
        }
    }
    Ok(())
}

fn advance(queue: &mut VecDeque<Bytes>, mut written: usize) {
    while let Some(first) = queue.front_mut() {
        if first.len() > written {
            first.advance(written);
            return;
        }
        written -= first.len();
        queue.pop_front();
    }
}
