//! Makes one matrix product of several that have the same input, as the projections to queries, keys and values of attention have.
//!
//! ```text
//!   ┌ MatMul ─ Add ─ q                                      ┌ q
//! x ┼ MatMul ─ Add ─ k   becomes   x ─ MatMul ─ Add ─ Split ┼ k
//!   └ MatMul ─ Add ─ v                                      └ v
//! ```
//!
//! The product of a request's few rows and a small matrix leaves most of a GPU idle: on an H200 three products of 512 rows with matrices
//! of 1024 by 1024, each with its bias, took 43 us in single precision (TF32) and 25 in half, as one that is split again 29 to 32
//! and 19 to 22 (PyTorch's kernels, as CUDA graphs). The matrices' rows lie beside each other then, which is why it is done when weights are laid out.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

use super::{
    graph::{self, View},
    weights::{self, Source},
};
use crate::{
    EngineError,
    onnx::{self, AttributeProto, GraphProto, NodeProto, TensorProto},
};

/// How the names of what is added here begin.
const OURS: &str = "faaswap/joined";
/// Where the joined weights are until they are laid out.
const DATA_FILE: &str = "joined.bin";
/// Most columns of a joined matrix: wider ones fill a GPU apart, and splitting costs more.
const COLUMNS_MAX: i64 = 4096;
/// Most products of which one is made: CUDA's split takes the places of more than a few outputs from the host's memory, which a captured
/// run must not.
const PARTS_MAX: usize = 32;
/// The version of operators since which dimensions are counted from the last, too.
const FROM_LAST_SINCE: i64 = 11;
/// The version of operators since which a split into equal parts says into how many.
const SPLIT_COUNTS_SINCE: i64 = 18;

/// One product by what it reads and gives, with the bias that is added to it where there is one.
struct Product {
    input: String,
    weight: TensorProto,
    bias: Option<TensorProto>,
    /// What the product itself gives.
    product: String,
    /// What it gives with its bias.
    output: String,
}

/// Joins products in the graph, not in its bodies. `dir` has the weights, and gets a file of joined ones. Returns how many products were made.
pub fn join(graph: &mut GraphProto, opset: i64, dir: &Path) -> Result<usize, EngineError> {
    let found = if opset < FROM_LAST_SINCE { Vec::new() } else { find(graph) };
    if found.is_empty() {
        return Ok(0);
    }
    let mut writer = Writer::new(dir)?;
    let (mut added, mut gone) = (HashMap::new(), HashSet::new());
    for products in &found {
        let (nodes, tensors) = writer.joined(products, opset)?;
        added.insert(products[0].product.clone(), nodes);
        gone.extend(products.iter().flat_map(|product| [product.product.clone(), product.output.clone()]));
        graph.initializer.extend(tensors);
    }
    writer.end()?;
    for node in std::mem::take(&mut graph.node) {
        let output = node.output.first().map_or("", String::as_str);
        if let Some(nodes) = added.remove(output) {
            graph.node.extend(nodes);
        } else if !gone.contains(output) {
            graph.node.push(node);
        }
    }
    graph::drop_unused(graph);
    Ok(found.len())
}

/// How many products in a graph were made of several.
pub(super) fn count(graph: &GraphProto) -> usize {
    graph.node.iter().filter(|node| node.op_type() == "Split" && node.name().starts_with(OURS)).count()
}

/// Of how many weights beside each other those with this name were made.
pub(super) fn parts_of(name: &str) -> Option<usize> {
    name.strip_prefix(OURS)?.strip_prefix('/')?.split_once('/')?.0.parse().ok().filter(|&count| count > 1)
}

/// Rows of several matrices beside each other.
pub(super) fn beside(parts: &[Vec<u8>], rows: usize) -> Vec<u8> {
    let mut together = Vec::with_capacity(parts.iter().map(Vec::len).sum());
    for row in 0..rows {
        for part in parts {
            let width = part.len() / rows;
            together.extend_from_slice(&part[row * width..][..width]);
        }
    }
    together
}

/// Takes such rows apart again, into so many matrices of one size.
pub(super) fn apart(bytes: &[u8], rows: usize, count: usize) -> Vec<Vec<u8>> {
    let width = (bytes.len() / (rows * count).max(1)).max(1);
    let part = |at: usize| bytes.chunks_exact(width).skip(at).step_by(count).collect::<Vec<_>>().concat();
    (0..count).map(part).collect()
}

/// Products that can be joined, in the order of the first of each.
fn find(graph: &GraphProto) -> Vec<Vec<Product>> {
    let view = View::of(graph);
    let given: HashSet<&str> = graph.input.iter().map(|input| input.name()).collect();
    let mut found: Vec<Vec<Product>> = Vec::new();
    let mut places = HashMap::new();
    for product in graph.node.iter().filter_map(|node| product(&view, &given, node)) {
        let weight = &product.weight;
        let key = (product.input.clone(), weight.dims.clone(), weight.data_type(), product.bias.is_some());
        let place = *places.entry(key).or_insert(found.len());
        if place == found.len() {
            found.push(Vec::new());
        }
        found[place].push(product);
    }
    let columns = |products: &[Product]| products.iter().map(|product| product.weight.dims[1]).sum::<i64>();
    found.retain(|products| (2..=PARTS_MAX).contains(&products.len()) && columns(products) <= COLUMNS_MAX);
    found
}

/// The product that a node is, where its matrix is a constant that nobody else reads. A bias may be read by others: it is small, and
/// equal ones are one in an optimized graph.
fn product(view: &View<'_>, given: &HashSet<&str>, node: &NodeProto) -> Option<Product> {
    let constant = |name: &str, rank: usize| {
        let tensor = view.constants.get(name).copied().filter(|tensor| tensor.dims.len() == rank);
        let is_known = |tensor: &&TensorProto| weights::bytes_of(tensor).is_some() && !given.contains(name);
        tensor.filter(|tensor| onnx::is_float(tensor.data_type()) && is_known(tensor))
    };
    let [input, weight] = &node.input[..] else { return None };
    let is_product = node.is("MatMul") && !view.constants.contains_key(input.as_str());
    let weight = constant(weight, 2).filter(|_| is_product && view.reader(weight).is_some())?;
    let product = node.output.first()?;
    if weight.dims.iter().any(|&dim| dim < 1) || view.kept.contains(product.as_str()) {
        return None;
    }
    let sum = view.reader(product).filter(|sum| sum.is("Add") && sum.input.len() == 2);
    let biased = sum.and_then(|sum| {
        let bias = constant(sum.input.iter().find(|name| *name != product)?, 1)?;
        let fits = bias.dims[0] == weight.dims[1] && bias.data_type() == weight.data_type();
        let output = sum.output.first().filter(|output| fits && !view.kept.contains(output.as_str()))?;
        Some((bias.clone(), output.clone()))
    });
    let (bias, output) = biased.map_or_else(|| (None, product.clone()), |(bias, output)| (Some(bias), output));
    Some(Product { input: input.clone(), weight: weight.clone(), bias, product: product.clone(), output })
}

/// Writes weights beside each other.
struct Writer<'a> {
    source: Source<'a>,
    dir: &'a Path,
    file: BufWriter<File>,
    end: u64,
}

impl<'a> Writer<'a> {
    fn new(dir: &'a Path) -> Result<Self, EngineError> {
        let path = dir.join(DATA_FILE);
        let file = BufWriter::new(File::create(&path).map_err(EngineError::io(&path))?);
        Ok(Self { source: Source::new(dir), dir, file, end: 0 })
    }

    fn end(mut self) -> Result<(), EngineError> {
        self.file.flush().map_err(EngineError::io(self.dir))
    }

    /// The nodes that do all of these products, and their weights.
    fn joined(&mut self, products: &[Product], opset: i64) -> Result<(Vec<NodeProto>, Vec<TensorProto>), EngineError> {
        let name = format!("{OURS}/{}/{}", products.len(), products[0].weight.name());
        let weight = self.tensor(name.clone(), products.iter().map(|product| &product.weight))?;
        let biases: Option<Vec<_>> = products.iter().map(|product| product.bias.as_ref()).collect();
        let bias = biases.map(|biases| self.tensor(format!("{name}/bias"), biases.into_iter())).transpose()?;
        let about = &name;
        let node = |op: &str, input: Vec<String>| {
            let output = format!("{about}/{op}");
            let (name, op_type) = (Some(output.clone()), Some(op.to_owned()));
            NodeProto { name, op_type, input, output: vec![output], ..NodeProto::default() }
        };
        let mut nodes = vec![node("MatMul", vec![products[0].input.clone(), about.to_owned()])];
        if let Some(bias) = &bias {
            nodes.push(node("Add", vec![nodes[0].output[0].clone(), bias.name().to_owned()]));
        }
        let mut split = node("Split", nodes.last().map(|last| last.output.clone()).unwrap_or_default());
        split.output = products.iter().map(|product| product.output.clone()).collect();
        split.attribute.push(AttributeProto::of_int("axis", -1));
        if opset >= SPLIT_COUNTS_SINCE {
            split
                .attribute
                .push(AttributeProto::of_int("num_outputs", i64::try_from(products.len()).unwrap_or(i64::MAX)));
        }
        nodes.push(split);
        Ok((nodes, std::iter::once(weight).chain(bias).collect()))
    }

    /// Tensors of one shape as one, along the last dimension.
    fn tensor<'t>(
        &mut self,
        name: String,
        parts: impl Iterator<Item = &'t TensorProto>,
    ) -> Result<TensorProto, EngineError> {
        let parts: Vec<_> = parts.collect();
        let len = |part: &TensorProto| weights::bytes_of(part).expect("what was found has been measured");
        let bytes = parts.iter().map(|part| self.source.whole(part, len(part))).collect::<Result<Vec<_>, _>>()?;
        let mut dims = parts[0].dims.clone();
        let rows = rows_of(&dims);
        let joined = beside(&bytes, rows);
        self.file.write_all(&joined).map_err(EngineError::io(self.dir))?;
        if let Some(last) = dims.last_mut() {
            *last *= i64::try_from(parts.len()).unwrap_or(i64::MAX);
        }
        let mut tensor =
            TensorProto { name: Some(name), data_type: parts[0].data_type, dims, ..TensorProto::default() };
        tensor.set_external(DATA_FILE, self.end, joined.len() as u64);
        self.end += joined.len() as u64;
        Ok(tensor)
    }
}

/// How many rows a matrix of these dimensions has.
pub(super) fn rows_of(dims: &[i64]) -> usize {
    let rows = dims.iter().rev().skip(1).map(|&dim| usize::try_from(dim).unwrap_or(0));
    rows.product()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(op: &str, input: &[&str], output: &str) -> NodeProto {
        let input = input.iter().map(|&name| name.to_owned()).collect();
        NodeProto { op_type: Some(op.to_owned()), input, output: vec![output.to_owned()], ..NodeProto::default() }
    }

    /// A tensor whose bytes are its seed and their places.
    fn tensor(name: &str, dims: &[i64], seed: u8) -> TensorProto {
        let len = dims.iter().product::<i64>() * 2;
        let bytes: Vec<u8> = (0..len).map(|at| seed.wrapping_add(u8::try_from(at % 251).expect("small"))).collect();
        let mut tensor = TensorProto {
            name: Some(name.to_owned()),
            data_type: Some(onnx::element_of(faaswap_protocol::DType::F16)),
            dims: dims.to_vec(),
            ..TensorProto::default()
        };
        tensor.set_raw(bytes.into());
        tensor
    }

    /// Queries, keys and values, each with a bias, and what reads them.
    fn projections() -> GraphProto {
        let mut graph = GraphProto::default();
        for (name, seed) in [("q", 1), ("k", 2), ("v", 3)] {
            let [weight, bias, product] = ["w", "b", "p"].map(|part| format!("{name}{part}"));
            graph.node.push(node("MatMul", &["x", &weight], &product));
            // Biases come first or last.
            let both = if name == "k" { [&bias, &product] } else { [&product, &bias] };
            graph.node.push(node("Add", &both.map(String::as_str), name));
            graph.initializer.extend([tensor(&weight, &[3, 4], seed), tensor(&bias, &[4], 10 * seed)]);
        }
        graph.node.push(node("Concat", &["q", "k", "v"], "y"));
        graph.output.push(onnx::ValueInfoProto { name: Some("y".to_owned()), ..Default::default() });
        graph
    }

    fn joined(graph: &mut GraphProto, opset: i64) -> (usize, tempfile::TempDir) {
        let dir = tempfile::tempdir().expect("a folder");
        (join(graph, opset, dir.path()).expect("it can be written"), dir)
    }

    fn ops(graph: &GraphProto) -> Vec<&str> {
        graph.node.iter().map(NodeProto::op_type).collect()
    }

    #[test]
    fn products_with_the_same_input_become_one_whose_rows_lie_beside_each_other() {
        let (mut graph, original) = (projections(), projections());
        let (count_of, dir) = joined(&mut graph, 17);
        assert_eq!((count_of, count(&graph)), (1, 1));
        assert_eq!(ops(&graph), ["MatMul", "Add", "Split", "Concat"]);
        assert_eq!(graph.node[2].output, ["q", "k", "v"]);
        assert_eq!(graph.node[2].attribute, [AttributeProto::of_int("axis", -1)]);
        let [weight, bias] = &graph.initializer[..] else { panic!("the others are used by nobody") };
        assert_eq!((&weight.dims[..], &bias.dims[..]), (&[3, 12][..], &[12][..]));
        let mut source = Source::new(dir.path());
        for (tensor, suffix) in [(weight, "w"), (bias, "b")] {
            let bytes = source.whole(tensor, weights::bytes_of(tensor).expect("it has bytes")).expect("all are there");
            let (rows, count) = (rows_of(&tensor.dims), parts_of(tensor.name()).expect("its name says so"));
            let parts = apart(&bytes, rows, count);
            let wanted = ["q", "k", "v"].map(|name| {
                let found = original.initializer.iter().find(|tensor| tensor.name() == format!("{name}{suffix}"));
                found.and_then(|tensor| tensor.raw_data.clone()).expect("the original has it").to_vec()
            });
            assert_eq!(parts, wanted);
            // The second matrix's first row lies behind the first one's.
            assert_eq!(bytes[8..16], wanted[1][..8]);
        }
    }

    #[test]
    fn a_bias_that_others_read_is_joined_as_well_and_stays() {
        let mut graph = projections();
        graph.initializer.retain(|tensor| tensor.dims.len() == 2 || tensor.name() == "qb");
        for node in &mut graph.node {
            node.input.iter_mut().filter(|name| name.ends_with('b')).for_each(|name| "qb".clone_into(name));
        }
        graph.node.push(node("Relu", &["qb"], "r"));
        graph.output.push(onnx::ValueInfoProto { name: Some("r".to_owned()), ..Default::default() });
        assert_eq!(joined(&mut graph, 17).0, 1);
        assert_eq!(ops(&graph), ["MatMul", "Add", "Split", "Concat", "Relu"]);
        let names: Vec<_> = graph.initializer.iter().map(TensorProto::name).collect();
        assert_eq!(names, ["qb", "faaswap/joined/3/qw", "faaswap/joined/3/qw/bias"]);
    }

    #[test]
    fn a_split_says_into_how_many_parts_where_that_is_needed() {
        let mut graph = projections();
        joined(&mut graph, 18);
        let counts = [AttributeProto::of_int("axis", -1), AttributeProto::of_int("num_outputs", 3)];
        assert_eq!(graph.node[2].attribute, counts);
        let mut old = projections();
        assert_eq!(joined(&mut old, 10).0, 0);
        assert_eq!(old, projections());
    }

    #[test]
    fn only_products_of_one_kind_whose_weights_nobody_else_reads_are_joined() {
        // One without a bias stands alone, the others are joined.
        let mut graph = projections();
        graph.node.retain(|node| node.output[0] != "v");
        graph.node.push(node("Relu", &["vp"], "v"));
        let (joined_of, _dir) = joined(&mut graph, 17);
        assert_eq!((joined_of, graph.node[2].output.len()), (1, 2));
        let stays = |change: &dyn Fn(&mut GraphProto)| {
            let mut graph = projections();
            change(&mut graph);
            let before = graph.clone();
            assert_eq!(joined(&mut graph, 17).0, 0);
            assert_eq!(graph, before);
        };
        // Tied weights, weights that are inputs, and matrices that are wide, or many.
        stays(&|graph| {
            for at in 0..PARTS_MAX {
                let weight = format!("w{at}");
                graph.initializer.extend([tensor(&weight, &[3, 4], 1), tensor(&format!("b{at}"), &[4], 2)]);
                graph.node.push(node("MatMul", &["x", &weight], &format!("p{at}")));
                graph.node.push(node("Add", &[&format!("p{at}"), &format!("b{at}")], &format!("s{at}")));
            }
        });
        stays(&|graph| {
            ["qw", "kw"].iter().for_each(|name| graph.node.push(node("Relu", &[name], &format!("{name}r"))));
        });
        stays(&|graph| graph.node.iter_mut().for_each(|node| node.op_type = Some("Mul".to_owned())));
        stays(&|graph| {
            let given = |name: &str| onnx::ValueInfoProto { name: Some(name.to_owned()), ..Default::default() };
            graph.input.extend(["qw", "kw"].map(given));
        });
        stays(&|graph| {
            for tensor in &mut graph.initializer {
                *tensor = if tensor.dims.len() == 2 {
                    self::tensor(tensor.name(), &[3, 2048], 1)
                } else {
                    self::tensor(tensor.name(), &[2048], 1)
                };
            }
        });
    }

    #[test]
    fn rows_that_were_put_beside_each_other_come_apart_again() {
        let parts = [vec![1, 2, 3, 4], vec![5, 6, 7, 8]];
        let together = beside(&parts, 2);
        assert_eq!(together, [1, 2, 5, 6, 3, 4, 7, 8]);
        assert_eq!(apart(&together, 2, 2), parts);
        assert_eq!(parts_of("faaswap/joined/3/w"), Some(3));
        assert_eq!([parts_of("faaswap/joined/1/w"), parts_of("w"), parts_of("faaswap/joined/w")], [None; 3]);
    }
}
