//! Work on models that takes time: storing what is uploaded, preparing, copying to host memory, binding to devices.
//!
//! Runs beside the loop, a few at a time; the loop hears of the end.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU8, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes as Buffer;
use faaswap_device::cuda::{KINDS_MAX, KindKey};
use faaswap_engine::{EngineError, Prepared, Runtime};
use faaswap_protocol::{Bytes, Detail, ModelDigest, ModelFile, Refusal};
use faaswap_scheduler::DeviceId;
use tokio::{
    sync::{Semaphore, mpsc},
    task::spawn_blocking,
    time::timeout,
};

use crate::{
    bound::BoundThere,
    core::{Loaded, charge, device_id},
    devices::Opened,
    lane::BoundModel,
    store::{Home, Memory, MemoryError, Preparer, Store, Upload, UploadError, copy_files, memory_key},
    turns::{Turns, Wanted},
    variant::{Machine, Variant},
};

/// How long the next part of an upload may take to come.
const PART_WITHIN: Duration = Duration::from_secs(30);

/// Where a model is on its way.
#[derive(Debug, Default)]
pub(crate) struct Stage(AtomicU8);

const STAGES: [&str; 4] = [
    "waiting for other models to be prepared",
    "preparing the model",
    "waiting for other models to be loaded",
    "loading the weights into host memory and making sessions",
];

impl Stage {
    fn set(&self, stage: u8) {
        self.0.store(stage, Ordering::Relaxed);
    }

    pub(crate) fn text(&self) -> &'static str {
        STAGES.get(usize::from(self.0.load(Ordering::Relaxed))).copied().unwrap_or("under way")
    }
}

/// What loading works with.
#[derive(Debug)]
pub(crate) struct Loader {
    pub(crate) store: Store,
    /// What models are prepared for.
    pub(crate) machine: Machine,
    pub(crate) preparer: Preparer,
    pub(crate) memory: Arc<Memory>,
    pub(crate) runtime: Runtime,
    pub(crate) devices: Vec<Opened>,
    pub(crate) uploads: Semaphore,
    /// For loading models, and binding them to further devices.
    pub(crate) loads: Turns,
    /// Counts models: each is bound to another device first.
    pub(crate) opened: AtomicUsize,
    pub(crate) begun: Mutex<Begun>,
    /// Making room in the store, and filling it, is for one at a time.
    pub(crate) room: Mutex<()>,
}

/// Where models of each kind are bound first, as long as no device knows the kind.
#[derive(Debug, Default)]
pub(crate) struct Begun(HashMap<KindKey, DeviceId>);

impl Begun {
    /// The device for a kind, of these, which are not none: for a new one that with the fewest.
    fn of(&mut self, kind: KindKey, devices: &[DeviceId]) -> DeviceId {
        if let Some(first) = self.0.get(&kind).filter(|first| devices.contains(first)) {
            return *first;
        }
        if self.0.len() >= KINDS_MAX {
            self.0.clear();
        }
        let kinds = |device: &DeviceId| self.0.values().filter(|first| *first == device).count();
        let fewest = devices.iter().copied().min_by_key(kinds).unwrap_or(devices[0]);
        self.0.insert(kind, fewest);
        fewest
    }
}

/// A device and its name in the scheduler.
pub(crate) type OnDevice = (DeviceId, Opened);

impl Loader {
    /// Whether the model was uploaded or prepared before.
    pub(crate) fn has(&self, model: &Variant) -> bool {
        self.store_for(model).prepared_dir(&model.digest).exists() || self.store.contents(&model.digest).is_some()
    }

    /// The store, as far as it is about what is prepared like this model.
    fn store_for(&self, model: &Variant) -> Store {
        self.store.clone().with_flavour(self.machine.flavour(model))
    }

    /// Gives the devices too that it is to be bound to later.
    fn open(&self, model: &Variant) -> Result<(Loaded, Vec<OnDevice>), Refusal> {
        let prepared = Prepared::open(self.store_for(model).prepared_dir(&model.digest)).map_err(rejected)?;
        let manifest = Arc::clone(prepared.manifest());
        let weights = manifest.weights_bytes;
        let fitting = self.in_order(&prepared, self.fitting(weights)?).map_err(rejected)?;
        let key = memory_key(&model.digest, &manifest);
        let home = self.memory.home(&key, &prepared.weights_path(), weights).map_err(|error| match error {
            MemoryError::Full { needed, left } => Refusal::HostMemoryFull { needed, left },
            MemoryError::Busy | MemoryError::Map(_) => Refusal::HostMemoryFull { needed: weights, left: Bytes::ZERO },
        })?;
        // What is bound needs no weights: they come meanwhile.
        let (bound, unbound) = thread::scope(|scope| {
            let warming = scope.spawn(|| warm(&home));
            let bound = self.bind_first(model, &prepared, fitting);
            warming.join().map_err(|_| Refusal::Draining).and(bound)
        })?;
        let signature = Arc::new(manifest.signature.clone());
        Ok((Loaded { bound: vec![bound], home, signature, weights, by_rows: manifest.by_rows }, unbound))
    }

    /// Devices in the order in which a model is bound to them: another one first for each, but for one that knows the model's kind.
    /// Where none does, models of a kind begin with the same: a device learns a kind from two sessions, which take a hundred
    /// times as long as what it makes of them for all others.
    fn in_order(&self, prepared: &Prepared, mut devices: Vec<OnDevice>) -> Result<Vec<OnDevice>, EngineError> {
        let next = self.opened.fetch_add(1, Ordering::Relaxed) % devices.len();
        devices.rotate_left(next);
        let has_kinds = devices.len() > 1 && self.machine != Machine::Host;
        let Some(kind) = (if has_kinds { prepared.kind_key()? } else { None }) else { return Ok(devices) };
        let knows = |(_, device): &OnDevice| device.device().knows_kind(&kind);
        let knowing = devices.iter().position(|device| knows(device) == Some(true));
        let first = knowing.or_else(|| {
            let all: Vec<_> = devices.iter().map(|(id, _)| *id).collect();
            let first = self.begun.lock().unwrap_or_else(PoisonError::into_inner).of(kind, &all);
            devices.iter().position(|device| device.0 == first && knows(device).is_some())
        });
        if let Some(first) = first {
            devices[..=first].rotate_right(1);
        }
        Ok(devices)
    }

    /// Binds to the first of these devices that is not lost; gives those behind it back.
    fn bind_first(
        &self,
        model: &Variant,
        prepared: &Prepared,
        devices: Vec<OnDevice>,
    ) -> Result<(OnDeviceBound, Vec<OnDevice>), Refusal> {
        let mut devices = devices.into_iter();
        while let Some(device) = devices.next() {
            match self.bind(model, prepared, device.clone()) {
                Ok(bound) => return Ok((bound, devices.filter(|(_, device)| !device.device().is_lost()).collect())),
                Err(_) if device.1.device().is_lost() => {}
                Err(error) => return Err(rejected(error)),
            }
        }
        Err(Refusal::HardwareFault)
    }

    fn bind(&self, model: &Variant, prepared: &Prepared, (id, opened): OnDevice) -> Result<OnDeviceBound, EngineError> {
        let begun = Instant::now();
        let made = BoundThere::new(&self.runtime, prepared, &opened)?;
        let (took, is_twin, device) = (begun.elapsed(), made.is_twin(), opened.device());
        tracing::debug!(model = ?model.digest, device = %device.info().name, ?took, is_twin, "bound");
        Ok((id, Arc::new(BoundModel::new(model.digest, made, device))))
    }

    /// Readies weights that are in host memory for a device that may have come since they were readied.
    fn ready_for(&self, model: &Variant, prepared: &Prepared, (_, device): &OnDevice) {
        let Some(weights) = self.memory.there(&memory_key(&model.digest, prepared.manifest())) else { return };
        if let Err(error) = device.device().prepare_weights(&weights) {
            tracing::warn!(%error, model = ?model.digest, "weights are not ready for fast copies");
        }
    }

    /// The devices that can hold so many weights.
    fn fitting(&self, weights: Bytes) -> Result<Vec<OnDevice>, Refusal> {
        let all = self.devices.iter().enumerate();
        let fits = |opened: &Opened| {
            let device = opened.device();
            charge(weights, device.as_ref()) <= device.info().capacity
        };
        let fitting: Vec<_> = all.filter(|(_, d)| fits(d)).map(|(index, d)| (device_id(index), d.clone())).collect();
        if fitting.is_empty() {
            let capacity = self.devices.iter().map(|device| device.device().info().capacity).max().unwrap_or_default();
            return Err(Refusal::ModelTooLarge { needed: weights, capacity });
        }
        Ok(fitting)
    }
}

/// Brings weights to host memory.
fn warm(home: &Home) {
    let begun = Instant::now();
    if let Err(error) = home.warm() {
        tracing::warn!(%error, "weights stay on disk until they are asked for");
    }
    tracing::debug!(took = ?begun.elapsed(), ?home, "weights are in host memory");
}

/// A model on a device, by the device's name in the scheduler.
pub(crate) type OnDeviceBound = (DeviceId, Arc<BoundModel>);

#[expect(clippy::needless_pass_by_value, reason = "made for map_err")]
fn rejected(error: EngineError) -> Refusal {
    Refusal::ModelRejected { reason: Detail::from(error.to_string()) }
}

/// Loads a model whose files are in the store, and binds it to one device. Gives the others too that can hold it.
pub(crate) async fn load(
    loader: &Arc<Loader>,
    model: Variant,
    stage: &Arc<Stage>,
    wanted: &Arc<Wanted>,
) -> Result<(Loaded, Vec<OnDevice>), Refusal> {
    let store = loader.store_for(&model);
    if !store.prepared_dir(&model.digest).exists() {
        let (begun, target) = (Arc::clone(stage), loader.machine.target(&model));
        loader.preparer.prepare((&store, target), &model.digest, move || begun.set(1)).await?;
    }
    stage.set(2);
    let _turn = loader.loads.take(wanted).await;
    stage.set(3);
    let loader = Arc::clone(loader);
    spawn_blocking(move || loader.open(&model)).await.unwrap_or(Err(Refusal::Draining))
}

/// Binds a model that was loaded to one more device, once no model waits to be loaded.
pub(crate) async fn bind_too(loader: &Arc<Loader>, model: Variant, device: OnDevice) -> Result<OnDeviceBound, Refusal> {
    let _turn = loader.loads.take(&Wanted::later()).await;
    let loader = Arc::clone(loader);
    let bind = move || {
        let prepared = Prepared::open(loader.store_for(&model).prepared_dir(&model.digest)).map_err(rejected)?;
        loader.ready_for(&model, &prepared, &device);
        loader.bind(&model, &prepared, device).map_err(rejected)
    };
    spawn_blocking(bind).await.unwrap_or(Err(Refusal::Draining))
}

/// Where an upload's bytes come from.
#[derive(Debug)]
pub(crate) enum Source {
    /// Descriptors of the files.
    Files(Vec<OwnedFd>),
    /// Frames, as they come.
    Parts(mpsc::Receiver<Buffer>),
}

/// Stores a model.
pub(crate) async fn upload(
    loader: &Arc<Loader>,
    model: ModelDigest,
    files: Vec<ModelFile>,
    source: Source,
    in_use: Vec<String>,
) -> Result<(), Refusal> {
    let _turn = loader.uploads.acquire().await.map_err(|_| Refusal::Draining)?;
    let begun = {
        let loader = Arc::clone(loader);
        spawn_blocking(move || {
            let _alone = loader.room.lock().unwrap_or_else(PoisonError::into_inner);
            let size = files.iter().map(|file| file.len).sum();
            loader.store.make_room(size, |hex| in_use.iter().any(|used| used == hex))?;
            Upload::begin(&loader.store, model, files).map_err(Refusal::from)
        })
    };
    let upload = begun.await.unwrap_or(Err(Refusal::Draining))?;
    match source {
        Source::Files(fds) => spawn_blocking(move || copy_files(upload, &fds))
            .await
            .unwrap_or_else(|_| Err(UploadError::Refused("it was interrupted".to_owned())))
            .map_err(Refusal::from),
        Source::Parts(parts) => take_parts(upload, parts).await,
    }
}

async fn take_parts(mut upload: Upload, mut parts: mpsc::Receiver<Buffer>) -> Result<(), Refusal> {
    let refuse = |reason: &str| Refusal::from(UploadError::Refused(reason.to_owned()));
    let mut next = Buffer::new();
    loop {
        let (back, all_there) = spawn_blocking(move || {
            let all_there = upload.take(&next);
            (upload, all_there)
        })
        .await
        .map_err(|_| refuse("it was interrupted"))?;
        upload = back;
        if all_there.map_err(Refusal::from)? {
            break;
        }
        next = timeout(PART_WITHIN, parts.recv())
            .await
            .map_err(|_| refuse("no part of it came for 30 s"))?
            .ok_or_else(|| refuse("the peer has gone"))?;
    }
    let finished = spawn_blocking(move || upload.finish()).await;
    finished.map_err(|_| refuse("it was interrupted"))?.map_err(Refusal::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_begin_where_there_are_fewest_and_stay_there() {
        let mut begun = Begun::default();
        let kind = |number: usize| {
            let mut key = KindKey::default();
            key[..8].copy_from_slice(&number.to_ne_bytes());
            key
        };
        let all = [2, 0, 1].map(DeviceId);
        let firsts: Vec<_> = (0..6).map(|number| begun.of(kind(number), &all).0).collect();
        assert_eq!(firsts, [2, 0, 1, 2, 0, 1]);
        assert_eq!(begun.of(kind(1), &[DeviceId(1), DeviceId(0)]), DeviceId(0), "in another order");
        assert_eq!(begun.of(kind(1), &[DeviceId(1)]), DeviceId(1), "that device is lost");
        (0..2 * KINDS_MAX).for_each(|number| assert!(all.contains(&begun.of(kind(number), &all))));
        assert!(begun.0.len() <= KINDS_MAX);
    }
}
