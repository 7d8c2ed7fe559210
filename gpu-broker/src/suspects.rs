//! Models that were running when devices were lost.
//!
//! A kernel that fails takes all GPUs of its process with it (a GPU in a worker alone), and nobody says whose it was. What is known are
//! the models that were running there. One that was so again and again is refused for a while, twice as long each time, so that it cannot
//! keep a node from serving all others; a bystander, who is in company each time, gets there half as fast. It is kept in a file, for the
//! broker may be replaced after a fault.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use faaswap_protocol::ModelDigest;
use faaswap_scheduler::{DeviceId, RequestKey};
use serde::{Deserialize, Serialize};

use crate::limits::ONE_FAULT;

/// The file in the store.
const FILE: &str = "suspects.json";
/// What a loss counts for whoever ran alone, and in company.
const ALONE: u32 = 2;
const IN_COMPANY: u32 = 1;
/// From so many on a model is refused.
const REFUSED_FROM: u32 = 4;
/// For how long: at first, and at most.
const REFUSED_FOR: Duration = Duration::from_mins(10);
const REFUSED_FOR_MAX: Duration = Duration::from_hours(24);
/// After so long without a loss a model is no suspect any more, but while it is refused.
const FORGOTTEN_AFTER: Duration = Duration::from_hours(6);
/// Most suspects; the ones longest ago make room.
const SUSPECTS_MAX: usize = 256;

/// What is held against a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Suspect {
    counts: u32,
    /// When it was last running, in seconds since 1970.
    last: u64,
}

impl Suspect {
    fn refused_until(self) -> Option<u64> {
        let over = self.counts.checked_sub(REFUSED_FROM)? / ALONE;
        let times = 1_u32.checked_shl(over).unwrap_or(u32::MAX);
        Some(self.last.saturating_add(REFUSED_FOR.saturating_mul(times).min(REFUSED_FOR_MAX).as_secs()))
    }

    /// For how long it is refused yet.
    fn left(self, now: SystemTime) -> Option<Duration> {
        let now = seconds(now);
        let left = self.refused_until().filter(|_| !self.is_forgotten(now))?.checked_sub(now)?;
        (left > 0).then(|| Duration::from_secs(left))
    }

    fn is_forgotten(self, now: u64) -> bool {
        let until = self.last.saturating_add(FORGOTTEN_AFTER.as_secs()).max(self.refused_until().unwrap_or(0));
        // A clock that was set back must not keep it for ever.
        now > until || self.last > now.saturating_add(REFUSED_FOR_MAX.as_secs())
    }
}

/// Which devices a fault has cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lost {
    /// One in a worker.
    One(DeviceId),
    /// Those of this process.
    All,
}

/// All suspects of the node, and what is running.
#[derive(Debug)]
pub(crate) struct Suspects {
    path: PathBuf,
    known: BTreeMap<ModelDigest, Suspect>,
    /// By the request that each run was started for.
    running: HashMap<RequestKey, (ModelDigest, DeviceId)>,
    /// When devices of this process were lost last.
    lost_at: Option<Instant>,
    /// Losses that were the fault of weights, until then.
    damaged: u64,
}

impl Suspects {
    /// Reads what is known from the store.
    pub(crate) fn open(store: &Path) -> Self {
        let path = store.join(FILE);
        let read = fs::read(&path).map(|bytes| serde_json::from_slice::<BTreeMap<String, Suspect>>(&bytes));
        let known = match read {
            Ok(Ok(known)) => known,
            Ok(Err(error)) => {
                tracing::warn!(%error, path = %path.display(), "cannot be read: no model is suspected");
                BTreeMap::new()
            }
            // Mostly there is none.
            Err(_) => BTreeMap::new(),
        };
        let known = known.into_iter().filter_map(|(model, suspect)| Some((model.parse().ok()?, suspect))).collect();
        Self { path, known, running: HashMap::new(), lost_at: None, damaged: 0 }
    }

    pub(crate) fn begins(&mut self, run: RequestKey, model: ModelDigest, device: DeviceId) {
        self.running.insert(run, (model, device));
    }

    pub(crate) fn ends(&mut self, run: &RequestKey) {
        self.running.remove(run);
    }

    /// A device was lost: what runs there may have been at fault. `damaged` counts losses that were the fault of weights. One kernel
    /// costs a process all of its devices, one after the other; that counts once.
    pub(crate) fn device_lost(&mut self, lost: Lost, damaged: u64, (at, now): (Instant, SystemTime)) {
        let is_known =
            lost == Lost::All && self.lost_at.is_some_and(|last| at.saturating_duration_since(last) < ONE_FAULT);
        let is_of_weights = std::mem::replace(&mut self.damaged, damaged) != damaged;
        if lost == Lost::All {
            self.lost_at = Some(at);
        }
        if !is_known && !is_of_weights {
            let there = |(_, device): &&(_, DeviceId)| lost == Lost::All || lost == Lost::One(*device);
            let models = self.running.values().filter(there).map(|(model, _)| *model).collect();
            self.lost_while_running(&models, now);
        }
    }

    fn lost_while_running(&mut self, models: &BTreeSet<ModelDigest>, now: SystemTime) {
        let now = seconds(now);
        self.known.retain(|_, suspect| !suspect.is_forgotten(now));
        let more = if models.len() == 1 { ALONE } else { IN_COMPANY };
        for model in models {
            let suspect = self.known.entry(*model).or_insert(Suspect { counts: 0, last: now });
            *suspect = Suspect { counts: suspect.counts.saturating_add(more), last: now };
            let until = suspect.refused_until();
            let refused_for = until.map(|until| Duration::from_secs(until.saturating_sub(now)));
            tracing::error!(?model, counts = suspect.counts, ?refused_for, "was running when a device was lost");
        }
        while self.known.len() > SUSPECTS_MAX {
            let oldest = self.known.iter().min_by_key(|(_, suspect)| suspect.last).map(|(model, _)| *model);
            oldest.map(|model| self.known.remove(&model));
        }
        if let Err(error) = self.write() {
            tracing::warn!(%error, path = %self.path.display(), "suspects are forgotten when the broker ends");
        }
    }

    /// For how long the model is not run from now on, if that is so.
    pub(crate) fn suspended_for(&self, model: &ModelDigest) -> Option<Duration> {
        self.known.get(model).and_then(|suspect| suspect.left(SystemTime::now()))
    }

    fn write(&self) -> std::io::Result<()> {
        let draft = self.path.with_extension("draft");
        let known: BTreeMap<_, _> = self.known.iter().map(|(model, suspect)| (model.to_string(), suspect)).collect();
        fs::write(&draft, serde_json::to_vec_pretty(&known)?)?;
        fs::rename(&draft, &self.path)
    }
}

fn seconds(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn model(number: u8) -> ModelDigest {
        ModelDigest([number; 32])
    }

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_000_000 + seconds)
    }

    fn left(suspects: &Suspects, number: u8, now: u64) -> Option<u64> {
        suspects.known.get(&model(number))?.left(at(now)).map(|left| left.as_secs())
    }

    #[test]
    fn who_ran_alone_twice_is_refused_for_a_while_and_longer_each_time() {
        let dir = tempfile::tempdir().unwrap();
        let mut suspects = Suspects::open(dir.path());
        let alone = BTreeSet::from([model(1)]);
        suspects.lost_while_running(&alone, at(0));
        assert_eq!(left(&suspects, 1, 0), None, "once may be chance");
        suspects.lost_while_running(&alone, at(100));
        assert_eq!(left(&suspects, 1, 100), Some(600));
        assert_eq!(left(&suspects, 1, 699), Some(1));
        assert_eq!(left(&suspects, 1, 700), None);
        assert_eq!(left(&suspects, 2, 100), None, "another model");
        suspects.lost_while_running(&alone, at(1000));
        assert_eq!(left(&suspects, 1, 1000), Some(1200));
        (0..60).for_each(|_| suspects.lost_while_running(&alone, at(2000)));
        assert_eq!(left(&suspects, 1, 2000), Some(24 * 3600), "no longer than a day");
    }

    #[test]
    fn a_bystander_needs_twice_as_many() {
        let dir = tempfile::tempdir().unwrap();
        let mut suspects = Suspects::open(dir.path());
        let both = BTreeSet::from([model(1), model(2)]);
        suspects.lost_while_running(&both, at(0));
        suspects.lost_while_running(&BTreeSet::from([model(1), model(3)]), at(1));
        suspects.lost_while_running(&BTreeSet::from([model(1)]), at(2));
        assert_eq!(left(&suspects, 1, 2), Some(600));
        assert_eq!((left(&suspects, 2, 2), left(&suspects, 3, 2)), (None, None));
        (3..6).for_each(|now| suspects.lost_while_running(&both, at(now)));
        assert_eq!(left(&suspects, 2, 5), Some(600));
        suspects.lost_while_running(&BTreeSet::new(), at(6));
    }

    #[test]
    fn what_runs_is_suspected_once_for_each_fault_and_not_for_damaged_weights() {
        let dir = tempfile::tempdir().unwrap();
        let mut suspects = Suspects::open(dir.path());
        let (start, later) = (Instant::now(), |seconds| Duration::from_secs(seconds));
        let counts = |suspects: &Suspects| suspects.known.get(&model(1)).map_or(0, |suspect| suspect.counts);
        suspects.begins(RequestKey(7), model(1), DeviceId(0));
        suspects.begins(RequestKey(8), model(2), DeviceId(0));
        suspects.ends(&RequestKey(8));
        suspects.device_lost(Lost::All, 0, (start, at(0)));
        suspects.device_lost(Lost::All, 0, (start + later(1), at(1)));
        assert_eq!((counts(&suspects), suspects.known.len()), (ALONE, 1), "the other device of the same fault");
        suspects.device_lost(Lost::All, 1, (start + later(60), at(60)));
        assert_eq!(counts(&suspects), ALONE, "weights were damaged");
        suspects.device_lost(Lost::All, 1, (start + later(120), at(120)));
        assert_eq!(counts(&suspects), 2 * ALONE);
        suspects.ends(&RequestKey(7));
        suspects.device_lost(Lost::All, 1, (start + later(180), at(180)));
        assert_eq!(counts(&suspects), 2 * ALONE, "nothing was running");
    }

    #[test]
    fn on_a_device_in_a_worker_only_what_runs_there_is_suspected_and_each_time() {
        let dir = tempfile::tempdir().unwrap();
        let mut suspects = Suspects::open(dir.path());
        suspects.begins(RequestKey(1), model(1), DeviceId(0));
        suspects.begins(RequestKey(2), model(2), DeviceId(1));
        let start = Instant::now();
        suspects.device_lost(Lost::One(DeviceId(1)), 0, (start, at(0)));
        suspects.device_lost(Lost::One(DeviceId(1)), 0, (start, at(2)));
        let counts = |number| suspects.known.get(&model(number)).map_or(0, |suspect| suspect.counts);
        assert_eq!([counts(1), counts(2)], [0, 2 * ALONE]);
    }

    #[test]
    fn what_is_known_outlives_the_process_and_is_forgotten_in_time() {
        let dir = tempfile::tempdir().unwrap();
        let alone = BTreeSet::from([model(1)]);
        Suspects::open(dir.path()).lost_while_running(&alone, at(0));
        let mut again = Suspects::open(dir.path());
        again.lost_while_running(&alone, at(10));
        assert_eq!(left(&Suspects::open(dir.path()), 1, 10), Some(600));
        again.lost_while_running(&BTreeSet::from([model(2)]), at(7 * 3600));
        assert_eq!(Suspects::open(dir.path()).known.len(), 1);
        fs::write(dir.path().join(FILE), "{").unwrap();
        assert_eq!(Suspects::open(dir.path()).known.len(), 0, "what cannot be read suspects nobody");
    }

    #[test]
    fn there_are_so_many_at_most_and_a_clock_that_was_set_back_keeps_none_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let mut suspects = Suspects::open(dir.path());
        for number in 0..300_u32 {
            let mut bytes = [0; 32];
            bytes[..4].copy_from_slice(&number.to_le_bytes());
            suspects.lost_while_running(&BTreeSet::from([ModelDigest(bytes)]), at(u64::from(number)));
        }
        assert_eq!(suspects.known.len(), SUSPECTS_MAX);
        (0..2).for_each(|_| suspects.lost_while_running(&BTreeSet::from([model(9)]), at(30 * 24 * 3600)));
        assert_eq!(left(&suspects, 9, 0), None);
    }
}
