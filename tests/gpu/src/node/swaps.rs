//! What the broker's counters say of swap-ins.

use serde_json::{Value, json};

use super::broker::Metrics;

/// Sums over all devices, since the broker's start or between two looks. Times in seconds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Swaps {
    pub(crate) count: f64,
    pub(crate) bytes: f64,
    /// From the start of a swap's work to its last byte.
    took: f64,
    /// Before that, for the link.
    waited: f64,
    /// Of it, to queue copies, and to map memory.
    queueing: f64,
    mapping: f64,
}

impl Swaps {
    pub(crate) fn read(metrics: &Metrics) -> Self {
        let part = |part: &str| {
            let all = metrics.all("faaswap_swap_in_parts_seconds_total").filter(|(labels, _)| labels.contains(part));
            all.map(|(_, seconds)| seconds).sum()
        };
        Self {
            count: metrics.sum("faaswap_swaps_in_total"),
            bytes: metrics.sum("faaswap_swapped_in_bytes_total"),
            took: metrics.sum("faaswap_swap_in_seconds_sum"),
            waited: part("waited"),
            queueing: part("queueing"),
            mapping: part("mapping"),
        }
    }

    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            count: self.count - before.count,
            bytes: self.bytes - before.bytes,
            took: self.took - before.took,
            waited: self.waited - before.waited,
            queueing: self.queueing - before.queueing,
            mapping: self.mapping - before.mapping,
        }
    }

    /// Milliseconds of each, of so many seconds of all; 0 where there was none.
    fn each_ms(self, seconds: f64) -> f64 {
        if self.count > 0.0 { seconds / self.count * 1e3 } else { 0.0 }
    }

    /// What each took beyond its bytes over a link of so many bytes a second.
    pub(crate) fn beyond_ms(self, link: f64) -> f64 {
        self.each_ms((self.took - self.bytes / link).max(0.0))
    }

    pub(crate) fn json(self) -> Value {
        json!({
            "took_ms": self.each_ms(self.took), "waited_ms": self.each_ms(self.waited),
            "queueing_ms": self.each_ms(self.queueing), "mapping_ms": self.each_ms(self.mapping),
        })
    }

    pub(crate) fn say(self) {
        println!(
            "    a swap takes {:.2} ms behind {:.2} ms of waiting; mapping {:.2} ms of it, queueing {:.2} ms",
            self.each_ms(self.took),
            self.each_ms(self.waited),
            self.each_ms(self.mapping),
            self.each_ms(self.queueing)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_swaps_take_beyond_their_bytes_is_told_by_the_counters() {
        let at = |count, bytes, took| Swaps { count, bytes, took, ..Swaps::default() };
        let (before, link) = (at(2.0, 1e9, 1.0), 50e9);
        let beyond = |now: Swaps| now.since(before).beyond_ms(link);
        assert!((beyond(at(12.0, 2e9, 1.04)) - 2.0).abs() < 1e-9);
        assert_eq!(beyond(before), 0.0, "there was none");
        assert_eq!(beyond(at(12.0, 2e9, 1.01)), 0.0, "they were faster");
    }
}
