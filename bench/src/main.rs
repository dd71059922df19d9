//! The road beside its raw twin: interleaved in one run, so that whatever else the machine does meets both.
//!
//! Each target is one line of JSON: `{"id", "ours", "twin", "ratio", "spread", "target", "met"}`; see `README.md`.

#![allow(clippy::print_stdout, reason = "results go to stdout")]

mod pairs;
mod relay_memory;
mod relay_postgres;

use clap::Parser;

/// Measures the road against its raw twin.
#[derive(Debug, Parser)]
#[command(name = "bench")]
struct Bench {
    /// Fewer events and pairs: to see that it runs, not for figures.
    #[arg(long)]
    quick: bool,
    /// Only these targets, by id.
    #[arg(value_name = "ID")]
    ids: Vec<String>,
    /// `text` or `json`.
    #[arg(long, default_value = "text", value_parser = ["text", "json"])]
    output: String,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let bench = Bench::parse();
    let wanted = |id: &str| bench.ids.is_empty() || bench.ids.iter().any(|other| other == id);
    let (quick, json) = (bench.quick, bench.output == "json");
    if wanted("R1") {
        relay_memory::run(quick).await?.print(json)?;
        relay_postgres::throughput(quick).await?.print(json)?;
    }
    if wanted("R7") {
        relay_postgres::written(quick).await?.print(json)?;
    }
    if wanted("R10") {
        relay_postgres::beside_an_open_transaction(quick).await?.print(json)?;
    }
    Ok(())
}
