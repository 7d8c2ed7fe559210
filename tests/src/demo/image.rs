//! Images as the text models want them: drawn with a real font, cut, turned, resized, normalized.
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "positions of pixels and shades of grey: small numbers that are clamped where they are cast"
)]

use std::{
    fs::{self, File},
    io::BufWriter,
    path::Path,
};

use ab_glyph::{Font, FontVec, PxScale, ScaleFont, point};

use crate::{Result, Trouble};

/// One shade per pixel; the models' three colours are equal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grey {
    /// Pixels in a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Row after row, 0 is black.
    pub pixels: Vec<u8>,
}

impl Grey {
    /// All white.
    pub fn white(width: usize, height: usize) -> Self {
        Self { width, height, pixels: vec![255; width * height] }
    }

    /// Draws a line of text; `at` is its left end on the baseline.
    pub fn draw(&mut self, font: &FontVec, text: &str, size: f32, at: (f32, f32)) {
        let font = font.as_scaled(PxScale::from(size));
        let (mut x, mut before) = (at.0, None);
        for character in text.chars() {
            let id = font.glyph_id(character);
            x += before.map_or(0.0, |before| font.kern(before, id));
            let glyph = id.with_scale_and_position(font.scale(), point(x, at.1));
            if let Some(outline) = font.outline_glyph(glyph) {
                let corner = outline.px_bounds().min;
                outline.draw(|px, py, ink| self.darken(corner.x + px as f32, corner.y + py as f32, ink));
            }
            x += font.h_advance(id);
            before = Some(id);
        }
    }

    fn darken(&mut self, x: f32, y: f32, ink: f32) {
        let (x, y) = (x.max(0.0) as usize, y.max(0.0) as usize);
        if let Some(pixel) = self.pixels.get_mut(y * self.width + x).filter(|_| x < self.width) {
            *pixel = (f32::from(*pixel) * (1.0 - ink.clamp(0.0, 1.0))) as u8;
        }
    }

    /// The part between two corners; the second is outside.
    pub fn cut(&self, (left, top): (usize, usize), (right, bottom): (usize, usize)) -> Self {
        let (right, bottom) = (right.min(self.width), bottom.min(self.height));
        let rows = (top..bottom).map(|y| &self.pixels[y * self.width + left..y * self.width + right]);
        let pixels = rows.flatten().copied().collect();
        Self { width: right - left, height: bottom - top, pixels }
    }

    /// Upside down.
    pub fn turned(&self) -> Self {
        Self { pixels: self.pixels.iter().rev().copied().collect(), ..*self }
    }

    /// With other sides, by linear interpolation between pixel centres.
    pub fn resized(&self, width: usize, height: usize) -> Self {
        let along = |at: usize, to: usize, from: usize| {
            let place = ((at as f32 + 0.5) * from as f32 / to as f32 - 0.5).clamp(0.0, from as f32 - 1.0);
            let first = place as usize;
            (first, (first + 1).min(from - 1), place - first as f32)
        };
        let mut pixels = Vec::with_capacity(width * height);
        for y in 0..height {
            let (y0, y1, fy) = along(y, height, self.height);
            for x in 0..width {
                let (x0, x1, fx) = along(x, width, self.width);
                let at = |x: usize, y: usize| f32::from(self.pixels[y * self.width + x]);
                let upper = at(x0, y0) * (1.0 - fx) + at(x1, y0) * fx;
                let lower = at(x0, y1) * (1.0 - fx) + at(x1, y1) * fx;
                pixels.push((upper * (1.0 - fy) + lower * fy).round() as u8);
            }
        }
        Self { width, height, pixels }
    }

    /// Three equal planes of floats from -1 to 1, zeros to the right of the image up to `padded` pixels.
    pub fn planes(&self, padded: usize) -> Vec<f32> {
        let row = |y: usize| {
            let row = self.pixels[y * self.width..(y + 1) * self.width].iter();
            row.map(|&shade| (f32::from(shade) / 255.0 - 0.5) / 0.5)
                .chain(std::iter::repeat_n(0.0, padded - self.width))
        };
        (0..3).flat_map(|_| (0..self.height).flat_map(row)).collect()
    }

    /// Saves it for people, and for those who tell file types.
    pub fn save(&self, path: &Path) -> Result<()> {
        let file = File::create(path).map_err(Trouble::while_doing(path.display()))?;
        let side = |len: usize| u32::try_from(len);
        let mut encoder = png::Encoder::new(BufWriter::new(file), side(self.width)?, side(self.height)?);
        encoder.set_color(png::ColorType::Grayscale);
        let written = encoder.write_header().and_then(|mut writer| writer.write_image_data(&self.pixels));
        written.map_err(|error| Trouble::new(format!("{}: {error}", path.display())))
    }
}

/// The font of `make fetch`.
pub fn font() -> Result<FontVec> {
    let path = crate::cache::font()?;
    let bytes = fs::read(&path).map_err(Trouble::while_doing(path.display()))?;
    FontVec::try_from_vec(bytes).map_err(|error| Trouble::new(format!("{}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cutting_turning_and_resizing_move_the_right_pixels() {
        let image = Grey { width: 3, height: 2, pixels: vec![1, 2, 3, 4, 5, 6] };
        assert_eq!(image.cut((1, 0), (3, 2)).pixels, [2, 3, 5, 6]);
        assert_eq!(image.turned().pixels, [6, 5, 4, 3, 2, 1]);
        assert_eq!(image.resized(3, 2), image);
        let two = Grey { width: 2, height: 1, pixels: vec![0, 100] };
        assert_eq!(two.resized(4, 1).pixels, [0, 25, 75, 100]);
        assert_eq!(Grey::white(1, 1).planes(2), [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]);
    }
}
