//! `faaswap-bench`: measures the figures of the README; see the library's `bench`.

use std::{net::SocketAddr, process::ExitCode};

use clap::Parser;
use faaswap_tests::bench;

/// Measures the figures of the README, each beside its reference. Needs release builds: `make bench`.
#[derive(Debug, Parser)]
struct Args {
    /// Parts to run: swaps, resident, overhead, batching, requests, idle, fronts, admission, cold. All where none is named.
    parts: Vec<String>,
    /// Serves as the handler behind a front instead.
    #[arg(long, hide = true, value_name = "ADDRESS")]
    echo: Option<SocketAddr>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let outcome = args.echo.map_or_else(|| bench::run(&args.parts), bench::echo::serve);
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the benchmark failed: {error}");
            ExitCode::FAILURE
        }
    }
}
