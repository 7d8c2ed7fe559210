//! What the scheduler is told of the machine: links as measured, GPUs as observed, models as tried; and what it says of its
//! own decisions.

use std::time::Duration;

use faaswap_device::{
    links::Rate,
    nvml::{Observation, Throttle},
};
use faaswap_protocol::Bytes;
use faaswap_scheduler::{Choice, Decision, DeviceId, Event, Link, ModelId, Score, Source};
use serde::Serialize;

use super::{Core, device_id};
use crate::{config::DeviceKind, gpus::Gpus};

/// A whole, in thousandths.
const WHOLE: u16 = 1000;

impl Core {
    /// Tells how fast links are: those that were measured, and those whose speed is configured.
    pub(crate) fn tell_links(&mut self, gpus: &Gpus) {
        let map = gpus.links();
        let place = |of: &Self, gpu: usize| {
            let at = map.gpus.get(gpu)?;
            of.devices.iter().position(|entry| entry.device.pci_address() == Some(*at)).map(device_id)
        };
        let mut links = Vec::new();
        for a in 0..map.gpus.len() {
            let Some(to) = place(self, a) else { continue };
            links.push((Link::Host { to }, map.alone[a]));
            for b in (0..map.gpus.len()).filter(|b| *b != a) {
                let Some(other) = place(self, b) else { continue };
                links.push((Link::HostBeside { to, beside: other }, map.together[a][b]));
                let direct = map.peers[b][a].filter(|peer| peer.direct);
                links.push((Link::Peer { from: other, to }, direct.map(|peer| peer.rate)));
            }
        }
        let measured = links.into_iter().filter_map(|(link, rate)| Some((link, rate.and_then(whole)?)));
        let configured = self.settings.devices.iter().enumerate().filter_map(|(index, settings)| match settings.kind {
            DeviceKind::Host { link_mib_per_s } => {
                Some((Link::Host { to: device_id(index) }, link_mib_per_s?.saturating_mul(1 << 20)))
            }
            DeviceKind::Gpu { .. } => None,
        });
        let links: Vec<_> = measured.chain(configured).collect();
        for (link, bytes_per_s) in links {
            self.happen(Event::LinkMeasured { link, bytes_per_s });
        }
    }

    /// Tells what is known of a model on a device before it has ever run there.
    pub(super) fn tell_model(&mut self, model: ModelId, device: DeviceId) {
        let Some((bound, _)) = self.bound(model, device) else { return };
        let manifest = bound.bound.manifest();
        let run = manifest.trial_run_us.map_or(Duration::ZERO, Duration::from_micros);
        self.happen(Event::ModelMeasured { model, device, weights: manifest.weights_bytes, run });
    }

    /// Tells what the driver says of the GPUs.
    pub(super) fn tell_observations(&mut self) {
        let seen: Vec<_> =
            self.telemetry.gpus().seen().into_iter().map(|(name, seen)| (name.map(str::to_owned), seen)).collect();
        for (name, seen) in seen {
            let is_it = |entry: &super::DeviceEntry| Some(&entry.device.info().name) == name.as_ref();
            if let Some(index) = self.devices.iter().position(is_it) {
                let event = observed(device_id(index), &seen, self.is_busy());
                self.happen(event);
            }
        }
    }

    /// The last decisions, oldest first.
    pub(super) fn decisions(&self) -> Vec<DecisionReport> {
        self.scheduler.decisions().map(|decision| self.decision(decision)).collect()
    }

    fn decision(&self, decision: &Decision) -> DecisionReport {
        let device = |id: DeviceId| self.devices.get(usize::from(id.0)).map(|entry| entry.device.info().name.clone());
        let function = decision.function.and_then(|key| self.functions.get(&key));
        DecisionReport {
            at_ms: ms(decision.at.0),
            choice: match decision.choice {
                Choice::Run { .. } => "run",
                Choice::Bring => "bring",
                Choice::BringAhead => "bring_ahead",
                Choice::Refuse => "refuse",
            },
            requests: match decision.choice {
                Choice::Run { size } => size,
                Choice::Bring | Choice::BringAhead | Choice::Refuse => 1,
            },
            function: function.map(|function| function.spec.name.to_string()),
            model: self.models.get(&decision.model).map(|model| model.variant.digest.to_string()),
            device: decision.device.and_then(device),
            from: match decision.source {
                None => None,
                Some(Source::Host) => Some("host".to_owned()),
                Some(Source::Peer(peer)) => device(peer),
            },
            left_ms: ms(decision.left),
            compared: decision.compared,
            score: ScoreReport::of(&decision.score),
        }
    }
}

/// A GPU's clock and foreign load. How busy it is tells of others only while we run nothing.
fn observed(device: DeviceId, seen: &Observation, we_are_busy: bool) -> Event {
    let others = seen.foreign.as_ref().is_some_and(|foreign| foreign.processes > 0 && foreign.found_ours);
    let busy = seen.busy.map_or(0, |busy| busy.gpu_percent.min(100));
    let foreign_permille = if others && !we_are_busy { u16::try_from(busy * 10).unwrap_or(WHOLE) } else { 0 };
    let slowed = |why: Throttle| !matches!(why, Throttle::Idle | Throttle::DisplayClock);
    let is_slowed = seen.throttled.is_some_and(|why| why.iter().any(slowed));
    let clock = seen.sm_clock_mhz.filter(|clock| is_slowed && clock.max > 0);
    let clock_permille = clock.map_or(WHOLE, |clock| {
        u16::try_from(u64::from(clock.now) * u64::from(WHOLE) / u64::from(clock.max)).unwrap_or(WHOLE).clamp(1, WHOLE)
    });
    let foreign = seen.foreign.as_ref().filter(|_| others).and_then(|foreign| foreign.bytes).unwrap_or(Bytes::ZERO);
    Event::DeviceObserved { device, foreign_permille, clock_permille, foreign }
}

/// A rate in whole bytes a second; `None` where it is none.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to be a positive number before")]
fn whole(Rate(rate): Rate) -> Option<u64> {
    (rate.is_finite() && rate >= 1.0).then_some(rate as u64)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// A decision of the scheduler, with the parts of its prediction in milliseconds.
#[derive(Debug, Serialize)]
pub(crate) struct DecisionReport {
    at_ms: f64,
    choice: &'static str,
    /// How many requests the run answers.
    requests: usize,
    function: Option<String>,
    model: Option<String>,
    device: Option<String>,
    /// Where weights come from; null where they are there.
    from: Option<String>,
    left_ms: f64,
    compared: u16,
    score: ScoreReport,
}

/// The interference score.
#[derive(Debug, Serialize)]
struct ScoreReport {
    lane_wait_ms: f64,
    copy_queue_ms: f64,
    copy_ms: f64,
    copy_contention_ms: f64,
    run_ms: f64,
    corun_ms: f64,
    throttle_ms: f64,
    tail_ms: f64,
    total_ms: f64,
    price_ms: f64,
}

impl ScoreReport {
    fn of(score: &Score) -> Self {
        Self {
            lane_wait_ms: ms(score.lane_wait),
            copy_queue_ms: ms(score.copy_queue),
            copy_ms: ms(score.copy),
            copy_contention_ms: ms(score.copy_contention),
            run_ms: ms(score.run),
            corun_ms: ms(score.corun),
            throttle_ms: ms(score.throttle),
            tail_ms: ms(score.tail),
            total_ms: ms(score.total),
            price_ms: ms(score.price),
        }
    }
}
