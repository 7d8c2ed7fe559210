//! Real processes: the experiments that are for GPUs, on host devices, for a few seconds. No figure is judged here.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use faaswap_tests::{cache, models, process::temporary_folder};
use serde_json::Value;
use tempfile::TempDir;

const FUNCTIONS: u64 = 12;

/// Runs one of the experiments with small models on two host devices; gives its folder and what it has said.
fn run(experiment: &str, more: &[&str]) -> (TempDir, PathBuf, String) {
    let folder = temporary_folder(&std::env::temp_dir()).unwrap();
    let (given, out) = (folder.path().join("models"), folder.path().join("out"));
    models::write_tiny(&given).unwrap();
    let output = Command::new(cache::program("faaswap-gpu").unwrap())
        .arg(experiment)
        .args([&given, &out])
        .args(["--host", "2", "--memory-mib", "16", "--functions", &FUNCTIONS.to_string(), "--rate", "8", "--root"])
        .arg(folder.path())
        .args(more)
        .env("ORT_DYLIB_PATH", cache::onnxruntime().unwrap())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    (folder, out, said)
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn functions_under_load_on_two_devices_answer_right_or_are_refused() {
    let (_folder, out, said) = run("density", &["--seconds", "4", "--steps", "0", "--policy", "faaswap,lru"]);
    let found = json(&out.join("density.json"));
    assert_eq!(found["outputs_wrong"], 0, "{said}");
    let policies = found["policies"].as_array().unwrap();
    assert_eq!(policies.len(), 2);
    for policy in policies {
        assert_eq!(policy["registered"], FUNCTIONS, "{said}");
        assert_eq!(policy["answers_alike"], 0, "each function has weights of its own: {said}");
        let step = &policy["steps"][0];
        assert!(step["outputs_checked"].as_u64().unwrap() > 0, "{said}");
        assert_eq!((&step["failed"], &step["outputs_wrong"]), (&0.into(), &0.into()), "{said}");
    }
    let records = json(&out.join("records/density.json"));
    let named = |record: &Value| record["figure"] == "density_requests" && record["model"] == "faaswap";
    assert!(records.as_array().unwrap().iter().any(named), "{records}");
}

#[test]
fn one_device_and_both_serve_the_same_functions_one_after_the_other() {
    // What one device carries is what the other is compared with, so no request may be late, however slow the machine is.
    let (_folder, out, said) = run("scale", &["--seconds", "3", "--steps", "0", "--deadline-ms", "60000"]);
    let found = json(&out.join("scale.json"));
    assert_eq!((&found["outputs_wrong"], &found["functions"]), (&0.into(), &FUNCTIONS.into()), "{said}");
    let by_devices = found["by_devices"].as_array().unwrap();
    assert_eq!(by_devices.iter().map(|of| of["devices"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2]);
    for of in by_devices {
        assert!(of["steps"][0]["outputs_checked"].as_u64().unwrap() > 0, "{said}");
        assert_eq!(of["steps"][0]["failed"], 0, "{said}");
    }
    let records = json(&out.join("records/scale.json"));
    let both = records.as_array().unwrap().iter().find(|record| record["model"] == "2 devices").unwrap();
    assert_eq!(
        (&both["figure"], &both["reference_name"]),
        (&"scale_requests".into(), &"one device".into()),
        "{records}"
    );
}

#[test]
fn a_device_that_fails_under_load_stays_away_until_there_is_nothing_to_do() {
    let (_folder, out, said) = run("lose", &["--seconds", "14"]);
    let found = json(&out.join("lose.json"));
    assert_eq!((&found["outputs_wrong"], &found["step"]["failed"]), (&0.into(), &0.into()), "{said}");
    // Requests kept coming, so the broker did not start anew to have it back.
    assert_eq!((&found["devices"][0]["lost"], &found["devices"][1]["lost"]), (&true.into(), &false.into()), "{found}");
}
