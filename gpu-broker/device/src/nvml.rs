//! What the machine says of its GPUs, whoever uses them: memory, load, clocks, faults, other processes, topology.
//!
//! [`Watch`] looks at them from time to time on a thread of its own, for NVML's answers take milliseconds. Nothing is
//! judged here: metrics show what is seen, and scheduling draws the conclusions. NVML is loaded at run time; where it is
//! not there, nothing is watched and everything else works.

mod foreign;
mod observation;
mod read;
mod topology;

use std::{
    ffi::OsStr,
    fmt,
    sync::{Arc, Condvar, Mutex, OnceLock, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use nvml_wrapper::Nvml;

use self::read::Reader;
pub use self::{
    observation::{Busy, Foreign, Level, MemoryUse, Observation, Pcie, Throttle, Throttles, Xids},
    topology::{Ancestor, Pair},
};
use crate::PciAddress;

/// Shortest time between two looks: a look at one GPU takes 40 ms.
pub const LOOK_EVERY_MIN: Duration = Duration::from_millis(100);
/// Names of the library, in this order. Containers have the first one only.
const LIBRARIES: [&str; 2] = ["libnvidia-ml.so.1", "libnvidia-ml.so"];

/// NVML, loaded once for as long as the process lives; `None` where it is not there.
fn library() -> Option<&'static Nvml> {
    static LIBRARY: OnceLock<Option<Nvml>> = OnceLock::new();
    let load = || {
        let mut failures = Vec::new();
        for name in LIBRARIES {
            match Nvml::builder().lib_path(OsStr::new(name)).init() {
                Ok(nvml) => return Some(nvml),
                Err(error) => failures.push(format!("{name}: {error}")),
            }
        }
        tracing::info!(why = failures.join("; "), "GPUs are not watched: there is no NVML");
        None
    };
    LIBRARY.get_or_init(load).as_ref()
}

/// What the thread and its owner share.
#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    latest: Arc<[Observation]>,
    stop: bool,
}

/// Looks at all GPUs of the machine from time to time. Dropping it ends its thread.
pub struct Watch {
    shared: Arc<Shared>,
    pairs: Vec<Pair>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Begins to watch, with a first look; `None`, and one line in the log, where there is no NVML or no GPU.
    pub fn start(every: Duration) -> Option<Self> {
        let nvml = library()?;
        let mut reader = Reader::open(nvml);
        let first = reader.look();
        if first.is_empty() {
            return None;
        }
        let pairs = reader.topology(nvml);
        Self::with(every, first, pairs, move || reader.look())
            .inspect_err(|error| tracing::warn!(%error, "GPUs are not watched: no thread can be started"))
            .ok()
    }

    /// Watches what `look` sees.
    fn with(
        every: Duration,
        first: Vec<Observation>,
        pairs: Vec<Pair>,
        mut look: impl FnMut() -> Vec<Observation> + Send + 'static,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        shared.lock().latest = first.into();
        let (every, theirs) = (every.max(LOOK_EVERY_MIN), Arc::clone(&shared));
        let thread = thread::Builder::new().name("gpu-watch".to_owned()).spawn(move || {
            while theirs.sleep(every) {
                let seen = look();
                theirs.lock().latest = seen.into();
            }
        })?;
        Ok(Self { shared, pairs, thread: Some(thread) })
    }

    /// All GPUs as they were seen last.
    pub fn latest(&self) -> Arc<[Observation]> {
        Arc::clone(&self.shared.lock().latest)
    }

    /// How the GPUs are connected, each pair once.
    pub fn pairs(&self) -> &[Pair] {
        &self.pairs
    }

    /// One GPU as it was seen last.
    pub fn of(&self, pci: PciAddress) -> Option<Observation> {
        self.latest().iter().find(|seen| seen.pci == pci).cloned()
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sleeps; false where there is to be no next look.
    fn sleep(&self, every: Duration) -> bool {
        let slept = self.changed.wait_timeout_while(self.lock(), every, |state| !state.stop);
        !slept.unwrap_or_else(PoisonError::into_inner).0.stop
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.changed.notify_all();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that watches GPUs had panicked");
        }
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("pairs", &self.pairs).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::sync::mpsc;

    use super::*;

    fn gpu(bus: u32, power: u32) -> Observation {
        let pci = PciAddress { domain: 0, bus, device: 0 };
        Observation { power_milliwatts: Some(power), ..Observation::blank(pci) }
    }

    #[test]
    fn a_watch_shows_the_first_look_at_once_and_later_ones_as_they_come() {
        let (ask, asked) = mpsc::sync_channel(0);
        let looks = move || asked.recv().unwrap_or_default();
        let watch = Watch::with(Duration::ZERO, vec![gpu(1, 10), gpu(2, 20)], Vec::new(), looks).unwrap();
        assert_eq!(watch.of(gpu(2, 0).pci), Some(gpu(2, 20)));
        assert_eq!(watch.of(gpu(3, 0).pci), None);
        ask.send(vec![gpu(2, 21)]).unwrap();
        // Whoever takes the second has put the first one up.
        ask.send(vec![gpu(2, 22)]).unwrap();
        assert!([21, 22].map(|power| Some(gpu(2, power))).contains(&watch.of(gpu(2, 0).pci)));
        assert_eq!(watch.of(gpu(1, 0).pci), None, "a look replaces all of the one before");
        drop(ask);
    }

    #[test]
    fn dropping_a_watch_ends_its_thread_without_waiting_for_the_next_look() {
        let (alive, gone) = mpsc::channel::<()>();
        let looks = move || {
            let _ = &alive;
            Vec::new()
        };
        let watch = Watch::with(Duration::from_secs(3600), Vec::new(), Vec::new(), looks).unwrap();
        drop(watch);
        assert_eq!(gone.recv(), Err(mpsc::RecvError), "the thread has dropped what it looked with");
    }

    #[test]
    fn a_machine_without_nvml_is_not_watched_and_nothing_else_happens() {
        let there = LIBRARIES.iter().any(|name| Nvml::builder().lib_path(OsStr::new(name)).init().is_ok());
        assert!(Watch::start(LOOK_EVERY_MIN).is_none() || there);
    }
}
