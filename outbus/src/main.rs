//! `outbus`: the relay daemon and command line of Outbus.

mod cli;
mod config;
mod output;
mod failure;
mod shutdown;
mod input;
mod database;
mod commands;

use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    let format = cli.output;
    // Logs go to stderr, results to stdout.
    let filter = EnvFilter::try_from_env("OUTBUS_LOG").unwrap_or_else(|_| EnvFilter::new("error"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(output::has_colour())
        .init();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failure::report(&failure::Failure::runtime("runtime", error.to_string()), format),
    };
    let done = runtime.block_on(commands::run(cli));
    // A thread that waits for input is not waited for.
    runtime.shutdown_background();
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure::report(&failure, format),
    }
}
