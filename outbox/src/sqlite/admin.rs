//! The log as an operator sees it.

use async_trait::async_trait;
use bus_core::{Seq, SeqSet, Timestamp};
use sqlx::{AssertSqlSafe, Connection, Row as _, SqliteConnection, sqlite::SqliteRow};

use super::{SqliteLog, database_now, log_error, rows::COLUMNS};
use crate::{
    Blocked, DeadColumns, DeadRest, DeadRow, DeadState, LogAdmin, LogError, Request, RequestKind, RequestProgress,
    Selected, Sink, SinkStatus,
    rows::{COUNT_MAX, Decoder, LOG, age, check_removable, elapsed, parse},
};

const DEAD_ROWS: &str = "SELECT {columns}, state, parked, reason, error, attempts, at, sink FROM {p}dead_letter \
     WHERE log = ?1 AND (?2 IS NULL OR sink > ?2 OR (sink = ?2 AND seq > ?3)) \
     AND (?4 IS NULL OR id IN (SELECT value FROM json_each(?4))) AND (?5 IS NULL OR reason = ?5) \
     AND (?6 IS NULL OR (topic = ?6 AND key = ?7)) AND (?8 IS NULL OR seq <= ?8) AND (?9 = 0 OR parked = 1) \
     ORDER BY sink, seq LIMIT ?10";
const MARK_RETRYING: &str = "UPDATE {p}dead_letter SET state = 'retrying' WHERE log = ?1 AND sink = ?2 \
     AND (?3 IS NULL OR id IN (SELECT value FROM json_each(?3))) AND (?4 IS NULL OR reason = ?4)";
const DISCARD: &str = "DELETE FROM {p}dead_letter WHERE log = ?1 AND sink = ?2 \
     AND (?3 IS NULL OR id IN (SELECT value FROM json_each(?3))) AND (?4 IS NULL OR reason = ?4)";
const ASK: &str = "INSERT INTO {p}request (log, sink, kind, arguments, rate, at) VALUES (?, ?, ?, ?, ?, ?)";
const OPEN_REQUESTS: &str = "SELECT id, kind, arguments, rate FROM {p}request WHERE log = ? AND sink = ? AND state = 'open' ORDER BY id LIMIT 100";
const PROGRESS: &str = "SELECT done, failed, state = 'ended' FROM {p}request WHERE id = ?";
const SINKS: &str = "SELECT sink, topics, bus, low, high, holes, owner, lease_until, epoch, blocked FROM {p}cursor \
     WHERE log = ? ORDER BY sink";
const LEASE: &str = "SELECT lease_until FROM {p}cursor WHERE log = ? AND sink = ?";
/// Fences an owner whose lease is over, so that it cannot bring back what is discarded here.
const FENCE: &str = "UPDATE {p}cursor SET epoch = epoch + 1, owner = NULL, lease_until = 0 WHERE log = ? AND sink = ?";
const REMOVE_SINK: [&str; 4] = [
    // A sink that comes back under this name begins above the epochs there were: an owner that slept wakes up fenced.
    "UPDATE {p}log SET epoch_floor = max(epoch_floor, \
     coalesce((SELECT epoch FROM {p}cursor WHERE log = ?1 AND sink = ?2), 0)) WHERE name = ?1",
    "DELETE FROM {p}cursor WHERE log = ? AND sink = ?",
    "DELETE FROM {p}dead_letter WHERE log = ? AND sink = ?",
    "DELETE FROM {p}request WHERE log = ? AND sink = ?",
];
const SET_ASIDE_COUNTS: &str = "SELECT coalesce(sum(parked), 0), coalesce(sum(1 - parked), 0) FROM {p}dead_letter \
     WHERE log = ? AND sink = ?";
/// The rows of a sink above its cursor, counted up to a limit.
const BACKLOG: &str = "SELECT count(*) FROM (SELECT 1 FROM {p}outbox WHERE seq > ?1 AND ({topics}) LIMIT ?2)";
const OLDEST: &str = "SELECT CASE typeof(time) WHEN 'integer' THEN time END FROM {p}outbox WHERE seq > ?1 AND ({topics}) ORDER BY seq LIMIT ?2";
const TIME_AT: &str = "SELECT CASE typeof(time) WHEN 'integer' THEN time END FROM {p}outbox WHERE seq >= ? AND seq <= ? ORDER BY seq LIMIT 1";

/// A sink's row, as it stands.
struct SinkRow {
    sink: Sink,
    high: Seq,
    holes: SeqSet,
    lease_until: i64,
    epoch: u64,
    blocked: Blocked,
}

#[async_trait]
impl LogAdmin for SqliteLog {
    async fn status(&self) -> Result<Vec<SinkStatus>, LogError> {
        let mut held = self.reader.lock().await?;
        let status = self.read_status(held.get()).await;
        held.check(status)
    }

    async fn sinks(&self) -> Result<Vec<Sink>, LogError> {
        let mut held = self.reader.lock().await?;
        let sinks = self.sink_rows(held.get()).await;
        held.check(sinks.map(|rows| rows.into_iter().map(|row| row.sink).collect()))
    }

    async fn remove_sink(&self, sink: &str) -> Result<(), LogError> {
        let mut held = self.writer.lock().await?;
        let removed = self.delete_sink(held.get(), sink).await;
        held.check(removed)
    }

    async fn dead_letters(
        &self,
        selected: &Selected,
        after: Option<(&str, Seq)>,
        limit: usize,
    ) -> Result<Vec<DeadRow>, LogError> {
        let mut held = self.reader.lock().await?;
        let rows = self.dead_rows(held.get(), selected, after, limit).await;
        held.check(rows)
    }

    async fn ask(
        &self,
        sink: &str,
        kind: RequestKind,
        selected: &Selected,
        rate: Option<u32>,
    ) -> Result<i64, LogError> {
        let mut held = self.writer.lock().await?;
        let asked = self.insert_request(held.get(), sink, kind, selected, rate).await;
        held.check(asked)
    }

    async fn discard_unowned(&self, sink: &str, selected: &Selected) -> Result<Option<u64>, LogError> {
        let mut held = self.writer.lock().await?;
        let discarded = self.delete_dead(held.get(), sink, selected).await;
        held.check(discarded)
    }

    async fn progress(&self, id: i64) -> Result<Option<RequestProgress>, LogError> {
        let mut held = self.reader.lock().await?;
        let row = sqlx::query(self.tables.sql(PROGRESS)).bind(id).fetch_optional(held.get()).await.map_err(log_error);
        let progress = |row: SqliteRow| RequestProgress {
            id,
            done: row.get::<i64, _>(0).unsigned_abs(),
            failed: row.get::<i64, _>(1).unsigned_abs(),
            ended: row.get(2),
        };
        Ok(held.check(row)?.map(progress))
    }
}

impl SqliteLog {
    /// Set-aside events of all sinks, behind `after`.
    pub(super) async fn dead_rows(
        &self,
        connection: &mut SqliteConnection,
        selected: &Selected,
        after: Option<(&str, Seq)>,
        limit: usize,
    ) -> Result<Vec<DeadRow>, LogError> {
        let sql = self.tables.expand(&DEAD_ROWS.replace("{columns}", COLUMNS));
        let query = sqlx::query(AssertSqlSafe(sql))
            .bind(LOG)
            .bind(after.map(|(sink, _)| sink))
            .bind(after.map_or(0, |(_, seq)| seq.0 as i64))
            .bind(ids(selected))
            .bind(&selected.reason)
            .bind(selected.key.as_ref().map(|(topic, _)| topic))
            .bind(selected.key.as_ref().map(|(_, key)| key))
            .bind(selected.to.map(|seq| seq.0 as i64))
            .bind(selected.parked)
            .bind(i64::try_from(limit).unwrap_or(i64::MAX));
        let rows = query.fetch_all(connection).await.map_err(log_error)?;
        let mut decoder = Decoder::default();
        rows.iter().map(|row| dead_row(&mut decoder, row)).collect()
    }

    pub(super) async fn open_requests(&self, connection: &mut SqliteConnection) -> Result<Vec<Request>, LogError> {
        let query = sqlx::query(self.tables.sql(OPEN_REQUESTS)).bind(LOG).bind(&self.sink);
        let rows = query.fetch_all(connection).await.map_err(log_error)?;
        let request = |row: SqliteRow| {
            let kind = RequestKind::from_column(&row.get::<String, _>(1));
            let selected = parse(&row.get::<String, _>(2), "arguments")?;
            Ok(Request { id: row.get(0), kind, selected, rate: row.get::<Option<i64>, _>(3).map(|rate| rate as u32) })
        };
        rows.into_iter().map(request).collect()
    }

    async fn insert_request(
        &self,
        connection: &mut SqliteConnection,
        sink: &str,
        kind: RequestKind,
        selected: &Selected,
        rate: Option<u32>,
    ) -> Result<i64, LogError> {
        let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await.map_err(log_error)?;
        let now = database_now(&mut transaction).await?;
        let arguments = serde_json::to_string(selected).expect("strings and numbers serialize");
        let ask = sqlx::query(self.tables.sql(ASK)).bind(LOG).bind(sink).bind(kind.as_str());
        let asked = ask.bind(arguments).bind(rate).bind(now).execute(&mut *transaction).await.map_err(log_error)?;
        if kind == RequestKind::Retry {
            let mark = sqlx::query(self.tables.sql(MARK_RETRYING)).bind(LOG).bind(sink);
            let mark = mark.bind(ids(selected)).bind(&selected.reason);
            mark.execute(&mut *transaction).await.map_err(log_error)?;
        }
        transaction.commit().await.map_err(log_error)?;
        Ok(asked.last_insert_rowid())
    }

    async fn delete_dead(
        &self,
        connection: &mut SqliteConnection,
        sink: &str,
        selected: &Selected,
    ) -> Result<Option<u64>, LogError> {
        let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await.map_err(log_error)?;
        let now = database_now(&mut transaction).await?;
        let lease = sqlx::query_scalar::<_, i64>(self.tables.sql(LEASE)).bind(LOG).bind(sink);
        let lease = lease.fetch_optional(&mut *transaction).await.map_err(log_error)?;
        if lease.is_some_and(|until| until > now) {
            return Ok(None);
        }
        let fence = sqlx::query(self.tables.sql(FENCE)).bind(LOG).bind(sink);
        fence.execute(&mut *transaction).await.map_err(log_error)?;
        let discard = sqlx::query(self.tables.sql(DISCARD)).bind(LOG).bind(sink);
        let discard = discard.bind(ids(selected)).bind(&selected.reason);
        let discarded = discard.execute(&mut *transaction).await.map_err(log_error)?;
        transaction.commit().await.map_err(log_error)?;
        Ok(Some(discarded.rows_affected()))
    }

    async fn delete_sink(&self, connection: &mut SqliteConnection, sink: &str) -> Result<(), LogError> {
        let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await.map_err(log_error)?;
        let now = database_now(&mut transaction).await?;
        let lease = sqlx::query_scalar::<_, i64>(self.tables.sql(LEASE)).bind(LOG).bind(sink);
        let lease = lease.fetch_optional(&mut *transaction).await.map_err(log_error)?;
        check_removable(sink, lease.map(|until| until > now))?;
        for statement in REMOVE_SINK {
            let delete = sqlx::query(self.tables.sql(statement)).bind(LOG).bind(sink);
            delete.execute(&mut *transaction).await.map_err(log_error)?;
        }
        transaction.commit().await.map_err(log_error)
    }

    async fn sink_rows(&self, connection: &mut SqliteConnection) -> Result<Vec<SinkRow>, LogError> {
        let now = database_now(connection).await?;
        let rows = sqlx::query(self.tables.sql(SINKS)).bind(LOG).fetch_all(connection).await.map_err(log_error)?;
        rows.into_iter().map(|row| sink_row(&row, now)).collect()
    }

    /// Reads everything in one view of the database.
    async fn read_status(&self, connection: &mut SqliteConnection) -> Result<Vec<SinkStatus>, LogError> {
        let mut transaction = connection.begin().await.map_err(log_error)?;
        let now = database_now(&mut transaction).await?;
        let sinks = self.sink_rows(&mut transaction).await?;
        let wanted: Vec<String> = sinks.iter().flat_map(|row| row.sink.topics.clone()).collect();
        let unclaimed = self.count(&mut transaction, Seq::ZERO, &Topics::None(wanted)).await?;
        let mut status = Vec::new();
        for row in sinks {
            status.push(self.sink_status(&mut transaction, row, unclaimed, now).await?);
        }
        if status.is_empty() {
            let backlog = self.count(&mut transaction, Seq::ZERO, &Topics::All).await?;
            let oldest = self.oldest(&mut transaction, Seq::ZERO, &Topics::All).await?;
            status.push(SinkStatus::unread(LOG, backlog.unsigned_abs(), backlog <= COUNT_MAX, age(oldest, now)));
        }
        transaction.rollback().await.map_err(log_error)?;
        Ok(status)
    }

    async fn sink_status(
        &self,
        connection: &mut SqliteConnection,
        row: SinkRow,
        unclaimed: i64,
        now: i64,
    ) -> Result<SinkStatus, LogError> {
        let topics = Topics::Any(row.sink.topics.clone());
        let above = self.count(connection, row.high, &topics).await?;
        let oldest = match row.holes.first() {
            Some(first) => self.time_at(connection, first, row.high).await?,
            None => self.oldest(connection, row.high, &topics).await?,
        };
        let aside = sqlx::query(self.tables.sql(SET_ASIDE_COUNTS)).bind(LOG).bind(&row.sink.sink);
        let aside = aside.fetch_one(&mut *connection).await.map_err(log_error)?;
        let holes = row.holes.len();
        Ok(SinkStatus {
            log: LOG.to_owned(),
            backlog: above.unsigned_abs() + holes,
            backlog_exact: above <= COUNT_MAX,
            oldest_age: age(oldest, now),
            low: row.sink.low,
            high: row.high,
            holes,
            epoch: row.epoch,
            lease_remaining: row.sink.owner.is_some().then(|| elapsed(row.lease_until, now)),
            owner: row.sink.owner,
            sink: Some(row.sink.sink),
            blocked: row.blocked,
            parked: aside.get::<i64, _>(0).unsigned_abs(),
            dead: aside.get::<i64, _>(1).unsigned_abs(),
            unclaimed: unclaimed.unsigned_abs(),
            // Its one writer leaves no gaps.
            oldest_transaction: None,
        })
    }

    /// Rows above `after` with these topics; stops one above [`COUNT_MAX`].
    async fn count(&self, connection: &mut SqliteConnection, after: Seq, topics: &Topics) -> Result<i64, LogError> {
        let rows = self.with_topics(connection, BACKLOG, after, topics, COUNT_MAX + 1).await?;
        Ok(rows.unwrap_or(0))
    }

    async fn oldest(
        &self,
        connection: &mut SqliteConnection,
        after: Seq,
        topics: &Topics,
    ) -> Result<Option<i64>, LogError> {
        self.with_topics(connection, OLDEST, after, topics, 1).await
    }

    async fn with_topics(
        &self,
        connection: &mut SqliteConnection,
        template: &str,
        after: Seq,
        topics: &Topics,
        limit: i64,
    ) -> Result<Option<i64>, LogError> {
        let sql = self.tables.expand(&template.replace("{topics}", &topics.condition(3)));
        let mut query = sqlx::query_scalar::<_, Option<i64>>(AssertSqlSafe(sql)).bind(after.0 as i64).bind(limit);
        for pattern in topics.patterns() {
            query = query.bind(pattern);
        }
        Ok(query.fetch_optional(connection).await.map_err(log_error)?.flatten())
    }

    async fn time_at(&self, connection: &mut SqliteConnection, first: Seq, last: Seq) -> Result<Option<i64>, LogError> {
        let query = sqlx::query_scalar::<_, Option<i64>>(self.tables.sql(TIME_AT));
        let query = query.bind(first.0 as i64).bind(last.0 as i64);
        Ok(query.fetch_optional(connection).await.map_err(log_error)?.flatten())
    }
}

/// Which topics a statement is about.
pub(super) enum Topics {
    All,
    /// Those that match one of the patterns.
    Any(Vec<String>),
    /// Those that match none of them.
    None(Vec<String>),
}

impl Topics {
    /// A condition on column `topic`, whose parameters begin at number `first`.
    pub(super) fn condition(&self, first: usize) -> String {
        let any = |patterns: &[String]| {
            let globs: Vec<String> = (0..patterns.len()).map(|at| format!("topic GLOB ?{}", first + at)).collect();
            if globs.is_empty() { "0".to_owned() } else { globs.join(" OR ") }
        };
        match self {
            Self::All => "1".to_owned(),
            Self::Any(patterns) => any(patterns),
            Self::None(patterns) => format!("NOT ({})", any(patterns)),
        }
    }

    pub(super) fn patterns(&self) -> &[String] {
        match self {
            Self::All => &[],
            Self::Any(patterns) | Self::None(patterns) => patterns,
        }
    }
}

fn ids(selected: &Selected) -> Option<String> {
    selected.ids.as_ref().map(|ids| serde_json::to_string(ids).expect("strings serialize"))
}

fn sink_row(row: &SqliteRow, now: i64) -> Result<SinkRow, LogError> {
    let lease_until: i64 = row.get(7);
    Ok(SinkRow {
        sink: Sink {
            log: LOG.to_owned(),
            sink: row.get(0),
            topics: parse(&row.get::<String, _>(1), "topics")?,
            bus: row.get(2),
            low: Seq(row.get::<i64, _>(3).unsigned_abs()),
            owner: row.get::<Option<String>, _>(6).filter(|_| lease_until > now),
        },
        high: Seq(row.get::<i64, _>(4).unsigned_abs()),
        holes: parse(&row.get::<String, _>(5), "holes")?,
        lease_until,
        epoch: row.get::<i64, _>(8).unsigned_abs(),
        blocked: parse(&row.get::<String, _>(9), "blocked")?,
    })
}

fn dead_row(decoder: &mut Decoder, row: &SqliteRow) -> Result<DeadRow, LogError> {
    let decoded = decoder.row(row)?;
    // SQLite keeps anything in any column: it is read as the bytes it would be written with.
    let bytes = |column: usize| row.try_get_unchecked::<Option<Vec<u8>>, _>(column).ok().flatten();
    let optional = |column: usize| bytes(column).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let text = |column: usize| optional(column).unwrap_or_default();
    let rest = decoded.event.is_err().then(|| DeadRest {
        source: text(5),
        subject: optional(6),
        content_type: text(7),
        extensions: optional(8),
        time: text(9),
        data: bytes(10).unwrap_or_default(),
    });
    Ok(DeadRow {
        seq: decoded.seq,
        event: decoded.event,
        columns: DeadColumns {
            id: text(1),
            topic: text(2),
            // What is no text is nobody's key.
            key: row.try_get_unchecked(3).unwrap_or_default(),
            event_type: text(4),
            rest,
        },
        state: DeadState::from_column(&row.get::<String, _>(11)),
        parked: row.get::<i64, _>(12) == 1,
        reason: row.get(13),
        error: row.get(14),
        attempts: row.get::<i64, _>(15) as u32,
        at: Timestamp::from_unix_micros(row.get(16)),
        sink: row.get(17),
    })
}
