//! `faaswap-gpu`: conformance and figures on a real GPU, every output checked. `tests/gpu/run` calls it.
//!
//!     faaswap-gpu conform                    the suite that every device passes
//!     faaswap-gpu figures MODELS OUT         each model's swaps and runs beside their references
//!     faaswap-gpu links OUT                  each link alone and together, and what NVML sees
//!     faaswap-gpu tiers OUT                  weights from disk, alone and while they are swapped in
//!     faaswap-gpu prepare                    one job, from standard input, in a process of its own

mod conform;
mod figures;
mod links;
mod model;
mod record;
mod stats;
mod tiers;

use std::{error::Error, process::ExitCode};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> ExitCode {
    let filter =
        tracing_subscriber::EnvFilter::try_from_env("FAASWAP_LOG").unwrap_or_else(|_| "warn,onnxruntime=error".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args[..] {
        ["conform"] => conform::run(),
        ["figures", models, out] => figures::run(models.as_ref(), out.as_ref()),
        ["links", out] => links::run(out.as_ref()),
        ["tiers", out] => tiers::run(out.as_ref()),
        ["prepare"] => model::prepare_from_stdin(),
        _ => Err("usage: faaswap-gpu conform | figures MODELS OUT | links OUT | tiers OUT | prepare".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("faaswap-gpu: {error}");
            ExitCode::FAILURE
        }
    }
}
