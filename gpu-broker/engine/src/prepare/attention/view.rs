//! Recognizes attention in a graph.

use faaswap_protocol::DType;

use super::{
    super::{graph::View, verify},
    Attention,
};
use crate::onnx::{self, AttributeProto, NodeProto, element_of};

const SOFTMAXES: [&str; 2] = ["Softmax", "BiasSoftmax"];
/// From (batch, row, head, size) to (batch, head, row, size), and back.
const HEADS_FIRST: [i64; 4] = [0, 2, 1, 3];
/// From (batch, row, head, size) to (batch, head, size, row).
const ROWS_LAST: [i64; 4] = [0, 2, 3, 1];

/// What rows are split into by a reshape.
struct Split {
    four: String,
    heads: i64,
    rows: i64,
}

impl<'g> View<'g> {
    /// The attention that ends with this node.
    pub(super) fn attention(&self, last: &NodeProto) -> Option<Attention> {
        let mixed = self.transposed(last, &HEADS_FIRST)?;
        let output = last.output.first()?;
        if !self.is_only_reshaped(output) {
            return None;
        }
        let product = self.only(mixed, &["MatMul"])?;
        let (softmax, zero) = self.weights(product.input.first()?)?;
        let (scores, bias) = self.scores(softmax)?;
        let (keys_order, scale) = product_of(scores)?;
        let queries = self.split(scores.input.first()?, &HEADS_FIRST)?;
        let keys = self.split(scores.input.get(1)?, keys_order)?;
        let values = self.split(product.input.get(1)?, &HEADS_FIRST)?;
        let same_heads = queries.heads == keys.heads && keys.heads == values.heads;
        same_heads.then(|| Attention {
            heads: queries.heads,
            rows: queries.rows,
            inputs: [queries.four, keys.four, values.four],
            scale,
            // Where nothing infinite is added there are numbers in each row.
            zero: bias.filter(|bias| !self.is_finite(bias)).and(zero).map(str::to_owned),
            bias: bias.map(str::to_owned),
            output: output.clone(),
        })
    }

    /// The softmax over keys that gives this value, and the zero that is put where that is no number.
    fn weights(&self, name: &str) -> Option<(&'g NodeProto, Option<&'g str>)> {
        let softmax = |node: &&NodeProto| {
            let default = if node.op_type() == "BiasSoftmax" { 1 } else { -1 };
            SOFTMAXES.contains(&node.op_type()) && matches!(int(node, "axis").unwrap_or(default), -1 | 3)
        };
        if let Some(found) = self.only(name, &SOFTMAXES) {
            return Some(found).filter(softmax).map(|found| (found, None));
        }
        let [condition, zero, weights] = &self.only(name, &["Where"])?.input[..] else { return None };
        let is_nan = self.only(condition, &["IsNaN"]).is_some_and(|node| node.input.first() == Some(weights));
        let readers = self.readers.get(weights.as_str()).map_or(0, Vec::len);
        let is_guard = is_nan && readers == 2 && !self.kept.contains(weights.as_str());
        let is_zero = self.floats(zero).is_some_and(|values| values.iter().all(|&value| value == 0.0));
        let found = self.producers.get(weights.as_str()).copied().filter(|_| is_guard && is_zero);
        found.filter(softmax).map(|found| (found, Some(zero.as_str())))
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
        let [_, rows, heads, size] = self.ints(reshape.input.get(1)?)?[..] else { return None };
        let heads = match heads {
            // Whatever is left of the row.
            -1 if size > 0 => self.width(reshape.input.first()?).filter(|width| width % size == 0)? / size,
            heads => heads,
        };
        (rows > 0 && heads > 0 && size != 0).then(|| Split { four: four.to_owned(), heads, rows })
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
