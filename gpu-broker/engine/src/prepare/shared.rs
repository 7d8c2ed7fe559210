//! Which inputs and outputs kernels may use right where they are, in memory that a peer can still write.
//!
//! A peer that changes a tensor while a kernel reads it must be able to spoil its own result and nothing else. That holds
//! for kernels that only compute on values; it does not for those that sort, compare and search, or take values as
//! positions. So an input is read in place only when every node that sees its memory is known to compute only.

use crate::{
    await_op,
    onnx::{GraphProto, NodeProto},
};

/// Operators whose kernels compute on float inputs and choose no address by their values.
const COMPUTE_ONLY: &[&str] = &[
    "Abs",
    "Add",
    "AveragePool",
    "BatchNormalization",
    "Cast",
    "Ceil",
    "Clip",
    "Concat",
    "Conv",
    "ConvTranspose",
    "Cos",
    "Div",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "FusedConv",
    "FusedGemm",
    "FusedMatMul",
    "Gelu",
    "Gemm",
    "GlobalAveragePool",
    "HardSigmoid",
    "HardSwish",
    "InstanceNormalization",
    "LayerNormalization",
    "LeakyRelu",
    "Log",
    "MatMul",
    "Mul",
    "Neg",
    "Pad",
    "Pow",
    "QuantizeLinear",
    "QuickGelu",
    "Reciprocal",
    "ReduceMean",
    "ReduceSum",
    "Relu",
    "ReorderInput",
    "Sigmoid",
    "Sin",
    "Slice",
    "Softmax",
    "Split",
    "Sqrt",
    "Sub",
    "Tanh",
    "Transpose",
];
/// Operators whose output may be the very memory of their first input.
const VIEWS: &[&str] = &["Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"];
/// Where the operators of both lists come from.
const DOMAINS: &[&str] = &["", "ai.onnx", "com.microsoft", "com.microsoft.nchwc"];

/// For each name, whether all kernels that see its memory compute only.
pub(super) fn inputs_in_place<'a>(graph: &GraphProto, names: impl Iterator<Item = &'a str>) -> Vec<bool> {
    names.map(|name| is_computed_only(graph, name)).collect()
}

/// For each name, whether no node reads it.
pub(super) fn outputs_in_place<'a>(graph: &GraphProto, names: impl Iterator<Item = &'a str>) -> Vec<bool> {
    names.map(|name| !graph.node.iter().any(|node| super::graph::reads(node).any(|read| read == name))).collect()
}

fn is_computed_only(graph: &GraphProto, name: &str) -> bool {
    let mut shared = vec![name];
    let mut seen = 0;
    while let Some(&value) = shared.get(seen) {
        seen += 1;
        for node in &graph.node {
            if node.bodies().any(|body| super::graph::captured(body).contains(value)) {
                return false;
            }
            if !node.input.iter().any(|input| input == value) {
                continue;
            }
            match kind(node) {
                Kind::View => shared.extend(node.output.iter().map(String::as_str).filter(|out| !out.is_empty())),
                Kind::Computes => {}
                Kind::Other => return false,
            }
        }
    }
    true
}

enum Kind {
    View,
    Computes,
    Other,
}

fn kind(node: &NodeProto) -> Kind {
    if await_op::is_await(node) {
        return Kind::View;
    }
    let known = DOMAINS.contains(&node.domain()) && node.bodies().next().is_none();
    match node.op_type() {
        op if known && VIEWS.contains(&op) => Kind::View,
        op if known && COMPUTE_ONLY.contains(&op) => Kind::Computes,
        _ => Kind::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(op: &str, input: &str, output: &str) -> NodeProto {
        NodeProto {
            op_type: Some(op.to_owned()),
            input: vec![input.to_owned()],
            output: vec![output.to_owned()],
            ..NodeProto::default()
        }
    }

    #[test]
    fn an_input_that_is_sorted_behind_a_view_is_not_read_in_place() {
        let nodes =
            vec![node("Reshape", "x", "r"), node("TopK", "r", "t"), node("Conv", "y", "c"), node("TopK", "c", "d")];
        let graph = GraphProto { node: nodes, ..GraphProto::default() };
        assert_eq!(inputs_in_place(&graph, ["x", "y", "unused"].into_iter()), [false, true, true]);
        assert_eq!(outputs_in_place(&graph, ["c", "d"].into_iter()), [false, true]);
    }
}
