//! Frames: how a message becomes bytes and back.
//!
//! A frame is an 8-byte head (message length, payload length; `u32` little-endian each), the message in postcard
//! encoding, and the payload. Both lengths are checked against [`limits`](crate::limits) before anything is allocated.

use serde::{Serialize, de::DeserializeOwned};

use crate::limits::{MESSAGE_BYTES_MAX, PAYLOAD_BYTES_MAX};

/// Length of a frame's head.
pub const HEAD_LEN: usize = 8;

/// Why bytes are no frame. The connection that sent them ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The head announces a message that is empty or too long.
    #[error("a message of {len} bytes was announced, 1..={MESSAGE_BYTES_MAX} are allowed")]
    MessageLength {
        /// What the head says.
        len: u32,
    },
    /// The head announces a payload that is too long.
    #[error("a payload of {len} bytes was announced, at most {PAYLOAD_BYTES_MAX} are allowed")]
    PayloadLength {
        /// What the head says.
        len: u32,
    },
    /// The bytes are not a message of this version.
    #[error("the message cannot be decoded")]
    Malformed,
    /// Bytes are left over after the message.
    #[error("{len} bytes are left over after the message")]
    Trailing {
        /// How many.
        len: usize,
    },
    /// The message to send exceeds what a peer accepts.
    #[error("the message is too long to send")]
    TooLong,
}

/// The two lengths at the start of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Bytes of the encoded message.
    pub message_len: u32,
    /// Bytes of the payload.
    pub payload_len: u32,
}

impl Head {
    /// Reads a head and checks both lengths.
    pub fn decode(bytes: [u8; HEAD_LEN]) -> Result<Self, WireError> {
        let [a, b, c, d, e, f, g, h] = bytes;
        let head =
            Self { message_len: u32::from_le_bytes([a, b, c, d]), payload_len: u32::from_le_bytes([e, f, g, h]) };
        if head.message_len == 0 || head.message_len > MESSAGE_BYTES_MAX {
            return Err(WireError::MessageLength { len: head.message_len });
        }
        if head.payload_len > PAYLOAD_BYTES_MAX {
            return Err(WireError::PayloadLength { len: head.payload_len });
        }
        Ok(head)
    }
}

/// Appends the head and the message to `out`. The caller sends `payload_len` bytes of payload right after.
pub fn encode<M: Serialize>(message: &M, payload_len: u32, out: &mut Vec<u8>) -> Result<(), WireError> {
    if payload_len > PAYLOAD_BYTES_MAX {
        return Err(WireError::PayloadLength { len: payload_len });
    }
    let start = out.len();
    out.extend_from_slice(&[0; HEAD_LEN]);
    // `to_extend` fails only when a message cannot be serialized at all, which none of ours does.
    let mut buffer = postcard::to_extend(message, std::mem::take(out)).map_err(|_| WireError::Malformed)?;
    let message_len = u32::try_from(buffer.len() - start - HEAD_LEN).unwrap_or(u32::MAX);
    if message_len > MESSAGE_BYTES_MAX {
        buffer.truncate(start);
        *out = buffer;
        return Err(WireError::TooLong);
    }
    buffer[start..start + 4].copy_from_slice(&message_len.to_le_bytes());
    buffer[start + 4..start + HEAD_LEN].copy_from_slice(&payload_len.to_le_bytes());
    *out = buffer;
    Ok(())
}

/// Reads exactly one message; bytes left over are an error.
pub fn decode<M: DeserializeOwned>(message: &[u8]) -> Result<M, WireError> {
    match postcard::take_from_bytes(message) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(WireError::Trailing { len: rest.len() }),
        Err(_) => Err(WireError::Malformed),
    }
}
