//! `faaswap-demo`: shows FaaSwap at work and checks every answer; see the library's `demo`.

use std::process::ExitCode;

use clap::Parser;
use faaswap_tests::demo;

/// Many functions with real models share two host devices that hold less than half of their weights.
#[derive(Debug, Parser)]
struct Args {
    /// How long requests are sent, in seconds.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Where all chance comes from: arrivals replay from it.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match demo::run(demo::Options { seconds: args.seconds, seed: args.seed }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the demo failed: {error}");
            ExitCode::FAILURE
        }
    }
}
