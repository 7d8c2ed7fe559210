//! Takes in a request's body: bounded in size, in time, and in what all bodies take together.
//!
//! Large pieces are kept as they came, so that tensors are copied once, into the slab; small ones are joined, because a
//! piece costs more than a few bytes.

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::Body;
use http_body_util::BodyExt;
use tokio::time::{Instant, timeout, timeout_at};

use crate::{
    failure::Failure,
    infer::Lent,
    limits::{BODY_SILENCE_MAX, BODY_WITHIN},
};

/// Pieces below this are joined.
const PIECE_BYTES_MIN: usize = 8 << 10;

/// Reads the whole body.
pub async fn collect<B>(body: B, bytes_max: usize, lent: &mut Lent<'_>) -> Result<Vec<Bytes>, Failure>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    let too_large = || Failure::TooLarge(format!("the request body exceeds the {bytes_max} bytes that are allowed"));
    let announced = body.size_hint().exact().map(|len| usize::try_from(len).unwrap_or(usize::MAX));
    if announced.is_some_and(|len| len > bytes_max) {
        return Err(too_large());
    }
    timeout_at(Instant::now() + BODY_WITHIN, collect_slowly(body, bytes_max, lent, too_large))
        .await
        .unwrap_or(Err(Failure::BodySlow))
}

async fn collect_slowly<B>(
    mut body: B,
    bytes_max: usize,
    lent: &mut Lent<'_>,
    too_large: impl Fn() -> Failure,
) -> Result<Vec<Bytes>, Failure>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    let mut pieces = Vec::new();
    let mut small = BytesMut::new();
    let mut len = 0_usize;
    loop {
        let frame = timeout(BODY_SILENCE_MAX, body.frame()).await.map_err(|_| Failure::BodySlow)?;
        let Some(frame) = frame else {
            break;
        };
        let frame = frame.map_err(|error| Failure::BodyBroken(format!("the request body broke off: {error}")))?;
        let Ok(piece) = frame.into_data() else {
            continue;
        };
        len = len.saturating_add(piece.len());
        if len > bytes_max {
            return Err(too_large());
        }
        lent.take(piece.len())?;
        if piece.len() >= PIECE_BYTES_MIN || (body.is_end_stream() && small.is_empty()) {
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

/// Whether the client says that its body is longer than allowed; then it is not even asked to go on.
pub fn announces_too_much(headers: &HeaderMap, bytes_max: usize) -> bool {
    let announced = headers.get(http::header::CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    announced.and_then(|text| text.parse::<usize>().ok()).is_some_and(|len| len > bytes_max)
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

    #[tokio::test]
    async fn a_body_over_the_limit_is_refused_even_if_it_does_not_say_its_length() {
        let function = Function::new("m".into(), 1000);
        let refused = collect(Chunked { left: 11, piece: 1 }, 10, &mut function.bodies().open()).await;
        assert!(matches!(refused, Err(Failure::TooLarge(_))), "{refused:?}");
    }

    #[tokio::test]
    async fn many_small_chunks_become_one_piece_and_large_ones_stay() {
        let function = Function::new("m".into(), 1 << 20);
        let mut lent = function.bodies().open();
        let small = collect(Chunked { left: 5000, piece: 1 }, 1 << 20, &mut lent).await.unwrap();
        assert_eq!((small.len(), small[0].len()), (1, 5000));
        let large = collect(Chunked { left: 4 * PIECE_BYTES_MIN, piece: PIECE_BYTES_MIN }, 1 << 20, &mut lent).await;
        assert_eq!(large.unwrap().len(), 4);
    }

    #[tokio::test]
    async fn bodies_share_one_budget() {
        let function = Function::new("m".into(), 100);
        let mut first = function.bodies().open();
        collect(Chunked { left: 80, piece: 8 }, 1000, &mut first).await.unwrap();
        let second = collect(Chunked { left: 80, piece: 8 }, 1000, &mut function.bodies().open()).await;
        assert!(matches!(second, Err(Failure::Busy(_))), "{second:?}");
    }
}
