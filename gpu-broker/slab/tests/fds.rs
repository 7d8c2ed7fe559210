//! Descriptors arrive once, whole, and never more than were asked for.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use faaswap_protocol::{Bytes, SlabLayout, Span};
use faaswap_slab::{
    Slab,
    fds::{self, FDS_PER_MESSAGE_MAX},
};

#[test]
fn a_slab_travels_over_a_socket() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let layout = SlabLayout { request: Bytes::kib(4), response: Bytes::kib(4) };
    let (slab, file) = Slab::create(layout).unwrap();
    assert_eq!(fds::send(&ours, b"welcome", &[file.as_fd()]).unwrap(), 7);
    let (mut buf, mut came) = ([0; 64], Vec::new());
    assert_eq!(fds::recv(&theirs, &mut buf, &mut came, 1).unwrap(), 7);
    assert_eq!(&buf[..7], b"welcome");
    let other = Slab::open(came.pop().unwrap(), layout).unwrap();
    let at = Span { offset: 64, len: 2 };
    other.request_region(at).unwrap().write(0, b"ok").unwrap();
    let mut read = [0; 2];
    slab.request_region(at).unwrap().read(0, &mut read).unwrap();
    assert_eq!(&read, b"ok");
}

#[test]
fn descriptors_keep_their_order_and_are_closed_on_exec() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let pipes: Vec<_> = (0..3).map(|_| rustix::pipe::pipe().unwrap()).collect();
    let ends: Vec<BorrowedFd<'_>> = pipes.iter().map(|(_, write)| write.as_fd()).collect();
    fds::send(&ours, b"x", &ends).unwrap();
    let mut came = Vec::new();
    fds::recv(&theirs, &mut [0; 8], &mut came, 3).unwrap();
    for (i, ((read, _), write)) in (0_u8..).zip(pipes.into_iter().zip(came)) {
        assert!(rustix::io::fcntl_getfd(&write).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
        File::from(write).write_all(&[i]).unwrap();
        let mut byte = [9];
        File::from(read).read_exact(&mut byte).unwrap();
        assert_eq!(byte, [i]);
    }
}

/// Sends `count` write ends of one pipe, keeps none, and gives the read end back.
fn send_copies(socket: &UnixStream, count: usize) -> File {
    let (read, write) = rustix::pipe::pipe().unwrap();
    let ends = vec![write.as_fd(); count];
    fds::send(socket, b"x", &ends).unwrap();
    File::from(read)
}

#[test]
fn more_descriptors_than_wanted_are_all_closed_and_an_error() {
    for (wanted, sent) in [(0, 1), (1, 2), (1, FDS_PER_MESSAGE_MAX), (31, 32)] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut pipe = send_copies(&ours, sent);
        let mut came: Vec<OwnedFd> = Vec::new();
        let refused = fds::recv(&theirs, &mut [0; 8], &mut came, wanted).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidData, "{wanted} wanted, {sent} sent");
        assert!(came.is_empty());
        assert_eq!(pipe.read(&mut [0]).unwrap(), 0, "the end of the pipe shows that no copy is open");
    }
}

#[test]
fn more_descriptors_than_a_message_carries_are_cut_off_and_an_error() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (read, write) = rustix::pipe::pipe().unwrap();
    let ends = vec![write.as_fd(); 200];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(200))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&ends)));
    let iov = [io::IoSlice::new(b"x")];
    rustix::net::sendmsg(&ours, &iov, &mut control, rustix::net::SendFlags::empty()).unwrap();
    drop(ends);
    drop(write);
    let mut came = Vec::new();
    let refused = fds::recv(&theirs, &mut [0; 8], &mut came, 1000).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::InvalidData);
    assert_eq!(File::from(read).read(&mut [0]).unwrap(), 0);
}

#[test]
fn the_limit_counts_what_came_before() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut came = Vec::new();
    let _first = send_copies(&ours, 1);
    fds::recv(&theirs, &mut [0; 1], &mut came, 1).unwrap();
    let _second = send_copies(&ours, 1);
    assert!(fds::recv(&theirs, &mut [0; 1], &mut came, 1).is_err());
    assert_eq!(came.len(), 1);
}

#[test]
fn a_message_that_cannot_be_sent_is_refused_before_it_is() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let too_many = vec![ours.as_fd(); FDS_PER_MESSAGE_MAX + 1];
    assert_eq!(fds::send(&ours, b"x", &too_many).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    assert_eq!(fds::send(&ours, b"", &too_many[..1]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
}

#[test]
fn a_socket_that_is_not_ready_says_so() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let waits = fds::recv(&theirs, &mut [0; 8], &mut Vec::new(), 1).unwrap_err();
    assert_eq!(waits.kind(), io::ErrorKind::WouldBlock);
    drop(ours);
    assert_eq!(fds::recv(&theirs, &mut [0; 8], &mut Vec::new(), 1).unwrap(), 0, "the peer is gone");
    assert_eq!(fds::send(&theirs, b"x", &[]).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
}
