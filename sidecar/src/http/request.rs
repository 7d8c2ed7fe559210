//! Reads an infer request: JSON, JSON with binary tensors behind it, or nothing but a tensor.
//!
//! Binary tensors are cut out of the body's pieces, never copied. Everything that the client gets wrong is said in
//! terms of what was expected and what came.

use std::{borrow::Cow, time::Duration};

use bytes::Bytes;
use faaswap_protocol::{DType, Signature, limits::TENSORS_MAX};
use http::HeaderMap;

use super::{
    json_data,
    request_json::{Head, Input, Output},
    rest::{self, Rest},
};
use crate::{
    broker::{InferRequest, TensorInput},
    failure::{Failure, invalid},
    infer::check::{self, Announced},
};

/// Length of the JSON in front of binary tensors.
pub const HEADER_LENGTH: &str = "inference-header-content-length";

/// A request that fits the model.
#[derive(Debug)]
pub struct Parsed {
    /// For the broker.
    pub request: InferRequest,
    /// Comes back in the reply.
    pub id: Option<String>,
    /// Which outputs the reply has, and whether as binary data.
    pub outputs: Vec<WantedOutput>,
}

/// One output of the reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WantedOutput {
    /// Position among the model's outputs.
    pub index: u16,
    /// As binary data behind the JSON.
    pub binary: bool,
}

/// The length of the JSON in front of binary tensors, as the client says it; absent: the whole body is JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderLength(Option<Result<usize, String>>);

impl HeaderLength {
    /// As the headers say it.
    pub fn of(headers: &HeaderMap) -> Self {
        Self(headers.get(HEADER_LENGTH).map(|value| {
            let text = value.to_str().unwrap_or("unreadable").trim();
            let is_number = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            text.parse().ok().filter(|_| is_number).ok_or_else(|| text.to_owned())
        }))
    }

    /// The number, where there is a sensible one.
    pub fn announced(&self) -> Option<usize> {
        self.0.as_ref()?.as_ref().ok().copied()
    }

    /// The number, if the body reaches that far.
    pub fn within(&self, body_len: usize) -> Result<Option<usize>, Failure> {
        let wrong = |got: &dyn std::fmt::Display| {
            invalid(format!("inference header size should be in range (0, {body_len}), got: {got}"))
        };
        match &self.0 {
            None => Ok(None),
            Some(Ok(len)) if *len <= body_len => Ok(Some(*len)),
            Some(Ok(len)) => wrong(len),
            Some(Err(text)) => wrong(text),
        }
    }
}

/// Reads a whole body. `pieces` are already unpacked.
pub fn parse(signature: &Signature, header: &HeaderLength, pieces: Vec<Bytes>) -> Result<Parsed, Failure> {
    let len = pieces.iter().map(Bytes::len).sum::<usize>();
    match header.within(len)? {
        None => plan(signature, &rest::join(pieces))?.fill(Rest::default()),
        Some(0) => plan_raw(signature, len)?.fill(Rest::new(pieces)),
        Some(json_len) => {
            let mut rest = Rest::new(pieces);
            let json = rest.take_joined(json_len)?;
            plan(signature, &json)?.fill(rest)
        }
    }
}

/// A request whose binary tensors have not been looked at.
#[derive(Debug)]
pub struct Plan {
    inputs: Vec<(Announced, Source)>,
    id: Option<String>,
    outputs: Vec<WantedOutput>,
    /// For the broker; empty: all.
    indices: Vec<u16>,
    timeout: Option<Duration>,
}

/// Where the bytes of an input come from.
#[derive(Debug)]
pub enum Source {
    /// They were in the JSON.
    Json(Bytes),
    /// They follow behind it.
    Body,
}

impl Plan {
    /// The inputs in the order in which their bytes follow.
    pub fn inputs(&self) -> &[(Announced, Source)] {
        &self.inputs
    }

    /// Sizes of all inputs.
    pub fn lens(&self) -> impl Iterator<Item = u64> {
        self.inputs.iter().map(|(announced, _)| announced.bytes)
    }

    /// Checks that just the right number of bytes came behind the JSON.
    pub fn expect_rest(&self, came: usize) -> Result<(), Failure> {
        let follow = |(announced, source): &(Announced, Source)| match source {
            Source::Body => announced.bytes,
            Source::Json(_) => 0,
        };
        let wanted: u64 = self.inputs.iter().map(follow).sum();
        let came = faaswap_protocol::Bytes::of_len(came).get();
        if came < wanted {
            return invalid(format!("{wanted} bytes of binary data were announced and {came} came"));
        }
        if came > wanted {
            return invalid(format!(
                "unexpected additional input data: {} bytes are left over after the last input",
                came - wanted
            ));
        }
        Ok(())
    }

    /// Takes the tensors out of the rest of the body.
    pub fn fill(self, mut rest: Rest) -> Result<Parsed, Failure> {
        self.expect_rest(rest.len())?;
        let mut data = Vec::with_capacity(self.inputs.len());
        for (announced, source) in &self.inputs {
            data.push(match source {
                Source::Json(bytes) => vec![bytes.clone()],
                Source::Body => {
                    let pieces = rest.take(usize::try_from(announced.bytes).unwrap_or(usize::MAX))?;
                    pieces.iter().try_for_each(|piece| check::binary(announced, piece))?;
                    pieces
                }
            });
        }
        Ok(self.with_data(data.into_iter()))
    }

    /// For inputs that lie in the slab already.
    pub fn without_data(self) -> Parsed {
        self.with_data(std::iter::repeat_with(Vec::new))
    }

    fn with_data(self, data: impl Iterator<Item = Vec<Bytes>>) -> Parsed {
        let tensor = |((announced, _), data)| {
            let Announced { index, dtype, shape, .. } = announced;
            TensorInput { index, dtype, shape, data }
        };
        let inputs = self.inputs.into_iter().zip(data).map(tensor).collect();
        let request = InferRequest { inputs, outputs: self.indices, timeout: self.timeout };
        Parsed { request, id: self.id, outputs: self.outputs }
    }
}

/// A request that is nothing but the bytes of the model's only input.
pub fn plan_raw(signature: &Signature, len: usize) -> Result<Plan, Failure> {
    let inputs = vec![(check::only_input(signature, len)?, Source::Body)];
    let outputs = every_output(signature, true)?;
    Ok(Plan { inputs, id: None, outputs, indices: Vec::new(), timeout: None })
}

/// Reads the JSON of a request.
pub fn plan(signature: &Signature, json: &[u8]) -> Result<Plan, Failure> {
    // An array would be taken for the fields in their order.
    if json.trim_ascii_start().first() == Some(&b'[') {
        return invalid("failed to parse the request JSON: expected an object, got an array");
    }
    let head: Head<'_> = serde_json::from_slice(json).map_err(|error| explain(json, &error))?;
    let Some(inputs) = head.inputs else {
        return invalid("the request has no 'inputs'");
    };
    if inputs.len() > TENSORS_MAX {
        return invalid(format!("the request has {} inputs, at most {TENSORS_MAX} are allowed", inputs.len()));
    }
    let announced = inputs.iter().map(|input| announce(signature, input)).collect::<Result<Vec<_>, _>>()?;
    check::complete(signature, &announced)?;
    let inputs = inputs.iter().zip(announced).map(|(input, announced)| {
        let source = source_of(input, &announced)?;
        Ok((announced, source))
    });
    let inputs = inputs.collect::<Result<_, Failure>>()?;
    let parameters = head.parameters.unwrap_or_default();
    let outputs = wanted(signature, head.outputs.as_deref(), parameters.binary_data_output.unwrap_or(false))?;
    let indices = match head.outputs {
        Some(_) => outputs.iter().map(|output| output.index).collect(),
        None => Vec::new(),
    };
    let timeout = parameters.timeout.filter(|&us| us > 0).map(Duration::from_micros);
    Ok(Plan { inputs, id: head.id.filter(|id| !id.is_empty()).map(Cow::into_owned), outputs, indices, timeout })
}

fn announce(signature: &Signature, input: &Input<'_>) -> Result<Announced, Failure> {
    let dims: Vec<_> = input.shape.iter().map(|dim| dim.0).collect();
    check::input(signature, &input.name, &input.datatype, &dims)
}

fn source_of(input: &Input<'_>, announced: &Announced) -> Result<Source, Failure> {
    let name = &input.name;
    let parameters = input.parameters.as_ref();
    let binary = parameters.and_then(|parameters| parameters.binary_data_size);
    if parameters.is_some_and(|parameters| parameters.shared_memory_region.is_some()) {
        return invalid(format!("input '{name}' names a shared memory region, which is not supported"));
    }
    let only_one = |but: &str| {
        invalid(format!(
            "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', \
             'shared_memory_region' in 'parameters'. But {but} for input '{name}'"
        ))
    };
    match (input.data, binary) {
        (Some(_), Some(_)) => only_one("both 'data' and 'binary_data_size' are set"),
        (None, None) => only_one("none is set"),
        (Some(json), None) => json_data::read(json.get(), announced).map(Source::Json),
        (None, Some(size)) => {
            announced.expect_bytes(usize::try_from(size).unwrap_or(usize::MAX))?;
            Ok(Source::Body)
        }
    }
}

fn wanted(
    signature: &Signature,
    outputs: Option<&[Output<'_>]>,
    binary_by_default: bool,
) -> Result<Vec<WantedOutput>, Failure> {
    let Some(outputs) = outputs else {
        return every_output(signature, binary_by_default);
    };
    if outputs.len() > TENSORS_MAX {
        return invalid(format!("the request has {} outputs, at most {TENSORS_MAX} are allowed", outputs.len()));
    }
    let mut all: Vec<WantedOutput> = Vec::with_capacity(outputs.len());
    for Output { name, parameters } in outputs {
        let index = check::output(signature, name)?;
        if all.iter().any(|other| other.index == index) {
            return invalid(format!("output '{name}' is asked for twice"));
        }
        let parameters = parameters.as_ref();
        if parameters.is_some_and(|p| p.classification.is_some() || p.shared_memory_region.is_some()) {
            return invalid(format!(
                "output '{name}' asks for classification or shared memory, which are not supported"
            ));
        }
        let binary = parameters.and_then(|p| p.binary_data).unwrap_or(binary_by_default);
        all.push(carried(signature, index, binary)?);
    }
    if all.is_empty() { every_output(signature, binary_by_default) } else { Ok(all) }
}

fn every_output(signature: &Signature, binary: bool) -> Result<Vec<WantedOutput>, Failure> {
    let count = u16::try_from(signature.outputs.len()).unwrap_or(u16::MAX);
    (0..count).map(|index| carried(signature, index, binary)).collect()
}

/// Refuses, before anything runs, an output that the reply could not carry.
fn carried(signature: &Signature, index: u16, binary: bool) -> Result<WantedOutput, Failure> {
    match signature.outputs.get(usize::from(index)) {
        Some(spec) if !binary && matches!(spec.dtype, DType::F16 | DType::Bf16) => {
            Err(json_data::no_json(&spec.name, spec.dtype))
        }
        Some(_) | None => Ok(WantedOutput { index, binary }),
    }
}

/// Says what is wrong with text that is no request; NaN and infinities are the mistake that people make most.
fn explain(json: &[u8], error: &serde_json::Error) -> Failure {
    let line = json.split(|&b| b == b'\n').nth(error.line().saturating_sub(1)).unwrap_or_default();
    let at = error.column().saturating_sub(1).min(line.len());
    let around = line.get(at.saturating_sub(9)..(at + 9).min(line.len())).unwrap_or_default();
    let has = |word: &[u8]| around.windows(word.len()).any(|window| window == word);
    if error.is_syntax() && (has(b"NaN") || has(b"Inf")) {
        return Failure::Invalid(format!(
            "JSON has no NaN or Infinity (line {} column {}): send the tensor with the binary tensor extension",
            error.line(),
            error.column()
        ));
    }
    Failure::Invalid(format!("failed to parse the request JSON: {error}"))
}
