//! What the demo shows at the end: a table, totals, what the functions said, and a summary for programs.

use std::{collections::BTreeSet, fs, path::Path, time::Duration};

use serde::Serialize;

use super::{
    functions::{Knowledge, Task},
    load::Subject,
};
use crate::{
    Result, Trouble,
    node::Broker,
    stats::{ms, percentile},
};

/// Answers that are shown of each task.
const SHOWN_MAX: usize = 4;

/// What the broker says of itself.
#[derive(Clone, Copy, Debug)]
pub struct NodeFacts {
    /// Weights of all models together.
    pub weights_bytes: u64,
    /// Memory of all devices together.
    pub device_bytes: u64,
}

impl NodeFacts {
    /// Asks the broker.
    pub fn ask(broker: &Broker) -> Result<Self> {
        let sum = |path: &str, key: &str| -> Result<u64> {
            let page = broker.admin(path)?;
            let list = page.as_array().ok_or_else(|| Trouble::new(format!("{path} is no list: {page}")))?;
            Ok(list.iter().filter_map(|item| item[key].as_u64()).sum())
        };
        Ok(Self {
            weights_bytes: sum("/v1/models", "weights_bytes")?,
            device_bytes: sum("/v1/devices", "capacity_bytes")?,
        })
    }
}

/// One line of the table.
#[derive(Debug, Serialize)]
struct Line {
    function: String,
    requests: usize,
    resident_p50_ms: Option<f64>,
    resident_p98_ms: Option<f64>,
    swapped_in_p50_ms: Option<f64>,
    swapped_in_p98_ms: Option<f64>,
    swapped_in: usize,
    slo_ms: f64,
    slo_met_share: f64,
}

/// The whole run.
#[derive(Debug, Serialize)]
pub struct Summary {
    functions: usize,
    requests: usize,
    answered: usize,
    refused: usize,
    unanswered: usize,
    wrong_outputs: usize,
    swaps_in: u64,
    swaps_out: u64,
    swapped_in_answers: usize,
    weights_bytes: u64,
    device_bytes: u64,
    slo_met_share: f64,
    resident_p50_ms: Option<f64>,
    resident_p98_ms: Option<f64>,
    swapped_in_p50_ms: Option<f64>,
    swapped_in_p98_ms: Option<f64>,
    seconds: f64,
    seed: u64,
    by_function: Vec<Line>,
}

#[expect(clippy::cast_precision_loss, reason = "a share is shown with a few digits")]
fn share(part: usize, whole: usize) -> f64 {
    if whole == 0 { 1.0 } else { part as f64 / whole as f64 }
}

fn p(times: &mut [Duration], percent: usize) -> Option<f64> {
    percentile(times, percent).map(ms)
}

impl Summary {
    /// Adds everything up.
    pub fn of(subjects: &[Subject], facts: NodeFacts, broker: &Broker, seconds: f64, seed: u64) -> Result<Self> {
        let total = |count: fn(&Subject) -> usize| subjects.iter().map(count).sum::<usize>();
        let mut resident: Vec<_> = subjects.iter().flat_map(|s| s.tally().resident.clone()).collect();
        let mut swapped: Vec<_> = subjects.iter().flat_map(|s| s.tally().swapped.clone()).collect();
        let requests = total(|s| s.times.len());
        Ok(Self {
            functions: subjects.len(),
            requests,
            answered: total(|s| s.tally().answered()),
            refused: total(|s| s.tally().refused),
            unanswered: total(|s| s.tally().unanswered),
            wrong_outputs: total(|s| s.tally().wrong),
            swaps_in: whole(broker.metric("faaswap_swaps_in_total")?),
            swaps_out: whole(broker.metric("faaswap_swaps_out_total")?),
            swapped_in_answers: swapped.len(),
            weights_bytes: facts.weights_bytes,
            device_bytes: facts.device_bytes,
            slo_met_share: share(total(|s| s.tally().met), requests),
            resident_p50_ms: p(&mut resident, 50),
            resident_p98_ms: p(&mut resident, 98),
            swapped_in_p50_ms: p(&mut swapped, 50),
            swapped_in_p98_ms: p(&mut swapped, 98),
            seconds,
            seed,
            by_function: subjects.iter().map(line).collect(),
        })
    }

    /// Why the run counts as failed; empty where all is well.
    pub fn failures(&self) -> Vec<String> {
        let mut failures = Vec::new();
        let mut require = |holds: bool, failure: String| {
            if !holds {
                failures.push(failure);
            }
        };
        require(self.wrong_outputs == 0, format!("{} outputs are wrong", self.wrong_outputs));
        let missing = self.requests - self.answered;
        require(missing == 0, format!("{missing} of {} requests were not answered", self.requests));
        require(
            self.device_bytes * 2 < self.weights_bytes,
            format!("{} bytes of device memory are not less than half of {}", self.device_bytes, self.weights_bytes),
        );
        require(self.swaps_in > 0, "nothing was swapped in".to_owned());
        failures
    }

    /// Writes it for programs.
    pub fn save(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        fs::write(path, text + "\n").map_err(Trouble::while_doing(path.display()))
    }

    /// Prints the table and the totals.
    pub fn print(&self) {
        let cell = |time: Option<f64>| time.map_or_else(|| "-".to_owned(), |time| format!("{time:.1}"));
        println!(
            "\n{:14} {:>8}  {:>15}  {:>15}  {:>6}  {:>8}  {:>7}",
            "", "", "resident, ms", "swapped in, ms", "", "", ""
        );
        println!(
            "{:14} {:>8}  {:>7} {:>7}  {:>7} {:>7}  {:>6}  {:>8}  {:>7}",
            "function", "requests", "p50", "p98", "p50", "p98", "swaps", "deadline", "SLO met"
        );
        for line in &self.by_function {
            println!(
                "{:14} {:>8}  {:>7} {:>7}  {:>7} {:>7}  {:>6}  {:>5.0} ms  {:>5.1} %",
                line.function,
                line.requests,
                cell(line.resident_p50_ms),
                cell(line.resident_p98_ms),
                cell(line.swapped_in_p50_ms),
                cell(line.swapped_in_p98_ms),
                line.swapped_in,
                line.slo_ms,
                line.slo_met_share * 100.0
            );
        }
        let bytes = faaswap_protocol::Bytes::new;
        println!(
            "{:14} {:>8}  {:>7} {:>7}  {:>7} {:>7}  {:>6}  {:>8}  {:>5.1} %",
            "all",
            self.requests,
            cell(self.resident_p50_ms),
            cell(self.resident_p98_ms),
            cell(self.swapped_in_p50_ms),
            cell(self.swapped_in_p98_ms),
            self.swapped_in_answers,
            "",
            self.slo_met_share * 100.0
        );
        println!(
            "\n{} functions with {} of weights shared devices with {} of memory for {:.0} s: {} swap-ins, {} swap-outs.",
            self.functions,
            bytes(self.weights_bytes),
            bytes(self.device_bytes),
            self.seconds,
            self.swaps_in,
            self.swaps_out
        );
        println!(
            "{} requests: {} answered, {} refused, {} without answer; {} wrong outputs (every one was compared, bit by \
             bit, with a plain ONNX Runtime session's).",
            self.requests, self.answered, self.refused, self.unanswered, self.wrong_outputs
        );
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count")]
fn whole(count: f64) -> u64 {
    count.max(0.0) as u64
}

fn line(subject: &Subject) -> Line {
    let mut tally = subject.tally();
    Line {
        function: subject.plan.name.clone(),
        requests: subject.times.len(),
        resident_p50_ms: p(&mut tally.resident, 50),
        resident_p98_ms: p(&mut tally.resident, 98),
        swapped_in_p50_ms: p(&mut tally.swapped, 50),
        swapped_in_p98_ms: p(&mut tally.swapped, 98),
        swapped_in: tally.swapped.len(),
        slo_ms: ms(subject.plan.slo),
        slo_met_share: share(tally.met, subject.times.len()),
    }
}

/// Prints what the first function of each task has said, from its answers.
pub fn print_answers(subjects: &[Subject], knowledge: &Knowledge) -> Result<()> {
    println!("\nWhat the functions said:");
    let mut shown: Vec<Task> = Vec::new();
    for subject in subjects {
        let task = subject.plan.task;
        if shown.contains(&task) {
            continue;
        }
        shown.push(task);
        let tally = subject.tally();
        let answers = subject.exams.iter().zip(&tally.latest);
        let answers = answers.filter_map(|(exam, outputs)| Some((&exam.label, outputs.as_ref()?)));
        let mut said = Vec::new();
        let mut seen = BTreeSet::new();
        let few = if task == Task::FileType { usize::MAX } else { SHOWN_MAX };
        for (label, outputs) in answers {
            let text = knowledge.explain(task, outputs)?;
            // Of windows of sound only the changes are worth a line.
            let kind = text.split(" (").next().unwrap_or_default().to_owned();
            if said.len() < few && (task != Task::Speech || seen.insert(kind)) {
                said.push(format!("{label}: {text}"));
            }
        }
        for text in said {
            println!("  {:12} {text}", subject.plan.name);
        }
    }
    Ok(())
}

/// Prints the first few things that went wrong.
pub fn print_complaints(subjects: &[Subject]) {
    for subject in subjects {
        for complaint in &subject.tally().complaints {
            println!("  {}: {complaint}", subject.plan.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Summary {
        Summary {
            functions: 2,
            requests: 10,
            answered: 10,
            refused: 0,
            unanswered: 0,
            wrong_outputs: 0,
            swaps_in: 3,
            swaps_out: 1,
            swapped_in_answers: 3,
            weights_bytes: 100,
            device_bytes: 49,
            slo_met_share: 1.0,
            resident_p50_ms: Some(1.0),
            resident_p98_ms: Some(1.0),
            swapped_in_p50_ms: None,
            swapped_in_p98_ms: None,
            seconds: 1.0,
            seed: 1,
            by_function: Vec::new(),
        }
    }

    #[test]
    fn a_run_fails_for_each_thing_that_it_promises() {
        assert!(good().failures().is_empty());
        let bad = [
            Summary { wrong_outputs: 1, ..good() },
            Summary { answered: 9, refused: 1, ..good() },
            Summary { answered: 9, unanswered: 1, ..good() },
            Summary { device_bytes: 50, ..good() },
            Summary { swaps_in: 0, ..good() },
        ];
        for summary in bad {
            assert_eq!(summary.failures().len(), 1, "{summary:?}");
        }
    }
}
