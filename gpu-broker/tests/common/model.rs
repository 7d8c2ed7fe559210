//! Small models whose outputs are known without running them: matrices of small whole numbers, exact in f32.

use std::path::{Path, PathBuf};

use faaswap_engine::onnx::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, TensorShapeProto, TypeProto,
    ValueInfoProto, attribute_proto, element_of, tensor_shape_proto, type_proto,
};
use faaswap_protocol::DType;
use prost::Message;

/// `y = x W`, with `x` of shape `[-1, size]` and a `W` that depends on the seed.
pub struct Linear {
    pub size: usize,
    pub seed: usize,
}

impl Linear {
    /// Small whole numbers, so that sums are exact. As many seeds give as many models.
    fn weight(&self, row: usize, column: usize) -> f32 {
        const NUMBERS: usize = 31;
        let mixed = (row * 37 + column * 17 + self.seed * 101 + row * column) % NUMBERS;
        f32::from(u8::try_from(mixed).unwrap()) - 15.0
    }

    pub fn input(&self, salt: usize) -> Vec<f32> {
        (0..self.size).map(|i| f32::from(u8::try_from((i * 13 + salt * 29) % 5).unwrap()) - 2.0).collect()
    }

    pub fn expected(&self, input: &[f32]) -> Vec<f32> {
        let sum = |column| input.iter().enumerate().map(|(row, x)| x * self.weight(row, column)).sum();
        (0..self.size).map(sum).collect()
    }

    pub fn proto(&self) -> ModelProto {
        let size = i64::try_from(self.size).unwrap();
        let values = (0..self.size).flat_map(|row| (0..self.size).map(move |column| (row, column)));
        let raw: Vec<u8> = values.flat_map(|(row, column)| self.weight(row, column).to_le_bytes()).collect();
        let weight = TensorProto {
            name: Some("w".to_owned()),
            dims: vec![size, size],
            data_type: Some(element_of(DType::F32)),
            raw_data: Some(raw.into()),
            ..TensorProto::default()
        };
        let node = NodeProto {
            op_type: Some("MatMul".to_owned()),
            name: Some("product".to_owned()),
            input: vec!["x".to_owned(), "w".to_owned()],
            output: vec!["y".to_owned()],
            ..NodeProto::default()
        };
        model_of("linear", (vec![node], vec![weight]), (value("x", &[-1, size]), value("y", &[-1, size])))
    }

    pub fn write(&self, dir: &Path) -> PathBuf {
        let path = dir.join(format!("linear-{}-{}.onnx", self.size, self.seed));
        std::fs::write(&path, self.proto().encode_to_vec()).unwrap();
        path
    }
}

pub fn value(name: &str, dims: &[i64]) -> ValueInfoProto {
    value_of(DType::F32, name, dims)
}

pub fn value_of(dtype: DType, name: &str, dims: &[i64]) -> ValueInfoProto {
    let dim = |&dim: &i64| tensor_shape_proto::Dimension {
        value: Some(if dim < 0 {
            tensor_shape_proto::dimension::Value::DimParam("n".to_owned())
        } else {
            tensor_shape_proto::dimension::Value::DimValue(dim)
        }),
        denotation: None,
    };
    let shape = Some(TensorShapeProto { dim: dims.iter().map(dim).collect() });
    let tensor = type_proto::Tensor { elem_type: Some(element_of(dtype)), shape };
    let kind = TypeProto { value: Some(type_proto::Value::TensorType(tensor)), denotation: None };
    ValueInfoProto { name: Some(name.to_owned()), r#type: Some(kind), ..ValueInfoProto::default() }
}

/// A model of these nodes and weights, with one input and one output.
fn model_of(
    name: &str,
    (node, initializer): (Vec<NodeProto>, Vec<TensorProto>),
    (input, output): (ValueInfoProto, ValueInfoProto),
) -> ModelProto {
    let graph = GraphProto {
        name: Some(name.to_owned()),
        node,
        initializer,
        input: vec![input],
        output: vec![output],
        ..GraphProto::default()
    };
    ModelProto {
        ir_version: Some(8),
        opset_import: vec![OperatorSetIdProto { domain: Some(String::new()), version: Some(17) }],
        graph: Some(graph),
        ..ModelProto::default()
    }
}

/// The file of such a model.
pub fn write_graph(
    dir: &Path,
    name: &str,
    graph: (Vec<NodeProto>, Vec<TensorProto>),
    ends: (ValueInfoProto, ValueInfoProto),
) -> PathBuf {
    let path = dir.join(format!("{name}.onnx"));
    std::fs::write(&path, model_of(name, graph, ends).encode_to_vec()).unwrap();
    path
}

/// A node with one output.
pub fn node(op: &str, inputs: &[&str], output: &str) -> NodeProto {
    let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
    NodeProto {
        op_type: Some(op.to_owned()),
        name: Some(output.to_owned()),
        input: texts(inputs),
        output: texts(&[output]),
        ..NodeProto::default()
    }
}

/// A weight of floats.
pub fn table(name: &str, dims: &[i64], values: &[f32]) -> TensorProto {
    TensorProto {
        name: Some(name.to_owned()),
        dims: dims.to_vec(),
        data_type: Some(element_of(DType::F32)),
        raw_data: Some(values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>().into()),
        ..TensorProto::default()
    }
}

/// A table of 1000 values that is looked up by position, and the values.
pub fn lookup(dir: &Path) -> (PathBuf, Vec<f32>) {
    let values: Vec<f32> = (0..1000_u16).map(|n| f32::from(n) * 3.0).collect();
    let graph = (vec![node("Gather", &["w", "x"], "y")], vec![table("w", &[1000], &values)]);
    let ends = (value_of(DType::I64, "x", &[-1, 4]), value("y", &[-1, 4]));
    (write_graph(dir, "lookup", graph, ends), values)
}

/// An attribute of a node: some whole numbers.
pub fn integers(name: &str, values: &[i64]) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_owned()),
        r#type: Some(attribute_proto::AttributeType::Ints.into()),
        ints: values.to_vec(),
        ..AttributeProto::default()
    }
}
