//! The log on SQLite.
//!
//! SQLite has one writer at a time, and a number that was rolled back is drawn again: places become visible in the order
//! in which they were drawn, without gaps. So the cursor has no unseen holes here, except for those a new owner finds.

mod append;
mod admin;
mod inbox;
mod migrate;
mod owner;
mod rows;
mod source;

use std::{borrow::Cow, fmt, path::Path, str::FromStr, sync::atomic::AtomicI64, time::Duration};

use sqlx::{
    AssertSqlSafe, Connection, SqliteConnection,
    error::DatabaseError,
    sqlite::{SqliteConnectOptions, SqliteSynchronous},
};
use tokio::sync::{Mutex, MutexGuard};

use crate::{LogError, LogErrorKind, Tables, check_sink};

pub use migrate::{migrate, print_migrations};

/// How long a statement waits for the writer's lock.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Rows that wait between SQLite's thread and the reader's task.
const ROW_BUFFER: usize = 512;

impl Tables {
    /// A statement with its names filled in: safe, for the prefix was checked to be an identifier.
    fn sql(&self, template: &'static str) -> AssertSqlSafe<String> {
        AssertSqlSafe(self.expand(template))
    }
}

/// One log of a SQLite file, read for one sink.
///
/// It has connections of its own, so that reading, writing and waiting do not wait for each other.
pub struct SqliteLog {
    tables: Tables,
    sink: String,
    reader: Slot,
    writer: Slot,
    watcher: Slot,
    /// The data version that was seen last.
    seen_version: AtomicI64,
}

impl SqliteLog {
    fn closed(options: &SqliteConnectOptions, tables: Tables, sink: &str) -> Result<Self, LogError> {
        check_is_file(options)?;
        let options = options.clone().create_if_missing(false).busy_timeout(BUSY_TIMEOUT).row_buffer_size(ROW_BUFFER);
        // A checkpoint need not wait for the disk; what must is committed with `PRAGMA synchronous = FULL`.
        let writer = options.clone().synchronous(SqliteSynchronous::Normal);
        let (reader, writer, watcher) = (Slot::new(options.clone()), Slot::new(writer), Slot::new(options));
        Ok(Self { tables, sink: sink.to_owned(), reader, writer, watcher, seen_version: AtomicI64::new(-1) })
    }

    /// Opens the log `outbox` of the file that `options` name, for `sink`.
    ///
    /// # Errors
    ///
    /// [`Schema`](LogErrorKind::Schema) if there is no file, no database or not our tables,
    /// [`Denied`](LogErrorKind::Denied) if it cannot be written.
    pub async fn open(options: &SqliteConnectOptions, tables: Tables, sink: &str) -> Result<Self, LogError> {
        check_sink(sink)?;
        let log = Self::closed(options, tables, sink)?;
        let mut connection = log.writer.lock().await?;
        migrate::check(connection.get(), &log.tables).await.map_err(|error| of_file(options, error))?;
        check_is_writable(connection.get()).await.map_err(|error| of_file(options, error))?;
        drop(connection);
        Ok(log)
    }

    /// Opens the log for an operator, who may only be allowed to read.
    ///
    /// # Errors
    ///
    /// As [`open`](SqliteLog::open), but a file that cannot be written is met only by what writes.
    pub async fn open_admin(options: &SqliteConnectOptions, tables: Tables) -> Result<Self, LogError> {
        let log = Self::closed(options, tables, "")?;
        let mut connection = log.reader.lock().await?;
        migrate::check(connection.get(), &log.tables).await.map_err(|error| of_file(options, error))?;
        drop(connection);
        Ok(log)
    }
}

impl fmt::Debug for SqliteLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqliteLog")
            .field("file", &self.reader.options.get_filename())
            .field("sink", &self.sink)
            .finish_non_exhaustive()
    }
}

/// Reads a database URL: `sqlite:relative.db`, `sqlite:///absolute.db`.
///
/// # Errors
///
/// [`Invalid`](LogErrorKind::Invalid) if it is none, or names a database in memory, which other processes cannot see.
pub fn sqlite_options(url: &str) -> Result<SqliteConnectOptions, LogError> {
    let message = "a SQLite URL is written sqlite:relative.db or sqlite:///absolute.db";
    let wrong = || LogError::new(LogErrorKind::Invalid, message);
    let url = Some(url).filter(|url| url.starts_with("sqlite:")).ok_or_else(wrong)?;
    let options = SqliteConnectOptions::from_str(url).map_err(|_| wrong())?;
    check_is_file(&options)?;
    Ok(options)
}

fn check_is_file(options: &SqliteConnectOptions) -> Result<(), LogError> {
    let name = options.get_filename();
    if name == Path::new("")
        || name.to_string_lossy().contains(":memory:")
        || name.to_string_lossy().starts_with("file:sqlx-in-memory")
    {
        return Err(LogError::new(
            LogErrorKind::Invalid,
            "an outbox needs a file: a database in memory is seen by one connection only",
        ));
    }
    Ok(())
}

/// Tells a read-only file from a writable one before anything depends on it.
async fn check_is_writable(connection: &mut SqliteConnection) -> Result<(), LogError> {
    // Somebody who writes now is not waited for: so the file can be written.
    sqlx::query("PRAGMA busy_timeout = 0").execute(&mut *connection).await.map_err(log_error)?;
    let tried = match connection.begin_with("BEGIN IMMEDIATE").await.map_err(log_error) {
        Ok(transaction) => transaction.rollback().await.map_err(log_error),
        Err(error) if error.kind() == LogErrorKind::Unavailable => Ok(()),
        Err(error) => Err(error),
    };
    let restore = format!("PRAGMA busy_timeout = {}", BUSY_TIMEOUT.as_millis());
    sqlx::query(AssertSqlSafe(restore)).execute(&mut *connection).await.map_err(log_error)?;
    tried
}

/// A connection that is opened when it is needed, and again after it failed.
struct Slot {
    options: SqliteConnectOptions,
    connection: Mutex<Option<SqliteConnection>>,
}

struct Held<'a>(MutexGuard<'a, Option<SqliteConnection>>);

impl Slot {
    fn new(options: SqliteConnectOptions) -> Self {
        Self { options, connection: Mutex::new(None) }
    }

    async fn lock(&self) -> Result<Held<'_>, LogError> {
        let mut guard = self.connection.lock().await;
        if guard.is_none() {
            *guard = Some(open(&self.options).await.map_err(|error| self.missing(error))?);
        }
        Ok(Held(guard))
    }

    /// SQLite does not tell a file that is not there from one that may not be opened.
    fn missing(&self, error: LogError) -> LogError {
        let file = self.options.get_filename();
        if error.kind() != LogErrorKind::Schema || file.exists() {
            return error;
        }
        let message = format!("{}: there is no such file: run `outbus migrate`", file.display());
        LogError::with_source(LogErrorKind::Schema, message, error)
    }
}

impl Held<'_> {
    fn get(&mut self) -> &mut SqliteConnection {
        self.0.as_mut().expect("it was opened by `lock`")
    }

    /// After an error the connection is opened anew, whatever state it was left in.
    fn check<T>(mut self, result: Result<T, LogError>) -> Result<T, LogError> {
        if result.as_ref().is_err_and(|error| error.kind() != LogErrorKind::Fenced) {
            *self.0 = None;
        }
        result
    }
}

pub(super) async fn open(options: &SqliteConnectOptions) -> Result<SqliteConnection, LogError> {
    SqliteConnection::connect_with(options).await.map_err(|error| of_file(options, log_error(error)))
}

/// The error, with the file's name before it.
fn of_file(options: &SqliteConnectOptions, error: LogError) -> LogError {
    LogError::with_source(error.kind(), format!("{}: {error}", options.get_filename().display()), error)
}

/// The one place where SQLite's errors get their kind: also for code that uses the database beside the outbox.
pub fn log_error(error: sqlx::Error) -> LogError {
    let (kind, message): (LogErrorKind, Cow<'static, str>) = match &error {
        sqlx::Error::Database(database) => classify(&**database),
        sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut | sqlx::Error::WorkerCrashed => {
            (LogErrorKind::Unavailable, format!("the database cannot be used: {error}").into())
        }
        sqlx::Error::PoolClosed => (LogErrorKind::Invalid, "the pool is closed".into()),
        _ => (LogErrorKind::Invalid, format!("the database answered something unexpected: {error}").into()),
    };
    LogError::with_source(kind, message, error)
}

/// Source: sqlite.org/rescode.html; the low byte is the primary code.
fn classify(error: &dyn DatabaseError) -> (LogErrorKind, Cow<'static, str>) {
    use LogErrorKind::{Denied, Invalid, Schema, Unavailable};
    let code: i64 = error.code().and_then(|code| code.parse().ok()).unwrap_or(0);
    let text = error.message();
    match code & 0xff {
        5 | 6 => (
            Unavailable,
            "the database is locked by another writer: keep write transactions short, and begin them with BEGIN IMMEDIATE \
             (`begin_with(\"BEGIN IMMEDIATE\")`), which waits for its turn where a deferred one fails"
                .into(),
        ),
        3 | 8 | 23 => (Denied, "the database is read-only for this process: make the file and its folder writable".into()),
        10 => (Unavailable, format!("the disk answers with an error: {text}").into()),
        11 => (Schema, format!("the database is damaged: {text}").into()),
        13 => (Unavailable, "the disk is full: make room".into()),
        14 => (Schema, "the database cannot be opened: is the path right, and may this process read it?".into()),
        26 => (Schema, "the file is not a SQLite database".into()),
        1 if text.contains("no such table") => (Schema, format!("{text}: run `outbus migrate`").into()),
        19 if text.contains("CHECK") => (Invalid, format!("the table refuses the event: {text}").into()),
        _ => (Invalid, format!("the database refuses the statement: {text}").into()),
    }
}

/// The database's clock, in microseconds since 1970.
const NOW: &str = "SELECT CAST(unixepoch('now', 'subsec') * 1000000 AS INTEGER)";

async fn database_now(connection: &mut SqliteConnection) -> Result<i64, LogError> {
    sqlx::query_scalar(NOW).fetch_one(connection).await.map_err(log_error)
}

/// A duration in the tables' unit.
fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}
