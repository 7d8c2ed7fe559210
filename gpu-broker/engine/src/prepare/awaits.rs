//! Puts Await nodes into a graph, so that no node touches weights that are not there yet.
//!
//! Every value has a *level*: so many groups have been awaited once the value exists. A node that uses a later group
//! than its inputs' level gets an Await in front of one of its inputs. Levels follow data, not the order in which nodes happen to run, so
//! the promise holds for every order that a runtime may choose. `check` proves it independently.
//!
//! How long a run waits does depend on the order (`order.rs`). So nodes are looked at as they run, for one Await does for all that is
//! behind it. It stands in the file behind the node whose output it hands on, and waits on the input that is made last: then nodes run in
//! the same order with it as without, and nothing that could run before is behind it.

use std::{
    collections::{BTreeSet, HashMap},
    iter,
};

use faaswap_protocol::DType;

use super::{graph::captured, order, types};
use crate::{
    await_op,
    onnx::{AttributeProto, GraphProto, NodeProto},
};

/// What was put in.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Placed {
    /// How many Await nodes.
    pub(super) count: u32,
    /// Of which element types.
    pub(super) types: BTreeSet<DType>,
    /// The last group that must be there before the run starts, because some node that uses it has no tensor to wait on.
    pub(super) before_run: Option<u32>,
}

/// Puts Await nodes into the graph. `group_of` names each late-bound initializer's group.
pub(super) fn place(graph: &mut GraphProto, group_of: &HashMap<String, u32>) -> Placed {
    let mut placer = Placer { group_of, placed: Placed::default() };
    placer.graph(graph, None, 0);
    placer.placed
}

struct Placer<'a> {
    group_of: &'a HashMap<String, u32>,
    placed: Placed,
}

/// What is known of the values of one graph. Bodies see those of the graphs around them.
struct Scope<'p> {
    outer: Option<&'p Self>,
    level: HashMap<String, u32>,
    dtype: HashMap<String, DType>,
    /// The Await output that stands for a value already, and its level.
    awaited: HashMap<String, (String, u32)>,
    /// Behind so many nodes of the file a value of this graph is there; 0 where it is there before all.
    there: HashMap<String, usize>,
    /// The Await nodes, each with how many nodes of the file are before it.
    nodes: Vec<(usize, NodeProto)>,
}

impl<'p> Scope<'p> {
    fn new(graph: &GraphProto, outer: Option<&'p Self>, base: u32) -> Self {
        let level = graph.input.iter().map(|value| (value.name().to_owned(), base));
        let fixed = graph.initializer.iter().map(|tensor| (tensor.name().to_owned(), 0));
        let made = |(at, node): (usize, &NodeProto)| {
            node.output.iter().map(move |name| (name.clone(), at + 1)).collect::<Vec<_>>()
        };
        Self {
            outer,
            level: level.chain(fixed).collect(),
            dtype: types::stated(graph),
            awaited: HashMap::new(),
            there: graph.node.iter().enumerate().flat_map(made).collect(),
            nodes: Vec::new(),
        }
    }

    fn level(&self, name: &str) -> u32 {
        match (self.level.get(name), self.outer) {
            (Some(&level), _) => level,
            (None, Some(outer)) => outer.level(name),
            (None, None) => 0,
        }
    }

    fn there(&self, name: &str) -> usize {
        self.there.get(name).copied().unwrap_or(0)
    }

    fn dtype(&self, name: &str) -> Option<DType> {
        self.dtype.get(name).copied().or_else(|| self.outer?.dtype(name))
    }
}

impl Placer<'_> {
    /// Level that a node needs for its own inputs: one more than the last group among them.
    fn need(&self, node: &NodeProto) -> u32 {
        node.input.iter().filter_map(|name| self.group_of.get(name)).map(|group| group + 1).max().unwrap_or(0)
    }

    fn graph(&mut self, graph: &mut GraphProto, outer: Option<&Scope<'_>>, base: u32) {
        let mut scope = Scope::new(graph, outer, base);
        for at in order::of_run(graph) {
            let node = &mut graph.node[at];
            let inputs = node.input.iter().map(|name| scope.level(name));
            let bodies = node.bodies().flat_map(captured).map(|name| scope.level(name));
            let mut have = inputs.chain(bodies).max().unwrap_or(0).max(base);
            let need = self.need(node);
            if need > have {
                self.cover(node, need, &mut scope);
                have = need;
            }
            for body in node.bodies_mut() {
                self.graph(body, Some(&scope), have);
            }
            scope.level.extend(node.output.iter().map(|name| (name.clone(), have)));
            let types = types::outputs(node, |name| scope.dtype(name));
            let typed = node.output.iter().zip(types);
            scope.dtype.extend(typed.filter_map(|(name, dtype)| Some((name.clone(), dtype?))));
        }
        let mut awaits = scope.nodes;
        awaits.sort_by_key(|&(behind, _)| behind);
        let mut awaits = awaits.into_iter().peekable();
        for (before, node) in std::mem::take(&mut graph.node).into_iter().enumerate() {
            graph.node.extend(iter::from_fn(|| awaits.next_if(|&(behind, _)| behind == before)).map(|(_, node)| node));
            graph.node.push(node);
        }
    }

    /// Makes the node wait for `need` groups through one of its inputs.
    fn cover(&mut self, node: &mut NodeProto, need: u32, scope: &mut Scope<'_>) {
        let awaited =
            node.input.iter().position(|name| scope.awaited.get(name).is_some_and(|(_, level)| *level >= need));
        if let Some(input) = awaited {
            let awaited = scope.awaited[&node.input[input]].0.clone();
            node.input[input] = awaited;
            return;
        }
        let Some((input, dtype)) = self.best_input(node, scope) else {
            self.placed.before_run = self.placed.before_run.max(Some(need - 1));
            return;
        };
        let value = node.input[input].clone();
        let output = format!("faaswap/await/{}", self.placed.count);
        self.placed.count += 1;
        self.placed.types.insert(dtype);
        scope.level.insert(output.clone(), need);
        scope.dtype.insert(output.clone(), dtype);
        scope.nodes.push((scope.there(&value), await_node(&value, &output, dtype, need - 1)));
        scope.awaited.insert(value, (output.clone(), need));
        node.input[input] = output;
    }

    /// The input to wait on: computed values before weights, because an Await on a weight depends on nothing, and a
    /// runtime may do it first, before anything else has run; f32 before others, so that few kinds of Await are needed; what comes first
    /// in the file, which the runtime makes last.
    fn best_input(&self, node: &NodeProto, scope: &Scope<'_>) -> Option<(usize, DType)> {
        let inputs = node.input.iter().enumerate().filter(|(_, name)| !name.is_empty());
        let told = types::input(node, |name| scope.dtype(name));
        let typed = inputs.filter_map(|(i, name)| Some((i, name, scope.dtype(name).or(told)?)));
        let cost = |name: &str, dtype: DType| (self.group_of.contains_key(name), dtype != DType::F32);
        typed.min_by_key(|&(i, name, dtype)| (cost(name, dtype), scope.there(name), i)).map(|(i, _, dtype)| (i, dtype))
    }
}

fn await_node(input: &str, output: &str, dtype: DType, group: u32) -> NodeProto {
    NodeProto {
        input: vec![input.to_owned()],
        output: vec![output.to_owned()],
        name: Some(output.to_owned()),
        op_type: Some(await_op::op_type(dtype).to_owned()),
        domain: Some(await_op::DOMAIN.to_owned()),
        attribute: vec![AttributeProto::of_int(await_op::GROUP, i64::from(group))],
        ..NodeProto::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::TensorProto;

    /// Nodes as `outputs = inputs`, names of one letter; capitals are weights, each a group, in the order of their names.
    fn placed(nodes: &[&str]) -> (GraphProto, Placed) {
        let names = |text: &str| text.chars().map(String::from).collect::<Vec<_>>();
        let mut graph = GraphProto::default();
        for text in nodes {
            let (output, input) = text.split_once('=').expect("each has both");
            let (output, input) = (names(output), names(input));
            graph.node.push(NodeProto { op_type: Some("Add".to_owned()), output, input, ..NodeProto::default() });
        }
        let weights = nodes.iter().flat_map(|node| node.chars()).filter(char::is_ascii_uppercase);
        let weights: BTreeSet<String> = weights.map(String::from).collect();
        let group_of = (0..).zip(&weights).map(|(group, name)| (name.clone(), group)).collect();
        let tensor =
            |name: &String| TensorProto { name: Some(name.clone()), data_type: Some(1), ..TensorProto::default() };
        graph.initializer.extend(weights.iter().map(tensor));
        let placed = place(&mut graph, &group_of);
        (graph, placed)
    }

    /// The outputs of nodes as they run, and for an Await its group.
    fn runs(graph: &GraphProto) -> String {
        let told = |at: usize| match graph.node[at].attribute.first() {
            Some(group) => format!("{}", group.i()),
            None => graph.node[at].output.concat(),
        };
        order::of_run(graph).into_iter().map(told).collect()
    }

    #[test]
    fn each_await_is_right_before_what_needs_it_and_nodes_run_as_without() {
        // A block of branches, the last of which runs first.
        let (graph, told) = placed(&["a=xA", "b=aE", "c=aC", "d=cD", "e=aB", "f=bde"]);
        assert_eq!((runs(&graph).as_str(), told.count, told.before_run), ("0a1e2c3d4bf", 5, None));
        // A residual block, whose shortcut runs first.
        let (graph, _) = placed(&["a=xA", "b=aC", "c=aB", "d=bDc", "e=dE"]);
        assert_eq!(runs(&graph), "0a1c2b3d4e");
    }

    #[test]
    fn one_await_does_for_all_that_is_behind_it() {
        let (graph, told) = placed(&["a=xB", "b=aA", "c=bB"]);
        assert_eq!((runs(&graph).as_str(), told.count), ("1abc", 1));
        // Of two branches the last runs first, and waits for both.
        let (graph, told) = placed(&["a=x", "b=aA", "c=aB", "d=bc"]);
        assert_eq!((runs(&graph).as_str(), told.count), ("a1cbd", 1));
    }
}
