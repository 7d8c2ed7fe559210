//! What the simulator says of the same node, models and requests, beside what was measured.

use faaswap_scheduler::PolicyKind;
use faaswap_simulation::{
    catalog::{ModelSpec, NodeSpec},
    optimum,
    outcome::Outcome,
    scenario,
    workload::Workload,
};
use serde_json::{Value, json};

use super::step::{Step, permille};
use crate::Result;

/// One stretch as it was simulated.
#[derive(Debug)]
pub(crate) struct Predicted {
    outcome: Outcome,
    seconds: f64,
    /// Part of what the links carry that nobody can do without: by the rates, and by the future.
    pub(crate) bound: optimum::Bound,
}

/// The scheduler's policy of this name.
pub(crate) fn policy(name: &str, seed: u64) -> Result<PolicyKind> {
    let found = scenario::policies(seed).into_iter().find(|(known, _)| *known == name);
    Ok(found.ok_or_else(|| format!("there is no policy {name}"))?.1)
}

pub(crate) fn predict(node: &NodeSpec, models: &[ModelSpec], workload: &Workload, policy: PolicyKind) -> Predicted {
    let outcome = scenario::play(node, models, workload, policy, 1);
    let seconds = (workload.span - workload.counted_from) as f64 / 1e9;
    Predicted { outcome, seconds, bound: optimum::bound(node, models, workload) }
}

impl Predicted {
    /// Copies a second from the host. The simulator counts the whole span.
    fn swaps(&self, span: f64) -> f64 {
        self.outcome.devices.iter().map(|work| work.swaps.0 as f64).sum::<f64>() / span
    }

    /// What is compared: name, what was simulated, what was measured.
    pub(crate) fn beside(&self, step: &Step, workload: &Workload, links: f64) -> Vec<(&'static str, f64, f64)> {
        let span = workload.span as f64 / 1e9;
        let copied: f64 = self.outcome.devices.iter().map(|work| work.copied).sum();
        vec![
            ("compliant functions", self.outcome.compliant() as f64, step.compliant() as f64),
            ("requests/s", self.outcome.requests() as f64 / self.seconds, step.per_second()),
            ("p50 ms", self.outcome.latency_ms(500), permille(&step.latencies, 500)),
            ("p98 ms", self.outcome.latency_ms(980), permille(&step.latencies, 980)),
            ("swaps/s", self.swaps(span), step.swaps),
            ("link load %", copied / span / links * 100.0, step.link_load(links) * 100.0),
        ]
    }

    pub(crate) fn json(&self, beside: &[(&'static str, f64, f64)]) -> Value {
        let rows = beside
            .iter()
            .map(|(name, predicted, measured)| json!({"what": name, "predicted": predicted, "measured": measured}));
        json!({
            "beside": rows.collect::<Vec<_>>(),
            "optimum": {"links": self.bound.links, "links_by_rates": self.bound.links_by_rates, "devices": self.bound.devices},
        })
    }
}

/// Prints the comparison.
pub(crate) fn say(beside: &[(&'static str, f64, f64)]) {
    let cells = beside.iter().map(|(name, predicted, measured)| format!("{name} {predicted:.2} / {measured:.2}"));
    println!("    predicted / measured: {}", cells.collect::<Vec<_>>().join("; "));
}
