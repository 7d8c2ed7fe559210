//! The ONNX messages as `proto/onnx.proto` describes them, and what else is needed to walk a graph.
//!
//! Nothing here decides anything about a model; see `prepare`.

#[allow(
    clippy::doc_markdown,
    clippy::large_enum_variant,
    clippy::wildcard_enum_match_arm,
    missing_debug_implementations,
    unreachable_pub,
    reason = "prost writes it"
)]
mod messages {
    include!(concat!(env!("OUT_DIR"), "/faaswap.onnx.rs"));
}

use bytes::Bytes as Buffer;
use faaswap_protocol::DType;

pub use messages::*;

/// Element types as ONNX numbers them, beyond those that a request can carry.
pub mod element {
    /// Text: no accelerator computes on it.
    pub const STRING: i32 = 8;
    /// First and last of the four one-byte float types.
    pub const FLOAT8: std::ops::RangeInclusive<i32> = 17..=20;
    /// Two elements per byte: unsigned, then signed.
    pub const INT4: std::ops::RangeInclusive<i32> = 21..=22;
}

/// ONNX's number of an element type.
pub const fn element_of(dtype: DType) -> i32 {
    match dtype {
        DType::F32 => 1,
        DType::U8 => 2,
        DType::I8 => 3,
        DType::U16 => 4,
        DType::I16 => 5,
        DType::I32 => 6,
        DType::I64 => 7,
        DType::Bool => 9,
        DType::F16 => 10,
        DType::F64 => 11,
        DType::U32 => 12,
        DType::U64 => 13,
        DType::Bf16 => 16,
    }
}

/// The element type with this number; `None` for those that no request can carry.
pub fn dtype_of(element: i32) -> Option<DType> {
    DType::ALL.into_iter().find(|&dtype| element_of(dtype) == element)
}

/// Whether it is the number of a floating-point type that requests can carry.
pub fn is_float(element: i32) -> bool {
    matches!(dtype_of(element), Some(DType::F16 | DType::Bf16 | DType::F32 | DType::F64))
}

/// What ONNX calls an element type, for messages.
pub fn element_name(element: i32) -> String {
    match (dtype_of(element), element) {
        (Some(dtype), _) => dtype.to_string(),
        (None, element::STRING) => "STRING".to_owned(),
        (None, 14) => "COMPLEX64".to_owned(),
        (None, 15) => "COMPLEX128".to_owned(),
        (None, other) => format!("element type {other}"),
    }
}

/// Size of a tensor's data; `None` when a dimension is negative, the size overflows, or the type has no fixed size.
pub fn data_len(element: i32, dims: &[i64]) -> Option<u64> {
    let elements = dims.iter().try_fold(1_u64, |n, &dim| n.checked_mul(u64::try_from(dim).ok()?))?;
    // A zero must not hide an overflow in the other dimensions: ONNX Runtime multiplies them in its own order.
    dims.iter().try_fold(1_u64, |n, &dim| n.checked_mul(u64::try_from(dim).ok()?.max(1)))?.checked_mul(16)?;
    match element {
        14 => elements.checked_mul(8),
        15 => elements.checked_mul(16),
        e if element::FLOAT8.contains(&e) => Some(elements),
        e if element::INT4.contains(&e) => Some(elements.div_ceil(2)),
        e => elements.checked_mul(dtype_of(e)?.size()),
    }
}

/// Where a tensor's data lies when it is not inside the graph's own file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct External<'a> {
    /// The file, as the graph names it.
    pub location: &'a str,
    /// First byte.
    pub offset: u64,
    /// Number of bytes, where it is told.
    pub len: Option<u64>,
}

impl TensorProto {
    /// Where the data lies outside the graph; `Ok(None)` when it is inside.
    pub fn external(&self) -> Result<Option<External<'_>>, &'static str> {
        if self.data_location() != tensor_proto::DataLocation::External {
            return Ok(None);
        }
        let entry = |key: &str| self.external_data.iter().find(|e| e.key() == key).map(StringStringEntryProto::value);
        let number = |key: &str| entry(key).map(str::parse::<u64>).transpose();
        let location = entry("location").ok_or("its external data names no file")?;
        let offset = number("offset").map_err(|_| "its external data has an offset that is no number")?.unwrap_or(0);
        let len = number("length").map_err(|_| "its external data has a length that is no number")?;
        Ok(Some(External { location, offset, len }))
    }

    /// Says that the data lies in another file.
    pub fn set_external(&mut self, location: &str, offset: u64, len: u64) {
        self.clear_data();
        self.set_data_location(tensor_proto::DataLocation::External);
        let entry = |key: &str, value: String| StringStringEntryProto { key: Some(key.to_owned()), value: Some(value) };
        self.external_data = vec![
            entry("location", location.to_owned()),
            entry("offset", offset.to_string()),
            entry("length", len.to_string()),
        ];
    }

    /// Puts the data into the graph itself.
    pub fn set_raw(&mut self, data: Buffer) {
        self.clear_data();
        self.raw_data = Some(data);
    }

    fn clear_data(&mut self) {
        self.raw_data = None;
        self.float_data.clear();
        self.int32_data.clear();
        self.int64_data.clear();
        self.double_data.clear();
        self.uint64_data.clear();
        self.external_data.clear();
        self.data_location = None;
    }
}

/// Whether it is the domain of the standard's own operators.
fn is_standard(domain: &str) -> bool {
    matches!(domain, "" | "ai.onnx")
}

impl NodeProto {
    /// Whether it is this operator of the standard's.
    pub fn is(&self, op: &str) -> bool {
        self.op_type() == op && is_standard(self.domain())
    }

    /// The graphs that this node runs itself: branches and loop bodies.
    pub fn bodies(&self) -> impl Iterator<Item = &GraphProto> {
        self.attribute.iter().flat_map(|attribute| attribute.g.iter().chain(&attribute.graphs))
    }

    /// The same, to be changed.
    pub fn bodies_mut(&mut self) -> impl Iterator<Item = &mut GraphProto> {
        self.attribute.iter_mut().flat_map(|attribute| attribute.g.iter_mut().chain(&mut attribute.graphs))
    }

    /// How to call the node in a message.
    pub fn label(&self) -> String {
        format!(
            "{} `{}`",
            self.op_type(),
            if self.name().is_empty() { self.output.join(",") } else { self.name().into() }
        )
    }
}

impl ModelProto {
    /// The version of the standard's operators; 0 where none is named.
    pub fn opset(&self) -> i64 {
        let standard = self.opset_import.iter().find(|import| is_standard(import.domain()));
        standard.map_or(0, OperatorSetIdProto::version)
    }
}

impl AttributeProto {
    /// One that is a list of integers.
    pub fn of_ints(name: &str, values: &[i64]) -> Self {
        let (name, r#type) = (Some(name.to_owned()), Some(attribute_proto::AttributeType::Ints.into()));
        Self { name, r#type, ints: values.to_vec(), ..Self::default() }
    }

    /// One that is an integer.
    pub fn of_int(name: &str, value: i64) -> Self {
        let (name, r#type) = (Some(name.to_owned()), Some(attribute_proto::AttributeType::Int.into()));
        Self { name, r#type, i: Some(value), ..Self::default() }
    }
}

impl ValueInfoProto {
    /// The element type, where the value is a tensor.
    pub fn tensor_element(&self) -> Option<i32> {
        match self.r#type.as_ref()?.value.as_ref()? {
            type_proto::Value::TensorType(tensor) => tensor.elem_type,
            type_proto::Value::SequenceType(_)
            | type_proto::Value::MapType(_)
            | type_proto::Value::OptionalType(_)
            | type_proto::Value::SparseTensorType(_)
            | type_proto::Value::OpaqueType(_) => None,
        }
    }
}

impl GraphProto {
    /// Calls `see` for every tensor in the graph, in its bodies and in the attributes of its nodes.
    pub fn each_tensor<'a, E>(&'a self, see: &mut dyn FnMut(&'a TensorProto) -> Result<(), E>) -> Result<(), E> {
        self.initializer.iter().try_for_each(&mut *see)?;
        self.sparse_initializer.iter().try_for_each(|sparse| sparse.each_tensor(see))?;
        self.node.iter().try_for_each(|node| node.each_tensor(see))
    }
}

impl SparseTensorProto {
    fn each_tensor<'a, E>(&'a self, see: &mut dyn FnMut(&'a TensorProto) -> Result<(), E>) -> Result<(), E> {
        self.values.iter().chain(&self.indices).try_for_each(see)
    }
}

impl NodeProto {
    /// Calls `see` for every tensor in the node's attributes, bodies included.
    pub fn each_tensor<'a, E>(&'a self, see: &mut dyn FnMut(&'a TensorProto) -> Result<(), E>) -> Result<(), E> {
        for attribute in &self.attribute {
            attribute.t.iter().chain(&attribute.tensors).try_for_each(&mut *see)?;
            let mut sparse = attribute.sparse_tensor.iter().chain(&attribute.sparse_tensors);
            sparse.try_for_each(|sparse| sparse.each_tensor(see))?;
        }
        self.bodies().try_for_each(|body| body.each_tensor(see))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_of_a_hostile_tensor_is_none() {
        assert_eq!(data_len(1, &[2, 3]), Some(24));
        assert_eq!(data_len(1, &[]), Some(4), "a scalar");
        assert_eq!(data_len(22, &[3]), Some(2), "two 4-bit elements per byte");
        assert_eq!(data_len(1, &[-1]), None);
        assert_eq!(data_len(1, &[i64::MAX, 3]), None);
        assert_eq!(data_len(1, &[0, i64::MAX, i64::MAX]), None, "a zero hides no overflow");
        assert_eq!(data_len(element::STRING, &[1]), None);
        assert_eq!(data_len(999, &[1]), None);
    }

    #[test]
    fn every_type_of_a_request_has_its_onnx_number() {
        for dtype in DType::ALL {
            assert_eq!(dtype_of(element_of(dtype)), Some(dtype));
        }
    }
}
