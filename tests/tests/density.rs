//! Real processes: the experiments that are for GPUs, on host devices, for a few seconds. No figure is judged here.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::{fs, process::Command};

use faaswap_tests::{cache, models, process::temporary_folder};
use serde_json::Value;

const FUNCTIONS: u64 = 12;

#[test]
fn functions_under_load_on_two_devices_answer_right_or_are_refused() {
    let folder = temporary_folder(&std::env::temp_dir()).unwrap();
    let (given, out) = (folder.path().join("models"), folder.path().join("out"));
    models::write_tiny(&given).unwrap();
    let output = Command::new(cache::program("faaswap-gpu").unwrap())
        .arg("density")
        .args([&given, &out])
        .args(["--host", "2", "--memory-mib", "16", "--functions", &FUNCTIONS.to_string(), "--seconds", "4"])
        .args(["--rate", "8", "--steps", "0", "--policy", "faaswap,lru", "--root"])
        .arg(folder.path())
        .env("ORT_DYLIB_PATH", cache::onnxruntime().unwrap())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let found: Value = serde_json::from_slice(&fs::read(out.join("density.json")).unwrap()).unwrap();
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
    let records: Vec<Value> = serde_json::from_slice(&fs::read(out.join("records/density.json")).unwrap()).unwrap();
    assert!(records.iter().any(|record| record["figure"] == "density_requests_faaswap"), "{records:?}");
}
