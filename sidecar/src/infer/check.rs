//! Checks a request's tensors against the model's signature, and says what was expected and what came.
//!
//! The broker checks again: it trusts no sidecar. Here it is done for the sake of clear errors.

use faaswap_protocol::{DType, Shape, Signature, TensorSpec};

use crate::failure::{Failure, invalid};

/// One input as a request announces it, fit for the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announced {
    /// Position among the model's inputs.
    pub index: u16,
    /// Its name, for messages.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Dimensions.
    pub shape: Shape,
    /// Size of its data.
    pub bytes: u64,
}

impl Announced {
    /// Checks that so many bytes came for it.
    pub fn expect_bytes(&self, came: usize) -> Result<(), Failure> {
        if u64::try_from(came) == Ok(self.bytes) {
            return Ok(());
        }
        let Self { name, dtype, shape, bytes, .. } = self;
        invalid(format!(
            "unexpected total byte size {came} for input '{name}', expecting {bytes} for {dtype} of shape {shape}"
        ))
    }
}

/// Checks one input's name, type and shape.
pub fn input(signature: &Signature, name: &str, datatype: &str, dims: &[i64]) -> Result<Announced, Failure> {
    let found = signature.inputs.iter().enumerate().find(|(_, spec)| spec.name == name);
    let Some((index, spec)) = found else {
        return invalid(format!("unexpected inference input '{name}': the model takes {}", named(&signature.inputs)));
    };
    let Some(dtype) = DType::from_oip(datatype).filter(|&dtype| dtype == spec.dtype) else {
        return invalid(format!(
            "inference input '{name}' data-type is '{datatype}', but the model expects '{}'",
            spec.dtype
        ));
    };
    let shape = shape(name, dims)?;
    if !spec.accepts(&shape) {
        return invalid(format!("unexpected shape for input '{name}': expected {}, got {shape}", dims_text(spec)));
    }
    let bytes = size(name, &shape, dtype)?;
    Ok(Announced { index: index_of(index)?, name: name.to_owned(), dtype, shape, bytes })
}

/// Checks bytes that came as they are: a BOOL is 0 or 1, anything else would be undefined to the kernels.
pub fn binary(announced: &Announced, data: &[u8]) -> Result<(), Failure> {
    if announced.dtype == DType::Bool
        && let Some(byte) = data.iter().find(|&&byte| byte > 1)
    {
        return invalid(format!("input '{}' is BOOL and holds the byte {byte}, expected 0 or 1", announced.name));
    }
    Ok(())
}

/// The single input of a model, for a request that is nothing but its bytes.
pub fn only_input(signature: &Signature, body_len: usize) -> Result<Announced, Failure> {
    let [spec] = &signature.inputs[..] else {
        return invalid(format!(
            "a raw binary request (Inference-Header-Content-Length: 0) needs a model with one input, this one has {}: {}",
            signature.inputs.len(),
            named(&signature.inputs)
        ));
    };
    let name = &spec.name;
    let mut open = None;
    let mut dims = Vec::with_capacity(spec.dims.len());
    let mut known = spec.dtype.size();
    for (at, dim) in spec.dims.iter().enumerate() {
        match dim {
            faaswap_protocol::Dim::Fixed(n) => {
                known = known.saturating_mul(*n);
                dims.push(*n);
            }
            // The first dimension is the batch, which is one, unless it is the only one that is open.
            faaswap_protocol::Dim::Any => {
                if let Some(batch @ 0) = open {
                    dims[batch] = 1;
                } else if open.is_some() {
                    return invalid(format!(
                        "a raw binary request can leave one dimension open, input '{name}' has more: {}",
                        dims_text(spec)
                    ));
                }
                open = Some(at);
                dims.push(0);
            }
        }
    }
    let came = faaswap_protocol::Bytes::of_len(body_len).get();
    if let Some(at) = open {
        if known == 0 || !came.is_multiple_of(known) {
            return invalid(format!(
                "unexpected total byte size {came} for input '{name}', expecting a multiple of {known} for {} {}",
                spec.dtype,
                dims_text(spec)
            ));
        }
        dims[at] = came / known;
    }
    let shape = Shape::new(dims).map_err(|e| Failure::Invalid(format!("input '{name}': {e}")))?;
    let bytes = size(name, &shape, spec.dtype)?;
    let announced = Announced { index: 0, name: name.clone(), dtype: spec.dtype, shape, bytes };
    announced.expect_bytes(body_len)?;
    Ok(announced)
}

/// Checks that each input of the model came, and came once.
pub fn complete(signature: &Signature, inputs: &[Announced]) -> Result<(), Failure> {
    let mut came = vec![false; signature.inputs.len()];
    for input in inputs {
        let Some(slot) = came.get_mut(usize::from(input.index)) else {
            return Err(Failure::Internal(format!("input {} is none of the model's", input.index)));
        };
        if std::mem::replace(slot, true) {
            return invalid(format!("input '{}' is given twice", input.name));
        }
    }
    let missing: Vec<_> =
        signature.inputs.iter().zip(&came).filter(|(_, came)| !**came).map(|(spec, _)| spec.to_string()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    invalid(format!(
        "expected {} inputs but got {}; missing: {}",
        signature.inputs.len(),
        inputs.len(),
        missing.join(", ")
    ))
}

/// Positions of the outputs with these names.
pub fn output(signature: &Signature, name: &str) -> Result<u16, Failure> {
    match signature.outputs.iter().position(|spec| spec.name == name) {
        Some(index) => index_of(index),
        None => invalid(format!("unexpected inference output '{name}': the model gives {}", named(&signature.outputs))),
    }
}

fn shape(name: &str, dims: &[i64]) -> Result<Shape, Failure> {
    let sizes = dims.iter().map(|&dim| u64::try_from(dim)).collect::<Result<Vec<_>, _>>();
    let Ok(sizes) = sizes else {
        return invalid(format!("input '{name}' has the shape {dims:?}: a dimension is 0 or more"));
    };
    Shape::new(sizes).map_err(|error| Failure::Invalid(format!("input '{name}' has the shape {dims:?}: {error}")))
}

fn size(name: &str, shape: &Shape, dtype: DType) -> Result<u64, Failure> {
    let size = shape.size(dtype).map_err(|error| Failure::Invalid(format!("input '{name}' of shape {shape}: {error}")));
    Ok(size?.get())
}

fn index_of(index: usize) -> Result<u16, Failure> {
    u16::try_from(index).map_err(|_| Failure::Internal("more tensors than a model can have".to_owned()))
}

fn named(specs: &[TensorSpec]) -> String {
    specs.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn dims_text(spec: &TensorSpec) -> String {
    let dims: Vec<_> = spec.dims.iter().map(ToString::to_string).collect();
    format!("[{}]", dims.join(","))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use faaswap_protocol::Dim;

    use super::*;

    fn signature() -> Signature {
        let spec = |name: &str, dims: &[Dim]| TensorSpec { name: name.into(), dtype: DType::F32, dims: dims.into() };
        Signature { inputs: vec![spec("x", &[Dim::Any, Dim::Fixed(4)])], outputs: vec![spec("y", &[Dim::Any])] }
    }

    fn text<T: std::fmt::Debug>(result: Result<T, Failure>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn an_error_says_what_was_expected_and_what_came() {
        let sig = signature();
        assert_eq!(
            text(input(&sig, "z", "FP32", &[1, 4])),
            "unexpected inference input 'z': the model takes x FP32[-1,4]"
        );
        assert_eq!(
            text(input(&sig, "x", "INT8", &[1, 4])),
            "inference input 'x' data-type is 'INT8', but the model expects 'FP32'"
        );
        assert_eq!(
            text(input(&sig, "x", "FP32", &[1, 5])),
            "unexpected shape for input 'x': expected [-1,4], got [1,5]"
        );
        assert!(text(input(&sig, "x", "FP32", &[-1, 4])).contains("a dimension is 0 or more"));
        assert!(text(input(&sig, "x", "FP32", &[i64::MAX, 4])).contains("overflows"));
        let x = input(&sig, "x", "FP32", &[2, 4]).unwrap();
        assert_eq!(
            text(x.expect_bytes(31)),
            "unexpected total byte size 31 for input 'x', expecting 32 for FP32 of shape [2,4]"
        );
        assert_eq!(text(complete(&sig, &[])), "expected 1 inputs but got 0; missing: x FP32[-1,4]");
        assert_eq!(text(complete(&sig, &[x.clone(), x])), "input 'x' is given twice");
        assert_eq!(text(output(&sig, "q")), "unexpected inference output 'q': the model gives y FP32[-1]");
    }

    #[test]
    fn a_raw_request_fills_the_open_dimension() {
        let sig = signature();
        assert_eq!(only_input(&sig, 48).unwrap().shape.dims(), [3, 4]);
        assert!(text(only_input(&sig, 47)).contains("expecting a multiple of 16"));
    }

    #[test]
    fn a_raw_request_has_batch_one_when_two_dimensions_are_open() {
        let spec = TensorSpec { name: "x".into(), dtype: DType::U8, dims: vec![Dim::Any, Dim::Any] };
        let sig = Signature { inputs: vec![spec], outputs: vec![] };
        assert_eq!(only_input(&sig, 5).unwrap().shape.dims(), [1, 5]);
    }
}
