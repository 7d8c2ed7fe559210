//! Keeps the rules of ARCHITECTURE.md that a compiler cannot: floors, fences, licences, and prose that must not go stale.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

/// Which of our crates each of them may import. A new edge is a change of architecture: write it there too.
const FLOORS: &[(&str, &[&str])] = &[
    ("faaswap-protocol", &[]),
    ("faaswap-slab", &["faaswap-protocol"]),
    ("faaswap-scheduler", &["faaswap-protocol"]),
    ("faaswap-device", &["faaswap-protocol"]),
    ("faaswap-engine", &["faaswap-protocol", "faaswap-slab", "faaswap-device"]),
    ("faaswap-worker", &["faaswap-protocol", "faaswap-slab", "faaswap-device", "faaswap-engine"]),
    ("faaswap-sidecar", &["faaswap-protocol", "faaswap-slab"]),
    ("faaswap-injector", &[]),
    (
        "faaswap-broker",
        &[
            "faaswap-protocol",
            "faaswap-slab",
            "faaswap-scheduler",
            "faaswap-device",
            "faaswap-engine",
            "faaswap-worker",
        ],
    ),
    ("faaswap-simulation", &["faaswap-protocol", "faaswap-scheduler"]),
    (
        "faaswap-gpu-tests",
        &[
            "faaswap-protocol",
            "faaswap-slab",
            "faaswap-scheduler",
            "faaswap-device",
            "faaswap-engine",
            "faaswap-broker",
            "faaswap-sidecar",
            "faaswap-simulation",
            "faaswap-tests",
        ],
    ),
    (
        "faaswap-tests",
        &[
            "faaswap-protocol",
            "faaswap-slab",
            "faaswap-scheduler",
            "faaswap-device",
            "faaswap-engine",
            "faaswap-broker",
            "faaswap-sidecar",
            "faaswap-simulation",
        ],
    ),
];

/// Crates that touch hardware or a runtime, and the only ones of ours that may name them.
const WRAPPERS: &[(&str, &[&str])] = &[
    ("ort", &["faaswap-engine", "faaswap-tests"]),
    ("cudarc", &["faaswap-device"]),
    ("nvml-wrapper", &["faaswap-device"]),
];

/// The pure crates: what they may depend on outside of ours.
const PURE: &[(&str, &[&str])] =
    &[("faaswap-protocol", &["postcard", "serde", "sha2", "thiserror"]), ("faaswap-scheduler", &[])];

/// Where `unsafe` may stand.
const FENCES: &[&str] = &["gpu-broker/slab/", "gpu-broker/device/", "gpu-broker/engine/src/raw"];

const LICENCES: &[&str] = &[
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Zlib",
];

/// Longest file of ours. Most are a quarter of it.
const FILE_LINES_MAX: usize = 500;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace").to_owned()
}

fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(root())
        .output()
        .expect("cargo metadata runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON")
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

/// Our packages with the names of their normal and build dependencies.
fn ours(metadata: &Value) -> BTreeMap<String, BTreeSet<String>> {
    let members: BTreeSet<_> =
        metadata["workspace_members"].as_array().expect("members").iter().filter_map(Value::as_str).collect();
    let packages = metadata["packages"].as_array().expect("packages");
    packages
        .iter()
        .filter(|package| members.contains(text(package, "id")))
        .map(|package| {
            let deps = package["dependencies"].as_array().expect("dependencies").iter();
            let deps = deps.filter(|dep| text(dep, "kind") != "dev" && text(dep, "kind") != "build");
            (text(package, "name").to_owned(), deps.map(|dep| text(dep, "name").to_owned()).collect())
        })
        .collect()
}

fn files(extension: &str) -> Vec<(String, String)> {
    let output =
        Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output().expect("git lists our files");
    let names = String::from_utf8(output.stdout).expect("our file names are UTF-8");
    let ours = names.split('\0').filter(|name| name.ends_with(extension));
    ours.filter_map(|name| Some((name.to_owned(), fs::read_to_string(root().join(name)).ok()?))).collect()
}

fn without_comments(source: &str) -> String {
    source.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

#[test]
fn every_crate_imports_only_floors_below_it() {
    let ours = ours(&metadata());
    assert_eq!(ours.len(), FLOORS.len(), "a crate is missing in FLOORS");
    for (name, allowed) in FLOORS {
        let imports = ours[*name].iter().filter(|dep| dep.starts_with("faaswap-"));
        let beyond: Vec<_> = imports.filter(|dep| !allowed.contains(&dep.as_str())).collect();
        assert!(beyond.is_empty(), "{name} imports {beyond:?}");
    }
}

#[test]
fn one_crate_each_speaks_to_the_hardware_and_the_runtime() {
    let ours = ours(&metadata());
    for (outside, allowed) in WRAPPERS {
        for (name, deps) in &ours {
            assert!(!deps.contains(*outside) || allowed.contains(&name.as_str()), "{name} depends on {outside}");
        }
    }
}

#[test]
fn the_pure_crates_stay_pure() {
    let ours = ours(&metadata());
    for (name, allowed) in PURE {
        let outside = ours[*name].iter().filter(|dep| !dep.starts_with("faaswap-"));
        let beyond: Vec<_> = outside.filter(|dep| !allowed.contains(&dep.as_str())).collect();
        assert!(beyond.is_empty(), "{name} depends on {beyond:?}");
    }
}

#[test]
fn every_dependency_has_a_licence_that_we_allow() {
    let metadata = metadata();
    for package in metadata["packages"].as_array().expect("packages") {
        let licence = text(package, "license").replace('/', " OR ");
        let any_of: Vec<_> = licence.split(" OR ").map(|one| one.trim_matches(['(', ')', ' '])).collect();
        let allowed = |all: &&str| all.split(" AND ").all(|one| LICENCES.contains(&one.trim_matches(['(', ')', ' '])));
        assert!(any_of.iter().any(allowed), "{} {}: {licence:?}", text(package, "name"), text(package, "version"));
    }
}

#[test]
fn unsafe_code_stands_in_the_fences_only() {
    for (name, source) in files(".rs") {
        let code = without_comments(&source);
        let has_unsafe = code.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "unsafe");
        let fenced = FENCES.iter().any(|fence| name.starts_with(fence));
        assert!(!has_unsafe || fenced || name == file!(), "{name} holds unsafe code");
    }
}

#[test]
fn no_message_can_name_a_gpu() {
    for (name, source) in files(".rs") {
        if name.starts_with("gpu-broker/protocol/src/") {
            let code = without_comments(&source).to_lowercase();
            for word in ["gpu", "cuda", "device"] {
                assert!(!code.contains(word), "{name} says {word:?}");
            }
        }
    }
}

#[test]
fn every_file_says_what_it_is_and_stays_short() {
    for (name, source) in files(".rs") {
        assert!(source.starts_with("//!"), "{name} does not open with what it decides");
        let lines = source.lines().count();
        assert!(lines <= FILE_LINES_MAX, "{name} has {lines} lines: does it hold two things?");
    }
}

#[test]
fn each_invariant_has_one_definition_and_is_explained() {
    let architecture = fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md is there");
    let definitions: Vec<_> = files(".rs")
        .iter()
        .filter(|(name, _)| name.starts_with("gpu-broker/"))
        .flat_map(|(_, source)| source.lines().map(str::trim).map(str::to_owned).collect::<Vec<_>>())
        .filter_map(|line| Some(line.strip_prefix("/// BR-")?.split(':').next()?.to_owned()))
        .collect();
    let distinct: BTreeSet<_> = definitions.iter().collect();
    assert!(!definitions.is_empty() && distinct.len() == definitions.len(), "{definitions:?}");
    for number in distinct {
        assert!(architecture.contains(&format!("BR-{number}")), "ARCHITECTURE.md does not explain BR-{number}");
    }
}

#[test]
fn the_documents_name_only_targets_that_make_has() {
    let makefile = fs::read_to_string(root().join("Makefile")).expect("the Makefile is there");
    for (name, document) in files(".md") {
        for rest in document.split("`make ").skip(1) {
            let target: String = rest.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '-').collect();
            assert!(makefile.contains(&format!("\n{target}:")), "{name} says `make {target}`");
        }
    }
}
