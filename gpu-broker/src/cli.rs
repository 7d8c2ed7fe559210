//! What `faaswap-broker` is told, and does: `serve` runs the broker of this node.
//!
//! In the library, so that another program can be the broker too: the GPU tests are one program.

use std::{
    ffi::OsString,
    io::IsTerminal,
    os::{fd::AsFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{Command as Exec, ExitCode},
    time::Duration,
};

use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::{EnvFilter, fmt};

use crate::{
    config::Settings,
    device_plugin::{self, PluginSettings},
    devices::probe,
    limits::BLOCKING_THREADS_MAX,
    replay,
    serve::{self, End},
    store,
};

/// Counts, for itself, how often the broker has started anew because its devices had failed.
const STARTS: &str = "FAASWAP_STARTED_ANEW";
/// How much longer each new start waits.
const START_PAUSE: Duration = Duration::from_secs(1);
/// Longest that one waits.
const START_PAUSE_MAX: Duration = Duration::from_secs(30);
/// The configuration is wrong: EX_USAGE of sysexits.h.
const EXIT_CONFIG: u8 = 64;
/// What shall be replayed is no trace: EX_DATAERR.
const EXIT_DATA: u8 = 65;

#[derive(Parser)]
#[command(version, about = "Lets many inference functions share a node's GPUs")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serves sidecars until SIGTERM or SIGINT.
    Serve {
        /// Settings in TOML; FAASWAP_ variables win over it.
        #[arg(long, env = "FAASWAP_BROKER_CONFIG")]
        config: Option<PathBuf>,
        /// Checks the settings and ends.
        #[arg(long)]
        check: bool,
    },
    /// Replays a trace that a broker has recorded, and tells whether the scheduler decides the same again.
    Replay {
        /// The trace: what `trace` in the settings named.
        trace: PathBuf,
    },
    /// Tells the kubelet of this node's slots, until SIGTERM or SIGINT.
    DevicePlugin(PluginSettings),
    /// Prepares one model; started by the broker itself.
    #[command(hide = true)]
    Prepare,
    /// Has one device for a broker, which starts it and is at the other end of its standard input.
    #[command(hide = true)]
    Worker,
    /// Measures the links of GPUs; started by the broker itself.
    #[command(hide = true)]
    ProbeLinks {
        /// The GPUs, by the driver's count.
        ordinals: Vec<u32>,
    },
}

/// Does what the arguments say; the first of them is the program's name.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let result = match Cli::parse_from(arguments).command {
        Command::Serve { config, check } => return serve_command(config.as_deref(), check),
        Command::Replay { trace } => return replay_command(&trace),
        Command::DevicePlugin(settings) => {
            log_to_stderr("info");
            plugin(settings).map_err(|error| error.to_string())
        }
        Command::Prepare => {
            log_to_stderr("warn");
            store::child()
        }
        Command::Worker => {
            log_to_stderr("info");
            die_with_the_first_panic();
            let socket = std::io::stdin().as_fd().try_clone_to_owned();
            socket.and_then(faaswap_worker::run).map_err(|error| error.to_string())
        }
        Command::ProbeLinks { ordinals } => {
            log_to_stderr("warn");
            probe::child(&ordinals)
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn serve_command(config: Option<&Path>, check: bool) -> ExitCode {
    log_to_stderr("info");
    let settings = match Settings::load(config) {
        Ok(settings) => settings,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(EXIT_CONFIG);
        }
    };
    if check {
        println!("the configuration is valid");
        return ExitCode::SUCCESS;
    }
    die_with_the_first_panic();
    match serve_until_told(settings) {
        Ok(End::Asked) => ExitCode::SUCCESS,
        Ok(End::Anew) => {
            eprintln!("the broker cannot start anew: {}", start_anew());
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("the broker cannot serve: {error}");
            ExitCode::FAILURE
        }
    }
}

fn replay_command(trace: &Path) -> ExitCode {
    match replay::replay(trace) {
        Ok(replayed) => {
            println!("{replayed}");
            if replayed.is_same() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("{}: {error}", trace.display());
            ExitCode::from(EXIT_DATA)
        }
    }
}

/// Replaces this process by a new one of the same program, with the same arguments; returns only where that fails.
/// Weights are still in host memory and prepared models on disk. Devices that fail again and again are given time.
fn start_anew() -> std::io::Error {
    let starts = std::env::var(STARTS).ok().and_then(|text| text.parse::<u32>().ok()).unwrap_or(0).saturating_add(1);
    let pause = START_PAUSE.saturating_mul(starts - 1).min(START_PAUSE_MAX);
    tracing::error!(starts, ?pause, "starting anew to have lost devices back");
    std::thread::sleep(pause);
    match std::env::current_exe() {
        Ok(program) => Exec::new(program).args(std::env::args_os().skip(1)).env(STARTS, starts.to_string()).exec(),
        Err(error) => error,
    }
}

fn serve_until_told(settings: Settings) -> Result<End, Box<dyn std::error::Error>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .build()?;
    let program = std::env::current_exe()?;
    runtime.block_on(async {
        let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let stop = async move {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
        };
        Ok(serve::serve(settings, program, stop).await?)
    })
}

fn plugin(settings: PluginSettings) -> std::io::Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let stop = CancellationToken::new();
        let told = async {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
            stop.cancel();
        };
        tokio::join!(device_plugin::run(settings, stop.clone()), told);
        Ok(())
    })
}

/// A panic is a bug, and what it leaves behind is not to be trusted: a restart is quick, wrong answers are not.
fn die_with_the_first_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        std::process::abort();
    }));
}

fn log_to_stderr(default: &str) {
    let filter = EnvFilter::try_from_env("FAASWAP_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let colours = std::io::stderr().is_terminal();
    fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
}
