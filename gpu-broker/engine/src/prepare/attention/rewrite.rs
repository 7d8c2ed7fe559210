//! Puts the operator into the graph.

use std::collections::HashMap;

use faaswap_protocol::DType;

use super::{Attention, DOMAIN, OPERATOR, OURS};
use crate::onnx::{AttributeProto, GraphProto, NodeProto, TensorProto, attribute_proto::AttributeType, element_of};

/// As a shape: heads of a row beside each other.
const HEADS_TOGETHER: [i64; 3] = [0, 0, -1];
/// The version of operators since which reductions take their axes as an input.
const AXES_AS_INPUT_SINCE: i64 = 18;

/// What is added to the graph.
pub(super) struct Rewrite {
    /// The version of operators.
    opset: i64,
    /// Constants, biases that were stretched, and rows that these hide: each is made once.
    constants: HashMap<Vec<i64>, String>,
    stretched: HashMap<(String, i64), String>,
    hidden: HashMap<String, String>,
    nodes: Vec<NodeProto>,
    initializers: Vec<TensorProto>,
}

impl Rewrite {
    pub(super) fn new(opset: i64) -> Self {
        let (constants, stretched, hidden) = (HashMap::new(), HashMap::new(), HashMap::new());
        Self { opset, constants, stretched, hidden, nodes: Vec::new(), initializers: Vec::new() }
    }

    /// Puts an operator in the place of each last node.
    pub(super) fn all(mut self, graph: &mut GraphProto, found: Vec<(usize, Attention)>) {
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

    /// Adds the operator; returns the name of what it gives, as (batch, row, heads together), or with heads apart.
    fn one(&mut self, attention: &Attention) -> String {
        let shape = self.constant(&HEADS_TOGETHER);
        let mut inputs: Vec<_> =
            attention.inputs.iter().map(|four| self.add("Reshape", vec![four.clone(), shape.clone()], four)).collect();
        let bias = attention.bias.as_ref().map(|bias| self.stretch(bias, attention.rows));
        if let Some(bias) = &bias {
            // Neither a bias of the projections nor a mask of keys.
            inputs.extend([String::new(), String::new(), bias.clone()]);
        }
        let output = self.add(OPERATOR, inputs, &attention.output);
        if let Some(node) = self.nodes.last_mut() {
            node.domain = Some(DOMAIN.to_owned());
        }
        let (name, r#type) = (Some("scale".to_owned()), Some(AttributeType::Float.into()));
        let scale = AttributeProto { name, r#type, f: Some(attention.scale), ..Default::default() };
        self.set(vec![AttributeProto::of_int("num_heads", attention.heads), scale]);
        match (bias, &attention.zero) {
            (Some(bias), Some(zero)) => {
                let hidden = self.hidden_by(&bias);
                let shape = self.constant(&[0, 0, attention.heads, -1]);
                let apart = self.add("Reshape", vec![output, shape], &attention.output);
                self.add("Where", vec![hidden, zero.clone(), apart], &attention.output)
            }
            (None, _) | (_, None) => output,
        }
    }

    /// Whether a bias hides all keys of a row: its largest value is infinite then, and less itself no number.
    fn hidden_by(&mut self, bias: &str) -> String {
        if let Some(known) = self.hidden.get(bias) {
            return known.clone();
        }
        let mut inputs = vec![bias.to_owned()];
        let mut attributes = vec![AttributeProto::of_int("keepdims", 1)];
        if self.opset >= AXES_AS_INPUT_SINCE {
            inputs.push(self.constant(&[3]));
        } else {
            attributes.push(AttributeProto::of_ints("axes", &[3]));
        }
        let largest = self.add("ReduceMax", inputs, bias);
        self.set(attributes);
        // From (batch, head, row, 1) to (batch, row, head, 1), where there may be one head for all.
        let largest = self.add("Transpose", vec![largest], bias);
        self.set(vec![AttributeProto::of_ints("perm", &[0, 2, 1, 3])]);
        let difference = self.add("Sub", vec![largest.clone(), largest], bias);
        let hidden = self.add("IsNaN", vec![difference], bias);
        self.hidden.insert(bias.to_owned(), hidden.clone());
        hidden
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

    /// Gives the last node attributes.
    fn set(&mut self, attributes: Vec<AttributeProto>) {
        if let Some(node) = self.nodes.last_mut() {
            node.attribute = attributes;
        }
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
