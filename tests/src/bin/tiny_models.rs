//! `faaswap-tiny-models FOLDER`: small models for a dry run of what else needs GPUs, see `make density`.

use std::{path::PathBuf, process::ExitCode};

use faaswap_tests::models;

fn main() -> ExitCode {
    let Some(folder) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: faaswap-tiny-models FOLDER");
        return ExitCode::FAILURE;
    };
    match models::write_tiny(&folder) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("faaswap-tiny-models: {error}");
            ExitCode::FAILURE
        }
    }
}
