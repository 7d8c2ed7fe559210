//! Element types, shapes with checked sizes, and where a tensor's bytes lie.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{
    limits::{RANK_MAX, TENSOR_ALIGN},
    units::Bytes,
};

/// Element type of a tensor. Strings are not among them: no accelerator computes on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub enum DType {
    Bool,
    U8,
    U16,
    U32,
    U64,
    I8,
    I16,
    I32,
    I64,
    F16,
    Bf16,
    F32,
    F64,
}

impl DType {
    /// Every element type.
    pub const ALL: [Self; 13] = [
        Self::Bool,
        Self::U8,
        Self::U16,
        Self::U32,
        Self::U64,
        Self::I8,
        Self::I16,
        Self::I32,
        Self::I64,
        Self::F16,
        Self::Bf16,
        Self::F32,
        Self::F64,
    ];

    /// Bytes of one element.
    pub const fn size(self) -> u64 {
        match self {
            Self::Bool | Self::U8 | Self::I8 => 1,
            Self::U16 | Self::I16 | Self::F16 | Self::Bf16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }

    /// The name that the Open Inference Protocol gives it.
    pub const fn oip(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::U8 => "UINT8",
            Self::U16 => "UINT16",
            Self::U32 => "UINT32",
            Self::U64 => "UINT64",
            Self::I8 => "INT8",
            Self::I16 => "INT16",
            Self::I32 => "INT32",
            Self::I64 => "INT64",
            Self::F16 => "FP16",
            Self::Bf16 => "BF16",
            Self::F32 => "FP32",
            Self::F64 => "FP64",
        }
    }

    /// The element type with this Open Inference Protocol name.
    pub fn from_oip(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.oip() == name)
    }

    /// Whether kernels use the values as positions in memory, so that they must not change while they are read.
    pub const fn can_index(self) -> bool {
        !matches!(self, Self::F16 | Self::Bf16 | Self::F32 | Self::F64)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.oip())
    }
}

/// One dimension in a model's signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Dim {
    /// The model wants exactly this many.
    Fixed(u64),
    /// Each request may choose (`-1` in the Open Inference Protocol).
    Any,
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(n) => write!(f, "{n}"),
            Self::Any => f.write_str("-1"),
        }
    }
}

/// Why a shape is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    /// More dimensions than any model has.
    #[error("a tensor has at most {RANK_MAX} dimensions")]
    Rank,
    /// The number of bytes does not fit in 63 bits.
    #[error("the tensor's size in bytes overflows")]
    Size,
}

/// The dimensions of one tensor, outermost first, row-major; each is known. No dimensions: a scalar.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Shape(Vec<u64>);

impl Shape {
    /// Takes dimensions whose element count fits in 60 bits, so that a size in bytes always fits in 63.
    pub fn new(dims: impl Into<Vec<u64>>) -> Result<Self, ShapeError> {
        let shape = Self(dims.into());
        shape.elements().map(|_| shape)
    }

    /// The dimensions.
    pub fn dims(&self) -> &[u64] {
        &self.0
    }

    /// Number of elements. Checked even when one dimension is 0: a decoded shape has not passed [`Shape::new`].
    pub fn elements(&self) -> Result<u64, ShapeError> {
        if self.0.len() > RANK_MAX {
            return Err(ShapeError::Rank);
        }
        let bound = self.0.iter().try_fold(1_u64, |n, &dim| n.checked_mul(dim.max(1))).ok_or(ShapeError::Size)?;
        if bound >= 1 << 60 {
            return Err(ShapeError::Size);
        }
        Ok(self.0.iter().product())
    }

    /// Size in bytes with elements of this type.
    pub fn size(&self, dtype: DType) -> Result<Bytes, ShapeError> {
        self.elements()?.checked_mul(dtype.size()).map(Bytes::new).ok_or(ShapeError::Size)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_dims(f, &self.0)
    }
}

fn write_dims<T: fmt::Display>(f: &mut fmt::Formatter<'_>, dims: &[T]) -> fmt::Result {
    f.write_str("[")?;
    for (i, dim) in dims.iter().enumerate() {
        write!(f, "{}{dim}", if i == 0 { "" } else { "," })?;
    }
    f.write_str("]")
}

/// Name, type and shape of one input or output, as the model declares it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorSpec {
    /// The tensor's name in the graph.
    pub name: String,
    /// Its element type.
    pub dtype: DType,
    /// Its dimensions, outermost first.
    pub dims: Vec<Dim>,
}

impl TensorSpec {
    /// Whether a tensor of this shape is one that the model accepts here.
    pub fn accepts(&self, shape: &Shape) -> bool {
        self.dims.len() == shape.dims().len()
            && self.dims.iter().zip(shape.dims()).all(|(want, &have)| match want {
                Dim::Fixed(n) => *n == have,
                Dim::Any => true,
            })
    }

    /// The shape, where no dimension is open.
    pub fn fixed_shape(&self) -> Option<Shape> {
        let dims = self.dims.iter().map(|dim| match dim {
            Dim::Fixed(n) => Some(*n),
            Dim::Any => None,
        });
        Shape::new(dims.collect::<Option<Vec<_>>>()?).ok()
    }
}

impl fmt::Display for TensorSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.dtype)?;
        write_dims(f, &self.dims)
    }
}

/// What a model takes and gives, in the order of its graph.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature {
    /// Inputs in graph order; a request names them by position.
    pub inputs: Vec<TensorSpec>,
    /// Outputs in graph order.
    pub outputs: Vec<TensorSpec>,
}

/// A stretch of a slab or of a frame's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Span {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

impl Span {
    /// The end, where it does not overflow.
    pub fn end(self) -> Option<u64> {
        self.offset.checked_add(self.len)
    }

    /// Whether the span lies in `0..limit` and starts at a multiple of [`TENSOR_ALIGN`].
    pub fn fits(self, limit: Bytes) -> bool {
        self.offset.is_multiple_of(TENSOR_ALIGN) && self.end().is_some_and(|end| end <= limit.get())
    }
}

/// One tensor of a request or an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorSlice {
    /// Position in the model's inputs or outputs.
    pub index: u16,
    /// Element type; must be the signature's.
    pub dtype: DType,
    /// Dimensions; must fit the signature's.
    pub shape: Shape,
    /// Where the bytes lie: little-endian, row-major, exactly shape x size of the type.
    pub span: Span,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_that_overflows_is_an_error_even_behind_a_zero() {
        assert_eq!(Shape::new([1 << 40, 1 << 40]), Err(ShapeError::Size));
        assert_eq!(Shape::new([0, u64::MAX]), Err(ShapeError::Size));
        assert_eq!(Shape::new(vec![1; RANK_MAX + 1]), Err(ShapeError::Rank));
        assert_eq!(Shape::new([0, 7]).and_then(|s| s.size(DType::F32)), Ok(Bytes::ZERO));
        assert_eq!(Shape::new([]).and_then(|s| s.size(DType::F64)), Ok(Bytes::new(8)));
    }

    #[test]
    fn a_span_is_checked_without_wrapping_around() {
        let limit = Bytes::new(1024);
        assert!(Span { offset: 960, len: 64 }.fits(limit));
        assert!(!Span { offset: 961, len: 1 }.fits(limit), "unaligned");
        assert!(!Span { offset: 1024, len: 1 }.fits(limit));
        assert!(!Span { offset: u64::MAX - 63, len: 128 }.fits(limit));
    }

    #[test]
    fn a_signature_accepts_any_size_only_where_it_says_so() {
        let spec = TensorSpec { name: "x".into(), dtype: DType::F32, dims: vec![Dim::Any, Dim::Fixed(3)] };
        let ok = |dims: &[u64]| spec.accepts(&Shape::new(dims).expect("small"));
        assert!(ok(&[9, 3]) && !ok(&[9, 4]) && !ok(&[3]) && !ok(&[1, 9, 3]));
        assert_eq!(spec.to_string(), "x FP32[-1,3]");
        assert_eq!(spec.fixed_shape(), None);
    }

    #[test]
    fn every_type_is_found_by_its_protocol_name() {
        for dtype in DType::ALL {
            assert_eq!(DType::from_oip(dtype.oip()), Some(dtype));
        }
        assert_eq!(DType::from_oip("BYTES"), None);
    }
}
