//! Reading text with PaddleOCR's models: where it is, which way up it is, what it says.
//!
//! The text is drawn level, so boxes are level too; what turned text needs beyond that is left out.
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "positions of pixels: small numbers that are clamped where they are cast"
)]

use faaswap_engine::onnx::ModelProto;

use super::{functions::Case, image::Grey};
use crate::{Result, Trouble, oip::Tensor};

/// What is written in the image.
pub const LINES: [&str; 4] = [
    "Many functions share a device",
    "weights swap in while layers run",
    "Late binding 2026",
    "no GPU here: two host devices",
];

/// Score from which a pixel is text, and mean score from which a box is.
const PIXEL_SCORE_MIN: f32 = 0.3;
const BOX_SCORE_MIN: f32 = 0.5;
/// How much a box grows: the model is trained to find the inner part of a line.
const UNCLIP: f32 = 1.6;
/// Smaller boxes are noise.
const SIDE_MIN: usize = 3;
/// Height that the line models take.
const LINE_HEIGHT: usize = 48;
/// Least width for recognition, and the width for direction.
const READ_WIDTH_MIN: usize = 320;
const TURN_WIDTH: usize = 192;

/// A box: left, top, right, bottom; the last two are outside.
pub type Area = (usize, usize, usize, usize);

/// The image that is read.
pub fn image() -> Result<Grey> {
    let font = super::image::font()?;
    let mut image = Grey::white(608, 288);
    let mut baseline = 60.0;
    for (line, size) in LINES.iter().zip([38.0, 36.0, 44.0, 34.0]) {
        image.draw(&font, line, size, (28.0, baseline));
        baseline += 62.0;
    }
    Ok(image)
}

fn tensor(image: &Grey, width: usize) -> Result<Tensor> {
    let shape = [1, 3, u64::try_from(image.height)?, u64::try_from(width)?];
    Ok(Tensor::f32("x", &shape, &image.planes(width)))
}

/// Requests that ask where text is. Sides are multiples of 32, as the network wants.
pub fn find_cases(image: &Grey) -> Result<Vec<Case>> {
    let half = image.height / 64 * 32;
    let whole = Case { label: "whole image".to_owned(), inputs: vec![tensor(image, image.width)?] };
    let upper = image.cut((0, 0), (image.width, half));
    let upper = Case { label: "upper half".to_owned(), inputs: vec![tensor(&upper, upper.width)?] };
    Ok(vec![whole, upper])
}

/// The boxes of text in a map of scores, from top to bottom.
pub fn boxes(scores: &[f32], width: usize, height: usize) -> Vec<Area> {
    let is_text = |x: usize, y: usize| scores[y * width + x] > PIXEL_SCORE_MIN;
    // A pixel counts where it or its neighbour to the upper left does: that closes gaps of one pixel.
    let mask = |x: usize, y: usize| (x.saturating_sub(1)..=x).any(|x| (y.saturating_sub(1)..=y).any(|y| is_text(x, y)));
    let mut seen = vec![false; width * height];
    let mut found = Vec::new();
    for start in 0..width * height {
        if seen[start] || !mask(start % width, start / width) {
            continue;
        }
        let (mut left, mut top, mut right, mut bottom) = (width, height, 0, 0);
        let mut open = vec![start];
        seen[start] = true;
        while let Some(at) = open.pop() {
            let (x, y) = (at % width, at / width);
            (left, top, right, bottom) = (left.min(x), top.min(y), right.max(x + 1), bottom.max(y + 1));
            for y in y.saturating_sub(1)..(y + 2).min(height) {
                for x in x.saturating_sub(1)..(x + 2).min(width) {
                    if !seen[y * width + x] && mask(x, y) {
                        seen[y * width + x] = true;
                        open.push(y * width + x);
                    }
                }
            }
        }
        let mean = mean_score(scores, width, (left, top, right, bottom));
        if (right - left).min(bottom - top) >= SIDE_MIN && mean >= BOX_SCORE_MIN {
            found.push(grown((left, top, right, bottom), width, height));
        }
    }
    found.sort_by_key(|area| (area.1, area.0));
    found
}

fn mean_score(scores: &[f32], width: usize, (left, top, right, bottom): Area) -> f32 {
    let rows = (top..bottom).flat_map(|y| &scores[y * width + left..y * width + right]);
    rows.sum::<f32>() / ((right - left) * (bottom - top)) as f32
}

/// Grows a box by area x ratio / perimeter on each side.
fn grown((left, top, right, bottom): Area, width: usize, height: usize) -> Area {
    let (w, h) = ((right - left) as f32, (bottom - top) as f32);
    let by = (w * h * UNCLIP / (2.0 * (w + h))).round() as usize;
    (left.saturating_sub(by), top.saturating_sub(by), (right + by).min(width), (bottom + by).min(height))
}

fn line(image: &Grey, (left, top, right, bottom): Area, width_max: Option<usize>) -> Grey {
    let cut = image.cut((left, top), (right, bottom));
    let width = (cut.width * LINE_HEIGHT).div_ceil(cut.height.max(1));
    cut.resized(width_max.map_or(width, |max| width.min(max)).max(1), LINE_HEIGHT)
}

/// Requests that ask which way up each line is: as it is, and upside down.
pub fn turn_cases(image: &Grey, areas: &[Area]) -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for (number, area) in areas.iter().enumerate() {
        let upright = line(image, *area, Some(TURN_WIDTH));
        for (name, image) in [("upright", &upright), ("turned", &upright.turned())] {
            let label = format!("line {} {name}", number + 1);
            cases.push(Case { label, inputs: vec![tensor(image, TURN_WIDTH)?] });
        }
    }
    Ok(cases)
}

/// What the answer of the direction model says.
pub fn direction(scores: &[f32]) -> String {
    match scores {
        [upright, turned] if turned > upright => format!("upside down ({turned:.2})"),
        [upright, _] => format!("upright ({upright:.2})"),
        other => format!("{} scores", other.len()),
    }
}

/// Requests that ask what each line says.
pub fn read_cases(image: &Grey, areas: &[Area]) -> Result<Vec<Case>> {
    let cases = areas.iter().enumerate().map(|(number, area)| {
        let line = line(image, *area, None);
        let label = format!("line {}", number + 1);
        Ok(Case { label, inputs: vec![tensor(&line, line.width.max(READ_WIDTH_MIN))?] })
    });
    cases.collect()
}

/// The characters that the recognition model knows, from its own metadata; the first means nothing.
pub fn alphabet(model: &ModelProto) -> Result<Vec<String>> {
    let entry = model.metadata_props.iter().find(|entry| entry.key() == "character");
    let text = entry.ok_or_else(|| Trouble::new("the recognition model does not tell its characters"))?.value();
    let characters = text.lines().map(str::to_owned);
    Ok(std::iter::once(String::new()).chain(characters).chain([" ".to_owned()]).collect())
}

/// Decodes the recognition model's scores (CTC): the best character of each step, repeats and blanks left out.
pub fn decode(scores: &[f32], alphabet: &[String]) -> String {
    let mut text = String::new();
    let mut before = 0;
    for step in scores.chunks_exact(alphabet.len()) {
        let best = step.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(at, _)| at);
        if best != before {
            text.push_str(&alphabet[best]);
        }
        before = best;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_patches_of_high_scores_are_two_boxes_and_a_faint_one_is_none() {
        let (width, height) = (40, 30);
        let mut scores = vec![0.0; width * height];
        for (y, x, score) in (0..6).flat_map(|y| (0..10).map(move |x| (y, x, 0.9))) {
            scores[(y + 4) * width + x + 5] = score;
            scores[(y + 20) * width + x + 20] = score;
            scores[(y + 20) * width + x] = 0.35;
        }
        let found = boxes(&scores, width, height);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].0 < 5 && found[0].2 > 15 && found[0].1 < 4 && found[0].3 > 10, "{found:?} has not grown");
    }

    #[test]
    fn repeats_and_blanks_are_left_out_and_doubled_letters_are_not() {
        let alphabet: Vec<String> = ["", "a", "b", " "].map(str::to_owned).into();
        let steps = [1, 1, 0, 1, 2, 3, 3, 2];
        let scores: Vec<f32> =
            steps.iter().flat_map(|&best| (0..4).map(move |at| if at == best { 0.9 } else { 0.1 })).collect();
        assert_eq!(decode(&scores, &alphabet), "aab b");
    }
}
