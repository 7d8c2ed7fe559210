//! Programs for shapes that only requests tell: a model with open dimensions runs in its session until the same shapes
//! have come a few times; then that run is captured, too.
//!
//! Capturing takes a moment, so it is done once the request is answered ([`Bound::settle`]). What a program answers is compared with
//! what the session did before anybody is served by it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use faaswap_device::{DeviceError, cuda::Alone};
use faaswap_protocol::{Bytes, DType, Shape};

use super::{Bound, Input, InputData, Place, RunOutput};
use crate::{
    EngineError,
    limits::{CAPTURED_AFTER, PROGRAMS_PER_MODEL_MAX, SAMPLE_BYTES_MAX, SHAPES_COUNTED_MAX},
    prepare::is_close,
    program::{self, IoLayout, Programs},
};

/// A request of some shapes and what was answered to it: what a program must answer.
struct Sample {
    inputs: Vec<(Shape, Vec<u8>)>,
    outputs: Vec<(DType, Shape, Vec<u8>)>,
}

/// How a model with open dimensions runs for the shapes that have come.
#[derive(Default)]
pub(super) struct Shapes(Mutex<Known<Arc<Programs>, Sample>>);

/// What is known of shapes, apart from what programs and samples are.
struct Known<P, S> {
    programs: Vec<(Vec<Shape>, P)>,
    /// How often others have come, the latest last; `None` for those that have no program for good.
    counted: Vec<(Vec<Shape>, Option<u32>)>,
    /// To be captured next.
    pending: Option<S>,
}

impl<P, S> Default for Known<P, S> {
    fn default() -> Self {
        Self { programs: Vec::new(), counted: Vec::new(), pending: None }
    }
}

impl<P: Clone, S> Known<P, S> {
    fn program(&self, shapes: &[&Shape]) -> Option<P> {
        let same = |known: &Vec<Shape>| known.iter().eq(shapes.iter().copied());
        self.programs.iter().find(|(known, _)| same(known)).map(|(_, program)| program.clone())
    }

    /// Counts shapes that ran without a program; whether a program shall be made for them.
    fn count(&mut self, shapes: &[&Shape]) -> bool {
        let found = self.counted.iter().position(|(known, _)| known.iter().eq(shapes.iter().copied()));
        let (shapes, times) = match found {
            Some(at) => self.counted.remove(at),
            None => (shapes.iter().copied().cloned().collect(), Some(0)),
        };
        if self.counted.len() >= SHAPES_COUNTED_MAX {
            self.counted.remove(0);
        }
        let times = times.map(|times| times.saturating_add(1));
        self.counted.push((shapes, times));
        let room = self.programs.len() < PROGRAMS_PER_MODEL_MAX && self.pending.is_none();
        room && times.is_some_and(|times| times >= CAPTURED_AFTER)
    }

    fn never(&mut self, shapes: Vec<Shape>) {
        self.counted.retain(|(known, _)| *known != shapes);
        self.counted.push((shapes, None));
    }

    fn made(&mut self, shapes: Vec<Shape>, program: P) {
        self.counted.retain(|(known, _)| *known != shapes);
        self.programs.push((shapes, program));
    }
}

impl Shapes {
    fn known(&self) -> MutexGuard<'_, Known<Arc<Programs>, Sample>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn program(&self, inputs: &[Input<'_>]) -> Option<Arc<Programs>> {
        self.known().program(&shapes_of(inputs))
    }

    /// Takes note of a request that the session has answered, with all of its outputs.
    pub(super) fn ran(&self, inputs: &[Input<'_>], outputs: &[RunOutput]) {
        let mut known = self.known();
        if known.count(&shapes_of(inputs)) {
            known.pending = sample(inputs, outputs);
        }
    }
}

fn shapes_of<'i>(inputs: &[Input<'i>]) -> Vec<&'i Shape> {
    inputs.iter().map(|input| input.shape).collect()
}

/// Copies a request and its answer; `None` where they are too large, or cannot be read.
fn sample(inputs: &[Input<'_>], outputs: &[RunOutput]) -> Option<Sample> {
    let size = |lens: &mut dyn Iterator<Item = usize>| lens.map(|len| Bytes::of_len(len).get()).sum::<u64>();
    let lens =
        size(&mut inputs.iter().map(|input| input.data.len())) + size(&mut outputs.iter().map(|o| o.place.len()));
    if lens > SAMPLE_BYTES_MAX.get() {
        return None;
    }
    let inputs = inputs.iter().map(|input| {
        let mut bytes = vec![0; input.data.len()];
        match input.data {
            InputData::Region(region) | InputData::Registered(region, _) => region.read(0, &mut bytes).ok()?,
            InputData::Bytes(given) => bytes.copy_from_slice(given),
        }
        Some((input.shape.clone(), bytes))
    });
    let outputs = outputs.iter().map(|output| {
        let mut bytes = vec![0; output.place.len()];
        match &output.place {
            Place::Region(region) => region.read(0, &mut bytes).ok()?,
            Place::Memory(memory) => bytes.copy_from_slice(memory),
        }
        Some((output.dtype, output.shape.clone(), bytes))
    });
    Some(Sample { inputs: inputs.collect::<Option<_>>()?, outputs: outputs.collect::<Option<_>>()? })
}

impl Bound {
    /// How many programs there are for shapes that requests have told.
    pub fn programs_of_shapes(&self) -> usize {
        self.shapes.as_ref().map_or(0, |shapes| shapes.known().programs.len())
    }

    /// Whether [`Bound::settle`] has something to do.
    pub fn is_unsettled(&self) -> bool {
        self.shapes.as_ref().is_some_and(|shapes| shapes.known().pending.is_some())
    }

    /// Makes the program that is due, if one is: for a lane that has just answered. Nothing comes of it where the weights
    /// are not there any more.
    pub fn settle(&self) {
        let Some(shapes) = &self.shapes else { return };
        let Some(sample) = shapes.known().pending.take() else { return };
        let of: Vec<_> = sample.inputs.iter().map(|(shape, _)| shape.clone()).collect();
        match self.program_of(&sample) {
            Ok(Some(programs)) => shapes.known().made(of, Arc::new(programs)),
            Ok(None) => {}
            Err(error) => {
                tracing::info!(%error, shapes = ?of, "a model runs without a program for these shapes");
                shapes.known().never(of);
            }
        }
    }

    /// A program that answers as the session did; `None` where the weights are not there.
    fn program_of(&self, sample: &Sample) -> Result<Option<Programs>, EngineError> {
        let (Some(reserved), Some(lane), Some(session)) = (&self.range, self.lane, &self.session) else {
            return Ok(None);
        };
        let device = &reserved.waiter.device;
        let cuda = device.as_cuda().ok_or(DeviceError::Invalid("a program on a device without a GPU"))?;
        let shapes = |of: &mut dyn Iterator<Item = Shape>| of.collect::<Vec<_>>();
        let io = IoLayout::with(
            &self.manifest.signature,
            &shapes(&mut sample.inputs.iter().map(|(shape, _)| shape.clone())),
            &shapes(&mut sample.outputs.iter().map(|(_, shape, _)| shape.clone())),
        );
        let io = io.map_err(EngineError::Ort)?;
        let at = cuda.io_address(lane, io.end)?;
        // The lane first: see there.
        let alone = cuda.alone_in(lane)?;
        cuda.while_resident(reserved.waiter.range, || {
            let (programs, _) = program::make(device, &self.made_of(session), io, (lane, at), (&alone, at), None)?;
            self.compare(&programs, alone, sample)?;
            Ok(programs)
        })
    }

    fn compare(&self, programs: &Programs, alone: Alone<'_>, sample: &Sample) -> Result<(), EngineError> {
        let mut run = programs.begin_in(alone)?;
        for (index, (_, bytes)) in sample.inputs.iter().enumerate() {
            run.input(index)?.copy_from_slice(bytes);
        }
        run.go(self.range().map(|range| (range, self.manifest.await_before_run)))?;
        for (index, (dtype, _, bytes)) in sample.outputs.iter().enumerate() {
            if !is_close(self.manifest.target, *dtype, run.output(index)?, bytes) {
                let name = &self.manifest.signature.outputs[index].name;
                return Err(EngineError::Ort(format!("captured, output {name} is another one")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn shape(n: u64) -> Shape {
        Shape::new(vec![n, 3]).unwrap()
    }

    #[test]
    fn shapes_that_come_often_are_due_and_others_are_not() {
        let mut known = Known::<u32, ()>::default();
        let (often, seldom) = (shape(1), shape(2));
        let due: Vec<_> = (0..CAPTURED_AFTER).map(|_| known.count(&[&often])).collect();
        assert_eq!(due.iter().filter(|due| **due).count(), 1);
        assert!(due.last().unwrap());
        assert!(!known.count(&[&seldom]));
        known.made(vec![often.clone()], 7);
        assert_eq!((known.program(&[&often]), known.program(&[&seldom])), (Some(7), None));
        assert_eq!(known.program(&[&often, &often]), None, "as many inputs");
    }

    #[test]
    fn what_cannot_be_captured_is_not_tried_again_and_what_is_pending_is_not_replaced() {
        let mut known = Known::<u32, u8>::default();
        let one = shape(1);
        while !known.count(&[&one]) {}
        known.never(vec![one.clone()]);
        assert!((0..10 * CAPTURED_AFTER).all(|_| !known.count(&[&one])));
        let other = shape(2);
        known.pending = Some(1);
        assert!((0..10 * CAPTURED_AFTER).all(|_| !known.count(&[&other])));
        known.pending = None;
        assert!(known.count(&[&other]));
    }

    #[test]
    fn programs_and_counts_are_bounded() {
        let mut known = Known::<u64, ()>::default();
        for n in 0..PROGRAMS_PER_MODEL_MAX as u64 {
            let shape = shape(n);
            while !known.count(&[&shape]) {}
            known.made(vec![shape], n);
        }
        let one_more = shape(1000);
        assert!((0..10 * CAPTURED_AFTER).all(|_| !known.count(&[&one_more])));
        assert!((2000..2000 + 3 * SHAPES_COUNTED_MAX as u64).all(|n| !known.count(&[&shape(n)])));
        assert!(known.counted.len() <= SHAPES_COUNTED_MAX);
    }
}
