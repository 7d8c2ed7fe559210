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
use crate::{
    Result,
    record::{Record, Target},
};

const COMPLIANT: &str = "compliant functions";
const REQUESTS: &str = "requests/s";
const P50: &str = "p50 ms";
const P98: &str = "p98 ms";
const SWAPS: &str = "swaps/s";
const LINKS: &str = "link load %";
/// What is compared, as a figure with its unit.
const FIGURES: [(&str, &str, &str); 5] = [
    (COMPLIANT, "predicted_compliant", "functions"),
    (P50, "predicted_p50", "ms"),
    (P98, "predicted_p98", "ms"),
    (SWAPS, "predicted_swaps", "swaps/s"),
    (LINKS, "predicted_link_load", "%"),
];

/// What was measured beside what was simulated, as records of a policy; `value` is a step's.
pub(crate) fn records(policy: &str, value: &Value) -> Vec<Record> {
    let rows = value["predicted"]["beside"].as_array().cloned().unwrap_or_default();
    let record = |(what, figure, unit): &(&str, &str, &'static str)| {
        let row = rows.iter().find(|row| row["what"] == *what)?;
        let (measured, predicted) = (row["measured"].as_f64()?, row["predicted"].as_f64()?);
        let reference = (predicted > 0.0).then_some((predicted, "simulated"));
        Some(Record::of(figure, policy, (measured, unit), reference, Target::Told))
    };
    FIGURES.iter().filter_map(record).collect()
}

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
            (COMPLIANT, self.outcome.compliant() as f64, step.compliant() as f64),
            (REQUESTS, self.outcome.requests() as f64 / self.seconds, step.per_second()),
            (P50, self.outcome.latency_ms(500), permille(&step.latencies, 500)),
            (P98, self.outcome.latency_ms(980), permille(&step.latencies, 980)),
            (SWAPS, self.swaps(span), step.swaps),
            (LINKS, copied / span / links * 100.0, step.link_load(links) * 100.0),
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
