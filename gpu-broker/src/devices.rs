//! Opens the node's devices: its GPUs, or the processor as a device where there are none.
//!
//! A broker's devices are of one kind, since a model is prepared for one kind. Which one is the configuration's choice;
//! where it makes none, GPUs are taken if there are any.

pub(crate) mod probe;

use std::{path::Path, sync::Arc, thread};

use faaswap_device::{
    Device, DeviceError,
    cuda::{self, CudaConfig, CudaDevice},
    host::{HostConfig, HostDevice},
    links::{self, LinkMap},
};
use faaswap_engine::{CudaTarget, Runtime, Target};
use faaswap_protocol::{
    Bytes, SlabLayout,
    limits::{PAYLOAD_BYTES_MAX, SLAB_BYTES_MAX},
};
use faaswap_worker::{DeviceSpec, RemoteDevice, Spec};

use crate::{
    config::{DeviceKind, DeviceSettings, DevicesChoice, Settings},
    serve::ServeError,
    variant::Machine,
};

/// A device, in this process or in a worker.
#[derive(Clone, Debug)]
pub(crate) enum Opened {
    Here(Arc<dyn Device>),
    InWorker(Arc<RemoteDevice>),
}

impl Opened {
    pub(crate) fn device(&self) -> Arc<dyn Device> {
        match self {
            Self::Here(device) => Arc::clone(device),
            Self::InWorker(device) => Arc::<RemoteDevice>::clone(device),
        }
    }

    /// A GPU's compute capability.
    fn capability(&self) -> Result<Option<i32>, DeviceError> {
        match self {
            Self::Here(device) => device.as_cuda().map(CudaDevice::capability).transpose(),
            Self::InWorker(device) => Ok(device.capability()),
        }
    }
}

/// The devices, and what models are prepared for.
#[derive(Debug)]
pub(crate) struct Devices {
    pub(crate) all: Vec<(DeviceSettings, Opened)>,
    pub(crate) machine: Machine,
    pub(crate) links: LinkMap,
}

/// Opens what is configured, or what is there. `program` is this one, for workers.
pub(crate) fn open(settings: &Settings, program: &Path, runtime: &Runtime) -> Result<Devices, ServeError> {
    match wanted(settings).and_then(|wanted| open_all(&wanted, settings, (program, runtime))) {
        Err(error) if settings.gpu_fallback && may_have_gpus(settings) => {
            tracing::error!(%error, "no GPU can be used: serving with the host device, as gpu_fallback wants");
            open_all(&[DeviceSettings::host0()], settings, (program, runtime))
        }
        opened => opened,
    }
}

/// Whether GPUs are asked for, or taken where they are.
fn may_have_gpus(settings: &Settings) -> bool {
    match settings.devices.first() {
        Some(device) => matches!(device.kind, DeviceKind::Gpu { .. }),
        None => settings.devices_choice != DevicesChoice::Host,
    }
}

/// What is configured; where nothing is, a device for each GPU, or the host device.
fn wanted(settings: &Settings) -> Result<Vec<DeviceSettings>, ServeError> {
    if !settings.devices.is_empty() {
        return Ok(settings.devices.clone());
    }
    match settings.devices_choice {
        DevicesChoice::Host => return Ok(vec![DeviceSettings::host0()]),
        DevicesChoice::Auto if !cuda::is_present() => {
            tracing::info!("no CUDA driver is here: the processor is the device");
            return Ok(vec![DeviceSettings::host0()]);
        }
        DevicesChoice::Auto | DevicesChoice::Gpu => {}
    }
    let failed = |source| ServeError::Device { name: "gpu".to_owned(), source };
    match cuda::count() {
        Ok(count) if count > 0 => Ok((0..count.unsigned_abs()).map(DeviceSettings::gpu).collect()),
        Ok(_) if settings.devices_choice == DevicesChoice::Auto => Ok(vec![DeviceSettings::host0()]),
        Ok(_) => Err(failed(DeviceError::Invalid("the CUDA driver sees no GPU: is one assigned to this container?"))),
        Err(error) => Err(failed(error)),
    }
}

/// Opens them all at once: a GPU takes half a second or more, and so do the runtime's libraries.
fn open_all(
    wanted: &[DeviceSettings],
    settings: &Settings,
    (program, runtime): (&Path, &Runtime),
) -> Result<Devices, ServeError> {
    let gpus: Vec<_> = wanted.iter().filter_map(DeviceSettings::ordinal).collect();
    let cuda = gpus.first().and_then(|&first| i32::try_from(first).ok());
    let cuda = cuda.map(|ordinal| CudaTarget { tf32: settings.tf32, ..CudaTarget::new(ordinal) });
    // A fault costs a process all of its GPUs; where there is one it makes no difference.
    let in_workers = settings.workers.unwrap_or(gpus.len() > 1);
    let measured = if in_workers && !gpus.is_empty() { probe::measure(program, &gpus) } else { Ok(LinkMap::default()) };
    let all = if in_workers {
        let opened = at_once(wanted, |device| RemoteDevice::open(program, spec(device, settings)))?;
        RemoteDevice::introduce(&opened);
        opened.into_iter().map(Opened::InWorker).collect::<Vec<_>>()
    } else {
        thread::scope(|scope| {
            let checking = scope.spawn(|| cuda.map_or(Ok(()), |cuda| runtime.check(Target::Cuda(cuda))));
            let opened = at_once(wanted, |device| open_one(device, &gpus, settings));
            checking.join().unwrap_or(Ok(()))?;
            Ok::<_, ServeError>(opened?.into_iter().map(Opened::Here).collect())
        })?
    };
    for (device, opened) in wanted.iter().zip(&all) {
        let memory = opened.device().info().capacity;
        tracing::info!(name = device.name, %memory, lanes = device.lanes, in_workers, "device");
    }
    let failed = |source| ServeError::Device { name: "gpu".to_owned(), source };
    let capability = all.first().map_or(Ok(None), Opened::capability).map_err(failed)?;
    let machine = match (cuda, capability) {
        (Some(cuda), Some(capability)) => Machine::Gpu { cuda, capability },
        (None, _) | (_, None) => Machine::Host,
    };
    let devices: Vec<_> = all.iter().map(Opened::device).collect();
    let links = if in_workers { measured } else { links::measure(&devices) };
    let links = links.unwrap_or_else(|error| {
        tracing::warn!(%error, "links are not measured");
        LinkMap::default()
    });
    Ok(Devices { all: wanted.iter().cloned().zip(all).collect(), machine, links })
}

/// Does the same for all devices at once.
fn at_once<T: Send>(
    wanted: &[DeviceSettings],
    open: impl Fn(&DeviceSettings) -> Result<T, DeviceError> + Sync,
) -> Result<Vec<T>, ServeError> {
    let open = &open;
    thread::scope(|scope| {
        let opening: Vec<_> = wanted.iter().map(|device| (device, scope.spawn(move || open(device)))).collect();
        let opened = opening.into_iter().map(|(device, opened)| {
            let opened = opened.join().unwrap_or(Err(DeviceError::Lost));
            opened.map_err(|source| ServeError::Device { name: device.name.clone(), source })
        });
        // All are waited for before any error counts.
        opened.collect::<Vec<_>>().into_iter().collect()
    })
}

/// What a worker is told.
fn spec(device: &DeviceSettings, settings: &Settings) -> Spec {
    let name = device.name.clone();
    let spec = match device.kind {
        DeviceKind::Host { link_mib_per_s } => {
            let HostConfig { capacity, chunk, link_bytes_per_second, .. } = host_config(device, link_mib_per_s);
            DeviceSpec::Host { name, capacity, chunk, link_bytes_per_second }
        }
        DeviceKind::Gpu { ordinal, reserve } => DeviceSpec::Gpu {
            name,
            ordinal,
            memory: device.memory.or(settings.gpu_memory),
            reserve,
            chunk: device.chunk,
            twins: settings.bind_by_kind,
        },
    };
    // Pages are taken once they are written: there is as much as one request may bring, or ask for.
    let half = settings.slab_max.max(Bytes::new(u64::from(PAYLOAD_BYTES_MAX))).get().min(SLAB_BYTES_MAX.get() / 2);
    let half = Bytes::new(half - half % faaswap_protocol::limits::TENSOR_ALIGN);
    Spec {
        device: spec,
        lanes: device.lanes,
        onnxruntime: settings.onnxruntime.clone(),
        threads_per_run: settings.threads_per_run,
        scratch_max: settings.scratch_max,
        exchange: SlabLayout { request: half, response: half },
    }
}

fn open_one(device: &DeviceSettings, peers: &[u32], settings: &Settings) -> Result<Arc<dyn Device>, DeviceError> {
    match device.kind {
        DeviceKind::Host { link_mib_per_s } => Ok(HostDevice::new(host_config(device, link_mib_per_s))?),
        DeviceKind::Gpu { ordinal, reserve } => Ok(open_gpu(device, (ordinal, peers), reserve, settings)?),
    }
}

fn host_config(device: &DeviceSettings, link_mib_per_s: Option<u64>) -> HostConfig {
    let host = DeviceSettings::host0();
    HostConfig {
        name: device.name.clone(),
        capacity: device.memory.or(host.memory).unwrap_or_default(),
        chunk: device.chunk.or(host.chunk).unwrap_or_default(),
        link_bytes_per_second: link_mib_per_s.map(|mib| mib.saturating_mul(1 << 20)),
        populate: true,
    }
}

fn open_gpu(
    device: &DeviceSettings,
    (ordinal, peers): (u32, &[u32]),
    reserve: Bytes,
    settings: &Settings,
) -> Result<Arc<CudaDevice>, DeviceError> {
    let default = CudaConfig::new(device.name.clone(), ordinal);
    CudaDevice::open(&CudaConfig {
        memory: device.memory.or(settings.gpu_memory),
        reserve,
        chunk: device.chunk.unwrap_or(default.chunk),
        lanes: usize::from(device.lanes),
        peers: peers.to_vec(),
        twins: settings.bind_by_kind,
        ..default
    })
}
