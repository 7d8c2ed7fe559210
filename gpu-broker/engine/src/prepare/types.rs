//! Element types of the values between nodes, which optimized graphs do not state.
//!
//! Only for operators whose rule is known; what is not known stays unknown. A wrong guess cannot give a wrong answer:
//! ONNX Runtime checks every type when the prepared model is opened for its trial.

use std::collections::HashMap;

use faaswap_protocol::DType;

use crate::onnx::{self, AttributeProto, GraphProto, NodeProto};

/// Operators whose outputs have the type of their first input. Convolutions and the like are so in every domain.
const LIKE_FIRST: &[&str] = &[
    "Abs",
    "Add",
    "Attention",
    "AveragePool",
    "BatchNormalization",
    "BiasGelu",
    "Ceil",
    "Celu",
    "Clip",
    "Concat",
    "Conv",
    "ConvTranspose",
    "Cos",
    "CumSum",
    "DepthToSpace",
    "Div",
    "Einsum",
    "Elu",
    "EmbedLayerNormalization",
    "Erf",
    "Exp",
    "Expand",
    "FastGelu",
    "Flatten",
    "Floor",
    "FusedConv",
    "FusedGemm",
    "FusedMatMul",
    "GRU",
    "Gather",
    "GatherElements",
    "GatherND",
    "Gelu",
    "Gemm",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "GroupNormalization",
    "GroupQueryAttention",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "InstanceNormalization",
    "LRN",
    "LSTM",
    "LayerNormalization",
    "LeakyRelu",
    "Log",
    "LogSoftmax",
    "LpNormalization",
    "MatMul",
    "MatMulNBits",
    "Max",
    "MaxPool",
    "Mean",
    "Min",
    "Mish",
    "Mod",
    "Mul",
    "MultiHeadAttention",
    "Neg",
    "PRelu",
    "Pad",
    "Pow",
    "QuickGelu",
    "RNN",
    "Range",
    "Reciprocal",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
    "Relu",
    "ReorderInput",
    "ReorderOutput",
    "Reshape",
    "Resize",
    "RotaryEmbedding",
    "Round",
    "ScatterElements",
    "ScatterND",
    "Selu",
    "Sigmoid",
    "Sign",
    "SimplifiedLayerNormalization",
    "Sin",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    "Slice",
    "Softmax",
    "Softplus",
    "Softsign",
    "SpaceToDepth",
    "Split",
    "Sqrt",
    "Squeeze",
    "Sub",
    "Sum",
    "Tanh",
    "ThresholdedRelu",
    "Tile",
    "Transpose",
    "Trilu",
    "Unsqueeze",
    "Upsample",
];
/// Operators whose inputs are all of one type, so that one tells the others.
const ALIKE: &[&str] = &[
    "Add",
    "BiasGelu",
    "Concat",
    "Conv",
    "ConvTranspose",
    "Div",
    "FusedConv",
    "FusedGemm",
    "FusedMatMul",
    "Gemm",
    "LayerNormalization",
    "MatMul",
    "Mul",
    "PRelu",
    "SkipLayerNormalization",
    "Sub",
];
const BOOLEAN: &[&str] =
    &["And", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Not", "Or", "Xor"];
const COUNTS: &[&str] = &["ArgMax", "ArgMin", "NonMaxSuppression", "NonZero", "Shape", "Size"];
const SUMS_OF_INTEGERS: &[&str] = &["ConvInteger", "MatMulInteger"];

/// The types that a graph states: of its inputs, outputs and constants, and of what else it has.
pub(super) fn stated(graph: &GraphProto) -> HashMap<String, DType> {
    let values = graph.value_info.iter().chain(&graph.input).chain(&graph.output);
    let values = values.filter_map(|value| Some((value.name().to_owned(), onnx::dtype_of(value.tensor_element()?)?)));
    let given = graph.initializer.iter();
    let given = given.filter_map(|tensor| Some((tensor.name().to_owned(), onnx::dtype_of(tensor.data_type())?)));
    values.chain(given).collect()
}

/// The types of all values of a graph, as far as they are known.
pub(super) fn of_values(graph: &GraphProto) -> HashMap<String, DType> {
    let mut known = stated(graph);
    for node in &graph.node {
        let given = outputs(node, |name| known.get(name).copied());
        let given = node.output.iter().zip(given).filter_map(|(name, dtype)| Some((name.clone(), dtype?)));
        known.extend(given.collect::<Vec<_>>());
    }
    known
}

/// The type of this input where the node's other inputs tell it.
pub(super) fn input(node: &NodeProto, known: impl Fn(&str) -> Option<DType>) -> Option<DType> {
    ALIKE.contains(&node.op_type()).then(|| node.input.iter().find_map(|name| known(name))).flatten()
}

/// The types of the node's outputs, in order, as far as they are known.
pub(super) fn outputs(node: &NodeProto, known: impl Fn(&str) -> Option<DType>) -> Vec<Option<DType>> {
    let at = |input: usize| node.input.get(input).and_then(|name| known(name));
    let all = |dtype: Option<DType>| vec![dtype; node.output.len()];
    match node.op_type() {
        op if LIKE_FIRST.contains(&op) => like_first(node, at(0).or_else(|| input(node, &known))),
        op if BOOLEAN.contains(&op) => all(Some(DType::Bool)),
        op if COUNTS.contains(&op) => all(Some(DType::I64)),
        op if SUMS_OF_INTEGERS.contains(&op) => all(Some(DType::I32)),
        "Cast" => all(attribute(node, "to").and_then(|to| onnx::dtype_of(i32::try_from(to.i?).ok()?))),
        "ConstantOfShape" => all(match attribute(node, "value") {
            Some(value) => value.t.as_ref().and_then(|tensor| onnx::dtype_of(tensor.data_type())),
            None => Some(DType::F32),
        }),
        "Constant" => {
            let value = attribute(node, "value").and_then(|value| value.t.as_ref());
            all(value.and_then(|tensor| onnx::dtype_of(tensor.data_type())))
        }
        "Where" | "CastLike" | "DequantizeLinear" => all(at(1)),
        "OneHot" | "QuantizeLinear" => all(at(2)),
        "QLinearConv" | "QLinearMatMul" => all(at(7)),
        "Dropout" | "TopK" => {
            let second = if node.op_type() == "TopK" { DType::I64 } else { DType::Bool };
            vec![at(0), Some(second)]
        }
        "DynamicQuantizeLinear" => vec![Some(DType::U8), Some(DType::F32), Some(DType::U8)],
        "If" => of_body(node),
        _ => all(None),
    }
}

/// Some of them have further outputs, such as the statistics of a normalization: only the first is certain.
fn like_first(node: &NodeProto, dtype: Option<DType>) -> Vec<Option<DType>> {
    let all_alike = matches!(node.op_type(), "Split" | "LSTM" | "GRU" | "RNN");
    (0..node.output.len()).map(|i| dtype.filter(|_| i == 0 || all_alike)).collect()
}

fn of_body(node: &NodeProto) -> Vec<Option<DType>> {
    let Some(body) = node.bodies().next() else { return Vec::new() };
    body.output.iter().map(|value| onnx::dtype_of(value.tensor_element()?)).collect()
}

fn attribute<'n>(node: &'n NodeProto, name: &str) -> Option<&'n AttributeProto> {
    node.attribute.iter().find(|attribute| attribute.name() == name)
}
