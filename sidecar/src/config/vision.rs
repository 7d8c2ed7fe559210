//! What configurations say of images and labels: `[preprocess]` and `[postprocess]`.

use std::{fs::File, io::Read, path::PathBuf};

use super::{Start, read::Reader};
use crate::{
    limits::{IMAGE_SIDE_MAX, LABELS_BYTES_MAX, LABELS_TOP_MAX},
    vision::{Colors, Filter, Layout, Postprocess, Preprocess, Size},
};

/// For a function without code: images in, labels out.
#[derive(Clone, Debug, PartialEq)]
pub struct Vision {
    /// How an image becomes the model's input.
    pub before: Preprocess,
    /// How the output becomes an answer; `None`: as the protocol has it.
    pub after: Option<Postprocess>,
}

#[derive(Clone, Copy)]
enum OnlyKind {
    Image,
    Labels,
}

/// `None`: nothing is said of images, or wrongly, which the reader has noted.
pub(super) fn read(from: &mut Reader, start: &Start) -> Option<Vision> {
    let before = before(from);
    let after = after(from, start);
    match (before, after) {
        (Some(_), _) if !cfg!(feature = "images") => {
            from.mistake("preprocess_kind: this sidecar was built without the feature images".to_owned());
            None
        }
        (None, Some(_)) => {
            from.mistake("postprocess_kind is set and preprocess_kind is not: what does the function take?".to_owned());
            None
        }
        (before, after) => before.map(|before| Vision { before, after }),
    }
}

fn before(from: &mut Reader) -> Option<Preprocess> {
    let kind = from.one_of("preprocess_kind", &[("image", OnlyKind::Image)]);
    let colors = [("rgb", Colors::Rgb), ("bgr", Colors::Bgr), ("gray", Colors::Gray)];
    let colors = from.one_of("preprocess_colors", &colors).unwrap_or(Colors::Rgb);
    let filters = [("bilinear", Filter::Bilinear), ("bicubic", Filter::Bicubic)];
    let resize = sides(from, "preprocess_resize").map(|sides| match sides {
        (side, None) => Size::Shorter(side),
        (height, Some(width)) => Size::Exact(height, width),
    });
    let crop = sides(from, "preprocess_crop").map(|(height, width)| (height, width.unwrap_or(height)));
    let mean = numbers(from, "preprocess_mean", colors);
    let std = numbers(from, "preprocess_std", colors);
    if std.contains(&0.0) {
        from.mistake("preprocess_std: nothing can be divided by 0".to_owned());
    }
    let preprocess = Preprocess {
        input: from.text("preprocess_input"),
        colors,
        resize,
        filter: from.one_of("preprocess_filter", &filters).unwrap_or(Filter::Bilinear),
        crop,
        white: from.parse("preprocess_white", number).unwrap_or(1.0),
        mean,
        std,
        layout: from.one_of("preprocess_layout", &[("nchw", Layout::Nchw), ("nhwc", Layout::Nhwc)]),
    };
    kind.map(|_| preprocess)
}

fn after(from: &mut Reader, start: &Start) -> Option<Postprocess> {
    let kind = from.one_of("postprocess_kind", &[("labels", OnlyKind::Labels)]);
    let folder = start.folder.clone().filter(|_| start.variable("FAASWAP_POSTPROCESS_LABELS").is_none());
    let labels = from.parse("postprocess_labels", |path| names(&folder.unwrap_or_default().join(path)));
    let top = from.number("postprocess_top", 1..=LABELS_TOP_MAX).unwrap_or(5);
    let postprocess = Postprocess {
        output: from.text("postprocess_output"),
        labels: labels.unwrap_or_default(),
        top: usize::try_from(top).unwrap_or(1),
        softmax: from.one_of("postprocess_softmax", &[("true", true), ("false", false)]).unwrap_or(false),
    };
    kind.map(|_| postprocess)
}

/// One name a line.
fn names(path: &PathBuf) -> Result<Vec<String>, String> {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(LABELS_BYTES_MAX + 1).read_to_string(&mut text));
    match read {
        Err(error) => Err(format!("'{}' cannot be read: {error}", path.display())),
        Ok(len) if len as u64 > LABELS_BYTES_MAX => {
            Err(format!("'{}' is longer than the {LABELS_BYTES_MAX} bytes that are read", path.display()))
        }
        Ok(_) => Ok(text.lines().map(|line| line.trim_end().to_owned()).collect()),
    }
}

/// One side, or height and width.
fn sides(from: &mut Reader, key: &'static str) -> Option<(u32, Option<u32>)> {
    let list = from.list(key);
    let read: Option<Vec<u32>> =
        list.iter().map(|side| side.parse().ok().filter(|side| (1..=IMAGE_SIDE_MAX).contains(side))).collect();
    match read.as_deref() {
        Some([]) => None,
        Some([side]) => Some((*side, None)),
        Some([height, width]) => Some((*height, Some(*width))),
        Some(_) | None => {
            from.mistake(format!(
                "{key}: '{}' is neither one side nor [height, width], of 1 to {IMAGE_SIDE_MAX}",
                list.join(", ")
            ));
            None
        }
    }
}

fn number(text: &str) -> Result<f32, String> {
    let number = text.parse().ok().filter(|number: &f32| number.is_finite());
    number.ok_or_else(|| format!("'{text}' is no number"))
}

/// None, one for all channels, or one for each.
fn numbers(from: &mut Reader, key: &'static str, colors: Colors) -> Vec<f32> {
    let list = from.list(key);
    let read: Result<Vec<f32>, String> = list.iter().map(|text| number(text)).collect();
    match read {
        Ok(numbers) if [0, 1, colors.channels()].contains(&numbers.len()) => numbers,
        Ok(numbers) => {
            from.mistake(format!("{key}: {} numbers are given, expected 1 or {}", numbers.len(), colors.channels()));
            Vec::new()
        }
        Err(why) => {
            from.mistake(format!("{key}: {why}"));
            Vec::new()
        }
    }
}
