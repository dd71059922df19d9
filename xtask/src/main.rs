//! `cargo xtask`: the project's own commands, the same on a developer's machine and in CI.

#![allow(clippy::print_stdout, reason = "a command line tool")]

mod checks;
mod mutants;
mod services;
mod shell;
mod tests;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// The project's own commands.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask")]
struct Xtask {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs every test, those included that `cargo test` lists as ignored.
    Test {
        /// Passed on to `cargo test`: a filter, `-p outbox`, ...
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Runs the tests of PostgreSQL against other versions of it, fetched with npm: 14, 16, 17 and 18.
    Postgres {
        /// Only these versions.
        versions: Vec<u32>,
    },
    /// Starts, stops and breaks the servers that tests need: `up`, `down`, `kill postgres`, ...; `help` names all.
    Services {
        /// Passed on to `services/services`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Runs everything that must be green before a change lands.
    Ci,
    /// Breaks the code on purpose, one promise at a time, and sees that its test notices.
    Mutants {
        /// Parts of the names of those to try; all without one.
        names: Vec<String>,
    },
    /// Measures the road against its raw twin; see bench/README.md.
    Bench {
        /// Passed on: `--quick`, `--output json`, ids of targets.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

fn main() -> Result<()> {
    match Xtask::parse().command {
        Command::Test { args } => tests::run(&args),
        Command::Postgres { versions } => tests::postgres(&versions),
        Command::Services { args } => services::run(&args),
        Command::Ci => checks::run(),
        Command::Mutants { names } => mutants::run(&names),
        Command::Bench { args } => {
            let servers = services::start_for_figures()?;
            let environment = servers.as_ref().map(services::Started::environment).unwrap_or_default();
            let run = ["run", "--release", "--quiet", "--package", "bench", "--"];
            let run: Vec<&str> = run.into_iter().chain(args.iter().map(String::as_str)).collect();
            shell::run("cargo", &run, &environment)
        }
    }
}
