//! Appending within a transaction of PostgreSQL, whatever client has it.

use std::{future::poll_fn, pin::pin, task::Poll};

use async_trait::async_trait;
use bus_core::{Timestamp, mutant};
use tokio_postgres::{
    Client, Statement, Transaction,
    types::{ToSql, Type},
};

use super::log_error;
use crate::{AppendError, Insert, LogError, OutboxTx, Tables, rows::extensions_json};

/// All values are texts but the data, so that every client can bind them.
const INSERT: &str = "INSERT INTO {p}outbox (id, topic, key, type, source, subject, content_type, extensions, time, data) \
     VALUES ($1, $2, $3, $4, $5, $6, $7, $8::text::jsonb, $9::text::timestamptz, $10)";
/// Places are drawn in the order of the arrays.
const INSERT_MANY: &str = "INSERT INTO {p}outbox \
     (id, topic, key, type, source, subject, content_type, extensions, time, data) \
     SELECT id, topic, key, type, source, subject, content_type, extensions::jsonb, time::timestamptz, data \
     FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], \
       $9::text[], $10::bytea[]) WITH ORDINALITY \
       AS event (id, topic, key, type, source, subject, content_type, extensions, time, data, place) ORDER BY place";
/// Rows of one statement.
const ROWS_PER_INSERT: usize = 1_000;

/// Events as PostgreSQL takes them: one statement's parameters, column by column, all of them texts but the last.
#[derive(Debug, Default)]
pub struct PostgresRows<'a> {
    /// Column `id`.
    pub id: Vec<&'a str>,
    /// Column `topic`.
    pub topic: Vec<&'a str>,
    /// Column `key`.
    pub key: Vec<Option<&'a str>>,
    /// Column `type`.
    pub event_type: Vec<&'a str>,
    /// Column `source`.
    pub source: Vec<&'a str>,
    /// Column `subject`.
    pub subject: Vec<Option<&'a str>>,
    /// Column `content_type`.
    pub content_type: Vec<&'a str>,
    /// Column `extensions`, as JSON.
    pub extensions: Vec<Option<String>>,
    /// Column `time`, as RFC 3339.
    pub time: Vec<String>,
    /// Column `data`.
    pub data: Vec<&'a [u8]>,
}

impl Insert<'_> {
    /// The statement that inserts one event of [`postgres_rows`](Insert::postgres_rows): ten parameters, of which the
    /// last is `bytea` and the others are texts.
    pub fn postgres_one(&self) -> String {
        self.tables.qualify(INSERT)
    }

    /// The statement that inserts any number of events: ten parameters, arrays of what [`postgres_one`](Insert::postgres_one)
    /// takes.
    pub fn postgres_many(&self) -> String {
        self.tables.qualify(INSERT_MANY)
    }

    /// The events in order, as parameters of the statements; a thousand of them at a time.
    pub fn postgres_rows(&self) -> impl Iterator<Item = PostgresRows<'_>> {
        self.events.chunks(ROWS_PER_INSERT).map(|events| {
            let mut rows = PostgresRows::default();
            for event in events {
                let parts = event.parts();
                rows.id.push(parts.id.as_str());
                rows.topic.push(&parts.topic);
                rows.key.push(parts.key.as_deref());
                rows.event_type.push(parts.event_type.as_str());
                rows.source.push(parts.source.as_str());
                rows.subject.push(parts.subject.as_deref());
                rows.content_type.push(parts.content_type.as_str());
                rows.extensions.push(extensions_json(&parts.extensions));
                rows.time.push(time(parts.time));
                rows.data.push(parts.data.as_ref());
            }
            rows
        })
    }
}

/// A time as PostgreSQL takes it: its calendar has no year 0.
fn time(time: Timestamp) -> String {
    let text = time.to_string();
    text.strip_prefix("0000-").map_or_else(|| text.clone(), |rest| format!("0001-{rest} BC"))
}

/// The parameters of a statement with their types, whatever client runs it.
fn parameters<'a>(rows: &'a PostgresRows<'_>) -> [(&'a (dyn ToSql + Sync), Type); 10] {
    if rows.id.len() == 1 {
        return [
            (&rows.id[0], Type::TEXT),
            (&rows.topic[0], Type::TEXT),
            (&rows.key[0], Type::TEXT),
            (&rows.event_type[0], Type::TEXT),
            (&rows.source[0], Type::TEXT),
            (&rows.subject[0], Type::TEXT),
            (&rows.content_type[0], Type::TEXT),
            (&rows.extensions[0], Type::TEXT),
            (&rows.time[0], Type::TEXT),
            (&rows.data[0], Type::BYTEA),
        ];
    }
    [
        (&rows.id, Type::TEXT_ARRAY),
        (&rows.topic, Type::TEXT_ARRAY),
        (&rows.key, Type::TEXT_ARRAY),
        (&rows.event_type, Type::TEXT_ARRAY),
        (&rows.source, Type::TEXT_ARRAY),
        (&rows.subject, Type::TEXT_ARRAY),
        (&rows.content_type, Type::TEXT_ARRAY),
        (&rows.extensions, Type::TEXT_ARRAY),
        (&rows.time, Type::TEXT_ARRAY),
        (&rows.data, Type::BYTEA_ARRAY),
    ]
}

/// Inserts by a client that is in a transaction; a single event by the statement that was prepared, if one was.
async fn insert_by(client: &Client, insert: &Insert<'_>, one: Option<&Statement>) -> Result<(), AppendError> {
    let mut first = 0;
    for rows in insert.postgres_rows() {
        let parameters = parameters(&rows);
        let inserted = match (rows.id.len(), one) {
            (1, Some(statement)) => client.execute(statement, &parameters.map(|(value, _)| value)).await,
            (1, None) => client.execute_typed(&insert.postgres_one(), &parameters).await,
            _ => client.execute_typed(&insert.postgres_many(), &parameters).await,
        };
        inserted.map_err(|error| AppendError::new(first, log_error(error)))?;
        first += rows.id.len();
    }
    Ok(())
}

/// Has the server parse and plan the insert of one event, for a connection that stays.
pub(super) async fn prepare(client: &Client, tables: &Tables) -> Result<Statement, LogError> {
    let mut types = [const { Type::TEXT }; 10];
    types[9] = Type::BYTEA;
    client.prepare_typed(&tables.qualify(INSERT), &types).await.map_err(log_error)
}

/// Inserts by a client that is in a transaction, and ends it in the last statement's round trip. An error before that
/// leaves it open.
pub(super) async fn insert_and_commit(
    transaction: Transaction<'_>,
    insert: &Insert<'_>,
    one: Option<&Statement>,
) -> Result<(), AppendError> {
    let events = insert.events;
    let (before, last) = events.split_at(events.len().saturating_sub(1) / ROWS_PER_INSERT * ROWS_PER_INSERT);
    let client = transaction.client();
    insert_by(client, &Insert { events: before, ..*insert }, None).await?;
    // Each call sends its message before it waits. Where the insert is refused, the server answers the COMMIT that is
    // already there by rolling back.
    let last = Insert { events: last, ..*insert };
    let (inserted, committed) = match mutant("insert-awaited-first") {
        false => match sent_one_after_the_other(insert_by(client, &last, one), client.batch_execute("COMMIT")).await {
            Ok(answers) => answers,
            // The client refused to send it: there is nothing to commit.
            Err(refused) => return refused.map_err(|error| error.behind(before.len())),
        },
        true => (insert_by(client, &last, one).await, client.batch_execute("COMMIT").await),
    };
    // It is over, whatever the answers: the ROLLBACK that a drop would send is for nothing.
    std::mem::forget(transaction);
    inserted.map_err(|error| error.behind(before.len()))?;
    committed.map_err(|error| AppendError::new(0, log_error(error)))
}

/// Runs `second` beside `first` once that waits for an answer, and not at all where it is over before: then it has sent
/// nothing, and `Err` has what it says.
async fn sent_one_after_the_other<A, B>(
    first: impl Future<Output = A>,
    second: impl Future<Output = B>,
) -> Result<(A, B), A> {
    let mut first = pin!(first);
    if let Poll::Ready(refused) = poll_fn(|context| Poll::Ready(first.as_mut().poll(context))).await {
        return Err(refused);
    }
    let (second, first) = tokio::join!(biased; second, first);
    Ok((first, second))
}

#[async_trait]
impl OutboxTx for Transaction<'_> {
    async fn insert(&mut self, insert: &Insert<'_>) -> Result<(), AppendError> {
        insert_by(self.client(), insert, None).await?;
        if mutant("append-commits-alone") {
            let committed = self.client().batch_execute("COMMIT; BEGIN").await.map_err(log_error);
            committed.map_err(|error| AppendError::new(0, error))?;
        }
        Ok(())
    }
}

#[cfg(feature = "deadpool-postgres")]
#[async_trait]
impl OutboxTx for deadpool_postgres::Transaction<'_> {
    async fn insert(&mut self, insert: &Insert<'_>) -> Result<(), AppendError> {
        insert_by(Transaction::client(self), insert, None).await
    }
}

#[cfg(feature = "sqlx-postgres")]
pub(super) mod with_sqlx {
    use std::{borrow::Cow, error::Error as _};

    use async_trait::async_trait;
    use sqlx::{AssertSqlSafe, Postgres, Transaction};

    use crate::{AppendError, Insert, LogError, LogErrorKind, OutboxTx};

    #[async_trait]
    impl OutboxTx for Transaction<'_, Postgres> {
        async fn insert(&mut self, insert: &Insert<'_>) -> Result<(), AppendError> {
            let mut first = 0;
            for rows in insert.postgres_rows() {
                let count = rows.id.len();
                // Safe: our own statement, with a schema that was checked to be an identifier.
                let query = match count {
                    1 => sqlx::query(AssertSqlSafe(insert.postgres_one()))
                        .bind(rows.id[0])
                        .bind(rows.topic[0])
                        .bind(rows.key[0])
                        .bind(rows.event_type[0])
                        .bind(rows.source[0])
                        .bind(rows.subject[0])
                        .bind(rows.content_type[0])
                        .bind(rows.extensions[0].as_deref())
                        .bind(rows.time[0].as_str())
                        .bind(rows.data[0]),
                    _ => sqlx::query(AssertSqlSafe(insert.postgres_many()))
                        .bind(&rows.id)
                        .bind(&rows.topic)
                        .bind(&rows.key)
                        .bind(&rows.event_type)
                        .bind(&rows.source)
                        .bind(&rows.subject)
                        .bind(&rows.content_type)
                        .bind(&rows.extensions)
                        .bind(&rows.time)
                        .bind(&rows.data),
                };
                let inserted = query.execute(&mut **self).await.map_err(log_error);
                inserted.map_err(|error| AppendError::new(first, error))?;
                first += count;
            }
            Ok(())
        }
    }

    /// What the caller's own client says of a statement.
    pub(crate) fn log_error(error: sqlx::Error) -> LogError {
        let (kind, message): (_, Cow<'static, str>) = match &error {
            sqlx::Error::Database(database) => {
                super::super::error::classify_code(database.code().as_deref().unwrap_or_default(), database.message())
            }
            sqlx::Error::Io(_) => (LogErrorKind::Unavailable, "the connection to PostgreSQL broke".into()),
            sqlx::Error::PoolTimedOut => (LogErrorKind::Unavailable, "no connection is free".into()),
            other => {
                let cause = other.source().map_or_else(String::new, |cause| format!(": {cause}"));
                (LogErrorKind::Invalid, format!("the client refuses the statement: {other}{cause}").into())
            }
        };
        LogError::with_source(kind, message, error)
    }
}

#[cfg(feature = "diesel-async")]
pub(super) mod with_diesel {
    use async_trait::async_trait;
    use diesel::{
        result::Error,
        sql_query,
        sql_types::{Array, Bytea, Nullable, Text},
    };
    use diesel_async::{AsyncConnection, AsyncPgConnection, RunQueryDsl, TransactionManager};

    use crate::{AppendError, AppendErrorReason, Insert, LogError, LogErrorKind, OutboxTx, PostgresRows};

    /// The client has no type for a transaction: whether it is in one is asked when events are appended.
    #[async_trait]
    impl OutboxTx for AsyncPgConnection {
        async fn insert(&mut self, insert: &Insert<'_>) -> Result<(), AppendError> {
            type Manager = <AsyncPgConnection as AsyncConnection>::TransactionManager;
            let status = <Manager as TransactionManager<AsyncPgConnection>>::transaction_manager_status_mut(self);
            if !matches!(status.transaction_depth(), Ok(Some(_))) {
                return Err(AppendError::new(0, AppendErrorReason::NotInTransaction));
            }
            let mut first = 0;
            for rows in insert.postgres_rows() {
                let inserted = insert_rows(self, insert.postgres_many(), &rows).await.map_err(log_error);
                inserted.map_err(|error| AppendError::new(first, error))?;
                first += rows.id.len();
            }
            Ok(())
        }
    }

    async fn insert_rows(
        connection: &mut AsyncPgConnection,
        sql: String,
        rows: &PostgresRows<'_>,
    ) -> Result<usize, Error> {
        let query = sql_query(sql)
            .bind::<Array<Text>, _>(&rows.id)
            .bind::<Array<Text>, _>(&rows.topic)
            .bind::<Array<Nullable<Text>>, _>(&rows.key)
            .bind::<Array<Text>, _>(&rows.event_type)
            .bind::<Array<Text>, _>(&rows.source)
            .bind::<Array<Nullable<Text>>, _>(&rows.subject)
            .bind::<Array<Text>, _>(&rows.content_type)
            .bind::<Array<Nullable<Text>>, _>(&rows.extensions)
            .bind::<Array<Text>, _>(&rows.time)
            .bind::<Array<Bytea>, _>(&rows.data);
        query.execute(connection).await
    }

    /// What the caller's own client says of a statement; it keeps no SQLSTATE.
    pub(crate) fn log_error(error: Error) -> LogError {
        let kind = match &error {
            Error::DatabaseError(diesel::result::DatabaseErrorKind::ClosedConnection, _) => LogErrorKind::Unavailable,
            _ => LogErrorKind::Invalid,
        };
        LogError::with_source(kind, format!("PostgreSQL refuses the statement: {error}"), error)
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, future::ready};

    use super::*;

    /// Events that no message can hold are refused by the client, which sends nothing then. Catches the mutant that joins
    /// the two: the COMMIT alone would commit the business transaction without its events.
    #[tokio::test]
    async fn what_was_not_sent_is_not_committed() {
        let committed = Cell::new(false);
        let commit = async { committed.set(true) };
        assert_eq!(sent_one_after_the_other(ready("too large"), commit).await, Err("too large"));
        assert!(!committed.get());
        let insert = async {
            tokio::task::yield_now().await;
            committed.get()
        };
        let commit = async { committed.set(true) };
        assert_eq!(sent_one_after_the_other(insert, commit).await, Ok((true, ())), "the commit waits for the answer");
    }
}
