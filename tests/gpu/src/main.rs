//! `faaswap-gpu`: conformance and figures on a real GPU, every output checked. `tests/gpu/run` calls it.
//!
//!     faaswap-gpu conform                    the suite that every device passes
//!     faaswap-gpu figures MODELS OUT         each model's swaps and runs beside their references
//!     faaswap-gpu stress MODELS OUT          many functions under constant eviction, in lanes
//!     faaswap-gpu lanes MODELS OUT           requests per second by how many run at once
//!     faaswap-gpu kinds MODELS OUT           models bound by their kind, and by a session each
//!     faaswap-gpu peers MODELS OUT           weights from one GPU to the other
//!     faaswap-gpu fault MODELS               a kernel that traps, and the GPU used again
//!     faaswap-gpu links OUT                  each link alone and together, and what NVML sees
//!     faaswap-gpu tiers OUT                  weights from disk, alone and while they are swapped in
//!     faaswap-gpu open MODELS OUT            a model with an open batch
//!     faaswap-gpu density MODELS OUT         many functions on a whole broker, at rising rates
//!     faaswap-gpu scale MODELS OUT           the same with one device, two, and more, each with the same functions
//!     faaswap-gpu soak MODELS OUT            the same at one rate, and what memory was taken meanwhile
//!     faaswap-gpu front MODELS OUT           what a sidecar and the broker add to what the device takes
//!     faaswap-gpu lose MODELS OUT            one device fails under load
//!     faaswap-gpu tiny-models MODELS         small models, for dry runs without a GPU
//!     faaswap-gpu prepare-model              one job, from standard input, in a process of its own
//!     faaswap-gpu broker ...                 the broker itself, with its own arguments; and `prepare`, `worker` and `probe-links`, which it starts
//!
//! `density` and those below it take `--name value` pairs, or variables such as FAASWAP_NODE_SECONDS: see `node/options.rs`. With
//! `--host N` it runs on N host devices.

mod conform;
mod fault;
mod figures;
mod in_slab;
mod kinds;
mod lanes;
mod links;
mod many;
mod model;
mod native;
mod node;
mod open;
mod peers;
mod prepared;
mod record;
mod stats;
mod stress;
mod tiers;

use std::{error::Error, process::ExitCode};

const USAGE: &str = "usage: faaswap-gpu conform | figures MODELS OUT | stress MODELS OUT | lanes MODELS OUT | kinds MODELS OUT | \
                     peers MODELS OUT | fault MODELS | links OUT | tiers OUT | open MODELS OUT | front MODELS OUT | lose MODELS OUT | \
                     density MODELS OUT | scale MODELS OUT | soak MODELS OUT | tiny-models MODELS | prepare-model | \
                     broker";

/// Functions of all prepared models in turn, on less memory than the weights take; shorter where variables say so.
fn stress_plan() -> stress::Plan {
    let number =
        |name: &str, default: u64| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    stress::Plan {
        functions: usize::try_from(number("FAASWAP_GPU_FUNCTIONS", 200)).unwrap_or(200),
        seconds: number("FAASWAP_GPU_SECONDS", 60),
        memory: faaswap_protocol::Bytes::mib(number("FAASWAP_GPU_STRESS_MIB", 12 << 10)),
        threads: 6,
    }
}

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// What this program is when it is started as the broker, or by the broker.
fn as_broker(args: &[String]) -> Option<ExitCode> {
    let theirs = match args.first().map(String::as_str) {
        Some("broker") => &args[1..],
        Some("prepare" | "worker" | "probe-links") => args,
        Some(_) | None => return None,
    };
    // Without whoever has started it, nobody needs it. A worker notices by itself; it would be told when the thread ends that began it.
    if args[0] != "worker"
        && let Err(error) = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))
    {
        eprintln!("faaswap-gpu: {error}");
    }
    let name = std::iter::once("faaswap-gpu broker".into());
    Some(faaswap_broker::cli::run(name.chain(theirs.iter().map(Into::into))))
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let Some(code) = as_broker(&args) {
        return code;
    }
    let filter =
        tracing_subscriber::EnvFilter::try_from_env("FAASWAP_LOG").unwrap_or_else(|_| "warn,onnxruntime=error".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args[..] {
        ["conform"] => conform::run(),
        ["figures", models, out] => figures::run(models.as_ref(), out.as_ref()),
        ["stress", models, out] => stress::run(models.as_ref(), out.as_ref(), stress_plan()),
        ["lanes", models, out] => lanes::run(models.as_ref(), out.as_ref(), &["resnet50-fp32", "bert_large-fp32"], 3),
        ["kinds", models, out] => kinds::run(models.as_ref(), out.as_ref()),
        ["peers", models, out] => peers::run(models.as_ref(), out.as_ref(), &["bert_large-fp32", "resnet50-fp32"]),
        ["fault", models] => fault::run(models.as_ref(), "resnet50-fp32"),
        ["one", models, name] => fault::one(models.as_ref(), name),
        ["beside", models, name, how] => fault::beside(models.as_ref(), name, how),
        [native::COMMAND, graph, prepared] => native::stay(graph.as_ref(), prepared.as_ref()),
        ["links", out] => links::run(out.as_ref()),
        ["open", models, out] => open::run(models.as_ref(), out.as_ref(), "resnet50"),
        ["tiers", out] => tiers::run(out.as_ref()),
        ["prepare-model"] => model::prepare_from_stdin(),
        ["tiny-models", models] => faaswap_tests::models::write_tiny(models.as_ref()).map_err(Into::into),
        ["density", models, out, ref more @ ..] => {
            node::Options::read(models.as_ref(), out.as_ref(), more).and_then(node::density::run)
        }
        ["scale", models, out, ref more @ ..] => {
            node::Options::read(models.as_ref(), out.as_ref(), more).and_then(node::scale::run)
        }
        ["soak", models, out, ref more @ ..] => {
            node::Options::read(models.as_ref(), out.as_ref(), more).and_then(node::soak::run)
        }
        ["front", models, out, ref more @ ..] => {
            node::Options::read(models.as_ref(), out.as_ref(), more).and_then(|options| node::front::run(&options))
        }
        ["lose", models, out, ref more @ ..] => {
            node::Options::read(models.as_ref(), out.as_ref(), more).and_then(node::lose::run)
        }
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
