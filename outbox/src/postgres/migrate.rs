//! The tables, made and brought up to date step by step.

use std::fmt::Write as _;

use bus_core::{LogId, mutant};
use tokio_postgres::{Client, types::Type};

use super::{PostgresConfig, Tables, column, log_error, timely};
use crate::{LogError, LogErrorKind};

/// The steps in order. One that was released is never changed; what is new is a new step.
const MIGRATIONS: &[(i64, &str, &str)] = &[(1, "outbox", include_str!("../../migrations/postgres/0001_outbox.sql"))];

/// One migration at a time, whoever runs it: the lock ends with the transaction.
const LOCK: &str = "SELECT pg_advisory_xact_lock(hashtextextended('outbus migrate {schema}', 0))";
const CREATE: &str = "CREATE SCHEMA IF NOT EXISTS \"{schema}\";\nCREATE TABLE IF NOT EXISTS {p}migration \
     (version bigint PRIMARY KEY, name text NOT NULL, at timestamptz NOT NULL DEFAULT clock_timestamp())";
const TABLE_EXISTS: &str = "SELECT to_regclass('{p}migration') IS NOT NULL";
const VERSION: &str = "SELECT coalesce(max(version), 0) FROM {p}migration";
const RECORD: &str = "INSERT INTO {p}migration (version, name) VALUES ($1, $2)";
/// The name `outbox` is the same in every service; its id is not.
const REGISTER_LOG: &str = "INSERT INTO {p}log (name, log_id) VALUES ('outbox', $1) ON CONFLICT DO NOTHING";
/// Multiranges are the youngest feature that is needed.
const SERVER_VERSION_MIN: i32 = 140_000;

/// The version this build wants.
fn latest() -> i64 {
    MIGRATIONS.last().map_or(0, |(version, ..)| *version)
}

/// Creates the schema and its tables where they are missing and brings older ones up to date, in one transaction; answers
/// the steps that were taken. Safe to call again and from several processes at once.
///
/// # Errors
///
/// [`Schema`](LogErrorKind::Schema) if the tables are newer than this build or the server is older than version 14;
/// [`Denied`](LogErrorKind::Denied) if the role may not create them.
pub async fn migrate(config: &PostgresConfig, tables: &Tables) -> Result<Vec<&'static str>, LogError> {
    let mut client = config.connect().await?;
    timely(run(&mut client, tables)).await
}

async fn run(client: &mut Client, tables: &Tables) -> Result<Vec<&'static str>, LogError> {
    let transaction = client.transaction().await.map_err(log_error)?;
    check_server(transaction.client()).await?;
    transaction.batch_execute(&tables.qualify(LOCK)).await.map_err(log_error)?;
    // Nothing is created where nothing is missing: a role that may not create can still ask.
    if !exists(transaction.client(), tables).await? {
        transaction.batch_execute(&tables.qualify(CREATE)).await.map_err(log_error)?;
    }
    let current = version(transaction.client(), tables).await?;
    check_not_newer(current)?;
    let mut taken = Vec::new();
    for (version, name, script) in MIGRATIONS.iter().filter(|(version, ..)| *version > current) {
        let script = match mutant("place-before-xid") {
            false => tables.qualify(script),
            true => tables.qualify(&script.replace("pg_current_xact_id() IS NOT NULL", "true")),
        };
        transaction.batch_execute(&script).await.map_err(log_error)?;
        let record = tables.qualify(RECORD);
        let recorded = transaction.execute_typed(&record, &[(version, Type::INT8), (name, Type::TEXT)]).await;
        recorded.map_err(log_error)?;
        taken.push(*name);
    }
    if !taken.is_empty() {
        let log_id = LogId::random().to_string();
        let register = tables.qualify(REGISTER_LOG);
        transaction.execute_typed(&register, &[(&log_id, Type::TEXT)]).await.map_err(log_error)?;
    }
    transaction.commit().await.map_err(log_error)?;
    Ok(taken)
}

/// The steps as SQL, to be read or run by hand.
pub fn print_migrations(tables: &Tables) -> String {
    let mut sql = format!("BEGIN;\n\n{};\n", tables.qualify(CREATE));
    for (version, name, script) in MIGRATIONS {
        let record = tables.qualify(RECORD).replace("$1", &version.to_string()).replace("$2", &format!("'{name}'"));
        write!(sql, "\n-- Step {version}: {name}\n{}\n{record};\n", tables.qualify(script).trim_end())
            .expect("writing to a string does not fail");
    }
    sql + "\n" + &tables.qualify(REGISTER_LOG).replace("$1", "gen_random_uuid()::text") + ";\n\nCOMMIT;\n"
}

/// Fails unless the tables are those of this build.
pub(super) async fn check(client: &Client, tables: &Tables) -> Result<(), LogError> {
    check_server(client).await?;
    let current = if exists(client, tables).await? { version(client, tables).await? } else { 0 };
    check_not_newer(current)?;
    match current {
        0 => Err(schema("the database has no outbox tables: run `outbus migrate`")),
        older if older < latest() => {
            let latest = latest();
            Err(schema(format!(
                "the outbox tables are of version {older}, this build wants {latest}: run `outbus migrate`"
            )))
        }
        _ => Ok(()),
    }
}

async fn check_server(client: &Client) -> Result<(), LogError> {
    let sql = "SELECT current_setting('server_version_num')::int4, current_setting('server_version'), \
         current_setting('server_encoding')";
    let row = client.query_typed_one(sql, &[]).await.map_err(log_error)?;
    if column::<i32>(&row, 0)? < SERVER_VERSION_MIN {
        let found: &str = column(&row, 1)?;
        return Err(schema(format!("the server is PostgreSQL {found}; 14 or newer is needed")));
    }
    let encoding: &str = column(&row, 2)?;
    if encoding != "UTF8" {
        return Err(schema(format!(
            "the database is encoded in {encoding}, which has no place for every event: create it with ENCODING 'UTF8'"
        )));
    }
    Ok(())
}

fn check_not_newer(current: i64) -> Result<(), LogError> {
    let latest = latest();
    if current > latest {
        return Err(schema(format!(
            "the outbox tables are of version {current}, this build knows only {latest}: use a newer outbus"
        )));
    }
    Ok(())
}

fn schema(message: impl Into<std::borrow::Cow<'static, str>>) -> LogError {
    LogError::new(LogErrorKind::Schema, message)
}

async fn exists(client: &Client, tables: &Tables) -> Result<bool, LogError> {
    let row = client.query_typed_one(&tables.qualify(TABLE_EXISTS), &[]).await.map_err(log_error)?;
    column(&row, 0)
}

async fn version(client: &Client, tables: &Tables) -> Result<i64, LogError> {
    let row = client.query_typed_one(&tables.qualify(VERSION), &[]).await.map_err(log_error)?;
    column(&row, 0)
}
