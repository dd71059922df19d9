//! What a sink's owner writes: the lease, checkpoints, set-aside events, retention.

use std::time::Duration;

use bus_core::{LogId, Seq, Text};
use sqlx::{AssertSqlSafe, Connection, Row as _, Sqlite, SqliteConnection, Transaction, sqlite::SqliteRow};
use uuid::Uuid;

use super::{Tables, admin::Topics, database_now, log_error, micros};
use crate::{
    Acquire, Acquisition, Change, DeadState, EventKey, Lease, LogError, LogErrorKind, Owned, Pruned, SetAside, Start,
    TopicPattern, cursor::HOLE_RANGES_MAX,
};

/// The log's name; the event store's own table follows later.
pub(super) const LOG: &str = "outbox";
/// How long one janitor keeps others away.
const JANITOR_TTL: Duration = Duration::from_secs(60);
/// Marks of what was settled when, kept per retention time.
const MARKS_PER_RETENTION: u32 = 16;

const LOG_ID: &str = "SELECT log_id FROM {p}log WHERE name = ?";
const CURSOR_ROW: &str = "SELECT low, high, high_id, holes, sink_pos, epoch, owner, lease_until, incarnation, bus \
     FROM {p}cursor WHERE log = ? AND sink = ?";
const SEQUENCE: &str = "SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name = '{p}outbox'), 0)";
const LOWEST: &str = "SELECT coalesce(min(low), 0) FROM {p}cursor WHERE log = ?";
const ID_AT: &str = "SELECT id FROM {p}outbox WHERE seq = ?";
const REGISTER: &str = "INSERT INTO {p}cursor (log, sink, low, high, incarnation) VALUES (?, ?, ?, ?, ?)";
const TAKE: &str = "UPDATE {p}cursor SET epoch = ?, owner = ?, lease_until = ?, incarnation = ?, low = ?, high = ?, \
     topics = ?, bus = ? WHERE log = ? AND sink = ?";
const PARKED: &str = "SELECT topic, key, min(seq) FROM {p}dead_letter \
     WHERE log = ? AND sink = ? AND parked = 1 AND key IS NOT NULL GROUP BY topic, key";
/// Only the current epoch moves the cursor: a row that is not updated means that another owner came.
const CHECKPOINT: &str = "UPDATE {p}cursor SET low = ?, high = ?, high_id = coalesce(?, high_id), holes = ?, sink_pos = ?, \
     blocked = ?, lease_until = CAST(unixepoch('now', 'subsec') * 1000000 AS INTEGER) + ? \
     WHERE log = ? AND sink = ? AND epoch = ?";
const RELEASE: &str = "UPDATE {p}cursor SET lease_until = 0, owner = NULL WHERE log = ? AND sink = ? AND epoch = ?";
const SET_ASIDE: &str = "INSERT OR REPLACE INTO {p}dead_letter (log, sink, seq, state, parked, reason, error, attempts, at, \
     id, topic, key, type, source, subject, content_type, extensions, time, data) \
     SELECT ?, ?, seq, ?, ?, ?, ?, ?, CAST(unixepoch('now', 'subsec') * 1000000 AS INTEGER), \
     id, topic, key, type, source, subject, content_type, extensions, time, data FROM {p}outbox WHERE seq = ?";
const REMOVE: &str = "DELETE FROM {p}dead_letter WHERE log = ? AND sink = ? AND seq = ?";
const REFUSED: &str = "UPDATE {p}dead_letter SET state = CASE parked WHEN 1 THEN 'parked' ELSE 'dead' END, reason = ?, \
     error = ?, attempts = attempts + ? WHERE log = ? AND sink = ? AND seq = ?";
const REQUEST: &str = "UPDATE {p}request SET done = ?, failed = ?, state = CASE ? WHEN 1 THEN 'ended' ELSE 'open' END \
     WHERE id = ? AND log = ? AND sink = ?";
/// Whatever a request leaves behind waits again as it did before.
const REQUEST_LEFT: &str = "UPDATE {p}dead_letter SET state = CASE parked WHEN 1 THEN 'parked' ELSE 'dead' END \
     WHERE log = ? AND sink = ? AND state = 'retrying' \
     AND NOT EXISTS (SELECT 1 FROM {p}request WHERE log = ? AND sink = ? AND state = 'open')";
const JANITOR: &str =
    "UPDATE {p}log SET janitor = ?, janitor_until = ? WHERE name = ? AND (janitor = ? OR janitor_until <= ?)";
const MARKS: &str = "SELECT settled_marks FROM {p}log WHERE name = ?";
const SET_MARKS: &str = "UPDATE {p}log SET settled_marks = ? WHERE name = ?";
const SINKS: &str = "SELECT low, topics FROM {p}cursor WHERE log = ?";
const PRUNE: &str = "DELETE FROM {p}outbox WHERE seq IN \
     (SELECT seq FROM {p}outbox WHERE seq <= ?1 AND ({topics}) ORDER BY seq LIMIT ?2)";

/// The writer's connection, on behalf of one sink.
pub(super) struct Owner<'a> {
    pub(super) tables: &'a Tables,
    pub(super) sink: &'a str,
    pub(super) connection: &'a mut SqliteConnection,
}

/// A cursor's row.
struct Cursor {
    low: Seq,
    high: Seq,
    high_id: Option<String>,
    holes: String,
    position: Option<String>,
    epoch: u64,
    owner: Option<String>,
    lease_until: i64,
    incarnation: String,
    bus: Option<String>,
}

impl Owner<'_> {
    /// Begins a write transaction; a durable one has reached the disk when it is committed.
    async fn begin(&mut self, durable: bool) -> Result<Transaction<'_, Sqlite>, LogError> {
        let level = if durable { "PRAGMA synchronous = FULL" } else { "PRAGMA synchronous = NORMAL" };
        sqlx::query(level).execute(&mut *self.connection).await.map_err(log_error)?;
        self.connection.begin_with("BEGIN IMMEDIATE").await.map_err(log_error)
    }

    pub(super) async fn acquire(&mut self, request: &Acquire) -> Result<Acquisition, LogError> {
        let (tables, sink) = (self.tables, self.sink);
        let mut transaction = self.begin(true).await?;
        let now = database_now(&mut transaction).await?;
        let log_id = log_id(&mut transaction, tables).await?;
        let found = cursor_row(&mut transaction, tables, sink).await?;
        if let Some(cursor) = &found
            && let Some(owner) = cursor.owner.clone().filter(|_| cursor.lease_until > now)
        {
            let remaining = Duration::from_micros((cursor.lease_until - now).unsigned_abs());
            return Ok(Acquisition::Standby { owner, remaining });
        }
        let mut cursor = match found {
            Some(cursor) => cursor,
            None => register(&mut transaction, tables, sink, request.start).await?,
        };
        if request.new_incarnation | check_history(&mut transaction, tables, &mut cursor).await? {
            cursor.incarnation = Uuid::now_v7().to_string();
        }
        let epoch = (cursor.epoch + 1).max(request.epoch_min);
        let topics: Vec<&str> = request.topics.iter().map(TopicPattern::as_str).collect();
        let take = sqlx::query(tables.sql(TAKE))
            .bind(signed(epoch))
            .bind(&request.owner)
            .bind(now + micros(request.ttl))
            .bind(&cursor.incarnation)
            .bind(signed(cursor.low.0))
            .bind(signed(cursor.high.0))
            .bind(json(&topics))
            .bind(&request.bus)
            .bind(LOG)
            .bind(sink);
        take.execute(&mut *transaction).await.map_err(log_error)?;
        let parked = parked_keys(&mut transaction, tables, sink).await?;
        transaction.commit().await.map_err(log_error)?;
        Ok(Acquisition::Owned(Box::new(Owned {
            lease: Lease { epoch, ttl: request.ttl },
            log_id,
            incarnation: cursor.incarnation.into(),
            low: cursor.low,
            high: cursor.high,
            holes: parse(&cursor.holes, "holes")?,
            position: cursor.position.as_deref().map(|text| parse(text, "sink_pos")).transpose()?,
            parked,
            previous_bus: cursor.bus.filter(|bus| *bus != request.bus),
        })))
    }

    pub(super) async fn commit(&mut self, lease: &Lease, change: &Change) -> Result<(), LogError> {
        let (tables, sink) = (self.tables, self.sink);
        let mut transaction = self.begin(change.durable).await?;
        let checkpoint = sqlx::query(tables.sql(CHECKPOINT))
            .bind(signed(change.low.0))
            .bind(signed(change.high.0))
            .bind(change.high_id.as_deref())
            .bind(json(&change.holes.joined(HOLE_RANGES_MAX)))
            .bind(json(&change.position))
            .bind(json(&change.blocked))
            .bind(micros(lease.ttl))
            .bind(LOG)
            .bind(sink)
            .bind(signed(lease.epoch));
        let moved = checkpoint.execute(&mut *transaction).await.map_err(log_error)?;
        if moved.rows_affected() == 0 {
            transaction.rollback().await.map_err(log_error)?;
            return Err(fenced(lease));
        }
        for aside in &change.set_aside {
            set_aside(&mut transaction, tables, sink, aside).await?;
        }
        for seq in &change.removed {
            let remove = sqlx::query(tables.sql(REMOVE)).bind(LOG).bind(sink).bind(signed(seq.0));
            remove.execute(&mut *transaction).await.map_err(log_error)?;
        }
        for refused in &change.refused {
            let refuse = sqlx::query(tables.sql(REFUSED)).bind(refused.reason).bind(&refused.error);
            let refuse = refuse.bind(refused.attempts).bind(LOG).bind(sink).bind(signed(refused.seq.0));
            refuse.execute(&mut *transaction).await.map_err(log_error)?;
        }
        for request in &change.requests {
            let update = sqlx::query(tables.sql(REQUEST)).bind(signed(request.done)).bind(signed(request.failed));
            let update = update.bind(i64::from(request.ended)).bind(request.id).bind(LOG).bind(sink);
            update.execute(&mut *transaction).await.map_err(log_error)?;
        }
        if change.requests.iter().any(|request| request.ended) {
            let left = sqlx::query(tables.sql(REQUEST_LEFT)).bind(LOG).bind(sink).bind(LOG).bind(sink);
            left.execute(&mut *transaction).await.map_err(log_error)?;
        }
        transaction.commit().await.map_err(log_error)
    }

    pub(super) async fn release(&mut self, lease: &Lease) -> Result<(), LogError> {
        let (tables, sink) = (self.tables, self.sink);
        let mut transaction = self.begin(true).await?;
        let release = sqlx::query(tables.sql(RELEASE)).bind(LOG).bind(sink).bind(signed(lease.epoch));
        release.execute(&mut *transaction).await.map_err(log_error)?;
        transaction.commit().await.map_err(log_error)
    }

    /// Removes rows that all sinks settled at least `retention` ago. A registering sink and the janitor write one after
    /// the other, so no sink begins at a row that is just going.
    pub(super) async fn prune(
        &mut self,
        janitor: &str,
        retention: Duration,
        rows_max: usize,
    ) -> Result<Pruned, LogError> {
        let tables = self.tables;
        let mut transaction = self.begin(false).await?;
        let now = database_now(&mut transaction).await?;
        let elect = sqlx::query(tables.sql(JANITOR)).bind(janitor).bind(now + micros(JANITOR_TTL));
        let elected = elect.bind(LOG).bind(janitor).bind(now).execute(&mut *transaction).await.map_err(log_error)?;
        let sinks = sqlx::query(tables.sql(SINKS)).bind(LOG).fetch_all(&mut *transaction).await.map_err(log_error)?;
        if elected.rows_affected() == 0 || sinks.is_empty() {
            return Ok(Pruned::default());
        }
        let settled = sinks.iter().map(|row| row.get::<i64, _>(0)).min().unwrap_or(0);
        let marks: String =
            sqlx::query_scalar(tables.sql(MARKS)).bind(LOG).fetch_one(&mut *transaction).await.map_err(log_error)?;
        let (marks, removable) = Marks::read(&marks)?.advance(now, settled, micros(retention));
        let set = sqlx::query(tables.sql(SET_MARKS)).bind(json(&marks.0)).bind(LOG);
        set.execute(&mut *transaction).await.map_err(log_error)?;
        let rows = match removable {
            Some(upto) => prune_to(&mut transaction, tables, &sinks, upto, rows_max).await?,
            None => 0,
        };
        transaction.commit().await.map_err(log_error)?;
        Ok(Pruned { rows, more: rows >= rows_max as u64 })
    }
}

/// When every sink had settled how much: microseconds and place, ascending. Pure.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Marks(Vec<(i64, i64)>);

impl Marks {
    fn read(json: &str) -> Result<Self, LogError> {
        parse(json, "settled_marks").map(Self)
    }

    /// Notes that everything up to `settled` is settled now; answers the marks to keep, and up to where all was settled
    /// at least `retention` ago.
    fn advance(mut self, now: i64, settled: i64, retention: i64) -> (Self, Option<i64>) {
        let step = retention / i64::from(MARKS_PER_RETENTION);
        let (last_at, last_settled) = self.0.last().copied().unwrap_or((i64::MIN, 0));
        // A clock that was set back would hide all marks behind the future.
        self.0.retain(|(at, _)| *at <= now);
        if settled > last_settled && (self.0.is_empty() || now.saturating_sub(last_at) >= step) {
            self.0.push((now, settled));
        }
        let old = self.0.iter().rposition(|(at, _)| now.saturating_sub(*at) >= retention);
        let removable = old.map(|at| self.0[at].1);
        self.0.drain(..old.unwrap_or(0));
        (self, removable)
    }
}

async fn prune_to(
    transaction: &mut Transaction<'_, Sqlite>,
    tables: &Tables,
    sinks: &[SqliteRow],
    upto: i64,
    rows_max: usize,
) -> Result<u64, LogError> {
    // A row whose topic no sink wants stays: nobody has taken it.
    let mut patterns: Vec<String> = Vec::new();
    for sink in sinks {
        patterns.extend(parse::<Vec<String>>(&sink.get::<String, _>(1), "topics")?);
    }
    let wanted = if patterns.iter().any(|pattern| pattern == "*") { Topics::All } else { Topics::Any(patterns) };
    let sql = tables.expand(&PRUNE.replace("{topics}", &wanted.condition(3)));
    let mut delete = sqlx::query(AssertSqlSafe(sql)).bind(upto).bind(i64::try_from(rows_max).unwrap_or(i64::MAX));
    for pattern in wanted.patterns() {
        delete = delete.bind(pattern);
    }
    Ok(delete.execute(&mut **transaction).await.map_err(log_error)?.rows_affected())
}

async fn log_id(transaction: &mut Transaction<'_, Sqlite>, tables: &Tables) -> Result<LogId, LogError> {
    let query = sqlx::query_scalar::<_, String>(tables.sql(LOG_ID)).bind(LOG);
    let id = query.fetch_optional(&mut **transaction).await.map_err(log_error)?;
    let missing = || LogError::new(LogErrorKind::Schema, "the log is not registered: run `outbus migrate`");
    id.ok_or_else(missing)?.parse().map_err(|error| damaged("log_id", error))
}

async fn cursor_row(
    transaction: &mut Transaction<'_, Sqlite>,
    tables: &Tables,
    sink: &str,
) -> Result<Option<Cursor>, LogError> {
    let query = sqlx::query(tables.sql(CURSOR_ROW)).bind(LOG).bind(sink);
    let row = query.fetch_optional(&mut **transaction).await.map_err(log_error)?;
    Ok(row.map(|row| Cursor {
        low: Seq(row.get::<i64, _>(0).unsigned_abs()),
        high: Seq(row.get::<i64, _>(1).unsigned_abs()),
        high_id: row.get(2),
        holes: row.get(3),
        position: row.get(4),
        epoch: row.get::<i64, _>(5).unsigned_abs(),
        owner: row.get(6),
        lease_until: row.get(7),
        incarnation: row.get(8),
        bus: row.get(9),
    }))
}

/// Registers a sink: at what no other sink has settled yet, or at the end.
async fn register(
    transaction: &mut Transaction<'_, Sqlite>,
    tables: &Tables,
    sink: &str,
    start: Start,
) -> Result<Cursor, LogError> {
    let first: i64 = match start {
        Start::Earliest => sqlx::query_scalar(tables.sql(LOWEST)).bind(LOG).fetch_one(&mut **transaction).await,
        Start::Latest => sqlx::query_scalar(tables.sql(SEQUENCE)).fetch_one(&mut **transaction).await,
    }
    .map_err(log_error)?;
    let incarnation = Uuid::now_v7().to_string();
    let register = sqlx::query(tables.sql(REGISTER)).bind(LOG).bind(sink).bind(first).bind(first).bind(&incarnation);
    register.execute(&mut **transaction).await.map_err(log_error)?;
    let first = Seq(first.unsigned_abs());
    Ok(Cursor {
        low: first,
        high: first,
        high_id: None,
        holes: "[]".to_owned(),
        position: None,
        epoch: 0,
        owner: None,
        lease_until: 0,
        incarnation,
        bus: None,
    })
}

/// Whether the places the cursor knows mean other events now, as after a restore: what the broker remembers of them is
/// not believed then. Moves the cursor back where numbers above it will be drawn again.
async fn check_history(
    transaction: &mut Transaction<'_, Sqlite>,
    tables: &Tables,
    cursor: &mut Cursor,
) -> Result<bool, LogError> {
    let drawn: i64 = sqlx::query_scalar(tables.sql(SEQUENCE)).fetch_one(&mut **transaction).await.map_err(log_error)?;
    let drawn = Seq(drawn.unsigned_abs());
    if drawn < cursor.high {
        cursor.low = cursor.low.min(drawn);
        cursor.high = drawn;
        return Ok(true);
    }
    let query = sqlx::query_scalar(tables.sql(ID_AT)).bind(signed(cursor.high.0));
    let id: Option<String> = query.fetch_optional(&mut **transaction).await.map_err(log_error)?;
    Ok(id.is_some() && cursor.high_id.is_some() && id != cursor.high_id)
}

async fn parked_keys(
    transaction: &mut Transaction<'_, Sqlite>,
    tables: &Tables,
    sink: &str,
) -> Result<Vec<(EventKey, Seq)>, LogError> {
    let query = sqlx::query(tables.sql(PARKED)).bind(LOG).bind(sink);
    let rows = query.fetch_all(&mut **transaction).await.map_err(log_error)?;
    let key = |row: SqliteRow| {
        // A topic that is none has no event that could be held up.
        let topic = bus_core::Topic::new(row.get::<String, _>(0)).ok()?;
        Some(((topic, Text::from(row.get::<String, _>(1))), Seq(row.get::<i64, _>(2).unsigned_abs())))
    };
    Ok(rows.into_iter().filter_map(key).collect())
}

async fn set_aside(
    transaction: &mut Transaction<'_, Sqlite>,
    tables: &Tables,
    sink: &str,
    aside: &SetAside,
) -> Result<(), LogError> {
    let insert = sqlx::query(tables.sql(SET_ASIDE))
        .bind(LOG)
        .bind(sink)
        .bind(aside.state.as_str())
        .bind(i64::from(aside.state == DeadState::Parked))
        .bind(aside.reason)
        .bind(&aside.error)
        .bind(aside.attempts)
        .bind(signed(aside.seq.0));
    insert.execute(&mut **transaction).await.map_err(log_error)?;
    Ok(())
}

fn fenced(lease: &Lease) -> LogError {
    LogError::new(LogErrorKind::Fenced, format!("another relay owns this sink now: epoch {} is over", lease.epoch))
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("numbers, strings and sets of them serialize")
}

pub(super) fn parse<T: serde::de::DeserializeOwned>(text: &str, column: &'static str) -> Result<T, LogError> {
    serde_json::from_str(text).map_err(|error| damaged(column, error))
}

fn damaged(column: &'static str, error: impl std::error::Error + Send + Sync + 'static) -> LogError {
    LogError::with_source(LogErrorKind::Schema, format!("column `{column}` holds something it should not"), error)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Catches the mutant that removes what was settled a moment ago.
    #[test]
    fn only_what_was_settled_long_ago_is_removable() {
        let hour = 3_600_000_000;
        let (marks, removable) = Marks(vec![]).advance(0, 100, hour);
        assert_eq!(removable, None);
        let (marks, removable) = marks.advance(hour / 2, 200, hour);
        assert_eq!((marks.0.as_slice(), removable), ([(0, 100), (hour / 2, 200)].as_slice(), None));
        let (marks, removable) = marks.advance(hour, 300, hour);
        assert_eq!(removable, Some(100));
        let (marks, removable) = marks.advance(hour * 2, 300, hour);
        assert_eq!((marks.0.len(), removable), (1, Some(300)));
        assert_eq!(Marks(vec![]).advance(5, 100, 0).1, Some(100), "no retention: at once");
    }

    #[test]
    fn marks_stay_few() {
        let mut marks = Marks(vec![]);
        for now in 0..10_000 {
            marks = marks.advance(now * 1_000_000, now + 1, 3_600_000_000).0;
        }
        assert!(marks.0.len() <= MARKS_PER_RETENTION as usize + 2, "{} marks", marks.0.len());
    }
}
