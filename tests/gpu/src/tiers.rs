//! Weights from disk: read to host memory alone, and read while they are swapped in. On a host device where there is no GPU.

use std::{
    fs::{self, File},
    io::Write,
    path::Path,
    sync::Arc,
    thread,
    time::Instant,
};

use faaswap_device::{
    Device, DeviceError, Group, HostWeights, SwapReport,
    cuda::{self, CudaConfig, CudaDevice},
    host::{HostConfig, HostDevice},
};
use faaswap_protocol::Bytes;

use crate::{
    Result, model,
    record::{Record, Records, Target},
    stats::median,
};

/// As much as BERT-large in fp16 and more, so that the beginning does not count.
const SIZE: Bytes = Bytes::mib(768);
const GROUP: Bytes = Bytes::mib(8);
const ROUNDS: usize = 5;
/// What the broker does.
const READS: usize = 4;

pub(crate) fn run(out: &Path) -> Result<()> {
    let (device, name) = device()?;
    let file = out.join("tier.weights");
    write(&file)?;
    let measured = measure(&device, &file);
    fs::remove_file(&file)?;
    let records = measured?;
    for record in &records {
        let (ours, unit, reference) = (record.ours, record.unit, record.reference);
        println!("{}: {ours:.2} {unit}, reference {reference:?}, wrong {}", record.figure, record.outputs_wrong);
    }
    Records::new(out, "tiers", name)?.add(&records)
}

fn device() -> Result<(Arc<dyn Device>, String)> {
    let memory = Bytes::new(SIZE.get() + (64 << 20));
    if cuda::count().is_ok_and(|count| count > 0) {
        let device = CudaDevice::open(&CudaConfig { memory: Some(memory), lanes: 1, ..CudaConfig::new("cuda0", 0) })?;
        let name = device.gpu_name()?;
        return Ok((device, name));
    }
    Ok((HostDevice::new(HostConfig::new("host0", memory))?, "host device".to_owned()))
}

/// Numbers that no two groups have in common.
fn write(path: &Path) -> Result<()> {
    let mut file = File::create(path)?;
    for group in 0..SIZE.get() / GROUP.get() {
        let words = (0..GROUP.get() / 8).map(|word| (group << 32 | word).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        file.write_all(&words.flat_map(u64::to_le_bytes).collect::<Vec<u8>>())?;
    }
    file.sync_all()?;
    Ok(())
}

fn measure(device: &Arc<dyn Device>, file: &Path) -> Result<Vec<Record>> {
    let groups: Arc<[Group]> =
        (0..SIZE.get() / GROUP.get()).map(|group| Group { offset: group * GROUP.get(), len: GROUP.get() }).collect();
    let range = device.reserve(SIZE)?;
    let expected = fs::read(file)?;
    let (mut one, mut alone, mut both) = (Vec::new(), Vec::new(), Vec::new());
    let mut wrong = 0;
    for _ in 0..ROUNDS {
        one.push(fill(device, file, 1)?.1);
        alone.push(fill(device, file, READS)?.1);
        let (weights, ms) = follow(device, range, file, &groups)?;
        both.push(ms);
        let mut seen = vec![0; weights.len()];
        device.read_back(range, 0, &mut seen)?;
        wrong += u64::from(seen != expected);
        wait(|done| device.swap_out(range, done))?;
    }
    device.release(range)?;
    let (one, alone, both) = (median(&mut one), median(&mut alone), median(&mut both));
    let gb_per_s = |ms: f64| SIZE.get() as f64 / 1e6 / ms;
    let record = |figure: &str, unit, ours, reference, target, checked| Record {
        figure: figure.to_owned(),
        model: "all".to_owned(),
        dtype: "both".to_owned(),
        unit,
        ours,
        reference: Some(reference),
        target,
        outputs_checked: checked,
        outputs_wrong: if checked > 0 { wrong } else { 0 },
    };
    let one = (gb_per_s(one), "one read at a time");
    let speed = record("disk_to_host_bandwidth", "GB/s", gb_per_s(alone), one, Target::Told, 0);
    let alone = (alone, "reading alone");
    let swap = record("swap_in_from_disk", "ms", both, alone, Target::AtMost(1.1), ROUNDS as u64);
    Ok(vec![speed, swap])
}

/// Reads the file to host memory; the weights, and how long it took in milliseconds.
fn fill(device: &Arc<dyn Device>, file: &Path, reads: usize) -> Result<(Arc<HostWeights>, f64)> {
    let (weights, filler) = HostWeights::to_come(SIZE)?;
    filler.reserve()?;
    device.prepare_weights(&weights)?;
    let report = filler.read(file, reads)?;
    Ok((weights, report.took.as_secs_f64() * 1e3))
}

/// Swaps in while the file is read; the same, from the first read to the last copy.
fn follow(
    device: &Arc<dyn Device>,
    range: faaswap_device::RangeId,
    file: &Path,
    groups: &Arc<[Group]>,
) -> Result<(Arc<HostWeights>, f64)> {
    let (weights, filler) = HostWeights::to_come(SIZE)?;
    filler.reserve()?;
    device.prepare_weights(&weights)?;
    let start = Instant::now();
    thread::scope(|scope| {
        let reading = scope.spawn(|| filler.read(file, READS));
        let copied: Result<SwapReport> =
            wait(|done| device.swap_in(range, Arc::clone(&weights), Arc::clone(groups), done));
        reading.join().map_err(|_| "the reading thread has panicked")??;
        copied.map(|_| ())
    })?;
    Ok((weights, start.elapsed().as_secs_f64() * 1e3))
}

/// Asks for a swap and waits for its end.
fn wait<T: Send + 'static>(
    ask: impl FnOnce(faaswap_device::OnDone<T>) -> std::result::Result<(), DeviceError>,
) -> Result<T> {
    let (report, done) = model::reporter();
    ask(report)?;
    Ok(done.recv()??)
}
