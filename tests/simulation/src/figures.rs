//! Costs of models as they were measured on a GPU: what `faaswap-gpu figures` has written.

use faaswap_protocol::Bytes;
use serde_json::Value;

use crate::catalog::{MS, ModelSpec, Nanos};

/// Deadlines of the published evaluation; the longer one is BERT's.
const DEADLINE: Nanos = 80 * MS;
const DEADLINE_OF_BERT: Nanos = 200 * MS;
/// Slow-down per run beside it, which `figures` does not measure: on an H100 four ResNet-50s at once did 2.17 times the requests of
/// one, and four BERT-larges 1.35 times (`four_lanes` in `tests/gpu/results/two-h100.json`).
pub const STRAIN: f64 = 0.28;
/// That of BERT.
pub const STRAIN_OF_BERT: f64 = 0.65;

/// Models of one GPU, and its link.
#[derive(Clone, Debug)]
pub struct Measured {
    /// The models, each in its faster layout.
    pub models: Vec<ModelSpec>,
    /// Bytes a second over the host link alone, as the largest model's weights went.
    pub link: u64,
}

/// Reads the models whose names end with this, such as `-fp32`; `None` where there are none.
pub fn measured(figures: &Value, ending: &str) -> Option<Measured> {
    let mut best: std::collections::BTreeMap<&str, &Value> = std::collections::BTreeMap::new();
    for record in figures["records"].as_array()? {
        let (name, values) = (record["model"].as_str()?, &record["measured"]);
        let run = |values: &Value| values["resident_ms"].as_f64().unwrap_or(f64::INFINITY);
        if name.ends_with(ending) && best.get(name).is_none_or(|known| run(values) < run(known)) {
            best.insert(name, values);
        }
    }
    let models = best.iter().filter_map(|(name, values)| model(name, values)).collect::<Vec<_>>();
    let largest = best.values().max_by(|a, b| bytes(a).total_cmp(&bytes(b)))?;
    let speed = bytes(largest) / (largest["swap_ms"].as_f64()? / 1e3);
    (!models.is_empty()).then_some(Measured { models, link: whole(speed) })
}

fn bytes(values: &Value) -> f64 {
    values["bytes"].as_f64().unwrap_or(0.0)
}

fn model(name: &str, values: &Value) -> Option<ModelSpec> {
    let ms = |key: &str| values[key].as_f64().filter(|ms| ms.is_finite() && *ms >= 0.0);
    let (run, copy, both) = (ms("resident_ms")?, ms("swap_ms")?, ms("pipelined_ms")?);
    let is_bert = name.starts_with("bert");
    Some(ModelSpec {
        // A few names for as long as the process lives.
        name: name.to_owned().leak(),
        weights: Bytes::new(whole(bytes(values))),
        run: whole(run * 1e6),
        tail: whole((both - run.max(copy)).max(0.0) * 1e6),
        strain: if is_bert { STRAIN_OF_BERT } else { STRAIN },
        deadline: if is_bert { DEADLINE_OF_BERT } else { DEADLINE },
    })
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "measured: positive and below 2^53")]
fn whole(number: f64) -> u64 {
    number as u64
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_faster_layout_of_each_model_is_taken() {
        let one = |model: &str, resident: f64, bytes: f64| json!({"model": model, "measured": {"resident_ms": resident, "swap_ms": 2.0, "pipelined_ms": 2.5, "bytes": bytes}});
        let figures = json!({"records": [one("a-fp32", 3.0, 100e6), one("a-fp32", 1.0, 100e6), one("bert-fp32", 4.0, 9e6),
                                         one("a-fp16", 9.0, 50e6)]});
        let found = measured(&figures, "-fp32").unwrap();
        assert_eq!(found.link, 50_000_000_000);
        let [a, bert] = &found.models[..] else { panic!("{found:?}") };
        assert_eq!((a.name, a.run, a.tail, a.deadline), ("a-fp32", MS, MS / 2, 80 * MS));
        assert_eq!((bert.run, bert.tail, bert.deadline), (4 * MS, 0, 200 * MS));
        assert!(measured(&figures, "-bf16").is_none() && measured(&json!({}), "").is_none());
    }
}
