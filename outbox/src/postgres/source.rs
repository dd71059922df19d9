//! Reading the log.

use std::{
    collections::BTreeSet,
    sync::{PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bus_core::{Seq, SeqSet, failpoint, mutant};
use futures_util::TryStreamExt;
use tokio_postgres::{Client, error::SqlState, types::Type};

use super::{
    LOCKED, Parameter, PostgresLog, TIMELINE, column,
    gaps::Holder,
    log_error,
    owner::{Owner, drawn},
    timely,
    values::{COLUMNS, EVENT_COLUMNS, multirange},
};
use crate::{
    Acquire, Acquisition, Change, DeadRow, Lease, LogError, LogErrorKind, LogSource, Page, PageLimit, Probe, Pruned,
    ReadRows, Request, Row, Selected,
    rows::{Decoder, damaged, signed},
};

/// Shortest and longest pause between two looks at whether somebody drew a place without a notification.
const WATCH_MIN: Duration = Duration::from_millis(10);
const WATCH_MAX: Duration = Duration::from_millis(250);
/// Rows removed after which their space is given free at once.
const VACUUM_ROWS: u64 = 1_000;
/// Waits for nobody, and gives no space back to the file system: that would lock writers out.
const VACUUM: &str = "VACUUM (SKIP_LOCKED, TRUNCATE false) {p}outbox";
/// Fewest rows to ask for, however large the last ones were.
const ROWS_MIN: usize = 16;

const FETCH: &str = "SELECT {columns} FROM {p}outbox WHERE seq > $1 AND {same} ORDER BY seq LIMIT $2";
/// Range by range by the index, and everything in one view of the database.
const READ: &str = "SELECT {columns} FROM unnest($1::text::int8multirange) AS wanted (places) CROSS JOIN LATERAL \
     (SELECT * FROM {p}outbox WHERE seq >= lower(places) AND seq < upper(places) ORDER BY seq LIMIT $2) found \
     WHERE {same} ORDER BY seq LIMIT $2";
/// Nothing is read on another timeline than the log was taken on: places may have been drawn again there, and an event at
/// a later one would overtake them. An answer without rows would say that there are none: a division by zero says this.
/// Looked at once in a statement.
const SAME_TIMELINE: &str = "1 / ($3 = '' OR $3 = (SELECT {timeline}))::int4 = 1";
/// With the oldest transaction that was not over in that view; one row without a place where nothing is visible.
const PROBE: &str = "SELECT found.*, pg_snapshot_xmin(pg_current_snapshot())::text FROM (SELECT 1) once \
     LEFT JOIN ({read}) found ON true";
/// All who hold the lock that drawing a place takes; prepared transactions have no process. One row without a mode where
/// nobody does.
const HOLDERS: &str = "SELECT mode, coalesce(virtualtransaction, ''), pid, pg_is_in_recovery() \
     FROM (SELECT 1) once LEFT JOIN pg_locks ON {locked}";
/// A commit that does not wait for the disk has reached it after three rounds of the writer of the write-ahead log.
/// Source: postgresql.org/docs/current/wal-async-commit.html.
const WRITE_DELAY: &str = "SELECT 3 * extract(epoch FROM current_setting('wal_writer_delay')::interval)::float8";

#[async_trait]
impl LogSource for PostgresLog {
    fn sink(&self) -> &str {
        &self.sink
    }

    async fn fetch(&self, after: Seq, limit: PageLimit) -> Result<Page, LogError> {
        let mut held = self.reader.lock().await?;
        let sql = self.reading(FETCH);
        let after = signed(after.0);
        let rows = timely(self.read_rows(held.get(), &sql, (&after, Type::INT8), limit)).await;
        // Writers draw places side by side: what is missing may become visible yet.
        let found = held.check(rows)?;
        self.gaps().fetched(&found.rows);
        Ok(Page { rows: found.rows, gaps_are_dead: false })
    }

    async fn probe(&self, unseen: &SeqSet, limit: PageLimit) -> Result<Probe, LogError> {
        let mut held = self.reader.lock().await?;
        let probed = timely(self.probe_on(held.get(), unseen, limit)).await;
        held.check(probed)
    }

    async fn read(&self, seqs: &SeqSet, limit: PageLimit) -> Result<ReadRows, LogError> {
        let mut held = self.reader.lock().await?;
        let sql = self.reading(READ);
        let found = timely(self.read_rows(held.get(), &sql, (&multirange(seqs), Type::TEXT), limit)).await;
        let found = held.check(found)?;
        let through = found.through(seqs);
        Ok(ReadRows { rows: found.rows, through })
    }

    async fn last_seq(&self) -> Result<Seq, LogError> {
        let mut held = self.reader.lock().await?;
        let last = timely(drawn(held.get(), &self.tables)).await;
        held.check(last)
    }

    async fn acquire(&self, request: &Acquire) -> Result<Acquisition, LogError> {
        let mut held = self.writer.lock().await?;
        let acquired = timely(self.take(held.get(), request)).await;
        if matches!(acquired, Ok(Acquisition::Owned(_))) {
            *self.gaps() = super::Gaps::default();
        }
        held.check(acquired)
    }

    async fn commit(&self, lease: &Lease, change: &Change) -> Result<(), LogError> {
        let mut held = self.writer.lock().await?;
        let seen = self.gaps().seen();
        let committed = timely(self.owner(held.get()).commit(lease, change)).await;
        let xid = held.check(committed)?;
        self.gaps().bound(seen, xid);
        Ok(())
    }

    async fn release(&self, lease: &Lease) -> Result<(), LogError> {
        let mut held = self.writer.lock().await?;
        let released = timely(self.owner(held.get()).release(lease)).await;
        held.check(released)
    }

    async fn set_aside(&self, of: &Selected, after: Seq, limit: usize) -> Result<Vec<DeadRow>, LogError> {
        let mut held = self.writer.lock().await?;
        let rows = timely(self.dead_rows(held.get(), of, Some((self.sink.as_str(), after)), limit)).await;
        let rows = rows.map(|rows| rows.into_iter().filter(|row| row.sink == self.sink).collect());
        held.check(rows)
    }

    async fn requests(&self) -> Result<Vec<Request>, LogError> {
        let mut held = self.reader.lock().await?;
        let requests = timely(self.open_requests(held.get())).await;
        held.check(requests)
    }

    async fn prune(&self, janitor: &str, retention: Duration, rows_max: usize) -> Result<Pruned, LogError> {
        let mut held = self.janitor.lock().await?;
        let pruned = timely(self.owner(held.get()).prune(janitor, retention, rows_max)).await;
        let removed = pruned.as_ref().map_or(0, |pruned| pruned.rows);
        let removed = self.removed.fetch_add(removed, Ordering::Relaxed) + removed;
        if removed >= VACUUM_ROWS && pruned.as_ref().is_ok_and(|pruned| !pruned.more) {
            self.removed.store(0, Ordering::Relaxed);
            failpoint("before-vacuum");
            // A role that does not own the table is told so by a warning, and autovacuum does it.
            let vacuum = held.get().batch_execute(&self.tables.qualify(VACUUM)).await.map_err(log_error);
            return held.check(vacuum.and(pruned));
        }
        held.check(pruned)
    }

    fn write_delay(&self) -> Duration {
        Duration::from_micros(self.write_delay.load(Ordering::Relaxed))
    }

    /// A checkpoint waits for no disk and locks nobody out.
    fn checkpoint_interval(&self) -> Duration {
        Duration::from_millis(20)
    }

    async fn changed(&self) {
        tokio::select! {
            () = self.listener.wait(&self.reader.config, &self.tables) => {}
            () = self.drawn() => {}
        }
    }
}

/// What a statement with a limit found.
struct Found {
    rows: Vec<Row>,
    is_cut: bool,
    /// Every transaction below it was over in the view of a probe.
    xmin: u64,
}

impl Found {
    /// Everything up to here was looked at.
    fn through(&self, wanted: &SeqSet) -> Seq {
        let last = self.rows.last().filter(|_| self.is_cut).map(|row| row.seq);
        last.or(wanted.last()).unwrap_or_default()
    }
}

impl PostgresLog {
    async fn take(&self, client: &mut Client, request: &Acquire) -> Result<Acquisition, LogError> {
        let delay = client.query_typed_one(WRITE_DELAY, &[]).await.map_err(log_error)?;
        let micros = Duration::from_secs_f64(column::<f64>(&delay, 0)?.clamp(0.0, 60.0)).as_micros();
        self.write_delay.store(u64::try_from(micros).unwrap_or(u64::MAX), Ordering::Relaxed);
        let (acquired, timeline) = self.owner(client).acquire(request).await?;
        if let Some(timeline) = timeline {
            *self.timeline.lock().unwrap_or_else(PoisonError::into_inner) = timeline;
        }
        Ok(acquired)
    }

    /// The timeline on which the log was taken last; empty if it never was.
    fn timeline(&self) -> String {
        self.timeline.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A statement that reads events.
    fn reading(&self, sql: &str) -> String {
        let same = match mutant("failover-read-on") {
            false => SAME_TIMELINE.replace("{timeline}", TIMELINE),
            true => "($3 = $3)".to_owned(),
        };
        self.tables.qualify(&sql.replace("{columns}", COLUMNS).replace("{same}", &same))
    }

    /// Looks now and then, ever less often, whether a place was drawn since somebody looked last.
    async fn drawn(&self) {
        let mut pause = WATCH_MIN;
        loop {
            tokio::time::sleep(pause).await;
            // An error here is met again, and told, by whoever reads next.
            if let Ok(last) = self.watch_last().await
                && self.seen_last.swap(last.0, Ordering::Relaxed) != last.0
            {
                return;
            }
            pause = (pause * 2).min(WATCH_MAX);
        }
    }

    async fn watch_last(&self) -> Result<Seq, LogError> {
        let mut held = self.watcher.lock().await?;
        let last = timely(drawn(held.get(), &self.tables)).await;
        held.check(last)
    }

    pub(super) fn owner<'a>(&'a self, client: &'a mut Client) -> Owner<'a> {
        Owner { tables: &self.tables, sink: &self.sink, client }
    }

    /// Rows to ask for, so that they bring about the bytes that are wanted.
    fn rows_max(&self, limit: PageLimit) -> usize {
        let by_bytes = limit.bytes / self.row_bytes.load(Ordering::Relaxed).max(1);
        limit.events.min(by_bytes.max(ROWS_MIN)).max(1)
    }

    /// Runs a statement whose second parameter is the number of rows, until the bytes are enough.
    async fn read_rows(
        &self,
        client: &Client,
        sql: &str,
        first: Parameter<'_>,
        limit: PageLimit,
    ) -> Result<Found, LogError> {
        let max = self.rows_max(limit);
        let count = i64::try_from(max).unwrap_or(i64::MAX);
        let timeline = self.timeline();
        let parameters: [Parameter<'_>; 3] = [first, (&count, Type::INT8), (&timeline, Type::TEXT)];
        let mut stream = std::pin::pin!(client.query_typed_raw(sql, parameters).await.map_err(read_error)?);
        let (mut rows, mut decoder, mut bytes) = (Vec::new(), Decoder::default(), 0);
        let (mut is_cut, mut xmin) = (false, 0);
        while let Some(row) = stream.try_next().await.map_err(read_error)? {
            if row.len() > EVENT_COLUMNS {
                xmin = column::<&str>(&row, EVENT_COLUMNS)?.parse().map_err(|error| damaged("xmin", error))?;
                if column::<Option<i64>>(&row, 0)?.is_none() {
                    break;
                }
            }
            let row = decoder.row(&row)?;
            bytes += row.size_bytes();
            rows.push(row);
            is_cut = rows.len() == max || bytes >= limit.bytes;
            if is_cut {
                break;
            }
        }
        if !rows.is_empty() {
            self.row_bytes.store(bytes / rows.len(), Ordering::Relaxed);
        }
        Ok(Found { rows, is_cut, xmin })
    }

    async fn probe_on(&self, client: &Client, unseen: &SeqSet, limit: PageLimit) -> Result<Probe, LogError> {
        // Not before it is our turn: the locks that another probe reads meanwhile may be older than these gaps.
        self.gaps().see(unseen, Instant::now());
        if self.gaps().wants_locks(Instant::now()) {
            let sql = self.tables.qualify(&HOLDERS.replace("{locked}", LOCKED));
            let holders = lock_holders(client, &sql).await?;
            self.gaps().read_locks(&holders, Instant::now());
        }
        let sql = self.reading(&PROBE.replace("{read}", READ));
        let found = self.read_rows(client, &sql, (&multirange(unseen), Type::TEXT), limit).await?;
        let through = found.through(unseen);
        let seen: SeqSet = found.rows.iter().map(|row| row.seq).collect();
        let dead = self.gaps().probed(&unseen.within(Seq::ZERO, through), &seen, found.xmin);
        Ok(Probe { rows: found.rows, dead, through })
    }
}

/// What a statement with [`SAME_TIMELINE`] answers: nothing else in it divides.
fn read_error(error: tokio_postgres::Error) -> LogError {
    if error.code() == Some(&SqlState::DIVISION_BY_ZERO) {
        let message = "the server is on another timeline than the log was taken on: it failed over";
        return LogError::with_source(LogErrorKind::Fenced, message, error);
    }
    log_error(error)
}

async fn lock_holders(client: &Client, sql: &str) -> Result<BTreeSet<Holder>, LogError> {
    let rows = client.query_typed(sql, &[]).await.map_err(log_error)?;
    let mut holders = BTreeSet::new();
    for row in &rows {
        if column(row, 3)? {
            // Locks of the primary do not show on it: every gap would look as if everybody had let go of it.
            let message = "the server is a standby, which cannot tell what may still be committed; point the URL at \
                           the primary";
            return Err(LogError::new(LogErrorKind::Unavailable, message));
        }
        if column::<Option<&str>>(row, 0)?.is_some() {
            holders.insert(Holder { transaction: column(row, 1)?, pid: column(row, 2)? });
        }
    }
    Ok(holders)
}
