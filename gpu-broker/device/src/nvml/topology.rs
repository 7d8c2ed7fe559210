//! How GPUs are connected to each other, as NVML tells it: a first guess, before links are measured.

use nvml_wrapper::{
    Device, Nvml,
    enum_wrappers::device::{P2pCapabilitiesIndex, P2pStatus, TopologyLevel},
};

use crate::PciAddress;

/// Most NVLink links of one GPU (`NVML_NVLINK_MAX_LINKS`).
const NVLINKS_MAX: u32 = 18;

/// What two GPUs meet at, from near to far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ancestor {
    /// Two GPUs of one board.
    Board,
    /// One PCIe switch.
    Switch,
    /// Several PCIe switches, no host bridge.
    Switches,
    /// A PCIe host bridge.
    HostBridge,
    /// One NUMA node.
    NumaNode,
    /// The link between NUMA nodes.
    System,
}

impl Ancestor {
    /// For lists.
    pub const fn code(self) -> &'static str {
        match self {
            Self::Board => "board",
            Self::Switch => "switch",
            Self::Switches => "switches",
            Self::HostBridge => "host_bridge",
            Self::NumaNode => "numa_node",
            Self::System => "system",
        }
    }
}

/// How two GPUs are connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// One of them; the lower address.
    pub a: PciAddress,
    /// The other.
    pub b: PciAddress,
    /// What they meet at on the PCI bus.
    pub ancestor: Option<Ancestor>,
    /// NVLink links between them that are up.
    pub nvlinks: u32,
    /// Whether each can read the other's memory by itself.
    pub peer_read: bool,
    /// Whether each can write it.
    pub peer_write: bool,
}

/// Where the other end of an NVLink link is, where that is known: a GPU's, or a switch's, address.
pub(super) type FarEnd = Option<PciAddress>;

/// How many links connect two GPUs, by the far ends of the links of each that are up. Through a switch all of a GPU's
/// links reach every other GPU; the switch is not in the list of GPUs, so only `over_nvlink` tells.
fn links_between(a: (PciAddress, &[FarEnd]), b: (PciAddress, &[FarEnd]), over_nvlink: bool) -> u32 {
    let to = |ends: &[FarEnd], other: PciAddress| ends.iter().filter(|end| **end == Some(other)).count();
    let direct = to(a.1, b.0).max(to(b.1, a.0));
    let links = if direct == 0 && over_nvlink { a.1.len().min(b.1.len()) } else { direct };
    u32::try_from(links).unwrap_or(NVLINKS_MAX)
}

/// Asks for the connection of each pair.
pub(super) fn read(nvml: &Nvml, gpus: &[(PciAddress, &Device<'static>)]) -> Vec<Pair> {
    let ends: Vec<Vec<FarEnd>> = gpus.iter().map(|(_, device)| far_ends(device)).collect();
    let mut pairs = Vec::new();
    for (i, (first, one)) in gpus.iter().enumerate() {
        for (j, (second, other)) in gpus.iter().enumerate().skip(i + 1) {
            let able = |what| one.p2p_status(other, what).is_ok_and(|status| status == P2pStatus::Ok);
            let over_nvlink = able(P2pCapabilitiesIndex::NvLink);
            let ancestor = nvml.topology_common_ancestor(one, other).ok().map(ancestor);
            let nvlinks = links_between((*first, &ends[i]), (*second, &ends[j]), over_nvlink);
            let (peer_read, peer_write) = (able(P2pCapabilitiesIndex::Read), able(P2pCapabilitiesIndex::Write));
            let (a, b) = (*first.min(second), *first.max(second));
            pairs.push(Pair { a, b, ancestor, nvlinks, peer_read, peer_write });
        }
    }
    pairs
}

/// The far ends of the links that are up. A GPU without NVLink says that it does not know the question.
fn far_ends(device: &Device<'static>) -> Vec<FarEnd> {
    let links = (0..NVLINKS_MAX).map(|link| device.link_wrapper_for(link));
    links
        .filter(|link| link.is_active().unwrap_or(false))
        .map(|link| {
            let far = link.remote_pci_info().ok()?;
            Some(PciAddress { domain: far.domain, bus: far.bus, device: far.device })
        })
        .collect()
}

fn ancestor(level: TopologyLevel) -> Ancestor {
    match level {
        TopologyLevel::Internal => Ancestor::Board,
        TopologyLevel::Single => Ancestor::Switch,
        TopologyLevel::Multiple => Ancestor::Switches,
        TopologyLevel::HostBridge => Ancestor::HostBridge,
        TopologyLevel::Node => Ancestor::NumaNode,
        TopologyLevel::System => Ancestor::System,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(bus: u32) -> PciAddress {
        PciAddress { domain: 0, bus, device: 0 }
    }

    #[test]
    fn links_that_end_at_the_other_gpu_are_counted() {
        let (a, b, c) = (gpu(1), gpu(2), gpu(3));
        let (from_a, from_b) = ([Some(b), Some(b), Some(c), None], [Some(a), Some(a)]);
        assert_eq!(links_between((a, &from_a), (b, &from_b), true), 2);
        assert_eq!(links_between((a, &from_a), (c, &[]), true), 1, "one end tells enough");
        assert_eq!(links_between((b, &from_b), (c, &[]), false), 0);
    }

    #[test]
    fn through_a_switch_a_pair_has_the_links_of_the_poorer_gpu() {
        let switch = Some(gpu(9));
        let (from_a, from_b) = ([switch; 18], [switch; 12]);
        assert_eq!(links_between((gpu(1), &from_a), (gpu(2), &from_b), true), 12);
        assert_eq!(links_between((gpu(1), &from_a), (gpu(2), &from_b), false), 0, "not connected by them");
    }

    #[test]
    fn near_comes_before_far() {
        use Ancestor::{Board, HostBridge, NumaNode, Switch, Switches, System};
        assert!([Board, Switch, Switches, HostBridge, NumaNode, System].is_sorted());
    }
}
