//! The machine's GPUs beside the broker's devices: which device is which GPU, and what operators are shown of it.
//!
//! What is seen comes from `device`'s watch. A machine without NVML has none of it, and a host device is no GPU.

use std::sync::Arc;

use faaswap_device::{
    Device, PciAddress,
    links::LinkMap,
    nvml::{Observation, Pair, Watch},
};
use serde::Serialize;

use crate::{core::DeviceReport, limits::GPUS_LOOKED_AT_EVERY};

/// The GPUs, and the names of the devices that they are.
#[derive(Debug, Default)]
pub(crate) struct Gpus {
    watch: Option<Watch>,
    names: Vec<(PciAddress, String)>,
    links: LinkMap,
}

impl Gpus {
    /// Watches the GPUs of the machine, if NVML is there.
    pub(crate) fn watch(devices: &[Arc<dyn Device>], links: LinkMap) -> Self {
        let name = |device: &Arc<dyn Device>| Some((device.pci_address()?, device.info().name.clone()));
        for (gpu, rate) in links.gpus.iter().zip(&links.alone) {
            let gb_per_s = rate.map(|rate| rate.0 / 1e9);
            tracing::info!(%gpu, gb_per_s, contending = ?links.groups(), "link from host memory");
        }
        let names = devices.iter().filter_map(name).collect();
        Self { watch: Watch::start(GPUS_LOOKED_AT_EVERY), names, links }
    }

    /// Each GPU as it was seen last, with the name of our device on it.
    pub(crate) fn seen(&self) -> Vec<(Option<&str>, Observation)> {
        let latest = self.watch.as_ref().map(Watch::latest).unwrap_or_default();
        latest.iter().map(|seen| (self.name(seen.pci), seen.clone())).collect()
    }

    /// What was measured of the links.
    pub(crate) fn links(&self) -> &LinkMap {
        &self.links
    }

    fn name(&self, pci: PciAddress) -> Option<&str> {
        self.names.iter().find(|(at, _)| *at == pci).map(|(_, name)| name.as_str())
    }

    /// Puts what is seen of its GPU beside each device.
    pub(crate) fn beside(&self, devices: Vec<DeviceReport>) -> Vec<WithGpu> {
        let seen = self.seen();
        let pairs = self.watch.as_ref().map(Watch::pairs).unwrap_or_default();
        let with_gpu = |device: DeviceReport| {
            let seen = seen.iter().find(|(name, _)| *name == Some(device.name.as_str()));
            let gpu = seen.map(|(_, seen)| GpuReport::new(seen, pairs, |pci| self.name(pci)));
            let at = self.names.iter().find(|(_, name)| *name == device.name).map(|(pci, _)| *pci);
            let link = at.and_then(|pci| HostLinkReport::new(pci, &self.links, |pci| self.name(pci)));
            WithGpu { device, gpu, link }
        };
        devices.into_iter().map(with_gpu).collect()
    }
}

/// A device, and its GPU where it is one.
#[derive(Debug, Serialize)]
pub(crate) struct WithGpu {
    #[serde(flatten)]
    device: DeviceReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu: Option<GpuReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    link: Option<HostLinkReport>,
}

/// What was measured of a GPU's link at the start, in bytes per second.
#[derive(Debug, Serialize)]
struct HostLinkReport {
    from_host: Option<f64>,
    /// While all other GPUs are copied to; measured where there are more than two.
    from_host_with_all: Option<f64>,
    beside: Vec<BesideReport>,
}

/// The same with another GPU in play.
#[derive(Debug, Serialize)]
struct BesideReport {
    /// The other GPU, and the name of our device on it.
    gpu: String,
    device: Option<String>,
    /// From host memory while the other copies too.
    from_host: Option<f64>,
    contends: Option<bool>,
    /// From the other GPU.
    from_gpu: Option<f64>,
    from_gpu_direct: Option<bool>,
}

impl HostLinkReport {
    fn new<'n>(pci: PciAddress, links: &LinkMap, name: impl Fn(PciAddress) -> Option<&'n str>) -> Option<Self> {
        let here = links.gpus.iter().position(|gpu| *gpu == pci)?;
        let beside = |there: usize| {
            let peer = links.peers[there][here];
            BesideReport {
                gpu: links.gpus[there].to_string(),
                device: name(links.gpus[there]).map(str::to_owned),
                from_host: links.together[here][there].map(|rate| rate.0),
                contends: links.contend(here, there),
                from_gpu: peer.map(|peer| peer.rate.0),
                from_gpu_direct: peer.map(|peer| peer.direct),
            }
        };
        let others = (0..links.gpus.len()).filter(|there| *there != here);
        let with_all = links.crowded[here].map(|rate| rate.0);
        Some(Self {
            from_host: links.alone[here].map(|rate| rate.0),
            from_host_with_all: with_all,
            beside: others.map(beside).collect(),
        })
    }
}

/// A GPU. What the driver does not tell is null.
#[derive(Debug, Serialize)]
struct GpuReport {
    pci: String,
    uuid: Option<String>,
    lost: bool,
    memory_used_bytes: Option<u64>,
    memory_free_bytes: Option<u64>,
    busy_percent: Option<u32>,
    memory_busy_percent: Option<u32>,
    pcie_sent_bytes_per_second: Option<u64>,
    pcie_received_bytes_per_second: Option<u64>,
    /// Now and at most, as in all pairs of numbers here.
    pcie_generation: Option<[u32; 2]>,
    pcie_width: Option<[u32; 2]>,
    sm_clock_mhz: Option<[u32; 2]>,
    memory_clock_mhz: Option<[u32; 2]>,
    throttled: Option<Vec<&'static str>>,
    ecc_uncorrected: Option<u64>,
    xids: Option<u64>,
    xid_last: Option<u64>,
    foreign_processes: Option<usize>,
    foreign_bytes: Option<u64>,
    /// Whether the driver's numbers of processes are ours too; where not, our own count as foreign.
    foreign_is_exact: Option<bool>,
    temperature_celsius: Option<u32>,
    power_watts: Option<f64>,
    links: Vec<LinkReport>,
}

/// How a GPU is connected to another one.
#[derive(Debug, Serialize)]
struct LinkReport {
    /// The other GPU, and the name of our device on it.
    to: String,
    device: Option<String>,
    ancestor: Option<&'static str>,
    nvlinks: u32,
    peer_read: bool,
    peer_write: bool,
}

impl GpuReport {
    fn new<'n>(seen: &Observation, pairs: &[Pair], name: impl Fn(PciAddress) -> Option<&'n str>) -> Self {
        let level = |level: faaswap_device::nvml::Level| [level.now, level.max];
        let links = pairs.iter().filter_map(|pair| LinkReport::new(seen.pci, pair, &name));
        Self {
            pci: seen.pci.to_string(),
            uuid: seen.uuid.clone(),
            lost: seen.lost,
            memory_used_bytes: seen.memory.map(|memory| memory.used.get()),
            memory_free_bytes: seen.memory.map(|memory| memory.free.get()),
            busy_percent: seen.busy.map(|busy| busy.gpu_percent),
            memory_busy_percent: seen.busy.map(|busy| busy.memory_percent),
            pcie_sent_bytes_per_second: seen.pcie.sent_per_second.map(faaswap_protocol::Bytes::get),
            pcie_received_bytes_per_second: seen.pcie.received_per_second.map(faaswap_protocol::Bytes::get),
            pcie_generation: seen.pcie.generation.map(level),
            pcie_width: seen.pcie.width.map(level),
            sm_clock_mhz: seen.sm_clock_mhz.map(level),
            memory_clock_mhz: seen.memory_clock_mhz.map(level),
            throttled: seen.throttled.map(|why| why.iter().map(|reason| reason.code()).collect()),
            ecc_uncorrected: seen.ecc_uncorrected,
            xids: seen.xids.map(|xids| xids.count),
            xid_last: seen.xids.and_then(|xids| xids.last),
            foreign_processes: seen.foreign.map(|foreign| foreign.processes),
            foreign_bytes: seen.foreign.and_then(|foreign| foreign.bytes).map(faaswap_protocol::Bytes::get),
            foreign_is_exact: seen.foreign.map(|foreign| foreign.found_ours),
            temperature_celsius: seen.temperature_celsius,
            power_watts: seen.power_milliwatts.map(|milliwatts| f64::from(milliwatts) / 1e3),
            links: links.collect(),
        }
    }
}

impl LinkReport {
    /// The link from one side, if the pair has it.
    fn new<'n>(from: PciAddress, pair: &Pair, name: impl Fn(PciAddress) -> Option<&'n str>) -> Option<Self> {
        let to = match from {
            at if at == pair.a => pair.b,
            at if at == pair.b => pair.a,
            _ => return None,
        };
        Some(Self {
            to: to.to_string(),
            device: name(to).map(str::to_owned),
            ancestor: pair.ancestor.map(faaswap_device::nvml::Ancestor::code),
            nvlinks: pair.nvlinks,
            peer_read: pair.peer_read,
            peer_write: pair.peer_write,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use faaswap_device::{
        links::{PeerLink, Rate},
        nvml::{Ancestor, Foreign, Level, Throttles},
    };
    use serde_json::json;

    use super::*;

    fn at(bus: u32) -> PciAddress {
        PciAddress { domain: 0, bus, device: 0 }
    }

    #[test]
    fn a_link_shows_what_was_measured_from_its_own_side() {
        let mut links = LinkMap::blank(vec![at(1), at(3)]);
        (links.alone[0], links.alone[1]) = (Some(Rate(50.0)), Some(Rate(52.0)));
        links.crowded[0] = Some(Rate(20.0));
        (links.together[0][1], links.together[1][0]) = (Some(Rate(26.0)), Some(Rate(27.0)));
        links.peers[1][0] = Some(PeerLink { rate: Rate(400.0), direct: true });
        let name = |pci: PciAddress| (pci == at(3)).then_some("cuda1");
        let report = serde_json::to_value(HostLinkReport::new(at(1), &links, name)).unwrap();
        let beside = json!({"gpu": "0000:03:00.0", "device": "cuda1", "from_host": 26.0, "contends": true,
                            "from_gpu": 400.0, "from_gpu_direct": true});
        assert_eq!(report, json!({"from_host": 50.0, "from_host_with_all": 20.0, "beside": [beside]}));
        assert!(HostLinkReport::new(at(2), &links, name).is_none(), "it was not measured");
    }

    #[test]
    fn a_gpu_shows_what_is_known_and_null_for_the_rest() {
        let seen = Observation {
            sm_clock_mhz: Some(Level { now: 345, max: 1980 }),
            throttled: Some(Throttles::of_bits(0x5)),
            foreign: Some(Foreign { processes: 2, bytes: None, found_ours: true }),
            power_milliwatts: Some(71_250),
            ..Observation::blank(at(1))
        };
        let pair = |a, b| Pair {
            a: at(a),
            b: at(b),
            ancestor: Some(Ancestor::NumaNode),
            nvlinks: 18,
            peer_read: true,
            peer_write: false,
        };
        let name = |pci: PciAddress| (pci == at(3)).then_some("cuda1");
        let report = serde_json::to_value(GpuReport::new(&seen, &[pair(1, 3), pair(3, 4)], name)).unwrap();
        assert_eq!(report["pci"], "0000:01:00.0");
        assert_eq!(report["sm_clock_mhz"], json!([345, 1980]));
        assert_eq!(report["throttled"], json!(["idle", "power_cap"]));
        assert_eq!((&report["foreign_processes"], &report["foreign_bytes"]), (&json!(2), &json!(null)));
        assert_eq!(report["power_watts"], 71.25);
        assert_eq!(report["memory_used_bytes"], json!(null));
        let link = json!({"to": "0000:03:00.0", "device": "cuda1", "ancestor": "numa_node", "nvlinks": 18,
                          "peer_read": true, "peer_write": false});
        assert_eq!(report["links"], json!([link]), "the pair of two others is not its link");
    }
}
