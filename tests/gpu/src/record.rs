//! What was measured, as records: one per figure, each beside its reference. `tests/gpu/report` draws them.
//!
//! A figure's `ratio` is always ours divided by the reference. Its target is about the ratio where there is a
//! reference, else about our value. Outputs are counted in one record of a model, so that their sum is the number checked.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use crate::Result;

/// What a ratio, or a value without a reference, shall be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Target {
    AtMost(f64),
    AtLeast(f64),
    /// It is only told.
    Told,
}

/// Where a value comes from in what was measured of a model, and of PyTorch with it.
#[derive(Clone, Copy, Debug)]
enum From {
    Ours(&'static str),
    Torch(&'static str),
    /// The longer of these two of ours.
    Longer(&'static str, &'static str),
    /// Bytes over milliseconds, as GB/s.
    Speed(&'static str),
    Megabytes(&'static str),
}

/// A figure of each model.
struct Figure {
    name: &'static str,
    unit: &'static str,
    ours: From,
    reference: Option<(From, &'static str)>,
    target: Target,
    counts_outputs: bool,
}

const fn figure(
    name: &'static str,
    unit: &'static str,
    ours: From,
    reference: Option<(From, &'static str)>,
    target: Target,
) -> Figure {
    Figure { name, unit, ours, reference, target, counts_outputs: false }
}

const FIGURES: &[Figure] = &[
    figure(
        "swap_in_bandwidth",
        "GB/s",
        From::Speed("swap_ms"),
        Some((From::Speed("bare_copy_ms"), "bare pinned copy")),
        Target::AtLeast(0.97),
    ),
    Figure {
        counts_outputs: true,
        ..figure(
            "swapped_in_request",
            "ms",
            From::Ours("pipelined_ms"),
            Some((From::Longer("bare_copy_ms", "resident_ms"), "longer of bare copy and resident run")),
            Target::AtMost(1.08),
        )
    },
    figure(
        "swapped_in_request_paced",
        "ms",
        From::Ours("pipelined_ms"),
        Some((
            From::Longer("bare_copy_paced_ms", "resident_paced_ms"),
            "longer of bare copy and resident run, after a pause each",
        )),
        Target::Told,
    ),
    figure(
        "resident_run_to_session",
        "ms",
        From::Ours("program_ms"),
        Some((From::Ours("plain_ms"), "ONNX Runtime CUDA session, bound on the device")),
        Target::AtMost(0.90),
    ),
    figure(
        "resident_run_to_eager",
        "ms",
        From::Ours("program_ms"),
        Some((From::Torch("eager_ms"), "PyTorch eager")),
        Target::AtMost(0.6),
    ),
    figure(
        "resident_run_to_graph",
        "ms",
        From::Ours("program_ms"),
        Some((From::Torch("graph_ms"), "PyTorch CUDA graph")),
        Target::AtMost(1.0),
    ),
    figure(
        "resident_run_to_compiled",
        "ms",
        From::Ours("program_ms"),
        Some((From::Torch("compiled_ms"), "torch.compile")),
        Target::Told,
    ),
    figure(
        "resident_run_to_compiled_graph",
        "ms",
        From::Ours("program_ms"),
        Some((From::Torch("compiled_graph_ms"), "torch.compile, as a CUDA graph")),
        Target::Told,
    ),
    figure(
        "request_to_new_session",
        "ms",
        From::Ours("pipelined_ms"),
        Some((From::Ours("plain_load_ms"), "new ONNX Runtime session and first run")),
        Target::Told,
    ),
    figure(
        "request_to_pinned_load",
        "ms",
        From::Ours("pipelined_ms"),
        Some((From::Torch("load_pinned_ms"), "model.cuda() from pinned memory")),
        Target::Told,
    ),
    figure(
        "request_to_pageable_load",
        "ms",
        From::Ours("pipelined_ms"),
        Some((From::Torch("load_pageable_ms"), "model.cuda() from pageable memory")),
        Target::Told,
    ),
    figure("bind", "ms", From::Ours("bind_ms"), None, Target::Told),
    figure("device_memory_per_function", "MB", From::Megabytes("bind_bytes"), None, Target::AtMost(1.5)),
    figure(
        "device_memory_to_process",
        "MB",
        From::Megabytes("bind_bytes"),
        Some((From::Megabytes("native_bytes"), "a process with a session of ONNX Runtime")),
        Target::AtMost(1.0 / 300.0),
    ),
];

/// Most device memory of a function whose session is kept, in MB.
const KEPT_SESSION_MB_MAX: f64 = 12.0;

/// One record, complete.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Record {
    pub(crate) figure: String,
    /// `all` where it is not about one.
    pub(crate) model: String,
    /// `both` where it is not about one.
    pub(crate) dtype: String,
    pub(crate) unit: &'static str,
    pub(crate) ours: f64,
    pub(crate) reference: Option<(f64, &'static str)>,
    pub(crate) target: Target,
    pub(crate) outputs_checked: u64,
    pub(crate) outputs_wrong: u64,
}

impl Record {
    /// A figure of the model `name-dtype`, or of all models where there is no dtype.
    pub(crate) fn of(
        figure: &str,
        name: &str,
        (ours, unit): (f64, &'static str),
        reference: Option<(f64, &'static str)>,
        target: Target,
    ) -> Self {
        let (model, dtype) = name.rsplit_once('-').unwrap_or((name, "both"));
        let (figure, model, dtype) = (figure.to_owned(), model.to_owned(), dtype.to_owned());
        Self { figure, model, dtype, unit, ours, reference, target, outputs_checked: 0, outputs_wrong: 0 }
    }

    /// With outputs that were compared for it.
    pub(crate) fn counting(self, outputs_checked: u64, outputs_wrong: u64) -> Self {
        Self { outputs_checked, outputs_wrong, ..self }
    }

    fn json(&self, device: &str) -> Value {
        let target = match self.target {
            Target::AtMost(most) => json!({"at_most": most}),
            Target::AtLeast(least) => json!({"at_least": least}),
            Target::Told => Value::Null,
        };
        json!({
            "figure": self.figure, "model": self.model, "dtype": self.dtype, "unit": self.unit, "ours": self.ours,
            "reference": self.reference.map(|(value, _)| value),
            "reference_name": self.reference.map(|(_, name)| name),
            "ratio": self.reference.map(|(value, _)| self.ours / value),
            "target": target, "outputs_checked": self.outputs_checked, "outputs_wrong": self.outputs_wrong,
            "device": device,
        })
    }
}

/// Records in a file, which is whole after each of them: what ends this process costs what was not measured yet.
#[derive(Debug)]
pub(crate) struct Records {
    file: PathBuf,
    device: String,
    done: Vec<Value>,
}

impl Records {
    /// Of one subcommand, measured on a device of this name.
    pub(crate) fn new(out: &Path, subcommand: &str, device: String) -> Result<Self> {
        let folder = out.join("records");
        fs::create_dir_all(&folder)?;
        Ok(Self { file: folder.join(format!("{subcommand}.json")), device, done: Vec::new() })
    }

    /// Adds what was measured; what was not, as where nothing was asked, is no number and no record.
    pub(crate) fn add(&mut self, records: &[Record]) -> Result<()> {
        let measured = records.iter().filter(|record| record.ours.is_finite());
        self.done.extend(measured.map(|record| record.json(&self.device)));
        let draft = self.file.with_extension("draft");
        fs::write(&draft, serde_json::to_vec_pretty(&self.done)?)?;
        Ok(fs::rename(&draft, &self.file)?)
    }
}

/// The records of one model, by what was measured of it (`figures.rs`) and of PyTorch (`export.py`). A figure of which
/// one side is missing is left out.
pub(crate) fn of_model(name: &str, measured: &Value, torch: &Value) -> Vec<Record> {
    let (model, dtype) = name.rsplit_once('-').unwrap_or((name, "unknown"));
    let number = |from: From| -> Option<f64> {
        let ours = |key: &str| measured[key].as_f64();
        let found = match from {
            From::Ours(key) => ours(key),
            From::Torch(key) => torch[key].as_f64(),
            From::Longer(one, other) => Some(ours(one)?.max(ours(other)?)),
            From::Speed(key) => Some(ours("bytes")? / 1e6 / ours(key)?),
            From::Megabytes(key) => Some(ours(key)? / 1e6),
        };
        found.filter(|value| value.is_finite())
    };
    let count = |figure: &Figure, key: &str| measured[key].as_u64().filter(|_| figure.counts_outputs).unwrap_or(0);
    let record = |figure: &Figure| {
        let reference = match figure.reference {
            Some((from, name)) => Some((number(from).filter(|value| *value > 0.0)?, name)),
            None => None,
        };
        let kept = !measured["kept"].is_null() && figure.name == "device_memory_per_function";
        Some(Record {
            figure: figure.name.to_owned(),
            model: model.to_owned(),
            dtype: dtype.to_owned(),
            unit: figure.unit,
            ours: number(figure.ours)?,
            reference,
            target: if kept { Target::AtMost(KEPT_SESSION_MB_MAX) } else { figure.target },
            outputs_checked: count(figure, "outputs_checked"),
            outputs_wrong: count(figure, "outputs_wrong"),
        })
    };
    FIGURES.iter().filter_map(record).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn measured() -> Value {
        json!({"bytes": 50e6, "swap_ms": 1.25, "bare_copy_ms": 1.0, "resident_ms": 2.0, "pipelined_ms": 2.1,
               "program_ms": 1.8, "plain_ms": 2.4, "plain_load_ms": 250.0, "bind_ms": 30.0, "bind_bytes": 700_000.0, "native_bytes": 700_000_000,
               "kept": null, "outputs_checked": 56, "outputs_wrong": 1})
    }

    fn find(records: &[Record], figure: &str) -> Value {
        records.iter().find(|record| record.figure == figure).unwrap().json("H100")
    }

    #[test]
    fn a_model_gives_a_record_per_figure_each_beside_its_reference() {
        let records =
            of_model("resnet50-fp16", &measured(), &json!({"eager_ms": 3.6, "graph_ms": 2.0, "compiled_ms": null}));
        let speed = find(&records, "swap_in_bandwidth");
        assert_eq!((speed["ours"].as_f64(), speed["reference"].as_f64()), (Some(40.0), Some(50.0)));
        assert_eq!((speed["ratio"].as_f64(), &speed["target"]["at_least"]), (Some(0.8), &json!(0.97)));
        let request = find(&records, "swapped_in_request");
        assert_eq!(request["reference"], 2.0, "the longer of 1.0 and 2.0");
        assert_eq!(
            (&request["model"], &request["dtype"], &request["device"]),
            (&json!("resnet50"), &json!("fp16"), &json!("H100"))
        );
        assert_eq!(find(&records, "resident_run_to_eager")["ratio"], 0.5);
        assert_eq!(find(&records, "device_memory_to_process")["ratio"], 0.001);
        assert!(records.iter().all(|record| !record.figure.contains("compiled")), "it could not be compiled");
        let memory = find(&records, "device_memory_per_function");
        assert_eq!(
            (&memory["ours"], &memory["reference"], &memory["ratio"]),
            (&json!(0.7), &Value::Null, &Value::Null)
        );
    }

    #[test]
    fn outputs_are_counted_once() {
        let records = of_model("resnet50-fp16", &measured(), &json!({"eager_ms": 3.6}));
        assert_eq!(records.iter().map(|record| record.outputs_checked).sum::<u64>(), 56);
        assert_eq!(records.iter().map(|record| record.outputs_wrong).sum::<u64>(), 1);
    }

    #[test]
    fn a_figure_without_its_reference_is_left_out() {
        let records = of_model("bert_large-fp32", &measured(), &Value::Null);
        assert!(records.iter().all(|record| !record.figure.contains("eager")), "{records:?}");
        let zero = of_model("bert_large-fp32", &measured(), &json!({"eager_ms": 0.0}));
        assert_eq!(zero, records, "nothing is divided by nothing");
        let broken = of_model("bert_large-fp32", &json!({"pipelined_ms": null}), &json!({"eager_ms": 3.0}));
        assert_eq!(broken, []);
    }

    #[test]
    fn a_function_that_keeps_its_session_may_take_more() {
        let mut measured = measured();
        measured["kept"] = json!("cuDNN made kernels");
        let records = of_model("efficientnet_b0-fp16", &measured, &Value::Null);
        assert_eq!(find(&records, "device_memory_per_function")["target"], json!({"at_most": 12.0}));
    }

    #[test]
    fn the_file_is_whole_after_each_addition() {
        let out = std::env::temp_dir().join(format!("faaswap-records-{}", std::process::id()));
        let mut records = Records::new(&out, "figures", "H100".to_owned()).unwrap();
        for n in 1..=2 {
            records.add(&of_model("a-fp32", &measured(), &Value::Null)).unwrap();
            let text = fs::read(out.join("records/figures.json")).unwrap();
            let all: Vec<Value> = serde_json::from_slice(&text).unwrap();
            assert_eq!(all.len(), n * of_model("a-fp32", &measured(), &Value::Null).len());
        }
        fs::remove_dir_all(&out).unwrap();
    }
}
