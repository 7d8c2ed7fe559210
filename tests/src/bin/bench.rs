//! `faaswap-bench`: measures the figures of the README; see the library's `bench`.

use std::process::ExitCode;

use clap::Parser;
use faaswap_tests::bench;

/// Measures the figures of the README, each beside its reference. Needs release builds: `make bench`.
#[derive(Debug, Parser)]
struct Args {
    /// Parts to run: swaps, resident, overhead, requests, idle. All where none is named.
    parts: Vec<String>,
}

fn main() -> ExitCode {
    match bench::run(&Args::parse().parts) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the benchmark failed: {error}");
            ExitCode::FAILURE
        }
    }
}
