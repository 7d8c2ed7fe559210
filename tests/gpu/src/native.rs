//! What a function takes of a GPU that has a process and a session of its own: the reference for what a bound function takes here.

use std::{
    io::{self, Read, Write},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use faaswap_device::cuda::CudaDevice;
use faaswap_engine::{CudaTarget, Input, InputData, PlainSession, Prepared, Target};

use crate::{Result, model};

/// Its subcommand.
pub(crate) const COMMAND: &str = "native";
/// How long it may take to answer: cuDNN may make kernels.
const ANSWERS_WITHIN: Duration = Duration::from_secs(60);

/// Such a process. It goes when nobody can say anything to it any more, or when this is dropped.
struct Native(Child);

impl Drop for Native {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        // It may have gone by itself.
        let _killed = self.0.kill();
        let _gone = self.0.wait();
    }
}

/// What is in that process: it answers once and stays until its input ends.
pub(crate) fn stay(graph: &Path, prepared: &Path) -> Result<()> {
    let prepared = Prepared::open(prepared)?;
    let inputs = model::inputs(&prepared.manifest().signature)?;
    let given: Vec<_> =
        inputs.iter().map(|(d, shape, b)| Input { dtype: *d, shape, data: InputData::Bytes(b) }).collect();
    let session = PlainSession::open_for(&model::runtime()?, Target::Cuda(CudaTarget::new(0)), graph, false)?;
    let outputs = session.run(&given)?;
    let mut out = io::stdout().lock();
    outputs.iter().try_for_each(|(_, bytes)| out.write_all(bytes))?;
    out.flush()?;
    io::stdin().lock().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Starts one for this model and hears its answer, which has so many bytes; tells it, and by how many bytes the GPU's memory shrank.
pub(crate) fn measure(device: &CudaDevice, graph: &Path, prepared: &Path, len: usize) -> Result<(Vec<u8>, u64)> {
    let before = device.driver_memory()?.0;
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(COMMAND).arg(graph).arg(prepared).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut native = Native(command.spawn()?);
    let mut answers = native.0.stdout.take().ok_or("no pipe")?;
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        let mut answer = vec![0; len];
        // Nobody listens after the time is over.
        let _heard = tell.send(answers.read_exact(&mut answer).map(|()| answer));
    });
    let answer = told.recv_timeout(ANSWERS_WITHIN).map_err(|_| "a process with a session does not answer")??;
    let taken = before.get().saturating_sub(device.driver_memory()?.0.get());
    Ok((answer, taken))
}
