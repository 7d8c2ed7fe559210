//! Runs of a program, on a GPU.

use faaswap_device::cuda::Registered;
use faaswap_protocol::DType;
use faaswap_slab::Region;

use super::{
    Bound,
    io::{AskPlace, Input, InputData, Place, RunOutput, ask_place},
};
use crate::{
    RunError,
    limits::IN_PLACE_BYTES_MIN,
    program::{Programs, Running},
};

impl Bound {
    /// Whether a run of these inputs would gain by their memory being registered, which it is not.
    pub fn would_read_in_place(&self, inputs: &[Input<'_>]) -> bool {
        let gains = |input: &Input<'_>| match input.data {
            InputData::Region(region) => may_be_in_place(input.dtype, region.len()),
            InputData::Registered(..) | InputData::Bytes(_) => false,
        };
        let has_program =
            || self.programs.is_some() || self.shapes.as_ref().is_some_and(|s| s.program(inputs).is_some());
        inputs.iter().any(gains) && has_program()
    }

    /// Runs the program. Its inputs are copies on the device, which no peer can change.
    pub(super) fn run_program(
        &self,
        programs: &Programs,
        inputs: &[Input<'_>],
        wanted: &[u16],
        place: &mut AskPlace<'_>,
    ) -> Result<Vec<RunOutput>, RunError> {
        let specs = &self.manifest.signature.outputs;
        let places = wanted.iter().map(|&index| {
            let (spec, slot) = (&specs[usize::from(index)], &programs.io.outputs[usize::from(index)]);
            Ok((index, spec.dtype, slot.shape.clone(), ask_place(place, index, spec.dtype, &slot.shape)?))
        });
        let places = places.collect::<Result<Vec<_>, RunError>>()?;
        let mut run = programs.begin().map_err(RunError::failed)?;
        for (index, input) in inputs.iter().enumerate() {
            bring(&mut run, index, input)?;
        }
        let weights = self.range().map(|range| (range, self.manifest.await_before_run));
        run.go(weights).map_err(RunError::failed)?;
        let outputs = places.into_iter().map(|(index, dtype, shape, mut place)| {
            let bytes = run.output(usize::from(index)).map_err(RunError::failed)?;
            match &mut place {
                Place::Region(region) => region.write(0, bytes).map_err(RunError::failed)?,
                Place::Memory(memory) => memory.copy_from_slice(bytes),
            }
            Ok(RunOutput { index, dtype, shape, place })
        });
        outputs.collect()
    }
}

/// Copies an input to pinned memory of the lane, or has the device read it where it is.
fn bring<'p>(run: &mut Running<'p>, index: usize, input: &Input<'p>) -> Result<(), RunError> {
    if let InputData::Registered(region, memory) = input.data
        && in_place(run, index, input.dtype, (region, memory))?
    {
        return Ok(());
    }
    let into = run.input(index).map_err(RunError::failed)?;
    match input.data {
        InputData::Region(region) | InputData::Registered(region, _) => {
            region.read(0, into).map_err(RunError::failed)?;
        }
        InputData::Bytes(bytes) => into.copy_from_slice(bytes),
    }
    Ok(())
}

fn in_place<'p>(
    run: &mut Running<'p>,
    index: usize,
    dtype: DType,
    (region, memory): (&Region, &'p Registered),
) -> Result<bool, RunError> {
    let may = may_be_in_place(dtype, region.len());
    Ok(may && run.read_in_place(index, memory, region.as_ptr().addr()).map_err(RunError::failed)?)
}

/// Whether a device may read an input of a peer's where it is, and gains by it.
///
/// The peer may write there while it is read. Numbers that change harm its own function alone. What may choose addresses is
/// always copied out of shared memory first, and judged where it cannot change.
fn may_be_in_place(dtype: DType, len: usize) -> bool {
    !dtype.can_index() && len >= IN_PLACE_BYTES_MIN
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_large_inputs_that_choose_no_addresses_may_be_in_place() {
        for dtype in [DType::F16, DType::Bf16, DType::F32, DType::F64] {
            assert!(may_be_in_place(dtype, IN_PLACE_BYTES_MIN));
            assert!(!may_be_in_place(dtype, IN_PLACE_BYTES_MIN - 1));
        }
        for dtype in [DType::Bool, DType::U8, DType::U16, DType::U32, DType::U64] {
            assert!(!may_be_in_place(dtype, usize::MAX), "{dtype}");
        }
        for dtype in [DType::I8, DType::I16, DType::I32, DType::I64] {
            assert!(!may_be_in_place(dtype, usize::MAX), "{dtype}");
        }
    }
}
