//! Registers slabs with the driver, so that GPUs read large inputs where sidecars have written them.
//!
//! That takes milliseconds, and pages, so a thread of its own does it, and only for peers whose runs have shown that they would
//! gain. Until then, and where it cannot be done, inputs are copied: no request waits for it or fails of it. What is registered
//! is the start of a slab, where slots are taken first. It is given back on the same thread, before it is unmapped, once its
//! peer and the peer's last run have gone.

use std::{
    io,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::Instant,
};

use faaswap_device::{Device, DeviceError, cuda::Registered};
use faaswap_protocol::{Bytes, Span};
use faaswap_slab::{Region, SlabError};

use crate::{
    lane::{Peer, Shared},
    limits::{SLAB_REGISTERED_MAX, SLABS_QUEUED_MAX, SLABS_REGISTERED_MAX},
};

/// How lanes ask for slabs to be registered.
#[derive(Clone, Debug)]
pub(crate) struct Registrar {
    jobs: SyncSender<Job>,
}

#[derive(Debug)]
enum Job {
    Register { peer: Arc<Peer>, back: SyncSender<Job> },
    GiveBack(Kept),
}

/// Memory that is registered, and its share of what may be. Dropping it takes the driver a moment.
#[derive(Debug)]
struct Kept {
    registered: Registered,
    _share: Share,
}

/// A slab's start, registered; the slab stays mapped for as long.
#[derive(Debug)]
pub(crate) struct Lease {
    /// There until this is dropped.
    kept: Option<Kept>,
    back: SyncSender<Job>,
}

impl Lease {
    pub(crate) fn memory(&self) -> Option<&Registered> {
        self.kept.as_ref().map(|kept| &kept.registered)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(kept) = self.kept.take() {
            // Where the thread is gone or has too much to do, it goes here.
            drop(self.back.try_send(Job::GiveBack(kept)));
        }
    }
}

/// How many bytes more may be registered.
#[derive(Debug)]
struct Budget(AtomicU64);

/// A part of a budget, until it is dropped.
#[derive(Debug)]
struct Share {
    of: Arc<Budget>,
    bytes: u64,
}

impl Budget {
    fn new(bytes: Bytes) -> Arc<Self> {
        Arc::new(Self(AtomicU64::new(bytes.get())))
    }

    fn take(self: &Arc<Self>, bytes: u64) -> Option<Share> {
        let take = |left: u64| left.checked_sub(bytes);
        self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, take).ok()?;
        Some(Share { of: Arc::clone(self), bytes })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.of.0.fetch_add(self.bytes, Ordering::AcqRel);
    }
}

impl Registrar {
    /// Starts the thread; it ends with the last lane and lease. `None` where there is no GPU.
    pub(crate) fn start(devices: &[Arc<dyn Device>]) -> io::Result<Option<Self>> {
        let gpus: Vec<_> = devices.iter().filter(|device| device.as_cuda().is_some()).map(Arc::downgrade).collect();
        if gpus.is_empty() {
            return Ok(None);
        }
        let (jobs, queue) = sync_channel(SLABS_QUEUED_MAX);
        let work = Work { gpus, budget: Budget::new(SLABS_REGISTERED_MAX), warned: false };
        thread::Builder::new().name("registrar".to_owned()).spawn(move || work.run(&queue))?;
        Ok(Some(Self { jobs }))
    }

    /// Asks for a peer's slab to be registered; does nothing where it was asked for before.
    pub(crate) fn ask(&self, peer: &Arc<Peer>) {
        let Some(shared) = peer.shared.get().filter(|shared| shared.asks_first()) else { return };
        let job = Job::Register { peer: Arc::clone(peer), back: self.jobs.clone() };
        if self.jobs.try_send(job).is_err() {
            shared.may_ask_again();
        }
    }
}

/// What the thread has.
#[derive(Debug)]
struct Work {
    gpus: Vec<Weak<dyn Device>>,
    budget: Arc<Budget>,
    /// A failure is told once; what comes after it is likely to be the same.
    warned: bool,
}

impl Work {
    fn run(mut self, queue: &Receiver<Job>) {
        for job in queue {
            match job {
                Job::Register { peer, back } => {
                    if let Some(shared) = peer.shared.get()
                        && let Some(kept) = self.register(shared)
                    {
                        shared.is_registered(Lease { kept: Some(kept), back });
                    }
                }
                Job::GiveBack(kept) => drop(kept),
            }
        }
    }

    /// `None` where it may not be, or cannot.
    fn register(&mut self, shared: &Shared) -> Option<Kept> {
        let region = start_of(shared).inspect_err(|error| tracing::debug!(%error, "a slab has no start")).ok()?;
        let bytes = region.len();
        let Some(share) = self.budget.take(Bytes::of_len(bytes).get()) else {
            tracing::debug!(bytes, most = %SLABS_REGISTERED_MAX, "a slab is not registered: others have all that may be");
            return None;
        };
        let started = Instant::now();
        if let Err(error) = region.fault_in() {
            tracing::debug!(%error, "a slab's pages were not faulted in");
        }
        match self.with_a_gpu(&region) {
            Ok(registered) => {
                tracing::debug!(bytes, took = ?started.elapsed(), "a slab is registered: GPUs read large inputs there");
                Some(Kept { registered: registered?, _share: share })
            }
            Err(error) if self.warned => {
                tracing::debug!(%error, bytes, "a slab cannot be registered");
                None
            }
            Err(error) => {
                self.warned = true;
                tracing::warn!(%error, bytes, "a slab cannot be registered: inputs are copied as before");
                None
            }
        }
    }

    /// Registers memory with any GPU that works: it counts for all of them.
    fn with_a_gpu(&self, region: &Region) -> Result<Option<Registered>, DeviceError> {
        let gpu = self.gpus.iter().filter_map(Weak::upgrade).find(|gpu| !gpu.is_lost());
        gpu.map_or(Ok(None), |gpu| faaswap_engine::register(&*gpu, region))
    }
}

/// What of a slab is registered.
fn start_of(shared: &Shared) -> Result<Region, SlabError> {
    let len = shared.slab.layout().request.min(SLAB_REGISTERED_MAX);
    shared.slab.request_region(Span { offset: 0, len: len.get() })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use faaswap_device::host::{HostConfig, HostDevice};
    use faaswap_protocol::SlabLayout;
    use faaswap_slab::Slab;

    use super::*;

    fn shared(request: Bytes) -> Shared {
        Shared::new(Slab::create(SlabLayout { request, response: Bytes::kib(4) }).unwrap().0)
    }

    fn host() -> Arc<dyn Device> {
        HostDevice::new(HostConfig::new("host0", Bytes::mib(2))).unwrap()
    }

    #[test]
    fn no_more_is_registered_than_may_be_and_what_goes_makes_room() {
        let budget = Budget::new(Bytes::new(100));
        let (first, second) = (budget.take(60).unwrap(), budget.take(40).unwrap());
        assert!(budget.take(1).is_none());
        drop(first);
        assert!(budget.take(61).is_none());
        let third = budget.take(60).unwrap();
        drop((second, third));
        assert_eq!(budget.0.load(Ordering::SeqCst), 100);
    }

    #[test]
    fn the_start_of_the_request_half_is_registered_up_to_a_limit() {
        assert_eq!(start_of(&shared(Bytes::kib(64))).unwrap().len(), 64 << 10);
        let large = shared(Bytes::mib(64));
        let start = start_of(&large).unwrap();
        assert_eq!(Bytes::of_len(start.len()), SLAB_REGISTERED_MAX);
        let first = large.slab.request_region(Span { offset: 0, len: 64 }).unwrap();
        assert_eq!(start.as_ptr(), first.as_ptr());
    }

    #[test]
    fn where_there_is_no_gpu_nothing_is_registered_and_no_share_is_kept() {
        assert!(Registrar::start(&[host()]).unwrap().is_none());
        let device = host();
        let mut work = Work { gpus: vec![Arc::downgrade(&device)], budget: Budget::new(Bytes::mib(1)), warned: false };
        let slab = shared(Bytes::kib(64));
        assert!(work.register(&slab).is_none());
        drop(device);
        assert!(work.register(&slab).is_none());
        assert_eq!(work.budget.0.load(Ordering::SeqCst), 1 << 20);
    }

    #[test]
    fn a_slab_is_asked_for_once_unless_the_thread_had_too_much_to_do() {
        let slab = shared(Bytes::kib(64));
        assert_eq!([slab.asks_first(), slab.asks_first()], [true, false]);
        slab.may_ask_again();
        assert!(slab.asks_first());
    }
}
