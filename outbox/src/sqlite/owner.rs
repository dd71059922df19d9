//! What a sink's owner writes: the lease, checkpoints, set-aside events, retention.

use std::time::Duration;

use bus_core::{LogId, Position, Seq, SeqSet, Text, failpoint, mutant};
use sqlx::{AssertSqlSafe, Connection, Row as _, Sqlite, SqliteConnection, Transaction, sqlite::SqliteRow};
use uuid::Uuid;

use super::{Tables, admin::Topics, database_now, log_error, micros};
use crate::{
    Acquire, Acquisition, Change, DeadState, EventKey, Lease, LogError, LogErrorKind, Owned, Pruned, SetAside, Start,
    TopicPattern,
    cursor::{HOLE_RANGES_MAX, StoredCursor, UNCLAIMED_MAX, unclaimed_places},
    marks::{JANITOR_TTL, Marks},
    rows::{LOG, damaged, fenced, json, parse, signed},
};

const LOG_ROW: &str = "SELECT log_id, epoch_floor FROM {p}log WHERE name = ?";
const CURSOR_ROW: &str = "SELECT low, high, high_id, holes, sink_pos, epoch, owner, lease_until, incarnation, bus, topics \
     FROM {p}cursor WHERE log = ? AND sink = ?";
const SEQUENCE: &str = "SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name = '{p}outbox'), 0)";
const LOWEST: &str = "SELECT coalesce(min(low), 0) FROM {p}cursor WHERE log = ?";
const ID_AT: &str = "SELECT id FROM {p}outbox WHERE seq = ?";
const REGISTER: &str = "INSERT INTO {p}cursor (log, sink, low, high, topics, incarnation) VALUES (?, ?, ?, ?, ?, ?)";
const TAKE: &str = "UPDATE {p}cursor SET epoch = ?, owner = ?, lease_until = ?, incarnation = ?, low = ?, high = ?, \
     high_id = ?, holes = ?, topics = ?, bus = ? WHERE log = ? AND sink = ?";
/// Rows that no sink wanted so far, and this one wants now.
const UNCLAIMED: &str =
    "SELECT seq FROM {p}outbox WHERE seq <= ?1 AND ({wanted}) AND ({unwanted}) ORDER BY seq LIMIT ?2";
const PARKED: &str = "SELECT topic, key, min(seq) FROM {p}dead_letter \
     WHERE log = ? AND sink = ? AND parked = 1 AND key IS NOT NULL GROUP BY topic, key";
/// Only the current epoch moves the cursor: a row that is not updated means that another owner came.
const CHECKPOINT: &str = "UPDATE {p}cursor SET low = ?1, \
     high_id = CASE WHEN high = ?2 THEN coalesce(?3, high_id) ELSE ?3 END, high = ?2, holes = ?4, sink_pos = ?5, \
     blocked = ?6, lease_until = CAST(unixepoch('now', 'subsec') * 1000000 AS INTEGER) + ?7 \
     WHERE log = ?8 AND sink = ?9 AND epoch = ?10";
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
    stored: StoredCursor,
    position: Option<Position>,
    topics: Vec<String>,
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
        let (log_id, epoch_floor) = log_row(&mut transaction, tables).await?;
        let found = cursor_row(&mut transaction, tables, sink).await?;
        if let Some(cursor) = &found
            && let Some(owner) = cursor.owner.clone().filter(|_| cursor.lease_until > now)
        {
            let remaining = Duration::from_micros((cursor.lease_until - now).unsigned_abs());
            return Ok(Acquisition::Standby { owner, remaining });
        }
        let topics: Vec<String> = request.topics.iter().map(TopicPattern::to_string).collect();
        let mut cursor = match found {
            Some(cursor) => cursor,
            None => register(&mut transaction, tables, sink, request.start, &topics, epoch_floor).await?,
        };
        if request.new_incarnation | check_history(&mut transaction, tables, &mut cursor).await? {
            cursor.incarnation = Uuid::now_v7().to_string();
        }
        if cursor.topics != topics {
            // What was nothing to this sink, and to any other, is a hole now.
            cursor.stored.open(&unclaimed(&mut transaction, tables, &topics, cursor.stored.high).await?);
        }
        let epoch = (cursor.epoch + 1).max(request.epoch_min);
        let take = sqlx::query(tables.sql(TAKE))
            .bind(signed(epoch))
            .bind(&request.owner)
            .bind(now + micros(request.ttl))
            .bind(&cursor.incarnation)
            .bind(signed(cursor.stored.low.0))
            .bind(signed(cursor.stored.high.0))
            .bind(&cursor.stored.high_id)
            .bind(json(&cursor.stored.holes.joined(HOLE_RANGES_MAX)))
            .bind(json(&topics))
            .bind(&request.bus)
            .bind(LOG)
            .bind(sink);
        take.execute(&mut *transaction).await.map_err(log_error)?;
        let parked = parked_keys(&mut transaction, tables, sink).await?;
        failpoint("in-acquire");
        transaction.commit().await.map_err(log_error)?;
        Ok(Acquisition::Owned(Box::new(Owned {
            lease: Lease { epoch, ttl: request.ttl },
            log_id,
            incarnation: cursor.incarnation.into(),
            low: cursor.stored.low,
            high: cursor.stored.high,
            holes: cursor.stored.holes,
            position: cursor.position,
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
        failpoint("in-commit");
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
        let lows = sinks.iter().map(|row| row.get::<i64, _>(0));
        let settled = if mutant("janitor-forgets-a-sink") { lows.max() } else { lows.min() }.unwrap_or(0);
        let marks: String =
            sqlx::query_scalar(tables.sql(MARKS)).bind(LOG).fetch_one(&mut *transaction).await.map_err(log_error)?;
        let (marks, removable) = Marks(parse(&marks, "settled_marks")?).advance(now, settled, micros(retention));
        let set = sqlx::query(tables.sql(SET_MARKS)).bind(json(&marks.0)).bind(LOG);
        set.execute(&mut *transaction).await.map_err(log_error)?;
        let rows = match removable {
            Some(upto) => prune_to(&mut transaction, tables, &sinks, upto, rows_max).await?,
            None => 0,
        };
        failpoint("in-prune");
        transaction.commit().await.map_err(log_error)?;
        Ok(Pruned { rows, more: rows >= rows_max as u64 })
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
    let patterns = wanted_topics(sinks)?;
    let wanted = if patterns.iter().any(|pattern| pattern == "*") { Topics::All } else { Topics::Any(patterns) };
    let sql = tables.expand(&PRUNE.replace("{topics}", &wanted.condition(3)));
    let mut delete = sqlx::query(AssertSqlSafe(sql)).bind(upto).bind(i64::try_from(rows_max).unwrap_or(i64::MAX));
    for pattern in wanted.patterns() {
        delete = delete.bind(pattern);
    }
    Ok(delete.execute(&mut **transaction).await.map_err(log_error)?.rows_affected())
}

async fn log_row(transaction: &mut Transaction<'_, Sqlite>, tables: &Tables) -> Result<(LogId, u64), LogError> {
    let row = sqlx::query(tables.sql(LOG_ROW)).bind(LOG).fetch_optional(&mut **transaction).await.map_err(log_error)?;
    let missing = || LogError::new(LogErrorKind::Schema, "the log is not registered: run `outbus migrate`");
    let row = row.ok_or_else(missing)?;
    let log_id = row.get::<String, _>(0).parse().map_err(|error| damaged("log_id", error))?;
    Ok((log_id, row.get::<i64, _>(1).unsigned_abs()))
}

async fn cursor_row(
    transaction: &mut Transaction<'_, Sqlite>,
    tables: &Tables,
    sink: &str,
) -> Result<Option<Cursor>, LogError> {
    let query = sqlx::query(tables.sql(CURSOR_ROW)).bind(LOG).bind(sink);
    let Some(row) = query.fetch_optional(&mut **transaction).await.map_err(log_error)? else { return Ok(None) };
    Ok(Some(Cursor {
        stored: StoredCursor {
            low: Seq(row.get::<i64, _>(0).unsigned_abs()),
            high: Seq(row.get::<i64, _>(1).unsigned_abs()),
            high_id: row.get(2),
            holes: parse(&row.get::<String, _>(3), "holes")?,
        },
        position: row.get::<Option<String>, _>(4).map(|text| parse(&text, "sink_pos")).transpose()?,
        epoch: row.get::<i64, _>(5).unsigned_abs(),
        owner: row.get(6),
        lease_until: row.get(7),
        incarnation: row.get(8),
        bus: row.get(9),
        topics: parse(&row.get::<String, _>(10), "topics")?,
    }))
}

/// Registers a sink: at what no other sink has settled or wanted yet, or at the end.
async fn register(
    transaction: &mut Transaction<'_, Sqlite>,
    tables: &Tables,
    sink: &str,
    start: Start,
    topics: &[String],
    epoch: u64,
) -> Result<Cursor, LogError> {
    let first: i64 = match start {
        Start::Earliest => sqlx::query_scalar(tables.sql(LOWEST)).bind(LOG).fetch_one(&mut **transaction).await,
        Start::Latest => sqlx::query_scalar(tables.sql(SEQUENCE)).fetch_one(&mut **transaction).await,
    }
    .map_err(log_error)?;
    let mut first = Seq(first.unsigned_abs());
    if start == Start::Earliest
        && let Some(unclaimed) = unclaimed(transaction, tables, topics, first).await?.first()
    {
        first = unclaimed.previous();
    }
    let incarnation = Uuid::now_v7().to_string();
    let register = sqlx::query(tables.sql(REGISTER)).bind(LOG).bind(sink).bind(signed(first.0)).bind(signed(first.0));
    register.bind(json(&topics)).bind(&incarnation).execute(&mut **transaction).await.map_err(log_error)?;
    Ok(Cursor {
        stored: StoredCursor::behind(first),
        position: None,
        topics: topics.to_vec(),
        epoch,
        owner: None,
        lease_until: 0,
        incarnation,
        bus: None,
    })
}

/// The rows up to `high` with one of these topics that no sink wanted so far.
async fn unclaimed(
    transaction: &mut Transaction<'_, Sqlite>,
    tables: &Tables,
    topics: &[String],
    high: Seq,
) -> Result<SeqSet, LogError> {
    let sinks = sqlx::query(tables.sql(SINKS)).bind(LOG).fetch_all(&mut **transaction).await.map_err(log_error)?;
    let (wanted, unwanted) = (Topics::Any(topics.to_vec()), Topics::None(wanted_topics(&sinks)?));
    let sql = UNCLAIMED.replace("{wanted}", &wanted.condition(3));
    let sql = sql.replace("{unwanted}", &unwanted.condition(3 + topics.len()));
    let mut query = sqlx::query_scalar(AssertSqlSafe(tables.expand(&sql))).bind(signed(high.0));
    query = query.bind(i64::try_from(UNCLAIMED_MAX + 1).unwrap_or(i64::MAX));
    for pattern in wanted.patterns().iter().chain(unwanted.patterns()) {
        query = query.bind(pattern);
    }
    let rows: Vec<i64> = query.fetch_all(&mut **transaction).await.map_err(log_error)?;
    Ok(unclaimed_places(&rows, high))
}

/// The topics that any of these sinks takes.
fn wanted_topics(sinks: &[SqliteRow]) -> Result<Vec<String>, LogError> {
    let mut patterns: Vec<String> = Vec::new();
    for sink in sinks {
        patterns.extend(parse::<Vec<String>>(&sink.get::<String, _>(1), "topics")?);
    }
    Ok(patterns)
}

/// Whether the places the cursor knows mean other events now: what the broker remembers of them is not believed then. As
/// the cursor was not restored together with its log, nobody knows since when they differ: it begins anew with what is
/// there.
async fn check_history(
    transaction: &mut Transaction<'_, Sqlite>,
    tables: &Tables,
    cursor: &mut Cursor,
) -> Result<bool, LogError> {
    let drawn: i64 = sqlx::query_scalar(tables.sql(SEQUENCE)).fetch_one(&mut **transaction).await.map_err(log_error)?;
    let drawn = Seq(drawn.unsigned_abs());
    let query = sqlx::query_scalar(tables.sql(ID_AT)).bind(signed(cursor.stored.high.0));
    let id: Option<String> = query.fetch_optional(&mut **transaction).await.map_err(log_error)?;
    Ok(cursor.stored.is_of_another_log(drawn, id.as_deref()))
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
