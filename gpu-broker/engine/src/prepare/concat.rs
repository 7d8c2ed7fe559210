//! Splits wide concatenations into trees: CUDA's kernel takes the places of more than a few inputs from the host's memory,
//! which a captured run must not.

use crate::onnx::{GraphProto, NodeProto};

/// Most inputs of one concatenation.
const INPUTS_MAX: usize = 32;

/// Splits every concatenation in the graph that has more than [`INPUTS_MAX`] inputs; bodies are not captured.
pub(super) fn split_wide(graph: &mut GraphProto) {
    let mut nodes = Vec::with_capacity(graph.node.len());
    for mut node in std::mem::take(&mut graph.node) {
        let is_concat = node.is("Concat");
        while is_concat && node.input.len() > INPUTS_MAX {
            let name = node.output.first().cloned().unwrap_or_default();
            let level = node.input.len();
            let parts = node.input.chunks(INPUTS_MAX).enumerate().map(|(index, inputs)| {
                let [input] = inputs else {
                    let output = format!("faaswap/concat/{level}/{index}/{name}");
                    let part = NodeProto {
                        name: Some(output.clone()),
                        input: inputs.to_vec(),
                        output: vec![output.clone()],
                        ..node.clone()
                    };
                    nodes.push(part);
                    return output;
                };
                input.clone()
            });
            node.input = parts.collect();
        }
        nodes.push(node);
    }
    graph.node = nodes;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wide_concatenation_becomes_a_tree_with_the_same_leaves_in_order() {
        let input: Vec<String> = (0..1100).map(|i| format!("x{i}")).collect();
        let wide = NodeProto {
            op_type: Some("Concat".to_owned()),
            input: input.clone(),
            output: vec!["y".to_owned()],
            ..NodeProto::default()
        };
        let mut graph = GraphProto { node: vec![wide], ..GraphProto::default() };
        split_wide(&mut graph);
        assert!(graph.node.iter().all(|node| node.input.len() <= INPUTS_MAX));
        let leaves = |name: &str| -> Vec<String> {
            fn walk(graph: &GraphProto, name: &str, leaves: &mut Vec<String>) {
                match graph.node.iter().find(|node| node.output[0] == name) {
                    Some(node) => node.input.iter().for_each(|input| walk(graph, input, leaves)),
                    None => leaves.push(name.to_owned()),
                }
            }
            let mut leaves = Vec::new();
            walk(&graph, name, &mut leaves);
            leaves
        };
        assert_eq!(leaves("y"), input);
    }
}
