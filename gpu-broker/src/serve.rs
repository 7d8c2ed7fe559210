//! The broker as a process: sockets, the loop and its helpers, and an orderly end.

mod accept;
mod connection;

use std::{
    cell::RefCell,
    io,
    path::PathBuf,
    rc::Rc,
    sync::{Arc, atomic::AtomicUsize},
    time::Duration,
};

use faaswap_device::{Device, DeviceError};
use faaswap_engine::{EngineError, Runtime, RuntimeOptions};
use tokio::{
    sync::{Semaphore, mpsc, watch},
    task::{LocalSet, spawn_local},
    time::{Instant, interval, sleep, sleep_until, timeout},
};

use crate::{
    admin,
    config::{DeviceSettings, Settings},
    core::{Core, DeviceEntry},
    devices::{self, Devices, Opened},
    gpus::Gpus,
    lane::Lane,
    limits::{EXPECTED_LOOKS_FOR, HOUSEKEEPING_EVERY, LOADS_MAX, LOADS_PER_WORKER, UPLOADS_MAX},
    load::Loader,
    mailbox::Mailbox,
    registrar::Registrar,
    store::{Memory, Preparer, Ready, Store},
    telemetry::Telemetry,
    timer::Timer,
    turns::Turns,
    variant::Machine,
    verify::Verifier,
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

/// Why the broker has stopped serving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It was asked to.
    Asked,
    /// Devices of this process are lost, and either none is left or nothing is to do. A process that starts anew can use them again; this
    /// one cannot, since a GPU's failed context stays with its process (also after a reset, as was seen on an H100).
    Anew,
}

/// Serves until `stop` completes, then drains. `program` prepares models: this program itself.
pub async fn serve(settings: Settings, program: PathBuf, stop: impl Future<Output = ()>) -> Result<End, ServeError> {
    LocalSet::new().run_until(serve_here(settings, program, stop)).await
}

async fn serve_here(settings: Settings, program: PathBuf, stop: impl Future<Output = ()>) -> Result<End, ServeError> {
    raise_file_limit();
    let settings = Arc::new(settings);
    let mailbox = Arc::new(Mailbox::default());
    let options = RuntimeOptions { threads_per_run: settings.threads_per_run, scratch_max: settings.scratch_max };
    let runtime = Runtime::load(&settings.onnxruntime, options)?;
    let mut opened = devices::open(&settings, &program, &runtime)?;
    let links = std::mem::take(&mut opened.links);
    let loader = Arc::new(loader(&settings, program, runtime, &opened)?);
    let all: Vec<_> = loader.devices.iter().map(Opened::device).collect();
    let telemetry = Arc::new(Telemetry::of(Arc::new(Gpus::watch(&all, links)), Some(Arc::clone(&loader.memory))));
    let may_fail = all.into_iter().filter(|_| settings.test_faults).collect();
    let devices = lanes(opened, &mailbox)?;
    let verifier = Verifier::start(settings.verify_every).map_err(ServeError::io("starting a thread"))?;
    let core =
        Core::new(Arc::clone(&settings), Arc::clone(&telemetry), Arc::clone(&mailbox), loader, verifier, devices)
            .map_err(ServeError::io("beginning the trace"))?;
    core.borrow_mut().tell_links(telemetry.gpus());
    let listeners = accept::Listeners::bind(&settings)?;
    let (asks, questions) = mpsc::channel(admin::QUESTIONS_MAX);
    let (ready, is_ready) = watch::channel(false);
    if let Some(address) = settings.admin_listen {
        let listener = tokio::net::TcpListener::bind(address).await;
        let listener = listener.map_err(ServeError::io(format!("admin_listen {address}")))?;
        tracing::info!(address = %listener.local_addr().unwrap_or(address), "admin port is open");
        spawn_local(admin::serve(listener, Arc::clone(&telemetry), is_ready, asks, may_fail));
    }
    spawn_local(listen_to_threads(Rc::clone(&core), mailbox));
    let timer = Timer::new().map_err(ServeError::io("making a timer"))?;
    spawn_local(ring_alarms(Rc::clone(&core), timer));
    spawn_local(look_for_expected(Rc::clone(&core)));
    spawn_local(keep_house(Rc::clone(&core)));
    spawn_local(answer_admin(Rc::clone(&core), questions));
    let accepting = listeners.accept(&core, &telemetry);
    // Nobody waits for this where the admin port is off.
    let _ = ready.send(true);
    tracing::info!(socket = %settings.socket.display(), "ready");
    let broken = Rc::clone(&core.borrow().broken);
    let end = tokio::select! {
        () = stop => End::Asked,
        () = broken.notified() => End::Anew,
    };
    tracing::info!(?end, "draining");
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
    core.borrow_mut().close_all();
    if end == End::Anew {
        core.borrow_mut().leave_devices_behind();
    }
    accepting.remove_socket();
    Ok(end)
}

/// One descriptor per connection, and a few per model: the soft limit is often only 1,024.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let now = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: now.maximum, maximum: now.maximum }) {
        tracing::warn!(%error, limit = ?now.current, "the limit on open files cannot be raised");
    }
}

fn loader(settings: &Settings, program: PathBuf, runtime: Runtime, opened: &Devices) -> Result<Loader, ServeError> {
    let store = Store::open(&settings.store_dir, settings.store_max)
        .map_err(ServeError::io(format!("store_dir {}", settings.store_dir.display())))?;
    let devices: Vec<_> = opened.all.iter().map(|(_, device)| device.clone()).collect();
    let memory = Memory::open(&settings.memory_dir, settings.host_memory, weights_ready(&devices))
        .map_err(ServeError::io(format!("memory_dir {}", settings.memory_dir.display())))?;
    let workers = devices.iter().filter(|device| matches!(device, Opened::InWorker(_))).count();
    let parallel = match opened.machine {
        Machine::Host => settings.prepare_parallel,
        // A GPU has room for one model that is being prepared, beside those that are served.
        Machine::Gpu { .. } => 1,
    };
    let preparer = Preparer::new(program, settings.onnxruntime.clone(), settings.prepare_within, parallel);
    Ok(Loader {
        store,
        machine: opened.machine,
        preparer,
        memory,
        runtime,
        devices,
        uploads: Semaphore::new(UPLOADS_MAX),
        loads: Turns::new(LOADS_MAX.max(LOADS_PER_WORKER * workers)),
        opened: AtomicUsize::new(0),
        begun: Default::default(),
        room: std::sync::Mutex::new(()),
    })
}

/// Makes weights in host memory ready for the devices that copy them. Where one cannot, its copies are slower.
fn weights_ready(devices: &[Opened]) -> Ready {
    let devices: Vec<_> = devices.iter().map(Opened::device).collect();
    Box::new(move |weights| {
        let prepare = |device: &Arc<dyn Device>| {
            if let Err(error) = device.prepare_weights(weights) {
                tracing::warn!(device = device.info().name, %error, "weights are not ready for fast copies");
            }
        };
        // Devices of this process do it once for all, those of other processes each by itself.
        std::thread::scope(|scope| {
            let (first, others) = devices.split_first().unzip();
            others.into_iter().flatten().for_each(|device| drop(scope.spawn(move || prepare(device))));
            first.inspect(|first| prepare(first));
        });
    })
}

fn lanes(opened: Devices, mailbox: &Arc<Mailbox>) -> Result<Vec<DeviceEntry>, ServeError> {
    let devices: Vec<_> = opened.all.iter().map(|(_, device)| device.device()).collect();
    let registrar = Registrar::start(&devices).map_err(ServeError::io("starting a thread"))?;
    let entry = |(settings, device): (DeviceSettings, Opened)| {
        let name = |lane| format!("lane-{}-{lane}", settings.name);
        let lane = |lane| Lane::start(&name(lane), Arc::clone(mailbox), registrar.clone());
        let lanes = (0..settings.lanes).map(lane).collect::<io::Result<_>>();
        let lanes = lanes.map_err(ServeError::io("starting a lane"))?;
        Ok(DeviceEntry { device: device.device(), lanes, lost: false, suspected: false })
    };
    opened.all.into_iter().map(entry).collect()
}

async fn listen_to_threads(core: Rc<RefCell<Core>>, mailbox: Arc<Mailbox>) {
    loop {
        mailbox.posted().await;
        core.borrow_mut().take_ended();
    }
}

async fn ring_alarms(core: Rc<RefCell<Core>>, mut timer: Timer) {
    let changed = Rc::clone(&core.borrow().alarm);
    loop {
        let at = core.borrow().alarm_at();
        match at {
            None => changed.notified().await,
            Some(at) => tokio::select! {
                rung = timer.until(at) => {
                    if let Err(error) = rung {
                        tracing::error!(%error, "the timer does not ring");
                        sleep_until(Instant::from_std(at)).await;
                    }
                    let mut core = core.borrow_mut();
                    core.take_ended();
                    core.woken();
                }
                () = changed.notified() => {}
            },
        }
    }
}

/// Keeps the loop awake, for a moment, for a request that is about to come: to be woken takes longer than to schedule it.
async fn look_for_expected(core: Rc<RefCell<Core>>) {
    let expected = Rc::clone(&core.borrow().expected);
    loop {
        expected.notified().await;
        let until = Instant::now() + EXPECTED_LOOKS_FOR;
        while Instant::now() < until && !core.borrow().is_busy() {
            tokio::task::yield_now().await;
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

async fn answer_admin(core: Rc<RefCell<Core>>, mut questions: mpsc::Receiver<admin::Question>) {
    // Whoever asked may be gone.
    while let Some(question) = questions.recv().await {
        let mut core = core.borrow_mut();
        match question {
            admin::Question::Report(answer) => {
                core.gauge();
                let _ = answer.send(core.report());
            }
            admin::Question::Choose(policy, answer) => {
                core.choose(policy);
                let _ = answer.send(());
            }
        }
    }
}
