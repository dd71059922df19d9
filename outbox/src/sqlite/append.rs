//! Appending within an sqlx transaction of SQLite.

use async_trait::async_trait;
use sqlx::{AssertSqlSafe, Row as _, Sqlite, SqliteConnection, SqlitePool, Transaction};

use super::log_error;
use crate::{
    AppendError, AppendErrorReason, Insert, Outbox, OutboxConfig, OutboxTx, append::Pool, rows::extensions_json,
};

/// Rows of one statement: SQLite allows 32,766 parameters, and long statements are slow to prepare.
const ROWS_PER_INSERT: usize = 64;

const INSERT: &str = "INSERT INTO {p}outbox (id, topic, key, type, source, subject, content_type, extensions, time, data) \
     VALUES ";
const VALUES: &str = "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?)";
/// 2 is FULL, 3 EXTRA.
const SYNCHRONOUS: &str = "PRAGMA synchronous";

impl Outbox {
    /// The outbox in the SQLite file of `pool`. Clones share the nudge of the relays in this process.
    pub fn sqlite(pool: SqlitePool, config: OutboxConfig) -> Self {
        Self::new(Pool::Sqlite(pool), config)
    }
}

#[async_trait]
impl OutboxTx for Transaction<'_, Sqlite> {
    async fn insert(&mut self, insert: &Insert<'_>) -> Result<(), AppendError> {
        if !insert.allow_relaxed_sync {
            check_durable(self).await?;
        }
        for (chunk, events) in insert.events.chunks(ROWS_PER_INSERT).enumerate() {
            let rows = vec![VALUES; events.len()].join(", ");
            let mut query = sqlx::query(AssertSqlSafe(insert.tables.expand(INSERT) + &rows))
                // Two lengths recur: one event, and a full statement.
                .persistent(events.len() == 1 || events.len() == ROWS_PER_INSERT);
            for event in events {
                let parts = event.parts();
                query = query
                    .bind(parts.id.as_str())
                    .bind(&*parts.topic)
                    .bind(parts.key.as_deref())
                    .bind(parts.event_type.as_str())
                    .bind(parts.source.as_str())
                    .bind(parts.subject.as_deref())
                    .bind(parts.content_type.as_str())
                    .bind(extensions_json(&parts.extensions))
                    .bind(parts.time.unix_micros())
                    .bind(parts.data.as_ref());
            }
            let inserted = query.execute(&mut **self).await.map_err(log_error);
            inserted.map_err(|error| AppendError::new(chunk * ROWS_PER_INSERT, error))?;
        }
        Ok(())
    }
}

/// Below FULL, a commit that was reported can be lost in a power cut, when its events are published already.
async fn check_durable(connection: &mut SqliteConnection) -> Result<(), AppendError> {
    let row = sqlx::query(SYNCHRONOUS).fetch_one(connection).await.map_err(log_error);
    let level: i64 = row.map_err(|error| AppendError::new(0, error))?.get(0);
    if level < 2 { Err(AppendError::new(0, AppendErrorReason::NotDurable)) } else { Ok(()) }
}
