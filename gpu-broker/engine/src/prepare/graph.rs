//! Questions about a graph that several steps of preparation ask: what a node reads, what a body captures.

use std::collections::{HashMap, HashSet};

use crate::onnx::{GraphProto, NodeProto, TensorProto};

/// A graph's nodes and constants by the names of what they give.
pub(super) struct View<'g> {
    pub(super) producers: HashMap<&'g str, &'g NodeProto>,
    /// Each as often as it reads the value.
    pub(super) readers: HashMap<&'g str, Vec<&'g NodeProto>>,
    pub(super) constants: HashMap<&'g str, &'g TensorProto>,
    /// What bodies read, or the graph gives.
    pub(super) kept: HashSet<&'g str>,
}

impl<'g> View<'g> {
    pub(super) fn of(graph: &'g GraphProto) -> Self {
        let mut readers: HashMap<&str, Vec<&NodeProto>> = HashMap::new();
        for node in &graph.node {
            node.input.iter().for_each(|name| readers.entry(name).or_default().push(node));
        }
        let given = graph.node.iter().flat_map(|node| node.output.iter().map(move |name| (name.as_str(), node)));
        let read_inside = graph.node.iter().flat_map(NodeProto::bodies).flat_map(captured);
        Self {
            producers: given.collect(),
            readers,
            constants: graph.initializer.iter().map(|tensor| (tensor.name(), tensor)).collect(),
            kept: read_inside.chain(graph.output.iter().map(|value| value.name())).collect(),
        }
    }

    /// The only reader of a value.
    pub(super) fn reader(&self, name: &str) -> Option<&'g NodeProto> {
        let [reader] = self.readers.get(name)?[..] else { return None };
        (!self.kept.contains(name)).then_some(reader)
    }

    /// The producer of a value that nobody else reads, if it is one of these.
    pub(super) fn only(&self, name: &str, ops: &[&str]) -> Option<&'g NodeProto> {
        self.reader(name)?;
        self.producers.get(name).copied().filter(|node| ops.contains(&node.op_type()))
    }
}

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

/// Drops nodes that nobody reads any more, and constants that only these have read.
pub(super) fn drop_unused(graph: &mut GraphProto) {
    let mut wanted: HashSet<String> = graph.output.iter().map(|value| value.name().to_owned()).collect();
    let mut kept: Vec<_> = std::mem::take(&mut graph.node).into_iter().rev().collect();
    // Nodes lie behind what they read.
    kept.retain(|node| {
        let is_read = node.output.iter().any(|name| wanted.contains(name));
        if is_read {
            wanted.extend(reads(node).map(str::to_owned));
        }
        is_read
    });
    kept.reverse();
    graph.node = kept;
    // A default of an input is no constant.
    wanted.extend(graph.input.iter().map(|value| value.name().to_owned()));
    graph.initializer.retain(|tensor| wanted.contains(tensor.name()));
}
