//! `faaswap-gpu`: conformance and figures on a real GPU, every output checked. `tests/gpu/run` calls it.
//!
//!     faaswap-gpu conform                    the suite that every device passes
//!     faaswap-gpu figures MODELS OUT         each model's swaps and runs beside their references
//!     faaswap-gpu stress MODELS OUT          many functions under constant eviction, in lanes
//!     faaswap-gpu lanes MODELS OUT           requests per second by how many run at once
//!     faaswap-gpu peers MODELS OUT           weights from one GPU to the other
//!     faaswap-gpu fault MODELS               a kernel that traps, and the GPU used again
//!     faaswap-gpu links OUT                  each link alone and together, and what NVML sees
//!     faaswap-gpu tiers OUT                  weights from disk, alone and while they are swapped in
//!     faaswap-gpu prepare                    one job, from standard input, in a process of its own

mod conform;
mod fault;
mod figures;
mod links;
mod many;
mod model;
mod peers;
mod record;
mod stats;
mod tiers;

use std::{error::Error, process::ExitCode};

const USAGE: &str = "usage: faaswap-gpu conform | figures MODELS OUT | stress MODELS OUT | lanes MODELS OUT | \
                     peers MODELS OUT | fault MODELS | links OUT | tiers OUT | prepare";

/// Functions of all prepared models in turn, on less memory than the weights take; shorter where variables say so.
fn stress_plan() -> many::Plan {
    let number =
        |name: &str, default: u64| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    many::Plan {
        functions: usize::try_from(number("FAASWAP_GPU_FUNCTIONS", 200)).unwrap_or(200),
        seconds: number("FAASWAP_GPU_SECONDS", 60),
        memory: faaswap_protocol::Bytes::mib(number("FAASWAP_GPU_STRESS_MIB", 12 << 10)),
        threads: 6,
    }
}

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
        ["stress", models, out] => many::stress(models.as_ref(), out.as_ref(), stress_plan()),
        ["lanes", models, out] => many::lanes(models.as_ref(), out.as_ref(), &["resnet50-fp32", "bert_large-fp32"], 3),
        ["peers", models, out] => peers::run(models.as_ref(), out.as_ref(), &["resnet50-fp32", "bert_large-fp32"]),
        ["fault", models] => fault::run(models.as_ref(), "resnet50-fp32"),
        ["one", models, name] => fault::one(models.as_ref(), name),
        ["links", out] => links::run(out.as_ref()),
        ["tiers", out] => tiers::run(out.as_ref()),
        ["prepare"] => model::prepare_from_stdin(),
        _ => Err(USAGE.into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("faaswap-gpu: {error}");
            ExitCode::FAILURE
        }
    }
}
