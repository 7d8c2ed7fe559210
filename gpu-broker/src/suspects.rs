//! Models that were running when devices were lost.
//!
//! A kernel that fails takes all GPUs of its process with it, and nobody says whose it was. What is known are the models that were
//! running. One that was so again and again is refused for a while, twice as long each time, so that it cannot keep a node from
//! serving all others; a bystander, who is in company each time, gets there half as fast. It is kept in a file, for the process
//! is replaced after a fault.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use faaswap_protocol::ModelDigest;
use serde::{Deserialize, Serialize};

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

    fn is_forgotten(self, now: u64) -> bool {
        let until = self.last.saturating_add(FORGOTTEN_AFTER.as_secs()).max(self.refused_until().unwrap_or(0));
        // A clock that was set back must not keep it for ever.
        now > until || self.last > now.saturating_add(REFUSED_FOR_MAX.as_secs())
    }
}

/// All suspects of the node.
#[derive(Debug)]
pub(crate) struct Suspects {
    path: PathBuf,
    known: BTreeMap<String, Suspect>,
}

impl Suspects {
    /// Reads what is known from the store.
    pub(crate) fn open(store: &Path) -> Self {
        let path = store.join(FILE);
        let known = match fs::read(&path).map(|bytes| serde_json::from_slice(&bytes)) {
            Ok(Ok(known)) => known,
            Ok(Err(error)) => {
                tracing::warn!(%error, path = %path.display(), "cannot be read: no model is suspected");
                BTreeMap::new()
            }
            Err(_) => BTreeMap::new(),
        };
        Self { path, known }
    }

    /// A device was lost while these were running.
    pub(crate) fn lost_while_running(&mut self, models: &BTreeSet<ModelDigest>, now: SystemTime) {
        let now = seconds(now);
        self.known.retain(|_, suspect| !suspect.is_forgotten(now));
        let more = if models.len() == 1 { ALONE } else { IN_COMPANY };
        for model in models {
            let suspect = self.known.entry(model.to_string()).or_insert(Suspect { counts: 0, last: now });
            *suspect = Suspect { counts: suspect.counts.saturating_add(more), last: now };
            let until = suspect.refused_until();
            let refused_for = until.map(|until| Duration::from_secs(until.saturating_sub(now)));
            tracing::error!(?model, counts = suspect.counts, ?refused_for, "was running when a device was lost");
        }
        while self.known.len() > SUSPECTS_MAX {
            let oldest = self.known.iter().min_by_key(|(_, suspect)| suspect.last).map(|(model, _)| model.clone());
            oldest.map(|model| self.known.remove(&model));
        }
        if let Err(error) = self.write() {
            tracing::warn!(%error, path = %self.path.display(), "suspects are forgotten when the broker ends");
        }
    }

    /// For how long the model is not run from now on, if that is so.
    pub(crate) fn suspended_for(&self, model: &ModelDigest, now: SystemTime) -> Option<Duration> {
        if self.known.is_empty() {
            return None;
        }
        let (suspect, now) = (self.known.get(&model.to_string())?, seconds(now));
        let left = suspect.refused_until().filter(|_| !suspect.is_forgotten(now))?.checked_sub(now)?;
        (left > 0).then(|| Duration::from_secs(left))
    }

    fn write(&self) -> std::io::Result<()> {
        let draft = self.path.with_extension("draft");
        fs::write(&draft, serde_json::to_vec_pretty(&self.known)?)?;
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
        suspects.suspended_for(&model(number), at(now)).map(|left| left.as_secs())
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
