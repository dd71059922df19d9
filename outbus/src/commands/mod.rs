//! One command per file.

mod append;
mod dead;
mod demo;
mod migrate;
mod relay;
mod sinks;
mod status;

use crate::{
    cli::{Cli, Command},
    config::Config,
    failure::Failure,
};

/// Runs the command that was asked for.
pub(crate) async fn run(cli: Cli) -> Result<(), Failure> {
    let format = cli.output;
    if let Command::Demo(args) = cli.command {
        return demo::run(args, format).await;
    }
    let config = Config::load(cli.config.as_deref())?;
    match cli.command {
        Command::Demo(_) => Ok(()),
        Command::Migrate(args) => migrate::run(&config, &args, format).await,
        Command::Append(args) => append::run(&config, &args, format).await,
        Command::Relay(args) => relay::run(&config, &args, format).await,
        Command::Status(args) => status::run(&config, &args, format).await,
        Command::Dead(command) => dead::run(&config, command, format).await,
        Command::Sinks(command) => sinks::run(&config, command, format).await,
    }
}
