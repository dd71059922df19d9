//! [`Inbox`]: each event's effect once, by noting it in the transaction of the effect.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use async_trait::async_trait;
use bus_core::{Context, Event, Handler, HandlerError};
use futures_util::future::BoxFuture;

use crate::{LogError, Tables};

/// How long an event is remembered. Longer than a dead letter should wait for its retry.
pub(crate) const KEPT: Duration = Duration::from_secs(30 * 86_400);
/// Events between two rounds of forgetting, and how many entries one round forgets.
pub(crate) const PRUNE_EVERY: u64 = 1_000;

/// What a consumer has handled, kept in its own database: an event that arrives again has no second effect.
///
/// It works on every [`InboxPool`]: on SQLite with `sqlx::SqlitePool`, on PostgreSQL with `sqlx::PgPool`, a pool of
/// deadpool-postgres or one of diesel-async, and with whatever else is adopted.
///
/// # Examples
///
#[cfg_attr(feature = "sqlite", doc = "```")]
#[cfg_attr(not(feature = "sqlite"), doc = "```ignore")]
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
    pub(crate) tables: Tables,
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
    ///
    /// A call that fails, panics or is dropped, by a time-out for one, leaves neither. Where two members of a group handle
    /// an event at the same time, as after a rebalance, the second waits for the first, and handles the event only if the
    /// first was rolled back. `handle` does not end the transaction itself.
    ///
    /// # Errors
    ///
    /// Whatever the database answers is retryable: one that is away spends no event.
    pub fn handle<P, F>(self, pool: P, handle: F) -> Deduplicated<P, F>
    where
        P: InboxPool,
        F: for<'a, 't> Fn(
                &'a mut P::Transaction<'t>,
                &'a Event,
                &'a Context,
            ) -> BoxFuture<'a, Result<(), HandlerError>>
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
    pub async fn forget_old<P: InboxPool>(&self, pool: &P) -> Result<u64, LogError> {
        pool.forget_old(self).await
    }
}

/// Where an [`Inbox`] gets its transactions from: a pool of some driver.
///
/// # Examples
///
/// Another driver, another pool or another version of one is adopted with a type of one's own:
///
#[cfg_attr(feature = "postgres", doc = "```")]
#[cfg_attr(not(feature = "postgres"), doc = "```ignore")]
/// use async_trait::async_trait;
/// use bus_core::HandlerError;
/// use outbox::{Effect, Inbox, InboxPool, LogError};
///
/// /// One connection, for one handler at a time.
/// struct One(tokio::sync::Mutex<tokio_postgres::Client>);
///
/// #[async_trait]
/// impl InboxPool for One {
///     type Transaction<'t> = tokio_postgres::Transaction<'t>;
///
///     async fn once(&self, effect: &Effect<'_, Self>) -> Result<bool, HandlerError> {
///         let mut client = self.0.lock().await;
///         let mut tx = client.transaction().await?;
///         let (consumer, source, id) = effect.note();
///         if tx.execute(&effect.postgres_note(), &[&consumer, &source, &id]).await? == 0 {
///             return Ok(false);
///         }
///         effect.run(&mut tx).await?;
///         tx.batch_execute("SELECT 1").await?;
///         tx.commit().await?;
///         Ok(true)
///     }
///
///     async fn forget_old(&self, inbox: &Inbox) -> Result<u64, LogError> {
///         self.0.lock().await.execute(&inbox.postgres_forget(), &[]).await.map_err(outbox::postgres_error)
///     }
/// }
/// ```
#[async_trait]
pub trait InboxPool: Sized + Send + Sync + 'static {
    /// What handlers write with.
    type Transaction<'t>: Send;

    /// Begins a transaction, notes the event, runs its effect and commits. False if the event was noted before: its effect
    /// is not run.
    ///
    /// An error rolls back, a panic within the effect, and a dropped call: where a driver does not by itself, its
    /// connection must be closed.
    ///
    /// On PostgreSQL a statement stands before the commit, whatever it is: after an error that the effect overlooked, a
    /// COMMIT rolls back and calls that a success, and the statement fails.
    async fn once(&self, effect: &Effect<'_, Self>) -> Result<bool, HandlerError>;

    /// As [`Inbox::forget_old`]: forgets a bite of what is old.
    async fn forget_old(&self, inbox: &Inbox) -> Result<u64, LogError>;
}

/// The application's code, as the drivers see it.
type Handle<P> = dyn for<'a, 't> Fn(
        &'a mut <P as InboxPool>::Transaction<'t>,
        &'a Event,
        &'a Context,
    ) -> BoxFuture<'a, Result<(), HandlerError>>
    + Send
    + Sync;

/// What is to happen once: the note of an event, and the effect that goes with it.
pub struct Effect<'e, P: InboxPool> {
    pub(crate) inbox: &'e Inbox,
    event: &'e Event,
    context: &'e Context,
    handle: &'e Handle<P>,
}

impl<P: InboxPool> Effect<'_, P> {
    /// What is noted: the consumer, and the event's source and id.
    pub fn note(&self) -> (&str, &str, &str) {
        (&self.inbox.consumer, self.event.source(), self.event.id())
    }

    /// The effect, within a transaction in which the event was noted.
    pub fn run<'a>(&'a self, transaction: &'a mut P::Transaction<'_>) -> BoxFuture<'a, Result<(), HandlerError>> {
        (self.handle)(transaction, self.event, self.context)
    }
}

impl<P: InboxPool> fmt::Debug for Effect<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Effect").field("note", &self.note()).finish_non_exhaustive()
    }
}

/// A handler behind an [`Inbox`].
pub struct Deduplicated<P, F> {
    inbox: Inbox,
    pool: P,
    handle: F,
    handled: AtomicU64,
}

#[async_trait]
impl<P, F> Handler for Deduplicated<P, F>
where
    P: InboxPool,
    F: for<'a, 't> Fn(&'a mut P::Transaction<'t>, &'a Event, &'a Context) -> BoxFuture<'a, Result<(), HandlerError>>
        + Send
        + Sync
        + 'static,
{
    async fn handle(&self, event: &Event, context: &Context) -> Result<(), HandlerError> {
        let effect = Effect { inbox: &self.inbox, event, context, handle: &self.handle };
        if !self.pool.once(&effect).await? {
            tracing::debug!(event = event.id(), consumer = self.inbox.consumer, "handled before");
            return Ok(());
        }
        if self.handled.fetch_add(1, Ordering::Relaxed) % PRUNE_EVERY == PRUNE_EVERY - 1
            && let Err(error) = self.inbox.forget_old(&self.pool).await
        {
            tracing::warn!(%error, "the inbox could not forget what is old");
        }
        Ok(())
    }
}

impl<P, F> fmt::Debug for Deduplicated<P, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Deduplicated").field("inbox", &self.inbox).finish_non_exhaustive()
    }
}
