//! From an image's bytes to a model's input, and from its output to labels: for functions without code.
//!
//! What the settings say is decided here, and how a tensor is made of them; how a request comes in and an answer goes
//! out is left to `http::image`. Without the feature `images` there is no decoder, and the settings are refused.

mod decode;
mod labels;
mod resize;
mod tensor;

use faaswap_protocol::{DType, Dim, Signature, TensorSpec};

pub use self::{
    decode::{ImageError, Kind, Pixels, Seen, decode, look},
    labels::{Label, LabelError, best},
    resize::{Filter, resize},
    tensor::tensor,
};

/// How an image becomes the model's input, in this order: colours, resize, crop, numbers, layout.
#[derive(Clone, Debug, PartialEq)]
pub struct Preprocess {
    /// The input's name; `None`: the only one.
    pub input: Option<String>,
    /// What a pixel consists of.
    pub colors: Colors,
    /// To what size the image is brought.
    pub resize: Option<Size>,
    /// How.
    pub filter: Filter,
    /// Height and width of what is cut from the middle.
    pub crop: Option<(u32, u32)>,
    /// What white is, before mean and deviation.
    pub white: f32,
    /// Subtracted, for each channel.
    pub mean: Vec<f32>,
    /// Divided by, for each channel.
    pub std: Vec<f32>,
    /// The order of dimensions; `None`: as the model's shape shows.
    pub layout: Option<Layout>,
}

/// How outputs become labels.
#[derive(Clone, Debug, PartialEq)]
pub struct Postprocess {
    /// The output's name; `None`: the only one.
    pub output: Option<String>,
    /// Names by index; an index without one is its own name.
    pub labels: Vec<String>,
    /// How many are answered.
    pub top: usize,
    /// Whether scores are made to sum up to one.
    pub softmax: bool,
}

/// What a pixel consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colors {
    /// Red, green, blue.
    Rgb,
    /// Blue, green, red.
    Bgr,
    /// Brightness (ITU-R 601).
    Gray,
}

impl Colors {
    /// How many numbers a pixel has.
    pub fn channels(self) -> usize {
        match self {
            Self::Rgb | Self::Bgr => 3,
            Self::Gray => 1,
        }
    }
}

/// A size to bring images to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// The shorter side is so long, the other in proportion.
    Shorter(u32),
    /// Height and width, whatever the proportion was.
    Exact(u32, u32),
}

/// The order of dimensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Batch, channels, height, width.
    Nchw,
    /// Batch, height, width, channels.
    Nhwc,
}

/// Why an image does not become the model's input.
#[derive(Debug, thiserror::Error)]
pub enum Misfit {
    /// The settings do not fit the model.
    #[error("the settings do not fit the model: {0}")]
    Settings(String),
    /// The image does not fit the settings.
    #[error("{0}")]
    Image(String),
}

/// Where an image goes in a model: found once per request, from what the broker says of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Position of the input.
    pub index: u16,
    /// Its element type.
    pub dtype: DType,
    /// The order of its dimensions.
    pub layout: Layout,
    /// Whether it has a batch dimension.
    pub has_batch: bool,
    /// Its height and width, where the model fixes them.
    pub size: (Option<u64>, Option<u64>),
}

impl Preprocess {
    /// Finds the input and how images must lie in it.
    pub fn target(&self, signature: &Signature) -> Result<Target, Misfit> {
        let (index, spec) = only(&signature.inputs, self.input.as_deref(), "input")?;
        if signature.inputs.len() != 1 {
            return Err(Misfit::Settings(format!(
                "the model has {} inputs, and an image is one",
                signature.inputs.len()
            )));
        }
        if !matches!(spec.dtype, DType::F32 | DType::F16 | DType::U8) {
            return Err(Misfit::Settings(format!("input {spec} takes no images: they are FP32, FP16 or UINT8")));
        }
        if spec.dtype == DType::U8 && !(self.mean.is_empty() && self.std.is_empty()) {
            return Err(Misfit::Settings(format!("input {spec} takes pixels as they are: leave out mean and std")));
        }
        let (has_batch, [a, b, c]) = match *spec.dims {
            [Dim::Fixed(1) | Dim::Any, a, b, c] => (true, [a, b, c]),
            [a, b, c] => (false, [a, b, c]),
            _ => {
                return Err(Misfit::Settings(format!(
                    "input {spec} takes no single images: that would be [1,3,H,W] or [1,H,W,3]"
                )));
            }
        };
        let channels = self.colors.channels() as u64;
        let may_be = |dim: Dim| dim == Dim::Any || dim == Dim::Fixed(channels);
        let layout = match self.layout {
            Some(layout) => layout,
            None if a == Dim::Fixed(channels) => Layout::Nchw,
            None if c == Dim::Fixed(channels) => Layout::Nhwc,
            None => Layout::Nchw,
        };
        let (found, height, width) = match layout {
            Layout::Nchw => (a, b, c),
            Layout::Nhwc => (c, a, b),
        };
        if !may_be(found) {
            return Err(Misfit::Settings(format!(
                "input {spec} has no place for {channels} channels; see colors and layout"
            )));
        }
        let fixed = |dim| match dim {
            Dim::Fixed(n) => Some(n),
            Dim::Any => None,
        };
        let size = (fixed(height), fixed(width));
        Ok(Target { index, dtype: spec.dtype, layout, has_batch, size })
    }
}

impl Postprocess {
    /// Finds the output with the scores.
    pub fn target(&self, signature: &Signature) -> Result<u16, Misfit> {
        let (index, spec) = only(&signature.outputs, self.output.as_deref(), "output")?;
        if !matches!(spec.dtype, DType::F32 | DType::F16 | DType::F64) {
            return Err(Misfit::Settings(format!("output {spec} holds no scores: they are FP32, FP16 or FP64")));
        }
        Ok(index)
    }
}

/// The tensor of that name, or the only one.
fn only<'a>(specs: &'a [TensorSpec], name: Option<&str>, kind: &str) -> Result<(u16, &'a TensorSpec), Misfit> {
    let named = || specs.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let found = match (name, specs) {
        (None, [spec]) => Some((0, spec)),
        (None, _) => return Err(Misfit::Settings(format!("set which {kind} is meant, of {}", named()))),
        (Some(name), _) => specs.iter().enumerate().find(|(_, spec)| spec.name == name),
    };
    let found = found.and_then(|(at, spec)| Some((u16::try_from(at).ok()?, spec)));
    found.ok_or_else(|| {
        Misfit::Settings(format!("the model has no {kind} '{}', only {}", name.unwrap_or_default(), named()))
    })
}
