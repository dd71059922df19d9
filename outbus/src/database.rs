//! From a database URL to a log.

use std::sync::Arc;

use outbox::{
    LogAdmin, LogError, LogSource, Outbox, OutboxConfig, PostgresConfig, PostgresLog, SqliteLog, Tables, sqlite_options,
};
use sqlx::{SqlitePool, sqlite::SqliteConnectOptions};

use crate::failure::Failure;

/// A database that can hold an outbox.
#[derive(Clone, Debug)]
pub(crate) struct Database {
    pub(crate) kind: DatabaseKind,
    pub(crate) tables: Tables,
}

#[derive(Clone, Debug)]
pub(crate) enum DatabaseKind {
    Sqlite(Box<SqliteConnectOptions>),
    Postgres(Box<PostgresConfig>),
}

impl Database {
    /// Reads the URL, beside where notifications are listened for; connects to nothing.
    pub(crate) fn from_url(url: &str, listen: Option<PostgresConfig>) -> Result<Self, Failure> {
        let kind = match url.split_once(':') {
            Some(("sqlite", _)) => DatabaseKind::Sqlite(Box::new(sqlite_options(url)?)),
            Some(("postgres" | "postgresql", _)) => {
                let config = PostgresConfig::from_url(url)?;
                DatabaseKind::Postgres(Box::new(match listen {
                    Some(listen) => config.listen_at(listen),
                    None => config,
                }))
            }
            _ => {
                return Err(Failure::usage(
                    "database_url",
                    "a database URL is written postgres://user:password@host/database, sqlite:relative.db or \
                     sqlite:///absolute.db",
                ));
            }
        };
        Ok(Self { kind, tables: Tables::default() })
    }

    /// The log as an operator sees it.
    pub(crate) async fn admin(&self) -> Result<Arc<dyn LogAdmin>, Failure> {
        let tables = self.tables.clone();
        Ok(match &self.kind {
            DatabaseKind::Sqlite(options) => Arc::new(SqliteLog::open_admin(options, tables).await?),
            DatabaseKind::Postgres(config) => Arc::new(PostgresLog::open_admin(config, tables).await?),
        })
    }

    /// The log as a sink's relay reads it.
    pub(crate) async fn log(&self, sink: &str) -> Result<Arc<dyn LogSource>, LogError> {
        let tables = self.tables.clone();
        Ok(match &self.kind {
            DatabaseKind::Sqlite(options) => Arc::new(SqliteLog::open(options, tables, sink).await?),
            DatabaseKind::Postgres(config) => Arc::new(PostgresLog::open(config, tables, sink).await?),
        })
    }

    /// Makes the tables, or brings them up to date; answers the steps that were taken.
    pub(crate) async fn migrate(&self) -> Result<Vec<&'static str>, LogError> {
        match &self.kind {
            DatabaseKind::Sqlite(options) => outbox::migrate(options, &self.tables).await,
            DatabaseKind::Postgres(config) => outbox::migrate_postgres(config, &self.tables).await,
        }
    }

    /// The tables as SQL.
    pub(crate) fn print_migrations(&self) -> String {
        match &self.kind {
            DatabaseKind::Sqlite(_) => outbox::print_migrations(&self.tables),
            DatabaseKind::Postgres(_) => outbox::print_postgres_migrations(&self.tables),
        }
    }

    /// The outbox in a SQLite file.
    pub(crate) fn sqlite_outbox(&self, pool: SqlitePool) -> Outbox {
        Outbox::sqlite(pool, self.outbox_config())
    }

    pub(crate) fn outbox_config(&self) -> OutboxConfig {
        OutboxConfig { tables: self.tables.clone(), ..OutboxConfig::default() }
    }
}
