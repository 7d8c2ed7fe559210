//! Reviews as API servers send them, and what becomes of the pods: read the difference when a golden file changes.
//!
//! `BLESS=1 cargo test -p faaswap-injector` writes the files anew. `tests/python` validates the patched pods.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{fs, path::PathBuf};

use base64::{Engine, engine::general_purpose::STANDARD};
use clap::Parser;
use faaswap_injector::{
    review::{Answer, answer},
    settings::Settings,
    telemetry::Telemetry,
};
use serde_json::{Value, json};

const PLATFORMS: [&str; 5] = ["openfaas", "knative", "deployment", "kserve", "fetched"];

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn review(platform: &str) -> Value {
    serde_json::from_slice(&fs::read(golden(&format!("{platform}.review.json"))).unwrap()).unwrap()
}

fn settings(arguments: &[&str]) -> Settings {
    Settings::try_parse_from([&["injector"], arguments].concat()).unwrap()
}

fn ask(review: &Value, settings: &Settings) -> Answer {
    let reply = answer(review.to_string().as_bytes(), settings, &Telemetry::default()).unwrap();
    let reply = serde_json::to_value(reply).unwrap();
    assert_eq!(reply["apiVersion"], "admission.k8s.io/v1");
    assert_eq!(reply.get("request"), None, "the question is not sent back");
    serde_json::from_value(reply["response"].clone()).unwrap()
}

/// The review's pod with the answer's patch applied.
fn patched(review: &Value, answer: &Answer) -> Value {
    let mut pod = review["request"]["object"].clone();
    if let Some(patch) = &answer.patch {
        assert_eq!(answer.patch_type.as_deref(), Some("JSONPatch"));
        let patch: json_patch::Patch = serde_json::from_slice(&STANDARD.decode(patch).unwrap()).unwrap();
        json_patch::patch(&mut pod, &patch).expect("the patch applies");
    }
    pod
}

#[test]
fn pods_of_each_platform_get_what_their_golden_files_show() {
    for platform in PLATFORMS {
        let review = review(platform);
        let answer = ask(&review, &settings(&[]));
        assert!(answer.allowed, "{platform}: {answer:?}");
        assert_eq!(answer.uid, review["request"]["uid"]);
        let pod = patched(&review, &answer);
        let file = golden(&format!("{platform}.pod.json"));
        let text = format!("{}\n", serde_json::to_string_pretty(&pod).unwrap());
        if std::env::var_os("BLESS").is_some() {
            fs::write(&file, &text).unwrap();
        }
        assert_eq!(fs::read_to_string(&file).unwrap_or_default(), text, "{platform}");
    }
}

#[test]
fn a_pod_that_comes_again_is_left_as_it_is() {
    for platform in PLATFORMS {
        let mut review = review(platform);
        for arguments in [&[][..], &["--native-sidecar", "false"]] {
            let once = patched(&review, &ask(&review, &settings(arguments)));
            review["request"]["object"] = once;
            assert_eq!(ask(&review, &settings(arguments)).patch, None, "{platform}");
        }
    }
}

#[test]
fn a_container_that_another_webhook_adds_is_told_of_the_sidecar_too() {
    let mut review = review("deployment");
    let mut pod = patched(&review, &ask(&review, &settings(&[])));
    pod["spec"]["containers"].as_array_mut().unwrap().push(json!({"name": "late", "image": "me/late:1"}));
    review["request"]["object"] = pod;
    let pod = patched(&review, &ask(&review, &settings(&[])));
    assert_eq!(pod["spec"]["containers"][2]["env"][0]["name"], "FAASWAP_SIDECAR_URL");
    assert_eq!(pod["spec"]["initContainers"].as_array().unwrap().len(), 2);
}

#[test]
fn the_sidecar_starts_behind_whatever_fetches_its_model_even_if_that_comes_later() {
    let mut review = review("kserve");
    let fetcher = review["request"]["object"]["spec"]["initContainers"].take();
    let mut pod = patched(&review, &ask(&review, &settings(&[])));
    pod["spec"]["initContainers"].as_array_mut().unwrap().push(fetcher[0].clone());
    review["request"]["object"] = pod;
    let pod = patched(&review, &ask(&review, &settings(&[])));
    let names: Vec<_> = pod["spec"]["initContainers"].as_array().unwrap().iter().map(|one| &one["name"]).collect();
    assert_eq!(names, ["storage-initializer", "faaswap-sidecar"]);
}

#[test]
fn what_the_pod_said_itself_is_kept() {
    let review = review("deployment");
    let pod = patched(&review, &ask(&review, &settings(&[])));
    assert_eq!(
        pod["spec"]["containers"][0]["env"],
        json!([{"name": "FAASWAP_SIDECAR_URL", "value": "http://localhost:9463"}])
    );
    assert_eq!(pod["spec"]["initContainers"][0]["name"], "fetch-model");
    assert_eq!(pod["spec"]["tolerations"][0]["key"], "spot");
}

#[test]
fn an_older_cluster_gets_a_container_that_outlives_knatives_drain() {
    let review = review("knative");
    let pod = patched(&review, &ask(&review, &settings(&["--native-sidecar", "false"])));
    let sidecar = &pod["spec"]["containers"][2];
    assert_eq!((&sidecar["name"], sidecar.get("restartPolicy")), (&json!("faaswap-sidecar"), None));
    assert_eq!(sidecar["lifecycle"]["preStop"]["httpGet"]["path"], "/wait-for-drain");
    assert_eq!(pod["spec"].get("initContainers"), None);
}

#[test]
fn wrong_annotations_are_refused_or_passed_over_as_the_operator_wants() {
    let mut review = review("knative");
    review["request"]["object"]["metadata"]["annotations"]["faaswap.dev/slo-ms"] = "soon".into();
    let denied = ask(&review, &settings(&[]));
    let status = denied.status.unwrap();
    assert_eq!((denied.allowed, status.code, denied.patch), (false, 422, None));
    assert!(status.message.contains("faaswap.dev/slo-ms: 'soon' is not allowed; allowed: whole milliseconds"));
    let passed = ask(&review, &settings(&["--on-mistake", "ignore"]));
    assert_eq!((passed.allowed, passed.patch), (true, None));
    assert!(passed.warnings[0].contains("faaswap.dev/slo-ms"), "{:?}", passed.warnings);
}

#[test]
fn what_a_pod_says_of_tf32_reaches_its_sidecar_or_is_refused_with_what_is_allowed() {
    let mut review = review("deployment");
    let told = |pod: &Value| {
        let mut containers = pod["spec"]["initContainers"].as_array().unwrap().iter();
        let sidecar = containers.find(|one| one["name"] == "faaswap-sidecar").unwrap();
        sidecar["env"].as_array().unwrap().iter().find(|one| one["name"] == "FAASWAP_TF32").cloned()
    };
    let pod = patched(&review, &ask(&review, &settings(&[])));
    assert_eq!(told(&pod), None, "the node's setting holds where nothing is said");
    for value in ["on", "off"] {
        review["request"]["object"]["metadata"]["annotations"]["faaswap.dev/tf32"] = value.into();
        let pod = patched(&review, &ask(&review, &settings(&[])));
        assert_eq!(told(&pod), Some(json!({"name": "FAASWAP_TF32", "value": value})));
    }
    review["request"]["object"]["metadata"]["annotations"]["faaswap.dev/tf32"] = "true".into();
    let denied = ask(&review, &settings(&[]));
    let status = denied.status.unwrap();
    assert_eq!((denied.allowed, status.code, denied.patch), (false, 422, None));
    assert!(status.message.contains("faaswap.dev/tf32: 'true' is not allowed; allowed: on, off"), "{}", status.message);
}

#[test]
fn pods_without_slots_go_where_brokers_are_unless_they_are_everywhere() {
    let review = review("knative");
    let pod = |arguments: &[&str]| patched(&review, &ask(&review, &settings(arguments)));
    assert_eq!(pod(&["--node-selector", "a=b"])["spec"]["nodeSelector"], json!({"a": "b"}));
    assert_eq!(pod(&["--node-selector", "off"])["spec"].get("nodeSelector"), None);
    assert!(Settings::try_parse_from(["injector", "--node-selector", "nonsense"]).is_err());
}

#[test]
fn a_pod_that_asks_for_nothing_is_not_touched() {
    let mut review = review("knative");
    review["request"]["object"]["metadata"]["annotations"] = json!({});
    let untouched = ask(&review, &settings(&[]));
    assert_eq!((untouched.allowed, untouched.patch), (true, None));
}

#[test]
fn what_is_no_review_is_said_to_be_none() {
    let answer = |text: &str| answer(text.as_bytes(), &settings(&[]), &Telemetry::default()).unwrap_err().to_string();
    assert!(answer("{").contains("no AdmissionReview"));
    let old = json!({"apiVersion": "admission.k8s.io/v1beta1", "kind": "AdmissionReview"}).to_string();
    assert!(answer(&old).contains("v1beta1"));
    assert!(answer(&old.replace("v1beta1", "v1")).contains("no request"));
    let mut broken = review("knative");
    broken["request"]["object"]["spec"]["containers"] = json!({"name": "x"});
    let refused = ask(&broken, &settings(&[]));
    assert_eq!(refused.status.unwrap().message, "faaswap: containers is no array");
}
