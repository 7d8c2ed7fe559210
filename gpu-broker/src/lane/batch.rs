//! Runs that answer several requests: inputs one below the other, outputs cut apart again.
//!
//! Only a model knows whether its rows are independent of each other, and kernels may round otherwise for more of them. So a
//! size is tried before it is used, with shapes and outputs as they are wanted: requests run one by one and are answered, then
//! together, and the outputs are compared. What fails together runs one by one as well: a bad request fails alone. Requests
//! may be those of several functions: each is answered by its own outputs, to its own peer, and no answer tells of others.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use faaswap_engine::{Input, InputData, Place, RunError, RunOutput, prepare::is_close};
use faaswap_protocol::{Batching, Bytes, DType, Detail, Refusal, Shape, Timing};
use faaswap_scheduler::Verdict;

use super::{Ask, BoundModel, InputBytes, Run, answer, answer::Places, inputs_of};
use crate::{
    limits::{BATCH_OUTPUT_BYTES_MAX, TRIALS_MAX},
    mailbox::{Ended, Mailbox},
};

/// What was tried: kernels are chosen by shapes, and outputs that nobody wanted were not compared.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Tried {
    size: usize,
    rows: Vec<Shape>,
    wanted: Vec<u16>,
}

/// What trials have shown of a model on a device, whosever requests it was tried with.
#[derive(Debug, Default)]
pub(super) struct Trials(Mutex<HashMap<Tried, Verdict>>);

impl Trials {
    fn verdict(&self, tried: &Tried) -> Option<Verdict> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(tried).copied()
    }

    /// Where shapes come without end, all is forgotten now and then, and found out anew.
    fn note(&self, tried: Tried, verdict: Verdict) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= TRIALS_MAX {
            known.clear();
        }
        known.insert(tried, verdict);
    }
}

/// Answers all requests of a run.
pub(super) fn serve(run: Run, mailbox: &Mailbox) {
    let Run { ask, with, model, batching, .. } = run;
    let first = ask.key;
    let asks: Vec<_> = std::iter::once(ask).chain(with).collect();
    let serving = Serving { asks: &asks, model: &model, mailbox };
    let batch = Batch::of(&asks).filter(|_| batching != Batching::Off);
    let known = batch.as_ref().map(|batch| model.trials.verdict(&batch.tried()));
    let (took, verdict) = match (batch, known) {
        (Some(batch), Some(None)) => serving.trial(batch, batching),
        (Some(batch), Some(Some(verdict))) if verdict.serves(batching) => (serving.together(&batch), None),
        // Said again: the scheduler has forgotten it, or not heard of it yet.
        (_, Some(Some(verdict))) => (serving.one_by_one(), Some(verdict)),
        (None, _) | (_, None) => (serving.one_by_one(), None),
    };
    drop(model);
    mailbox.post(Ended::RunOver { request: first, took: took.unwrap_or(Duration::ZERO), verdict });
}

struct Serving<'a> {
    asks: &'a [Arc<Ask>],
    model: &'a BoundModel,
    mailbox: &'a Mailbox,
}

impl Serving<'_> {
    /// One run for all; gives how long it took. `None`: they had to be run one by one.
    fn together(&self, batch: &Batch) -> Option<Duration> {
        let started = Instant::now();
        let outputs =
            batch.run(self.model).inspect_err(|why| tracing::debug!(%why, "requests are run one by one")).ok();
        let cut = outputs.as_deref().and_then(|outputs| Rows::of(outputs, batch.size));
        let Some(rows) = cut else { return self.one_by_one() };
        let ran = started.elapsed();
        for (at, ask) in self.asks.iter().enumerate() {
            let mut places = Places::of(&ask.peer);
            let outputs = rows.outputs(at, &mut places);
            self.answer(ask, places, outputs, (started, ran));
        }
        Some(ran)
    }

    fn one_by_one(&self) -> Option<Duration> {
        for ask in self.asks {
            let started = Instant::now();
            let inputs = inputs_of(ask);
            let mut places = Places::of(&ask.peer);
            let result = self.model.bound.run(&inputs, &ask.wanted, &mut |index, _, _, size| places.place(index, size));
            let result = result.map_err(|error| answer::refusal(error, self.model.is_lost()));
            self.answer(ask, places, result, (started, started.elapsed()));
        }
        None
    }

    /// Answers each request by a run of its own, then runs them together and compares; gives how long that took, where it may
    /// be done again, and what it gave, where that could be seen.
    ///
    /// The inputs are copies by then: a peer that has its answer may write into the slab again.
    fn trial(&self, mut batch: Batch, batching: Batching) -> (Option<Duration>, Option<Verdict>) {
        let alone = self.answer_each(&batch);
        self.mailbox.ring();
        let verdict = self.compare(&alone, &mut batch);
        let runs_again = verdict.is_some_and(|verdict| verdict.serves(batching));
        // The first run of a size makes room for it; how long it takes says little.
        let started = Instant::now();
        let took = runs_again.then(|| batch.run(self.model).ok()).flatten().map(|_| started.elapsed());
        (took, verdict)
    }

    /// A run for each; gives the outputs of those that did not fail.
    fn answer_each(&self, batch: &Batch) -> Vec<Vec<RunOutput>> {
        let mut alone = Vec::with_capacity(batch.size);
        for (at, ask) in self.asks.iter().enumerate() {
            let started = Instant::now();
            let result = batch.run_row(at, self.model);
            let ran = started.elapsed();
            let mut places = Places::of(&ask.peer);
            let answered = match &result {
                Ok(outputs) => outputs.iter().map(|output| in_place(output, &mut places)).collect(),
                Err(error) => Err(answer::refusal(error.clone(), self.model.is_lost())),
            };
            self.answer(ask, places, answered, (started, ran));
            alone.extend(result.ok());
        }
        alone
    }

    /// Runs all together, and notes how that compares to each alone.
    fn compare(&self, alone: &[Vec<RunOutput>], batch: &mut Batch) -> Option<Verdict> {
        if alone.len() < batch.size {
            return None;
        }
        let compared = batch.make_rows_differ()?;
        let outputs = batch.run(self.model).inspect_err(|why| tracing::debug!(%why, "a trial together failed")).ok()?;
        let verdict = compare(&alone[..compared], &outputs, (batch.size, self.model));
        tracing::info!(model = ?self.model.digest, size = batch.size, ?verdict, "tried whether requests can share a run");
        self.model.trials.note(batch.tried(), verdict);
        Some(verdict)
    }

    fn answer(
        &self,
        ask: &Ask,
        places: Places<'_>,
        result: Result<Vec<RunOutput>, Refusal>,
        (started, ran): (Instant, Duration),
    ) {
        let queued = started.saturating_duration_since(ask.arrived);
        // Only requests whose weights are there are run together.
        let was_resident = self.model.found_by(ask.arrived, true);
        let timing = Timing { queued, ran, swapping: Duration::ZERO, was_resident };
        let request = ask.key;
        places.answer(ask, result, timing, |outcome| self.mailbox.put(Ended::Answered { request, outcome }));
    }
}

/// The inputs of several requests, one below the other.
struct Batch {
    size: usize,
    inputs: Vec<Stacked>,
    wanted: Vec<u16>,
}

struct Stacked {
    dtype: DType,
    row: Shape,
    all: Shape,
    bytes: Vec<u8>,
}

impl Batch {
    /// `None` where they do not go together: the form that the scheduler was told was another one's too.
    fn of(asks: &[Arc<Ask>]) -> Option<Self> {
        let (first, size) = (asks.first()?, asks.len());
        if asks.iter().any(|ask| ask.wanted != first.wanted || ask.inputs.len() != first.inputs.len()) {
            return None;
        }
        let inputs = (0..first.inputs.len()).map(|at| Stacked::of(asks, at)).collect::<Option<_>>()?;
        Some(Self { size, inputs, wanted: first.wanted.clone() })
    }

    fn tried(&self) -> Tried {
        let rows = self.inputs.iter().map(|input| input.row.clone()).collect();
        Tried { size: self.size, rows, wanted: self.wanted.clone() }
    }

    fn run(&self, model: &BoundModel) -> Result<Vec<RunOutput>, RunError> {
        let inputs = self.inputs.iter().map(|input| input.as_input(&input.all, &input.bytes));
        run_in_memory(model, &inputs.collect::<Vec<_>>(), &self.wanted)
    }

    fn run_row(&self, at: usize, model: &BoundModel) -> Result<Vec<RunOutput>, RunError> {
        let row = |input: &Stacked| input.row_bytes(self.size, at);
        let inputs = self.inputs.iter().map(|input| input.as_input(&input.row, &input.bytes[row(input)]));
        run_in_memory(model, &inputs.collect::<Vec<_>>(), &self.wanted)
    }

    /// Equal rows would hide that they depend on each other: then the last one becomes another. Gives how many rows are as
    /// they came; `None` where no other row can be made up.
    fn make_rows_differ(&mut self) -> Option<usize> {
        let size = self.size;
        let differ = |input: &Stacked| {
            (1..size).any(|at| input.bytes[input.row_bytes(size, at)] != input.bytes[input.row_bytes(size, 0)])
        };
        if self.inputs.iter().any(differ) {
            return Some(size);
        }
        let mut any = false;
        for input in &mut self.inputs {
            let last = input.row_bytes(size, size - 1);
            any |= make_another(input.dtype, &mut input.bytes[last]);
        }
        any.then_some(size - 1)
    }
}

impl Stacked {
    fn of(asks: &[Arc<Ask>], at: usize) -> Option<Self> {
        let first = asks.first()?.inputs.get(at)?;
        let [1, rest @ ..] = first.shape.dims() else { return None };
        let all = Shape::new([&[asks.len() as u64], rest].concat()).ok()?;
        let row_len = first.shape.size(first.dtype).ok()?.as_len()?;
        let mut bytes = vec![0; row_len.checked_mul(asks.len())?];
        for (ask, row) in asks.iter().zip(bytes.chunks_exact_mut(row_len.max(1))) {
            let input = ask.inputs.get(at).filter(|other| other.dtype == first.dtype && other.shape == first.shape)?;
            match &input.bytes {
                InputBytes::Shared(region) => region.read(0, row).ok()?,
                InputBytes::Own(own) if own.len() == row.len() => row.copy_from_slice(own),
                InputBytes::Own(_) => return None,
            }
        }
        Some(Self { dtype: first.dtype, row: first.shape.clone(), all, bytes })
    }

    fn as_input<'a>(&self, shape: &'a Shape, bytes: &'a [u8]) -> Input<'a> {
        Input { dtype: self.dtype, shape, data: InputData::Bytes(bytes) }
    }

    fn row_bytes(&self, size: usize, at: usize) -> std::ops::Range<usize> {
        let len = self.bytes.len() / size;
        at * len..(at + 1) * len
    }
}

/// Changes a row's values to others that every model takes; tells whether it could.
///
/// Zeros are valid positions everywhere. Where there are zeros, numbers that are no positions become ones.
fn make_another(dtype: DType, row: &mut [u8]) -> bool {
    if row.iter().any(|byte| *byte != 0) {
        row.fill(0);
        return true;
    }
    let one: &[u8] = match dtype {
        DType::F32 => &1_f32.to_le_bytes(),
        DType::F64 => &1_f64.to_le_bytes(),
        DType::F16 => &[0x00, 0x3C],
        DType::Bf16 => &[0x80, 0x3F],
        DType::Bool
        | DType::U8
        | DType::U16
        | DType::U32
        | DType::U64
        | DType::I8
        | DType::I16
        | DType::I32
        | DType::I64 => return false,
    };
    row.chunks_exact_mut(one.len()).for_each(|value| value.copy_from_slice(one));
    !row.is_empty()
}

/// Runs with outputs in memory of ours, up to a limit.
fn run_in_memory(model: &BoundModel, inputs: &[Input<'_>], wanted: &[u16]) -> Result<Vec<RunOutput>, RunError> {
    let mut left = BATCH_OUTPUT_BYTES_MAX;
    model.bound.run(inputs, wanted, &mut |_, _, _, size| {
        let full = || Refusal::SlabFull { needed: size, size: BATCH_OUTPUT_BYTES_MAX };
        left = left.checked_sub(size).ok_or_else(full)?;
        size.as_len().map(|len| Place::Memory(vec![0; len])).ok_or_else(full)
    })
}

/// Outputs of several requests, cut into rows.
struct Rows<'a>(Vec<(&'a RunOutput, Shape, &'a [u8])>);

impl<'a> Rows<'a> {
    /// `None` where an output has not a row for each.
    fn of(outputs: &'a [RunOutput], size: usize) -> Option<Self> {
        let cut = |output: &'a RunOutput| {
            let (Place::Memory(bytes), [rows, rest @ ..]) = (&output.place, output.shape.dims()) else { return None };
            if *rows != size as u64 || !bytes.len().is_multiple_of(size) {
                return None;
            }
            Some((output, Shape::new([&[1], rest].concat()).ok()?, &bytes[..]))
        };
        outputs.iter().map(cut).collect::<Option<_>>().map(Self)
    }

    fn row(bytes: &[u8], size: usize, at: usize) -> &[u8] {
        let len = bytes.len() / size;
        &bytes[at * len..(at + 1) * len]
    }

    /// One request's outputs, copied to places of its own.
    fn outputs(&self, at: usize, places: &mut Places<'_>) -> Result<Vec<RunOutput>, Refusal> {
        let place = |(output, shape, bytes): &(&RunOutput, Shape, &[u8])| {
            let size = usize::try_from(output.shape.dims()[0]).unwrap_or(1).max(1);
            let row = Self::row(bytes, size, at);
            written(output, shape, row, places)
        };
        self.0.iter().map(place).collect()
    }
}

/// An output of a run of one, copied to a place of the request's.
fn in_place(output: &RunOutput, places: &mut Places<'_>) -> Result<RunOutput, Refusal> {
    match &output.place {
        Place::Memory(bytes) => written(output, &output.shape, bytes, places),
        Place::Region(_) => Err(failed("an output is not where it was asked to be")),
    }
}

fn written(output: &RunOutput, shape: &Shape, bytes: &[u8], places: &mut Places<'_>) -> Result<RunOutput, Refusal> {
    let mut place = places.place(output.index, Bytes::of_len(bytes.len()))?;
    match &mut place {
        Place::Region(region) => region.write(0, bytes).map_err(|error| failed(error.to_string()))?,
        Place::Memory(memory) => memory.copy_from_slice(bytes),
    }
    Ok(RunOutput { index: output.index, dtype: output.dtype, shape: shape.clone(), place })
}

fn failed(reason: impl Into<Detail>) -> Refusal {
    Refusal::RunFailed { reason: reason.into() }
}

/// How outputs of a run of several compare to those of each alone.
fn compare(alone: &[Vec<RunOutput>], together: &[RunOutput], (size, model): (usize, &BoundModel)) -> Verdict {
    let Some(rows) = Rows::of(together, size) else { return Verdict::Other };
    let mut verdict = Verdict::Same;
    for (at, outputs) in alone.iter().enumerate() {
        for (output, (_, shape, bytes)) in outputs.iter().zip(&rows.0) {
            let Place::Memory(expected) = &output.place else { return Verdict::Other };
            let row = Rows::row(bytes, size, at);
            if &output.shape != shape || row.len() != expected.len() {
                return Verdict::Other;
            }
            if row != &expected[..] {
                verdict = Verdict::Close;
                if !is_close(model.bound.manifest().target, output.dtype, row, expected) {
                    return Verdict::Other;
                }
            }
        }
    }
    verdict
}
