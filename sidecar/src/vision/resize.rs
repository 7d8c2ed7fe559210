//! Resizes as Pillow does, to the bit: models were trained on images that it, or torchvision through it, has resized.
//!
//! Each output pixel is a weighted mean of all input pixels below the filter, which is stretched by the factor of a
//! reduction (*antialias*). First rows, then columns; weights are fixed-point numbers with 22 bits behind the point, and
//! what is between the two passes is rounded to a byte.

use super::Pixels;

/// How pixels are weighted by their distance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// A triangle.
    Bilinear,
    /// A cubic with a = -0.5.
    Bicubic,
}

/// Bits behind the point of a weight.
const BITS: u32 = 22;

impl Filter {
    /// How far it reaches where nothing is reduced.
    fn support(self) -> f64 {
        match self {
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
        }
    }

    fn weight(self, distance: f64) -> f64 {
        const A: f64 = -0.5;
        let x = distance.abs();
        match self {
            Self::Bilinear if x < 1.0 => 1.0 - x,
            Self::Bicubic if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
            Self::Bicubic if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
            Self::Bilinear | Self::Bicubic => 0.0,
        }
    }
}

/// What one output pixel is made of: from where on, and how much of each.
struct Taps {
    first: usize,
    weights: Vec<i32>,
}

/// Brings an image to another size.
pub fn resize(image: Pixels, width: u32, height: u32, filter: Filter) -> Pixels {
    let wide = if image.width == width { image } else { rows(&image, width, filter) };
    if wide.height == height { wide } else { columns(&wide, height, filter) }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "all are clamped to the image's size, or are weights below 2"
)]
fn taps(from: u32, to: u32, filter: Filter) -> Vec<Taps> {
    let scale = f64::from(from) / f64::from(to);
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    let last = f64::from(from);
    let one = f64::from(1_u32 << BITS);
    (0..to)
        .map(|at| {
            let center = (f64::from(at) + 0.5) * scale;
            let first = (center - support + 0.5).max(0.0).trunc();
            let end = (center + support + 0.5).min(last).trunc();
            let count = (end - first).max(0.0) as u32;
            let raw: Vec<_> =
                (0..count).map(|x| filter.weight((f64::from(x) + first - center + 0.5) / stretch)).collect();
            let sum: f64 = raw.iter().sum();
            let fixed = |weight: f64| {
                let share = if sum == 0.0 { weight } else { weight / sum };
                (share * one + if share < 0.0 { -0.5 } else { 0.5 }) as i32
            };
            Taps { first: first as usize, weights: raw.into_iter().map(fixed).collect() }
        })
        .collect()
}

/// Half of what a sum is cut down to, so that it is rounded. Sums fit: weights make up one, and at most a third more on the
/// way, times 255.
const HALF: i32 = 1 << (BITS - 1);

fn byte(sum: i32) -> u8 {
    u8::try_from((sum >> BITS).clamp(0, 255)).unwrap_or(u8::MAX)
}

fn rows(image: &Pixels, width: u32, filter: Filter) -> Pixels {
    let taps = taps(image.width, width, filter);
    let channels = image.channels;
    let mut data = Vec::with_capacity(taps.len() * image.height as usize * channels);
    for row in image.data.chunks_exact(image.width as usize * channels) {
        for Taps { first, weights } in &taps {
            let part = row.get(first * channels..(first + weights.len()) * channels).unwrap_or_default();
            let mut sums = [HALF; 3];
            for (pixel, weight) in part.chunks_exact(channels).zip(weights) {
                sums.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += weight * i32::from(*value));
            }
            data.extend(sums.into_iter().take(channels).map(byte));
        }
    }
    Pixels { width, data, ..*image }
}

fn columns(image: &Pixels, height: u32, filter: Filter) -> Pixels {
    let row = image.width as usize * image.channels;
    let mut data = Vec::with_capacity(height as usize * row);
    let mut sums = vec![HALF; row];
    for Taps { first, weights } in taps(image.height, height, filter) {
        sums.fill(HALF);
        for (line, weight) in image.data.chunks_exact(row.max(1)).skip(first).zip(weights) {
            sums.iter_mut().zip(line).for_each(|(sum, value)| *sum += weight * i32::from(*value));
        }
        data.extend(sums.iter().map(|sum| byte(*sum)));
    }
    Pixels { height, data, ..*image }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gray(width: u32, height: u32, data: &[u8]) -> Pixels {
        Pixels { width, height, channels: 1, data: data.to_vec() }
    }

    /// What `PIL.Image.fromarray(...).resize(...)` gave (Pillow 11).
    #[test]
    fn small_images_become_what_pillow_makes_of_them() {
        let image = gray(4, 2, &[0, 50, 100, 250, 10, 20, 30, 40]);
        let smaller = resize(image.clone(), 2, 1, Filter::Bilinear);
        let wider = resize(image, 6, 2, Filter::Bicubic);
        assert_eq!((smaller.data, wider.data), (SMALLER.to_vec(), WIDER.to_vec()));
    }

    const SMALLER: [u8; 2] = [27, 95];
    const WIDER: [u8; 12] = [0, 21, 57, 86, 182, 255, 9, 14, 22, 28, 36, 41];
}
