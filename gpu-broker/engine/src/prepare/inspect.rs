//! Judges the original model before ONNX Runtime touches it: its size, its signature, its external data, its dimensions.
//!
//! What a graph computes is none of its business: operators, types and shapes inside are ONNX Runtime's to check, in
//! the same limited process.

use std::{
    fs,
    path::{Component, Path},
};

use bytes::Bytes as Buffer;
use faaswap_protocol::{
    Dim, Shape, Signature, TensorSpec,
    limits::{NAME_BYTES_MAX, RANK_MAX, TENSORS_MAX},
};
use prost::Message;

use super::graph::{count_nodes, find_cycle};
use crate::{
    EngineError, PrepareError,
    limits::{GRAPH_FILE_BYTES_MAX, NODES_MAX},
    onnx::{
        self, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, element_name,
        tensor_shape_proto::dimension, type_proto,
    },
};

/// Reads a graph file.
pub(super) fn read_model(path: &Path) -> Result<ModelProto, PrepareError> {
    let meta = fs::symlink_metadata(path).map_err(EngineError::io(path))?;
    if !meta.is_file() {
        return Err(PrepareError::rejected("the graph file is not a plain file"));
    }
    if meta.len() > GRAPH_FILE_BYTES_MAX.get() {
        return Err(PrepareError::rejected(format!(
            "the graph file has {} bytes, at most {} can be read: move the weights to external data",
            meta.len(),
            GRAPH_FILE_BYTES_MAX.get()
        )));
    }
    let bytes = Buffer::from(fs::read(path).map_err(EngineError::io(path))?);
    ModelProto::decode(bytes).map_err(|e| PrepareError::rejected(format!("the file is no ONNX model: {e}")))
}

/// Checks the model in `dir` and says what it takes and gives.
pub(super) fn inspect(dir: &Path, graph_file: &str) -> Result<Signature, PrepareError> {
    judge(dir, &read_named(dir, graph_file)?)
}

/// Reads a graph file that must lie in the folder itself.
pub(super) fn read_named(dir: &Path, graph_file: &str) -> Result<ModelProto, PrepareError> {
    read_model(&dir.join(plain_name(graph_file).map_err(PrepareError::rejected)?))
}

/// Checks a model whose files are in `dir` and says what it takes and gives.
pub(super) fn judge(dir: &Path, model: &ModelProto) -> Result<Signature, PrepareError> {
    let Some(graph) = &model.graph else {
        return Err(PrepareError::rejected("the file is no ONNX model: it has no graph"));
    };
    if model.opset_import.is_empty() || model.ir_version.is_none() {
        return Err(PrepareError::rejected("the file is no ONNX model: it names no opset or no version of the format"));
    }
    let nodes = count_nodes(graph);
    if nodes > NODES_MAX {
        return Err(PrepareError::rejected(format!("the graph has {nodes} nodes, at most {NODES_MAX} are allowed")));
    }
    graph.each_tensor(&mut |tensor| check_tensor(dir, tensor))?;
    for node in model.functions.iter().flat_map(|function| &function.node) {
        node.each_tensor(&mut |tensor| check_tensor(dir, tensor))?;
    }
    if has_sparse(graph) || model.functions.iter().any(|function| function.node.iter().any(node_has_sparse)) {
        return Err(PrepareError::rejected("sparse initializers are not supported"));
    }
    if let Some(node) = find_cycle(graph) {
        return Err(PrepareError::rejected(format!("the graph has a cycle through node {}", node.label())));
    }
    signature(graph)
}

fn signature(graph: &GraphProto) -> Result<Signature, PrepareError> {
    let given: Vec<&str> = graph.initializer.iter().map(TensorProto::name).collect();
    let inputs = graph.input.iter().filter(|input| !given.contains(&input.name()));
    let inputs = inputs.map(|value| tensor_spec("input", value)).collect::<Result<Vec<_>, _>>()?;
    let outputs = graph.output.iter().map(|value| tensor_spec("output", value)).collect::<Result<Vec<_>, _>>()?;
    if outputs.is_empty() {
        return Err(PrepareError::rejected("the graph has no outputs"));
    }
    for (what, count) in [("inputs", inputs.len()), ("outputs", outputs.len())] {
        if count > TENSORS_MAX {
            return Err(PrepareError::rejected(format!(
                "the graph has {count} {what}, at most {TENSORS_MAX} are allowed"
            )));
        }
    }
    Ok(Signature { inputs, outputs })
}

/// One input or output. An output without a shape counts as one of one open dimension: only its run can tell.
pub(super) fn tensor_spec(what: &str, value: &ValueInfoProto) -> Result<TensorSpec, PrepareError> {
    let name = value.name();
    let refuse = |why: String| PrepareError::rejected(format!("{what} `{}` {why}", cut(name)));
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.contains('\0') {
        return Err(refuse(format!("has a name of {} bytes, 1 to {NAME_BYTES_MAX} are allowed", name.len())));
    }
    let kind = value.r#type.as_ref().and_then(|t| t.value.as_ref());
    let tensor = match kind {
        Some(type_proto::Value::TensorType(tensor)) => tensor,
        Some(type_proto::Value::SequenceType(_)) => {
            return Err(refuse("is a sequence, only tensors are supported".into()));
        }
        Some(type_proto::Value::MapType(_)) => return Err(refuse("is a map, only tensors are supported".into())),
        Some(type_proto::Value::OptionalType(_)) => {
            return Err(refuse("is optional, only tensors are supported".into()));
        }
        Some(type_proto::Value::SparseTensorType(_)) => {
            return Err(refuse("is sparse, only dense tensors are supported".into()));
        }
        Some(type_proto::Value::OpaqueType(_)) => return Err(refuse("is opaque, only tensors are supported".into())),
        None => return Err(refuse("has no type".into())),
    };
    let Some(dtype) = onnx::dtype_of(tensor.elem_type()) else {
        return Err(refuse(format!(
            "has elements of type {}, which is not supported",
            element_name(tensor.elem_type())
        )));
    };
    let dims = match &tensor.shape {
        Some(shape) => shape.dim.iter().map(|dim| dim_of(dim.value.as_ref())).collect::<Result<Vec<_>, _>>(),
        None if what == "output" => Ok(vec![Dim::Any]),
        None => Err("has no shape".to_owned()),
    };
    let dims = dims.map_err(refuse)?;
    if dims.len() > RANK_MAX {
        return Err(refuse(format!("has {} dimensions, at most {RANK_MAX} are allowed", dims.len())));
    }
    let spec = TensorSpec { name: name.to_owned(), dtype, dims };
    let smallest: Vec<u64> = spec.dims.iter().map(|dim| if let Dim::Fixed(n) = dim { *n } else { 1 }).collect();
    Shape::new(smallest)
        .and_then(|shape| shape.size(dtype))
        .map_err(|e| refuse(format!("has an impossible shape: {e}")))?;
    Ok(spec)
}

fn dim_of(value: Option<&dimension::Value>) -> Result<Dim, String> {
    match value {
        Some(dimension::Value::DimValue(-1) | dimension::Value::DimParam(_)) | None => Ok(Dim::Any),
        Some(dimension::Value::DimValue(n)) => match u64::try_from(*n) {
            Ok(n) => Ok(Dim::Fixed(n)),
            Err(_) => Err(format!("has a dimension of {n}")),
        },
    }
}

fn check_tensor(dir: &Path, tensor: &TensorProto) -> Result<(), PrepareError> {
    let refuse = |why: String| PrepareError::rejected(format!("tensor `{}`: {why}", cut(tensor.name())));
    let element = tensor.data_type();
    let external = tensor.external().map_err(|why| refuse(why.to_owned()))?;
    if element == onnx::element::STRING && external.is_none() {
        return Ok(());
    }
    // ONNX Runtime knows more types than we can measure; those it may judge itself, as long as they lie in the graph.
    let len = onnx::data_len(element, &tensor.dims);
    let measurable = onnx::data_len(element, &[]).is_some();
    let Some(len) = len.or_else(|| (!measurable && external.is_none()).then_some(0)) else {
        return Err(refuse(format!(
            "{} elements with dimensions {:?} have no possible size",
            element_name(element),
            tensor.dims
        )));
    };
    match (external, &tensor.raw_data) {
        (Some(external), _) => check_external(dir, &external, len).map_err(refuse),
        (None, Some(raw)) if measurable && raw.len() as u64 != len => {
            Err(refuse(format!("dimensions {:?} need {len} bytes, {} are there", tensor.dims, raw.len())))
        }
        (None, Some(_)) => Ok(()),
        (None, None) => check_typed(tensor).map_err(refuse),
    }
}

/// A tensor whose elements are listed one by one must list about as many as its dimensions say.
fn check_typed(tensor: &TensorProto) -> Result<(), String> {
    let listed = [
        tensor.float_data.len(),
        tensor.int32_data.len(),
        tensor.int64_data.len(),
        tensor.double_data.len(),
        tensor.uint64_data.len(),
    ];
    let listed = listed.into_iter().max().unwrap_or(0) as u64;
    let wanted = onnx::data_len(2, &tensor.dims).unwrap_or(u64::MAX);
    // Two 4-bit or 8 two-bit elements share an entry; ONNX Runtime checks the exact number.
    if wanted > listed.saturating_mul(16) {
        return Err(format!("dimensions {:?} need {wanted} elements, {listed} are there", tensor.dims));
    }
    Ok(())
}

fn check_external(dir: &Path, external: &onnx::External<'_>, len: u64) -> Result<(), String> {
    let name = plain_name(external.location)?;
    let meta = fs::symlink_metadata(dir.join(name)).map_err(|e| format!("its external data `{}`: {e}", cut(name)))?;
    if !meta.is_file() {
        return Err(format!("its external data `{}` is not a plain file", cut(name)));
    }
    if external.len.is_some_and(|said| said != len) {
        return Err(format!("its external data has {:?} bytes, its dimensions need {len}", external.len.unwrap_or(0)));
    }
    match external.offset.checked_add(len) {
        Some(end) if end <= meta.len() => Ok(()),
        _ => Err(format!(
            "its external data lies at {} + {len} of `{}`, which has {} bytes",
            external.offset,
            cut(name),
            meta.len()
        )),
    }
}

/// A name that cannot leave the model's folder.
fn plain_name(name: &str) -> Result<&str, String> {
    let mut parts = Path::new(name).components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(only)), None) if only == name && !name.contains('\0') => Ok(name),
        _ => Err(format!("`{}` is not the plain name of a file in the model's folder", cut(name))),
    }
}

fn has_sparse(graph: &GraphProto) -> bool {
    !graph.sparse_initializer.is_empty() || graph.node.iter().any(node_has_sparse)
}

fn node_has_sparse(node: &NodeProto) -> bool {
    node.attribute.iter().any(|a| a.sparse_tensor.is_some() || !a.sparse_tensors.is_empty())
        || node.bodies().any(has_sparse)
}

/// A name as it can stand in a message.
fn cut(name: &str) -> &str {
    &name[..name.floor_char_boundary(80)]
}
