//! [`Shop`]: an order service that writes its orders and appends their events in one transaction.

use bus_core::{Event, Seq, SeqSet};
use outbox::{Outbox, SinkStatus, sqlite_error};
use serde_json::json;
use sqlx::{Row as _, Sqlite, SqlitePool, Transaction};
use tokio::sync::mpsc;

use super::SINK;
use crate::{
    database::{Database, DatabaseKind},
    failure::Failure,
    input::{Ahead, Input, Line},
};

const CREATE: &str = "CREATE TABLE IF NOT EXISTS demo_order (id TEXT PRIMARY KEY, version INTEGER NOT NULL)";
const CHANGE: &str = "INSERT INTO demo_order (id, version) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET version = version + ? \
     RETURNING version";
const COMMITTED: &str = "SELECT seq FROM outbus_outbox WHERE seq > ? ORDER BY seq";
const LAST: &str = "SELECT coalesce(max(seq), 0) FROM outbus_outbox";

/// Most events of one transaction.
const EVENTS_PER_TRANSACTION: usize = 8;
/// Of so many transactions one is rolled back.
const ROLLBACK_ONE_IN: u32 = 20;
/// Orders that are open at a time, so that many events have the same key.
const OPEN_ORDERS: u64 = 500;

/// The service and its database.
pub(super) struct Shop {
    pool: SqlitePool,
    outbox: Outbox,
    random: fastrand::Rng,
    /// The last place before the demo began.
    before: Seq,
    pub(super) committed: u64,
    pub(super) transactions: u64,
    pub(super) rolled_back: u64,
}

impl Shop {
    pub(super) async fn open(database: &Database, seed: u64) -> Result<Self, Failure> {
        let DatabaseKind::Sqlite(options) = &database.kind else {
            return Err(Failure::usage("demo_database", "the demo runs on SQLite: name a file, as sqlite:shop.db"));
        };
        let pool = SqlitePool::connect_with((**options).clone().create_if_missing(true)).await.map_err(away)?;
        let outbox = database.sqlite_outbox(pool.clone());
        outbox.migrate().await?;
        check_is_settled(database, &options.get_filename().display().to_string()).await?;
        sqlx::query(CREATE).execute(&pool).await.map_err(away)?;
        let before: i64 = sqlx::query_scalar(LAST).fetch_one(&pool).await.map_err(away)?;
        Ok(Self {
            pool,
            outbox,
            random: fastrand::Rng::with_seed(seed),
            before: Seq(before.unsigned_abs()),
            committed: 0,
            transactions: 0,
            rolled_back: 0,
        })
    }

    pub(super) fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    /// One transaction of made-up orders, of at most `left` events; now and then it is rolled back.
    pub(super) async fn trade(&mut self, left: u64) -> Result<(), Failure> {
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await.map_err(away)?;
        let count = self.random.usize(1..=EVENTS_PER_TRANSACTION).min(usize::try_from(left).unwrap_or(usize::MAX));
        let order = format!("order-{}", self.random.u64(..OPEN_ORDERS));
        let last_version = change(&mut transaction, &order, count).await?;
        let events = (0..count).map(|at| {
            let version = last_version - (count - 1 - at) as i64;
            let happened = if version == 1 { "order.placed" } else { "order.changed" };
            Event::json("orders", happened, &json!({"order": order, "version": version})).map(|event| event.key(&order))
        });
        let events: Result<Vec<_>, _> = events.collect();
        let events = events.map_err(|error| Failure::runtime("demo", error.to_string()))?;
        self.append(&mut transaction, events).await?;
        if self.random.u32(..ROLLBACK_ONE_IN) == 0 {
            self.rolled_back += 1;
            return transaction.rollback().await.map_err(away);
        }
        self.commit(transaction, count as u64).await
    }

    /// One transaction of events that were read from a file.
    pub(super) async fn commit_lines(&mut self, lines: &[Line]) -> Result<(), Failure> {
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await.map_err(away)?;
        for line in lines {
            if let Some(key) = line.event.key() {
                change(&mut transaction, key, 1).await?;
            }
        }
        let first = lines.first().map_or(0, |line| line.number);
        let events: Vec<Event> = lines.iter().map(|line| line.event.clone()).collect();
        self.append(&mut transaction, events).await.map_err(|failure| failure.at_line(first).after(self.committed))?;
        self.commit(transaction, lines.len() as u64).await
    }

    async fn append<E>(&self, transaction: &mut Transaction<'_, Sqlite>, events: Vec<E>) -> Result<(), Failure>
    where
        E: TryInto<Event>,
        E::Error: Into<bus_core::EventError>,
    {
        let appended = self.outbox.append(transaction, events).await;
        appended.map_err(|error| Failure::runtime("append", error.to_string()))
    }

    async fn commit(&mut self, transaction: Transaction<'_, Sqlite>, events: u64) -> Result<(), Failure> {
        transaction.commit().await.map_err(away)?;
        self.outbox.wake();
        self.committed += events;
        self.transactions += 1;
        Ok(())
    }

    /// The truth: the places of the rows that are in the table since the demo began.
    pub(super) async fn committed_seqs(&self) -> Result<SeqSet, Failure> {
        let rows = sqlx::query(COMMITTED).bind(self.before.0 as i64).fetch_all(&self.pool).await.map_err(away)?;
        Ok(rows.iter().map(|row| Seq(row.get::<i64, _>(0).unsigned_abs())).collect())
    }
}

/// Refuses an outbox that others publish, or whose events of before the demo would take for its own.
async fn check_is_settled(database: &Database, file: &str) -> Result<(), Failure> {
    let used = |what: String| Err(Failure::usage("demo_database", format!("{file}: {what}, or name another file")));
    let logs = database.admin().await?.status().await?;
    if let Some(owner) = logs.iter().find_map(|log| log.owner.as_ref()) {
        return used(format!(
            "the relay {owner} publishes this outbox: stop it (a killed one counts until its lease ends)"
        ));
    }
    let is_ours = |log: &&SinkStatus| log.sink.as_deref() == Some(SINK);
    // A sink that is new begins with what no other has settled.
    let unsettled = match logs.iter().find(is_ours) {
        Some(log) => log.backlog.max(log.unclaimed) + log.parked + log.dead,
        None => logs.iter().map(|log| log.backlog.max(log.unclaimed)).max().unwrap_or(0),
    };
    match unsettled {
        0 => Ok(()),
        events => used(format!(
            "{events} events of before are not settled: let `outbus relay --once` publish them, and `outbus dead` say \
             what becomes of those that are set aside"
        )),
    }
}

/// Writes the aggregate: this many changes more; answers its version.
async fn change(transaction: &mut Transaction<'_, Sqlite>, order: &str, changes: usize) -> Result<i64, Failure> {
    let changes = changes as i64;
    let row = sqlx::query(CHANGE).bind(order).bind(changes).bind(changes).fetch_one(&mut **transaction).await;
    Ok(row.map_err(away)?.get(0))
}

/// Where the service's events come from.
pub(super) enum Trade {
    /// Made up, until so many are committed.
    MadeUp(u64),
    /// A file's, in transactions of a few.
    Lines(mpsc::Receiver<Ahead>),
}

impl Trade {
    pub(super) fn new(events: u64, file: Option<std::path::PathBuf>) -> Result<Self, Failure> {
        match file {
            Some(path) => Ok(Self::Lines(Input::File(path).lines()?)),
            None => Ok(Self::MadeUp(events)),
        }
    }

    /// Commits the next transaction; answers the topics of its events, or `None` when nothing is left.
    pub(super) async fn next(&mut self, shop: &mut Shop) -> Result<Option<Vec<String>>, Failure> {
        match self {
            Self::MadeUp(events) => {
                let left = events.saturating_sub(shop.committed);
                if left == 0 {
                    return Ok(None);
                }
                shop.trade(left).await?;
                Ok(Some(vec!["orders".to_owned()]))
            }
            Self::Lines(lines) => {
                let mut batch = Vec::new();
                lines.recv_many(&mut batch, EVENTS_PER_TRANSACTION).await;
                let batch: Result<Vec<Line>, Failure> = batch.into_iter().map(|(line, _)| line).collect();
                let batch = batch.map_err(|failure| failure.after(shop.committed))?;
                if batch.is_empty() {
                    return Ok(None);
                }
                shop.commit_lines(&batch).await?;
                Ok(Some(batch.iter().map(|line| line.event.topic().to_string()).collect()))
            }
        }
    }
}

fn away(error: sqlx::Error) -> Failure {
    sqlite_error(error).into()
}
