//! The master copy of a model's weights in host memory.

/// Placeholder, replaced in the next change.
#[derive(Debug)]
pub struct HostWeights {}
