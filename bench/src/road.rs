//! [`Road`]: an outbox of its own on the server of `OUTBUS_TEST_POSTGRES_URL`, for one target.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::Context;
use outbox::{Acquire, LogAdmin, LogSource, Outbox, OutboxConfig, PostgresConfig, PostgresLog, Start, Tables};
use tokio_postgres::{Client, NoTls};

use crate::{
    process::Backends,
    relay_memory::{SINK, batches, relay},
};

/// A schema with the outbox's tables, removed by [`close`](Road::close).
pub(crate) struct Road {
    pub(crate) outbox: Outbox,
    pub(crate) client: Client,
    pub(crate) schema: String,
    admin: PostgresLog,
    events: usize,
}

impl Road {
    /// Without events.
    pub(crate) async fn open() -> anyhow::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let schema = format!("bench_{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let outbox = outbox_of(&schema, &schema)?;
        outbox.migrate().await?;
        let admin = PostgresLog::open_admin(&config(&schema)?, outbox.tables().clone()).await?;
        Ok(Self { outbox, admin, client: connect(&url()?).await?, schema, events: 0 })
    }

    /// With so many events, as they are once autovacuum has passed and a checkpoint.
    pub(crate) async fn filled(events: usize) -> anyhow::Result<Self> {
        let mut road = Self::open().await?;
        road.fill(events).await?;
        road.client.batch_execute(&format!("VACUUM ANALYZE {}.outbox", road.schema)).await?;
        road.checkpoint().await?;
        Ok(road)
    }

    pub(crate) async fn fill(&mut self, events: usize) -> anyhow::Result<()> {
        for batch in batches(events) {
            let mut transaction = self.client.transaction().await?;
            self.outbox.append(&mut transaction, batch).await?;
            transaction.commit().await?;
        }
        self.events += events;
        Ok(())
    }

    /// The same outbox, with connections that are called `name` on the server.
    pub(crate) fn named(&self, name: &str) -> anyhow::Result<Outbox> {
        outbox_of(&self.schema, name)
    }

    /// Events a second through the relay. Its successor begins with the oldest event again.
    pub(crate) async fn drain(&self) -> anyhow::Result<f64> {
        let rate = relay(&self.outbox, self.events).await?;
        self.forget().await?;
        Ok(rate)
    }

    /// Removes the sink, so that the next relay begins with the oldest event again.
    pub(crate) async fn forget(&self) -> anyhow::Result<()> {
        Ok(self.admin.remove_sink(SINK).await?)
    }

    pub(crate) async fn checkpoint(&self) -> anyhow::Result<()> {
        Ok(self.client.batch_execute("CHECKPOINT").await?)
    }

    /// A number that the server answers.
    pub(crate) async fn number(&self, sql: &str) -> anyhow::Result<f64> {
        Ok(self.client.query_one(&format!("SELECT ({sql})::float8"), &[]).await.context(sql.to_owned())?.get(0))
    }

    /// The server's processes that serve connections of this name, with the time they took.
    pub(crate) async fn backends(&self, name: &str) -> anyhow::Result<Backends> {
        let sql = "SELECT pid FROM pg_stat_activity WHERE application_name = $1";
        let rows = self.client.query(sql, &[&name]).await?;
        Backends::of(rows.iter().map(|row| row.get::<_, i32>(0)))
    }

    pub(crate) async fn close(self) -> anyhow::Result<()> {
        Ok(self.client.batch_execute(&format!("DROP SCHEMA {} CASCADE", self.schema)).await?)
    }
}

/// Opens what a relay opens: every connection of the log, and the sink.
pub(crate) async fn warm(log: &dyn LogSource) -> anyhow::Result<()> {
    let request = Acquire {
        owner: "bench".to_owned(),
        ttl: Duration::from_secs(5),
        epoch_min: 0,
        start: Start::Earliest,
        topics: crate::relay_memory::config().topics,
        bus: String::new(),
        new_incarnation: false,
    };
    match log.acquire(&request).await? {
        outbox::Acquisition::Owned(owned) => log.release(&owned.lease).await?,
        outbox::Acquisition::Standby { owner, .. } => anyhow::bail!("{owner} owns the log"),
    }
    let _quiet = tokio::time::timeout(Duration::from_millis(100), log.changed()).await;
    Ok(())
}

/// The outbox of this schema, with connections that are called `name` on the server.
pub(crate) fn outbox_of(schema: &str, name: &str) -> anyhow::Result<Outbox> {
    let tables = Tables::new(schema, outbox::EVENT_BYTES_MAX)?;
    Ok(Outbox::postgres(config(name)?, OutboxConfig { tables, ..OutboxConfig::default() }))
}

fn config(name: &str) -> anyhow::Result<PostgresConfig> {
    let url = url()?;
    let joint = if url.contains('?') { '&' } else { '?' };
    Ok(PostgresConfig::from_url(&format!("{url}{joint}application_name={name}"))?)
}

pub(crate) fn url() -> anyhow::Result<String> {
    std::env::var("OUTBUS_TEST_POSTGRES_URL")
        .context("OUTBUS_TEST_POSTGRES_URL names no server: use `cargo xtask bench`")
}

pub(crate) async fn connect(url: &str) -> anyhow::Result<Client> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// Events and rounds where nothing speaks for others.
pub(crate) fn size(quick: bool) -> (usize, usize) {
    if quick { (20_000, 3) } else { (300_000, 9) }
}
