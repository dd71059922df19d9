//! A PostgreSQL schema of its own for each test, on the server of `OUTBUS_TEST_POSTGRES_URL`.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::{
    env,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bus_core::Event;
use outbox::{LogSource, Outbox, OutboxConfig, PostgresConfig, PostgresLog, Tables};
use tokio_postgres::{Client, NoTls};

/// Why the tests that use it are ignored where no server is named.
#[derive(Debug)]
pub(crate) struct Database {
    pub(crate) outbox: Outbox,
    pub(crate) config: PostgresConfig,
    pub(crate) url: String,
    pub(crate) schema: String,
}

impl Database {
    pub(crate) async fn create() -> Self {
        Self::create_at(&server()).await
    }

    /// Tables on the server of `url`.
    pub(crate) async fn create_at(url: &str) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let schema = format!("test_{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let database = Self::of(url, &schema);
        database.outbox.migrate().await.expect("the tables are made");
        database
    }

    /// The same tables, reached by another URL.
    pub(crate) fn at(&self, url: &str) -> Self {
        Self::of(url, &self.schema)
    }

    fn of(url: &str, schema: &str) -> Self {
        let config = PostgresConfig::from_url(url).expect("a URL");
        let tables = Tables::new(schema, outbox::EVENT_BYTES_MAX).expect("a name");
        let outbox = Outbox::postgres(config.clone(), OutboxConfig { tables, ..OutboxConfig::default() });
        Self { outbox, config, url: url.to_owned(), schema: schema.to_owned() }
    }

    pub(crate) async fn client(&self) -> Client {
        Self::client_at(&self.url).await
    }

    pub(crate) async fn client_at(url: &str) -> Client {
        let (client, connection) = tokio_postgres::connect(url, NoTls).await.expect("a connection");
        tokio::spawn(connection);
        client
    }

    /// Runs statements in which `{p}` stands for the schema.
    pub(crate) async fn run(&self, sql: &str) {
        self.client().await.batch_execute(&self.sql(sql)).await.expect("a statement");
    }

    pub(crate) fn sql(&self, sql: &str) -> String {
        sql.replace("{p}", &format!("{}.", self.schema))
    }

    pub(crate) async fn append(&self, events: impl IntoIterator<Item = Event>) {
        let mut client = self.client().await;
        let mut transaction = client.transaction().await.expect("a transaction");
        self.outbox.append(&mut transaction, events).await.expect("the events are appended");
        transaction.commit().await.expect("it commits");
        self.outbox.wake();
    }

    pub(crate) async fn log(&self, sink: &str) -> Arc<dyn LogSource> {
        self.outbox.log(sink).await.expect("the log opens")
    }

    pub(crate) async fn admin(&self) -> PostgresLog {
        PostgresLog::open_admin(&self.config, self.outbox.tables().clone()).await.expect("the log opens")
    }

    /// Ids of what was committed, in the order of places.
    pub(crate) async fn committed(&self) -> Vec<String> {
        let rows = self.client().await.query(&self.sql("SELECT id FROM {p}outbox ORDER BY seq"), &[]).await;
        rows.expect("a list").iter().map(|row| row.get(0)).collect()
    }
}

/// The server the tests run against.
pub(crate) fn server() -> String {
    env::var("OUTBUS_TEST_POSTGRES_URL").expect("OUTBUS_TEST_POSTGRES_URL names a server: cargo xtask test")
}
