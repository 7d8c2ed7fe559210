//! From pixels to a tensor's bytes: colours, size, the middle, numbers, layout.

use faaswap_protocol::DType;
use half::f16;

use super::{Colors, Layout, Misfit, Pixels, Preprocess, Size, Target, resize};
use crate::limits::IMAGE_PIXELS_MAX;

/// Makes a tensor of an image: its dimensions and its bytes.
pub fn tensor(settings: &Preprocess, target: &Target, image: Pixels) -> Result<(Vec<u64>, Vec<u8>), Misfit> {
    let image = recolored(image, settings.colors);
    let (width, height) = resized(settings.resize, &image);
    // What lies between the two passes has the new width and the old height.
    if u64::from(width) * u64::from(height.max(image.height)) > IMAGE_PIXELS_MAX {
        return Err(Misfit::Image(format!(
            "the image is too long and narrow: {} x {} (height x width) would become {height} x {width}",
            image.height, image.width
        )));
    }
    let image = resize(image, width, height, settings.filter);
    let (top, left, height, width) = middle(settings.crop, &image)?;
    let fits = |wanted: Option<u64>, is: u32| wanted.is_none_or(|wanted| wanted == u64::from(is));
    if !fits(target.size.0, height) || !fits(target.size.1, width) {
        let shown = |size: Option<u64>| size.map_or("any".to_owned(), |size| size.to_string());
        let (high, wide) = (shown(target.size.0), shown(target.size.1));
        return Err(Misfit::Settings(format!(
            "the model takes images of {high} x {wide} (height x width), and resize and crop give {height} x {width}"
        )));
    }
    let cut =
        Cut { image: &image, top: top as usize, left: left as usize, height: height as usize, width: width as usize };
    let channels = image.channels as u64;
    let (height, width) = (u64::from(height), u64::from(width));
    let mut dims = match target.layout {
        Layout::Nchw => vec![channels, height, width],
        Layout::Nhwc => vec![height, width, channels],
    };
    if target.has_batch {
        dims.insert(0, 1);
    }
    Ok((dims, bytes(settings, target, &cut)))
}

/// With the channels that the model wants, in its order.
fn recolored(mut image: Pixels, colors: Colors) -> Pixels {
    match (colors, image.channels) {
        (Colors::Rgb, 3) | (Colors::Gray, 1) => {}
        (Colors::Bgr, 3) => image.data.as_chunks_mut::<3>().0.iter_mut().for_each(|pixel| pixel.swap(0, 2)),
        (Colors::Rgb | Colors::Bgr, _) => {
            image.data = image.data.iter().flat_map(|value| [*value; 3]).collect();
            image.channels = 3;
        }
        (Colors::Gray, _) => {
            image.data = image.data.as_chunks::<3>().0.iter().map(brightness).collect();
            image.channels = 1;
        }
    }
    image
}

/// As Pillow's `convert("L")`.
fn brightness(&[red, green, blue]: &[u8; 3]) -> u8 {
    let sum = u32::from(red) * 19595 + u32::from(green) * 38470 + u32::from(blue) * 7471 + 0x8000;
    u8::try_from(sum >> 16).unwrap_or(u8::MAX)
}

/// Width and height to bring the image to.
fn resized(size: Option<Size>, image: &Pixels) -> (u32, u32) {
    let (width, height) = (image.width, image.height);
    let in_proportion = |short: u32, long: u32, side: u32| {
        u32::try_from(u64::from(side) * u64::from(long) / u64::from(short.max(1))).unwrap_or(u32::MAX).max(1)
    };
    match size {
        None => (width, height),
        Some(Size::Exact(height, width)) => (width, height),
        Some(Size::Shorter(side)) if width <= height => (side, in_proportion(width, height, side)),
        Some(Size::Shorter(side)) => (in_proportion(height, width, side), side),
    }
}

/// Top, left, height and width of what is cut from the middle; halves are rounded to even, as torchvision does.
fn middle(crop: Option<(u32, u32)>, image: &Pixels) -> Result<(u32, u32, u32, u32), Misfit> {
    let Some((height, width)) = crop else { return Ok((0, 0, image.height, image.width)) };
    let half = |all: u32, part: u32| {
        let twice = all.checked_sub(part)?;
        Some(twice / 2 + u32::from(twice % 2 == 1 && (twice / 2) % 2 == 1))
    };
    match (half(image.height, height), half(image.width, width)) {
        (Some(top), Some(left)) => Ok((top, left, height, width)),
        _ => Err(Misfit::Image(format!(
            "the image is {} x {} (height x width) where {height} x {width} are to be cut from it: set resize",
            image.height, image.width
        ))),
    }
}

struct Cut<'a> {
    image: &'a Pixels,
    top: usize,
    left: usize,
    height: usize,
    width: usize,
}

impl<'a> Cut<'a> {
    /// The part of each row that is cut out.
    fn rows(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let channels = self.image.channels;
        let (from, to) = (self.left * channels, (self.left + self.width) * channels);
        let rows = self.image.data.chunks_exact((self.image.width as usize * channels).max(1));
        rows.skip(self.top).take(self.height).filter_map(move |row| row.get(from..to))
    }
}

fn bytes(settings: &Preprocess, target: &Target, cut: &Cut<'_>) -> Vec<u8> {
    let channels = cut.image.channels;
    let table: Vec<[f32; 256]> = (0..channels).map(|channel| numbers(settings, channel)).collect();
    let mut out = Vec::with_capacity(cut.width * cut.height * channels * 4);
    let mut put = |numbers: &[f32; 256], value: u8| {
        let number = numbers[usize::from(value)];
        if target.dtype == DType::U8 {
            out.push(value);
        } else if target.dtype == DType::F16 {
            out.extend_from_slice(&f16::from_f32(number).to_le_bytes());
        } else {
            out.extend_from_slice(&number.to_le_bytes());
        }
    };
    match target.layout {
        Layout::Nhwc => {
            let values = cut.rows().flatten().zip(table.iter().cycle());
            values.for_each(|(value, numbers)| put(numbers, *value));
        }
        Layout::Nchw => {
            for (channel, numbers) in table.iter().enumerate() {
                let values = cut.rows().flat_map(|row| row.iter().skip(channel).step_by(channels));
                values.for_each(|value| put(numbers, *value));
            }
        }
    }
    out
}

/// What each byte of a channel becomes.
fn numbers(settings: &Preprocess, channel: usize) -> [f32; 256] {
    // One number for all channels, or one for each.
    let of = |list: &[f32], none: f32| list.get(channel).or(list.first()).copied().unwrap_or(none);
    let (mean, std) = (of(&settings.mean, 0.0), of(&settings.std, 1.0));
    let mut table = [0.0; 256];
    for (number, byte) in table.iter_mut().zip(0..=u8::MAX) {
        *number = (f32::from(byte) * settings.white / 255.0 - mean) / std;
    }
    table
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::vision::Filter;

    fn settings(colors: Colors) -> Preprocess {
        Preprocess {
            input: None,
            colors,
            resize: None,
            filter: Filter::Bilinear,
            crop: Some((1, 2)),
            white: 255.0,
            mean: vec![1.0],
            std: vec![1.0, 2.0, 4.0],
            layout: None,
        }
    }

    fn made(colors: Colors, layout: Layout, has_batch: bool) -> (Vec<u64>, Vec<f32>) {
        let target = Target { index: 0, dtype: DType::F32, layout, has_batch, size: (Some(1), None) };
        // Three rows of two pixels; the middle one is cut out.
        let data = [[0; 6], [11, 21, 41, 13, 23, 43], [0; 6]].concat();
        let (dims, bytes) =
            tensor(&settings(colors), &target, Pixels { width: 2, height: 3, channels: 3, data }).unwrap();
        (dims, bytes.as_chunks::<4>().0.iter().map(|number| f32::from_le_bytes(*number)).collect())
    }

    #[test]
    fn channels_stand_together_or_pixels_do() {
        let planes = made(Colors::Rgb, Layout::Nchw, true);
        assert_eq!(planes, (vec![1, 3, 1, 2], vec![10.0, 12.0, 10.0, 11.0, 10.0, 10.5]));
        let pixels = made(Colors::Rgb, Layout::Nhwc, false);
        assert_eq!(pixels, (vec![1, 2, 3], vec![10.0, 10.0, 10.0, 12.0, 11.0, 10.5]));
    }

    #[test]
    fn mean_and_deviation_are_in_the_order_of_the_models_channels() {
        let (_, pixels) = made(Colors::Bgr, Layout::Nhwc, true);
        assert_eq!(pixels, [40.0, 10.0, 2.5, 42.0, 11.0, 3.0]);
        let (dims, gray) = made(Colors::Gray, Layout::Nchw, true);
        assert_eq!((dims, gray), (vec![1, 1, 1, 2], vec![19.0, 21.0]));
    }

    #[test]
    fn the_middle_lies_where_torchvision_has_it() {
        let image = |height| Pixels { width: 10, height, channels: 1, data: Vec::new() };
        let tops = [4, 5, 6, 7, 8, 9].map(|height| middle(Some((4, 10)), &image(height)).unwrap().0);
        // round((height - 4) / 2), halves to even: 0, 0.5, 1, 1.5, 2, 2.5.
        assert_eq!(tops, [0, 0, 1, 2, 2, 2]);
    }

    #[test]
    fn the_shorter_side_is_brought_to_its_length() {
        let size =
            |width, height| resized(Some(Size::Shorter(256)), &Pixels { width, height, channels: 1, data: vec![] });
        assert_eq!(
            [size(640, 480), size(480, 641), size(1, 1), size(300, 256)],
            [(341, 256), (256, 341), (256, 256), (300, 256)]
        );
    }
}
