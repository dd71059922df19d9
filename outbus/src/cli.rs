//! What can be said on the command line.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use bus_core::url_options::parse_duration;
use clap::{
    Args, Parser, Subcommand, ValueEnum,
    error::{ContextKind, ContextValue},
};
use outbox::SPAN_MAX;

use crate::failure::{self, Failure};

/// Commands that a later build has.
const LATER: [&str; 8] = ["publish", "consume", "topics", "groups", "pause", "resume", "replay", "config"];

/// Carries domain events from a service's database to other services.
#[derive(Debug, Parser)]
#[command(
    name = "outbus",
    version,
    max_term_width = 110,
    after_help = "\
Exit status: 0 done, 1 failed at run time, 2 wrong usage or configuration.
Start with `outbus demo`: the whole road in one process, without any server."
)]
pub(crate) struct Cli {
    /// How results are written: for people, or as JSON for scripts. Logs and errors go to stderr.
    #[arg(long, global = true, value_enum, default_value_t = Format::Text, value_name = "FORMAT")]
    pub(crate) output: Format,

    /// Configuration file; else $OUTBUS_CONFIG, else ./outbus.toml if it exists.
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Runs the whole road in one process: SQLite, relay, in-memory bus, two consumer groups.
    #[command(after_help = "\
Examples:
  outbus demo
  outbus demo --events 100000 --kill-relay
  outbus demo --file examples/orders.jsonl --database sqlite:shop.db")]
    Demo(DemoArgs),
    /// Creates the outbox's tables, or brings them up to date.
    #[command(after_help = "\
Examples:
  outbus migrate --database sqlite:shop.db
  outbus migrate --database sqlite:shop.db --print > outbox.sql")]
    Migrate(MigrateArgs),
    /// Appends events, one JSON object a line, to the outbox.
    #[command(after_help = "\
Each line is a CloudEvent with `topic` and `type`; see `partitionkey` for events that keep their order.
Examples:
  outbus append --database sqlite:shop.db --file orders.jsonl
  echo '{\"topic\":\"orders\",\"type\":\"order.placed\",\"data\":{\"total\":5}}' | outbus append --database sqlite:shop.db")]
    Append(AppendArgs),
    /// Publishes what is in the outbox, until it is told to stop.
    #[command(after_help = "\
Examples:
  outbus relay --database sqlite:shop.db --bus file:///var/events
  outbus relay --config outbus.toml
  outbus relay --database sqlite:shop.db --bus file:///var/events --once")]
    Relay(RelayArgs),
    /// Shows how far each sink is.
    #[command(after_help = "Example:\n  outbus status --database sqlite:shop.db --output json")]
    Status(DatabaseArgs),
    /// Lists, shows, retries or discards events that were set aside.
    #[command(subcommand)]
    Dead(DeadCommand),
    /// Lists or removes the sinks that read the outbox.
    #[command(subcommand)]
    Sinks(SinksCommand),
}

#[derive(Debug, Args)]
pub(crate) struct DatabaseArgs {
    /// The database: postgres://user:password@host/database, sqlite:relative.db or sqlite:///absolute.db; else $OUTBUS_DATABASE_URL, else from the configuration.
    #[arg(long, value_name = "URL")]
    pub(crate) database: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// How many events the order service commits.
    #[arg(long, default_value_t = 20_000, value_name = "N", conflicts_with = "file",
          value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    pub(crate) events: u64,
    /// Commits the events of this file, one JSON object a line, instead.
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// Uses this SQLite file, and keeps it; without it a temporary one is used.
    #[arg(long, value_name = "URL")]
    pub(crate) database: Option<String>,
    /// Kills and restarts the relay at random moments.
    #[arg(long)]
    pub(crate) kill_relay: bool,
    /// Makes the random choices those of an earlier run.
    #[arg(long, value_name = "SEED")]
    pub(crate) seed: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct MigrateArgs {
    #[command(flatten)]
    pub(crate) database: DatabaseArgs,
    /// Prints the SQL instead of running it.
    #[arg(long)]
    pub(crate) print: bool,
}

#[derive(Debug, Args)]
pub(crate) struct AppendArgs {
    #[command(flatten)]
    pub(crate) database: DatabaseArgs,
    #[command(flatten)]
    pub(crate) input: InputArgs,
    /// Events of one transaction, at most; one of 32 MiB, or that waits for input, is committed as it is.
    #[arg(long, default_value_t = 1_000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) per_tx: u32,
}

#[derive(Debug, Args)]
pub(crate) struct InputArgs {
    /// Reads the events from this file; `-` is standard input, which is the default.
    #[arg(long, value_name = "FILE", conflicts_with = "stdin")]
    pub(crate) file: Option<PathBuf>,
    /// `-`: reads the events from standard input.
    #[arg(value_name = "-", value_parser = only_stdin)]
    pub(crate) stdin: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct RelayArgs {
    #[command(flatten)]
    pub(crate) database: DatabaseArgs,
    /// The bus: file:///folder; else $OUTBUS_BUS_URL, else from the configuration.
    #[arg(long, value_name = "URL")]
    pub(crate) bus: Option<String>,
    /// Ends when everything committed before the start is settled.
    #[arg(long)]
    pub(crate) once: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DeadCommand {
    /// Lists events that were set aside, with reason and error.
    #[command(after_help = "Example:\n  outbus dead list --database sqlite:shop.db --reason too_large")]
    List(DeadListArgs),
    /// Shows events that were set aside whole, data included.
    #[command(after_help = "Example:\n  outbus dead show --database sqlite:shop.db 019a-...")]
    Show(DeadSelection),
    /// Asks the relay to publish set-aside events again: a parked key from its first event on, in order.
    #[command(after_help = "\
Examples:
  outbus dead retry --database sqlite:shop.db --all --rate 100/s
  outbus dead retry --database sqlite:shop.db 019a-... 019b-...")]
    Retry(DeadRetryArgs),
    /// Removes set-aside events for good.
    #[command(after_help = "Example:\n  outbus dead discard --database sqlite:shop.db --reason invalid")]
    Discard(DeadDiscardArgs),
}

#[derive(Debug, Args)]
pub(crate) struct DeadListArgs {
    #[command(flatten)]
    pub(crate) database: DatabaseArgs,
    /// Only those with this reason: attempts, behind, invalid, refused, too_large.
    #[arg(long, value_name = "REASON")]
    pub(crate) reason: Option<String>,
    /// Only those of this sink.
    #[arg(long, value_name = "SINK")]
    pub(crate) sink: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct DeadSelection {
    #[command(flatten)]
    pub(crate) database: DatabaseArgs,
    /// Ids of the events.
    #[arg(value_name = "IDS", conflicts_with = "all")]
    pub(crate) ids: Vec<String>,
    /// All of them.
    #[arg(long)]
    pub(crate) all: bool,
    /// Only those with this reason: attempts, behind, invalid, refused, too_large.
    #[arg(long, value_name = "REASON")]
    pub(crate) reason: Option<String>,
    /// Only those of this sink.
    #[arg(long, value_name = "SINK")]
    pub(crate) sink: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct DeadRetryArgs {
    #[command(flatten)]
    pub(crate) selection: DeadSelection,
    /// At most so many a second, written 100/s.
    #[arg(long, value_name = "N/s", value_parser = parse_rate)]
    pub(crate) rate: Option<u32>,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DeadDiscardArgs {
    #[command(flatten)]
    pub(crate) selection: DeadSelection,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
}

#[derive(Debug, Args)]
pub(crate) struct WaitArgs {
    /// How long to wait for the relay to do it: a day at most.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_wait)]
    pub(crate) wait: Duration,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SinksCommand {
    /// Lists the sinks that read the outbox.
    List(DatabaseArgs),
    /// Forgets a sink and what it set aside: its events may be removed then.
    Remove {
        #[command(flatten)]
        database: DatabaseArgs,
        /// The sink's name.
        #[arg(value_name = "SINK")]
        sink: String,
    },
}

/// Answers a command line that is none, or asks for help.
pub(crate) fn refused(error: &clap::Error) -> ExitCode {
    let args: Vec<String> = std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect();
    let is_json = args.iter().any(|arg| arg == "--output=json")
        || args.windows(2).any(|pair| pair[0] == "--output" && pair[1] == "json");
    let format = if is_json { Format::Json } else { Format::Text };
    if let Some(ContextValue::String(command)) = error.get(ContextKind::InvalidSubcommand)
        && LATER.contains(&command.as_str())
    {
        return failure::report(&Failure::usage("not_yet", format!("`{command}` is not in this build yet")), format);
    }
    if error.use_stderr() && is_json {
        let text = error.to_string();
        let problem = text.split("\n\n").next().unwrap_or_default();
        return failure::report(&Failure::usage("usage", problem.trim_start_matches("error: ")), format);
    }
    // Nobody can be told if that fails.
    let _ = error.print();
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

fn only_stdin(text: &str) -> Result<String, String> {
    match text {
        "-" => Ok(text.to_owned()),
        _ => Err("a file is named with --file".to_owned()),
    }
}

fn parse_rate(text: &str) -> Result<u32, String> {
    let number = text.strip_suffix("/s").and_then(|number| number.parse().ok()).filter(|rate| *rate > 0);
    number.ok_or_else(|| "a rate is written 100/s".to_owned())
}

fn parse_wait(text: &str) -> Result<Duration, String> {
    let time = parse_duration(text).ok_or("a time is written with its unit: 500ms, 10s, 5m, 1h, 1d")?;
    if time <= SPAN_MAX { Ok(time) } else { Err("a day, 1d, is the longest".to_owned()) }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn rates_and_times_have_units() {
        assert_eq!(parse_rate("100/s"), Ok(100));
        assert!(parse_rate("100").is_err() && parse_rate("0/s").is_err());
        assert_eq!(parse_wait("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(parse_wait("1d"), Ok(Duration::from_secs(86_400)));
        assert!(parse_wait("5").is_err() && parse_wait("2d").is_err());
    }
}
