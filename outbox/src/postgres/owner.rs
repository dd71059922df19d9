//! What a sink's owner writes: the lease, checkpoints, set-aside events, retention.

use std::time::Duration;

use bus_core::{LogId, Position, Seq, SeqSet, Text, failpoint, mutant};
use tokio_postgres::{Client, Row, types::Type};
use uuid::Uuid;

use super::{
    DURABLE, Parameter, TIMELINE, Tables, begin, column, log_error,
    values::{Micros, like, multirange, parse_multirange},
};
use crate::{
    Acquire, Acquisition, Change, DeadState, EventKey, Lease, LogError, LogErrorKind, Owned, Pruned, Start,
    TopicPattern,
    cursor::{HOLE_RANGES_MAX, StoredCursor, UNCLAIMED_MAX, unclaimed_places},
    marks::{JANITOR_TTL, Marks},
    rows::{LOG, damaged, fenced, json, parse, signed},
};

/// Whoever registers a sink or removes rows holds this row: a sink never begins at a row that is just going.
const LOG_ROW: &str = "SELECT log_id, epoch_floor FROM {p}log WHERE name = $1 FOR UPDATE";
const LEASED: &str = "SELECT owner, extract(epoch FROM lease_until - clock_timestamp())::float8 FROM {p}cursor \
     WHERE log = $1 AND sink = $2 AND owner IS NOT NULL AND lease_until > clock_timestamp()";
const CURSOR_ROW: &str = "SELECT low, high, high_id, holes::text, sink_pos::text, epoch, incarnation, bus, topics::text, \
     history FROM {p}cursor WHERE log = $1 AND sink = $2 FOR UPDATE";
const SEQUENCE: &str = "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {p}outbox_seq";
/// The server's identity and its timeline: another one after a restore or a failover.
const HISTORY: &str = "SELECT system_identifier::text || '/' || {timeline} FROM pg_control_system()";
const LOWEST: &str = "SELECT coalesce(min(low), 0) FROM {p}cursor WHERE log = $1";
const ID_AT: &str = "SELECT id FROM {p}outbox WHERE seq = $1";
const REGISTER: &str = "INSERT INTO {p}cursor (log, sink, low, high, topics, incarnation) \
     VALUES ($1, $2, $3, $3, $4::text::jsonb, $5)";
const TAKE: &str = "UPDATE {p}cursor SET epoch = $3, owner = $4, \
     lease_until = clock_timestamp() + make_interval(secs => $5), incarnation = $6, low = $7, high = $8, high_id = $9, \
     holes = $10::text::int8multirange, topics = $11::text::jsonb, bus = $12, history = $13 WHERE log = $1 AND sink = $2";
/// Rows that no sink wanted so far, and this one wants now.
const UNCLAIMED: &str = "SELECT seq FROM {p}outbox WHERE seq <= $1 AND topic LIKE ANY ($2::text[]) \
     AND NOT (topic LIKE ANY ($3::text[])) ORDER BY seq LIMIT $4";
const PARKED: &str = "SELECT topic, key, min(seq) FROM {p}dead_letter \
     WHERE log = $1 AND sink = $2 AND parked AND key IS NOT NULL GROUP BY topic, key";
/// Only the current epoch moves the cursor: a row that is not updated means that another owner came. Nor is it moved on
/// another timeline than it was taken on: after a failover that lost something, places are drawn again that this owner has
/// settled. `$11` is whether the commit waits for the disk; joined, so that it holds for this transaction, behind a pooler
/// too.
const CHECKPOINT: &str = "UPDATE {p}cursor SET low = $3, \
     high_id = CASE WHEN high = $4 THEN coalesce($5, high_id) ELSE $5 END, high = $4, \
     holes = $6::text::int8multirange, sink_pos = $7::text::jsonb, blocked = $8::text::jsonb, \
     lease_until = clock_timestamp() + make_interval(secs => $9) \
     FROM (SELECT set_config('synchronous_commit', CASE WHEN $11 THEN {durable} ELSE 'off' END, true)) mode \
     WHERE log = $1 AND sink = $2 AND epoch = $10 AND right(history, 8) = {timeline} \
     RETURNING pg_current_xact_id()::text";
const RELEASE: &str =
    "UPDATE {p}cursor SET lease_until = '-infinity', owner = NULL WHERE log = $1 AND sink = $2 AND epoch = $3";
const SET_ASIDE: &str = "INSERT INTO {p}dead_letter (log, sink, seq, state, parked, reason, error, attempts, \
     id, topic, key, type, source, subject, content_type, extensions, time, data) \
     SELECT $1, $2, seq, aside.state, aside.state = 'parked', aside.reason, aside.error, aside.attempts, \
     id, topic, key, type, source, subject, content_type, extensions, time, data \
     FROM unnest($3::int8[], $4::text[], $5::text[], $6::text[], $7::int8[]) AS aside (place, state, reason, error, attempts) \
     JOIN {p}outbox ON seq = aside.place \
     ON CONFLICT (log, sink, seq) DO UPDATE SET state = excluded.state, parked = excluded.parked, \
     reason = excluded.reason, error = excluded.error, attempts = excluded.attempts";
const REMOVE: &str = "DELETE FROM {p}dead_letter WHERE log = $1 AND sink = $2 AND seq = ANY ($3)";
const REFUSED: &str = "UPDATE {p}dead_letter dead SET state = CASE WHEN parked THEN 'parked' ELSE 'dead' END, \
     reason = refused.reason, error = refused.error, attempts = dead.attempts + refused.attempts \
     FROM unnest($3::int8[], $4::text[], $5::text[], $6::int8[]) AS refused (place, reason, error, attempts) \
     WHERE log = $1 AND sink = $2 AND seq = refused.place";
const REQUEST: &str = "UPDATE {p}request SET done = $4, failed = $5, \
     state = CASE WHEN $6 THEN 'ended' ELSE 'open' END WHERE id = $3 AND log = $1 AND sink = $2";
/// Whatever a request leaves behind waits again as it did before.
const REQUEST_LEFT: &str = "UPDATE {p}dead_letter SET state = CASE WHEN parked THEN 'parked' ELSE 'dead' END \
     WHERE log = $1 AND sink = $2 AND state = 'retrying' \
     AND NOT EXISTS (SELECT 1 FROM {p}request WHERE log = $1 AND sink = $2 AND state = 'open')";
const JANITOR_ROW: &str = "SELECT settled_marks::text, janitor = $2 OR janitor_until <= clock_timestamp() \
     OR janitor IS NULL, clock_timestamp() FROM {p}log WHERE name = $1 FOR UPDATE SKIP LOCKED";
const JANITOR: &str = "UPDATE {p}log SET janitor = $2, janitor_until = clock_timestamp() + make_interval(secs => $3), \
     settled_marks = $4::text::jsonb WHERE name = $1";
const SINKS: &str = "SELECT low, topics::text FROM {p}cursor WHERE log = $1";
/// By the rows' own addresses, which no one moves: a table that was empty when it was vacuumed counts as empty until it is
/// analyzed, and a join was planned as if it were: for each row of the log it read all that should go.
const PRUNE: &str = "DELETE FROM {p}outbox WHERE ctid = ANY (ARRAY(SELECT ctid FROM {p}outbox WHERE seq <= $1 \
     AND topic LIKE ANY ($2::text[]) ORDER BY seq LIMIT $3))";

/// The writer's connection, on behalf of one sink.
pub(super) struct Owner<'a> {
    pub(super) tables: &'a Tables,
    pub(super) sink: &'a str,
    pub(super) client: &'a mut Client,
}

/// A cursor's row.
struct Cursor {
    stored: StoredCursor,
    position: Option<Position>,
    epoch: u64,
    incarnation: String,
    bus: Option<String>,
    topics: Vec<String>,
    history: String,
}

impl Owner<'_> {
    /// Answers the server's timeline too, where it took the log.
    pub(super) async fn acquire(&mut self, request: &Acquire) -> Result<(Acquisition, Option<String>), LogError> {
        let (tables, sink) = (self.tables, self.sink);
        // A standby asks often: it locks nothing while somebody else owns the log.
        if let Some(standby) = leased(self.client, tables, sink).await? {
            return Ok((standby, None));
        }
        let transaction = begin(self.client).await?;
        let client = transaction.client();
        let (log_id, epoch_floor) = log_row(client, tables).await?;
        let found = cursor_row(client, tables, sink).await?;
        if let Some(standby) = leased(client, tables, sink).await?.filter(|_| !mutant("lease-read-once")) {
            return Ok((standby, None));
        }
        let topics: Vec<String> = request.topics.iter().map(TopicPattern::to_string).collect();
        let mut cursor = match found {
            Some(cursor) => cursor,
            None => register(client, tables, sink, request.start, &topics, epoch_floor).await?,
        };
        if request.new_incarnation | check_history(client, tables, &mut cursor).await? {
            cursor.incarnation = Uuid::now_v7().to_string();
        }
        if cursor.topics != topics {
            // What was nothing to this sink, and to any other, is a hole now.
            cursor.stored.open(&unclaimed(client, tables, &topics, cursor.stored.high).await?);
        }
        let epoch = (cursor.epoch + 1).max(request.epoch_min);
        let parameters: [Parameter<'_>; 13] = [
            (&LOG, Type::TEXT),
            (&sink, Type::TEXT),
            (&signed(epoch), Type::INT8),
            (&request.owner, Type::TEXT),
            (&request.ttl.as_secs_f64(), Type::FLOAT8),
            (&cursor.incarnation, Type::TEXT),
            (&signed(cursor.stored.low.0), Type::INT8),
            (&signed(cursor.stored.high.0), Type::INT8),
            (&cursor.stored.high_id, Type::TEXT),
            (&multirange(&cursor.stored.holes.joined(HOLE_RANGES_MAX)), Type::TEXT),
            (&json(&topics), Type::TEXT),
            (&request.bus, Type::TEXT),
            (&cursor.history, Type::TEXT),
        ];
        client.execute_typed(&tables.qualify(TAKE), &parameters).await.map_err(log_error)?;
        let parked = parked_keys(client, tables, sink).await?;
        failpoint("in-acquire");
        transaction.commit().await.map_err(log_error)?;
        let timeline = cursor.history.rsplit_once('/').map(|(_, timeline)| timeline.to_owned());
        let owned = Owned {
            lease: Lease { epoch, ttl: request.ttl },
            log_id,
            incarnation: cursor.incarnation.into(),
            low: cursor.stored.low,
            high: cursor.stored.high,
            holes: cursor.stored.holes,
            position: cursor.position,
            parked,
            previous_bus: cursor.bus.filter(|bus| *bus != request.bus),
        };
        Ok((Acquisition::Owned(Box::new(owned)), timeline))
    }

    /// Answers the number of the transaction that did it.
    pub(super) async fn commit(&mut self, lease: &Lease, change: &Change) -> Result<u64, LogError> {
        let (tables, sink) = (self.tables, self.sink);
        if change.is_checkpoint_only() {
            return checkpoint(self.client, tables, sink, lease, change).await;
        }
        let transaction = begin(self.client).await?;
        let client = transaction.client();
        let xid = checkpoint(client, tables, sink, lease, change).await?;
        write_set_aside(client, tables, sink, change).await?;
        failpoint("in-commit");
        for request in &change.requests {
            let parameters: [Parameter<'_>; 6] = [
                (&LOG, Type::TEXT),
                (&sink, Type::TEXT),
                (&request.id, Type::INT8),
                (&signed(request.done), Type::INT8),
                (&signed(request.failed), Type::INT8),
                (&request.ended, Type::BOOL),
            ];
            client.execute_typed(&tables.qualify(REQUEST), &parameters).await.map_err(log_error)?;
        }
        if change.requests.iter().any(|request| request.ended) {
            let parameters: [Parameter<'_>; 2] = [(&LOG, Type::TEXT), (&sink, Type::TEXT)];
            client.execute_typed(&tables.qualify(REQUEST_LEFT), &parameters).await.map_err(log_error)?;
        }
        transaction.commit().await.map_err(log_error)?;
        Ok(xid)
    }

    pub(super) async fn release(&mut self, lease: &Lease) -> Result<(), LogError> {
        let parameters: [Parameter<'_>; 3] =
            [(&LOG, Type::TEXT), (&self.sink, Type::TEXT), (&signed(lease.epoch), Type::INT8)];
        self.client.execute_typed(&self.tables.qualify(RELEASE), &parameters).await.map_err(log_error)?;
        Ok(())
    }

    /// Removes rows that all sinks settled at least `retention` ago.
    pub(super) async fn prune(
        &mut self,
        janitor: &str,
        retention: Duration,
        rows_max: usize,
    ) -> Result<Pruned, LogError> {
        let tables = self.tables;
        let transaction = begin(self.client).await?;
        let client = transaction.client();
        let elect: [Parameter<'_>; 2] = [(&LOG, Type::TEXT), (&janitor, Type::TEXT)];
        let row = client.query_typed_opt(&tables.qualify(JANITOR_ROW), &elect).await.map_err(log_error)?;
        let Some(row) = row else { return Ok(Pruned::default()) };
        let sinks = client.query_typed(&tables.qualify(SINKS), &[(&LOG, Type::TEXT)]).await.map_err(log_error)?;
        if !column::<bool>(&row, 1)? || sinks.is_empty() {
            return Ok(Pruned::default());
        }
        let lows = sinks.iter().map(|row| column::<i64>(row, 0)).collect::<Result<Vec<_>, _>>()?;
        let settled = if mutant("janitor-forgets-a-sink") { lows.into_iter().max() } else { lows.into_iter().min() };
        let settled = settled.unwrap_or(0);
        let marks = Marks(parse(column(&row, 0)?, "settled_marks")?);
        let kept_for = i64::try_from(retention.as_micros()).unwrap_or(i64::MAX);
        let (marks, removable) = marks.advance(column::<Micros>(&row, 2)?.0, settled, kept_for);
        let parameters: [Parameter<'_>; 4] = [
            (&LOG, Type::TEXT),
            (&janitor, Type::TEXT),
            (&JANITOR_TTL.as_secs_f64(), Type::FLOAT8),
            (&json(&marks.0), Type::TEXT),
        ];
        client.execute_typed(&tables.qualify(JANITOR), &parameters).await.map_err(log_error)?;
        let rows = match removable {
            // A row whose topic no sink wants stays: nobody has taken it.
            Some(upto) => {
                let patterns = like(wanted_topics(&sinks)?.iter().map(String::as_str));
                let most = i64::try_from(rows_max).unwrap_or(i64::MAX);
                let parameters: [Parameter<'_>; 3] =
                    [(&upto, Type::INT8), (&patterns, Type::TEXT_ARRAY), (&most, Type::INT8)];
                client.execute_typed(&tables.qualify(PRUNE), &parameters).await.map_err(log_error)?
            }
            None => 0,
        };
        failpoint("in-prune");
        transaction.commit().await.map_err(log_error)?;
        Ok(Pruned { rows, more: rows >= rows_max as u64 })
    }
}

/// Who owns the log for the sink, if somebody does.
async fn leased(client: &Client, tables: &Tables, sink: &str) -> Result<Option<Acquisition>, LogError> {
    let parameters: [Parameter<'_>; 2] = [(&LOG, Type::TEXT), (&sink, Type::TEXT)];
    let sql = match mutant("lease-by-host-clock") {
        false => tables.qualify(LEASED),
        true => {
            let since = std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs_f64();
            tables.qualify(&LEASED.replace("clock_timestamp()", &format!("to_timestamp({since})")))
        }
    };
    let row = client.query_typed_opt(&sql, &parameters).await.map_err(log_error)?;
    row.map(|row| {
        let remaining = Duration::from_secs_f64(column::<f64>(&row, 1)?.clamp(0.0, 86_400.0));
        Ok(Acquisition::Standby { owner: column(&row, 0)?, remaining })
    })
    .transpose()
}

async fn log_row(client: &Client, tables: &Tables) -> Result<(LogId, u64), LogError> {
    let row = client.query_typed_opt(&tables.qualify(LOG_ROW), &[(&LOG, Type::TEXT)]).await.map_err(log_error)?;
    let missing = || LogError::new(LogErrorKind::Schema, "the log is not registered: run `outbus migrate`");
    let row = row.ok_or_else(missing)?;
    let log_id = column::<&str>(&row, 0)?.parse().map_err(|error| damaged("log_id", error))?;
    Ok((log_id, column::<i64>(&row, 1)?.unsigned_abs()))
}

async fn cursor_row(client: &Client, tables: &Tables, sink: &str) -> Result<Option<Cursor>, LogError> {
    let parameters: [Parameter<'_>; 2] = [(&LOG, Type::TEXT), (&sink, Type::TEXT)];
    let row = client.query_typed_opt(&tables.qualify(CURSOR_ROW), &parameters).await.map_err(log_error)?;
    let Some(row) = row else { return Ok(None) };
    Ok(Some(Cursor {
        stored: StoredCursor {
            low: Seq(column::<i64>(&row, 0)?.unsigned_abs()),
            high: Seq(column::<i64>(&row, 1)?.unsigned_abs()),
            high_id: column(&row, 2)?,
            holes: parse_multirange(column(&row, 3)?)?,
        },
        position: column::<Option<&str>>(&row, 4)?.map(|text| parse(text, "sink_pos")).transpose()?,
        epoch: column::<i64>(&row, 5)?.unsigned_abs(),
        incarnation: column(&row, 6)?,
        bus: column(&row, 7)?,
        topics: parse(column(&row, 8)?, "topics")?,
        history: column(&row, 9)?,
    }))
}

/// Registers a sink: at what no other sink has settled or wanted yet, or at the end.
async fn register(
    client: &Client,
    tables: &Tables,
    sink: &str,
    start: Start,
    topics: &[String],
    epoch: u64,
) -> Result<Cursor, LogError> {
    let mut first = match start {
        Start::Earliest => {
            let row =
                client.query_typed_one(&tables.qualify(LOWEST), &[(&LOG, Type::TEXT)]).await.map_err(log_error)?;
            Seq(column::<i64>(&row, 0)?.unsigned_abs())
        }
        Start::Latest => drawn(client, tables).await?,
    };
    if start == Start::Earliest
        && let Some(unclaimed) = unclaimed(client, tables, topics, first).await?.first()
    {
        first = unclaimed.previous();
    }
    let incarnation = Uuid::now_v7().to_string();
    let parameters: [Parameter<'_>; 5] = [
        (&LOG, Type::TEXT),
        (&sink, Type::TEXT),
        (&signed(first.0), Type::INT8),
        (&json(&topics), Type::TEXT),
        (&incarnation, Type::TEXT),
    ];
    client.execute_typed(&tables.qualify(REGISTER), &parameters).await.map_err(log_error)?;
    Ok(Cursor {
        stored: StoredCursor::behind(first),
        position: None,
        epoch,
        incarnation,
        bus: None,
        topics: topics.to_vec(),
        history: String::new(),
    })
}

/// The highest place that was drawn, committed or not.
pub(super) async fn drawn(client: &Client, tables: &Tables) -> Result<Seq, LogError> {
    let row = client.query_typed_one(&tables.qualify(SEQUENCE), &[]).await.map_err(log_error)?;
    Ok(Seq(column::<i64>(&row, 0)?.unsigned_abs()))
}

/// The rows up to `high` with one of these topics that no sink wanted so far.
async fn unclaimed(client: &Client, tables: &Tables, topics: &[String], high: Seq) -> Result<SeqSet, LogError> {
    let sinks = client.query_typed(&tables.qualify(SINKS), &[(&LOG, Type::TEXT)]).await.map_err(log_error)?;
    let wanted = like(topics.iter().map(String::as_str));
    let unwanted = like(wanted_topics(&sinks)?.iter().map(String::as_str));
    let parameters: [Parameter<'_>; 4] = [
        (&signed(high.0), Type::INT8),
        (&wanted, Type::TEXT_ARRAY),
        (&unwanted, Type::TEXT_ARRAY),
        (&(UNCLAIMED_MAX as i64 + 1), Type::INT8),
    ];
    let rows = client.query_typed(&tables.qualify(UNCLAIMED), &parameters).await.map_err(log_error)?;
    let rows = rows.iter().map(|row| column(row, 0)).collect::<Result<Vec<i64>, _>>()?;
    Ok(unclaimed_places(&rows, high))
}

/// The topics that any of these sinks takes.
fn wanted_topics(sinks: &[Row]) -> Result<Vec<String>, LogError> {
    let mut patterns: Vec<String> = Vec::new();
    for sink in sinks {
        patterns.extend(parse::<Vec<String>>(column(sink, 1)?, "topics")?);
    }
    Ok(patterns)
}

/// Whether the places the cursor knows may mean other events now: after a restore or a failover, or where the event at
/// its highest place is another one. What the broker remembers of them is not believed then. Where the cursor was not
/// restored together with its log, nobody knows since when the places differ: it begins anew with what is there.
async fn check_history(client: &Client, tables: &Tables, cursor: &mut Cursor) -> Result<bool, LogError> {
    let row = client.query_typed_one(&HISTORY.replace("{timeline}", TIMELINE), &[]).await.map_err(log_error)?;
    let history: String = column(&row, 0)?;
    let is_elsewhere = !cursor.history.is_empty() && cursor.history != history;
    cursor.history = history;
    let drawn = drawn(client, tables).await?;
    let high: [Parameter<'_>; 1] = [(&signed(cursor.stored.high.0), Type::INT8)];
    let row = client.query_typed_opt(&tables.qualify(ID_AT), &high).await.map_err(log_error)?;
    let id: Option<String> = row.map(|row| column(&row, 0)).transpose()?;
    Ok(cursor.stored.is_of_another_log(drawn, id.as_deref()) || is_elsewhere)
}

async fn parked_keys(client: &Client, tables: &Tables, sink: &str) -> Result<Vec<(EventKey, Seq)>, LogError> {
    let parameters: [Parameter<'_>; 2] = [(&LOG, Type::TEXT), (&sink, Type::TEXT)];
    let rows = client.query_typed(&tables.qualify(PARKED), &parameters).await.map_err(log_error)?;
    let mut keys = Vec::new();
    for row in &rows {
        // A topic that is none has no event that could be held up.
        if let Ok(topic) = bus_core::Topic::new(column::<&str>(row, 0)?) {
            let key = Text::from(column::<&str>(row, 1)?);
            keys.push(((topic, key), Seq(column::<i64>(row, 2)?.unsigned_abs())));
        }
    }
    Ok(keys)
}

/// Moves the cursor; answers the number of the transaction.
async fn checkpoint(
    client: &Client,
    tables: &Tables,
    sink: &str,
    lease: &Lease,
    change: &Change,
) -> Result<u64, LogError> {
    let parameters: [Parameter<'_>; 11] = [
        (&LOG, Type::TEXT),
        (&sink, Type::TEXT),
        (&signed(change.low.0), Type::INT8),
        (&signed(change.high.0), Type::INT8),
        (&change.high_id.as_deref(), Type::TEXT),
        (&multirange(&change.holes.joined(HOLE_RANGES_MAX)), Type::TEXT),
        (&json(&change.position), Type::TEXT),
        (&json(&change.blocked), Type::TEXT),
        (&lease.ttl.as_secs_f64(), Type::FLOAT8),
        (&signed(lease.epoch), Type::INT8),
        (&change.durable, Type::BOOL),
    ];
    let sql = CHECKPOINT.replace("{timeline}", TIMELINE).replace("{durable}", DURABLE);
    let sql = match (mutant("stale-epoch-writes"), mutant("bound-by-xmax")) {
        (true, _) => sql.replace("epoch = $10", "epoch >= $10"),
        (_, true) => sql.replace("pg_current_xact_id()", "pg_snapshot_xmax(pg_current_snapshot())"),
        _ => sql,
    };
    let row = client.query_typed_opt(&tables.qualify(&sql), &parameters).await.map_err(log_error)?;
    let row = row.ok_or_else(|| fenced(lease))?;
    column::<&str>(&row, 0)?.parse().map_err(|error| damaged("xid", error))
}

async fn write_set_aside(client: &Client, tables: &Tables, sink: &str, change: &Change) -> Result<(), LogError> {
    let places = |asides: &[crate::SetAside]| asides.iter().map(|aside| signed(aside.seq.0)).collect::<Vec<i64>>();
    let states: Vec<&str> =
        change.set_aside.iter().map(|aside: &crate::SetAside| aside.state).map(DeadState::as_str).collect();
    let reasons = |asides: &[crate::SetAside]| asides.iter().map(|aside| aside.reason).collect::<Vec<&str>>();
    let errors = |asides: &[crate::SetAside]| asides.iter().map(|aside| text(&aside.error)).collect::<Vec<String>>();
    let attempts =
        |asides: &[crate::SetAside]| asides.iter().map(|aside| i64::from(aside.attempts)).collect::<Vec<i64>>();
    if !change.set_aside.is_empty() {
        let aside = &change.set_aside;
        let parameters: [Parameter<'_>; 7] = [
            (&LOG, Type::TEXT),
            (&sink, Type::TEXT),
            (&places(aside), Type::INT8_ARRAY),
            (&states, Type::TEXT_ARRAY),
            (&reasons(aside), Type::TEXT_ARRAY),
            (&errors(aside), Type::TEXT_ARRAY),
            (&attempts(aside), Type::INT8_ARRAY),
        ];
        client.execute_typed(&tables.qualify(SET_ASIDE), &parameters).await.map_err(log_error)?;
    }
    if !change.removed.is_empty() {
        let removed: Vec<i64> = change.removed.iter().map(|seq| signed(seq.0)).collect();
        let parameters: [Parameter<'_>; 3] = [(&LOG, Type::TEXT), (&sink, Type::TEXT), (&removed, Type::INT8_ARRAY)];
        client.execute_typed(&tables.qualify(REMOVE), &parameters).await.map_err(log_error)?;
    }
    if !change.refused.is_empty() {
        let refused = &change.refused;
        let parameters: [Parameter<'_>; 6] = [
            (&LOG, Type::TEXT),
            (&sink, Type::TEXT),
            (&places(refused), Type::INT8_ARRAY),
            (&reasons(refused), Type::TEXT_ARRAY),
            (&errors(refused), Type::TEXT_ARRAY),
            (&attempts(refused), Type::INT8_ARRAY),
        ];
        client.execute_typed(&tables.qualify(REFUSED), &parameters).await.map_err(log_error)?;
    }
    Ok(())
}

/// A text without the one character that PostgreSQL has no place for.
fn text(text: &str) -> String {
    text.replace('\0', " ")
}
