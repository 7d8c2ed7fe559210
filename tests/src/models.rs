//! Small ONNX models made from a seed, for tests and benchmarks that need a certain shape rather than a real task.

use std::{fs, path::Path};

use faaswap_engine::onnx::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, TensorShapeProto, TypeProto,
    ValueInfoProto,
    attribute_proto::AttributeType,
    element_of,
    tensor_shape_proto::{Dimension, dimension},
    type_proto,
};
use faaswap_protocol::DType;
use prost::Message;

use crate::{Result, random::Random};

/// Side of the square image that [`conv`] takes.
pub const IMAGE_SIDE: u64 = 224;
/// Size of that image: 3 planes of fp32.
pub const IMAGE_BYTES: u64 = 3 * IMAGE_SIDE * IMAGE_SIDE * 4;
/// Outputs of [`conv`].
const CLASSES: u64 = 10;
/// Channels of its middle layers.
const CHANNELS: u64 = 8;

const _: () = assert!(IMAGE_BYTES == 602_112, "the size that the latency figures speak of");

/// A node.
pub fn node(op: &str, inputs: &[&str], output: &str) -> NodeProto {
    NodeProto {
        op_type: Some(op.to_owned()),
        name: Some(format!("{op}:{output}")),
        input: inputs.iter().map(|&name| name.to_owned()).collect(),
        output: vec![output.to_owned()],
        ..NodeProto::default()
    }
}

/// The same node with a list of integers as an attribute.
#[must_use]
pub fn with_ints(mut node: NodeProto, name: &str, values: &[i64]) -> NodeProto {
    let (name, ints) = (Some(name.to_owned()), values.to_vec());
    node.attribute.push(AttributeProto { name, r#type: Some(AttributeType::Ints.into()), ints, ..Default::default() });
    node
}

/// A named value; negative dimensions are open.
pub fn value(name: &str, dtype: DType, dims: &[i64]) -> ValueInfoProto {
    let dim = |&dim: &i64| {
        let open = || dimension::Value::DimParam(format!("{name}_{}", -dim));
        let value = if dim < 0 { open() } else { dimension::Value::DimValue(dim) };
        Dimension { value: Some(value), denotation: None }
    };
    let shape = Some(TensorShapeProto { dim: dims.iter().map(dim).collect() });
    let kind = type_proto::Value::TensorType(type_proto::Tensor { elem_type: Some(element_of(dtype)), shape });
    let r#type = Some(TypeProto { value: Some(kind), denotation: None });
    ValueInfoProto { name: Some(name.to_owned()), r#type, ..Default::default() }
}

/// An initializer of small made-up floats.
pub fn weight(name: &str, dims: &[u64], random: &mut Random) -> TensorProto {
    let elements: u64 = dims.iter().product();
    let data: Vec<u8> = (0..elements).flat_map(|_| (random.signed() * 0.1).to_le_bytes()).collect();
    TensorProto {
        name: Some(name.to_owned()),
        data_type: Some(element_of(DType::F32)),
        dims: dims.iter().filter_map(|&dim| i64::try_from(dim).ok()).collect(),
        raw_data: Some(data.into()),
        ..Default::default()
    }
}

/// A whole model.
pub fn model(
    nodes: Vec<NodeProto>,
    inputs: Vec<ValueInfoProto>,
    outputs: Vec<ValueInfoProto>,
    weights: Vec<TensorProto>,
) -> ModelProto {
    let name = Some("made".to_owned());
    let graph =
        GraphProto { name, node: nodes, input: inputs, output: outputs, initializer: weights, ..Default::default() };
    let opset = OperatorSetIdProto { domain: Some(String::new()), version: Some(17) };
    ModelProto { ir_version: Some(9), opset_import: vec![opset], graph: Some(graph), ..Default::default() }
}

/// `y = x · w`, where x is `[-1, size]` and w is `[size, size]`: `4 · size²` bytes of weights.
pub fn matmul(size: u64, seed: u64) -> ModelProto {
    let side = i64::try_from(size).unwrap_or(i64::MAX);
    model(
        vec![node("MatMul", &["x", "w"], "y")],
        vec![value("x", DType::F32, &[-1, side])],
        vec![value("y", DType::F32, &[-1, side])],
        vec![weight("w", &[size, size], &mut Random::new(seed))],
    )
}

/// So many `MatMul`s one after the other over `[-1, size]`: the first can run while the weights of the last arrive.
pub fn matmul_chain(size: u64, layers: u64, seed: u64) -> ModelProto {
    let side = i64::try_from(size).unwrap_or(i64::MAX);
    let mut random = Random::new(seed);
    let weights = (0..layers).map(|i| weight(&format!("w{i}"), &[size, size], &mut random)).collect();
    let name = |i: u64| match i {
        0 => "x".to_owned(),
        i if i == layers => "y".to_owned(),
        i => format!("h{i}"),
    };
    let nodes = (0..layers).map(|i| node("MatMul", &[&name(i), &format!("w{i}")], &name(i + 1))).collect();
    let (x, y) = (value("x", DType::F32, &[-1, side]), value("y", DType::F32, &[-1, side]));
    model(nodes, vec![x], vec![y], weights)
}

/// A small classifier of one image of [`IMAGE_BYTES`]: two convolutions with strides, a mean, a matrix.
pub fn conv(seed: u64) -> ModelProto {
    let mut random = Random::new(seed);
    let conv = |inputs: &[&str], output: &str, stride: i64| {
        let node = with_ints(node("Conv", inputs, output), "kernel_shape", &[3, 3]);
        with_ints(with_ints(node, "strides", &[stride, stride]), "pads", &[1, 1, 1, 1])
    };
    let side = i64::try_from(IMAGE_SIDE).unwrap_or(i64::MAX);
    let classes = i64::try_from(CLASSES).unwrap_or(i64::MAX);
    model(
        vec![
            conv(&["x", "w1"], "c1", 4),
            node("Relu", &["c1"], "r1"),
            conv(&["r1", "w2"], "c2", 2),
            node("Relu", &["c2"], "r2"),
            node("GlobalAveragePool", &["r2"], "p"),
            node("Flatten", &["p"], "f"),
            node("MatMul", &["f", "w3"], "y"),
        ],
        vec![value("x", DType::F32, &[1, 3, side, side])],
        vec![value("y", DType::F32, &[1, classes])],
        vec![
            weight("w1", &[CHANNELS, 3, 3, 3], &mut random),
            weight("w2", &[CHANNELS, CHANNELS, 3, 3], &mut random),
            weight("w3", &[CHANNELS, CLASSES], &mut random),
        ],
    )
}

/// `y = x + x` for every element type that ONNX Runtime can add on the processor: no weights, nothing to swap.
pub fn doubled(dtype: DType, len: i64) -> ModelProto {
    let (x, y) = (value("x", dtype, &[len]), value("y", dtype, &[len]));
    model(vec![node("Add", &["x", "x"], "y")], vec![x], vec![y], Vec::new())
}

/// The same model where every open dimension of its inputs and outputs is `size`.
#[must_use]
pub fn fixed(mut model: ModelProto, size: i64) -> ModelProto {
    let graph = model.graph.get_or_insert_default();
    for value in graph.input.iter_mut().chain(&mut graph.output) {
        let Some(type_proto::Value::TensorType(tensor)) = value.r#type.as_mut().and_then(|t| t.value.as_mut()) else {
            continue;
        };
        for dim in tensor.shape.iter_mut().flat_map(|shape| &mut shape.dim) {
            if matches!(dim.value, Some(dimension::Value::DimParam(_))) {
                dim.value = Some(dimension::Value::DimValue(size));
            }
        }
    }
    model
}

/// Folders with a model each, as `tests/gpu/export.py` makes them, but small: some MB of weights, some milliseconds a run.
pub fn write_tiny(folder: &Path) -> Result<()> {
    let models = [
        ("conv-fp32", conv(1)),
        ("wide-fp32", fixed(matmul_chain(768, 2, 2), 1)),
        ("deep-fp32", fixed(matmul_chain(256, 12, 3), 1)),
        ("bert_tiny-fp32", fixed(matmul_chain(512, 12, 4), 1)),
    ];
    for (name, model) in models {
        fs::create_dir_all(folder.join(name))?;
        write(&model, &folder.join(name).join("model.onnx"))?;
    }
    Ok(())
}

/// Writes a model to a file.
pub fn write(model: &ModelProto, path: &Path) -> Result<()> {
    Ok(fs::write(path, model.encode_to_vec())?)
}
