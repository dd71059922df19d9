//! SQLite keeps the contract of a log.

use std::sync::Arc;

use async_trait::async_trait;
use bus_core::{Event, Seq};
use outbox::{LogAdmin, LogSource, Outbox, OutboxConfig, SqliteLog, conformance::LogDatabase};
use sqlx::{SqlitePool, sqlite::SqliteConnectOptions};
use tempfile::TempDir;

outbox::log_conformance_tests!(SqliteDatabase::create().await);

#[derive(Debug)]
struct SqliteDatabase {
    _dir: TempDir,
    pool: SqlitePool,
    outbox: Outbox,
}

impl SqliteDatabase {
    async fn create() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let options = SqliteConnectOptions::new().filename(dir.path().join("shop.db")).create_if_missing(true);
        let pool = SqlitePool::connect_with(options).await.expect("a database");
        let outbox = Outbox::sqlite(pool.clone(), OutboxConfig::default());
        outbox.migrate().await.expect("the tables are made");
        Self { _dir: dir, pool, outbox }
    }

    async fn execute(&self, sql: &'static str, seq: Seq) {
        sqlx::query(sql).bind(seq.0 as i64).execute(&self.pool).await.expect("the statement runs");
    }
}

#[async_trait]
impl LogDatabase for SqliteDatabase {
    async fn log(&self, sink: &str) -> Arc<dyn LogSource> {
        self.outbox.log(sink).await.expect("the log opens")
    }

    async fn admin(&self) -> Arc<dyn LogAdmin> {
        let tables = self.outbox.tables().clone();
        Arc::new(SqliteLog::open_admin(&self.pool.connect_options(), tables).await.expect("the log opens"))
    }

    async fn append(&self, events: Vec<Event>) {
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await.expect("a transaction");
        self.outbox.append(&mut transaction, events).await.expect("the events are appended");
        transaction.commit().await.expect("it commits");
    }

    async fn append_and_roll_back(&self, events: Vec<Event>) {
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await.expect("a transaction");
        self.outbox.append(&mut transaction, events).await.expect("the events are appended");
        transaction.rollback().await.expect("it rolls back");
    }

    async fn insert_invalid(&self, topic: &str, key: &str) {
        let insert = sqlx::query("INSERT INTO outbus_outbox (topic, key, type, data) VALUES (?, ?, '', '{}')");
        insert.bind(topic).bind(key).execute(&self.pool).await.expect("plain SQL inserts anything");
    }

    async fn replace_event(&self, seq: Seq) {
        self.execute("UPDATE outbus_outbox SET id = 'another' WHERE seq = ?", seq).await;
    }

    async fn delete_row(&self, seq: Seq) {
        self.execute("DELETE FROM outbus_outbox WHERE seq = ?", seq).await;
    }
}
