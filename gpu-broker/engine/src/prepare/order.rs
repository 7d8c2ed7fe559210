//! The order in which ONNX Runtime runs a graph's nodes, which is not that of the file: where branches come together, the one that comes
//! last in the file runs first. Weights lie in the order of their first use, so that a run waits for none that it needs later.
//!
//! It is a depth-first search from the nodes whose outputs nobody reads, against the edges, where what comes last in the file goes first
//! (its `GraphViewer`'s default order, seen alike on five models of convolutions with 1.32, two of them with 1.31.1). Were it another order, runs would wait
//! longer, and be as right: Await nodes follow data (`awaits.rs`).

use std::collections::{BTreeSet, HashMap};

use super::graph::reads;
use crate::onnx::GraphProto;

/// The places of the graph's nodes in the order in which they run. What is on a cycle comes last.
pub(super) fn of_run(graph: &GraphProto) -> Vec<usize> {
    let named =
        |at: usize| graph.node[at].output.iter().filter(|name| !name.is_empty()).map(move |name| (name.as_str(), at));
    let producers: HashMap<&str, usize> = (0..graph.node.len()).flat_map(named).collect();
    let before = |node| reads(node).filter_map(|name| producers.get(name).copied()).collect();
    let before: Vec<BTreeSet<usize>> = graph.node.iter().map(before).collect();
    let read: BTreeSet<usize> = before.iter().flatten().copied().collect();
    let mut stack: Vec<_> = (0..before.len()).filter(|at| !read.contains(at)).map(|at| (at, false)).collect();
    let (mut seen, mut order) = (vec![false; before.len()], Vec::with_capacity(before.len()));
    while let Some((at, is_left)) = stack.pop() {
        if is_left {
            order.push(at);
        } else if !std::mem::replace(&mut seen[at], true) {
            stack.push((at, true));
            stack.extend(before[at].iter().map(|&at| (at, false)));
        }
    }
    order.extend((0..before.len()).filter(|&at| !seen[at]));
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::NodeProto;

    /// Nodes as `outputs = inputs`, names of one letter.
    fn graph(nodes: &[&str]) -> GraphProto {
        let names = |text: &str| text.chars().map(String::from).collect();
        let node = |text: &&str| {
            let (output, input) = text.split_once('=').expect("each has both");
            NodeProto { output: names(output), input: names(input), ..NodeProto::default() }
        };
        GraphProto { node: nodes.iter().map(node).collect(), ..GraphProto::default() }
    }

    #[test]
    fn of_branches_the_last_runs_first() {
        // As an Inception block: of 1, of 2 and of 1 node, joined.
        assert_eq!(of_run(&graph(&["a=x", "b=a", "c=a", "d=c", "e=a", "f=bde"])), [0, 4, 2, 3, 1, 5]);
        // As a residual one, with a convolution beside.
        assert_eq!(of_run(&graph(&["a=x", "b=a", "c=b", "d=a", "e=cd", "f=e"])), [0, 3, 1, 2, 4, 5]);
    }

    #[test]
    fn nodes_in_a_row_run_in_a_row_and_each_once_what_ever_there_is() {
        assert_eq!(of_run(&graph(&["a=x", "b=ax", "c=ab"])), [0, 1, 2]);
        assert_eq!(of_run(&graph(&["a=x", "b=y"])), [1, 0], "two ends");
        assert_eq!(of_run(&graph(&["a=xb", "b=a", "c=x"])), [2, 0, 1], "a cycle");
        assert!(of_run(&graph(&[])).is_empty());
    }
}
