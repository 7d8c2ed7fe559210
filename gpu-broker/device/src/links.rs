//! How fast the links of several GPUs are, alone and together: plain figures, and what follows from them.
//!
//! Measured by [`measure`], once, at the start. What is not measured (no time was left, or the copy failed) is absent.

use std::sync::Arc;

use crate::{Device, DeviceError, PciAddress, cuda};

/// Two links contend where one of them, used together with the other, keeps less than this share of its speed. Links
/// that end at different host bridges keep 0.85 and more, for host memory is shared; those behind one switch about half.
pub const CONTENDS_BELOW: f64 = 0.8;

/// Measures the links of those devices that have one, in less than a second. Call it before anything is swapped.
pub fn measure(devices: &[Arc<dyn Device>]) -> Result<LinkMap, DeviceError> {
    let gpus = devices.iter().filter_map(|device| device.as_cuda());
    let ordinals: Vec<u32> = gpus.filter_map(|gpu| u32::try_from(gpu.ordinal()).ok()).collect();
    if ordinals.is_empty() {
        return Ok(LinkMap::default());
    }
    cuda::measure_links(&ordinals)
}

/// Bytes per second.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Rate(pub f64);

/// Copies from one GPU to another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PeerLink {
    /// Speed.
    pub rate: Rate,
    /// Whether one GPU reaches the other's memory by itself; else the copy goes through host memory.
    pub direct: bool,
}

/// The links of some GPUs; all tables are in the order of `gpus`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LinkMap {
    /// Which GPUs.
    pub gpus: Vec<PciAddress>,
    /// From host memory, nothing else running.
    pub alone: Vec<Option<Rate>>,
    /// `together[a][b]`: what `a` gets from host memory while `b` copies too.
    pub together: Vec<Vec<Option<Rate>>>,
    /// From host memory while all others copy too; measured where there are more than two.
    pub crowded: Vec<Option<Rate>>,
    /// `peers[from][to]`.
    pub peers: Vec<Vec<Option<PeerLink>>>,
}

impl LinkMap {
    /// A map of which nothing is measured.
    pub fn blank(gpus: Vec<PciAddress>) -> Self {
        let n = gpus.len();
        let (alone, crowded) = (vec![None; n], vec![None; n]);
        Self { gpus, alone, together: vec![vec![None; n]; n], crowded, peers: vec![vec![None; n]; n] }
    }

    /// The share of its speed that link `a` keeps while `b` is used.
    pub fn kept(&self, a: usize, b: usize) -> Option<f64> {
        let Rate(alone) = (*self.alone.get(a)?)?;
        let Rate(together) = (*self.together.get(a)?.get(b)?)?;
        (alone > 0.0).then_some(together / alone)
    }

    /// Whether the host links of two GPUs are in each other's way.
    pub fn contend(&self, a: usize, b: usize) -> Option<bool> {
        match (self.kept(a, b), self.kept(b, a)) {
            (Some(one), Some(other)) => Some(one.min(other) < CONTENDS_BELOW),
            (Some(one), None) | (None, Some(one)) => (one < CONTENDS_BELOW).then_some(true),
            (None, None) => None,
        }
    }

    /// GPUs whose host links are in each other's way, directly or through a third; each GPU is in one group. Links of
    /// which nothing is known are taken to be apart.
    pub fn groups(&self) -> Vec<Vec<usize>> {
        let mut group: Vec<usize> = (0..self.gpus.len()).collect();
        for a in 0..group.len() {
            for b in a + 1..group.len() {
                if self.contend(a, b) == Some(true) {
                    let (keep, merge) = (group[a].min(group[b]), group[a].max(group[b]));
                    group.iter_mut().filter(|of| **of == merge).for_each(|of| *of = keep);
                }
            }
        }
        let members = |first: usize| (0..group.len()).filter(|gpu| group[*gpu] == first).collect::<Vec<_>>();
        (0..group.len()).map(members).filter(|members| !members.is_empty()).collect()
    }
}

#[cfg(test)]
mod tests {
    use faaswap_protocol::Bytes;

    use super::*;
    use crate::host::{HostConfig, HostDevice};

    fn map(n: u32) -> LinkMap {
        let mut map = LinkMap::blank((0..n).map(|bus| PciAddress { domain: 0, bus, device: 0 }).collect());
        map.alone.fill(Some(Rate(50e9)));
        map
    }

    fn together(map: &mut LinkMap, a: usize, b: usize, rates: [f64; 2]) {
        map.together[a][b] = Some(Rate(rates[0]));
        map.together[b][a] = Some(Rate(rates[1]));
    }

    #[test]
    fn links_behind_one_switch_contend_and_links_of_two_bridges_do_not() {
        let mut map = map(2);
        together(&mut map, 0, 1, [46.8e9, 46.8e9]);
        assert_eq!(map.contend(0, 1), Some(false));
        assert_eq!(map.groups(), [vec![0], vec![1]]);
        together(&mut map, 0, 1, [49e9, 26e9]);
        assert_eq!(map.contend(0, 1), Some(true), "it is enough that one of them suffers");
        assert_eq!(map.contend(1, 0), Some(true));
        assert_eq!(map.groups(), [vec![0, 1]]);
    }

    #[test]
    fn groups_are_closed_over_what_contends() {
        let mut map = map(5);
        for (a, b) in [(0, 3), (3, 4)] {
            together(&mut map, a, b, [25e9, 25e9]);
        }
        together(&mut map, 0, 4, [45e9, 45e9]);
        assert_eq!(map.groups(), [vec![0, 3, 4], vec![1], vec![2]]);
    }

    #[test]
    fn a_host_device_has_no_link_to_measure() {
        let device = HostDevice::new(HostConfig::new("host0", Bytes::mib(2))).expect("memory is there");
        assert_eq!(measure(&[device]), Ok(LinkMap::default()));
    }

    #[test]
    fn what_was_not_measured_is_not_guessed() {
        let mut map = map(3);
        assert_eq!(map.contend(0, 1), None);
        map.together[0][1] = Some(Rate(45e9));
        assert_eq!(map.contend(0, 1), None, "the other side may suffer");
        map.together[0][1] = Some(Rate(20e9));
        assert_eq!(map.contend(0, 1), Some(true), "whatever the other side does");
        map.alone[0] = None;
        assert_eq!(map.kept(0, 1), None);
        assert_eq!(map.contend(0, 7), None, "no such link");
        assert_eq!(LinkMap::default().groups(), Vec::<Vec<usize>>::new());
    }
}
