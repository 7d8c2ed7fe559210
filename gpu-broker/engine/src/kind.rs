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
    EngineError, Manifest, Prepared,
    limits::WEIGHT_ALIGN,
    manifest::Initializer,
    onnx::{self, GraphProto, ModelProto, TensorProto},
};

/// Nodes that read all of their inputs on the device, where they run there.
const ON_DEVICE: [&str; 22] = [
    "Add",
    "BatchNormalization",
    "BiasGelu",
    "Conv",
    "ConvTranspose",
    "Div",
    "FastGelu",
    "FusedConv",
    "FusedGemm",
    "FusedMatMul",
    "Gelu",
    "Gemm",
    "InstanceNormalization",
    "LayerNormalization",
    "MatMul",
    "Mul",
    "NhwcConv",
    "NhwcFusedConv",
    "PRelu",
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
    "Sub",
];
/// Smaller constants may be about shapes, which are computed on the host.
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
    let held = graph.initializer.iter().filter(|tensor| is_constant(tensor));
    let mut held: HashMap<&str, bool> = held.map(|tensor| (tensor.name(), false)).collect();
    for node in &graph.node {
        let on_device = ON_DEVICE.contains(&node.op_type()) && node.bodies().next().is_none();
        for name in &node.input {
            match held.get_mut(name.as_str()) {
                Some(is_read) if on_device => *is_read = true,
                Some(_) => {
                    held.remove(name.as_str());
                }
                None => {}
            }
        }
        for body in node.bodies() {
            forget_all_of(body, &mut held);
        }
    }
    for output in &graph.output {
        held.remove(output.name());
    }
    held.into_iter().filter(|(_, is_read)| *is_read).map(|(name, _)| name.to_owned()).collect()
}

/// Takes out what a body reads.
fn forget_all_of(body: &GraphProto, held: &mut HashMap<&str, bool>) {
    for node in &body.node {
        node.input.iter().for_each(|name| {
            held.remove(name.as_str());
        });
        node.bodies().for_each(|inner| forget_all_of(inner, held));
    }
}

fn is_constant(tensor: &TensorProto) -> bool {
    let elements = tensor.dims.iter().try_fold(1_i64, |all, dim| all.checked_mul(*dim));
    let len = onnx::data_len(tensor.data_type(), &tensor.dims);
    let is_whole = tensor.raw_data.as_ref().is_some_and(|raw| Some(raw.len() as u64) == len);
    onnx::is_float(tensor.data_type()) && is_whole && elements.is_some_and(|elements| elements >= ELEMENTS_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        CudaTarget, Target,
        manifest::tests::manifest,
        onnx::{AttributeProto, NodeProto, ValueInfoProto},
    };

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
    fn what_bodies_read_and_what_is_handed_out_is_of_the_kind() {
        let mut body = AttributeProto { g: Some(GraphProto::default()), ..AttributeProto::default() };
        body.g.get_or_insert_default().node.push(node("Add", &["inner", "in_body"]));
        let looped = NodeProto { attribute: vec![body], ..node("Loop", &["x"]) };
        let nodes = vec![node("Add", &["x", "in_body"]), node("Add", &["x", "handed_out"]), looped];
        let initializer = vec![floats("in_body", 16, 1), floats("handed_out", 16, 1), floats("unused", 16, 1)];
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
