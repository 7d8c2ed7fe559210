//! Sockets between a broker and its workers: whole messages, descriptors with them, in order.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use faaswap_slab::fds::{self, FDS_PER_MESSAGE_MAX};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
};
use serde::{Serialize, de::DeserializeOwned};

/// Longest message.
pub(crate) const MESSAGE_BYTES_MAX: usize = 128 << 10;
/// How long the other end may take to make room for a message. Neither end waits for anything between two messages.
const SEND_WITHIN: Duration = Duration::from_secs(2);

/// One end of a connection.
#[derive(Debug)]
pub(crate) struct Wire(OwnedFd);

/// Where messages are received: one at a time.
#[derive(Debug)]
pub(crate) struct Buffer(Vec<u8>);

impl Default for Buffer {
    fn default() -> Self {
        Self(vec![0; MESSAGE_BYTES_MAX])
    }
}

impl Wire {
    /// Both ends of a new connection.
    pub(crate) fn pair() -> io::Result<(Self, OwnedFd)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok((Self(ours), theirs))
    }

    /// The end of a connection that somebody else has made.
    pub(crate) fn of(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Sends a message. Where the other end does not take it in time it is no more of use.
    pub(crate) fn send(&self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = postcard::to_allocvec(message).map_err(io::Error::other)?;
        if bytes.len() > MESSAGE_BYTES_MAX {
            return Err(io::Error::other(format!("a message of {} bytes is too long", bytes.len())));
        }
        let until = Instant::now() + SEND_WITHIN;
        loop {
            match fds::send(&self.0, &bytes, fds) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                    self.wait(PollFlags::OUT, Some(left))?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The next message; `None` at the end of the connection. Looks for it for a while before it sleeps.
    pub(crate) fn receive<T: DeserializeOwned>(
        &self,
        buffer: &mut Buffer,
        fds: &mut Vec<OwnedFd>,
        looks: Duration,
    ) -> io::Result<Option<T>> {
        let mut looks_until = (!looks.is_zero()).then(|| Instant::now() + looks);
        loop {
            match fds::recv(&self.0, &mut buffer.0, fds, FDS_PER_MESSAGE_MAX) {
                Ok(0) => return Ok(None),
                Ok(len) => return postcard::from_bytes(&buffer.0[..len]).map(Some).map_err(io::Error::other),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if looks_until.is_some_and(|until| Instant::now() < until) {
                        std::hint::spin_loop();
                        continue;
                    }
                    looks_until = None;
                    self.wait(PollFlags::IN, None)?;
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether a message is there within this time.
    pub(crate) fn is_readable_within(&self, most: Duration) -> io::Result<bool> {
        self.wait(PollFlags::IN, Some(most))
    }

    fn wait(&self, what: PollFlags, most: Option<Duration>) -> io::Result<bool> {
        let most = most.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
        let mut polled = [PollFd::from_borrowed_fd(self.0.as_fd(), what)];
        let ready = rustix::io::retry_on_intr(|| poll(&mut polled, most.as_ref()))?;
        Ok(ready > 0)
    }

    /// Ends the connection for both ends.
    pub(crate) fn shut_down(&self) {
        // Fails only where the other end was faster.
        let _ = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn messages_come_whole_with_their_descriptors_until_the_end() {
        let (ours, theirs) = Wire::pair().unwrap();
        let theirs = Wire::of(theirs);
        ours.send(&(7_u32, "one"), &[]).unwrap();
        ours.send(&(8_u32, "two"), &[io::stdin().as_fd(), io::stdout().as_fd()]).unwrap();
        let (mut buffer, mut fds) = (Buffer::default(), Vec::new());
        let mut next = |fds: &mut Vec<OwnedFd>| {
            theirs.receive::<(u32, String)>(&mut buffer, fds, Duration::from_micros(50)).unwrap()
        };
        assert_eq!((next(&mut fds), fds.len()), (Some((7, "one".to_owned())), 0));
        assert_eq!((next(&mut fds), fds.len()), (Some((8, "two".to_owned())), 2));
        ours.shut_down();
        assert_eq!(next(&mut Vec::new()), None);
        assert!(theirs.send(&1_u8, &[]).is_err());
    }

    #[test]
    fn what_nobody_takes_is_given_up_and_what_is_too_long_is_not_sent() {
        let (ours, _theirs) = Wire::pair().unwrap();
        assert!(ours.send(&vec![1_u8; MESSAGE_BYTES_MAX], &[]).is_err());
        let full = (0..10_000).find_map(|_| ours.send(&vec![1_u8; MESSAGE_BYTES_MAX / 2], &[]).err());
        assert_eq!(full.map(|error| error.kind()), Some(io::ErrorKind::TimedOut));
    }
}
