//! A real fault on a GPU: what it costs, and whether the GPU can be used again in the same process.

use std::{path::Path, sync::Arc, time::Instant};

use faaswap_device::{
    Device,
    cuda::{self, CudaConfig, CudaDevice},
};
use faaswap_protocol::Bytes;

use crate::{
    Result,
    model::{self, Asked},
};

/// Lets a kernel trap, sees that runs end with an error, resets the GPU and uses it again.
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
    let expected = first.ask()?;
    let start = Instant::now();
    device.fail();
    let refused = first.ask().err().ok_or("a run on a failed GPU has answered")?;
    println!("fault: known after {:.1} ms: {refused}; lost: {}", start.elapsed().as_secs_f64() * 1e3, device.is_lost());
    // What the context held is gone with it; giving it back would be an error.
    std::mem::forget(first);
    std::mem::forget(device);
    let start = Instant::now();
    cuda::reset(0)?;
    let device = open()?;
    let again = Asked::new(&runtime, &prepared, &device)?;
    again.swap_in()?;
    let right = again.ask()? == expected;
    println!("fault: reset and bound again in {:.0} ms, output right: {right}", start.elapsed().as_secs_f64() * 1e3);
    if right { Ok(()) } else { Err("after a reset the output is another".into()) }
}
