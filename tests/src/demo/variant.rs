//! Copies of a model with weights of their own: what fine-tuned variants of one architecture are to a broker.

use std::{fs, path::Path};

use faaswap_engine::onnx::{GraphProto, ModelProto, TensorProto, dtype_of, element_of};
use faaswap_protocol::DType;
use prost::Message;

use crate::{Result, Trouble, random::Random};

/// How far each weight moves, as a share of itself: far enough for other outputs, not so far that the model forgets.
const CHANGE: f32 = 0.01;
/// Smaller tensors are left alone: among them are epsilons, scales and sizes.
const ELEMENTS_MIN: usize = 64;

/// Name and type of a model's input or output.
pub type Port = (String, DType);

/// Reads a model.
pub fn read(path: &Path) -> Result<ModelProto> {
    let bytes = fs::read(path).map_err(Trouble::while_doing(path.display()))?;
    Ok(ModelProto::decode(&bytes[..])?)
}

/// Moves every float weight a little, at random by the seed.
pub fn vary(model: &mut ModelProto, seed: u64) {
    if let Some(graph) = &mut model.graph {
        vary_graph(graph, &mut Random::new(seed));
    }
}

fn vary_graph(graph: &mut GraphProto, random: &mut Random) {
    for tensor in &mut graph.initializer {
        vary_tensor(tensor, random);
    }
    for node in &mut graph.node {
        let is_constant = node.op_type() == "Constant";
        for tensor in node.attribute.iter_mut().filter(|_| is_constant).filter_map(|attribute| attribute.t.as_mut()) {
            vary_tensor(tensor, random);
        }
        for body in node.bodies_mut() {
            vary_graph(body, random);
        }
    }
}

fn vary_tensor(tensor: &mut TensorProto, random: &mut Random) {
    if tensor.data_type() != element_of(DType::F32) {
        return;
    }
    if let Some(raw) = tensor.raw_data.as_ref().filter(|raw| raw.len() >= ELEMENTS_MIN * 4) {
        let values = raw.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes));
        let moved = values.flat_map(|value| (value * (1.0 + CHANGE * random.signed())).to_le_bytes());
        tensor.raw_data = Some(moved.collect::<Vec<u8>>().into());
    }
    if tensor.float_data.len() >= ELEMENTS_MIN {
        for value in &mut tensor.float_data {
            *value *= 1.0 + CHANGE * random.signed();
        }
    }
}

/// The outputs of a model, in order.
pub fn outputs(model: &ModelProto) -> Result<Vec<Port>> {
    let graph = model.graph.as_ref().ok_or_else(|| Trouble::new("the model has no graph"))?;
    let ports = graph.output.iter().map(|output| {
        let dtype = output.tensor_element().and_then(dtype_of);
        let untold = || Trouble::new(format!("output {} has no type that a request carries", output.name()));
        Ok((output.name().to_owned(), dtype.ok_or_else(untold)?))
    });
    ports.collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::models;

    #[test]
    fn a_variant_has_other_weights_and_the_same_shape() {
        let original = models::matmul(16, 1);
        let vary = |seed| {
            let mut model = original.clone();
            vary(&mut model, seed);
            model
        };
        assert_ne!(vary(1), original);
        assert_ne!(vary(1), vary(2));
        assert_eq!(vary(1), vary(1));
        assert_eq!(vary(1).encoded_len(), original.encoded_len());
        assert_eq!(outputs(&original).unwrap(), [("y".to_owned(), DType::F32)]);
    }
}
