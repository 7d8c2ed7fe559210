//! `faaswap-gpu`: conformance and figures on a real GPU, every output checked. `tests/gpu/run` calls it.
//!
//!     faaswap-gpu conform                    the suite that every device passes
//!     faaswap-gpu figures MODELS OUT         each model's swaps and runs beside their references
//!     faaswap-gpu stress MODELS OUT          many functions under constant eviction, in lanes
//!     faaswap-gpu lanes MODELS OUT           requests per second by how many run at once
//!     faaswap-gpu fault MODELS               a kernel that traps, and the GPU used again
//!     faaswap-gpu prepare                    one job, from standard input, in a process of its own

mod conform;
mod fault;
mod figures;
mod many;
mod model;
mod random;
mod stats;

use std::{error::Error, process::ExitCode};

/// Functions of all prepared models in turn, on less memory than the weights take.
const STRESS: many::Plan =
    many::Plan { functions: 200, seconds: 60, memory: faaswap_protocol::Bytes::mib(12 << 10), threads: 6 };

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
        ["stress", models, out] => many::stress(models.as_ref(), out.as_ref(), STRESS),
        ["lanes", models, out] => many::lanes(models.as_ref(), out.as_ref(), &["resnet50-fp32", "bert_large-fp32"], 3),
        ["fault", models] => fault::run(models.as_ref(), "resnet50-fp32"),
        ["prepare"] => model::prepare_from_stdin(),
        _ => Err("usage: faaswap-gpu conform | figures MODELS OUT | stress MODELS OUT | lanes MODELS OUT | fault MODELS | prepare".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("faaswap-gpu: {error}");
            ExitCode::FAILURE
        }
    }
}
