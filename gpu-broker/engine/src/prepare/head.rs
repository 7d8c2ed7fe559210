//! A model's head: its first weights, which stay on the GPU with each function, so that a run begins before anything of the
//! rest is mapped or copied.
//!
//! A swap-in takes some 250 us until a program's first part can be launched (measured on an H100: waking a thread, queueing
//! copies, mapping memory). A convolutional network's first layers have few weights; how much of that time they fill depends
//! on how many kernels they are. The head stays in the graph, as small initializers do, so it is with what a function keeps anyway.

use std::collections::HashSet;

use super::order;
use crate::{
    limits::{HEAD_BYTES_MAX, HEAD_OF_BYTES_MAX, HEAD_ONE_IN},
    onnx::{self, GraphProto, NodeProto},
};

/// How many of the initializers, in order of first use, are the head.
pub(super) fn count(graph: &GraphProto, uses: &[usize]) -> usize {
    let len = |index: usize| {
        let tensor = &graph.initializer[index];
        onnx::data_len(tensor.data_type(), &tensor.dims).unwrap_or(u64::MAX)
    };
    let total = uses.iter().fold(0_u64, |sum, &index| sum.saturating_add(len(index)));
    if total > HEAD_OF_BYTES_MAX.get() {
        return 0;
    }
    let most = HEAD_BYTES_MAX.get().min(total / HEAD_ONE_IN);
    // Of the file as of a run: what has no place in the order of data may be run by another one.
    let in_run: Vec<_> = order::of_run(graph).into_iter().map(|at| &graph.node[at]).collect();
    let used = &used_first(&graph.node) & &used_first(in_run);
    let mut bytes = 0_u64;
    let fits = |index: &&usize| {
        bytes = bytes.saturating_add(len(**index));
        bytes <= most && used.contains(graph.initializer[**index].name())
    };
    uses.iter().take_while(fits).count()
}

/// What the first of these nodes read, up to one that may not come first.
fn used_first<'g>(nodes: impl IntoIterator<Item = &'g NodeProto>) -> HashSet<&'g str> {
    let first = nodes.into_iter().take_while(|node| may_come_first(node));
    first.flat_map(|node| node.input.iter().map(String::as_str)).collect()
}

/// Whether a node may run before the first Await: that is where matrix products get their workspace, which is part of
/// programs. Nodes with bodies may have products in them.
fn may_come_first(node: &NodeProto) -> bool {
    const PRODUCTS: [&str; 7] = ["MatMul", "Gemm", "Einsum", "Attention", "LSTM", "GRU", "RNN"];
    node.bodies().next().is_none() && !PRODUCTS.iter().any(|product| node.op_type().contains(product))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::{AttributeProto, TensorProto};

    const KIB: i64 = 256;

    /// Nodes of these types in a row, each with weights of so many KiB of `f32`.
    fn graph(nodes: &[(&str, i64)]) -> GraphProto {
        let mut graph = GraphProto::default();
        for (at, &(op_type, kib)) in nodes.iter().enumerate() {
            let name = format!("w{at}");
            graph.initializer.push(TensorProto {
                name: Some(name.clone()),
                data_type: Some(1),
                dims: vec![kib * KIB],
                ..TensorProto::default()
            });
            let input = vec![format!("x{at}"), name];
            let output = vec![format!("x{}", at + 1)];
            graph.node.push(NodeProto { op_type: Some(op_type.to_owned()), input, output, ..NodeProto::default() });
        }
        graph
    }

    fn head(nodes: &[(&str, i64)]) -> usize {
        count(&graph(nodes), &(0..nodes.len()).collect::<Vec<_>>())
    }

    #[test]
    fn first_convolutions_are_the_head_as_far_as_they_fit() {
        assert_eq!(head(&[("Conv", 36), ("NhwcFusedConv", 400), ("Add", 300), ("Conv", 100), ("Gemm", 40 << 10)]), 3);
        assert_eq!(head(&[("Conv", 36), ("Conv", 733), ("Conv", 1), ("Gemm", 40 << 10)]), 1, "768 KiB at most");
        assert_eq!(head(&[("Conv", 60), ("Conv", 60), ("Conv", 1_480)]), 1, "a sixteenth of all at most");
    }

    #[test]
    fn nothing_at_or_behind_a_product_is_in_the_head() {
        assert_eq!(head(&[("Conv", 36), ("FusedMatMul", 2), ("Conv", 2), ("Conv", 40 << 10)]), 1);
        let mut late = graph(&[("Conv", 36), ("Conv", 2), ("Conv", 40 << 10)]);
        let product = NodeProto { op_type: Some("MatMul".to_owned()), ..NodeProto::default() };
        late.node.insert(1, product);
        assert_eq!(count(&late, &[0, 1, 2]), 1, "a product of what is no weight counts too");
        let body = AttributeProto { g: Some(GraphProto::default()), ..AttributeProto::default() };
        late.node[1] = NodeProto { op_type: Some("If".to_owned()), attribute: vec![body], ..NodeProto::default() };
        assert_eq!(count(&late, &[0, 1, 2]), 1, "bodies may have some");
        // A branch that comes last in the file runs first.
        let mut joined = graph(&[("Conv", 36), ("Conv", 2), ("Conv", 40 << 10)]);
        let (input, output) = (vec!["x0".to_owned()], vec!["product".to_owned()]);
        let product = NodeProto { op_type: Some("MatMul".to_owned()), input, output, ..NodeProto::default() };
        joined.node.insert(2, product);
        assert_eq!(count(&joined, &[0, 1, 2]), 2, "nobody reads it");
        joined.node[3].input.push("product".to_owned());
        assert_eq!(count(&joined, &[0, 1, 2]), 0, "it runs before all");
    }

    #[test]
    fn large_models_have_no_head() {
        assert_eq!(head(&[("Conv", 36), ("Conv", (128 << 10) - 36)]), 1);
        assert_eq!(head(&[("Conv", 36), ("Conv", (128 << 10) - 35)]), 0);
        assert_eq!(count(&GraphProto::default(), &[]), 0);
    }
}
