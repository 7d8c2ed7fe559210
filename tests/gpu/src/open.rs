//! A model with an open batch: its session runs until the same shapes have come a few times, then a program does, also while
//! weights are swapped in. Every output beside a plain session's.

use std::{path::Path, sync::Arc, time::Instant};

use faaswap_device::{
    Device,
    cuda::{CudaConfig, CudaDevice},
};
use faaswap_engine::{CudaTarget, Input, InputData, PlainSession, Target};
use faaswap_protocol::{Bytes, DType, Shape};
use serde_json::json;

use crate::{
    Result,
    model::{self, Asked},
    record::{Record, Records, Target as Goal},
    stats::median,
};

/// Numbers of images at once.
const BATCHES: [u64; 4] = [1, 2, 3, 8];
/// Runs of each; those after half of them have a program.
const ROUNDS: usize = 24;
const TOLERANCE: f64 = 1e-2;

pub(crate) fn run(models: &Path, out: &Path, name: &str) -> Result<()> {
    let folder = models.join("open").join(name);
    let runtime = model::runtime()?;
    let prepared = model::prepare(&folder, &folder.join("prepared"), false)?;
    let memory = Some(Bytes::new(prepared.manifest().weights_bytes.get() + (64 << 20)));
    let device: Arc<dyn Device> = CudaDevice::open(&CudaConfig { memory, lanes: 2, ..model::config(0)? })?;
    let plain = PlainSession::open_for(&runtime, Target::Cuda(CudaTarget::new(0)), &folder.join("model.onnx"), false)?;
    let mut asked = Asked::with_inputs(&runtime, &prepared, &device, inputs(1)?)?;
    asked.swap_in()?;
    let (mut records, mut kept, mut wrong, mut checked) = (Vec::new(), Vec::new(), 0_u64, 0_u64);
    for batch in BATCHES {
        asked.inputs = Arc::new(inputs(batch)?);
        let given: Vec<_> =
            asked.inputs.iter().map(|(d, s, b)| Input { dtype: *d, shape: s, data: InputData::Bytes(b) }).collect();
        let theirs = plain.run(&given)?;
        let (_, expected) = theirs.first().ok_or("no output")?;
        let mut times = [Vec::new(), Vec::new()];
        let before = asked.bound.programs_of_shapes();
        for round in 0..ROUNDS {
            let has_program = asked.bound.programs_of_shapes() > before;
            let swapped = round % 6 == 5;
            let done = if swapped { asked.swap_out().and_then(|()| asked.begin_swap_in()).map(Some)? } else { None };
            let start = Instant::now();
            let output = asked.ask()?;
            let took = start.elapsed().as_secs_f64() * 1e3;
            checked += 1;
            wrong += u64::from(model::difference(DType::F32, &output, expected) > TOLERANCE);
            if let Some(done) = done {
                done.recv()??;
            } else {
                times[usize::from(has_program)].push(took);
            }
            asked.bound.settle();
        }
        let made = asked.bound.programs_of_shapes() > before;
        let [session, program] = &mut times;
        let (session, program) = (median(session), median(program));
        println!(
            "open: {name} x{batch}: in its session {session:.3} ms, as a program {program:.3} ms, made: {made}, {wrong} wrong"
        );
        records.push(json!({"batch": batch, "session_ms": session, "program_ms": program, "made": made}));
        if !made {
            return Err(format!("no program was made for {batch} at once").into());
        }
        let model = format!("{name}_x{batch}-fp32");
        kept.push(Record::of("open_batch_run", &model, (program, "ms"), Some((session, "its session")), Goal::Told));
    }
    let last = kept.pop().ok_or("nothing was measured")?;
    kept.push(last.counting(checked, wrong));
    std::fs::write(out.join("open.json"), serde_json::to_vec_pretty(&records)?)?;
    Records::new(out, "open", device.as_cuda().ok_or("no GPU")?.gpu_name()?)?.add(&kept)?;
    if wrong > 0 { Err(format!("{wrong} of {checked} outputs are wrong").into()) } else { Ok(()) }
}

/// So many images of small varied numbers.
fn inputs(batch: u64) -> Result<Vec<(DType, Shape, Vec<u8>)>> {
    let shape = Shape::new(vec![batch, 3, 224, 224])?;
    let count = usize::try_from(shape.elements()?)?;
    let bytes = (0..count).flat_map(|i| ((i * 37 % 251) as f32 / 251.0 - 0.5).to_le_bytes()).collect();
    Ok(vec![(DType::F32, shape, bytes)])
}
