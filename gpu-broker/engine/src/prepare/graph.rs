//! Questions about a graph that several steps of preparation ask: what a node reads, what a body captures.

use std::collections::{HashMap, HashSet};

use crate::onnx::{GraphProto, NodeProto};

/// The names that a body reads from the graphs around it.
pub(crate) fn captured(body: &GraphProto) -> HashSet<&str> {
    let mut defined: HashSet<&str> = body.input.iter().map(|value| value.name()).collect();
    defined.extend(body.initializer.iter().map(|tensor| tensor.name()));
    defined.extend(body.node.iter().flat_map(|node| node.output.iter().map(String::as_str)));
    let mut read: HashSet<&str> = body.node.iter().flat_map(reads).collect();
    read.extend(body.output.iter().map(|value| value.name()));
    read.retain(|name| !name.is_empty() && !defined.contains(name));
    read
}

/// Everything that must be there before the node can start: its inputs and what its bodies capture.
pub(super) fn reads(node: &NodeProto) -> impl Iterator<Item = &str> {
    let inputs = node.input.iter().map(String::as_str).filter(|name| !name.is_empty());
    inputs.chain(node.bodies().flat_map(captured))
}

/// Number of nodes, bodies included.
pub(super) fn count_nodes(graph: &GraphProto) -> usize {
    graph.node.iter().map(|node| 1 + node.bodies().map(count_nodes).sum::<usize>()).sum()
}

/// A node on a cycle, where there is one, in the graph or in any of its bodies.
pub(super) fn find_cycle(graph: &GraphProto) -> Option<&NodeProto> {
    let producer: HashMap<&str, usize> = (graph.node.iter().enumerate())
        .flat_map(|(i, node)| node.output.iter().filter(|name| !name.is_empty()).map(move |name| (name.as_str(), i)))
        .collect();
    let mut consumers = vec![Vec::new(); graph.node.len()];
    let mut waiting_for = vec![0_usize; graph.node.len()];
    for (i, node) in graph.node.iter().enumerate() {
        let before: HashSet<usize> = reads(node).filter_map(|name| producer.get(name).copied()).collect();
        waiting_for[i] = before.len();
        before.into_iter().for_each(|j| consumers[j].push(i));
    }
    let mut ready: Vec<usize> = (0..graph.node.len()).filter(|&i| waiting_for[i] == 0).collect();
    let mut done = 0;
    while let Some(i) = ready.pop() {
        done += 1;
        for &next in &consumers[i] {
            waiting_for[next] -= 1;
            if waiting_for[next] == 0 {
                ready.push(next);
            }
        }
    }
    if done < graph.node.len() {
        return (0..graph.node.len()).find(|&i| waiting_for[i] > 0).map(|i| &graph.node[i]);
    }
    graph.node.iter().flat_map(NodeProto::bodies).find_map(find_cycle)
}
