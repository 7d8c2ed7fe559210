//! Opens the node's devices: its GPUs, or the processor as a device where there are none.
//!
//! A broker's devices are of one kind, since a model is prepared for one kind. Which one is the configuration's choice;
//! where it makes none, GPUs are taken if there are any.

use std::{sync::Arc, thread};

use faaswap_device::{
    Device, DeviceError,
    cuda::{self, CudaConfig, CudaDevice},
    host::{HostConfig, HostDevice},
};
use faaswap_engine::{CudaTarget, Runtime, Target};

use crate::{
    config::{DeviceKind, DeviceSettings, DevicesChoice, Settings},
    serve::ServeError,
    variant::Machine,
};

/// The devices, and what models are prepared for.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) devices: Vec<(DeviceSettings, Arc<dyn Device>)>,
    pub(crate) machine: Machine,
}

/// Opens what is configured, or what is there.
pub(crate) fn open(settings: &Settings, runtime: &Runtime) -> Result<Opened, ServeError> {
    match wanted(settings).and_then(|wanted| open_all(&wanted, settings, runtime)) {
        Err(error) if settings.gpu_fallback && may_have_gpus(settings) => {
            tracing::error!(%error, "no GPU can be used: serving with the host device, as gpu_fallback wants");
            open_all(&[DeviceSettings::host0()], settings, runtime)
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
fn open_all(wanted: &[DeviceSettings], settings: &Settings, runtime: &Runtime) -> Result<Opened, ServeError> {
    let gpu = |device: &DeviceSettings| match device.kind {
        DeviceKind::Gpu { ordinal, .. } => Some(ordinal),
        DeviceKind::Host { .. } => None,
    };
    let peers: Vec<_> = wanted.iter().filter_map(gpu).collect();
    let cuda = wanted.first().and_then(gpu).and_then(|ordinal| i32::try_from(ordinal).ok());
    let cuda = cuda.map(|ordinal| CudaTarget { tf32: settings.tf32, ..CudaTarget::new(ordinal) });
    let (opened, checked) = thread::scope(|scope| {
        let peers = &peers[..];
        let open = |device| scope.spawn(move || open_one(device, peers, settings));
        let opening: Vec<_> = wanted.iter().map(open).collect();
        let checked = cuda.map_or(Ok(()), |cuda| runtime.check(Target::Cuda(cuda)));
        let opened: Vec<_> = opening.into_iter().map(|one| one.join().unwrap_or(Err(DeviceError::Lost))).collect();
        (opened, checked)
    });
    let mut devices = Vec::with_capacity(wanted.len());
    for (device, opened) in wanted.iter().zip(opened) {
        let opened = opened.map_err(|source| ServeError::Device { name: device.name.clone(), source })?;
        let (memory, lanes) = (opened.info().capacity, device.lanes);
        tracing::info!(name = device.name, %memory, lanes, "device");
        devices.push((device.clone(), opened));
    }
    checked?;
    let first = devices.first().and_then(|(device, opened)| Some((device, opened.as_cuda()?)));
    let machine = match (cuda, first) {
        (Some(cuda), Some((device, gpu))) => {
            let failed = |source| ServeError::Device { name: device.name.clone(), source };
            Machine::Gpu { cuda, capability: gpu.capability().map_err(failed)? }
        }
        (None, _) | (_, None) => Machine::Host,
    };
    Ok(Opened { devices, machine })
}

fn open_one(device: &DeviceSettings, peers: &[u32], settings: &Settings) -> Result<Arc<dyn Device>, DeviceError> {
    match device.kind {
        DeviceKind::Host { link_mib_per_s } => open_host(device, link_mib_per_s),
        DeviceKind::Gpu { ordinal, reserve } => Ok(open_gpu(device, (ordinal, peers), reserve, settings)?),
    }
}

fn open_host(device: &DeviceSettings, link_mib_per_s: Option<u64>) -> Result<Arc<dyn Device>, DeviceError> {
    let host = DeviceSettings::host0();
    let config = HostConfig {
        name: device.name.clone(),
        capacity: device.memory.or(host.memory).unwrap_or_default(),
        chunk: device.chunk.or(host.chunk).unwrap_or_default(),
        link_bytes_per_second: link_mib_per_s.map(|mib| mib.saturating_mul(1 << 20)),
        populate: true,
    };
    Ok(HostDevice::new(config)?)
}

fn open_gpu(
    device: &DeviceSettings,
    (ordinal, peers): (u32, &[u32]),
    reserve: faaswap_protocol::Bytes,
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
