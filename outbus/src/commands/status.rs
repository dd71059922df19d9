//! `outbus status`

use std::time::Duration;

use outbox::SinkStatus;
use serde::Serialize;

use crate::{
    cli::{DatabaseArgs, Format},
    config::Config,
    failure::Failure,
    output::{self, Table, seconds, span},
};

#[derive(Serialize)]
struct Status {
    logs: Vec<LogStatus>,
}

#[derive(Serialize)]
struct LogStatus {
    log: String,
    sink: Option<String>,
    backlog: u64,
    backlog_exact: bool,
    oldest_age_seconds: Option<f64>,
    low: u64,
    high: u64,
    holes: u64,
    owner: Option<String>,
    epoch: u64,
    lease_seconds_left: Option<f64>,
    blocked_keys: u64,
    blocked_topics: Vec<String>,
    parked: u64,
    dead: u64,
    unclaimed: u64,
    /// The oldest transaction that may keep gaps open.
    oldest_transaction: Option<OldestTransaction>,
}

#[derive(Serialize)]
struct OldestTransaction {
    pid: i32,
    age_seconds: f64,
}

impl From<SinkStatus> for LogStatus {
    fn from(status: SinkStatus) -> Self {
        Self {
            log: status.log,
            sink: status.sink,
            backlog: status.backlog,
            backlog_exact: status.backlog_exact,
            oldest_age_seconds: status.oldest_age.map(seconds),
            low: status.low.0,
            high: status.high.0,
            holes: status.holes,
            owner: status.owner,
            epoch: status.epoch,
            lease_seconds_left: status.lease_remaining.map(seconds),
            blocked_keys: status.blocked.keys,
            blocked_topics: status.blocked.topics,
            parked: status.parked,
            dead: status.dead,
            unclaimed: status.unclaimed,
            oldest_transaction: status
                .oldest_transaction
                .map(|oldest| OldestTransaction { pid: oldest.pid, age_seconds: seconds(oldest.age) }),
        }
    }
}

pub(super) async fn run(config: &Config, args: &DatabaseArgs, format: Format) -> Result<(), Failure> {
    let admin = config.database(args.database.as_deref())?.admin().await?;
    let logs = admin.status().await?.into_iter().map(LogStatus::from).collect();
    output::result(format, &Status { logs }, text)?;
    Ok(())
}

fn text(status: &Status) -> String {
    let head = ["log", "sink", "backlog", "oldest", "owner", "lease", "parked", "dead", "blocked", "unclaimed"];
    let mut table = Table::new(&head);
    for log in &status.logs {
        let none = || "-".to_owned();
        let age = |seconds: Option<f64>| seconds.map_or_else(none, |seconds| span(Duration::from_secs_f64(seconds)));
        let mut blocked: Vec<String> = log.blocked_topics.iter().map(|topic| format!("topic {topic}")).collect();
        if log.blocked_keys > 0 {
            blocked.insert(0, format!("{} keys", log.blocked_keys));
        }
        table.row(vec![
            log.log.clone(),
            log.sink.clone().unwrap_or_else(none),
            format!("{}{}", if log.backlog_exact { "" } else { "over " }, log.backlog),
            age(log.oldest_age_seconds),
            log.owner.clone().unwrap_or_else(none),
            age(log.lease_seconds_left),
            log.parked.to_string(),
            log.dead.to_string(),
            if blocked.is_empty() { none() } else { blocked.join(", ") },
            log.unclaimed.to_string(),
        ]);
    }
    let mut text = table.render();
    for log in &status.logs {
        if let Some(OldestTransaction { pid, age_seconds }) = &log.oldest_transaction {
            let age = span(Duration::from_secs_f64(*age_seconds));
            text += &format!("\nserver process {pid} has written to log {} in a transaction open for {age}", log.log);
        }
    }
    text
}
