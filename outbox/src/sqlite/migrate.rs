//! The tables, made and brought up to date step by step.

use std::{
    fmt::Write as _,
    time::{Duration, Instant},
};

use bus_core::LogId;
use sqlx::{AssertSqlSafe, Connection, Row as _, SqliteConnection, sqlite::SqliteConnectOptions};

use super::{BUSY_TIMEOUT, Tables, log_error, of_file, open};
use crate::{LogError, LogErrorKind};

/// The steps in order. One that was released is never changed; what is new is a new step.
const MIGRATIONS: &[(i64, &str, &str)] = &[(1, "outbox", include_str!("../../migrations/sqlite/0001_outbox.sql"))];

const CREATE_MIGRATION: &str =
    "CREATE TABLE IF NOT EXISTS {p}migration (version INTEGER PRIMARY KEY, name TEXT NOT NULL, at INTEGER NOT NULL)";

const TABLE_EXISTS: &str = "SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name = '{p}migration'";

const VERSION: &str = "SELECT coalesce(max(version), 0) FROM {p}migration";

const RECORD: &str =
    "INSERT INTO {p}migration (version, name, at) VALUES (?, ?, CAST(unixepoch('now', 'subsec') * 1000000 AS INTEGER))";

/// The name `outbox` is the same in every service; its id is not.
const REGISTER_LOG: &str = "INSERT OR IGNORE INTO {p}log (name, log_id) VALUES ('outbox', ?)";

/// The version this build wants.
fn latest() -> i64 {
    MIGRATIONS.last().map_or(0, |(version, ..)| *version)
}

/// Creates the tables where they are missing and brings older ones up to date; answers the steps that were taken.
///
/// Safe to call again and from several processes at once. Sets the database to WAL mode, in which readers and the
/// writer do not wait for each other.
///
/// # Errors
///
/// [`Schema`](LogErrorKind::Schema) if the tables are newer than this build, or the file is no database.
pub async fn migrate(options: &SqliteConnectOptions, tables: &Tables) -> Result<Vec<&'static str>, LogError> {
    let mut connection = open(&options.clone().create_if_missing(true)).await?;
    let taken = bring_up_to_date(&mut connection, tables).await.map_err(|error| of_file(options, error))?;
    connection.close().await.map_err(log_error)?;
    Ok(taken)
}

async fn bring_up_to_date(connection: &mut SqliteConnection, tables: &Tables) -> Result<Vec<&'static str>, LogError> {
    to_wal(connection).await?;
    let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await.map_err(log_error)?;
    execute(&mut transaction, tables, CREATE_MIGRATION).await?;
    let current = version(&mut transaction, tables).await?;
    check_not_newer(current)?;
    let mut taken = Vec::new();
    for (version, name, script) in MIGRATIONS.iter().filter(|(version, ..)| *version > current) {
        execute(&mut transaction, tables, script).await?;
        let record = sqlx::query(tables.sql(RECORD)).bind(version).bind(name);
        record.execute(&mut *transaction).await.map_err(log_error)?;
        taken.push(*name);
    }
    let register = sqlx::query(tables.sql(REGISTER_LOG)).bind(LogId::random().to_string());
    register.execute(&mut *transaction).await.map_err(log_error)?;
    transaction.commit().await.map_err(log_error)?;
    Ok(taken)
}

/// Changing the mode waits for nobody who writes or changes it too: so it is tried again, as long as a statement would
/// wait.
async fn to_wal(connection: &mut SqliteConnection) -> Result<(), LogError> {
    let started = Instant::now();
    loop {
        let changed = sqlx::raw_sql("PRAGMA journal_mode = WAL").execute(&mut *connection).await.map_err(log_error);
        match changed {
            Err(error) if error.kind() == LogErrorKind::Unavailable && started.elapsed() < BUSY_TIMEOUT => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            changed => return changed.map(drop),
        }
    }
}

/// The steps as SQL, to be read or run by hand.
pub fn print_migrations(tables: &Tables) -> String {
    let mut sql = format!("{};\n", tables.expand(CREATE_MIGRATION));
    for (version, name, script) in MIGRATIONS {
        let record =
            tables.expand(RECORD).replacen('?', &version.to_string(), 1).replacen('?', &format!("'{name}'"), 1);
        write!(sql, "\n-- Step {version}: {name}\n{}\n{record};\n", tables.expand(script).trim_end())
            .expect("writing to a string does not fail");
    }
    let log = tables.expand(REGISTER_LOG);
    let log = log.replacen('?', "lower(hex(randomblob(16)))", 1);
    sql + "\n" + &log + ";\n"
}

/// Fails unless the tables are those of this build.
pub(super) async fn check(connection: &mut SqliteConnection, tables: &Tables) -> Result<(), LogError> {
    let exists = sqlx::query(tables.sql(TABLE_EXISTS)).fetch_one(&mut *connection).await.map_err(log_error)?;
    let current = if exists.get::<i64, _>(0) == 0 { 0 } else { version(connection, tables).await? };
    check_not_newer(current)?;
    match current {
        0 => Err(schema("the database has no outbox tables: run `outbus migrate`")),
        older if older < latest() => {
            let message = format!(
                "the outbox tables are of version {older}, this build wants {}: run `outbus migrate`",
                latest()
            );
            Err(schema(message))
        }
        _ => Ok(()),
    }
}

fn check_not_newer(current: i64) -> Result<(), LogError> {
    if current > latest() {
        let latest = latest();
        return Err(schema(format!(
            "the outbox tables are of version {current}, this build knows only {latest}: use a newer outbus"
        )));
    }
    Ok(())
}

fn schema(message: impl Into<std::borrow::Cow<'static, str>>) -> LogError {
    LogError::new(LogErrorKind::Schema, message)
}

async fn version(connection: &mut SqliteConnection, tables: &Tables) -> Result<i64, LogError> {
    let row = sqlx::query(tables.sql(VERSION)).fetch_one(connection).await.map_err(log_error)?;
    Ok(row.get(0))
}

async fn execute(connection: &mut SqliteConnection, tables: &Tables, template: &str) -> Result<(), LogError> {
    // Safe: our own script, with a prefix that was checked to be an identifier.
    sqlx::raw_sql(AssertSqlSafe(tables.expand(template))).execute(connection).await.map_err(log_error)?;
    Ok(())
}
