//! `faaswap-broker`: see the library's `cli`.

use std::process::ExitCode;

fn main() -> ExitCode {
    faaswap_broker::cli::run(std::env::args_os())
}
