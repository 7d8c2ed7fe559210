//! A real fault on a GPU: what it costs, and that a new process can use the GPU again. The process that had the fault
//! cannot: after a reset of its context, taking it anew still failed with the old error (H100, driver 580).

use std::{path::Path, sync::Arc, time::Instant};

use faaswap_device::{
    Device,
    cuda::{CudaConfig, CudaDevice},
};
use faaswap_protocol::Bytes;

use crate::{
    Result,
    model::{self, Asked},
};

/// Lets a kernel trap, sees that runs end with an error, and uses the GPU from another process.
pub(crate) fn run(models: &Path, name: &str) -> Result<()> {
    let runtime = model::runtime()?;
    let all = model::prepared(&models.join("prepared"))?;
    let (_, prepared) = all.into_iter().find(|(of, _)| of == name).ok_or("that model is not prepared")?;
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
    let status = std::process::Command::new(std::env::current_exe()?).args(["one"]).arg(models).arg(name).status()?;
    println!("fault: a new process had the model bound and answered in {:.0} ms", start.elapsed().as_secs_f64() * 1e3);
    if status.success() { Ok(()) } else { Err("the GPU cannot be used again".into()) }
}

/// Binds one model and asks it once.
pub(crate) fn one(models: &Path, name: &str) -> Result<()> {
    let runtime = model::runtime()?;
    let all = model::prepared(&models.join("prepared"))?;
    let (_, prepared) = all.into_iter().find(|(of, _)| of == name).ok_or("that model is not prepared")?;
    let memory = Some(Bytes::new(prepared.manifest().weights_bytes.get() + (64 << 20)));
    let device: Arc<dyn Device> = CudaDevice::open(&CudaConfig { memory, lanes: 1, ..model::config(0)? })?;
    let asked = Asked::new(&runtime, &prepared, &device)?;
    asked.swap_in()?;
    asked.ask()?;
    asked.swap_out()
}
