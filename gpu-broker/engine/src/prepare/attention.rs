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
//! where the reshapes' shapes are constants. PyTorch's exporter puts zeros where a softmax has given no numbers, which is left out where
//! nothing infinite is added. What is not recognized stays as it is.

use std::collections::{HashMap, HashSet};

use crate::onnx::{
    self, AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto,
    attribute_proto::AttributeType, element_of,
};
use faaswap_protocol::DType;

use super::{graph, types, verify};

const DOMAIN: &str = "com.microsoft";
const OPERATOR: &str = "MultiHeadAttention";
/// How the names of what is added here begin.
const OURS: &str = "faaswap/attention";
const SOFTMAXES: [&str; 2] = ["Softmax", "BiasSoftmax"];
/// From (batch, row, head, size) to (batch, head, row, size), and back.
const HEADS_FIRST: [i64; 4] = [0, 2, 1, 3];
/// From (batch, row, head, size) to (batch, head, size, row).
const ROWS_LAST: [i64; 4] = [0, 2, 3, 1];
/// As a shape: heads of a row beside each other.
const HEADS_TOGETHER: [i64; 3] = [0, 0, -1];

/// Fuses what is recognized in the graph, not in its bodies, of those element types that it is worth it for. Returns how many
/// attentions that is.
pub fn fuse(model: &mut ModelProto, worth_it: impl Fn(DType) -> bool) -> usize {
    let Some(graph) = &mut model.graph else { return 0 };
    let found: Vec<_> = {
        let (view, types) = (View::of(graph), types::of_values(graph));
        let is_worth_it = |found: &Attention| types.get(&found.output).is_some_and(|&dtype| worth_it(dtype));
        let found = graph.node.iter().enumerate();
        found.filter_map(|(at, node)| Some((at, view.attention(node).filter(&is_worth_it)?))).collect()
    };
    let count = found.len();
    if count > 0 {
        Rewrite::default().all(graph, found);
        drop_unused(graph);
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
    /// Rows of queries, where that is known.
    rows: Option<i64>,
    scale: f32,
    /// What is added to the scaled products.
    bias: Option<String>,
    /// What it gives, as (batch, row, head, size).
    output: String,
}

/// What rows are split into by a reshape.
struct Split {
    four: String,
    heads: i64,
    rows: Option<i64>,
}

/// A graph's nodes and constants by the names of what they give.
struct View<'g> {
    producers: HashMap<&'g str, &'g NodeProto>,
    readers: HashMap<&'g str, Vec<&'g NodeProto>>,
    constants: HashMap<&'g str, &'g TensorProto>,
    /// What bodies read, or the graph gives.
    kept: HashSet<&'g str>,
}

impl<'g> View<'g> {
    fn of(graph: &'g GraphProto) -> Self {
        let mut readers: HashMap<&str, Vec<&NodeProto>> = HashMap::new();
        for node in &graph.node {
            node.input.iter().for_each(|name| readers.entry(name).or_default().push(node));
        }
        let given = graph.node.iter().flat_map(|node| node.output.iter().map(move |name| (name.as_str(), node)));
        let captured = graph.node.iter().flat_map(NodeProto::bodies).flat_map(graph::captured);
        Self {
            producers: given.collect(),
            readers,
            constants: graph.initializer.iter().map(|tensor| (tensor.name(), tensor)).collect(),
            kept: captured.chain(graph.output.iter().map(|value| value.name())).collect(),
        }
    }

    /// The attention that ends with this node.
    fn attention(&self, last: &NodeProto) -> Option<Attention> {
        let mixed = self.transposed(last, &HEADS_FIRST)?;
        let output = last.output.first()?;
        if !self.is_only_reshaped(output) {
            return None;
        }
        let product = self.only(mixed, &["MatMul"])?;
        let (softmax, is_guarded) = self.weights(product.input.first()?)?;
        let (scores, bias) = self.scores(softmax)?;
        if is_guarded && bias.is_some_and(|bias| !self.is_finite(bias)) {
            return None;
        }
        let (keys_order, scale) = product_of(scores)?;
        let queries = self.split(scores.input.first()?, &HEADS_FIRST)?;
        let keys = self.split(scores.input.get(1)?, keys_order)?;
        let values = self.split(product.input.get(1)?, &HEADS_FIRST)?;
        let same_heads = queries.heads == keys.heads && keys.heads == values.heads;
        // A bias is stretched over the rows, whose number must be known for that.
        (same_heads && (bias.is_none() || queries.rows.is_some())).then(|| Attention {
            heads: queries.heads,
            rows: queries.rows,
            inputs: [queries.four, keys.four, values.four],
            scale,
            bias: bias.map(str::to_owned),
            output: output.clone(),
        })
    }

    /// The producer of a value that nobody else reads, if it is one of these.
    fn only(&self, name: &str, ops: &[&str]) -> Option<&'g NodeProto> {
        let alone = self.readers.get(name).is_some_and(|readers| readers.len() == 1) && !self.kept.contains(name);
        self.producers.get(name).copied().filter(|node| alone && ops.contains(&node.op_type()))
    }

    /// The softmax over keys that gives this value, and whether zeros are put where that is no number.
    fn weights(&self, name: &str) -> Option<(&'g NodeProto, bool)> {
        let softmax = |node: &&NodeProto| {
            let default = if node.op_type() == "BiasSoftmax" { 1 } else { -1 };
            SOFTMAXES.contains(&node.op_type()) && matches!(int(node, "axis").unwrap_or(default), -1 | 3)
        };
        if let Some(found) = self.only(name, &SOFTMAXES) {
            return Some(found).filter(softmax).map(|found| (found, false));
        }
        let [condition, zero, weights] = &self.only(name, &["Where"])?.input[..] else { return None };
        let is_nan = self.only(condition, &["IsNaN"]).is_some_and(|node| node.input.first() == Some(weights));
        let readers = self.readers.get(weights.as_str()).map_or(0, Vec::len);
        let is_guard = is_nan && readers == 2 && !self.kept.contains(weights.as_str());
        let is_zero = self.floats(zero).is_some_and(|values| values.iter().all(|&value| value == 0.0));
        let found = self.producers.get(weights.as_str()).copied().filter(|_| is_guard && is_zero);
        found.filter(softmax).map(|found| (found, true))
    }

    /// The product that a softmax is over, and what is added to it.
    fn scores(&self, softmax: &'g NodeProto) -> Option<(&'g NodeProto, Option<&'g str>)> {
        let products = ["MatMul", "FusedMatMul"];
        let name = softmax.input.first()?;
        if softmax.op_type() == "BiasSoftmax" {
            return Some((self.only(name, &products)?, Some(softmax.input.get(1)?)));
        }
        if let Some(product) = self.only(name, &products) {
            return Some((product, None));
        }
        let sum = self.only(name, &["Add"]).filter(|sum| sum.input.len() == 2)?;
        let at = (0..2).find(|&at| self.only(&sum.input[at], &products).is_some())?;
        Some((self.only(&sum.input[at], &products)?, Some(&sum.input[1 - at])))
    }

    /// Whether a value is chosen from finite constants.
    fn is_finite(&self, name: &str) -> bool {
        let Some(node) = self.producers.get(name).filter(|node| node.op_type() == "Where") else { return false };
        node.input.iter().skip(1).all(|name| {
            self.floats(name).is_some_and(|values| !values.is_empty() && values.iter().all(|value| value.is_finite()))
        })
    }

    /// What a transpose of this order transposes.
    fn transposed(&self, node: &'g NodeProto, order: &[i64]) -> Option<&'g str> {
        let perm = node.attribute.iter().find(|attribute| attribute.name() == "perm")?;
        (node.op_type() == "Transpose" && perm.ints == order).then(|| node.input.first().map(String::as_str))?
    }

    /// Rows that were split into heads, and then transposed so.
    fn split(&self, name: &str, order: &[i64]) -> Option<Split> {
        let four = self.transposed(self.producers.get(name)?, order)?;
        let reshape = self.producers.get(four).filter(|node| node.op_type() == "Reshape")?;
        let shape = self.ints(reshape.input.get(1)?)?;
        let [_, rows, heads, size] = shape[..] else { return None };
        let rows = Some(rows).filter(|&rows| rows > 0);
        let heads = match heads {
            // Whatever is left of the row.
            -1 if size > 0 => self.width(reshape.input.first()?).filter(|width| width % size == 0)? / size,
            heads => heads,
        };
        (heads > 0 && size != 0).then(|| Split { four: four.to_owned(), heads, rows })
    }

    /// How many numbers the rows have that a projection gives.
    fn width(&self, name: &str) -> Option<i64> {
        let node = self.producers.get(name)?;
        let dims = |at: usize| Some(&self.constants.get(node.input.get(at)?.as_str())?.dims[..]);
        match node.op_type() {
            "Add" => (0..2).find_map(|at| dims(at).filter(|dims| dims.len() == 1)?.last().copied()),
            "MatMul" | "FusedMatMul" if int(node, "transB").unwrap_or(0) == 0 => dims(1)?.last().copied(),
            "Gemm" => dims(1)?.get(usize::from(int(node, "transB").unwrap_or(0) == 0)).copied(),
            _ => None,
        }
    }

    /// Whether nothing is done with a value of (batch, row, head, size) but reshapes, which do the same with (batch, row, heads together).
    fn is_only_reshaped(&self, name: &str) -> bool {
        let same = |node: &&NodeProto| {
            let shape = node.input.get(1).and_then(|shape| self.ints(shape));
            node.op_type() == "Reshape" && shape.is_some_and(|shape| shape.iter().skip(2).all(|&dim| dim != 0))
        };
        !self.kept.contains(name) && self.readers.get(name).is_some_and(|readers| readers.iter().all(same))
    }

    /// A constant's numbers.
    fn floats(&self, name: &str) -> Option<Vec<f64>> {
        let tensor = self.constants.get(name)?;
        verify::floats(onnx::dtype_of(tensor.data_type())?, tensor.raw_data.as_deref()?)
    }

    /// A constant's integers.
    fn ints(&self, name: &str) -> Option<Vec<i64>> {
        let tensor = self.constants.get(name).filter(|tensor| tensor.data_type() == element_of(DType::I64))?;
        let Some(raw) = &tensor.raw_data else { return Some(tensor.int64_data.clone()) };
        Some(raw.as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect())
    }
}

/// In which order a product takes its keys, and its scale.
fn product_of(scores: &NodeProto) -> Option<(&'static [i64], f32)> {
    if scores.op_type() == "MatMul" {
        return Some((&ROWS_LAST, 1.0));
    }
    let is_set = |name| int(scores, name).unwrap_or(0) != 0;
    let scale = scores.attribute.iter().find(|attribute| attribute.name() == "alpha").map_or(1.0, AttributeProto::f);
    let keys: &[i64] = if is_set("transB") { &HEADS_FIRST } else { &ROWS_LAST };
    (!["transA", "transBatchA", "transBatchB"].into_iter().any(is_set)).then_some((keys, scale))
}

fn int(node: &NodeProto, name: &str) -> Option<i64> {
    node.attribute.iter().find(|attribute| attribute.name() == name)?.i
}

/// Constants, and biases that were stretched, each made once.
#[derive(Default)]
struct Rewrite {
    constants: HashMap<Vec<i64>, String>,
    stretched: HashMap<(String, i64), String>,
    nodes: Vec<NodeProto>,
    initializers: Vec<TensorProto>,
}

impl Rewrite {
    /// Puts an operator in the place of each last node.
    fn all(mut self, graph: &mut GraphProto, found: Vec<(usize, Attention)>) {
        let mut found = found.into_iter().peekable();
        let mut renamed = HashMap::new();
        for (at, mut node) in std::mem::take(&mut graph.node).into_iter().enumerate() {
            if let Some((_, attention)) = found.next_if(|(last, _)| *last == at) {
                let output = self.one(&attention);
                renamed.insert(attention.output, output);
            }
            for name in &mut node.input {
                if let Some(new) = renamed.get(name) {
                    name.clone_from(new);
                }
            }
            self.nodes.push(node);
        }
        graph.node = self.nodes;
        graph.initializer.extend(self.initializers);
    }

    /// Adds the operator; returns the name of what it gives, as (batch, row, heads together).
    fn one(&mut self, attention: &Attention) -> String {
        let shape = self.constant(&HEADS_TOGETHER);
        let mut inputs: Vec<_> =
            attention.inputs.iter().map(|four| self.add("Reshape", vec![four.clone(), shape.clone()], four)).collect();
        if let (Some(bias), Some(rows)) = (&attention.bias, attention.rows) {
            // Neither a bias of the projections nor a mask of keys.
            inputs.extend([String::new(), String::new(), self.stretch(bias, rows)]);
        }
        let output = self.add(OPERATOR, inputs, &attention.output);
        if let Some(node) = self.nodes.last_mut() {
            node.domain = Some(DOMAIN.to_owned());
            let attribute = |name: &str, r#type: AttributeType| AttributeProto {
                name: Some(name.to_owned()),
                r#type: Some(r#type.into()),
                ..Default::default()
            };
            node.attribute = vec![
                AttributeProto { i: Some(attention.heads), ..attribute("num_heads", AttributeType::Int) },
                AttributeProto { f: Some(attention.scale), ..attribute("scale", AttributeType::Float) },
            ];
        }
        output
    }

    /// A bias for each row of queries: the operator wants it written out.
    fn stretch(&mut self, bias: &str, rows: i64) -> String {
        if let Some(known) = self.stretched.get(&(bias.to_owned(), rows)) {
            return known.clone();
        }
        let shape = self.constant(&[1, 1, rows, 1]);
        let stretched = self.add("Expand", vec![bias.to_owned(), shape], bias);
        self.stretched.insert((bias.to_owned(), rows), stretched.clone());
        stretched
    }

    fn add(&mut self, op: &str, input: Vec<String>, about: &str) -> String {
        let output = format!("{OURS}/{op}/{about}/{}", self.nodes.len());
        self.nodes.push(NodeProto {
            name: Some(output.clone()),
            op_type: Some(op.to_owned()),
            input,
            output: vec![output.clone()],
            ..NodeProto::default()
        });
        output
    }

    fn constant(&mut self, values: &[i64]) -> String {
        if let Some(known) = self.constants.get(values) {
            return known.clone();
        }
        let name = format!("{OURS}/shape/{}", self.constants.len());
        let raw: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.initializers.push(TensorProto {
            name: Some(name.clone()),
            data_type: Some(element_of(DType::I64)),
            dims: vec![i64::try_from(values.len()).unwrap_or(0)],
            raw_data: Some(raw.into()),
            ..TensorProto::default()
        });
        self.constants.insert(values.to_vec(), name.clone());
        name
    }
}

/// Drops nodes that nobody reads any more, and constants that only these have read.
fn drop_unused(graph: &mut GraphProto) {
    let mut wanted: HashSet<String> = graph.output.iter().map(|value| value.name().to_owned()).collect();
    let mut kept: Vec<_> = std::mem::take(&mut graph.node).into_iter().rev().collect();
    // Nodes lie behind what they read.
    kept.retain(|node| {
        let is_read = node.output.iter().any(|name| wanted.contains(name));
        if is_read {
            wanted.extend(graph::reads(node).map(str::to_owned));
        }
        is_read
    });
    kept.reverse();
    graph.node = kept;
    // A default of an input is no constant.
    wanted.extend(graph.input.iter().map(|value| value.name().to_owned()));
    graph.initializer.retain(|tensor| wanted.contains(tensor.name()));
}
