//! A body, or what is left of it, in the pieces in which it came.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

use crate::failure::{Failure, invalid};

/// The part of a body behind its JSON.
#[derive(Debug, Default)]
pub struct Rest {
    pieces: VecDeque<Bytes>,
    len: usize,
}

impl Rest {
    /// These pieces, one after the other.
    pub fn new(pieces: Vec<Bytes>) -> Self {
        Self { len: pieces.iter().map(Bytes::len).sum(), pieces: pieces.into() }
    }

    /// How many bytes there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Puts a piece behind the others.
    pub fn push(&mut self, piece: Bytes) {
        self.len += piece.len();
        self.pieces.push_back(piece);
    }

    /// Takes the first piece as it is.
    pub fn pop(&mut self) -> Option<Bytes> {
        let piece = self.pieces.pop_front()?;
        self.len -= piece.len();
        Some(piece)
    }

    /// Cuts off the next `len` bytes, as one piece.
    pub fn take_joined(&mut self, len: usize) -> Result<Bytes, Failure> {
        Ok(join(self.take(len)?))
    }

    /// Cuts off the next `len` bytes.
    pub fn take(&mut self, mut len: usize) -> Result<Vec<Bytes>, Failure> {
        let Some(left) = self.len.checked_sub(len) else {
            return invalid(format!("{len} more bytes of binary data were announced and {} came", self.len));
        };
        self.len = left;
        let mut taken = Vec::with_capacity(self.pieces.len().min(8));
        while len > 0 {
            let Some(mut piece) = self.pieces.pop_front() else {
                return Err(Failure::Internal("the body's pieces do not add up".to_owned()));
            };
            if piece.len() > len {
                let rest = piece.split_off(len);
                self.pieces.push_front(rest);
            }
            len -= piece.len();
            taken.push(piece);
        }
        Ok(taken)
    }
}

pub(super) fn join(mut pieces: Vec<Bytes>) -> Bytes {
    if pieces.len() <= 1 {
        return pieces.pop().unwrap_or_default();
    }
    let mut all = BytesMut::with_capacity(pieces.iter().map(Bytes::len).sum());
    for piece in pieces {
        all.extend_from_slice(&piece);
    }
    all.freeze()
}
