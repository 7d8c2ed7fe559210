//! What ran beside each run of a trace, and how much runs slowed each other down.

use std::collections::BTreeMap;

use faaswap_scheduler::{DeviceId, ModelId, RequestKey};

use crate::{catalog::Nanos, outcome::ratio};

/// Less beside a run says more of chance than of strain.
const BESIDE_ENOUGH: f64 = 0.2;
/// A run is not taken to be slowed down by more than this by each run beside it.
const STRAIN_MAX: f64 = 2.0;

/// A device's lanes: how many are busy, lane time so far, and since when so many are.
#[derive(Default)]
struct Lanes {
    busy: u64,
    lane_time: u64,
    since: Nanos,
}

impl Lanes {
    /// Lane time up to now.
    fn tick(&mut self, now: Nanos) -> u64 {
        self.lane_time += now.saturating_sub(self.since) * self.busy;
        self.since = now;
        self.lane_time
    }
}

/// A run under way.
struct Running {
    model: ModelId,
    device: DeviceId,
    resident: bool,
    began: Nanos,
    lane_time: u64,
}

/// A run that found its weights there.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Ran {
    pub(super) took: Nanos,
    /// Runs beside it, averaged over its time.
    pub(super) beside: f64,
}

#[derive(Default)]
pub(super) struct Runs {
    lanes: BTreeMap<DeviceId, Lanes>,
    running: BTreeMap<RequestKey, Running>,
}

impl Runs {
    pub(super) fn begin(
        &mut self,
        now: Nanos,
        request: RequestKey,
        (model, device): (ModelId, DeviceId),
        resident: bool,
    ) {
        let lanes = self.lanes.entry(device).or_default();
        let lane_time = lanes.tick(now);
        lanes.busy += 1;
        self.running.insert(request, Running { model, device, resident, began: now, lane_time });
    }

    /// What ran there is not told to have ended.
    pub(super) fn lose(&mut self, device: DeviceId) {
        self.lanes.remove(&device);
        self.running.retain(|_, running| running.device != device);
    }

    /// A run has ended; which model's it was and how it went, where its weights were there.
    pub(super) fn end(&mut self, now: Nanos, request: RequestKey, took: Nanos) -> Option<(ModelId, Ran)> {
        let Running { model, device, resident, began, lane_time } = self.running.remove(&request)?;
        let lanes = self.lanes.entry(device).or_default();
        let spent = lanes.tick(now) - lane_time;
        lanes.busy = lanes.busy.saturating_sub(1);
        let beside = ratio(spent, now.saturating_sub(began)) - 1.0;
        resident.then_some((model, Ran { took, beside: beside.max(0.0) }))
    }
}

/// How much a run slows down per run beside it, by runs of models of which is known what they take alone; `None` where none had any beside it.
pub(super) fn strain<'r>(runs: impl Iterator<Item = (Nanos, &'r Ran)>) -> Option<f64> {
    let (mut slowed, mut weight) = (0.0, 0.0);
    for (alone, ran) in runs.filter(|(alone, ran)| *alone > 0 && ran.beside >= BESIDE_ENOUGH) {
        let slower = (ratio(ran.took, alone) - 1.0).clamp(-ran.beside, STRAIN_MAX * ran.beside);
        slowed += slower * ran.beside;
        weight += ran.beside * ran.beside;
    }
    (weight > 0.0).then(|| (slowed / weight).max(0.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runs_beside_is_averaged_and_its_slowdown_is_found() {
        let mut runs = Runs::default();
        let place = (ModelId(1), DeviceId(0));
        runs.begin(0, RequestKey(1), place, true);
        runs.begin(500, RequestKey(2), place, true);
        let (_, first) = runs.end(1_000, RequestKey(1), 1_000).expect("it ran");
        assert_eq!(first, Ran { took: 1_000, beside: 0.5 });
        runs.begin(1_000, RequestKey(3), (ModelId(1), DeviceId(1)), true);
        runs.lose(DeviceId(1));
        assert_eq!(runs.end(1_400, RequestKey(3), 400), None, "it went with its device");
        let (_, second) = runs.end(1_500, RequestKey(2), 1_000).expect("it ran");
        // Half a run beside each, and a quarter longer than alone.
        let found = strain([(800, &first), (800, &second)].into_iter()).expect("there was something beside them");
        assert!((found - 0.5).abs() < 1e-9, "{found}");
        assert_eq!(strain([(800, &Ran { took: 900, beside: 0.0 })].into_iter()), None);
    }
}
