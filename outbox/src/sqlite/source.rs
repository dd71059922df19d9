//! Reading the log.

use std::{sync::atomic::Ordering, time::Duration};

use async_trait::async_trait;
use bus_core::{Seq, SeqSet};
use futures_util::TryStreamExt;
use sqlx::{AssertSqlSafe, Connection, SqliteConnection};

use super::{SqliteLog, log_error, owner::Owner, rows::COLUMNS};
use crate::{
    Acquire, Acquisition, Change, DeadRow, Lease, LogError, LogSource, Page, PageLimit, Probe, Pruned, ReadRows,
    Request, Row, Selected, rows::Decoder,
};

/// Shortest wait between two looks at whether another process committed.
const WATCH_MIN: Duration = Duration::from_millis(2);
/// Longest one: 50 looks a second cost about 0.2 % of a core.
const WATCH_MAX: Duration = Duration::from_millis(20);

const FETCH: &str = "SELECT {columns} FROM {p}outbox WHERE seq > ? ORDER BY seq LIMIT ?";
const FETCH_RANGE: &str = "SELECT {columns} FROM {p}outbox WHERE seq BETWEEN ? AND ? ORDER BY seq LIMIT ?";
/// Also when the last rows are gone.
const LAST_SEQ: &str = "SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name = '{p}outbox'), 0)";
/// Moves when another connection commits; cheap, for it reads shared memory.
const DATA_VERSION: &str = "PRAGMA data_version";

#[async_trait]
impl LogSource for SqliteLog {
    fn sink(&self) -> &str {
        &self.sink
    }

    async fn fetch(&self, after: Seq, limit: PageLimit) -> Result<Page, LogError> {
        let mut held = self.reader.lock().await?;
        let sql = self.tables.expand(&FETCH.replace("{columns}", COLUMNS));
        let rows = read_rows(held.get(), sql, &[after.0], limit).await;
        // One writer at a time: a place below a visible one is visible too, or empty for good.
        let page = rows.map(|rows| Page { rows, gaps_are_dead: true });
        held.check(page)
    }

    async fn probe(&self, unseen: &SeqSet, limit: PageLimit) -> Result<Probe, LogError> {
        let read = self.read(unseen, limit).await?;
        let mut dead = unseen.within(Seq::ZERO, read.through);
        for row in &read.rows {
            dead.remove(row.seq);
        }
        Ok(Probe { rows: read.rows, dead, through: read.through })
    }

    async fn read(&self, seqs: &SeqSet, limit: PageLimit) -> Result<ReadRows, LogError> {
        let mut held = self.reader.lock().await?;
        let sql = self.tables.expand(&FETCH_RANGE.replace("{columns}", COLUMNS));
        let read = read_ranges(held.get(), &sql, seqs, limit).await;
        held.check(read)
    }

    async fn last_seq(&self) -> Result<Seq, LogError> {
        let mut held = self.reader.lock().await?;
        let last = sqlx::query_scalar::<_, i64>(self.tables.sql(LAST_SEQ)).fetch_one(held.get()).await;
        held.check(last.map(|last| Seq(last.unsigned_abs())).map_err(log_error))
    }

    async fn acquire(&self, request: &Acquire) -> Result<Acquisition, LogError> {
        let mut held = self.writer.lock().await?;
        let acquired = self.owner(held.get()).acquire(request).await;
        held.check(acquired)
    }

    async fn commit(&self, lease: &Lease, change: &Change) -> Result<(), LogError> {
        let mut held = self.writer.lock().await?;
        let committed = self.owner(held.get()).commit(lease, change).await;
        held.check(committed)
    }

    async fn release(&self, lease: &Lease) -> Result<(), LogError> {
        let mut held = self.writer.lock().await?;
        let released = self.owner(held.get()).release(lease).await;
        held.check(released)
    }

    async fn set_aside(&self, of: &Selected, after: Seq, limit: usize) -> Result<Vec<DeadRow>, LogError> {
        let mut held = self.writer.lock().await?;
        let rows = self.dead_rows(held.get(), of, Some((self.sink.as_str(), after)), limit).await;
        let rows = rows.map(|rows| rows.into_iter().filter(|row| row.sink == self.sink).collect());
        held.check(rows)
    }

    async fn requests(&self) -> Result<Vec<Request>, LogError> {
        let mut held = self.reader.lock().await?;
        let requests = self.open_requests(held.get()).await;
        held.check(requests)
    }

    async fn prune(&self, janitor: &str, retention: Duration, rows_max: usize) -> Result<Pruned, LogError> {
        let mut held = self.writer.lock().await?;
        let pruned = self.owner(held.get()).prune(janitor, retention, rows_max).await;
        held.check(pruned)
    }

    /// A checkpoint takes the writer's lock.
    fn checkpoint_interval(&self) -> Duration {
        Duration::from_secs(1)
    }

    async fn changed(&self) {
        let mut pause = WATCH_MIN;
        loop {
            // An error here is met again, and told, by whoever reads next.
            if let Ok(version) = self.data_version().await
                && self.seen_version.swap(version, Ordering::Relaxed) != version
            {
                return;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(WATCH_MAX);
        }
    }
}

impl SqliteLog {
    async fn data_version(&self) -> Result<i64, LogError> {
        let mut held = self.watcher.lock().await?;
        let version = sqlx::query_scalar(DATA_VERSION).fetch_one(held.get()).await.map_err(log_error);
        held.check(version)
    }

    pub(super) fn owner<'a>(&'a self, connection: &'a mut SqliteConnection) -> Owner<'a> {
        Owner { tables: &self.tables, sink: &self.sink, connection }
    }
}

/// Runs a statement whose last parameter is the number of rows, until the bytes are enough.
async fn read_rows(
    connection: &mut SqliteConnection,
    sql: String,
    arguments: &[u64],
    limit: PageLimit,
) -> Result<Vec<Row>, LogError> {
    let mut query = sqlx::query(AssertSqlSafe(sql));
    for argument in arguments {
        query = query.bind(i64::try_from(*argument).unwrap_or(i64::MAX));
    }
    let mut stream = query.bind(i64::try_from(limit.events.max(1)).unwrap_or(i64::MAX)).fetch(connection);
    let (mut rows, mut decoder, mut bytes) = (Vec::new(), Decoder::default(), 0);
    while let Some(row) = stream.try_next().await.map_err(log_error)? {
        let row = decoder.row(&row)?;
        bytes += row.size_bytes();
        rows.push(row);
        if bytes >= limit.bytes {
            break;
        }
    }
    Ok(rows)
}

/// Reads range after range in one view of the database.
async fn read_ranges(
    connection: &mut SqliteConnection,
    sql: &str,
    seqs: &SeqSet,
    limit: PageLimit,
) -> Result<ReadRows, LogError> {
    let mut transaction = connection.begin().await.map_err(log_error)?;
    let mut read = ReadRows { rows: Vec::new(), through: seqs.last().unwrap_or_default() };
    let mut left = limit;
    for (first, last) in seqs.ranges() {
        let rows = read_rows(&mut transaction, sql.to_owned(), &[first.0, last.0], left).await?;
        let bytes: usize = rows.iter().map(Row::size_bytes).sum();
        let full = rows.len() >= left.events.max(1) || bytes >= left.bytes;
        left.events = left.events.saturating_sub(rows.len());
        left.bytes = left.bytes.saturating_sub(bytes);
        read.rows.extend(rows);
        if full {
            read.through = read.rows.last().map_or(first, |row| row.seq);
            break;
        }
    }
    transaction.rollback().await.map_err(log_error)?;
    Ok(read)
}
