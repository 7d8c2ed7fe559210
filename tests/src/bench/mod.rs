//! `faaswap-bench`: the figures of the README, each measured beside its reference in the same run, every output checked.
//!
//! What is compared alternates, so that what disturbs the machine disturbs both; medians are reported. It never fails
//! for a slow figure, only for a wrong output: whether a figure is good enough is for people to judge.

mod admission;
mod batching;
mod cold;
pub mod echo;
mod fronts;
mod idle;
mod overhead;
mod resident;
mod service;
mod swaps;

use std::{fs, path::Path, time::Duration};

use serde_json::{Map, Value, json};

use crate::{Result, Trouble, cache, process, stats};

/// Figures by name, and outputs that were not what they should be.
#[derive(Debug, Default)]
pub struct Figures {
    values: Map<String, Value>,
    wrong: u64,
    checked: u64,
}

impl Figures {
    fn set(&mut self, name: &str, value: f64) {
        self.values.insert(name.to_owned(), json!((value * 1e4).round() / 1e4));
    }

    fn check(&mut self, right: bool) {
        self.checked += 1;
        self.wrong += u64::from(!right);
    }
}

/// Which parts to run; all where none is named.
pub fn run(parts: &[String]) -> Result<()> {
    type Part = fn(&mut Figures) -> Result<()>;
    const PARTS: [(&str, Part); 9] = [
        ("swaps", swaps::run),
        ("resident", resident::run),
        ("overhead", overhead::run),
        ("batching", batching::run),
        ("requests", idle::many_requests),
        ("idle", idle::idle_functions),
        ("fronts", fronts::run),
        ("admission", admission::run),
        ("cold", cold::run),
    ];
    if let Some(unknown) = parts.iter().find(|part| PARTS.iter().all(|(name, _)| name != part)) {
        let names: Vec<_> = PARTS.iter().map(|(name, _)| *name).collect();
        return Err(Trouble::new(format!("there is no part {unknown}; there are {}", names.join(", "))));
    }
    process::end_together()?;
    let mut figures = Figures::default();
    for (name, part) in PARTS {
        if parts.is_empty() || parts.iter().any(|wanted| wanted == name) {
            part(&mut figures)?;
        }
    }
    let (wrong, checked) = (figures.wrong, figures.checked);
    figures.values.insert("wrong_outputs".to_owned(), json!(wrong));
    figures.values.insert("checked_outputs".to_owned(), json!(checked));
    let path = cache::root().join("target/bench/summary.json");
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(&path, serde_json::to_string_pretty(&figures.values)?)?;
    println!("\n{checked} outputs checked, {wrong} wrong; figures in {}", show(&path));
    if wrong > 0 { Err(Trouble::new(format!("{wrong} outputs were wrong"))) } else { Ok(()) }
}

fn show(path: &Path) -> String {
    path.strip_prefix(cache::root()).unwrap_or(path).display().to_string()
}

/// The median in milliseconds.
fn p50(times: &mut [Duration]) -> f64 {
    stats::percentile(times, 50).map_or(f64::NAN, stats::ms)
}

/// The 98th percentile in milliseconds.
fn p98(times: &mut [Duration]) -> f64 {
    stats::percentile(times, 98).map_or(f64::NAN, stats::ms)
}

fn title(text: &str) {
    println!("\n{text}");
}
