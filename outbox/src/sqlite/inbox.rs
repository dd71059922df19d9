//! The inbox on SQLite.

use async_trait::async_trait;
use bus_core::HandlerError;
use sqlx::{SqliteConnection, SqlitePool};

use super::{log_error, micros};
use crate::{
    Effect, Inbox, InboxPool, LogError,
    inbox::{KEPT, PRUNE_EVERY},
};

/// No row if it was noted before.
const NOTE: &str = "INSERT OR IGNORE INTO {p}inbox (consumer, source, id, at) \
     VALUES (?, ?, ?, CAST(unixepoch('now', 'subsec') * 1000000 AS INTEGER))";
const FORGET: &str = "DELETE FROM {p}inbox WHERE (consumer, source, id) IN (SELECT consumer, source, id FROM {p}inbox \
     WHERE at < CAST(unixepoch('now', 'subsec') * 1000000 AS INTEGER) - ? ORDER BY at LIMIT ?)";

#[async_trait]
impl InboxPool for SqlitePool {
    type Transaction<'t> = SqliteConnection;

    async fn once(&self, effect: &Effect<'_, Self>) -> Result<bool, HandlerError> {
        let mut transaction = self.begin_with("BEGIN IMMEDIATE").await.map_err(log_error)?;
        let (consumer, source, id) = effect.note();
        let note = sqlx::query(effect.inbox.tables.sql(NOTE)).bind(consumer).bind(source).bind(id);
        if note.execute(&mut *transaction).await.map_err(log_error)?.rows_affected() == 0 {
            transaction.rollback().await.map_err(log_error)?;
            return Ok(false);
        }
        effect.run(&mut transaction).await?;
        transaction.commit().await.map_err(log_error)?;
        Ok(true)
    }

    async fn forget_old(&self, inbox: &Inbox) -> Result<u64, LogError> {
        let forget = sqlx::query(inbox.tables.sql(FORGET)).bind(micros(KEPT)).bind(PRUNE_EVERY as i64);
        Ok(forget.execute(self).await.map_err(log_error)?.rows_affected())
    }
}
