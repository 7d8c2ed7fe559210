//! A real fault on a GPU: what it costs, and that a new process can use the GPU again. The process that had the fault
//! cannot: after a reset of its context, taking it anew still failed with the old error (H100, driver 580).

use std::{
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use faaswap_device::{
    Device,
    cuda::{self, CudaConfig, CudaDevice},
};
use faaswap_protocol::Bytes;

use crate::{
    Result,
    model::{self, Asked},
    prepared,
};

/// What the other GPU has to do with the one that fails: nothing, it can read its memory, or it does so meanwhile.
const BESIDE: [&str; 3] = ["apart", "reachable", "copying"];
/// How long after the trap the other GPU begins to copy from there: the fault shows about half a second later.
const COPIES_AFTER: Duration = Duration::from_millis(100);

/// Lets a kernel trap, sees that runs end with an error, and uses the GPU from another process.
pub(crate) fn run(models: &Path, name: &str) -> Result<()> {
    let runtime = model::runtime()?;
    let prepared = prepared::one(models, name)?;
    let memory = Some(Bytes::new(prepared.manifest().weights_bytes.get() + (64 << 20)));
    let open =
        || -> Result<Arc<dyn Device>> { Ok(CudaDevice::open(&CudaConfig { memory, lanes: 1, ..model::config(0)? })?) };
    let device = open()?;
    let first = Asked::new(&runtime, &prepared, &device)?;
    first.swap_in()?;
    first.ask()?;
    let start = Instant::now();
    device.fail();
    let refused = first.ask().err().ok_or("a run on a failed GPU has answered")?;
    println!("fault: known after {:.1} ms: {refused}; lost: {}", start.elapsed().as_secs_f64() * 1e3, device.is_lost());
    // What the context held is gone with it; giving it back would be an error. A new process can use the GPU.
    std::mem::forget(first);
    std::mem::forget(device);
    let start = Instant::now();
    let again = |command: &str, more: &[&str]| {
        let program = std::env::current_exe()?;
        std::process::Command::new(program).arg(command).arg(models).arg(name).args(more).status()
    };
    let status = again("one", &[])?;
    println!("fault: a new process had the model bound and answered in {:.0} ms", start.elapsed().as_secs_f64() * 1e3);
    if !status.success() {
        return Err("the GPU cannot be used again".into());
    }
    if cuda::count()? < 2 {
        return Ok(());
    }
    for how in BESIDE {
        if !again("beside", &[how])?.success() {
            return Err(format!("a fault beside another GPU, {how}: it could not be tried").into());
        }
    }
    Ok(())
}

/// Lets the first GPU fail, and says whether the second one, which holds the same model, still serves it.
pub(crate) fn beside(models: &Path, name: &str, how: &str) -> Result<()> {
    let runtime = model::runtime()?;
    let prepared = prepared::one(models, name)?;
    let memory = Some(Bytes::new(prepared.manifest().weights_bytes.get() + (64 << 20)));
    let peers = if how == "apart" { Vec::new() } else { vec![0, 1] };
    let open = |ordinal: u32| -> Result<Arc<dyn Device>> {
        let config = CudaConfig { memory, lanes: 1, peers: peers.clone(), ..model::config(ordinal)? };
        Ok(CudaDevice::open(&config)?)
    };
    let (failing, other) = (open(0)?, open(1)?);
    let held = Asked::new(&runtime, &prepared, &failing)?;
    let asked = Asked::with(&runtime, &prepared, &other, Arc::clone(&held.weights), Arc::clone(&held.inputs))?;
    held.swap_in()?;
    asked.swap_in()?;
    let expected = asked.ask()?;
    let copied = thread::scope(|scope| -> Result<()> {
        scope.spawn(|| failing.fail());
        if how == "copying" {
            thread::sleep(COPIES_AFTER);
            let (from, to) = (held.bound.range().ok_or("no weights")?, asked.bound.range().ok_or("no weights")?);
            asked.swap_out()?;
            let (report, done) = model::reporter();
            let weights = Arc::clone(&asked.weights);
            other.swap_in_from((failing.as_ref(), from), to, weights, asked.bound.groups(), report)?;
            done.recv()??;
        }
        Ok(())
    });
    let answered = asked.ask();
    println!(
        "fault: {how}: lost: {}, the other: {}; a copy from it: {copied:?}; the other answers {}",
        failing.is_lost(),
        other.is_lost(),
        answered.map_or_else(|error| error.to_string(), |output| (output == expected).to_string()),
    );
    // What a context held that failed cannot be given back.
    std::mem::forget((held, asked, failing, other));
    Ok(())
}

/// Binds one model and asks it once.
pub(crate) fn one(models: &Path, name: &str) -> Result<()> {
    let runtime = model::runtime()?;
    let prepared = prepared::one(models, name)?;
    let memory = Some(Bytes::new(prepared.manifest().weights_bytes.get() + (64 << 20)));
    let device: Arc<dyn Device> = CudaDevice::open(&CudaConfig { memory, lanes: 1, ..model::config(0)? })?;
    let asked = Asked::new(&runtime, &prepared, &device)?;
    asked.swap_in()?;
    asked.ask()?;
    asked.swap_out()
}
