//! Takes in a request's body: bounded in size, in time, and in what all bodies take together.
//!
//! Pieces are handed on as they come, so that tensors are copied once, into the slab. Where they have to be collected,
//! small ones are joined, because a piece costs more than a few bytes.

use bytes::{Bytes, BytesMut};
use http_body::Body;
use http_body_util::BodyExt;
use tokio::time::{Instant, timeout_at};

use crate::{
    failure::Failure,
    infer::Lent,
    limits::{BODY_SILENCE_MAX, BODY_WITHIN, LINGER_BYTES_MAX, LINGER_WITHIN},
};

/// Pieces below this are joined.
const PIECE_BYTES_MIN: usize = 8 << 10;

/// A request's body, piece by piece.
#[derive(Debug)]
pub struct BodyReader<B> {
    body: B,
    bytes_max: usize,
    announced: Option<usize>,
    came: usize,
    until: Instant,
    over: bool,
    waits_for_go: bool,
}

impl<B> BodyReader<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    /// A body of so many bytes at most. `waits_for_go`: the client sends it once we begin to read.
    pub fn new(body: B, bytes_max: usize, waits_for_go: bool) -> Self {
        let announced = body.size_hint().exact().map(|len| usize::try_from(len).unwrap_or(usize::MAX));
        let over = body.is_end_stream();
        Self { body, bytes_max, announced, came: 0, until: Instant::now() + BODY_WITHIN, over, waits_for_go }
    }

    /// The length, where the client says it beforehand.
    pub fn announced(&self) -> Option<usize> {
        self.announced
    }

    /// The most bytes that it may have.
    pub fn bytes_max(&self) -> usize {
        self.bytes_max
    }

    /// The next piece.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Failure> {
        if self.announced.is_some_and(|len| len > self.bytes_max) {
            return Err(self.too_large());
        }
        let piece = self.any_piece().await?;
        if self.came > self.bytes_max { Err(self.too_large()) } else { Ok(piece) }
    }

    async fn any_piece(&mut self) -> Result<Option<Bytes>, Failure> {
        while !self.over {
            let until = self.until.min(Instant::now() + BODY_SILENCE_MAX);
            let frame = timeout_at(until, self.body.frame()).await.map_err(|_| Failure::BodySlow)?;
            let Some(frame) = frame else {
                self.over = true;
                break;
            };
            let frame = frame.map_err(|error| {
                self.over = true;
                Failure::BodyBroken(format!("the request body broke off: {error}"))
            })?;
            if let Ok(piece) = frame.into_data() {
                self.came = self.came.saturating_add(piece.len());
                return Ok(Some(piece));
            }
        }
        Ok(None)
    }

    fn too_large(&self) -> Failure {
        Failure::TooLarge(format!("the request body exceeds the {} bytes that are allowed", self.bytes_max))
    }

    /// All that is still to come.
    pub async fn collect(&mut self, lent: &mut Lent<'_>) -> Result<Vec<Bytes>, Failure> {
        let mut pieces = Vec::new();
        let mut small = BytesMut::new();
        while let Some(piece) = self.next().await? {
            lent.take(piece.len())?;
            if piece.len() >= PIECE_BYTES_MIN || (self.body.is_end_stream() && small.is_empty()) {
                if !small.is_empty() {
                    pieces.push(small.split().freeze());
                }
                pieces.push(piece);
            } else {
                small.extend_from_slice(&piece);
            }
        }
        if !small.is_empty() {
            pieces.push(small.freeze());
        }
        Ok(pieces)
    }

    /// Reads what nobody wants, within limits: a client that is still sending when the connection closes never sees the
    /// reply.
    pub async fn discard(mut self) {
        if self.waits_for_go && self.came == 0 {
            return;
        }
        self.until = Instant::now() + LINGER_WITHIN;
        while self.came < LINGER_BYTES_MAX && matches!(self.any_piece().await, Ok(Some(_))) {}
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{
        pin::Pin,
        task::{Context, Poll},
    };

    use http_body::Frame;

    use super::*;
    use crate::infer::Function;

    /// A body without a length, in pieces of one size.
    struct Chunked {
        left: usize,
        piece: usize,
    }

    impl Body for Chunked {
        type Data = Bytes;
        type Error = std::io::Error;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
            let len = self.piece.min(self.left);
            self.left -= len;
            Poll::Ready((len > 0).then(|| Ok(Frame::data(vec![7; len].into()))))
        }
    }

    fn body(left: usize, piece: usize) -> BodyReader<Chunked> {
        BodyReader::new(Chunked { left, piece }, 1 << 20, false)
    }

    #[tokio::test]
    async fn a_body_over_the_limit_is_refused_even_if_it_does_not_say_its_length() {
        let function = Function::new("m".into(), 1000);
        let mut body = BodyReader::new(Chunked { left: 11, piece: 1 }, 10, false);
        let refused = body.collect(&mut function.bodies().open()).await;
        assert!(matches!(refused, Err(Failure::TooLarge(_))), "{refused:?}");
    }

    #[tokio::test]
    async fn many_small_chunks_become_one_piece_and_large_ones_stay() {
        let function = Function::new("m".into(), 1 << 20);
        let mut lent = function.bodies().open();
        let small = body(5000, 1).collect(&mut lent).await.unwrap();
        assert_eq!((small.len(), small[0].len()), (1, 5000));
        let large = body(4 * PIECE_BYTES_MIN, PIECE_BYTES_MIN).collect(&mut lent).await;
        assert_eq!(large.unwrap().len(), 4);
    }

    #[tokio::test]
    async fn bodies_share_one_budget() {
        let function = Function::new("m".into(), 100);
        let mut first = function.bodies().open();
        body(80, 8).collect(&mut first).await.unwrap();
        let second = body(80, 8).collect(&mut function.bodies().open()).await;
        assert!(matches!(second, Err(Failure::Busy(_))), "{second:?}");
    }

    /// A body that never comes.
    struct Silent;

    impl Body for Silent {
        type Data = Bytes;
        type Error = std::io::Error;

        fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
            Poll::Pending
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_falls_silent_is_not_waited_for() {
        let mut silent = BodyReader::new(Silent, 10, false);
        assert!(matches!(silent.next().await, Err(Failure::BodySlow)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_waits_for_a_go_is_not_told_to_send_what_nobody_wants() {
        let before = Instant::now();
        BodyReader::new(Silent, 10, true).discard().await;
        assert_eq!(Instant::now(), before);
    }
}
