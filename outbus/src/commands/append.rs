//! `outbus append`

use std::{
    pin::{Pin, pin},
    time::{Duration, Instant},
};

use bus_core::Event;
use outbox::{AppendError, AppendErrorReason, Outbox};
use serde::Serialize;
use sqlx::SqlitePool;
use tokio::{sync::mpsc, time::timeout};
use tokio_postgres::Client;

use crate::{
    cli::{AppendArgs, Format},
    config::Config,
    database::{Database, DatabaseKind},
    failure::Failure,
    input::{Ahead, Input, Line},
    output,
    shutdown::shutdown,
};

/// How long an unfinished transaction waits for more input: a live pipe is not kept waiting.
const IDLE: Duration = Duration::from_millis(500);

/// A transaction ends at so many bytes of events, however few they are.
///
/// They are read before it begins, so that the database is not locked while input is awaited: without this, a thousand
/// events of a megabyte would stand in memory. `--per-tx` is a most, and a pause in the input ends a transaction too.
const TRANSACTION_BYTES: usize = 32 << 20;

#[derive(Serialize)]
struct Appended {
    events: u64,
    seconds: f64,
}

pub(super) async fn run(config: &Config, args: &AppendArgs, format: Format) -> Result<(), Failure> {
    let database = config.database(args.database.database.as_deref())?;
    // Says what is wrong with the database before any input is read.
    database.admin().await?;
    let mut lines = Input::new(&args.input).lines()?;
    let mut writer = Writer::open(&database).await?;
    let mut stop = pin!(shutdown()?);
    let started = Instant::now();
    let bar = output::progress(format, None, "appending");
    loop {
        let batch = match next_batch(&mut lines, args.per_tx as usize, stop.as_mut()).await {
            Ok(batch) => batch,
            Err(failure) => return Err(failure.after(writer.committed)),
        };
        writer.commit(&batch.lines).await?;
        bar.set_position(writer.committed);
        if batch.is_last {
            break;
        }
    }
    bar.finish_and_clear();
    let appended = Appended { events: writer.committed, seconds: output::seconds(started.elapsed()) };
    output::result(format, &appended, |appended| {
        format!("appended {} events in {} s", appended.events, appended.seconds)
    })?;
    Ok(())
}

struct Batch {
    lines: Vec<Line>,
    is_last: bool,
}

/// The lines of the next transaction: full, or what there is when no more comes for a while. A signal ends it with what
/// was read.
async fn next_batch(
    lines: &mut mpsc::Receiver<Ahead>,
    max: usize,
    mut stop: Pin<&mut impl Future<Output = ()>>,
) -> Result<Batch, Failure> {
    let mut batch = Batch { lines: Vec::new(), is_last: false };
    let mut bytes = 0;
    while batch.lines.len() < max && bytes < TRANSACTION_BYTES {
        let idle = if batch.lines.is_empty() { Duration::MAX } else { IDLE };
        let line = tokio::select! {
            line = timeout(idle, lines.recv()) => line,
            () = stop.as_mut() => Ok(None),
        };
        match line {
            Ok(Some((line, _))) => {
                let line = line?;
                bytes += line.event.size_bytes();
                batch.lines.push(line);
            }
            Ok(None) => {
                batch.is_last = true;
                break;
            }
            Err(_) => break,
        }
    }
    Ok(batch)
}

/// Appends batch by batch.
struct Writer {
    connection: Connection,
    outbox: Outbox,
    committed: u64,
}

enum Connection {
    Sqlite(SqlitePool),
    Postgres(Box<Client>),
}

impl Writer {
    async fn open(database: &Database) -> Result<Self, Failure> {
        let (connection, outbox) = match &database.kind {
            DatabaseKind::Sqlite(options) => {
                let pool = SqlitePool::connect_with((**options).clone()).await;
                let pool = pool.map_err(|error| Failure::runtime("database_unavailable", error.to_string()))?;
                (Connection::Sqlite(pool.clone()), database.sqlite_outbox(pool))
            }
            DatabaseKind::Postgres(config) => {
                let client = config.connect().await?;
                let outbox = Outbox::postgres((**config).clone(), database.outbox_config());
                (Connection::Postgres(Box::new(client)), outbox)
            }
        };
        Ok(Self { connection, outbox, committed: 0 })
    }

    /// Commits the lines in one transaction: all of them, or none.
    async fn commit(&mut self, lines: &[Line]) -> Result<(), Failure> {
        if lines.is_empty() {
            return Ok(());
        }
        let events: Vec<Event> = lines.iter().map(|line| line.event.clone()).collect();
        let committed = self.committed;
        let refused = |error: AppendError| {
            let at = lines.get(error.index()).map_or(0, |line| line.number);
            let failure = match error.reason() {
                AppendErrorReason::Event(event) => Failure::runtime("invalid_event", event.to_string()).at_line(at),
                _ => Failure::runtime("database", error.to_string()),
            };
            failure.after(committed)
        };
        match &mut self.connection {
            Connection::Sqlite(pool) => {
                let broken = |error| Failure::from(outbox::sqlite_error(error)).after(committed);
                let mut transaction = pool.begin_with("BEGIN IMMEDIATE").await.map_err(broken)?;
                self.outbox.append(&mut transaction, events).await.map_err(refused)?;
                transaction.commit().await.map_err(broken)?;
            }
            Connection::Postgres(client) => {
                let broken = |error| Failure::from(outbox::postgres_error(error)).after(committed);
                let mut transaction = client.transaction().await.map_err(broken)?;
                self.outbox.append(&mut transaction, events).await.map_err(refused)?;
                transaction.commit().await.map_err(broken)?;
            }
        }
        self.outbox.wake();
        self.committed += lines.len() as u64;
        Ok(())
    }
}
