//! Asks NVML, one question after the other. What it does not answer is left out; what it answers is not judged here.

use faaswap_protocol::Bytes;
use nvml_wrapper::{
    Device, Nvml,
    bitmasks::event::EventTypes,
    enum_wrappers::device::{Clock, EccCounter, MemoryError, PcieUtilCounter, TemperatureSensor},
    enums::{device::UsedGpuMemory, event::XidError},
    error::NvmlError,
    event::EventSet,
};

use super::{
    foreign,
    observation::{Busy, Foreign, Level, MemoryUse, Observation, Pcie, Throttles, Xids},
    topology,
};
use crate::PciAddress;

/// Most faults that are taken from the driver at one look.
const XIDS_PER_LOOK_MAX: usize = 64;

/// A GPU that NVML knows.
#[derive(Debug)]
struct Gpu {
    pci: PciAddress,
    uuid: Option<String>,
    device: Device<'static>,
    /// Where the driver's faults come from; absent where it does not tell them.
    events: Option<EventSet<'static>>,
    xids: Xids,
}

/// All GPUs of the machine.
#[derive(Debug)]
pub(super) struct Reader {
    gpus: Vec<Gpu>,
}

impl Reader {
    /// Finds the GPUs. One that cannot be asked is left out, with a line.
    pub(super) fn open(nvml: &'static Nvml) -> Self {
        let count = nvml.device_count().unwrap_or_else(|error| {
            tracing::warn!(%error, "NVML does not count the GPUs");
            0
        });
        let mut gpus = Vec::new();
        for index in 0..count {
            match open(nvml, index) {
                Ok(gpu) => gpus.push(gpu),
                Err(error) => tracing::warn!(index, %error, "a GPU is not watched"),
            }
        }
        Self { gpus }
    }

    pub(super) fn topology(&self, nvml: &Nvml) -> Vec<topology::Pair> {
        let gpus: Vec<_> = self.gpus.iter().map(|gpu| (gpu.pci, &gpu.device)).collect();
        topology::read(nvml, &gpus)
    }

    /// Looks at each GPU. Takes 40 ms for each: the driver counts bytes on the bus for 20 ms, twice.
    pub(super) fn look(&mut self) -> Vec<Observation> {
        self.gpus.iter_mut().map(Gpu::look).collect()
    }
}

fn open(nvml: &'static Nvml, index: u32) -> Result<Gpu, NvmlError> {
    let device = nvml.device_by_index(index)?;
    let at = device.pci_info()?;
    let pci = PciAddress { domain: at.domain, bus: at.bus, device: at.device };
    let events = faults(nvml, &device);
    Ok(Gpu { pci, uuid: device.uuid().ok(), device, events, xids: Xids::default() })
}

/// A set that the driver's faults on this GPU go to.
fn faults(nvml: &'static Nvml, device: &Device<'static>) -> Option<EventSet<'static>> {
    let wanted = EventTypes::CRITICAL_XID_ERROR;
    if !device.supported_event_types().ok()?.contains(wanted) {
        return None;
    }
    device.register_events(wanted, nvml.create_event_set().ok()?).ok()
}

impl Gpu {
    fn look(&mut self) -> Observation {
        self.take_faults();
        let device = &self.device;
        let memory = device.memory_info();
        let lost = matches!(memory, Err(NvmlError::GpuLost));
        let blank = Observation { uuid: self.uuid.clone(), lost, ..Observation::blank(self.pci) };
        if lost {
            return Observation { xids: self.events.as_ref().map(|_| self.xids), ..blank };
        }
        let busy = device.utilization_rates().ok();
        Observation {
            memory: memory.ok().map(|memory| MemoryUse {
                total: Bytes::new(memory.total),
                used: Bytes::new(memory.used),
                free: Bytes::new(memory.free),
            }),
            busy: busy.map(|busy| Busy { gpu_percent: busy.gpu, memory_percent: busy.memory }),
            pcie: pcie(device),
            sm_clock_mhz: clock(device, Clock::SM),
            memory_clock_mhz: clock(device, Clock::Memory),
            throttled: device.current_throttle_reasons().ok().map(|reasons| Throttles::of_bits(reasons.bits())),
            ecc_uncorrected: device.total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile).ok(),
            xids: self.events.as_ref().map(|_| self.xids),
            foreign: foreign(device),
            temperature_celsius: device.temperature(TemperatureSensor::Gpu).ok(),
            power_milliwatts: device.power_usage().ok(),
            ..blank
        }
    }

    /// Takes the faults that have come since the last look.
    fn take_faults(&mut self) {
        let Some(events) = &self.events else { return };
        for _ in 0..XIDS_PER_LOOK_MAX {
            // Without a wait: `Timeout` says that there is none.
            let Ok(event) = events.wait(0) else { return };
            let last = match event.event_data {
                Some(XidError::Value(number)) => Some(number),
                Some(XidError::Unknown) | None => None,
            };
            tracing::error!(gpu = %self.pci, xid = last, "the driver reports a fault");
            self.xids = Xids { count: self.xids.count + 1, last };
        }
    }
}

fn level(now: Result<u32, NvmlError>, max: Result<u32, NvmlError>) -> Option<Level> {
    Some(Level { now: now.ok()?, max: max.ok()? })
}

fn clock(device: &Device<'_>, which: Clock) -> Option<Level> {
    level(device.clock_info(which), device.max_clock_info(which))
}

fn pcie(device: &Device<'_>) -> Pcie {
    // NVML's documentation says "KB/s" and no more; taken to be 1,000 bytes.
    let rate = |counter| device.pcie_throughput(counter).ok().map(|kb| Bytes::new(u64::from(kb) * 1000));
    Pcie {
        sent_per_second: rate(PcieUtilCounter::Send),
        received_per_second: rate(PcieUtilCounter::Receive),
        generation: level(device.current_pcie_link_gen(), device.max_pcie_link_gen()),
        width: level(device.current_pcie_link_width(), device.max_pcie_link_width()),
    }
}

fn foreign(device: &Device<'_>) -> Option<Foreign> {
    let computing = device.running_compute_processes().ok()?;
    let drawing = device.running_graphics_processes().unwrap_or_default();
    let on_gpu = computing.iter().chain(&drawing).map(|process| {
        let bytes = match process.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(bytes),
            UsedGpuMemory::Unavailable => None,
        };
        (process.pid, bytes)
    });
    Some(foreign::count(&on_gpu.collect::<Vec<_>>(), foreign::is_ours))
}
