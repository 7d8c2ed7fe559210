//! Cuts what a peer sends into frames. Lengths are judged before anything is kept; random bytes end the connection.

use bytes::{Bytes, BytesMut};
use faaswap_protocol::{
    ToBroker,
    limits::{MESSAGE_BYTES_MAX, PAYLOAD_BYTES_MAX, UPLOAD_PART_BYTES_MAX},
    wire::{self, HEAD_LEN, Head, WireError},
};

use crate::limits::HELLO_BYTES_MAX;

/// What a connection may send, by how far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Only a hello.
    Greeting,
    /// Tensors travel in the slab: frames have no payload.
    Slab,
    /// Tensors travel in payloads.
    Inline,
}

impl Phase {
    const fn most(self) -> (u32, u32) {
        match self {
            Self::Greeting => (HELLO_BYTES_MAX, 0),
            Self::Slab => (MESSAGE_BYTES_MAX, UPLOAD_PART_BYTES_MAX),
            Self::Inline => (MESSAGE_BYTES_MAX, PAYLOAD_BYTES_MAX),
        }
    }
}

/// Bytes that are no whole frame yet.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    kept: BytesMut,
}

impl Frames {
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.kept.extend_from_slice(bytes);
    }

    /// Whether nothing of a frame has come.
    pub(crate) fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// The next whole frame.
    pub(crate) fn next(&mut self, phase: Phase) -> Result<Option<(ToBroker, Bytes)>, WireError> {
        let Some(head) = self.kept.first_chunk::<HEAD_LEN>() else { return Ok(None) };
        let Head { message_len, payload_len } = Head::decode(*head)?;
        let (message_max, payload_max) = phase.most();
        if message_len > message_max {
            return Err(WireError::MessageLength { len: message_len });
        }
        if payload_len > payload_max {
            return Err(WireError::PayloadLength { len: payload_len });
        }
        let message_end = HEAD_LEN + message_len as usize;
        let end = message_end + payload_len as usize;
        if self.kept.len() < end {
            return Ok(None);
        }
        let mut frame = self.kept.split_to(end).freeze();
        if self.kept.is_empty() {
            // An idle connection keeps no buffer.
            self.kept = BytesMut::new();
        }
        let payload = frame.split_off(message_end);
        Ok(Some((wire::decode(&frame[HEAD_LEN..])?, payload)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(message: &ToBroker, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        wire::encode(message, u32::try_from(payload.len()).expect("small"), &mut out).expect("encodes");
        out.extend_from_slice(payload);
        out
    }

    #[test]
    fn frames_are_whole_whatever_the_pieces() {
        let all = [frame(&ToBroker::Ping { nonce: 1 }, b"abc"), frame(&ToBroker::Ping { nonce: 2 }, b"")].concat();
        for piece in [1, 3, 7, all.len()] {
            let mut frames = Frames::default();
            let mut seen = Vec::new();
            for part in all.chunks(piece) {
                frames.push(part);
                while let Some((message, payload)) = frames.next(Phase::Inline).expect("valid") {
                    seen.push((message, payload.to_vec()));
                }
            }
            let expected = [(ToBroker::Ping { nonce: 1 }, b"abc".to_vec()), (ToBroker::Ping { nonce: 2 }, vec![])];
            assert_eq!(seen, expected);
            assert!(frames.is_empty());
        }
    }

    #[test]
    fn lengths_are_judged_before_the_bytes_come() {
        let head = |message: u32, payload: u32| [message.to_le_bytes(), payload.to_le_bytes()].concat();
        let verdict = |phase, bytes: &[u8]| {
            let mut frames = Frames::default();
            frames.push(bytes);
            frames.next(phase).map(|frame| frame.is_some())
        };
        assert!(verdict(Phase::Greeting, &head(HELLO_BYTES_MAX + 1, 0)).is_err());
        assert!(verdict(Phase::Greeting, &head(10, 1)).is_err());
        assert!(verdict(Phase::Slab, &head(10, UPLOAD_PART_BYTES_MAX + 1)).is_err());
        assert!(verdict(Phase::Inline, &head(u32::MAX, 0)).is_err());
        assert_eq!(verdict(Phase::Inline, &head(10, PAYLOAD_BYTES_MAX)), Ok(false), "may come");
    }
}
