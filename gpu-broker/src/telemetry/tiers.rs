//! What is counted of the tiers of host memory and disk. Read from the tier when it is asked for.

use std::{fmt, sync::Arc};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet},
    metrics::MetricType,
    registry::Unit,
};

use crate::store::{Memory, TierStats};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByTier {
    /// Where a swap-in found its weights: `memory`, `coming` (from disk, for another one), `disk`.
    tier: &'static str,
}

/// The tiers' figures.
#[derive(Debug)]
pub(super) struct TierMetrics(pub(super) Arc<Memory>);

impl Collector for TierMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let (_, budget) = self.0.used();
        write(&self.0.stats(), budget.get(), &mut encoder)
    }
}

fn write(stats: &TierStats, budget: u64, encoder: &mut DescriptorEncoder) -> Result<(), fmt::Error> {
    let help = "Swap-ins by where they found their weights";
    let mut found = encoder.encode_descriptor("weights_found", help, None, MetricType::Counter)?;
    for (tier, count) in [("memory", stats.found), ("coming", stats.followed), ("disk", stats.fetched)] {
        found.encode_family(&ByTier { tier })?.encode_counter::<NoLabelSet, _, f64>(&count, None)?;
    }
    let counters = [
        ("weights_read", "Weights read from disk", Some(Unit::Bytes), stats.read.get() as f64),
        ("weights_reading", "Time spent reading weights from disk", Some(Unit::Seconds), stats.reading.as_secs_f64()),
        ("weights_failed", "Weights that could not be brought to host memory", None, stats.failed as f64),
        ("weights_evicted", "Weights that left host memory for others", None, stats.evicted as f64),
    ];
    for (name, help, unit, value) in counters {
        let mut counter = encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
        counter.encode_counter::<NoLabelSet, _, f64>(&value, None)?;
    }
    let help = "Most weights in host memory";
    let mut most = encoder.encode_descriptor("host_weights_max", help, Some(&Unit::Bytes), MetricType::Gauge)?;
    most.encode_gauge(&(budget as f64))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::time::Duration;

    use faaswap_protocol::Bytes;
    use prometheus_client::{encoding::text::encode, registry::Registry};

    use super::*;

    #[derive(Debug)]
    struct Fixed(TierStats);

    impl Collector for Fixed {
        fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
            write(&self.0, 4096, &mut encoder)
        }
    }

    #[test]
    fn each_figure_of_the_tier_is_shown() {
        let (read, reading) = (Bytes::new(77), Duration::from_millis(1500));
        let stats = TierStats { found: 1, followed: 2, fetched: 3, failed: 4, evicted: 5, read, reading };
        let mut registry = Registry::with_prefix("faaswap");
        registry.register_collector(Box::new(Fixed(stats)));
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        for line in [
            "faaswap_weights_found_total{tier=\"memory\"} 1",
            "faaswap_weights_found_total{tier=\"coming\"} 2",
            "faaswap_weights_found_total{tier=\"disk\"} 3",
            "faaswap_weights_read_bytes_total 77.0",
            "faaswap_weights_reading_seconds_total 1.5",
            "faaswap_weights_failed_total 4.0",
            "faaswap_weights_evicted_total 5.0",
            "faaswap_host_weights_max_bytes 4096.0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
    }
}
