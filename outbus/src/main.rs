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

use crate::{cli::Cli, failure::Failure};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return cli::refused(&error),
    };
    let format = cli.output;
    if let Err(failure) = start_logging() {
        return failure::report(&failure, format);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failure::report(&Failure::runtime("runtime", error.to_string()), format),
    };
    let done = runtime.block_on(commands::run(cli));
    // A thread that waits for input is not waited for.
    runtime.shutdown_background();
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure::report(&failure, format),
    }
}

/// Logs go to stderr, results to stdout.
fn start_logging() -> Result<(), Failure> {
    let filter = config::variable("OUTBUS_LOG").unwrap_or_else(|| "error".to_owned());
    let filter = EnvFilter::try_new(&filter).map_err(|error| {
        let message = format!("OUTBUS_LOG is `{filter}`: {error}; a filter is written info or outbox=debug,error");
        Failure::usage("log_filter", message)
    })?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(output::has_colour())
        .init();
    Ok(())
}
