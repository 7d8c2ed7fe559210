//! What prepared models of one kind share on a GPU: all but their weights, and small constants that belong to them.
//!
//! Small initializers stay in the graph, for a table entry would cost as much. Those that only kernels on the device read are
//! taken together here and given to the session where we want them, so that another model of the kind can have its own there
//! without a session (`faaswap_device`'s twins). All else that the graph says is the kind.

use std::collections::{HashMap, HashSet};

use bytes::Bytes as Buffer;
use faaswap_device::cuda::KindKey;
use prost::Message;
use sha2::{Digest, Sha256};

use crate::{
    EngineError, Manifest, Prepared, await_op,
    limits::WEIGHT_ALIGN,
    manifest::Initializer,
    onnx::{self, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto},
    prepare::graph::captured,
};

/// Layers: they read all of their inputs on the device, where they run there.
const LAYERS: [&str; 15] = [
    "BatchNormalization",
    "BiasGelu",
    "Conv",
    "ConvTranspose",
    "FusedConv",
    "FusedGemm",
    "FusedMatMul",
    "Gemm",
    "InstanceNormalization",
    "LayerNormalization",
    "MatMul",
    "NhwcConv",
    "NhwcFusedConv",
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
];
/// So do these, but where all that they read is small they may compute shapes, which is done on the host.
const ELEMENTWISE: [&str; 7] = ["Add", "Div", "FastGelu", "Gelu", "Mul", "PRelu", "Sub"];
/// Constants of fewer elements are small.
const ELEMENTS_MIN: i64 = 16;

/// A model's kind, and the constants that are its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Kind {
    pub(crate) key: KindKey,
    /// Where each constant lies in `bytes`.
    pub(crate) table: Vec<Initializer>,
    pub(crate) bytes: Vec<u8>,
}

impl Kind {
    pub(crate) fn of(prepared: &Prepared) -> Result<Self, EngineError> {
        let path = prepared.graph_path();
        let bytes = Buffer::from(std::fs::read(&path).map_err(EngineError::io(&path))?);
        let refuse = |e: prost::DecodeError| EngineError::NotPrepared { path: path.clone(), reason: e.to_string() };
        Ok(Self::of_graph(ModelProto::decode(bytes).map_err(refuse)?, prepared.manifest()))
    }

    fn of_graph(mut model: ModelProto, manifest: &Manifest) -> Self {
        let (mut table, mut bytes) = (Vec::new(), Vec::new());
        if let Some(graph) = &mut model.graph {
            let on_device = read_on_device(graph);
            for tensor in graph.initializer.iter_mut().filter(|tensor| on_device.contains(tensor.name())) {
                let raw = tensor.raw_data.take().unwrap_or_default();
                bytes.resize(bytes.len().next_multiple_of(usize::try_from(WEIGHT_ALIGN).unwrap_or(1)), 0);
                table.push(Initializer {
                    name: tensor.name().to_owned(),
                    element: tensor.data_type(),
                    dims: tensor.dims.clone(),
                    offset: bytes.len() as u64,
                    len: raw.len() as u64,
                });
                bytes.extend_from_slice(&raw);
            }
        }
        let target = manifest.target_of_any();
        let told = (manifest.version, &manifest.ort_version, target, manifest.weights_bytes, &manifest.groups);
        let told = (told, &manifest.initializers, &manifest.signature, manifest.await_before_run);
        let mut hash = Sha256::new();
        hash.update(serde_json::to_vec(&told).expect("numbers and names can be written"));
        hash.update(model.encode_to_vec());
        Self { key: hash.finalize().into(), table, bytes }
    }
}

/// Names of the constants in the graph that nothing reads but nodes on the device.
fn read_on_device(graph: &GraphProto) -> HashSet<String> {
    let uses = Uses::of(graph);
    let held = graph.initializer.iter().filter_map(|tensor| Some((tensor.name(), elements_of_constant(tensor)?)));
    held.filter(|(name, elements)| uses.are_on_device(name, *elements)).map(|(name, _)| name.to_owned()).collect()
}

/// Who reads what in a graph.
struct Uses<'g> {
    readers: HashMap<&'g str, Vec<&'g NodeProto>>,
    /// What bodies read, and what is handed out.
    beyond: HashSet<&'g str>,
    /// Values that layers have made: they are on the device.
    of_layers: HashSet<&'g str>,
}

impl<'g> Uses<'g> {
    fn of(graph: &'g GraphProto) -> Self {
        let beyond = graph.output.iter().map(ValueInfoProto::name).collect();
        let mut uses = Self { readers: HashMap::new(), beyond, of_layers: HashSet::new() };
        for node in &graph.node {
            for name in &node.input {
                uses.readers.entry(name).or_default().push(node);
            }
            uses.beyond.extend(node.bodies().flat_map(captured));
            let handed_on =
                await_op::is_await(node) && node.input.iter().any(|name| uses.of_layers.contains(name.as_str()));
            if handed_on || LAYERS.contains(&node.op_type()) {
                uses.of_layers.extend(node.output.iter().map(String::as_str));
            }
        }
        uses
    }

    /// Whether a value of so many elements is read, and on the device alone.
    fn are_on_device(&self, name: &str, elements: i64) -> bool {
        let readers = self.readers.get(name).filter(|_| !self.beyond.contains(name));
        readers.is_some_and(|all| all.iter().all(|node| self.is_on_device(node, elements)))
    }

    fn is_on_device(&self, node: &NodeProto, elements: i64) -> bool {
        if node.bodies().next().is_some() {
            return false;
        }
        if await_op::is_await(node) {
            // It hands the same value on.
            return node.output.iter().all(|name| self.are_on_device(name, elements));
        }
        let beside_layers = || node.input.iter().any(|name| self.of_layers.contains(name.as_str()));
        LAYERS.contains(&node.op_type())
            || ELEMENTWISE.contains(&node.op_type()) && (elements >= ELEMENTS_MIN || beside_layers())
    }
}

/// How many elements it has, where it is a constant that may be a model's own.
fn elements_of_constant(tensor: &TensorProto) -> Option<i64> {
    let len = onnx::data_len(tensor.data_type(), &tensor.dims);
    let is_whole = tensor.raw_data.as_ref().is_some_and(|raw| Some(raw.len() as u64) == len);
    let elements = tensor.dims.iter().try_fold(1_i64, |all, dim| all.checked_mul(*dim))?;
    (onnx::is_float(tensor.data_type()) && is_whole && elements > 0).then_some(elements)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CudaTarget, Target, manifest::tests::manifest, onnx::AttributeProto};

    /// An initializer of so many floats, each with these bits.
    fn floats(name: &str, count: i64, bits: u8) -> TensorProto {
        let raw = vec![bits; usize::try_from(count * 4).expect("a small tensor")];
        TensorProto {
            name: Some(name.to_owned()),
            data_type: Some(1),
            dims: vec![count],
            raw_data: Some(Buffer::from(raw)),
            ..TensorProto::default()
        }
    }

    fn node(op_type: &str, inputs: &[&str]) -> NodeProto {
        let input = inputs.iter().map(|name| (*name).to_owned()).collect();
        NodeProto { op_type: Some(op_type.to_owned()), input, ..NodeProto::default() }
    }

    fn awaits(value: &str) -> NodeProto {
        NodeProto { domain: Some(await_op::DOMAIN.to_owned()), ..node("AwaitF32", &[value]) }
    }

    fn kind(nodes: Vec<NodeProto>, initializers: Vec<TensorProto>) -> Kind {
        let graph = GraphProto { node: nodes, initializer: initializers, ..GraphProto::default() };
        Kind::of_graph(ModelProto { graph: Some(graph), ..ModelProto::default() }, &manifest())
    }

    fn placed(kind: &Kind) -> Vec<(&str, u64, u64)> {
        kind.table.iter().map(|weight| (weight.name.as_str(), weight.offset, weight.len)).collect()
    }

    #[test]
    fn biases_are_the_models_own_and_the_rest_is_its_kind() {
        let nodes = || vec![node("Conv", &["x", "w", "bias"]), node("Add", &["y", "more"])];
        let of = |bias: u8, more: u8| kind(nodes(), vec![floats("bias", 65, bias), floats("more", 16, more)]);
        let (one, other) = (of(1, 2), of(3, 4));
        assert_eq!(placed(&one), [("bias", 0, 260), ("more", 512, 64)]);
        assert_eq!(one.key, other.key);
        assert_ne!(one.bytes, other.bytes);
        assert_eq!(&other.bytes[512..], [4; 64]);
        assert_eq!(other.bytes.len(), 576);
    }

    #[test]
    fn what_the_host_may_read_is_of_the_kind() {
        let nodes = || vec![node("Clip", &["x", "bounds"]), node("Mul", &["y", "few"]), node("Add", &["z", "bounds"])];
        let of = |bounds: u8, few: u8| kind(nodes(), vec![floats("bounds", 16, bounds), floats("few", 15, few)]);
        assert_eq!(placed(&of(1, 1)), []);
        assert_ne!(of(1, 1).key, of(2, 1).key);
        assert_ne!(of(1, 1).key, of(1, 2).key);
    }

    #[test]
    fn small_constants_are_the_models_own_where_layers_are_beside_them() {
        let nodes = || {
            vec![
                node("Conv", &["x", "w", "few"]),
                NodeProto { output: vec!["product".to_owned()], ..node("MatMul", &["x", "v"]) },
                NodeProto { output: vec!["later".to_owned()], ..awaits("product") },
                node("Add", &["later", "two"]),
                node("Add", &["y", "one"]),
            ]
        };
        let of = |few: u8, two: u8, one: u8| {
            kind(nodes(), vec![floats("few", 4, few), floats("two", 2, two), floats("one", 1, one)])
        };
        assert_eq!(placed(&of(1, 1, 1)), [("few", 0, 16), ("two", 256, 8)]);
        assert_eq!(of(1, 1, 1).key, of(2, 3, 1).key);
        assert_ne!(of(1, 1, 1).key, of(1, 1, 2).key);
    }

    #[test]
    fn what_is_handed_on_by_an_await_counts_as_what_reads_it_there() {
        let handed_on = |to: NodeProto| {
            let nodes = vec![NodeProto { output: vec!["later".to_owned()], ..awaits("bias") }, to];
            placed(&kind(nodes, vec![floats("bias", 64, 1)])).len()
        };
        assert_eq!(handed_on(node("Conv", &["x", "w", "later"])), 1);
        assert_eq!(handed_on(node("Clip", &["x", "later"])), 0);
        let output = vec![ValueInfoProto { name: Some("later".to_owned()), ..ValueInfoProto::default() }];
        let graph = GraphProto {
            node: vec![NodeProto { output: vec!["later".to_owned()], ..awaits("bias") }, node("Add", &["x", "later"])],
            initializer: vec![floats("bias", 64, 1)],
            output,
            ..GraphProto::default()
        };
        assert_eq!(read_on_device(&graph).len(), 0, "it is handed out");
    }

    #[test]
    fn what_bodies_read_and_what_is_handed_out_is_of_the_kind() {
        let mut body = AttributeProto { g: Some(GraphProto::default()), ..AttributeProto::default() };
        let inside = body.g.get_or_insert_default();
        inside.node.push(node("Add", &["inner", "in_body"]));
        inside.output.push(ValueInfoProto { name: Some("out_of_body".to_owned()), ..ValueInfoProto::default() });
        let looped = NodeProto { attribute: vec![body], ..node("Loop", &["x"]) };
        let names = ["in_body", "out_of_body", "handed_out"];
        let read = names.map(|name| node("Add", &["x", name]));
        let nodes = read.into_iter().chain([looped]).collect();
        let initializer = names.into_iter().chain(["unused"]).map(|name| floats(name, 16, 1)).collect();
        let output = vec![ValueInfoProto { name: Some("handed_out".to_owned()), ..ValueInfoProto::default() }];
        let graph = GraphProto { node: nodes, initializer, output, ..GraphProto::default() };
        let kind = Kind::of_graph(ModelProto { graph: Some(graph), ..ModelProto::default() }, &manifest());
        assert_eq!(placed(&kind), []);
    }

    #[test]
    fn a_model_that_is_prepared_otherwise_is_of_another_kind() {
        let graph = || ModelProto { graph: Some(GraphProto::default()), ..ModelProto::default() };
        let key = |manifest: &Manifest| Kind::of_graph(graph(), manifest).key;
        let exact = Target::Cuda(CudaTarget { tf32: false, ..CudaTarget::new(0) });
        let on_another = Target::Cuda(CudaTarget::new(3));
        assert_ne!(key(&manifest()), key(&Manifest { target: exact, ..manifest() }));
        assert_eq!(key(&manifest()), key(&Manifest { target: on_another, ..manifest() }));
        assert_ne!(key(&manifest()), key(&Manifest { await_before_run: Some(1), ..manifest() }));
    }
}
