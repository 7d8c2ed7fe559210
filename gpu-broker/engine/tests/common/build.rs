//! Small ONNX models, built message by message.

use faaswap_engine::onnx::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, TensorShapeProto, TypeProto,
    ValueInfoProto, attribute_proto::AttributeType, element_of, tensor_shape_proto, type_proto,
};
use faaswap_protocol::DType;
use prost::Message;

use super::Made;

pub fn node(op: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    NodeProto {
        op_type: Some(op.to_owned()),
        name: Some(format!("{op}:{}", outputs.join(","))),
        input: inputs.iter().map(|&name| name.to_owned()).collect(),
        output: outputs.iter().map(|&name| name.to_owned()).collect(),
        ..NodeProto::default()
    }
}

pub fn with_int(mut node: NodeProto, name: &str, value: i64) -> NodeProto {
    let r#type = Some(AttributeType::Int.into());
    node.attribute.push(AttributeProto { name: Some(name.to_owned()), r#type, i: Some(value), ..Default::default() });
    node
}

pub fn with_graph(mut node: NodeProto, name: &str, graph: GraphProto) -> NodeProto {
    let r#type = Some(AttributeType::Graph.into());
    node.attribute.push(AttributeProto { name: Some(name.to_owned()), r#type, g: Some(graph), ..Default::default() });
    node
}

/// A value of this type; negative dimensions are open.
pub fn value(name: &str, element: i32, dims: &[i64]) -> ValueInfoProto {
    let dim = |&dim: &i64| tensor_shape_proto::Dimension {
        value: Some(if dim < 0 {
            tensor_shape_proto::dimension::Value::DimParam(format!("{name}_{}", -dim))
        } else {
            tensor_shape_proto::dimension::Value::DimValue(dim)
        }),
        denotation: None,
    };
    let shape = Some(TensorShapeProto { dim: dims.iter().map(dim).collect() });
    typed(name, type_proto::Value::TensorType(type_proto::Tensor { elem_type: Some(element), shape }))
}

pub fn typed(name: &str, kind: type_proto::Value) -> ValueInfoProto {
    let r#type = Some(TypeProto { value: Some(kind), denotation: None });
    ValueInfoProto { name: Some(name.to_owned()), r#type, ..Default::default() }
}

pub fn f32_value(name: &str, dims: &[i64]) -> ValueInfoProto {
    value(name, element_of(DType::F32), dims)
}

/// An initializer of made-up numbers.
pub fn weight(name: &str, dtype: DType, dims: &[u64], seed: usize) -> TensorProto {
    tensor(name, &Made::new(dtype, dims, seed))
}

pub fn tensor(name: &str, made: &Made) -> TensorProto {
    TensorProto {
        name: Some(name.to_owned()),
        data_type: Some(element_of(made.dtype)),
        dims: made.shape.dims().iter().map(|&dim| i64::try_from(dim).unwrap()).collect(),
        raw_data: Some(made.bytes().into()),
        ..Default::default()
    }
}

pub fn graph(
    nodes: Vec<NodeProto>,
    inputs: Vec<ValueInfoProto>,
    outputs: Vec<ValueInfoProto>,
    weights: Vec<TensorProto>,
) -> GraphProto {
    let name = Some("test".to_owned());
    GraphProto { name, node: nodes, input: inputs, output: outputs, initializer: weights, ..Default::default() }
}

pub fn model(graph: GraphProto) -> ModelProto {
    let opset = |domain: &str, version| OperatorSetIdProto { domain: Some(domain.to_owned()), version: Some(version) };
    ModelProto {
        ir_version: Some(9),
        opset_import: vec![opset("", 17), opset("com.microsoft", 1)],
        graph: Some(graph),
        ..Default::default()
    }
}

/// Writes the model into a folder of its own.
pub fn write(model: &ModelProto) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.onnx");
    std::fs::write(&path, model.encode_to_vec()).unwrap();
    (dir, path)
}
