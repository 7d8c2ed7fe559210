//! The broker as a process: sockets, the loop and its helpers, and an orderly end.

mod accept;
mod connection;

use std::{cell::RefCell, io, path::PathBuf, rc::Rc, sync::Arc, time::Duration};

use faaswap_device::{
    Device, DeviceError,
    host::{HostConfig, HostDevice},
};
use faaswap_engine::{EngineError, Runtime, RuntimeOptions};
use tokio::{
    sync::{Semaphore, mpsc, oneshot, watch},
    task::{LocalSet, spawn_local},
    time::{Instant, interval, sleep, sleep_until, timeout},
};

use crate::{
    admin,
    config::{DeviceSettings, Settings},
    core::{Core, DeviceEntry},
    gpus::Gpus,
    lane::Lane,
    limits::{HOUSEKEEPING_EVERY, LOADS_MAX, UPLOADS_MAX},
    load::Loader,
    mailbox::Mailbox,
    store::{Memory, Preparer, Ready, Store},
    telemetry::Telemetry,
};

/// How often it is looked whether the last answers were taken.
const DRAIN_LOOK_EVERY: Duration = Duration::from_millis(20);

/// Why the broker cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A folder, socket or port.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// ONNX Runtime.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A device.
    #[error("device {name}: {source}")]
    Device {
        /// Which.
        name: String,
        /// What is wrong.
        source: DeviceError,
    },
}

impl ServeError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// Serves until `stop` completes, then drains. `program` prepares models: this program itself.
pub async fn serve(settings: Settings, program: PathBuf, stop: impl Future<Output = ()>) -> Result<(), ServeError> {
    LocalSet::new().run_until(serve_here(settings, program, stop)).await
}

async fn serve_here(settings: Settings, program: PathBuf, stop: impl Future<Output = ()>) -> Result<(), ServeError> {
    raise_file_limit();
    let settings = Arc::new(settings);
    let mailbox = Arc::new(Mailbox::default());
    let loader = Arc::new(loader(&settings, program)?);
    let telemetry = Arc::new(Telemetry::of(Arc::new(Gpus::watch(&loader.devices)), Some(Arc::clone(&loader.memory))));
    let devices = devices(&settings, &loader, &mailbox)?;
    let core = Core::new(Arc::clone(&settings), Arc::clone(&telemetry), Arc::clone(&mailbox), loader, devices);
    let listeners = accept::Listeners::bind(&settings)?;
    let (asks, questions) = mpsc::channel(admin::QUESTIONS_MAX);
    let (ready, is_ready) = watch::channel(false);
    if let Some(address) = settings.admin_listen {
        let listener = tokio::net::TcpListener::bind(address).await;
        let listener = listener.map_err(ServeError::io(format!("admin_listen {address}")))?;
        tracing::info!(address = %listener.local_addr().unwrap_or(address), "admin port is open");
        spawn_local(admin::serve(listener, Arc::clone(&telemetry), is_ready, asks));
    }
    spawn_local(listen_to_threads(Rc::clone(&core), mailbox));
    spawn_local(ring_alarms(Rc::clone(&core)));
    spawn_local(keep_house(Rc::clone(&core)));
    spawn_local(answer_admin(Rc::clone(&core), questions));
    let accepting = listeners.accept(&core, &telemetry);
    // Nobody waits for this where the admin port is off.
    let _ = ready.send(true);
    tracing::info!(socket = %settings.socket.display(), "ready");
    stop.await;
    tracing::info!("draining");
    let _ = ready.send(false);
    accepting.stop();
    core.borrow_mut().drain();
    let drained = timeout(settings.drain_within, async {
        while !core.borrow().is_drained() {
            sleep(DRAIN_LOOK_EVERY).await;
        }
    });
    if drained.await.is_err() {
        tracing::warn!(within = ?settings.drain_within, "requests were cut off at the end of the drain");
    }
    core.borrow().close_all();
    accepting.remove_socket();
    Ok(())
}

/// One descriptor per connection, and a few per model: the soft limit is often only 1,024.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let now = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: now.maximum, maximum: now.maximum }) {
        tracing::warn!(%error, limit = ?now.current, "the limit on open files cannot be raised");
    }
}

fn loader(settings: &Settings, program: PathBuf) -> Result<Loader, ServeError> {
    let options = RuntimeOptions { threads_per_run: settings.threads_per_run, scratch_max: settings.scratch_max };
    let runtime = Runtime::load(&settings.onnxruntime, options)?;
    let store = Store::open(&settings.store_dir, settings.store_max)
        .map_err(ServeError::io(format!("store_dir {}", settings.store_dir.display())))?;
    let library = settings.onnxruntime.clone();
    let preparer = Preparer::new(program, library, settings.prepare_within, settings.prepare_parallel);
    let devices = settings.devices.iter().map(|device| Ok(open_device(device)? as Arc<dyn Device>));
    let devices = devices.collect::<Result<Vec<_>, ServeError>>()?;
    let memory = Memory::open(&settings.memory_dir, settings.host_memory, weights_ready(&devices))
        .map_err(ServeError::io(format!("memory_dir {}", settings.memory_dir.display())))?;
    Ok(Loader {
        store,
        preparer,
        memory,
        runtime,
        devices,
        uploads: Semaphore::new(UPLOADS_MAX),
        loads: Semaphore::new(LOADS_MAX),
        room: std::sync::Mutex::new(()),
    })
}

/// Makes weights in host memory ready for the devices that copy them. Where one cannot, its copies are slower.
fn weights_ready(devices: &[Arc<dyn Device>]) -> Ready {
    let devices = devices.to_vec();
    Box::new(move |weights| {
        for device in &devices {
            if let Err(error) = device.prepare_weights(weights) {
                tracing::warn!(device = device.info().name, %error, "weights are not ready for fast copies");
            }
        }
    })
}

fn open_device(settings: &DeviceSettings) -> Result<Arc<HostDevice>, ServeError> {
    let config = HostConfig {
        name: settings.name.clone(),
        capacity: settings.memory,
        chunk: settings.chunk,
        link_bytes_per_second: settings.link_mib_per_s.map(|mib| mib.saturating_mul(1 << 20)),
        populate: true,
    };
    let device =
        HostDevice::new(config).map_err(|source| ServeError::Device { name: settings.name.clone(), source })?;
    tracing::info!(name = settings.name, memory = %device.info().capacity, lanes = settings.lanes, "device");
    Ok(device)
}

fn devices(settings: &Settings, loader: &Loader, mailbox: &Arc<Mailbox>) -> Result<Vec<DeviceEntry>, ServeError> {
    let entry = |(settings, device): (&DeviceSettings, &Arc<dyn Device>)| {
        let lane = |lane| Lane::start(&format!("lane-{}-{lane}", settings.name), Arc::clone(mailbox));
        let lanes = (0..settings.lanes).map(lane).collect::<io::Result<_>>();
        let lanes = lanes.map_err(ServeError::io("starting a lane"))?;
        Ok(DeviceEntry { device: Arc::clone(device), lanes, lost: false })
    };
    settings.devices.iter().zip(&loader.devices).map(entry).collect()
}

async fn listen_to_threads(core: Rc<RefCell<Core>>, mailbox: Arc<Mailbox>) {
    loop {
        mailbox.posted().await;
        core.borrow_mut().take_ended();
    }
}

async fn ring_alarms(core: Rc<RefCell<Core>>) {
    let changed = Rc::clone(&core.borrow().alarm);
    loop {
        let at = core.borrow().alarm_at();
        match at {
            None => changed.notified().await,
            Some(at) => tokio::select! {
                () = sleep_until(Instant::from_std(at)) => {
                    let mut core = core.borrow_mut();
                    core.take_ended();
                    core.woken();
                }
                () = changed.notified() => {}
            },
        }
    }
}

async fn keep_house(core: Rc<RefCell<Core>>) {
    let mut every = interval(HOUSEKEEPING_EVERY);
    loop {
        every.tick().await;
        core.borrow_mut().keep_house();
    }
}

async fn answer_admin(core: Rc<RefCell<Core>>, mut questions: mpsc::Receiver<oneshot::Sender<crate::core::Report>>) {
    while let Some(answer) = questions.recv().await {
        let mut core = core.borrow_mut();
        core.gauge();
        // Whoever asked may be gone.
        let _ = answer.send(core.report());
    }
}
