//! Puts one operator in the place of those that attention is exported as: two products, a scale, a mask, a softmax, and transposes.
//!
//! A GPU does it as one kernel then, which never writes the products of queries and keys to memory ("Self-attention Does Not Need
//! O(n^2) Memory", Rabe and Staats, 2021; "FlashAttention", Dao and others, 2022). ONNX Runtime has these kernels as `MultiHeadAttention`, and puts
//! them into graphs of a few exporters by itself; here it is done wherever the graph says the same in these operators:
//!
//! ```text
//! q ─ Reshape ─ Transpose 0,2,1,3 ─┐
//! k ─ Reshape ─ Transpose 0,2,3,1 ─┴ [Fused]MatMul ─ [Add bias] ─ Softmax ─┐
//! v ─ Reshape ─ Transpose 0,2,1,3 ──────────────────────────────────────────┴ MatMul ─ Transpose 0,2,1,3 ─ Reshape
//! ```
//!
//! where the reshapes' shapes are constants: for each other number of rows cuDNN may make a kernel when it comes. PyTorch's
//! exporter puts zeros where a softmax has given no numbers, because a mask has hidden all keys of a row: then the row is made zero
//! afterwards, where there may be such a row. What is not recognized stays as it is.

mod rewrite;
mod view;

use faaswap_protocol::DType;

use self::rewrite::Rewrite;
use super::{
    graph::{self, View},
    types,
};
use crate::onnx::{GraphProto, ModelProto, NodeProto, OperatorSetIdProto};

const DOMAIN: &str = "com.microsoft";
const OPERATOR: &str = "MultiHeadAttention";
/// How the names of what is added here begin.
const OURS: &str = "faaswap/attention";

/// Fuses what is recognized in the graph, not in its bodies, of those element types that it is worth it for. Returns how many
/// attentions that is.
pub fn fuse(model: &mut ModelProto, worth_it: impl Fn(DType) -> bool) -> usize {
    let opset = model.opset();
    let Some(graph) = &mut model.graph else { return 0 };
    let found: Vec<_> = {
        let (view, types) = (View::of(graph), types::of_values(graph));
        let is_worth_it = |found: &Attention| types.get(&found.output).is_some_and(|&dtype| worth_it(dtype));
        let found = graph.node.iter().enumerate();
        found.filter_map(|(at, node)| Some((at, view.attention(node).filter(&is_worth_it)?))).collect()
    };
    let count = found.len();
    if count > 0 {
        Rewrite::new(opset).all(graph, found);
        graph::drop_unused(graph);
        if !model.opset_import.iter().any(|import| import.domain() == DOMAIN) {
            let (domain, version) = (Some(DOMAIN.to_owned()), Some(1));
            model.opset_import.push(OperatorSetIdProto { domain, version });
        }
    }
    count
}

/// How many attentions were fused in a graph.
pub(super) fn count(graph: &GraphProto) -> usize {
    let is_ours = |node: &&NodeProto| node.op_type() == OPERATOR && node.name().starts_with(OURS);
    graph.node.iter().filter(is_ours).count()
}

/// One attention, by the names of its values.
#[derive(Clone, Debug, PartialEq)]
struct Attention {
    /// Queries, keys and values as (batch, row, head, size).
    inputs: [String; 3],
    heads: i64,
    /// Rows of queries.
    rows: i64,
    scale: f32,
    /// What is added to the scaled products.
    bias: Option<String>,
    /// What is given for rows that see no key, where there may be such.
    zero: Option<String>,
    /// What it gives, as (batch, row, head, size).
    output: String,
}
