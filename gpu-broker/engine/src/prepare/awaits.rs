//! Puts Await nodes into a graph, so that no node touches weights that are not there yet.
//!
//! Every value has a *level*: so many groups have been awaited once the value exists. A node that uses a later group
//! than its inputs' level gets an Await in front of one of its inputs. Nodes are looked at in the order in which they run (`order.rs`), for
//! one Await does for all nodes behind it; they stay where they are in the file. Levels follow data, not the order in which nodes
//! happen to run, so the promise holds for every order that a runtime may choose. `check` proves it independently.

use std::{
    collections::{BTreeSet, HashMap},
    iter,
};

use faaswap_protocol::DType;

use super::{graph::captured, order, types};
use crate::{
    await_op,
    onnx::{AttributeProto, GraphProto, NodeProto, attribute_proto::AttributeType},
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
    /// The Await output that stands for a value already, its level, and which of `nodes` it is.
    awaited: HashMap<String, (String, u32, usize)>,
    /// The Await nodes, each with the place of the first node of the file that reads it.
    nodes: Vec<(usize, NodeProto)>,
}

impl<'p> Scope<'p> {
    fn new(graph: &GraphProto, outer: Option<&'p Self>, base: u32) -> Self {
        let level = graph.input.iter().map(|value| (value.name().to_owned(), base));
        let fixed = graph.initializer.iter().map(|tensor| (tensor.name().to_owned(), 0));
        Self {
            outer,
            level: level.chain(fixed).collect(),
            dtype: types::stated(graph),
            awaited: HashMap::new(),
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
                self.cover((at, node), need, &mut scope);
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
        awaits.sort_by_key(|&(before, _)| before);
        let mut awaits = awaits.into_iter().peekable();
        for (at, node) in std::mem::take(&mut graph.node).into_iter().enumerate() {
            graph.node.extend(iter::from_fn(|| awaits.next_if(|&(before, _)| before == at)).map(|(_, node)| node));
            graph.node.push(node);
        }
    }

    /// Makes the node at a place of the file wait for `need` groups through one of its inputs.
    fn cover(&mut self, (at, node): (usize, &mut NodeProto), need: u32, scope: &mut Scope<'_>) {
        let awaited =
            node.input.iter().position(|name| scope.awaited.get(name).is_some_and(|&(_, level, _)| level >= need));
        if let Some(input) = awaited {
            let (awaited, _, number) = scope.awaited[&node.input[input]].clone();
            let before = &mut scope.nodes[number].0;
            *before = at.min(*before);
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
        scope.awaited.insert(value.clone(), (output.clone(), need, scope.nodes.len()));
        scope.nodes.push((at, await_node(&value, &output, dtype, need - 1)));
        node.input[input] = output;
    }

    /// The input to wait on: computed values before weights, because an Await on a weight depends on nothing, and a
    /// runtime may do it first, before anything else has run; f32 before others, so that few kinds of Await are needed.
    fn best_input(&self, node: &NodeProto, scope: &Scope<'_>) -> Option<(usize, DType)> {
        let inputs = node.input.iter().enumerate().filter(|(_, name)| !name.is_empty());
        let told = types::input(node, |name| scope.dtype(name));
        let typed = inputs.filter_map(|(i, name)| Some((i, name, scope.dtype(name).or(told)?)));
        let cost = |name: &str, dtype: DType| (self.group_of.contains_key(name), dtype != DType::F32);
        typed.min_by_key(|&(i, name, dtype)| (cost(name, dtype), i)).map(|(i, _, dtype)| (i, dtype))
    }
}

fn await_node(input: &str, output: &str, dtype: DType, group: u32) -> NodeProto {
    NodeProto {
        input: vec![input.to_owned()],
        output: vec![output.to_owned()],
        name: Some(output.to_owned()),
        op_type: Some(await_op::op_type(dtype).to_owned()),
        domain: Some(await_op::DOMAIN.to_owned()),
        attribute: vec![AttributeProto {
            name: Some(await_op::GROUP.to_owned()),
            r#type: Some(AttributeType::Int.into()),
            i: Some(i64::from(group)),
            ..AttributeProto::default()
        }],
        ..NodeProto::default()
    }
}
