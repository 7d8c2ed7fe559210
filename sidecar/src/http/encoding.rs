//! Compressed bodies: `gzip` and `deflate` (a zlib stream), in and out.
//!
//! A request is never unpacked past the body limit. Only JSON replies are packed: tensors hardly shrink, and the time
//! would be taken from the functions.

use std::io::{Read, Write};

use bytes::{Buf, Bytes};
use flate2::{Compression, bufread, write};
use http::{HeaderMap, HeaderValue, header};

use crate::failure::{Failure, invalid};

/// How a body is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coding {
    /// `gzip`.
    Gzip,
    /// `deflate`: zlib.
    Deflate,
}

/// Replies below this many bytes are not worth packing.
const PACK_BYTES_MIN: usize = 1024;

impl Coding {
    /// The name in headers.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Deflate => "deflate",
        }
    }

    /// How a request's body is packed.
    pub fn of_request(headers: &HeaderMap) -> Result<Option<Self>, Failure> {
        let Some(value) = headers.get(header::CONTENT_ENCODING) else {
            return Ok(None);
        };
        match value.to_str().map(str::trim).unwrap_or_default() {
            "" | "identity" => Ok(None),
            "gzip" | "x-gzip" => Ok(Some(Self::Gzip)),
            "deflate" => Ok(Some(Self::Deflate)),
            other => invalid(format!("content-encoding '{other}' is not supported, use gzip or deflate")),
        }
    }

    /// How a reply of this length may be packed for a client that accepts these.
    pub fn of_reply(wanted: &HeaderValue, len: usize) -> Option<Self> {
        if len < PACK_BYTES_MIN {
            return None;
        }
        let wanted = wanted.to_str().ok()?;
        let accepts = |name: &str| {
            wanted.split(',').any(|part| {
                let mut part = part.split(';').map(str::trim);
                part.next() == Some(name)
                    && !part.any(|q| q.strip_prefix("q=").is_some_and(|q| q.parse() == Ok(0.0_f32)))
            })
        };
        [Self::Gzip, Self::Deflate].into_iter().find(|coding| accepts(coding.name()))
    }

    /// Unpacks a request's body, as far as the limit.
    pub fn unpack(self, pieces: Vec<Bytes>, bytes_max: usize) -> Result<Bytes, Failure> {
        let packed = Chain(pieces.into());
        let limit = u64::try_from(bytes_max).unwrap_or(u64::MAX).saturating_add(1);
        let mut out = Vec::new();
        let read = match self {
            Self::Gzip => bufread::MultiGzDecoder::new(packed.reader()).take(limit).read_to_end(&mut out),
            Self::Deflate => bufread::ZlibDecoder::new(packed.reader()).take(limit).read_to_end(&mut out),
        };
        if out.len() > bytes_max {
            return Err(Failure::TooLarge(format!(
                "the {} body unpacks to more than the {bytes_max} bytes that are allowed",
                self.name()
            )));
        }
        match read {
            Ok(_) => Ok(out.into()),
            Err(error) => invalid(format!("the {} body cannot be unpacked: {error}", self.name())),
        }
    }

    /// Packs a reply.
    pub fn pack(self, bytes: &[u8]) -> Result<Bytes, Failure> {
        let broken = |error: std::io::Error| Failure::Internal(format!("the reply cannot be packed: {error}"));
        let out = Vec::with_capacity(bytes.len() / 2);
        let packed = match self {
            Self::Gzip => {
                let mut packer = write::GzEncoder::new(out, Compression::fast());
                packer.write_all(bytes).map_err(broken)?;
                packer.finish()
            }
            Self::Deflate => {
                let mut packer = write::ZlibEncoder::new(out, Compression::fast());
                packer.write_all(bytes).map_err(broken)?;
                packer.finish()
            }
        };
        packed.map(Bytes::from).map_err(broken)
    }
}

/// Pieces that read as one.
struct Chain(std::collections::VecDeque<Bytes>);

impl Buf for Chain {
    fn remaining(&self) -> usize {
        self.0.iter().map(Bytes::len).sum()
    }

    fn chunk(&self) -> &[u8] {
        self.0.iter().find(|piece| !piece.is_empty()).map_or(&[], |piece| piece)
    }

    fn advance(&mut self, mut len: usize) {
        while len > 0 {
            let Some(first) = self.0.front_mut() else {
                return;
            };
            let step = len.min(first.len());
            first.advance(step);
            len -= step;
            if first.is_empty() {
                self.0.pop_front();
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_unpacks_to_the_same() {
        let text = b"tensor ".repeat(1000);
        for coding in [Coding::Gzip, Coding::Deflate] {
            let packed = coding.pack(&text).unwrap();
            let pieces = packed.chunks(7).map(Bytes::copy_from_slice).collect();
            assert_eq!(coding.unpack(pieces, text.len()).unwrap(), text);
        }
    }

    #[test]
    fn a_bomb_is_stopped_at_the_limit() {
        for coding in [Coding::Gzip, Coding::Deflate] {
            let bomb = coding.pack(&vec![0; 1 << 20]).unwrap();
            assert!(matches!(coding.unpack(vec![bomb], 1000), Err(Failure::TooLarge(_))));
        }
    }

    #[test]
    fn a_body_that_is_cut_short_is_invalid() {
        let packed = Coding::Gzip.pack(&[7; 5000]).unwrap();
        let cut = packed.slice(..packed.len() - 9);
        assert!(matches!(Coding::Gzip.unpack(vec![cut], 10_000), Err(Failure::Invalid(_))));
    }

    #[test]
    fn a_client_gets_only_what_it_accepts() {
        let accept = |value: &'static str| Coding::of_reply(&HeaderValue::from_static(value), PACK_BYTES_MIN);
        assert_eq!(accept("deflate, gzip;q=0"), Some(Coding::Deflate));
        assert_eq!(accept("br, gzip"), Some(Coding::Gzip));
        assert_eq!(accept("br"), None);
    }
}
