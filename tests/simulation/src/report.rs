//! Results as files: a row per run in `summary.json` and CSV, and plots.

use std::{fmt::Write as _, fs, io, path::Path};

use serde_json::{Value, json};

use crate::outcome::Outcome;

/// One run, or one figure that several runs gave.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Which scenario.
    pub scenario: String,
    /// Which policy.
    pub policy: String,
    /// How many functions.
    pub functions: usize,
    /// How many of them kept their objective.
    pub compliant: usize,
    /// Requests that were counted.
    pub requests: u64,
    /// 98 of 100 answers came within this.
    pub p98_ms: f64,
    /// The mean of all answers.
    pub mean_ms: f64,
    /// The share of answers whose weights were there.
    pub resident_share: f64,
    /// Half of the others came within this.
    pub swapped_p50_ms: f64,
    /// Deviation of the devices' load over its mean.
    pub load_cov: f64,
    /// Where the row is about that: the most functions of which all keep their objective.
    pub largest_all_compliant: Option<usize>,
    /// Share of the optimum, where the scenario has one.
    pub share_of_optimum: Option<f64>,
    /// What the run followed from.
    pub seed: u64,
}

impl Row {
    /// The row of a run.
    pub fn of(scenario: impl Into<String>, policy: &str, seed: u64, outcome: &Outcome) -> Self {
        Self {
            scenario: scenario.into(),
            policy: policy.to_owned(),
            functions: outcome.functions.len(),
            compliant: outcome.compliant(),
            requests: outcome.requests(),
            p98_ms: outcome.latency_ms(980),
            mean_ms: outcome.mean_ms(),
            resident_share: outcome.resident_share(),
            swapped_p50_ms: outcome.swapped_ms(),
            load_cov: outcome.load_cov(),
            largest_all_compliant: None,
            share_of_optimum: None,
            seed,
        }
    }

    /// A row about how far a policy goes.
    pub fn largest(scenario: impl Into<String>, policy: &str, seed: u64, most: usize) -> Self {
        Self {
            scenario: scenario.into(),
            policy: policy.to_owned(),
            functions: most,
            compliant: most,
            requests: 0,
            p98_ms: 0.0,
            mean_ms: 0.0,
            resident_share: 0.0,
            swapped_p50_ms: 0.0,
            load_cov: 0.0,
            largest_all_compliant: Some(most),
            share_of_optimum: None,
            seed,
        }
    }

    fn json(&self) -> Value {
        json!({
            "scenario": self.scenario, "policy": self.policy, "functions": self.functions, "compliant": self.compliant,
            "requests": self.requests, "p98_ms": rounded(self.p98_ms), "mean_ms": rounded(self.mean_ms),
            "resident_share": rounded(self.resident_share), "swapped_p50_ms": rounded(self.swapped_p50_ms),
            "load_cov": rounded(self.load_cov),
            "largest_all_compliant": self.largest_all_compliant, "share_of_optimum": self.share_of_optimum.map(rounded),
            "seed": self.seed,
        })
    }

    fn csv(&self) -> String {
        let optional = |number: Option<String>| number.unwrap_or_default();
        format!(
            "{},{},{},{},{},{},{},{},{},{},{},{},{}",
            self.scenario,
            self.policy,
            self.functions,
            self.compliant,
            self.requests,
            rounded(self.p98_ms),
            rounded(self.mean_ms),
            rounded(self.resident_share),
            rounded(self.swapped_p50_ms),
            rounded(self.load_cov),
            optional(self.largest_all_compliant.map(|most| most.to_string())),
            optional(self.share_of_optimum.map(|share| rounded(share).to_string())),
            self.seed
        )
    }
}

fn rounded(number: f64) -> f64 {
    (number * 1000.0).round() / 1000.0
}

/// Writes all rows.
pub fn write(folder: &Path, rows: &[Row]) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let json = Value::Array(rows.iter().map(Row::json).collect());
    fs::write(folder.join("summary.json"), format!("{json:#}\n"))?;
    let head = "scenario,policy,functions,compliant,requests,p98_ms,mean_ms,resident_share,swapped_p50_ms,load_cov,largest_all_compliant,share_of_optimum,seed";
    let mut csv = format!("{head}\n");
    for row in rows {
        let _infallible = writeln!(csv, "{}", row.csv());
    }
    fs::write(folder.join("summary.csv"), csv)
}
