//! [`Outbox`]: events appended in the caller's own transaction.

use async_trait::async_trait;
use bus_core::{Event, EventError};

use crate::{AppendError, Tables, Wake};

/// Largest event by default, as [`Event::size_bytes`] counts.
///
/// Source: below Kafka's default of 1 MiB with room for headers.
pub const EVENT_BYTES_MAX: usize = 900 << 10;

/// Settings of an [`Outbox`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OutboxConfig {
    /// What the tables are called, and how large an event may be. Default: `outbus_`, 900 KiB.
    pub tables: Tables,
    /// Accept connections that do not wait for the disk at commit. A power cut may then take back transactions whose
    /// events are published already. Default false.
    pub allow_relaxed_sync: bool,
}

/// Where a service appends its events: in the same transaction as what they are about.
///
/// # Examples
///
/// ```
/// use bus_core::Event;
/// use outbox::{Outbox, OutboxConfig};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let dir = tempfile::tempdir()?;
/// # let options = sqlx::sqlite::SqliteConnectOptions::new().filename(dir.path().join("shop.db")).create_if_missing(true);
/// # let pool = sqlx::SqlitePool::connect_with(options).await?;
/// let outbox = Outbox::sqlite(pool.clone(), OutboxConfig::default());
/// outbox.migrate().await?;
///
/// let mut tx = pool.begin_with("BEGIN IMMEDIATE").await?;
/// // ... write the order ...
/// outbox.append(&mut tx, [Event::json("orders", "order.placed", &7)?.key("order-7")]).await?;
/// tx.commit().await?;
/// outbox.wake();
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Outbox {
    pub(crate) pool: Pool,
    config: OutboxConfig,
    wake: Wake,
}

/// The database the outbox is in.
#[derive(Clone, Debug)]
pub(crate) enum Pool {
    #[cfg(feature = "sqlite")]
    Sqlite(sqlx::SqlitePool),
    #[cfg(feature = "postgres")]
    Postgres(std::sync::Arc<crate::postgres::Notifier>),
}

impl Outbox {
    pub(crate) fn new(pool: Pool, config: OutboxConfig) -> Self {
        Self { pool, config, wake: Wake::new() }
    }

    /// The outbox in a PostgreSQL database, whatever client appends to it.
    #[cfg(feature = "postgres")]
    pub fn postgres(database: crate::PostgresConfig, config: OutboxConfig) -> Self {
        let notifier = crate::postgres::Notifier::new(database, config.tables.clone());
        Self::new(Pool::Postgres(std::sync::Arc::new(notifier)), config)
    }

    /// Makes the tables, or brings them up to date. See [`migrate`](crate::migrate) and
    /// [`migrate_postgres`](crate::migrate_postgres).
    ///
    /// # Errors
    ///
    /// As those.
    #[cfg(any(feature = "sqlite", feature = "postgres"))]
    pub async fn migrate(&self) -> Result<(), crate::LogError> {
        match &self.pool {
            #[cfg(feature = "sqlite")]
            Pool::Sqlite(pool) => crate::migrate(&pool.connect_options(), self.tables()).await.map(drop),
            #[cfg(feature = "postgres")]
            Pool::Postgres(notifier) => crate::migrate_postgres(notifier.config(), self.tables()).await.map(drop),
        }
    }

    /// The log, to be relayed to `sink`.
    ///
    /// # Errors
    ///
    /// As [`SqliteLog::open`](crate::SqliteLog::open) and [`PostgresLog::open`](crate::PostgresLog::open).
    #[cfg(any(feature = "sqlite", feature = "postgres"))]
    pub async fn log(&self, sink: &str) -> Result<std::sync::Arc<dyn crate::LogSource>, crate::LogError> {
        let tables = self.tables().clone();
        match &self.pool {
            #[cfg(feature = "sqlite")]
            Pool::Sqlite(pool) => {
                Ok(std::sync::Arc::new(crate::SqliteLog::open(&pool.connect_options(), tables, sink).await?))
            }
            #[cfg(feature = "postgres")]
            Pool::Postgres(notifier) => {
                Ok(std::sync::Arc::new(crate::PostgresLog::open(notifier.config(), tables, sink).await?))
            }
        }
    }

    /// Appends events to the log, in order, within `transaction`: they exist if and only if it commits.
    ///
    /// # Ordering
    ///
    /// Append last, right before the commit, when the aggregate's row is locked or its version checked. Then the events
    /// of a key stand in the log in the order of the transactions that changed it. One that is appended before the
    /// aggregate is locked can stand behind one that was locked later.
    ///
    /// # Errors
    ///
    /// The first event that breaks a rule or is too large, before anything is written; or what the database answers. The
    /// transaction should be rolled back.
    pub async fn append<E>(
        &self,
        transaction: &mut impl OutboxTx,
        events: impl IntoIterator<Item = E>,
    ) -> Result<(), AppendError>
    where
        E: TryInto<Event>,
        E::Error: Into<EventError>,
    {
        let checked = self.checked(events)?;
        if checked.is_empty() {
            return Ok(());
        }
        transaction.insert(&self.insert_of(&checked)).await
    }

    pub(crate) fn insert_of<'a>(&'a self, checked: &'a [Event]) -> Insert<'a> {
        Insert { tables: &self.config.tables, events: checked, allow_relaxed_sync: self.config.allow_relaxed_sync }
    }

    /// The events, each within the rules and the limit.
    pub(crate) fn checked<E>(&self, events: impl IntoIterator<Item = E>) -> Result<Vec<Event>, AppendError>
    where
        E: TryInto<Event>,
        E::Error: Into<EventError>,
    {
        let check = |(index, event): (usize, E)| {
            let event = event.try_into().map_err(|error| AppendError::new(index, error.into()))?;
            self.check_size(event).map_err(|error| AppendError::new(index, error))
        };
        events.into_iter().enumerate().map(check).collect()
    }

    fn check_size(&self, event: Event) -> Result<Event, EventError> {
        let (size, max) = (event.size_bytes(), self.config.tables.event_bytes_max());
        if size > max {
            let problem = format!(
                "makes an event of {size} bytes; at most {max} are allowed: store the data elsewhere and publish a reference"
            );
            return Err(EventError::new("data", problem));
        }
        Ok(event)
    }

    /// Nudges the relays: those in this process at once, on PostgreSQL those elsewhere by a notification on a connection of
    /// its own, at most one a millisecond. Call it after the commit; without it an event waits for the next poll.
    pub fn wake(&self) {
        self.wake.wake();
        #[cfg(any(feature = "sqlite", feature = "postgres"))]
        match &self.pool {
            #[cfg(feature = "sqlite")]
            Pool::Sqlite(_) => {}
            #[cfg(feature = "postgres")]
            Pool::Postgres(notifier) => notifier.notify(),
        }
    }

    /// The nudge, for relays to listen to.
    pub fn wake_signal(&self) -> &Wake {
        &self.wake
    }

    /// What the tables are called.
    pub fn tables(&self) -> &Tables {
        &self.config.tables
    }
}

/// A transaction of some driver, into which events can be inserted. Implemented for transactions only: passing a pool or
/// a bare connection, the most common mistake with an outbox, does not compile.
///
/// # Examples
///
/// Another driver, or another version of one, is adopted with a type for its transaction:
///
#[cfg_attr(feature = "sqlx-postgres", doc = "```")]
#[cfg_attr(not(feature = "sqlx-postgres"), doc = "```ignore")]
/// use async_trait::async_trait;
/// use outbox::{AppendError, Insert, LogError, LogErrorKind, OutboxTx};
///
/// /// A connection on which BEGIN was executed.
/// struct Begun<'a>(&'a mut sqlx::PgConnection);
///
/// #[async_trait]
/// impl OutboxTx for Begun<'_> {
///     async fn insert(&mut self, insert: &Insert<'_>) -> Result<(), AppendError> {
///         for rows in insert.postgres_rows() {
///             let query = sqlx::query(sqlx::AssertSqlSafe(insert.postgres_many())).bind(&rows.id).bind(&rows.topic);
///             let query = query.bind(&rows.key).bind(&rows.event_type).bind(&rows.source).bind(&rows.subject);
///             let query = query.bind(&rows.content_type).bind(&rows.extensions).bind(&rows.time).bind(&rows.data);
///             let refused = |error| LogError::with_source(LogErrorKind::Invalid, "the insert is refused", error);
///             query.execute(&mut *self.0).await.map_err(refused)?;
///         }
///         Ok(())
///     }
/// }
/// ```
#[async_trait]
pub trait OutboxTx: Send {
    /// Inserts the events' rows, in order, with the statement's tables.
    async fn insert(&mut self, insert: &Insert<'_>) -> Result<(), AppendError>;
}

/// Events to be inserted. They were checked.
#[derive(Debug)]
pub struct Insert<'a> {
    pub(crate) tables: &'a Tables,
    pub(crate) events: &'a [Event],
    pub(crate) allow_relaxed_sync: bool,
}

impl Insert<'_> {
    /// The events, in order.
    pub fn events(&self) -> &[Event] {
        self.events
    }
}
