//! The relay on PostgreSQL: R1 as on SQLite, R7 (write-ahead log of the relay per event) and R10 (throughput while another
//! session holds a write transaction open).

use outbox::{LogAdmin, Outbox, OutboxConfig, PostgresConfig, PostgresLog, Tables};
use tokio_postgres::{Client, NoTls};

use crate::{
    pairs::{Measured, Pairs},
    relay_memory::{DATA_BYTES, SINK, batches, relay, select},
};

/// A schema with so many events, on the server of `OUTBUS_TEST_POSTGRES_URL`.
struct Road {
    outbox: Outbox,
    admin: PostgresLog,
    client: Client,
    schema: String,
    events: usize,
}

impl Road {
    async fn open(events: usize) -> anyhow::Result<Self> {
        let url = std::env::var("OUTBUS_TEST_POSTGRES_URL")?;
        let schema = format!("bench_{}", std::process::id());
        let tables = Tables::new(&schema, outbox::EVENT_BYTES_MAX)?;
        let config = PostgresConfig::from_url(&url)?;
        let outbox =
            Outbox::postgres(config.clone(), OutboxConfig { tables: tables.clone(), ..OutboxConfig::default() });
        outbox.migrate().await?;
        let mut client = connect(&url).await?;
        for batch in batches(events) {
            let mut transaction = client.transaction().await?;
            outbox.append(&mut transaction, batch).await?;
            transaction.commit().await?;
        }
        client.batch_execute(&format!("VACUUM ANALYZE {schema}.outbox")).await?;
        client.batch_execute("CHECKPOINT").await?;
        let admin = PostgresLog::open_admin(&config, tables).await?;
        Ok(Self { outbox, admin, client, schema, events })
    }

    /// Events a second through the relay. Its successor begins with the oldest event again.
    async fn drain(&self) -> anyhow::Result<f64> {
        let rate = relay(&self.outbox, self.events).await?;
        self.admin.remove_sink(SINK).await?;
        Ok(rate)
    }

    /// Bytes of write-ahead log that the server has written so far.
    async fn written(&self) -> anyhow::Result<f64> {
        let sql = "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::float8";
        Ok(self.client.query_one(sql, &[]).await?.get(0))
    }

    async fn close(self) -> anyhow::Result<()> {
        Ok(self.client.batch_execute(&format!("DROP SCHEMA {} CASCADE", self.schema)).await?)
    }
}

async fn connect(url: &str) -> anyhow::Result<Client> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

fn size(quick: bool) -> (usize, usize) {
    if quick { (20_000, 3) } else { (300_000, 9) }
}

pub(crate) async fn throughput(quick: bool) -> anyhow::Result<Measured> {
    let (events, rounds) = size(quick);
    let road = Road::open(events).await?;
    let twin_log = road.outbox.log("twin").await?;
    let mut pairs = Pairs::default();
    for round in 0..=rounds {
        let (ours, twin) = (road.drain().await?, select(&*twin_log, events).await?);
        // The first round warms the server's cache for both.
        if round > 0 {
            pairs.push(ours, twin);
        }
    }
    road.close().await?;
    let what = format!(
        "PostgreSQL: relay of {events} events of {DATA_BYTES} B into the in-memory bus / paged SELECT, {rounds} pairs"
    );
    Ok(pairs.at_least("R1-postgres", what, "events/s", 0.75))
}

pub(crate) async fn written(quick: bool) -> anyhow::Result<Measured> {
    let (events, rounds) = size(quick);
    let road = Road::open(events).await?;
    let mut pairs = Pairs::default();
    for _ in 0..rounds {
        let before = road.written().await?;
        relay(&road.outbox, events).await?;
        pairs.push((road.written().await? - before) / events as f64, 1.0);
        road.admin.remove_sink(SINK).await?;
    }
    road.close().await?;
    let what = format!("PostgreSQL: bytes of write-ahead log per event, {events} events relayed, {rounds} rounds");
    Ok(pairs.at_most("R7", what, "bytes", 1.0))
}

pub(crate) async fn beside_an_open_transaction(quick: bool) -> anyhow::Result<Measured> {
    let (events, rounds) = size(quick);
    let road = Road::open(events).await?;
    let mut other = connect(&std::env::var("OUTBUS_TEST_POSTGRES_URL")?).await?;
    let mut pairs = Pairs::default();
    for round in 0..=rounds {
        let without = road.drain().await?;
        let open = other.transaction().await?;
        // It writes, to another table and to this log.
        open.batch_execute(&format!(
            "CREATE TABLE {0}.other (); INSERT INTO {0}.outbox (topic, type, data) VALUES ('orders', 'order.placed', '1')",
            road.schema
        ))
        .await?;
        let beside = road.drain().await?;
        open.rollback().await?;
        if round > 0 {
            pairs.push(beside, without);
        }
    }
    road.close().await?;
    let what =
        format!("PostgreSQL: relay of {events} events beside an open write transaction / without, {rounds} pairs");
    Ok(pairs.at_least("R10", what, "events/s", 0.95))
}
