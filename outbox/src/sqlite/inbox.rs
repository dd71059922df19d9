//! [`Inbox`]: each event's effect once, by noting it in the transaction of the effect.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use async_trait::async_trait;
use bus_core::{Context, Event, Handler, HandlerError};
use futures_util::future::BoxFuture;
use sqlx::{SqliteConnection, SqlitePool};

use super::{Tables, log_error, micros};
use crate::LogError;

/// How long an event is remembered. Longer than a dead letter should wait for its retry.
const KEPT: Duration = Duration::from_secs(30 * 86_400);
/// Events between two rounds of forgetting, and how many entries one round forgets.
const PRUNE_EVERY: u64 = 1_000;

/// False if it was noted before.
const NOTE: &str = "INSERT OR IGNORE INTO {p}inbox (consumer, source, id, at) \
     VALUES (?, ?, ?, CAST(unixepoch('now', 'subsec') * 1000000 AS INTEGER))";
const FORGET: &str = "DELETE FROM {p}inbox WHERE (consumer, source, id) IN (SELECT consumer, source, id FROM {p}inbox \
     WHERE at < CAST(unixepoch('now', 'subsec') * 1000000 AS INTEGER) - ? ORDER BY at LIMIT ?)";

/// What a consumer has handled, kept in its own database: an event that arrives again has no second effect.
///
/// # Examples
///
/// ```
/// use std::sync::Arc;
/// use bus_core::{Consumer, Event, EventBus, EventBusExt, InMemoryBus};
/// use outbox::{Inbox, Outbox, OutboxConfig};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let dir = tempfile::tempdir()?;
/// # let options = sqlx::sqlite::SqliteConnectOptions::new().filename(dir.path().join("b.db")).create_if_missing(true);
/// # let pool = sqlx::SqlitePool::connect_with(options).await?;
/// # Outbox::sqlite(pool.clone(), OutboxConfig::default()).migrate().await?;
/// # sqlx::query("CREATE TABLE total (events INTEGER)").execute(&pool).await?;
/// # sqlx::query("INSERT INTO total VALUES (0)").execute(&pool).await?;
/// # let bus: Arc<dyn EventBus> = Arc::new(InMemoryBus::new());
/// # for _ in 0..2 { bus.publish(Event::json("orders", "order.placed", &7)?.id("one")).await?; }
/// let handler = Inbox::new("billing").handle(pool.clone(), |tx, _event, _context| {
///     Box::pin(async move {
///         sqlx::query("UPDATE total SET events = events + 1").execute(tx).await?;
///         Ok(())
///     })
/// });
/// let consumer = Consumer::new(bus, "orders", "billing").on_any(handler);
/// # let counted = async { loop {
/// #     let total: i64 = sqlx::query_scalar("SELECT count(*) FROM outbus_inbox").fetch_one(&pool).await.unwrap();
/// #     if total == 1 { return; }
/// #     tokio::time::sleep(std::time::Duration::from_millis(5)).await;
/// # } };
/// consumer.run(counted).await?;
/// # let total: i64 = sqlx::query_scalar("SELECT events FROM total").fetch_one(&pool).await?;
/// # assert_eq!(total, 1);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Inbox {
    consumer: String,
    tables: Tables,
}

impl Inbox {
    /// The inbox of `consumer`, usually its group, in tables of the default names.
    pub fn new(consumer: impl Into<String>) -> Self {
        Self { consumer: consumer.into(), tables: Tables::default() }
    }

    /// Uses tables of other names.
    pub fn tables(mut self, tables: Tables) -> Self {
        self.tables = tables;
        self
    }

    /// A handler that calls `handle` once for each event, in the transaction that notes the event: both happen, or
    /// neither.
    pub fn handle<F>(self, pool: SqlitePool, handle: F) -> Deduplicated<F>
    where
        F: for<'a> Fn(&'a mut SqliteConnection, &'a Event, &'a Context) -> BoxFuture<'a, Result<(), HandlerError>>
            + Send
            + Sync
            + 'static,
    {
        Deduplicated { inbox: self, pool, handle, handled: AtomicU64::new(0) }
    }

    /// Forgets what was handled more than 30 days ago, a bite at a time; answers how many entries it forgot. Handlers do
    /// this by themselves now and then.
    ///
    /// # Errors
    ///
    /// What the database answers.
    pub async fn forget_old(&self, pool: &SqlitePool) -> Result<u64, LogError> {
        let forget = sqlx::query(self.tables.sql(FORGET)).bind(micros(KEPT)).bind(PRUNE_EVERY as i64);
        Ok(forget.execute(pool).await.map_err(log_error)?.rows_affected())
    }
}

/// A handler behind an [`Inbox`].
pub struct Deduplicated<F> {
    inbox: Inbox,
    pool: SqlitePool,
    handle: F,
    handled: AtomicU64,
}

#[async_trait]
impl<F> Handler for Deduplicated<F>
where
    F: for<'a> Fn(&'a mut SqliteConnection, &'a Event, &'a Context) -> BoxFuture<'a, Result<(), HandlerError>>
        + Send
        + Sync
        + 'static,
{
    async fn handle(&self, event: &Event, context: &Context) -> Result<(), HandlerError> {
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let note = sqlx::query(self.inbox.tables.sql(NOTE)).bind(&self.inbox.consumer);
        let noted = note.bind(event.source()).bind(event.id()).execute(&mut *transaction).await?;
        if noted.rows_affected() == 0 {
            tracing::debug!(event = event.id(), consumer = self.inbox.consumer, "handled before");
            return Ok(transaction.rollback().await?);
        }
        (self.handle)(&mut transaction, event, context).await?;
        transaction.commit().await?;
        if self.handled.fetch_add(1, Ordering::Relaxed) % PRUNE_EVERY == PRUNE_EVERY - 1
            && let Err(error) = self.inbox.forget_old(&self.pool).await
        {
            tracing::warn!(%error, "the inbox could not forget what is old");
        }
        Ok(())
    }
}

impl<F> fmt::Debug for Deduplicated<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Deduplicated").field("inbox", &self.inbox).finish_non_exhaustive()
    }
}
