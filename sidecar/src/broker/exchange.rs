//! What goes to the broker for one inference, and what comes back.

use std::time::Duration;

use bytes::Bytes;
use faaswap_protocol::{DType, Shape, ShapeError, Timing};

/// One input of a request.
#[derive(Clone, Debug)]
pub struct TensorInput {
    /// Position among the model's inputs.
    pub index: u16,
    /// Element type.
    pub dtype: DType,
    /// Dimensions.
    pub shape: Shape,
    /// The bytes, little-endian, row-major, in as many pieces as they came in.
    pub data: Vec<Bytes>,
}

/// One inference to ask for.
#[derive(Clone, Debug, Default)]
pub struct InferRequest {
    /// Every input of the signature, once each.
    pub inputs: Vec<TensorInput>,
    /// Positions of the wanted outputs; empty: all.
    pub outputs: Vec<u16>,
    /// The caller's own time limit. With one, nobody waits longer, and the broker is told; without one the function's
    /// SLO counts, and an answer that is late is still an answer.
    pub timeout: Option<Duration>,
}

impl InferRequest {
    /// Adds an input: little-endian, row-major bytes, which are not copied here.
    pub fn input(mut self, index: u16, dtype: DType, dims: &[u64], data: Bytes) -> Result<Self, ShapeError> {
        self.inputs.push(TensorInput { index, dtype, shape: Shape::new(dims)?, data: vec![data] });
        Ok(self)
    }

    /// Asks for this output, after those asked for already; without any, all outputs come.
    #[must_use]
    pub fn output(mut self, index: u16) -> Self {
        self.outputs.push(index);
        self
    }

    /// Sets the caller's own time limit.
    #[must_use]
    pub fn within(mut self, limit: Duration) -> Self {
        self.timeout = Some(limit);
        self
    }
}

/// One output of an answer.
#[derive(Clone, Debug)]
pub struct OutputTensor {
    /// Position among the model's outputs.
    pub index: u16,
    /// Element type.
    pub dtype: DType,
    /// Dimensions.
    pub shape: Shape,
    /// The bytes, where the broker wrote them: drop them soon, they occupy the slab.
    pub data: Bytes,
}

/// What came of an inference.
#[derive(Clone, Debug)]
pub struct InferAnswer {
    /// In the order asked for.
    pub outputs: Vec<OutputTensor>,
    /// Where the time went.
    pub timing: Timing,
}
