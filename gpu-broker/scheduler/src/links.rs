//! The paths for weights: how fast each is alone, and what it loses while others copy.
//!
//! Nothing is known of switches and sockets: a probe at start says how fast a device is copied to alone and beside each
//! other one, and every copy that had its path for itself says it again.

use faaswap_protocol::Bytes;

use crate::{
    estimate::Estimate,
    time::{At, Span, scale},
};

/// Assumed before anything is measured.
const HOST_PRIOR_BYTES_PER_S: u64 = 10_000_000_000;
/// Slower than this is taken as this: a path that does not move is a fault, not a link.
const BYTES_PER_S_MIN: u64 = 1_000_000;
/// A path that keeps this much beside another, in thousandths, shares nothing with it.
const SHARES_BELOW: u64 = 900;

/// A path between devices that has become slower than the host's is taken for as fast as it was probed again after this long without a
/// copy: nothing is copied over it until then, and so nothing would be learned of it for good.
const PEER_TRIED_AFTER: Span = Span::secs(10);

/// A path from another device.
#[derive(Clone, Copy, Debug)]
struct Peer {
    /// By the probe; 0 where there is no path.
    probed: u64,
    speed: Estimate,
    learned: At,
}

impl Peer {
    const NONE: Self = Self { probed: 0, speed: Estimate::prior(0), learned: At::START };
}

/// One device's paths.
#[derive(Clone, Debug)]
struct Paths {
    host: Estimate,
    /// What is left of the host path while that device is copied to, in thousandths.
    beside: Vec<u64>,
    /// Devices whose copies slow this one's down.
    sharers: Vec<usize>,
    /// From that device.
    peers: Vec<Peer>,
    /// When the copies that were asked for will have ended.
    free_at: At,
}

/// When a copy would end, and why then.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Copy {
    /// Waiting for copies to the same device.
    pub(crate) queue: Span,
    /// The copy on an idle path.
    pub(crate) alone: Span,
    /// What copies to other devices add to it.
    pub(crate) contention: Span,
}

impl Copy {
    pub(crate) fn whole(self) -> Span {
        self.queue + self.alone + self.contention
    }
}

/// All paths of a node, by place of the device.
#[derive(Clone, Debug, Default)]
pub(crate) struct Links {
    to: Vec<Paths>,
}

impl Links {
    /// One more device, or a known one anew.
    pub(crate) fn add(&mut self, place: usize) {
        let count = (place + 1).max(self.to.len());
        while self.to.len() < count {
            let host = Estimate::prior(HOST_PRIOR_BYTES_PER_S);
            self.to.push(Paths {
                host,
                beside: Vec::new(),
                sharers: Vec::new(),
                peers: Vec::new(),
                free_at: At::START,
            });
        }
        for paths in &mut self.to {
            paths.beside.resize(count, 1000);
            paths.peers.resize(count, Peer::NONE);
        }
        self.to[place].free_at = At::START;
    }

    pub(crate) fn host_measured(&mut self, to: usize, bytes_per_s: u64) {
        self.to[to].host = Estimate::measured(bytes_per_s.max(BYTES_PER_S_MIN));
    }

    pub(crate) fn beside_measured(&mut self, to: usize, beside: usize, bytes_per_s: u64) {
        let alone = self.to[to].host.value();
        let paths = &mut self.to[to];
        paths.beside[beside] = scale(bytes_per_s.max(BYTES_PER_S_MIN), 1000, alone).clamp(50, 1000);
        let shares = |other: &usize| *other != to && paths.beside[*other] < SHARES_BELOW;
        paths.sharers = (0..paths.beside.len()).filter(shares).collect();
    }

    pub(crate) fn peer_measured(&mut self, from: usize, to: usize, bytes_per_s: u64) {
        if from != to {
            let speed = Estimate::measured(bytes_per_s);
            self.to[to].peers[from] = Peer { probed: bytes_per_s, speed, learned: At::START };
        }
    }

    /// Whether copies to these devices slow each other down.
    pub(crate) fn share(&self, to: usize, beside: usize) -> bool {
        to != beside && self.to[to].beside[beside] < SHARES_BELOW
    }

    /// Devices whose copies slow this one's down.
    pub(crate) fn sharers(&self, to: usize) -> &[usize] {
        &self.to[to].sharers
    }

    /// Bytes a second from one device to another, where there is a path that is faster than the host's.
    pub(crate) fn peer_speed(&self, now: At, from: usize, to: usize) -> Option<u64> {
        let (Peer { probed, speed, learned }, host) = (self.to[to].peers[from], self.to[to].host.value());
        let is_tried = speed.value() <= host && now - learned >= PEER_TRIED_AFTER;
        let speed = if is_tried { probed } else { speed.value() };
        (speed > host).then_some(speed)
    }

    pub(crate) fn free_at(&self, to: usize) -> At {
        self.to[to].free_at
    }

    /// The time for these bytes on an idle path.
    pub(crate) fn alone(&self, to: usize, weights: Bytes) -> Span {
        span(weights.get(), self.to[to].host.value())
    }

    /// A copy from host memory that is asked for now; `copying` says what is copied to from host memory at present.
    pub(crate) fn host_copy(&self, now: At, to: usize, weights: Bytes, copying: impl Fn(usize) -> bool) -> Copy {
        let paths = &self.to[to];
        let start = paths.free_at.max(now);
        let alone = span(weights.get(), paths.host.value());
        let (mut shared_until, mut loss) = (At::START, 0);
        for &other in &paths.sharers {
            if copying(other) {
                shared_until = shared_until.max(self.to[other].free_at);
                loss += 1_000_000 / paths.beside[other].max(1) - 1000;
            }
        }
        // At the shared speed until the others have ended, at full speed from then on.
        let shared = (shared_until - start).nanos().min(scale(alone.nanos(), 1000 + loss, 1000));
        let contention = Span::of_nanos(shared - scale(shared, 1000, 1000 + loss));
        Copy { queue: start - now, alone, contention }
    }

    /// A copy from a device that holds the weights.
    pub(crate) fn peer_copy(&self, now: At, from: usize, to: usize, weights: Bytes) -> Option<Copy> {
        let speed = self.peer_speed(now, from, to)?;
        Some(Copy { queue: self.to[to].free_at - now, alone: span(weights.get(), speed), contention: Span::ZERO })
    }

    /// A copy was asked for that will have ended by then.
    pub(crate) fn occupy(&mut self, to: usize, until: At) {
        self.to[to].free_at = self.to[to].free_at.max(until);
    }

    /// All copies to a device have ended.
    pub(crate) fn release(&mut self, to: usize, now: At) {
        self.to[to].free_at = self.to[to].free_at.min(now);
    }

    /// A copy from host memory that had its path for itself took so long.
    pub(crate) fn learn_host(&mut self, to: usize, weights: Bytes, took: Span) {
        if took >= Span::micros(20) {
            let speed = scale(weights.get(), 1_000_000_000, took.nanos());
            self.to[to].host.learn(speed.max(BYTES_PER_S_MIN));
        }
    }

    pub(crate) fn learn_peer(&mut self, now: At, (from, to): (usize, usize), weights: Bytes, took: Span) {
        let host = self.to[to].host.value();
        let peer = &mut self.to[to].peers[from];
        if took < Span::micros(20) || peer.probed == 0 {
            return;
        }
        let speed = scale(weights.get(), 1_000_000_000, took.nanos()).max(BYTES_PER_S_MIN);
        // It was tried again, and is as fast as ever: what was believed says nothing.
        if speed > host && peer.speed.value() <= host {
            peer.speed = Estimate::measured(speed);
        } else {
            peer.speed.learn(speed);
        }
        peer.learned = now;
    }
}

fn span(bytes: u64, bytes_per_s: u64) -> Span {
    Span::of_nanos(scale(bytes, 1_000_000_000, bytes_per_s.max(BYTES_PER_S_MIN)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> Links {
        let mut links = Links::default();
        (0..3).for_each(|place| links.add(place));
        (0..3).for_each(|place| links.host_measured(place, 10_000_000_000));
        links.beside_measured(0, 1, 5_000_000_000);
        links.beside_measured(1, 0, 5_000_000_000);
        links
    }

    #[test]
    fn a_copy_beside_another_loses_as_long_as_that_lasts() {
        let mut links = pair();
        links.occupy(1, At::START + Span::millis(4));
        let copy = links.host_copy(At::START, 0, Bytes::new(100_000_000), |other| other == 1);
        assert_eq!((copy.alone, copy.contention), (Span::millis(10), Span::millis(2)), "4 ms at half speed");
        let copy = links.host_copy(At::START, 2, Bytes::new(100_000_000), |other| other == 1);
        assert_eq!(copy.contention, Span::ZERO, "not behind the same switch");
    }

    #[test]
    fn copies_to_one_device_queue() {
        let mut links = pair();
        links.occupy(0, At::START + Span::millis(7));
        let copy = links.host_copy(At::START, 0, Bytes::new(10_000_000), |_| true);
        assert_eq!(copy.whole(), Span::millis(8), "its own link is no contention");
    }

    #[test]
    fn a_path_between_devices_that_was_slow_for_a_while_is_tried_again() {
        let (mut links, weights) = (pair(), Bytes::new(100_000_000));
        links.peer_measured(1, 0, 300_000_000_000);
        let at = |secs| At::START + Span::secs(secs);
        let is_used = |links: &Links, secs| links.peer_copy(at(secs), 1, 0, weights).is_some();
        (0..100).for_each(|_| links.learn_peer(at(1), (1, 0), weights, Span::millis(200)));
        assert!(!is_used(&links, 2) && is_used(&links, 11));
        links.learn_peer(at(11), (1, 0), weights, Span::millis(200));
        assert!(!is_used(&links, 12), "it is still slow");
        links.learn_peer(at(21), (1, 0), weights, Span::millis(1));
        assert!(is_used(&links, 22), "it is fast again");
    }

    #[test]
    fn absurd_measurements_give_finite_predictions() {
        let mut links = pair();
        links.host_measured(0, 0);
        links.beside_measured(0, 1, u64::MAX);
        links.peer_measured(1, 0, u64::MAX);
        assert!(links.alone(0, Bytes::new(u64::MAX)) > Span::secs(1));
        assert!(links.peer_copy(At::START, 1, 0, Bytes::new(1)).is_some());
        assert!(links.peer_copy(At::START, 0, 0, Bytes::new(1)).is_none());
    }
}
