//! Passing file descriptors over a Unix stream socket.
//!
//! One call is one system call: neither waits on its own, so that an asynchronous runtime can drive both through a
//! non-blocking socket. What the descriptors are for is the caller's business.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use faaswap_protocol::limits::MODEL_FILES_MAX;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

/// Most file descriptors in one message.
pub const FDS_PER_MESSAGE_MAX: usize = 32;

const _: () = assert!(FDS_PER_MESSAGE_MAX >= MODEL_FILES_MAX, "the files of a model must fit in one message");
const _: () = assert!(FDS_PER_MESSAGE_MAX <= 253, "Linux passes at most 253 at once");

const SPACE: usize = rustix::cmsg_space!(ScmRights(FDS_PER_MESSAGE_MAX));

/// Sends bytes, at least one, and file descriptors with the first of them. Says how many bytes went; where that is
/// fewer than all, the descriptors have gone and the rest goes without them.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let refuse = |what: &'static str| io::Error::new(io::ErrorKind::InvalidInput, what);
    if fds.len() > FDS_PER_MESSAGE_MAX {
        return Err(refuse("more file descriptors than one message carries"));
    }
    if bytes.is_empty() {
        return Err(refuse("file descriptors travel with at least one byte"));
    }
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(refuse("more file descriptors than one message carries"));
    }
    let iov = [IoSlice::new(bytes)];
    let sent = rustix::io::retry_on_intr(|| rustix::net::sendmsg(&socket, &iov, &mut control, SendFlags::NOSIGNAL))?;
    Ok(sent)
}

/// Receives bytes, and the file descriptors that came with them into `fds`, which never grows past `max_fds`. 0 is the
/// end of the stream. Where a peer sends more descriptors all of that message's are closed, and it is an error of kind
/// `InvalidData`: bytes may be lost then, so the connection is of no more use.
pub fn recv(socket: impl AsFd, buf: &mut [u8], fds: &mut Vec<OwnedFd>, max_fds: usize) -> io::Result<usize> {
    let room = max_fds.saturating_sub(fds.len());
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(&socket, &mut [IoSliceMut::new(buf)], &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    let mut came = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            came.extend(rights);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) || came.len() > room {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("the peer sent more than {room} file descriptors"),
        ));
    }
    fds.append(&mut came);
    Ok(received.bytes)
}
