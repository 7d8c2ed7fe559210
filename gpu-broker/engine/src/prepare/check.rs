//! Proves of a rewritten graph that no node touches weights that have not been awaited.
//!
//! Walks the graph by its own rules and shares no code with `awaits`: a mistake there is found here, before a model is
//! ever bound. It takes the nodes in file order and refuses a graph that is not in order.

use std::collections::{HashMap, HashSet};

use crate::{
    await_op,
    manifest::Manifest,
    onnx::{GraphProto, ModelProto, NodeProto},
};

/// What was proved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Proof {
    /// Uses of late-bound initializers, each of them covered.
    pub uses: usize,
    /// Await nodes seen.
    pub awaits: usize,
}

/// Checks the graph against its manifest; the error names the first use that is not covered.
pub fn check(model: &ModelProto, manifest: &Manifest) -> Result<Proof, String> {
    let graph = model.graph.as_ref().ok_or("the model has no graph")?;
    let mut weights = HashMap::new();
    for weight in &manifest.initializers {
        let last = weight.offset + weight.len.max(1) - 1;
        let group = manifest.groups.iter().position(|g| (g.offset..g.offset + g.len).contains(&last));
        weights.insert(weight.name.as_str(), group.ok_or_else(|| format!("{} lies in no group", weight.name))?);
    }
    if let Some(output) = graph.output.iter().find(|output| weights.contains_key(output.name())) {
        return Err(format!("output {} is a weight, which the runtime copies without waiting", output.name()));
    }
    let before = manifest.await_before_run.and_then(|group| usize::try_from(group).ok()).map_or(0, |group| group + 1);
    let mut walk = Walk { weights, proof: Proof::default() };
    walk.graph(graph, &HashMap::new(), before)?;
    Ok(walk.proof)
}

struct Walk<'a> {
    weights: HashMap<&'a str, usize>,
    proof: Proof,
}

impl<'a> Walk<'a> {
    /// `known` holds how many groups are surely there once a value exists.
    fn graph(&mut self, graph: &'a GraphProto, outer: &HashMap<&'a str, usize>, start: usize) -> Result<(), String> {
        let mut known = outer.clone();
        known.extend(graph.input.iter().map(|value| (value.name(), start)));
        known.extend(graph.initializer.iter().map(|tensor| (tensor.name(), start)));
        for node in &graph.node {
            let mut sure = start;
            for name in node.input.iter().map(String::as_str).filter(|name| !name.is_empty()) {
                let there = known.get(name).ok_or_else(|| format!("{} reads {name} before it exists", node.label()))?;
                sure = sure.max(*there);
            }
            // A node with bodies cannot start before what its bodies read from out here exists.
            let captured = node.bodies().flat_map(read_inside).filter_map(|name| known.get(name).copied());
            sure = captured.fold(sure, usize::max);
            let sure = if await_op::is_await(node) {
                self.proof.awaits += 1;
                sure.max(awaited(node)? + 1)
            } else {
                self.touches(node, sure)?;
                sure
            };
            for body in node.bodies() {
                self.body(body, &known, sure)?;
            }
            known.extend(node.output.iter().map(|name| (name.as_str(), sure)));
        }
        Ok(())
    }

    fn body(&mut self, body: &'a GraphProto, known: &HashMap<&'a str, usize>, sure: usize) -> Result<(), String> {
        let inside: HashSet<&str> = body.node.iter().flat_map(|node| node.output.iter().map(String::as_str)).collect();
        let leaked = body.output.iter().find(|v| !inside.contains(v.name()) && self.weights.contains_key(v.name()));
        match leaked {
            Some(output) => Err(format!("a body hands out weight {}", output.name())),
            None => self.graph(body, known, sure),
        }
    }

    fn touches(&mut self, node: &NodeProto, sure: usize) -> Result<(), String> {
        for name in &node.input {
            if let Some(&group) = self.weights.get(name.as_str()) {
                if group >= sure {
                    return Err(format!("{} touches {name} of group {group}, {sure} groups are there", node.label()));
                }
                self.proof.uses += 1;
            }
        }
        Ok(())
    }
}

/// Every name that nodes of the body read and that no node of it writes.
fn read_inside(body: &GraphProto) -> HashSet<&str> {
    let mut names: HashSet<&str> = HashSet::new();
    for node in &body.node {
        names.extend(node.input.iter().map(String::as_str));
        names.extend(node.bodies().flat_map(read_inside));
    }
    let own = body.node.iter().flat_map(|node| node.output.iter().map(String::as_str));
    let own = own.chain(body.input.iter().map(|value| value.name()));
    let own: HashSet<&str> = own.chain(body.initializer.iter().map(|tensor| tensor.name())).collect();
    names.difference(&own).copied().collect()
}

fn awaited(node: &NodeProto) -> Result<usize, String> {
    let group = node.attribute.iter().find(|attribute| attribute.name() == await_op::GROUP);
    let group = group.ok_or_else(|| format!("{} names no group", node.label()))?.i();
    usize::try_from(group).map_err(|_| format!("{} names group {group}", node.label()))
}
