//! Tensors as JSON: numbers straight into typed bytes, and back.
//!
//! A tensor is written flat or nested exactly as its shape; integers are exact to 64 bits; floats are the nearest value
//! of their type, so that what we write reads back as the same bits. The text is known to be well-formed JSON.

use std::io::Write;

use bytes::Bytes;
use faaswap_protocol::{DType, limits::RANK_MAX};

use crate::{
    failure::{Failure, invalid},
    infer::check::Announced,
};

/// Reads the `data` of an input.
pub fn read(text: &str, tensor: &Announced) -> Result<Bytes, Failure> {
    let bytes = match tensor.dtype {
        DType::Bool => fill(text, tensor, |token| match token {
            "true" | "1" => Some([1]),
            "false" | "0" => Some([0]),
            _ => None,
        }),
        DType::U8 => fill(text, tensor, |token| token.parse().ok().map(u8::to_le_bytes)),
        DType::U16 => fill(text, tensor, |token| token.parse().ok().map(u16::to_le_bytes)),
        DType::U32 => fill(text, tensor, |token| token.parse().ok().map(u32::to_le_bytes)),
        DType::U64 => fill(text, tensor, |token| token.parse().ok().map(u64::to_le_bytes)),
        DType::I8 => fill(text, tensor, |token| token.parse().ok().map(i8::to_le_bytes)),
        DType::I16 => fill(text, tensor, |token| token.parse().ok().map(i16::to_le_bytes)),
        DType::I32 => fill(text, tensor, |token| token.parse().ok().map(i32::to_le_bytes)),
        DType::I64 => fill(text, tensor, |token| token.parse().ok().map(i64::to_le_bytes)),
        DType::F32 => fill(text, tensor, |token| {
            token.parse().ok().filter(|number: &f32| number.is_finite()).map(f32::to_le_bytes)
        }),
        DType::F64 => fill(text, tensor, |token| {
            token.parse().ok().filter(|number: &f64| number.is_finite()).map(f64::to_le_bytes)
        }),
        DType::F16 | DType::Bf16 => {
            return invalid(format!(
                "input '{}' is {}, which JSON cannot carry: send it with the binary tensor extension",
                tensor.name, tensor.dtype
            ));
        }
    };
    bytes.map(Bytes::from)
}

/// Walks through the array; `parse` makes one element of one token.
fn fill<const N: usize>(
    text: &str,
    tensor: &Announced,
    parse: impl Fn(&str) -> Option<[u8; N]>,
) -> Result<Vec<u8>, Failure> {
    let name = &tensor.name;
    let mut nesting = Nesting::new(tensor);
    // The text has at most one element per two bytes, whatever the shape claims.
    let room = usize::try_from(tensor.bytes).unwrap_or(usize::MAX).min((text.len() / 2 + 1).saturating_mul(N));
    let mut out = Vec::with_capacity(room);
    let bytes = text.as_bytes();
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b'[' => nesting.open()?,
            b']' => nesting.close()?,
            b',' | b' ' | b'\t' | b'\n' | b'\r' => {}
            b'"' | b'{' => {
                let kind = if byte == b'"' { "a string" } else { "an object" };
                return invalid(format!("the data of input '{name}' holds {kind}, expected {}", tensor.dtype));
            }
            _ => {
                let rest = &bytes[at..];
                let len = rest.iter().position(|b| b",] \t\n\r".contains(b)).unwrap_or(rest.len());
                let token = text.get(at..at + len).unwrap_or_default();
                nesting.element()?;
                let Some(element) = parse(token) else {
                    return invalid(format!(
                        "the data of input '{name}' holds {}, which is no {}",
                        token.get(..40).unwrap_or(token),
                        tensor.dtype
                    ));
                };
                out.extend_from_slice(&element);
                at += len;
                continue;
            }
        }
        at += 1;
    }
    nesting.finish()?;
    Ok(out)
}

/// Checks that an array is flat, or nested as the shape is.
struct Nesting<'a> {
    tensor: &'a Announced,
    depth: usize,
    /// Depth of the elements, once one was seen.
    leaf: Option<usize>,
    /// Members seen so far, by depth.
    counts: [u64; RANK_MAX + 2],
    /// The first array whose length is not the shape's.
    mismatch: Option<(usize, u64)>,
    elements: u64,
}

impl<'a> Nesting<'a> {
    fn new(tensor: &'a Announced) -> Self {
        Self { tensor, depth: 0, leaf: None, counts: [0; RANK_MAX + 2], mismatch: None, elements: 0 }
    }

    fn open(&mut self) -> Result<(), Failure> {
        if self.depth > self.tensor.shape.dims().len().max(1) {
            return self.wrong(&format!("is nested deeper than {} levels", self.depth));
        }
        self.counts[self.depth] += 1;
        self.depth += 1;
        self.counts[self.depth] = 0;
        Ok(())
    }

    fn close(&mut self) -> Result<(), Failure> {
        let count = self.counts[self.depth];
        let Some(depth) = self.depth.checked_sub(1) else {
            return self.wrong("closes more arrays than it opens");
        };
        if self.tensor.shape.dims().get(depth) != Some(&count) && self.mismatch.is_none() {
            self.mismatch = Some((depth, count));
        }
        self.depth = depth;
        Ok(())
    }

    fn element(&mut self) -> Result<(), Failure> {
        if self.depth == 0 {
            return self.wrong("is not an array");
        }
        if *self.leaf.get_or_insert(self.depth) != self.depth {
            return self.wrong("holds elements at different depths");
        }
        self.counts[self.depth] += 1;
        self.elements += 1;
        Ok(())
    }

    fn finish(&self) -> Result<(), Failure> {
        let Announced { shape, .. } = self.tensor;
        let wanted = shape.elements().unwrap_or(u64::MAX);
        if self.elements != wanted {
            return self.wrong(&format!("holds {} elements, expected {wanted}", self.elements));
        }
        match (self.leaf, self.mismatch) {
            (Some(leaf), _) if leaf > 1 && leaf != shape.dims().len() => {
                self.wrong(&format!("is nested {leaf} levels deep"))
            }
            (Some(leaf), Some((depth, count))) if leaf > 1 => {
                self.wrong(&format!("has {count} members in dimension {depth}"))
            }
            (Some(_) | None, _) => Ok(()),
        }
    }

    fn wrong<T>(&self, what: &str) -> Result<T, Failure> {
        invalid(format!(
            "the data of input '{}' {what}; a tensor of shape {} is written flat or nested as its shape",
            self.tensor.name, self.tensor.shape
        ))
    }
}

/// Appends the elements of an output as a flat JSON array.
///
/// JSON has no word for NaN and infinities; rather than write what many parsers refuse, the client is told to ask for
/// binary data.
pub fn write(out: &mut Vec<u8>, name: &str, dtype: DType, data: &[u8]) -> Result<(), Failure> {
    match dtype {
        DType::Bool => list(out, data, |out, [byte]: [u8; 1]| {
            out.extend_from_slice(if byte == 0 { b"false" } else { b"true" });
            true
        }),
        DType::U8 => list(out, data, |out, bytes| integer(out, u8::from_le_bytes(bytes))),
        DType::U16 => list(out, data, |out, bytes| integer(out, u16::from_le_bytes(bytes))),
        DType::U32 => list(out, data, |out, bytes| integer(out, u32::from_le_bytes(bytes))),
        DType::U64 => list(out, data, |out, bytes| integer(out, u64::from_le_bytes(bytes))),
        DType::I8 => list(out, data, |out, bytes| integer(out, i8::from_le_bytes(bytes))),
        DType::I16 => list(out, data, |out, bytes| integer(out, i16::from_le_bytes(bytes))),
        DType::I32 => list(out, data, |out, bytes| integer(out, i32::from_le_bytes(bytes))),
        DType::I64 => list(out, data, |out, bytes| integer(out, i64::from_le_bytes(bytes))),
        DType::F32 => list(out, data, |out, bytes| {
            let number = f32::from_le_bytes(bytes);
            number.is_finite() && serde_json::to_writer(out, &number).is_ok()
        }),
        DType::F64 => list(out, data, |out, bytes| {
            let number = f64::from_le_bytes(bytes);
            number.is_finite() && serde_json::to_writer(out, &number).is_ok()
        }),
        DType::F16 | DType::Bf16 => return Err(no_json(name, dtype)),
    }
    .ok_or_else(|| {
        Failure::Invalid(format!(
            "output '{name}' holds NaN or infinity, which JSON cannot carry: ask for it with \"binary_data\": true"
        ))
    })
}

/// An output of this type cannot be asked for as JSON.
pub fn no_json(name: &str, dtype: DType) -> Failure {
    Failure::Invalid(format!(
        "output '{name}' is {dtype}, which JSON cannot carry: ask for it with \"binary_data\": true"
    ))
}

fn integer(out: &mut Vec<u8>, number: impl serde::Serialize) -> bool {
    serde_json::to_writer(out, &number).is_ok()
}

fn list<const N: usize>(
    out: &mut Vec<u8>,
    data: &[u8],
    mut element: impl FnMut(&mut Vec<u8>, [u8; N]) -> bool,
) -> Option<()> {
    out.reserve(data.len() / N * 4 + 2);
    out.push(b'[');
    let (elements, _rest) = data.as_chunks::<N>();
    for (at, bytes) in elements.iter().enumerate() {
        if at > 0 {
            out.push(b',');
        }
        if !element(out, *bytes) {
            return None;
        }
    }
    out.write_all(b"]").ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use faaswap_protocol::Shape;
    use proptest::prelude::*;

    use super::*;

    fn tensor(dtype: DType, dims: &[u64]) -> Announced {
        let shape = Shape::new(dims).unwrap();
        let bytes = shape.size(dtype).unwrap().get();
        Announced { index: 0, name: "x".into(), dtype, shape, bytes }
    }

    fn floats(text: &str, dims: &[u64]) -> Result<Vec<f32>, String> {
        let bytes = read(text, &tensor(DType::F32, dims)).map_err(|e| e.to_string())?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }

    #[test]
    fn a_tensor_is_read_flat_or_nested_as_its_shape() {
        assert_eq!(floats("[1,2, 3.5 ,-4e0]", &[2, 2]), Ok(vec![1.0, 2.0, 3.5, -4.0]));
        assert_eq!(floats("[[1,2],[3,4]]", &[2, 2]), Ok(vec![1.0, 2.0, 3.0, 4.0]));
        assert_eq!(floats("[]", &[0, 4]), Ok(vec![]));
        assert_eq!(floats("[[],[]]", &[2, 0]), Ok(vec![]));
        assert_eq!(floats("[7]", &[]), Ok(vec![7.0]));
    }

    #[test]
    fn a_nesting_that_contradicts_the_shape_is_refused() {
        for (text, dims) in [
            ("[[1,2],[3,4],[5,6]]", &[2_u64, 3][..]),
            ("[[1,2,3],[4]]", &[2, 2]),
            ("[[[1]],2]", &[2]),
            ("[1,[2]]", &[2, 1]),
            ("[[1,2]]", &[2]),
            ("[[[[1]]]]", &[1, 1]),
            ("[1,2,3]", &[2]),
            ("7", &[]),
            ("null", &[1]),
        ] {
            let error = floats(text, dims).expect_err(text);
            assert!(error.contains("written flat or nested as its shape"), "{text}: {error}");
        }
    }

    #[test]
    fn a_value_that_is_not_of_the_type_is_named() {
        let error = |text, dtype| read(text, &tensor(dtype, &[1])).unwrap_err().to_string();
        assert_eq!(error("[1.5]", DType::I64), "the data of input 'x' holds 1.5, which is no INT64");
        assert_eq!(error("[256]", DType::U8), "the data of input 'x' holds 256, which is no UINT8");
        assert_eq!(error("[-1]", DType::U64), "the data of input 'x' holds -1, which is no UINT64");
        assert_eq!(error("[1e39]", DType::F32), "the data of input 'x' holds 1e39, which is no FP32");
        assert_eq!(error("[2]", DType::Bool), "the data of input 'x' holds 2, which is no BOOL");
        assert!(error("[\"1\"]", DType::F32).contains("holds a string"));
        assert!(error("[1]", DType::F16).contains("binary tensor extension"));
        assert!(error("[1]", DType::Bf16).contains("binary tensor extension"));
    }

    #[test]
    fn a_float_that_json_cannot_carry_is_pointed_to_binary() {
        let mut out = Vec::new();
        let error = write(&mut out, "y", DType::F32, &f32::NAN.to_le_bytes()).unwrap_err().to_string();
        assert!(error.contains("binary_data"), "{error}");
    }

    fn round_trip(dtype: DType, data: &[u8]) {
        let size = usize::try_from(dtype.size()).unwrap();
        let len = u64::try_from(data.len() / size).unwrap();
        let mut text = Vec::new();
        write(&mut text, "y", dtype, data).unwrap();
        let read = read(std::str::from_utf8(&text).unwrap(), &tensor(dtype, &[len])).unwrap();
        assert_eq!(&read[..], data, "{dtype}");
    }

    proptest! {
        #[test]
        fn integers_and_floats_survive_json_to_the_last_bit(
            i64s: Vec<i64>, u64s: Vec<u64>, f32s in prop::collection::vec(prop::num::f32::NORMAL | prop::num::f32::SUBNORMAL | prop::num::f32::ZERO, 0..50),
            f64s in prop::collection::vec(prop::num::f64::NORMAL | prop::num::f64::SUBNORMAL | prop::num::f64::ZERO, 0..50),
            u8s: Vec<u8>, bools: Vec<bool>,
        ) {
            round_trip(DType::I64, &i64s.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<_>>());
            round_trip(DType::U64, &u64s.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<_>>());
            round_trip(DType::F32, &f32s.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<_>>());
            round_trip(DType::F64, &f64s.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<_>>());
            round_trip(DType::U8, &u8s);
            round_trip(DType::I8, &u8s);
            round_trip(DType::Bool, &bools.iter().map(|&b| u8::from(b)).collect::<Vec<_>>());
        }

        #[test]
        fn no_text_makes_the_reader_panic(text in "[\\[\\]0-9eE.,+\\-tfn\" {}a]{0,40}", dims in prop::collection::vec(0_u64..4, 0..4)) {
            for dtype in DType::ALL {
                if let Ok(bytes) = read(&text, &tensor(dtype, &dims)) {
                    prop_assert_eq!(u64::try_from(bytes.len()).unwrap(), tensor(dtype, &dims).bytes);
                }
            }
        }
    }
}
