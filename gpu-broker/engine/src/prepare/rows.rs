//! Whether a model takes and gives rows, one for each of any number of requests, as far as its graph says so.
//!
//! All inputs and outputs must have an open first dimension. That these are the same number follows from their name, where
//! they share one and nothing else has it; else from all sizes in the graph following from shapes, never from values: then an
//! output cannot have as many rows as, say, objects were found. Whether one row depends on another, a graph says only where an
//! operator looks at all of them: how much that shows depends on the values, and a trial may have had others.

use std::collections::{HashMap, HashSet};

use crate::onnx::{
    GraphProto, NodeProto, ValueInfoProto,
    tensor_shape_proto::{self, dimension},
    type_proto,
};

/// Operators that give as much as the values in their inputs make them give.
const SIZED_BY_VALUES: &[&str] = &[
    "BeamSearch",
    "Compress",
    "GreedySearch",
    "If",
    "Loop",
    "NonMaxSuppression",
    "NonZero",
    "Range",
    "Sampling",
    "Scan",
    "SequenceAt",
    "SequenceMap",
    "SplitToSequence",
    "Unique",
];
/// Operators with inputs that say how much they give, and the first of these.
const SIZED_BY_INPUTS: &[(&str, usize)] = &[
    ("ConstantOfShape", 0),
    ("Expand", 1),
    ("OneHot", 1),
    ("Pad", 1),
    ("Reshape", 1),
    ("Resize", 1),
    ("Slice", 1),
    ("Split", 1),
    ("Squeeze", 1),
    ("Tile", 1),
    ("TopK", 1),
    ("Unsqueeze", 1),
    ("Upsample", 1),
];
/// How operators begin that quantize all rows by the range of all.
const BY_COMMON_RANGE: &str = "DynamicQuantize";
/// How operators begin that take one value from many: from all rows, where no axes are named.
const REDUCES: &str = "Reduce";
/// Operators that look at the shape of their input alone.
const SHAPES_ONLY: &[&str] = &["Shape", "Size"];

/// Whether requests could be run together, one below the other, and the outputs cut apart again.
pub(super) fn by_rows<'a>(graph: &'a GraphProto, inputs: impl Iterator<Item = &'a str>) -> bool {
    let names: Vec<&str> = inputs.collect();
    let inputs = names.iter().map(|name| graph.input.iter().find(|input| input.name() == *name));
    let Some(inputs) = inputs.collect::<Option<Vec<_>>>().filter(|inputs| !inputs.is_empty()) else { return false };
    let ends: Vec<_> = inputs.into_iter().chain(&graph.output).map(dims).collect();
    if !ends.iter().all(|dims| matches!(dims[..], [Dim::Open(_), ..])) || looks_at_all_rows(graph, &names) {
        return false;
    }
    share_a_name(&ends) || sizes_follow_from_shapes(graph, &names)
}

/// Whether some operator gives each row something that follows from all of them, whatever its shapes are.
fn looks_at_all_rows(graph: &GraphProto, inputs: &[&str]) -> bool {
    let producers = producers(graph);
    let reduces_all = |node: &&NodeProto| {
        let named = node.attribute.iter().any(|attribute| attribute.name() == "axes" && !attribute.ints.is_empty());
        let given = node.input.get(1).is_some_and(|axes| !axes.is_empty());
        node.op_type().starts_with(REDUCES) && !named && !given
    };
    let reduces_values = |node: &NodeProto| {
        node.input.iter().any(|value| !follows_from_shapes(value, inputs, &producers, &mut HashSet::new()))
    };
    quantizes_by_common_range(graph) || graph.node.iter().filter(reduces_all).any(reduces_values)
}

fn quantizes_by_common_range(graph: &GraphProto) -> bool {
    graph.node.iter().any(|node| {
        let mut inner = node.attribute.iter().flat_map(|attribute| attribute.g.iter().chain(&attribute.graphs));
        node.op_type().starts_with(BY_COMMON_RANGE) || inner.any(quantizes_by_common_range)
    })
}

fn share_a_name(ends: &[Vec<Dim<'_>>]) -> bool {
    let Some([Dim::Open(Some(name)), ..]) = ends.first().map(Vec::as_slice) else { return false };
    let named = Dim::Open(Some(*name));
    ends.iter().all(|dims| matches!(&dims[..], [first, rest @ ..] if *first == named && !rest.contains(&named)))
}

fn sizes_follow_from_shapes(graph: &GraphProto, inputs: &[&str]) -> bool {
    let producers = producers(graph);
    let mut seen = HashSet::new();
    graph.node.iter().all(|node| {
        let sized_by = SIZED_BY_INPUTS.iter().find(|(op, _)| *op == node.op_type());
        let sizes = sized_by.map_or(&[][..], |(_, first)| node.input.get(*first..).unwrap_or_default());
        !SIZED_BY_VALUES.contains(&node.op_type())
            && sizes.iter().all(|size| follows_from_shapes(size, inputs, &producers, &mut seen))
    })
}

fn producers(graph: &GraphProto) -> HashMap<&str, &NodeProto> {
    graph.node.iter().flat_map(|node| node.output.iter().map(move |output| (output.as_str(), node))).collect()
}

/// Whether no value of an input goes into this one. What was seen before did not either, or the search had ended.
fn follows_from_shapes<'g>(
    value: &'g str,
    inputs: &[&str],
    producers: &HashMap<&'g str, &'g NodeProto>,
    seen: &mut HashSet<&'g str>,
) -> bool {
    let mut stack = vec![value];
    while let Some(value) = stack.pop() {
        if inputs.contains(&value) {
            return false;
        }
        // An input that is left out has an empty name, and so has an output that nobody wants.
        let producer = producers.get(value).filter(|_| !value.is_empty() && seen.insert(value));
        if let Some(node) = producer.filter(|node| !SHAPES_ONLY.contains(&node.op_type())) {
            stack.extend(node.input.iter().map(String::as_str));
        }
    }
    true
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dim<'a> {
    Fixed,
    /// With its name, where it has one.
    Open(Option<&'a str>),
}

fn dims(value: &ValueInfoProto) -> Vec<Dim<'_>> {
    let Some(type_proto::Value::TensorType(tensor)) = value.r#type.as_ref().and_then(|t| t.value.as_ref()) else {
        return Vec::new();
    };
    tensor.shape.iter().flat_map(|shape| &shape.dim).map(dim_of).collect()
}

fn dim_of(dim: &tensor_shape_proto::Dimension) -> Dim<'_> {
    match &dim.value {
        Some(dimension::Value::DimParam(name)) if !name.is_empty() => Dim::Open(Some(name)),
        Some(dimension::Value::DimParam(_) | dimension::Value::DimValue(-1)) | None => Dim::Open(None),
        Some(dimension::Value::DimValue(_)) => Dim::Fixed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::{TensorShapeProto, TypeProto, tensor_shape_proto::Dimension};

    /// A number is a fixed dimension, `?` one that is open and has no name.
    fn value(name: &str, dims: &[&str]) -> ValueInfoProto {
        let dim = |dim: &&str| Dimension {
            value: match (dim.parse(), *dim) {
                (Ok(n), _) => Some(dimension::Value::DimValue(n)),
                (Err(_), "?") => None,
                (Err(_), name) => Some(dimension::Value::DimParam(name.to_owned())),
            },
            ..Dimension::default()
        };
        let shape = Some(TensorShapeProto { dim: dims.iter().map(dim).collect() });
        let tensor = type_proto::Tensor { elem_type: Some(1), shape };
        let kind = TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..TypeProto::default() };
        ValueInfoProto { name: Some(name.to_owned()), r#type: Some(kind), ..ValueInfoProto::default() }
    }

    /// Of a graph of one node that no one can judge by its name.
    fn verdict(inputs: &[&[&str]], outputs: &[&[&str]]) -> bool {
        with_nodes(inputs, outputs, &[("NonZero", &["x0"], "y")])
    }

    fn with_nodes(inputs: &[&[&str]], outputs: &[&[&str]], nodes: &[(&str, &[&str], &str)]) -> bool {
        let input: Vec<_> = inputs.iter().enumerate().map(|(n, dims)| value(&format!("x{n}"), dims)).collect();
        let output = outputs.iter().map(|dims| value("y", dims)).collect();
        let names: Vec<_> = (0..input.len()).map(|n| format!("x{n}")).collect();
        let node = nodes.iter().map(|(op, inputs, output)| NodeProto {
            op_type: Some((*op).to_owned()),
            input: inputs.iter().map(|name| (*name).to_owned()).collect(),
            output: vec![(*output).to_owned()],
            ..NodeProto::default()
        });
        let graph = GraphProto { input, output, node: node.collect(), ..GraphProto::default() };
        by_rows(&graph, names.iter().map(String::as_str))
    }

    #[test]
    fn one_open_first_dimension_everywhere_means_rows() {
        assert!(verdict(&[&["n", "3"]], &[&["n", "7"]]));
        assert!(verdict(&[&["n", "s"], &["n"]], &[&["n", "s", "4"], &["n", "1"]]));
    }

    #[test]
    fn without_a_name_in_common_sizes_must_follow_from_shapes() {
        let ends = |nodes: &[(&str, &[&str], &str)]| with_nodes(&[&["?", "3"]], &[&["?", "6"]], nodes);
        assert!(ends(&[("MatMul", &["x0", "w"], "y")]));
        let by_shape: [(&str, &[&str], &str); 3] =
            [("Shape", &["x0"], "s"), ("Gather", &["s", "i"], "n"), ("Reshape", &["x0", "n"], "y")];
        assert!(ends(&by_shape));
        let by_value: [(&str, &[&str], &str); 2] = [("Cast", &["x0"], "n"), ("Reshape", &["w", "n"], "y")];
        assert!(!ends(&by_value), "a value of the input says how many");
        assert!(!ends(&[("NonZero", &["x0"], "y")]), "as many as are not zero");
    }

    #[test]
    fn what_takes_something_from_all_rows_at_once_has_none() {
        let one = |op: &str, inputs: &[&str]| with_nodes(&[&["n", "3"]], &[&["n", "3"]], &[(op, inputs, "y")]);
        assert!(!one("DynamicQuantizeLinear", &["x0"]) && !one("DynamicQuantizeMatMul", &["x0", "w"]));
        assert!(!one("ReduceMax", &["x0"]), "over all axes");
        assert!(one("ReduceMax", &["x0", "axes"]));
        let of_shapes: [(&str, &[&str], &str); 3] =
            [("Shape", &["x0"], "s"), ("ReduceProd", &["s"], "p"), ("Mul", &["x0", "p"], "y")];
        assert!(with_nodes(&[&["n", "3"]], &[&["n", "3"]], &of_shapes), "the product of a shape's numbers");
    }

    #[test]
    fn anything_else_does_not() {
        assert!(!verdict(&[&["1", "3"]], &[&["1", "7"]]), "one row only");
        assert!(!verdict(&[&["n", "3"]], &[&["found", "6"]]), "as many as are found");
        assert!(!verdict(&[&["?", "3"]], &[&["?", "6"]]), "two that may differ");
        assert!(!verdict(&[&["n", "3"], &["m", "3"]], &[&["n", "6"]]));
        assert!(!verdict(&[&["n", "n"]], &[&["n", "6"]]), "each row has one value for each other");
        assert!(!verdict(&[&["n", "3"]], &[&[]]), "a number for all rows");
        assert!(!verdict(&[], &[&["n"]]));
    }
}
