//! The log on PostgreSQL.
//!
//! Writers draw places side by side, so a place may become visible after later ones, or never: such gaps are the
//! cursor's unseen holes. Every statement is sent whole, with the types of its parameters, in one message: no prepared
//! statement outlives it, so a pooler that gives each transaction another connection does no harm.

mod config;
mod error;
#[cfg(feature = "tls")]
mod tls;
mod notify;
mod values;
mod gaps;
mod migrate;
mod source;
mod owner;
mod admin;
mod append;
mod inbox;
mod transaction;

use std::{
    fmt,
    sync::{
        Mutex as StdMutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize},
    },
    time::Duration,
};

use bus_core::mutant;
use tokio::{
    sync::{Mutex, MutexGuard},
    task::JoinHandle,
};
use tokio_postgres::{
    Client, IsolationLevel, Row, Transaction,
    types::{ToSql, Type},
};

use crate::{LogError, Tables, check_sink};
use gaps::Gaps;
use notify::Listener;

pub use append::PostgresRows;
pub use config::PostgresConfig;
pub use error::log_error;
pub(crate) use notify::Notifier;
pub use transaction::{PostgresTransaction, PreparedAppend};

pub use migrate::{migrate, print_migrations};

/// A parameter of a statement, with its type.
type Parameter<'a> = (&'a (dyn ToSql + Sync), Type);

/// Who holds the lock that drawing a place takes, as `pg_locks` has it.
const LOCKED: &str = "locktype = 'relation' \
     AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
     AND relation = '{p}outbox'::regclass AND mode = 'RowExclusiveLock' AND granted";

/// The server's timeline, which a promotion changes.
const TIMELINE: &str = "substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)";

/// Longest wait for another who writes the same row; and for ourselves: who freezes within a transaction, or whose machine
/// is gone, must not hold up the others. And it waits for the disk, whatever the role's transactions do: one who owns a log
/// owns it after a crash of the database too.
const TRANSACTION: &str = "SELECT set_config('lock_timeout', '5s', true), \
     set_config('idle_in_transaction_session_timeout', '5s', true), set_config('synchronous_commit', {durable}, true)";

/// What the role has set, such as `remote_apply`, but no less than the disk.
const DURABLE: &str = "replace(current_setting('synchronous_commit'), 'off', 'on')";

/// How long a statement may take before its connection counts as broken.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(30);

/// One log of a PostgreSQL database, read for one sink.
///
/// It has connections of its own, so that reading, writing, removing and waiting do not wait for each other.
pub struct PostgresLog {
    tables: Tables,
    sink: String,
    reader: Slot,
    writer: Slot,
    janitor: Slot,
    gaps: StdMutex<Gaps>,
    /// The server's timeline when the log was taken; empty before.
    timeline: StdMutex<String>,
    listener: Listener,
    watcher: Slot,
    /// The highest place that was drawn when somebody looked last.
    seen_last: AtomicU64,
    /// Rows that were removed since the table was vacuumed.
    removed: AtomicU64,
    /// Microseconds until a commit has reached the disk that did not wait for it.
    write_delay: AtomicU64,
    /// Rows per byte of the last page, so that the next one asks for no more than it may bring.
    row_bytes: AtomicUsize,
}

impl PostgresLog {
    fn closed(config: &PostgresConfig, tables: Tables, sink: &str) -> Self {
        let slot = || Slot { config: config.clone(), connection: Mutex::default() };
        Self {
            tables,
            sink: sink.to_owned(),
            reader: slot(),
            writer: slot(),
            janitor: slot(),
            gaps: StdMutex::default(),
            timeline: StdMutex::default(),
            listener: Listener::default(),
            watcher: slot(),
            seen_last: AtomicU64::new(u64::MAX),
            removed: AtomicU64::new(0),
            write_delay: AtomicU64::new(0),
            row_bytes: AtomicUsize::new(0),
        }
    }

    /// Opens the log `outbox` of the database, for `sink`.
    ///
    /// # Errors
    ///
    /// [`Unavailable`](crate::LogErrorKind::Unavailable) if the server is away, [`Schema`](crate::LogErrorKind::Schema)
    /// if it has not our tables, [`Denied`](crate::LogErrorKind::Denied) if it does not let us in.
    pub async fn open(config: &PostgresConfig, tables: Tables, sink: &str) -> Result<Self, LogError> {
        check_sink(sink)?;
        Self::open_admin_as(config, tables, sink).await
    }

    /// Opens the log for an operator.
    ///
    /// # Errors
    ///
    /// As [`open`](PostgresLog::open).
    pub async fn open_admin(config: &PostgresConfig, tables: Tables) -> Result<Self, LogError> {
        Self::open_admin_as(config, tables, "").await
    }

    async fn open_admin_as(config: &PostgresConfig, tables: Tables, sink: &str) -> Result<Self, LogError> {
        let log = Self::closed(config, tables, sink);
        let mut held = log.reader.lock().await?;
        let checked = timely(migrate::check(held.get(), &log.tables)).await;
        held.check(checked)?;
        Ok(log)
    }

    fn gaps(&self) -> std::sync::MutexGuard<'_, Gaps> {
        self.gaps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for PostgresLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresLog")
            .field("config", &self.reader.config)
            .field("sink", &self.sink)
            .finish_non_exhaustive()
    }
}

/// A connection that is opened when it is needed, and again after it failed.
struct Slot {
    config: PostgresConfig,
    connection: Mutex<Connection>,
}

#[derive(Default)]
struct Connection {
    client: Option<Client>,
    /// It is opened by a task, which whoever waited for it need not outlive: one who waits ever so shortly, again and
    /// again, would open one after the other.
    opening: Option<JoinHandle<Result<Client, LogError>>>,
}

struct Held<'a>(MutexGuard<'a, Connection>);

impl Slot {
    async fn lock(&self) -> Result<Held<'_>, LogError> {
        let mut guard = self.connection.lock().await;
        if guard.client.as_ref().is_none_or(Client::is_closed) {
            let config = &self.config;
            let open = || {
                let config = config.clone();
                tokio::spawn(async move { config.connect_for_log().await })
            };
            let opened = guard.opening.get_or_insert_with(open).await;
            guard.opening = None;
            guard.client = Some(match opened {
                Ok(opened) => opened?,
                Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                Err(_) => return Err(error::timed_out("the runtime ends")),
            });
        }
        Ok(Held(guard))
    }
}

impl Held<'_> {
    fn get(&mut self) -> &mut Client {
        self.0.client.as_mut().expect("it was opened by `lock`")
    }

    /// After an error the connection is opened anew, whatever state it was left in.
    fn check<T>(mut self, result: Result<T, LogError>) -> Result<T, LogError> {
        if result.as_ref().is_err_and(|error| error.kind() != crate::LogErrorKind::Fenced) {
            self.0.client = None;
        }
        result
    }
}

/// Gives up on a server that does not answer.
async fn timely<T>(work: impl Future<Output = Result<T, LogError>>) -> Result<T, LogError> {
    tokio::time::timeout(STATEMENT_TIMEOUT, work).await.unwrap_or_else(|_| Err(error::timed_out("a statement")))
}

/// Begins a transaction that writes.
async fn begin(client: &mut Client) -> Result<Transaction<'_>, LogError> {
    // A standby refuses to begin one that is to write with a code that says nothing: it is told by the first write.
    let begin = client.build_transaction().isolation_level(IsolationLevel::ReadCommitted);
    let transaction = begin.start().await.map_err(log_error)?;
    if !mutant("frozen-owner-stays") {
        transaction.query_typed(&TRANSACTION.replace("{durable}", DURABLE), &[]).await.map_err(log_error)?;
    }
    Ok(transaction)
}

/// A column of a row that we selected; one that is not what we selected is damaged.
fn column<'r, T: tokio_postgres::types::FromSql<'r>>(row: &'r Row, index: usize) -> Result<T, LogError> {
    row.try_get(index).map_err(log_error)
}
