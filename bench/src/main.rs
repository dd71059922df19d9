//! The road beside its raw twin: interleaved in one run, so that whatever else the machine does meets both.
//!
//! Each target is one line of JSON: `{"id", "ours", "twin", "ratio", "spread", "target", "met"}`; see `README.md`.

#![allow(clippy::print_stdout, reason = "results go to stdout")]

mod pairs;
mod noting;
mod process;
mod road;
mod link;
mod relay_memory;
mod relay_postgres;
mod business;
mod wal;
mod cpu;
mod backlog;
mod wake;
mod child;
mod takeover;

use anyhow::bail;
use clap::{Parser, Subcommand};
use pairs::Measured;

/// What can be measured.
const IDS: [&str; 19] = [
    "R1",
    "R1-postgres",
    "R5",
    "R5-link",
    "R6",
    "R6-batch",
    "R7",
    "R7-janitor",
    "R8",
    "R10",
    "R11",
    "R11-dead",
    "R11-memory",
    "R13-cpu",
    "R13-wake-process",
    "R13-wake-postgres",
    "R13-wake-sqlite",
    "R14-kill",
    "R14-term",
];

/// Measures the road against its raw twin.
#[derive(Debug, Parser)]
#[command(name = "bench", args_conflicts_with_subcommands = true, disable_help_subcommand = true)]
struct Bench {
    #[command(subcommand)]
    child: Option<Child>,
    /// Fewer events and pairs: to see that it runs, not for figures.
    #[arg(long)]
    quick: bool,
    /// Only these targets, by id; `R13` is all whose ids begin with `R13-`.
    #[arg(value_name = "ID")]
    ids: Vec<String>,
    /// `text` or `json`.
    #[arg(long, default_value = "text", value_parser = ["text", "json"])]
    output: String,
}

#[derive(Debug, Subcommand)]
enum Child {
    /// A relay in a process of its own, for the targets that need one.
    #[command(hide = true)]
    ChildRelay(child::Args),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let bench = Bench::parse();
    if let Some(Child::ChildRelay(args)) = &bench.child {
        return child::relay(args).await;
    }
    if let Some(unknown) = bench.ids.iter().find(|wanted| !IDS.iter().any(|id| is_wanted(id, wanted))) {
        bail!("there is no target `{unknown}`; there are {}", IDS.join(", "));
    }
    for id in IDS {
        if bench.ids.is_empty() || bench.ids.iter().any(|wanted| is_wanted(id, wanted)) {
            measure(id, bench.quick).await?.print(bench.output == "json")?;
        }
    }
    Ok(())
}

/// Whether it is the one that is wanted, or one of its parts.
fn is_wanted(id: &str, wanted: &str) -> bool {
    id.strip_prefix(wanted).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

async fn measure(id: &str, quick: bool) -> anyhow::Result<Measured> {
    match id {
        "R1" => relay_memory::run(quick).await,
        "R1-postgres" => relay_postgres::throughput(quick).await,
        "R5" => business::over_loopback(quick).await,
        "R5-link" => business::over_a_slow_link(quick).await,
        "R6" => wal::of_an_append(quick).await,
        "R6-batch" => wal::of_a_batch(quick).await,
        "R7" => wal::of_the_relay(quick).await,
        "R7-janitor" => wal::of_the_janitor(quick).await,
        "R8" => cpu::of_the_database(quick).await,
        "R10" => relay_postgres::beside_an_open_transaction(quick).await,
        "R11" => backlog::rate(quick).await,
        "R11-dead" => backlog::dead_rows(quick).await,
        "R11-memory" => backlog::memory(quick).await,
        "R13-cpu" => cpu::of_an_idle_relay(quick).await,
        "R13-wake-process" => wake::in_the_process(quick).await,
        "R13-wake-postgres" => wake::across_processes(quick).await,
        "R13-wake-sqlite" => wake::on_sqlite(quick).await,
        "R14-kill" => takeover::after_kill(quick).await,
        "R14-term" => takeover::after_term(quick).await,
        _ => bail!("there is no target `{id}`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_named_whole_or_by_its_first_part() {
        assert!(is_wanted("R13-wake-process", "R13") && is_wanted("R13-wake-process", "R13-wake"));
        assert!(is_wanted("R1", "R1") && is_wanted("R1-postgres", "R1"));
        assert!(!is_wanted("R13-cpu", "R1") && !is_wanted("R1", "R1-postgres"));
    }
}
