//! From a database URL to a log.

use outbox::{SqliteLog, Tables, sqlite_options};
use sqlx::sqlite::SqliteConnectOptions;

use crate::failure::Failure;

/// A database that can hold an outbox.
#[derive(Clone, Debug)]
pub(crate) struct Database {
    pub(crate) options: SqliteConnectOptions,
    pub(crate) tables: Tables,
}

impl Database {
    /// Reads the URL; connects to nothing.
    pub(crate) fn from_url(url: &str) -> Result<Self, Failure> {
        match url.split_once(':') {
            Some(("sqlite", _)) => Ok(Self { options: sqlite_options(url)?, tables: Tables::default() }),
            Some(("postgres" | "postgresql", _)) => Err(Failure::usage(
                "database_url",
                "this build has no PostgreSQL yet: use sqlite:relative.db or sqlite:///absolute.db",
            )),
            _ => Err(Failure::usage(
                "database_url",
                "a database URL is written sqlite:relative.db or sqlite:///absolute.db",
            )),
        }
    }

    /// The log as an operator sees it.
    pub(crate) async fn admin(&self) -> Result<SqliteLog, Failure> {
        Ok(SqliteLog::open_admin(&self.options, self.tables.clone()).await?)
    }
}
