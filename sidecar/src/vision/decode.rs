//! Decodes JPEG and PNG, and before that looks at how large they would be: a small file may hold a huge image.

use crate::limits::IMAGE_PIXELS_MAX;

/// What kind of file an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// JPEG.
    Jpeg,
    /// PNG.
    Png,
}

/// What an image's beginning says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// What it is.
    pub kind: Kind,
    /// Its width.
    pub width: u32,
    /// Its height.
    pub height: u32,
}

/// An image in memory: rows from the top, pixels from the left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pixels {
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Numbers in a pixel: 1 or 3.
    pub channels: usize,
    /// All of them.
    pub data: Vec<u8>,
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Another kind of file.
    #[error("this is neither a JPEG nor a PNG image")]
    Unknown,
    /// Larger than any that is decoded.
    #[error("the image has {width} x {height} pixels, at most {IMAGE_PIXELS_MAX} are decoded")]
    TooLarge {
        /// Its width.
        width: u32,
        /// Its height.
        height: u32,
    },
    /// It cannot be decoded.
    #[error("the image cannot be decoded: {0}")]
    Broken(String),
    /// The program was built without decoders.
    #[error("this sidecar was built without image decoders")]
    NotBuilt,
}

/// Finds out kind and size from an image's head; nothing is decoded.
pub fn look(bytes: &[u8]) -> Result<Seen, ImageError> {
    let kind = match bytes {
        [0xff, 0xd8, 0xff, ..] => Kind::Jpeg,
        [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => Kind::Png,
        _ => return Err(ImageError::Unknown),
    };
    let (width, height) = decoders::size(kind, bytes)?;
    if u64::from(width) * u64::from(height) > IMAGE_PIXELS_MAX {
        return Err(ImageError::TooLarge { width, height });
    }
    Ok(Seen { kind, width, height })
}

/// Decodes an image that was looked at.
pub fn decode(seen: Seen, bytes: &[u8]) -> Result<Pixels, ImageError> {
    let pixels = decoders::pixels(seen.kind, bytes)?;
    let len = u64::from(pixels.width) * u64::from(pixels.height) * pixels.channels as u64;
    if (pixels.width, pixels.height) != (seen.width, seen.height) || pixels.data.len() as u64 != len {
        return Err(ImageError::Broken("its parts do not agree on its size".to_owned()));
    }
    Ok(pixels)
}

#[cfg(feature = "images")]
mod decoders {
    use std::io::Cursor;

    use png::{ColorType, Transformations};
    use zune_core::{bytestream::ZCursor, colorspace::ColorSpace, options::DecoderOptions};
    use zune_jpeg::JpegDecoder;

    use super::{ImageError, Kind, Pixels};
    use crate::limits::{IMAGE_PIXELS_MAX, IMAGE_SCANS_MAX, IMAGE_SCRATCH_BYTES_MAX};

    #[expect(clippy::needless_pass_by_value, reason = "made for map_err")]
    fn broken(error: impl ToString) -> ImageError {
        ImageError::Broken(error.to_string())
    }

    fn jpeg(bytes: &[u8]) -> JpegDecoder<ZCursor<&[u8]>> {
        let options = DecoderOptions::default()
            .set_max_width(usize::from(u16::MAX))
            .set_max_height(usize::from(u16::MAX))
            .jpeg_set_max_scans(IMAGE_SCANS_MAX)
            // A transfer that broke off is no image with a grey end.
            .set_strict_mode(true);
        JpegDecoder::new_with_options(ZCursor::new(bytes), options)
    }

    fn png(bytes: &[u8]) -> Result<png::Reader<Cursor<&[u8]>>, ImageError> {
        let limits = png::Limits { bytes: IMAGE_SCRATCH_BYTES_MAX };
        let mut decoder = png::Decoder::new_with_limits(Cursor::new(bytes), limits);
        decoder.set_transformations(Transformations::normalize_to_color8());
        decoder.set_ignore_text_chunk(true);
        decoder.set_ignore_iccp_chunk(true);
        decoder.read_info().map_err(broken)
    }

    pub(super) fn size(kind: Kind, bytes: &[u8]) -> Result<(u32, u32), ImageError> {
        match kind {
            Kind::Jpeg => {
                let mut decoder = jpeg(bytes);
                decoder.decode_headers().map_err(broken)?;
                let info = decoder.info().ok_or_else(|| broken("it has no head"))?;
                Ok((info.width.into(), info.height.into()))
            }
            Kind::Png => png(bytes).map(|reader| reader.info().size()),
        }
    }

    pub(super) fn pixels(kind: Kind, bytes: &[u8]) -> Result<Pixels, ImageError> {
        match kind {
            Kind::Jpeg => {
                let mut decoder = jpeg(bytes);
                decoder.decode_headers().map_err(broken)?;
                let is_gray = decoder.input_colorspace() == Some(ColorSpace::Luma);
                let wanted = if is_gray { ColorSpace::Luma } else { ColorSpace::RGB };
                decoder.set_options(decoder.options().jpeg_set_out_colorspace(wanted));
                let data = decoder.decode().map_err(broken)?;
                let info = decoder.info().ok_or_else(|| broken("it has no head"))?;
                let channels = if is_gray { 1 } else { 3 };
                Ok(Pixels { width: info.width.into(), height: info.height.into(), channels, data })
            }
            Kind::Png => {
                let mut reader = png(bytes)?;
                let (width, height) = reader.info().size();
                let len = reader.output_buffer_size().filter(|len| *len as u64 <= 4 * IMAGE_PIXELS_MAX);
                let mut data = vec![0; len.ok_or(ImageError::TooLarge { width, height })?];
                let frame = reader.next_frame(&mut data).map_err(broken)?;
                data.truncate(frame.buffer_size());
                let (keep, of) = match frame.color_type {
                    ColorType::Grayscale => (1, 1),
                    ColorType::GrayscaleAlpha => (1, 2),
                    ColorType::Rgb => (3, 3),
                    ColorType::Rgba => (3, 4),
                    ColorType::Indexed => return Err(broken("its palette was not expanded")),
                };
                let data = if keep == of { data } else { without_alpha(&data, keep, of) };
                Ok(Pixels { width, height, channels: keep, data })
            }
        }
    }

    fn without_alpha(data: &[u8], keep: usize, of: usize) -> Vec<u8> {
        data.chunks_exact(of).filter_map(|pixel| pixel.get(..keep)).flatten().copied().collect()
    }
}

#[cfg(not(feature = "images"))]
mod decoders {
    use super::{ImageError, Kind, Pixels};

    pub(super) fn size(_: Kind, _: &[u8]) -> Result<(u32, u32), ImageError> {
        Err(ImageError::NotBuilt)
    }

    pub(super) fn pixels(_: Kind, _: &[u8]) -> Result<Pixels, ImageError> {
        Err(ImageError::NotBuilt)
    }
}
