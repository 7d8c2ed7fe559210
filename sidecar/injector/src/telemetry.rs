//! What the injector tells Prometheus: a closed vocabulary.

use std::time::Duration;

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

/// Pods reviewed, by outcome.
pub const REVIEWS: &str = "faaswap_injector_reviews";
/// How long a review took, reading and writing included.
pub const REVIEW_SECONDS: &str = "faaswap_injector_review_seconds";
/// Looks after the certificates that failed.
pub const CERTIFICATE_FAILURES: &str = "faaswap_injector_certificate_failures";
/// When the certificate in use ends, in seconds since 1970.
pub const CERTIFICATE_ENDS: &str = "faaswap_injector_certificate_ends_seconds";

const SECONDS: [f64; 8] = [0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.1, 1.0];

/// What became of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the variants are label values")]
pub enum Outcome {
    /// It has what it asked for.
    injected,
    /// It asked for nothing, or had it.
    untouched,
    /// Its annotations are wrong: it is not made.
    denied,
    /// Its annotations are wrong: it is made without.
    ignored,
    /// The body was no review.
    invalid,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByOutcome {
    outcome: Outcome,
}

/// The injector's metrics.
#[derive(Debug)]
pub struct Telemetry {
    registry: Registry,
    reviews: Family<ByOutcome, Counter>,
    review_seconds: Histogram,
    certificate_failures: Counter,
    certificate_ends: Gauge,
}

impl Default for Telemetry {
    fn default() -> Self {
        let mut telemetry = Self {
            registry: Registry::default(),
            reviews: Family::default(),
            review_seconds: Histogram::new(SECONDS),
            certificate_failures: Counter::default(),
            certificate_ends: Gauge::default(),
        };
        let registry = &mut telemetry.registry;
        registry.register(REVIEWS, "Pods reviewed by outcome", telemetry.reviews.clone());
        registry.register(REVIEW_SECONDS, "How long reviews took", telemetry.review_seconds.clone());
        registry.register(
            CERTIFICATE_FAILURES,
            "Failed looks after certificates",
            telemetry.certificate_failures.clone(),
        );
        registry.register(CERTIFICATE_ENDS, "End of the certificate, since 1970", telemetry.certificate_ends.clone());
        telemetry
    }
}

impl Telemetry {
    pub(crate) fn reviewed(&self, outcome: Outcome) {
        self.reviews.get_or_create(&ByOutcome { outcome }).inc();
    }

    pub(crate) fn took(&self, time: Duration) {
        self.review_seconds.observe(time.as_secs_f64());
    }

    pub(crate) fn certificate_failed(&self) {
        self.certificate_failures.inc();
    }

    pub(crate) fn certificate_until(&self, unix_seconds: i64) {
        self.certificate_ends.set(unix_seconds);
    }

    /// Everything as text.
    pub fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}
