//! The log as an operator sees it.

use std::time::Duration;

use async_trait::async_trait;
use bus_core::{Seq, SeqSet, Timestamp};
use tokio_postgres::{Client, IsolationLevel, Row, Transaction, types::Type};

use super::{
    LOCKED, Parameter, PostgresLog, begin, column, log_error, timely,
    values::{COLUMNS, Micros, like, multirange, parse_multirange},
};
use crate::{
    Blocked, DeadColumns, DeadRest, DeadRow, DeadState, LogAdmin, LogError, OldestTransaction, Request, RequestKind,
    RequestProgress, Selected, Sink, SinkStatus,
    rows::{COUNT_MAX, Decoder, LOG, age, check_removable, json, parse, signed},
};

const DEAD_ROWS: &str = "SELECT {columns}, state, parked, reason, error, attempts, at, sink FROM {p}dead_letter \
     WHERE log = $1 AND ($2::text IS NULL OR (sink, seq) > ($2, $3)) AND ($4::text[] IS NULL OR id = ANY ($4)) \
     AND ($5::text IS NULL OR reason = $5) \
     AND ($6::text IS NULL OR (topic = $6 AND key = $7 AND hashtextextended(key, 0) = hashtextextended($7, 0))) \
     AND ($8::int8 IS NULL OR seq <= $8) AND (NOT $9 OR parked) ORDER BY sink, seq LIMIT $10";
const MARK_RETRYING: &str = "UPDATE {p}dead_letter SET state = 'retrying' WHERE log = $1 AND sink = $2 \
     AND ($3::text[] IS NULL OR id = ANY ($3)) AND ($4::text IS NULL OR reason = $4)";
const DISCARD: &str = "DELETE FROM {p}dead_letter WHERE log = $1 AND sink = $2 \
     AND ($3::text[] IS NULL OR id = ANY ($3)) AND ($4::text IS NULL OR reason = $4)";
const ASK: &str = "INSERT INTO {p}request (log, sink, kind, arguments, rate) \
     VALUES ($1, $2, $3, $4::text::jsonb, $5) RETURNING id";
const OPEN_REQUESTS: &str = "SELECT id, kind, arguments::text, rate FROM {p}request \
     WHERE log = $1 AND sink = $2 AND state = 'open' ORDER BY id LIMIT 100";
const PROGRESS: &str = "SELECT done, failed, state = 'ended' FROM {p}request WHERE id = $1";
const SINKS: &str = "SELECT sink, topics::text, bus, low, high, holes::text, \
     CASE WHEN lease_until > clock_timestamp() THEN owner END, epoch, blocked::text, \
     CASE WHEN lease_until > clock_timestamp() \
       THEN extract(epoch FROM least(lease_until, clock_timestamp() + interval '1 day') - clock_timestamp()) \
       ELSE 0 END::float8 \
     FROM {p}cursor WHERE log = $1 ORDER BY sink";
/// Whether a relay owns the sink now; whoever asks holds its row.
const LEASED: &str = "SELECT owner IS NOT NULL AND lease_until > clock_timestamp() FROM {p}cursor WHERE log = $1 AND sink = $2 FOR UPDATE";
/// Fences an owner whose lease is over, so that it cannot bring back what is discarded here.
const FENCE: &str = "UPDATE {p}cursor SET epoch = epoch + 1, owner = NULL, lease_until = '-infinity' \
     WHERE log = $1 AND sink = $2";
/// The locks are taken in the order of a relay that begins: the log's row, then the sink's.
const LOCK_LOG: &str = "SELECT 1 FROM {p}log WHERE name = $1 FOR UPDATE";
const REMOVE_SINK: [&str; 4] = [
    // A sink that comes back under this name begins above the epochs there were: an owner that slept wakes up fenced.
    "UPDATE {p}log SET epoch_floor = greatest(epoch_floor, \
     (SELECT epoch FROM {p}cursor WHERE log = $1 AND sink = $2)) WHERE name = $1",
    "DELETE FROM {p}cursor WHERE log = $1 AND sink = $2",
    "DELETE FROM {p}dead_letter WHERE log = $1 AND sink = $2",
    "DELETE FROM {p}request WHERE log = $1 AND sink = $2",
];
const ASIDE_COUNTS: &str = "SELECT count(*) FILTER (WHERE parked), count(*) FILTER (WHERE NOT parked) \
     FROM {p}dead_letter WHERE log = $1 AND sink = $2";
/// Rows above a place with one of these topics, or with none of them, counted up to a limit.
const BACKLOG: &str = "SELECT count(*) FROM (SELECT 1 FROM {p}outbox WHERE seq > $1 \
     AND (topic LIKE ANY ($2::text[])) = $3 LIMIT $4) counted";
/// Rows at some places with one of these topics. A place that nobody sees is no backlog.
const AT: &str = "unnest($1::text::int8multirange) AS wanted (places) \
     JOIN {p}outbox ON seq >= lower(places) AND seq < upper(places) WHERE topic LIKE ANY ($2::text[])";
const COUNT_AT: &str = "SELECT count(*) FROM (SELECT 1 FROM {at} LIMIT $3) counted";
const OLDEST_AT: &str = "SELECT time FROM {at} ORDER BY seq LIMIT 1";
const OLDEST: &str = "SELECT time FROM {p}outbox WHERE seq > $1 AND topic LIKE ANY ($2::text[]) ORDER BY seq LIMIT 1";
const OLDEST_TRANSACTION: &str = "SELECT activity.pid, \
     extract(epoch FROM clock_timestamp() - activity.xact_start)::float8 \
     FROM pg_locks JOIN pg_stat_activity activity ON activity.pid = pg_locks.pid \
     WHERE {locked} AND activity.xact_start IS NOT NULL \
     ORDER BY activity.xact_start LIMIT 1";
const NOW: &str = "SELECT clock_timestamp()";

/// A sink's row, as it stands.
struct SinkRow {
    sink: Sink,
    high: Seq,
    holes: SeqSet,
    epoch: u64,
    blocked: Blocked,
    remaining: Duration,
}

#[async_trait]
impl LogAdmin for PostgresLog {
    async fn status(&self) -> Result<Vec<SinkStatus>, LogError> {
        let mut held = self.reader.lock().await?;
        let status = timely(self.read_status(held.get())).await;
        held.check(status)
    }

    async fn sinks(&self) -> Result<Vec<Sink>, LogError> {
        let mut held = self.reader.lock().await?;
        let sinks = timely(self.sink_rows(held.get())).await;
        held.check(sinks.map(|rows| rows.into_iter().map(|row| row.sink).collect()))
    }

    async fn remove_sink(&self, sink: &str) -> Result<(), LogError> {
        let mut held = self.writer.lock().await?;
        let removed = timely(self.delete_sink(held.get(), sink)).await;
        held.check(removed)
    }

    async fn dead_letters(
        &self,
        selected: &Selected,
        after: Option<(&str, Seq)>,
        limit: usize,
    ) -> Result<Vec<DeadRow>, LogError> {
        let mut held = self.reader.lock().await?;
        let rows = timely(self.dead_rows(held.get(), selected, after, limit)).await;
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
        let asked = timely(self.insert_request(held.get(), sink, kind, selected, rate)).await;
        held.check(asked)
    }

    async fn discard_unowned(&self, sink: &str, selected: &Selected) -> Result<Option<u64>, LogError> {
        let mut held = self.writer.lock().await?;
        let discarded = timely(self.delete_dead(held.get(), sink, selected)).await;
        held.check(discarded)
    }

    async fn progress(&self, id: i64) -> Result<Option<RequestProgress>, LogError> {
        let mut held = self.reader.lock().await?;
        let progress = timely(self.read_progress(held.get(), id)).await;
        held.check(progress)
    }
}

impl PostgresLog {
    /// Set-aside events of all sinks, behind `after`.
    pub(super) async fn dead_rows(
        &self,
        client: &Client,
        selected: &Selected,
        after: Option<(&str, Seq)>,
        limit: usize,
    ) -> Result<Vec<DeadRow>, LogError> {
        let sql = self.tables.qualify(&DEAD_ROWS.replace("{columns}", COLUMNS));
        let (topic, key) = selected.key.as_ref().map(|(topic, key)| (topic, key)).unzip();
        let parameters: [Parameter<'_>; 10] = [
            (&LOG, Type::TEXT),
            (&after.map(|(sink, _)| sink), Type::TEXT),
            (&after.map_or(0, |(_, seq)| signed(seq.0)), Type::INT8),
            (&selected.ids, Type::TEXT_ARRAY),
            (&selected.reason, Type::TEXT),
            (&topic, Type::TEXT),
            (&key, Type::TEXT),
            (&selected.to.map(|seq| signed(seq.0)), Type::INT8),
            (&selected.parked, Type::BOOL),
            (&i64::try_from(limit).unwrap_or(i64::MAX), Type::INT8),
        ];
        let rows = client.query_typed(&sql, &parameters).await.map_err(log_error)?;
        let mut decoder = Decoder::default();
        rows.iter().map(|row| dead_row(&mut decoder, row)).collect()
    }

    pub(super) async fn open_requests(&self, client: &Client) -> Result<Vec<Request>, LogError> {
        let parameters: [Parameter<'_>; 2] = [(&LOG, Type::TEXT), (&self.sink, Type::TEXT)];
        let rows = client.query_typed(&self.tables.qualify(OPEN_REQUESTS), &parameters).await.map_err(log_error)?;
        let request = |row: &Row| {
            let kind = RequestKind::from_column(column(row, 1)?);
            let rate = column::<Option<i64>>(row, 3)?.map(|rate| u32::try_from(rate).unwrap_or(u32::MAX));
            Ok(Request { id: column(row, 0)?, kind, selected: parse(column(row, 2)?, "arguments")?, rate })
        };
        rows.iter().map(request).collect()
    }

    async fn insert_request(
        &self,
        client: &mut Client,
        sink: &str,
        kind: RequestKind,
        selected: &Selected,
        rate: Option<u32>,
    ) -> Result<i64, LogError> {
        let transaction = begin(client).await?;
        let parameters: [Parameter<'_>; 5] = [
            (&LOG, Type::TEXT),
            (&sink, Type::TEXT),
            (&kind.as_str(), Type::TEXT),
            (&json(selected), Type::TEXT),
            (&rate.map(i64::from), Type::INT8),
        ];
        let asked = transaction.query_typed_one(&self.tables.qualify(ASK), &parameters).await.map_err(log_error)?;
        if kind == RequestKind::Retry {
            let mark = self.tables.qualify(MARK_RETRYING);
            transaction.execute_typed(&mark, &chosen(&sink, selected)).await.map_err(log_error)?;
        }
        transaction.commit().await.map_err(log_error)?;
        column(&asked, 0)
    }

    async fn delete_dead(&self, client: &mut Client, sink: &str, selected: &Selected) -> Result<Option<u64>, LogError> {
        let transaction = begin(client).await?;
        if self.is_leased(&transaction, sink).await? == Some(true) {
            return Ok(None);
        }
        let of_sink: [Parameter<'_>; 2] = [(&LOG, Type::TEXT), (&sink, Type::TEXT)];
        transaction.execute_typed(&self.tables.qualify(FENCE), &of_sink).await.map_err(log_error)?;
        let discard = self.tables.qualify(DISCARD);
        let discarded = transaction.execute_typed(&discard, &chosen(&sink, selected)).await.map_err(log_error)?;
        transaction.commit().await.map_err(log_error)?;
        Ok(Some(discarded))
    }

    async fn delete_sink(&self, client: &mut Client, sink: &str) -> Result<(), LogError> {
        let transaction = begin(client).await?;
        let lock = self.tables.qualify(LOCK_LOG);
        transaction.query_typed_opt(&lock, &[(&LOG, Type::TEXT)]).await.map_err(log_error)?;
        check_removable(sink, self.is_leased(&transaction, sink).await?)?;
        for statement in REMOVE_SINK {
            let of_sink: [Parameter<'_>; 2] = [(&LOG, Type::TEXT), (&sink, Type::TEXT)];
            transaction.execute_typed(&self.tables.qualify(statement), &of_sink).await.map_err(log_error)?;
        }
        transaction.commit().await.map_err(log_error)
    }

    /// Whether a relay owns the sink; `None` if there is none of this name.
    async fn is_leased(&self, transaction: &Transaction<'_>, sink: &str) -> Result<Option<bool>, LogError> {
        let of_sink: [Parameter<'_>; 2] = [(&LOG, Type::TEXT), (&sink, Type::TEXT)];
        let row = transaction.query_typed_opt(&self.tables.qualify(LEASED), &of_sink).await.map_err(log_error)?;
        row.map(|row| column(&row, 0)).transpose()
    }

    async fn read_progress(&self, client: &Client, id: i64) -> Result<Option<RequestProgress>, LogError> {
        let sql = self.tables.qualify(PROGRESS);
        let row = client.query_typed_opt(&sql, &[(&id, Type::INT8)]).await.map_err(log_error)?;
        row.map(|row| {
            Ok(RequestProgress {
                id,
                done: column::<i64>(&row, 0)?.unsigned_abs(),
                failed: column::<i64>(&row, 1)?.unsigned_abs(),
                ended: column(&row, 2)?,
            })
        })
        .transpose()
    }

    async fn sink_rows(&self, client: &Client) -> Result<Vec<SinkRow>, LogError> {
        let rows = client.query_typed(&self.tables.qualify(SINKS), &[(&LOG, Type::TEXT)]).await.map_err(log_error)?;
        rows.iter().map(sink_row).collect()
    }

    /// Reads everything in one view of the database.
    async fn read_status(&self, client: &mut Client) -> Result<Vec<SinkStatus>, LogError> {
        let begin = client.build_transaction().isolation_level(IsolationLevel::RepeatableRead).read_only(true);
        let transaction = begin.start().await.map_err(log_error)?;
        let client = transaction.client();
        let now = client.query_typed_one(NOW, &[]).await.map_err(log_error)?;
        let now = column::<Micros>(&now, 0)?.0;
        let sinks = self.sink_rows(client).await?;
        let wanted: Vec<String> = like(sinks.iter().flat_map(|row| row.sink.topics.iter().map(String::as_str)));
        let unclaimed = self.count(client, Seq::ZERO, &wanted, false).await?;
        let mut status = Vec::new();
        for row in sinks {
            status.push(self.sink_status(client, row, unclaimed, now).await?);
        }
        if status.is_empty() {
            let any = like(["*"]);
            let backlog = self.count(client, Seq::ZERO, &any, true).await?;
            let oldest = self.oldest(client, Seq::ZERO, &any).await?;
            status.push(SinkStatus::unread(LOG, backlog.unsigned_abs(), backlog <= COUNT_MAX, age(oldest, now)));
        }
        transaction.rollback().await.map_err(log_error)?;
        Ok(status)
    }

    async fn sink_status(
        &self,
        client: &Client,
        row: SinkRow,
        unclaimed: i64,
        now: i64,
    ) -> Result<SinkStatus, LogError> {
        let topics = like(row.sink.topics.iter().map(String::as_str));
        let above = self.count(client, row.high, &topics, true).await?;
        let oldest = match self.oldest_at(client, &row.holes, &topics).await? {
            None => self.oldest(client, row.high, &topics).await?,
            found => found,
        };
        let of_sink: [Parameter<'_>; 2] = [(&LOG, Type::TEXT), (&row.sink.sink, Type::TEXT)];
        let aside = client.query_typed_one(&self.tables.qualify(ASIDE_COUNTS), &of_sink).await.map_err(log_error)?;
        let holes = row.holes.len();
        let visible = self.count_at(client, &row.holes, &topics).await?;
        Ok(SinkStatus {
            log: LOG.to_owned(),
            backlog: (above + visible).unsigned_abs(),
            backlog_exact: above <= COUNT_MAX && visible <= COUNT_MAX,
            oldest_age: age(oldest, now),
            low: row.sink.low,
            high: row.high,
            holes,
            epoch: row.epoch,
            lease_remaining: row.sink.owner.is_some().then_some(row.remaining),
            owner: row.sink.owner,
            sink: Some(row.sink.sink),
            blocked: row.blocked,
            parked: column::<i64>(&aside, 0)?.unsigned_abs(),
            dead: column::<i64>(&aside, 1)?.unsigned_abs(),
            unclaimed: unclaimed.unsigned_abs(),
            oldest_transaction: if holes > 0 { self.oldest_transaction(client).await? } else { None },
        })
    }

    /// Stops one above [`COUNT_MAX`].
    async fn count_at(&self, client: &Client, places: &SeqSet, topics: &[String]) -> Result<i64, LogError> {
        let most = COUNT_MAX + 1;
        let parameters: [Parameter<'_>; 3] =
            [(&multirange(places), Type::TEXT), (&topics, Type::TEXT_ARRAY), (&most, Type::INT8)];
        let sql = self.tables.qualify(&COUNT_AT.replace("{at}", AT));
        let row = client.query_typed_one(&sql, &parameters).await.map_err(log_error)?;
        column(&row, 0)
    }

    async fn oldest_at(&self, client: &Client, places: &SeqSet, topics: &[String]) -> Result<Option<i64>, LogError> {
        let parameters: [Parameter<'_>; 2] = [(&multirange(places), Type::TEXT), (&topics, Type::TEXT_ARRAY)];
        let sql = self.tables.qualify(&OLDEST_AT.replace("{at}", AT));
        let row = client.query_typed_opt(&sql, &parameters).await.map_err(log_error)?;
        Ok(row.map(|row| column::<Micros>(&row, 0)).transpose()?.map(|micros| micros.0))
    }

    /// Of a role that may not see it, a transaction is passed over.
    async fn oldest_transaction(&self, client: &Client) -> Result<Option<OldestTransaction>, LogError> {
        let sql = self.tables.qualify(&OLDEST_TRANSACTION.replace("{locked}", LOCKED));
        let row = client.query_typed_opt(&sql, &[]).await.map_err(log_error)?;
        row.map(|row| {
            let age = Duration::from_secs_f64(column::<f64>(&row, 1)?.max(0.0));
            Ok(OldestTransaction { pid: column(&row, 0)?, age })
        })
        .transpose()
    }

    /// Rows above `after` whose topics are among these, or are not; stops one above [`COUNT_MAX`].
    async fn count(&self, client: &Client, after: Seq, topics: &[String], among: bool) -> Result<i64, LogError> {
        let parameters: [Parameter<'_>; 4] = [
            (&signed(after.0), Type::INT8),
            (&topics, Type::TEXT_ARRAY),
            (&among, Type::BOOL),
            (&(COUNT_MAX + 1), Type::INT8),
        ];
        let row = client.query_typed_one(&self.tables.qualify(BACKLOG), &parameters).await.map_err(log_error)?;
        column(&row, 0)
    }

    async fn oldest(&self, client: &Client, after: Seq, topics: &[String]) -> Result<Option<i64>, LogError> {
        let parameters: [Parameter<'_>; 2] = [(&signed(after.0), Type::INT8), (&topics, Type::TEXT_ARRAY)];
        let row = client.query_typed_opt(&self.tables.qualify(OLDEST), &parameters).await.map_err(log_error)?;
        Ok(row.map(|row| column::<Micros>(&row, 0)).transpose()?.map(|micros| micros.0))
    }
}

/// The parameters of a statement about chosen set-aside events of a sink.
fn chosen<'a>(sink: &'a &'a str, selected: &'a Selected) -> [Parameter<'a>; 4] {
    [(&LOG, Type::TEXT), (sink, Type::TEXT), (&selected.ids, Type::TEXT_ARRAY), (&selected.reason, Type::TEXT)]
}

fn sink_row(row: &Row) -> Result<SinkRow, LogError> {
    Ok(SinkRow {
        sink: Sink {
            log: LOG.to_owned(),
            sink: column(row, 0)?,
            topics: parse(column(row, 1)?, "topics")?,
            bus: column(row, 2)?,
            low: Seq(column::<i64>(row, 3)?.unsigned_abs()),
            owner: column(row, 6)?,
        },
        high: Seq(column::<i64>(row, 4)?.unsigned_abs()),
        holes: parse_multirange(column(row, 5)?)?,
        epoch: column::<i64>(row, 7)?.unsigned_abs(),
        blocked: parse(column(row, 8)?, "blocked")?,
        remaining: Duration::from_secs_f64(column::<f64>(row, 9)?.max(0.0)),
    })
}

fn dead_row(decoder: &mut Decoder, row: &Row) -> Result<DeadRow, LogError> {
    let decoded = decoder.row(row)?;
    let rest = match decoded.event {
        Ok(_) => None,
        Err(_) => Some(DeadRest {
            source: column(row, 5)?,
            subject: column(row, 6)?,
            content_type: column(row, 7)?,
            extensions: column(row, 8)?,
            time: Timestamp::from_unix_micros(column::<Micros>(row, 9)?.0).to_string(),
            data: column(row, 10)?,
        }),
    };
    Ok(DeadRow {
        seq: decoded.seq,
        event: decoded.event,
        columns: DeadColumns {
            id: column(row, 1)?,
            topic: column(row, 2)?,
            key: column(row, 3)?,
            event_type: column(row, 4)?,
            rest,
        },
        state: DeadState::from_column(column(row, 11)?),
        parked: column(row, 12)?,
        reason: column(row, 13)?,
        error: column(row, 14)?,
        attempts: u32::try_from(column::<i64>(row, 15)?).unwrap_or(u32::MAX),
        at: Timestamp::from_unix_micros(column::<Micros>(row, 16)?.0),
        sink: column(row, 17)?,
    })
}
