//! Copies in the simulation: one at a time per device, sharing the paths behind them fairly.

use std::{collections::VecDeque, time::Duration};

use faaswap_scheduler::{Event, ModelId, Source};

use super::{Happening, World, device_id};
use crate::catalog::{Nanos, NodeSpec};

/// What is left of a copy when it counts as ended, in bytes.
const NOTHING: f64 = 0.5;

#[derive(Clone, Copy, Debug)]
struct Copy {
    model: ModelId,
    source: Source,
    left: f64,
    started: Option<Nanos>,
    /// It stands still until then, and fails.
    stuck_until: Option<Nanos>,
}

#[derive(Clone, Debug, Default)]
struct Device {
    link: f64,
    /// Seconds that a copy takes beyond its bytes.
    per_swap: f64,
    copies: VecDeque<Copy>,
    rate: f64,
    version: u64,
}

/// All links of a node.
#[derive(Clone, Debug)]
pub(super) struct Links {
    devices: Vec<Device>,
    shared: Vec<(Vec<usize>, f64)>,
    peers: Vec<Vec<f64>>,
    since: Nanos,
}

impl Links {
    #[expect(clippy::cast_precision_loss, reason = "speeds are below 2^53")]
    pub(super) fn new(node: &NodeSpec) -> Self {
        let count = node.devices.len();
        let device = |spec: &crate::catalog::DeviceSpec| Device {
            link: spec.link as f64,
            per_swap: spec.per_swap as f64 / 1e9,
            ..Device::default()
        };
        let mut peers = vec![vec![0.0; count]; count];
        for &(from, to, speed) in &node.peers {
            peers[from][to] = speed as f64;
        }
        let shared = node.shared.iter().map(|(devices, total)| (devices.clone(), *total as f64)).collect();
        Self { devices: node.devices.iter().map(device).collect(), shared, peers, since: 0 }
    }

    fn first(&self, device: usize) -> Option<&Copy> {
        self.devices[device].copies.front()
    }

    /// Moves all copies to the present; gives the bytes that came from the host, by device.
    #[expect(clippy::cast_precision_loss, reason = "spans are below 2^53")]
    fn advance(&mut self, now: Nanos) {
        let seconds = (now - self.since) as f64 / 1e9;
        self.since = now;
        for device in &mut self.devices {
            let rate = device.rate;
            if let Some(copy) = device.copies.front_mut() {
                copy.left = (copy.left - rate * seconds).max(0.0);
            }
        }
    }

    fn set_rates(&mut self, now: Nanos) {
        for device in 0..self.devices.len() {
            let rate = match self.first(device) {
                None => 0.0,
                Some(copy) if copy.stuck_until.is_some() => 0.0,
                Some(Copy { source: Source::Peer(from), .. }) => self.peers[usize::from(from.0)][device],
                Some(Copy { source: Source::Host, .. }) => self.host_rate(device),
            };
            let device = &mut self.devices[device];
            device.rate = rate;
            if let Some(copy) = device.copies.front_mut() {
                copy.started.get_or_insert(now);
            }
        }
    }

    fn host_rate(&self, device: usize) -> f64 {
        let active = |other: &&usize| {
            self.first(**other).is_some_and(|copy| copy.source == Source::Host && copy.stuck_until.is_none())
        };
        let mut rate = self.devices[device].link;
        for (members, total) in self.shared.iter().filter(|(members, _)| members.contains(&device)) {
            let count = u32::try_from(members.iter().filter(active).count()).unwrap_or(1).max(1);
            rate = rate.min(total / f64::from(count));
        }
        rate
    }

    /// What a copy takes beyond its bytes, as bytes of the link that it comes over.
    fn beyond(&self, device: usize, source: Source) -> f64 {
        let to = &self.devices[device];
        to.per_swap
            * match source {
                Source::Host => to.link,
                Source::Peer(from) => self.peers[usize::from(from.0)][device],
            }
    }

    pub(super) fn lose(&mut self, now: Nanos, device: usize) {
        self.advance(now);
        self.devices[device].copies.clear();
    }

    #[expect(clippy::cast_precision_loss, reason = "thousandths")]
    pub(super) fn slow(&mut self, now: Nanos, device: usize, permille: u64) {
        self.advance(now);
        self.devices[device].link *= permille as f64 / 1000.0;
    }

    pub(super) fn stick(&mut self, now: Nanos, device: usize, until: Nanos) {
        self.advance(now);
        if let Some(copy) = self.devices[device].copies.front_mut() {
            copy.stuck_until = Some(until);
        }
    }

    /// Whether a model's weights are still coming.
    pub(super) fn is_coming(&self, device: usize, model: ModelId) -> bool {
        self.devices[device].copies.iter().any(|copy| copy.model == model)
    }
}

impl World<'_> {
    #[expect(clippy::cast_precision_loss, reason = "weights are below 2^53 bytes")]
    pub(super) fn begin_copy(&mut self, model: ModelId, device: usize, source: Source) {
        let spec = self.model(model);
        let (bytes, work) = (spec.weights.get() as f64, &mut self.outcome.devices[device]);
        match source {
            Source::Host => {
                work.swaps.0 += 1;
                work.copied += bytes;
            }
            Source::Peer(_) => work.swaps.1 += 1,
        }
        self.links.advance(self.now);
        let left = bytes + self.links.beyond(device, source);
        let copy = Copy { model, source, left, started: None, stuck_until: None };
        self.links.devices[device].copies.push_back(copy);
        self.reschedule_copies();
    }

    /// Enters the end of every copy anew: rates may have changed.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small positive times")]
    pub(super) fn reschedule_copies(&mut self) {
        self.links.advance(self.now);
        self.links.set_rates(self.now);
        for device in 0..self.links.devices.len() {
            let on = &mut self.links.devices[device];
            on.version += 1;
            let version = on.version;
            let Some(copy) = on.copies.front() else { continue };
            let at = match copy.stuck_until {
                Some(until) => until.max(self.now),
                None => self.now + (copy.left / on.rate.max(1.0) * 1e9).ceil() as Nanos,
            };
            self.enter(at, Happening::CopyEnds { device, version });
        }
    }

    pub(super) fn copy_ends(&mut self, device: usize, version: u64) {
        if self.links.devices[device].version != version {
            return;
        }
        self.links.advance(self.now);
        let Some(copy) = self.links.first(device).copied() else { return };
        if copy.stuck_until.is_none() && copy.left > NOTHING {
            return self.reschedule_copies();
        }
        self.links.devices[device].copies.pop_front();
        self.reschedule_copies();
        let (model, device_id) = (copy.model, device_id(device));
        if copy.stuck_until.is_some() {
            self.tell(Event::SwapInFailed { model, device: device_id });
            self.weights_failed(device, model);
            return;
        }
        let took = Duration::from_nanos(self.now - copy.started.unwrap_or(self.now));
        self.tell(Event::SwapInDone { model, device: device_id, took });
        self.weights_came(device, model);
    }
}
