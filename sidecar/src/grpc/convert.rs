//! Between the messages of the protocol and the shared core's terms.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use faaswap_protocol::{DType, Signature, TensorSpec, limits::TENSORS_MAX};

use super::inference::{
    InferBatchStatistics, InferStatistics, InferTensorContents, MemoryUsage, ModelConfig, ModelInferRequest,
    ModelInferResponse, ModelInput, ModelMetadataResponse, ModelOutput, ModelStatistics, RepositoryIndexResponse,
    StatisticDuration, infer_parameter::ParameterChoice, model_infer_request::InferInputTensor,
    model_infer_response::InferOutputTensor, model_metadata_response::TensorMetadata,
    repository_index_response::ModelIndex,
};
use crate::{
    broker::{InferAnswer, InferRequest, TensorInput},
    failure::{Failure, invalid},
    http::views,
    infer::{
        Function, MODEL_VERSION, PLATFORM,
        check::{self, Announced},
        stats::Reading,
    },
};

/// Checks a request against the model.
pub fn request(signature: &Signature, message: ModelInferRequest) -> Result<InferRequest, Failure> {
    let ModelInferRequest { inputs, outputs, raw_input_contents: raw, parameters, model_name, .. } = message;
    if inputs.len().max(outputs.len()) > TENSORS_MAX {
        return invalid(format!("a request has at most {TENSORS_MAX} inputs and {TENSORS_MAX} outputs"));
    }
    let announced = inputs.iter().map(|input| announce(signature, input)).collect::<Result<Vec<_>, _>>()?;
    check::complete(signature, &announced)?;
    let data = if raw.is_empty() {
        let typed = inputs.iter().zip(&announced);
        typed.map(|(input, announced)| typed_data(announced, input.contents.as_ref())).collect::<Result<Vec<_>, _>>()?
    } else {
        if let Some(both) = inputs.iter().find(|input| input.contents.is_some()) {
            return invalid(format!(
                "contents field must not be specified when using raw_input_contents for '{}' for model '{model_name}'",
                both.name
            ));
        }
        if raw.len() != inputs.len() {
            return invalid(format!("expected {} raw inputs but got {}", inputs.len(), raw.len()));
        }
        raw
    };
    let tensors = announced.into_iter().zip(data).map(|(announced, data)| {
        announced.expect_bytes(data.len())?;
        check::binary(&announced, &data)?;
        let Announced { index, dtype, shape, .. } = announced;
        Ok(TensorInput { index, dtype, shape, data: vec![data] })
    });
    let inputs = tensors.collect::<Result<_, Failure>>()?;
    let mut indices = Vec::with_capacity(outputs.len());
    for output in &outputs {
        let index = check::output(signature, &output.name)?;
        if indices.contains(&index) {
            return invalid(format!("output '{}' is asked for twice", output.name));
        }
        if output.parameters.contains_key("classification") || output.parameters.contains_key("shared_memory_region") {
            return invalid(format!(
                "output '{}' asks for classification or shared memory, which are not supported",
                output.name
            ));
        }
        indices.push(index);
    }
    let timeout = match parameters.get("timeout").and_then(|parameter| parameter.parameter_choice.as_ref()) {
        Some(ParameterChoice::Int64Param(us)) => u64::try_from(*us).ok(),
        Some(ParameterChoice::Uint64Param(us)) => Some(*us),
        Some(ParameterChoice::BoolParam(_) | ParameterChoice::StringParam(_) | ParameterChoice::DoubleParam(_)) => {
            return invalid("parameter 'timeout' is a whole number of microseconds");
        }
        None => None,
    };
    Ok(InferRequest { inputs, outputs: indices, timeout: timeout.filter(|&us| us > 0).map(Duration::from_micros) })
}

fn announce(signature: &Signature, input: &InferInputTensor) -> Result<Announced, Failure> {
    if input.parameters.contains_key("shared_memory_region") {
        return invalid(format!("input '{}' names a shared memory region, which is not supported", input.name));
    }
    check::input(signature, &input.name, &input.datatype, &input.shape)
}

/// The bytes of an input that came as numbers.
fn typed_data(announced: &Announced, contents: Option<&InferTensorContents>) -> Result<Bytes, Failure> {
    let none = InferTensorContents::default();
    let contents = contents.unwrap_or(&none);
    let Announced { name, dtype, .. } = announced;
    let mut out =
        BytesMut::with_capacity(usize::try_from(announced.bytes).unwrap_or(0).min(size_of_contents(contents)));
    let narrow = |number: &dyn std::fmt::Display| {
        Failure::Invalid(format!("the contents of input '{name}' hold {number}, which is no {dtype}"))
    };
    let field = match dtype {
        DType::Bool => {
            contents.bool_contents.iter().for_each(|&b| out.put_u8(u8::from(b)));
            contents.bool_contents.len()
        }
        DType::I8 => {
            for n in &contents.int_contents {
                out.put_i8(i8::try_from(*n).map_err(|_| narrow(n))?);
            }
            contents.int_contents.len()
        }
        DType::I16 => {
            for n in &contents.int_contents {
                out.put_i16_le(i16::try_from(*n).map_err(|_| narrow(n))?);
            }
            contents.int_contents.len()
        }
        DType::I32 => {
            contents.int_contents.iter().for_each(|&n| out.put_i32_le(n));
            contents.int_contents.len()
        }
        DType::I64 => {
            contents.int64_contents.iter().for_each(|&n| out.put_i64_le(n));
            contents.int64_contents.len()
        }
        DType::U8 => {
            for n in &contents.uint_contents {
                out.put_u8(u8::try_from(*n).map_err(|_| narrow(n))?);
            }
            contents.uint_contents.len()
        }
        DType::U16 => {
            for n in &contents.uint_contents {
                out.put_u16_le(u16::try_from(*n).map_err(|_| narrow(n))?);
            }
            contents.uint_contents.len()
        }
        DType::U32 => {
            contents.uint_contents.iter().for_each(|&n| out.put_u32_le(n));
            contents.uint_contents.len()
        }
        DType::U64 => {
            contents.uint64_contents.iter().for_each(|&n| out.put_u64_le(n));
            contents.uint64_contents.len()
        }
        DType::F32 => {
            contents.fp32_contents.iter().for_each(|&n| out.put_f32_le(n));
            contents.fp32_contents.len()
        }
        DType::F64 => {
            contents.fp64_contents.iter().for_each(|&n| out.put_f64_le(n));
            contents.fp64_contents.len()
        }
        DType::F16 | DType::Bf16 => {
            return invalid(format!("input '{name}' is {dtype}: send it in raw_input_contents"));
        }
    };
    let all = values(contents);
    if field != all {
        return invalid(format!("the contents of input '{name}' hold {all} values of which {field} are {dtype}"));
    }
    Ok(out.freeze())
}

fn values(contents: &InferTensorContents) -> usize {
    contents.bool_contents.len()
        + contents.int_contents.len()
        + contents.int64_contents.len()
        + contents.uint_contents.len()
        + contents.uint64_contents.len()
        + contents.fp32_contents.len()
        + contents.fp64_contents.len()
        + contents.bytes_contents.len()
}

fn size_of_contents(contents: &InferTensorContents) -> usize {
    values(contents).saturating_mul(8)
}

/// The answer as a message: tensors as raw bytes, in the order asked for.
pub fn response(
    model_name: &str,
    id: String,
    signature: &Signature,
    answer: InferAnswer,
) -> Result<ModelInferResponse, Failure> {
    let mut outputs = Vec::with_capacity(answer.outputs.len());
    let mut raw = Vec::with_capacity(answer.outputs.len());
    for tensor in answer.outputs {
        let Some(spec) = signature.outputs.get(usize::from(tensor.index)) else {
            return Err(Failure::Internal(format!(
                "the broker gave an output {} that the model has not",
                tensor.index
            )));
        };
        outputs.push(InferOutputTensor {
            name: spec.name.clone(),
            datatype: tensor.dtype.oip().to_owned(),
            shape: tensor.shape.dims().iter().map(|&dim| i64::try_from(dim).unwrap_or(i64::MAX)).collect(),
            ..Default::default()
        });
        raw.push(tensor.data);
    }
    Ok(ModelInferResponse {
        model_name: model_name.to_owned(),
        model_version: MODEL_VERSION.to_owned(),
        id,
        outputs,
        raw_output_contents: raw,
        ..Default::default()
    })
}

/// The model's metadata.
pub fn metadata(name: String, signature: &Signature) -> ModelMetadataResponse {
    let tensors = |specs: &[TensorSpec]| {
        let view = |spec: &TensorSpec| TensorMetadata {
            name: spec.name.clone(),
            datatype: spec.dtype.oip().to_owned(),
            shape: views::dims(spec),
        };
        specs.iter().map(view).collect::<Vec<_>>()
    };
    ModelMetadataResponse {
        name,
        versions: vec![MODEL_VERSION.to_owned()],
        platform: PLATFORM.to_owned(),
        inputs: tensors(&signature.inputs),
        outputs: tensors(&signature.outputs),
    }
}

/// The model's configuration, as far as clients read it.
pub fn config(name: String, signature: &Signature) -> ModelConfig {
    let data_type = |spec: &TensorSpec| views::config_type(spec.dtype).into();
    let input =
        |spec: &TensorSpec| ModelInput { name: spec.name.clone(), data_type: data_type(spec), dims: views::dims(spec) };
    let output = |spec: &TensorSpec| ModelOutput {
        name: spec.name.clone(),
        data_type: data_type(spec),
        dims: views::dims(spec),
    };
    ModelConfig {
        name,
        platform: PLATFORM.to_owned(),
        max_batch_size: 0,
        input: signature.inputs.iter().map(input).collect(),
        output: signature.outputs.iter().map(output).collect(),
        backend: views::BACKEND.to_owned(),
    }
}

/// The list of models with their states.
pub fn index(function: &Function, ready_only: bool) -> RepositoryIndexResponse {
    let line = views::index(function);
    let shown = !ready_only || line.state == "READY";
    let line = ModelIndex {
        name: line.name.to_owned(),
        version: line.version.to_owned(),
        state: line.state.to_owned(),
        reason: line.reason,
    };
    RepositoryIndexResponse { models: shown.then_some(line).into_iter().collect() }
}

/// The model's statistics; see `views::stats`.
pub fn statistics(function: &Function) -> ModelStatistics {
    let totals = function.stats.read();
    let duration = |reading: Reading| Some(StatisticDuration { count: reading.count, ns: reading.ns });
    let none = duration(Reading::default());
    let batch = InferBatchStatistics {
        batch_size: 1,
        compute_input: none,
        compute_infer: duration(totals.infer),
        compute_output: none,
    };
    let weights = function.broker().and_then(crate::broker::Broker::known).map(|known| known.weights.get());
    ModelStatistics {
        name: function.model_name.clone(),
        version: MODEL_VERSION.to_owned(),
        last_inference: totals.last_ms,
        inference_count: totals.success.count,
        execution_count: totals.success.count,
        inference_stats: Some(InferStatistics {
            success: duration(totals.success),
            fail: duration(totals.fail),
            queue: duration(totals.queue),
            compute_input: none,
            compute_infer: duration(totals.infer),
            compute_output: none,
            cache_hit: none,
            cache_miss: none,
        }),
        batch_stats: if totals.success.count > 0 { vec![batch] } else { Vec::new() },
        memory_usage: weights
            .map(|byte_size| MemoryUsage { r#type: "CPU".to_owned(), id: 0, byte_size })
            .into_iter()
            .collect(),
        response_stats: std::collections::HashMap::new(),
    }
}
