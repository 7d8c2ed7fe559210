//! What is counted of GPUs. Read when it is asked for, so that a GPU that is gone leaves no stale figure; what the driver
//! does not tell is left out. The links' speeds are those of the start.

use std::{fmt, sync::Arc};

use faaswap_device::{
    links::LinkMap,
    nvml::{Level, Observation, Throttle},
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet},
    metrics::MetricType,
    registry::Unit,
};

use crate::gpus::Gpus;

/// Whose figure it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByGpu {
    /// Its PCI address.
    gpu: String,
    /// The name of our device on it; empty where there is none.
    device: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByReason {
    gpu: String,
    device: String,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByLink {
    /// The GPU at its end.
    gpu: String,
    /// Where it begins: `host`, or a GPU's PCI address.
    from: String,
    /// The GPU whose host link was used at the same time; empty for none.
    beside: String,
}

/// A figure of one GPU, if the driver tells it.
type Figure = fn(&Observation) -> Option<f64>;

/// Name, help, unit, figure.
type Gauge = (&'static str, &'static str, Option<&'static str>, Figure);

const BYTES: Option<&str> = Some("bytes");
const RATE: Option<&str> = Some("bytes_per_second");
const RATIO: Option<&str> = Some("ratios");
const HERTZ: Option<&str> = Some("hertz");

const GAUGES: &[Gauge] = &[
    ("gpu_lost", "Whether the GPU has fallen off the bus", None, |g| Some(f64::from(u8::from(g.lost)))),
    ("gpu_memory_total", "Memory of the GPU", BYTES, |g| Some(g.memory?.total.get() as f64)),
    ("gpu_memory_used", "Memory of the GPU taken by anyone", BYTES, |g| Some(g.memory?.used.get() as f64)),
    ("gpu_memory_free", "Memory of the GPU that is not taken", BYTES, |g| Some(g.memory?.free.get() as f64)),
    ("gpu_busy", "Share of time with a kernel running", RATIO, |g| Some(f64::from(g.busy?.gpu_percent) / 100.0)),
    ("gpu_memory_busy", "Share of time with memory in use", RATIO, |g| Some(f64::from(g.busy?.memory_percent) / 100.0)),
    ("gpu_pcie_sent", "From the GPU over its bus", RATE, |g| Some(g.pcie.sent_per_second?.get() as f64)),
    ("gpu_pcie_received", "To the GPU over its bus", RATE, |g| Some(g.pcie.received_per_second?.get() as f64)),
    ("gpu_pcie_generation", "Generation of the bus now", None, |g| now(g.pcie.generation)),
    ("gpu_pcie_generation_max", "Generation of the bus at most", None, |g| max(g.pcie.generation)),
    ("gpu_pcie_width", "Lanes of the bus now", None, |g| now(g.pcie.width)),
    ("gpu_pcie_width_max", "Lanes of the bus at most", None, |g| max(g.pcie.width)),
    ("gpu_sm_clock", "Clock of the multiprocessors now", HERTZ, |g| Some(now(g.sm_clock_mhz)? * 1e6)),
    ("gpu_sm_clock_max", "Clock of the multiprocessors at most", HERTZ, |g| Some(max(g.sm_clock_mhz)? * 1e6)),
    ("gpu_memory_clock", "Clock of the memory now", HERTZ, |g| Some(now(g.memory_clock_mhz)? * 1e6)),
    ("gpu_memory_clock_max", "Clock of the memory at most", HERTZ, |g| Some(max(g.memory_clock_mhz)? * 1e6)),
    ("gpu_foreign_processes", "Processes on the GPU that are not ours", None, |g| Some(g.foreign?.processes as f64)),
    ("gpu_foreign", "Memory of processes that are not ours", BYTES, |g| Some(g.foreign?.bytes?.get() as f64)),
    ("gpu_temperature", "Temperature of the chip", Some("celsius"), |g| Some(f64::from(g.temperature_celsius?))),
    ("gpu_power", "Electrical power", Some("watts"), |g| Some(f64::from(g.power_milliwatts?) / 1e3)),
];

/// Name, help, figure.
const COUNTERS: &[(&str, &str, Figure)] = &[
    ("gpu_ecc_uncorrected", "Memory errors that were not corrected", |g| Some(g.ecc_uncorrected? as f64)),
    ("gpu_xids", "Faults that the driver has reported", |g| Some(g.xids?.count as f64)),
];

fn now(level: Option<Level>) -> Option<f64> {
    level.map(|level| f64::from(level.now))
}

fn max(level: Option<Level>) -> Option<f64> {
    level.map(|level| f64::from(level.max))
}

/// The GPUs' figures.
#[derive(Debug)]
pub(super) struct GpuMetrics(pub(super) Arc<Gpus>);

impl Collector for GpuMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let seen = self.0.seen();
        let seen: Vec<_> = seen.iter().map(|(device, seen)| (by_gpu(*device, seen), seen)).collect();
        write(&seen, &mut encoder)?;
        links(self.0.links(), &mut encoder)
    }
}

fn by_gpu(device: Option<&str>, seen: &Observation) -> ByGpu {
    ByGpu { gpu: seen.pci.to_string(), device: device.unwrap_or_default().to_owned() }
}

fn write(seen: &[(ByGpu, &Observation)], encoder: &mut DescriptorEncoder) -> Result<(), fmt::Error> {
    for (name, help, unit, figure) in GAUGES {
        let known: Vec<_> = seen.iter().filter_map(|(labels, seen)| Some((labels, figure(seen)?))).collect();
        let unit = unit.map(|unit| Unit::Other(unit.to_owned()));
        if known.is_empty() {
            continue;
        }
        let mut metric = encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
        for (labels, value) in known {
            metric.encode_family(labels)?.encode_gauge(&value)?;
        }
    }
    for (name, help, figure) in COUNTERS {
        let known: Vec<_> = seen.iter().filter_map(|(labels, seen)| Some((labels, figure(seen)?))).collect();
        if known.is_empty() {
            continue;
        }
        let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, value) in known {
            metric.encode_family(labels)?.encode_counter::<NoLabelSet, _, f64>(&value, None)?;
        }
    }
    throttles(seen, encoder)
}

/// One figure per reason, 1 where it holds.
fn throttles(seen: &[(ByGpu, &Observation)], encoder: &mut DescriptorEncoder) -> Result<(), fmt::Error> {
    let mut known = seen.iter().filter_map(|(labels, seen)| Some((labels, seen.throttled?))).peekable();
    if known.peek().is_none() {
        return Ok(());
    }
    let help = "Whether the GPU is slower than it could be, by reason";
    let mut metric = encoder.encode_descriptor("gpu_throttled", help, None, MetricType::Gauge)?;
    for (ByGpu { gpu, device }, reasons) in known {
        for reason in Throttle::ALL {
            let labels = ByReason { gpu: gpu.clone(), device: device.clone(), reason: reason.code() };
            let holds = u32::from(reasons.contains(reason));
            metric.encode_family(&labels)?.encode_gauge(&holds)?;
        }
    }
    Ok(())
}

/// The speed of each link alone, of host links beside each other, and between GPUs.
fn links(map: &LinkMap, encoder: &mut DescriptorEncoder) -> Result<(), fmt::Error> {
    let unit = Unit::Other("bytes_per_second".to_owned());
    let mut known = Vec::new();
    for (at, gpu) in map.gpus.iter().enumerate() {
        let labels = |from: String, beside: String| ByLink { gpu: gpu.to_string(), from, beside };
        let alone = map.alone[at].map(|rate| (labels("host".to_owned(), String::new()), rate));
        known.extend(alone);
        known.extend(map.crowded[at].map(|rate| (labels("host".to_owned(), "all".to_owned()), rate)));
        for (there, other) in map.gpus.iter().enumerate() {
            let beside = map.together[at][there].map(|rate| (labels("host".to_owned(), other.to_string()), rate));
            let peer = map.peers[there][at].map(|peer| (labels(other.to_string(), String::new()), peer.rate));
            known.extend(beside.into_iter().chain(peer));
        }
    }
    if known.is_empty() {
        return Ok(());
    }
    let help = "Speed of a link to a GPU as measured at the start";
    let mut metric = encoder.encode_descriptor("gpu_link", help, Some(&unit), MetricType::Gauge)?;
    for (labels, rate) in known {
        metric.encode_family(&labels)?.encode_gauge(&rate.0)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::collections::BTreeSet;

    use faaswap_device::{
        PciAddress,
        links::{PeerLink, Rate},
        nvml::{MemoryUse, Throttles, Xids},
    };
    use faaswap_protocol::Bytes;
    use prometheus_client::{encoding::text::encode, registry::Registry};

    use super::*;

    #[derive(Debug)]
    struct Fixed(Vec<(ByGpu, Observation)>, LinkMap);

    impl Collector for Fixed {
        fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
            let seen: Vec<_> = self.0.iter().map(|(labels, seen)| (labels.clone(), seen)).collect();
            write(&seen, &mut encoder)?;
            links(&self.1, &mut encoder)
        }
    }

    fn text(seen: Vec<(Option<&str>, Observation)>, map: LinkMap) -> String {
        let mut registry = Registry::with_prefix("faaswap");
        let seen = seen.into_iter().map(|(device, seen)| (by_gpu(device, &seen), seen)).collect();
        registry.register_collector(Box::new(Fixed(seen, map)));
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        text
    }

    fn gpu(bus: u32) -> Observation {
        Observation::blank(PciAddress { domain: 0, bus, device: 0 })
    }

    #[test]
    fn what_is_seen_is_shown_by_gpu_and_device_and_the_rest_is_left_out() {
        let memory = MemoryUse { total: Bytes::new(80), used: Bytes::new(30), free: Bytes::new(50) };
        let ours = Observation {
            memory: Some(memory),
            sm_clock_mhz: Some(Level { now: 345, max: 1980 }),
            throttled: Some(Throttles::of_bits(0x4)),
            xids: Some(Xids { count: 2, last: Some(79) }),
            power_milliwatts: Some(71_250),
            ..gpu(1)
        };
        let text =
            text(vec![(Some("cuda0"), ours), (None, Observation { lost: true, ..gpu(0xab) })], LinkMap::default());
        for line in [
            "# UNIT faaswap_gpu_memory_used_bytes bytes",
            "faaswap_gpu_memory_used_bytes{gpu=\"0000:01:00.0\",device=\"cuda0\"} 30.0",
            "faaswap_gpu_sm_clock_hertz{gpu=\"0000:01:00.0\",device=\"cuda0\"} 345000000.0",
            "faaswap_gpu_power_watts{gpu=\"0000:01:00.0\",device=\"cuda0\"} 71.25",
            "faaswap_gpu_xids_total{gpu=\"0000:01:00.0\",device=\"cuda0\"} 2.0",
            "faaswap_gpu_throttled{gpu=\"0000:01:00.0\",device=\"cuda0\",reason=\"power_cap\"} 1",
            "faaswap_gpu_throttled{gpu=\"0000:01:00.0\",device=\"cuda0\",reason=\"idle\"} 0",
            "faaswap_gpu_lost{gpu=\"0000:ab:00.0\",device=\"\"} 1.0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
        assert!(!text.contains("temperature") && !text.contains("ecc"), "not told:\n{text}");
    }

    #[test]
    fn a_link_is_shown_alone_beside_others_and_from_gpu_to_gpu() {
        let mut map = LinkMap::blank(vec![gpu(1).pci, gpu(2).pci]);
        map.alone[0] = Some(Rate(5e10));
        map.together[0][1] = Some(Rate(2.5e10));
        map.crowded[0] = Some(Rate(2e10));
        map.peers[1][0] = Some(PeerLink { rate: Rate(4e11), direct: true });
        let text = text(Vec::new(), map);
        for line in [
            "faaswap_gpu_link_bytes_per_second{gpu=\"0000:01:00.0\",from=\"host\",beside=\"\"} 50000000000.0",
            "faaswap_gpu_link_bytes_per_second{gpu=\"0000:01:00.0\",from=\"host\",beside=\"0000:02:00.0\"} 25000000000.0",
            "faaswap_gpu_link_bytes_per_second{gpu=\"0000:01:00.0\",from=\"host\",beside=\"all\"} 20000000000.0",
            "faaswap_gpu_link_bytes_per_second{gpu=\"0000:01:00.0\",from=\"0000:02:00.0\",beside=\"\"} 400000000000.0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
    }

    #[test]
    fn no_two_figures_have_one_name() {
        let all = GAUGES.iter().map(|(name, ..)| name).chain(COUNTERS.iter().map(|(name, ..)| name));
        assert_eq!(all.clone().collect::<BTreeSet<_>>().len(), all.count());
    }

    #[test]
    fn a_machine_without_gpus_shows_none() {
        assert_eq!(text(Vec::new(), LinkMap::default()), "# EOF\n");
    }
}
