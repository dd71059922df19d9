//! `outbus sinks`

use outbox::Sink;
use serde::Serialize;

use crate::{
    cli::{Format, SinksCommand},
    config::Config,
    failure::Failure,
    output::{self, Table},
};

#[derive(Serialize)]
struct Sinks {
    sinks: Vec<SinkEntry>,
}

#[derive(Serialize)]
struct SinkEntry {
    log: String,
    sink: String,
    topics: Vec<String>,
    bus: Option<String>,
    low: u64,
    owner: Option<String>,
}

#[derive(Serialize)]
struct Removed<'a> {
    removed: &'a str,
}

impl From<Sink> for SinkEntry {
    fn from(sink: Sink) -> Self {
        let Sink { log, sink, topics, bus, low, owner } = sink;
        Self { log, sink, topics, bus, low: low.0, owner }
    }
}

pub(super) async fn run(config: &Config, command: SinksCommand, format: Format) -> Result<(), Failure> {
    match command {
        SinksCommand::List(args) => {
            let admin = config.database(args.database.as_deref())?.admin().await?;
            let sinks = admin.sinks().await?.into_iter().map(SinkEntry::from).collect();
            output::result(format, &Sinks { sinks }, text)?;
        }
        SinksCommand::Remove { database, sink } => {
            let admin = config.database(database.database.as_deref())?.admin().await?;
            admin.remove_sink(&sink).await.map_err(|error| match error.kind() {
                // The name is right or wrong at this moment: no matter of configuration.
                outbox::LogErrorKind::Invalid => Failure::runtime("sink", error.to_string()),
                _ => error.into(),
            })?;
            output::result(format, &Removed { removed: &sink }, |_| format!("sink {sink} is removed"))?;
        }
    }
    Ok(())
}

fn text(sinks: &Sinks) -> String {
    let mut table = Table::new(&["log", "sink", "topics", "bus", "settled to", "owner"]);
    for sink in &sinks.sinks {
        let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
        table.row(vec![
            sink.log.clone(),
            sink.sink.clone(),
            sink.topics.join(" "),
            or_none(&sink.bus),
            sink.low.to_string(),
            or_none(&sink.owner),
        ]);
    }
    table.render()
}
