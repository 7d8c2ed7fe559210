//! Counts for the protocol's statistics call. Durations in nanoseconds, as the protocol wants them.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use faaswap_protocol::Timing;
use serde::Serialize;

/// How often, and how long in all.
#[derive(Debug, Default)]
struct Total {
    count: AtomicU64,
    ns: AtomicU64,
}

/// A reading of a total.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Reading {
    /// How often.
    pub count: u64,
    /// How long in all.
    pub ns: u64,
}

impl Total {
    fn add(&self, took: Duration) {
        self.count.fetch_add(1, Ordering::Relaxed);
        self.ns.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn read(&self) -> Reading {
        Reading { count: self.count.load(Ordering::Relaxed), ns: self.ns.load(Ordering::Relaxed) }
    }
}

/// Totals since the sidecar's start.
#[derive(Debug, Default)]
pub struct Stats {
    success: Total,
    fail: Total,
    queue: Total,
    infer: Total,
    last_ms: AtomicU64,
}

/// A reading of all totals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Requests that were answered, from head to answer.
    pub success: Reading,
    /// Requests that were not.
    pub fail: Reading,
    /// Waiting at the broker.
    pub queue: Reading,
    /// Running, weights that were still being copied included.
    pub infer: Reading,
    /// When the last request was answered, in milliseconds since 1970; 0: never.
    pub last_ms: u64,
}

impl Stats {
    /// Counts one request; no timing: it failed.
    pub(super) fn note(&self, took: Duration, timing: Option<&Timing>) {
        let Some(timing) = timing else {
            return self.fail.add(took);
        };
        self.success.add(took);
        self.queue.add(timing.queued);
        self.infer.add(timing.ran);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.last_ms.store(u64::try_from(now.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Reads everything.
    pub fn read(&self) -> Totals {
        Totals {
            success: self.success.read(),
            fail: self.fail.read(),
            queue: self.queue.read(),
            infer: self.infer.read(),
            last_ms: self.last_ms.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_request_counts_as_failed_only() {
        let stats = Stats::default();
        stats.note(Duration::from_nanos(5), None);
        let totals = stats.read();
        assert_eq!((totals.fail, totals.success.count, totals.last_ms), (Reading { count: 1, ns: 5 }, 0, 0));
    }
}
