//! The sidecar's program: arguments, log, signals and exit codes. What it does is in `app`.

use std::{io::IsTerminal, path::PathBuf, process::ExitCode};

use clap::Parser;
use faaswap_sidecar::{
    app,
    config::{LogFormat, Settings, Start},
    limits::BLOCKING_THREADS_MAX,
    watchdog,
};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Where Kubernetes tells a pod its namespace, unless it is told to keep its account's token out of it.
const NAMESPACE_FILE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/namespace";
/// `EX_USAGE` of sysexits.h: the configuration is wrong, so starting again does not help.
const EXIT_USAGE: u8 = 64;

/// Serves one function over the Open Inference Protocol and hands its requests to the node's broker.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Configuration file in TOML; FAASWAP_ variables win over it.
    #[arg(long, env = "FAASWAP_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Checks the configuration and ends.
    #[arg(long)]
    check: bool,
    /// Says by the exit code whether the lock file of a front is there, as `fwatchdog -run-healthcheck` does.
    #[arg(long)]
    run_healthcheck: bool,
    /// The handler to start behind the sidecar, which then is the function's front, as of-watchdog would be.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            // To a closed terminal nothing can be said.
            let _unheard = error.print();
            return if error.use_stderr() { ExitCode::from(EXIT_USAGE) } else { ExitCode::SUCCESS };
        }
    };
    if args.run_healthcheck {
        return if watchdog::lock::path().exists() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let variables = std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)));
    let namespace = std::fs::read_to_string(NAMESPACE_FILE).ok();
    let start = Start { command: args.command, variables: variables.collect(), folder: None, namespace };
    let settings = match Settings::load(args.config.as_deref(), &start) {
        Ok(settings) => settings,
        Err(error) => {
            eprintln!("faaswap-sidecar: {error}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    if args.check {
        return ExitCode::SUCCESS;
    }
    start_log(&settings);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(BLOCKING_THREADS_MAX).build();
    let outcome = match runtime {
        Ok(runtime) => runtime.block_on(serve(settings)),
        Err(error) => Err(error.to_string()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "the sidecar ends");
            ExitCode::FAILURE
        }
    }
}

async fn serve(settings: Settings) -> Result<(), String> {
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).map_err(|error| error.to_string())?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|error| error.to_string())?;
    tokio::spawn({
        let stop = stop.clone();
        async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            stop.cancel();
        }
    });
    app::run(settings, stop).await.map_err(|error| error.to_string())
}

fn start_log(settings: &Settings) {
    let filter = tracing_subscriber::EnvFilter::new(&settings.log);
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match settings.log_format {
        LogFormat::Json => log.json().init(),
        LogFormat::Text => log.with_ansi(std::io::stderr().is_terminal()).init(),
    }
    for key in &settings.ignored {
        tracing::warn!(variable = %format_args!("FAASWAP_{}", key.to_uppercase()), "variable means nothing to the sidecar");
    }
}
