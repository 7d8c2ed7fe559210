//! A run's inputs and outputs: where their bytes are, and where they shall go.

use faaswap_device::cuda::Registered;
use faaswap_protocol::{Bytes, DType, Refusal, Shape};
use faaswap_slab::Region;

use crate::RunError;

/// Where an input's bytes are.
#[derive(Clone, Copy, Debug)]
pub enum InputData<'a> {
    /// In memory that the peer can still write.
    Region(&'a Region),
    /// The same, perhaps where GPUs read by themselves: in memory that is registered.
    Registered(&'a Region, &'a Registered),
    /// In memory of ours.
    Bytes(&'a [u8]),
}

impl InputData<'_> {
    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        match self {
            Self::Region(region) | Self::Registered(region, _) => region.len(),
            Self::Bytes(bytes) => bytes.len(),
        }
    }
}

/// One input of a run.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// Its element type.
    pub dtype: DType,
    /// Its dimensions.
    pub shape: &'a Shape,
    /// Its bytes.
    pub data: InputData<'a>,
}

/// Where an output shall go.
#[derive(Debug)]
pub enum Place {
    /// Into shared memory.
    Region(Region),
    /// Into memory of ours, as long as the output.
    Memory(Vec<u8>),
}

impl Place {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Region(region) => region.len(),
            Self::Memory(bytes) => bytes.len(),
        }
    }
}

/// One output of a run, in its place.
#[derive(Debug)]
pub struct RunOutput {
    /// Its position in the signature.
    pub index: u16,
    /// Its element type.
    pub dtype: DType,
    /// Its dimensions.
    pub shape: Shape,
    /// Where it is.
    pub place: Place,
}

/// Asks where an output of this position, type, shape and size shall go.
pub type AskPlace<'f> = dyn FnMut(u16, DType, &Shape, Bytes) -> Result<Place, Refusal> + 'f;

pub(super) fn ask_place(place: &mut AskPlace<'_>, index: u16, dtype: DType, shape: &Shape) -> Result<Place, RunError> {
    let size = shape.size(dtype).map_err(RunError::failed)?;
    let given = place(index, dtype, shape, size)?;
    if size.as_len() == Some(given.len()) {
        return Ok(given);
    }
    Err(RunError::failed(format!("output {index} needs {} bytes, its place has {}", size.get(), given.len())))
}
