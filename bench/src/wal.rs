//! R6 and R7: the write-ahead log that an event costs when it is appended, relayed and removed.

use std::{sync::Arc, time::Duration};

use outbox::Outbox;
use tokio_postgres::Client;

use crate::{
    noting::NotingBus,
    pairs::{Measured, Pairs},
    relay_memory::{SINK, batches, event, relay, relay_into},
    road::{Road, connect, size, url},
};

/// What an append may write beyond what the event says, a relay per event, and a janitor.
const APPEND_MAX: f64 = 170.0;
const RELAY_MAX: f64 = 1.0;
const JANITOR_MAX: f64 = 350.0;
/// Rows a janitor removes in one transaction, as the relay's does.
const PRUNE_ROWS_MAX: usize = 5_000;

const BUSINESS: &str =
    "CREATE TABLE {p}.item (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, version bigint NOT NULL)";
/// Bytes that an event says, its time apart; and those beside its data, key and topic.
const PAYLOAD: &str = "SELECT avg(octet_length(data) + octet_length(key) + octet_length(topic) + octet_length(id) \
     + octet_length(type) + octet_length(source) + octet_length(content_type)) FROM {p}.outbox";
const TEXTS: &str = "SELECT avg(octet_length(id) + octet_length(type) + octet_length(source) \
     + octet_length(content_type)) FROM {p}.outbox";
const POSITION: &str = "SELECT pg_current_wal_insert_lsn() - '0/0'";
const IMAGES: &str =
    "SELECT coalesce(sum(fpi_size), 0) FROM pg_get_wal_stats('0/0'::pg_lsn + {from}, '0/0'::pg_lsn + {to})";

/// Bytes of write-ahead log: records, and the whole pages among them, which are as many as checkpoints make them.
struct Written {
    records: f64,
    images: f64,
}

/// What the server writes while `work` runs.
async fn written(road: &Road, work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<Written> {
    let from = road.number(POSITION).await?;
    work.await?;
    let to = road.number(POSITION).await?;
    // What is looked at must be on the disk.
    road.client.batch_execute("SELECT pg_logical_emit_message(true, 'bench', '')").await?;
    let images = IMAGES.replace("{from}", &format!("{from:.0}")).replace("{to}", &format!("{to:.0}"));
    let images = road.number(&images).await?;
    Ok(Written { records: to - from - images, images })
}

/// What appends wrote beyond their payload, round by round.
#[derive(Default)]
struct Beyond {
    figures: Vec<f64>,
    images: f64,
}

impl Beyond {
    async fn push(&mut self, road: &Road, records: f64, images: f64, events: usize) -> anyhow::Result<()> {
        let payload = road.number(&PAYLOAD.replace("{p}", &road.schema)).await?;
        self.figures.push(records / events as f64 - payload);
        self.images += images / events as f64;
        Ok(())
    }

    async fn measured(self, road: Road, id: &'static str, what: &str) -> anyhow::Result<Measured> {
        let texts = road.number(&TEXTS.replace("{p}", &road.schema)).await?;
        road.close().await?;
        let rounds = self.figures.len();
        let images = self.images / rounds as f64;
        let what = format!(
            "PostgreSQL: write-ahead log per event beyond what it says, {what}, {rounds} rounds; beyond data, key and \
             topic alone it is {texts:.0} more; pages written whole add {images:.1}"
        );
        Ok(Pairs::limit(APPEND_MAX, self.figures).at_most(id, what, "bytes", 1.0))
    }
}

/// A road whose log of the server can be looked into.
async fn inspected() -> anyhow::Result<Road> {
    let road = Road::open().await?;
    let sql = format!("CREATE EXTENSION IF NOT EXISTS pg_walinspect; {}", BUSINESS.replace("{p}", &road.schema));
    road.client.batch_execute(&sql).await?;
    Ok(road)
}

/// The same, where pages have been written whole already: those that are written first after a checkpoint.
async fn warmed() -> anyhow::Result<Road> {
    let mut road = inspected().await?;
    road.checkpoint().await?;
    road.fill(1_000).await?;
    Ok(road)
}

/// One event in a transaction of a business, beside the same transaction without it.
pub(crate) async fn of_an_append(quick: bool) -> anyhow::Result<Measured> {
    let (events, rounds) = if quick { (1_000, 3) } else { (5_000, 5) };
    let road = warmed().await?;
    let mut client = connect(&url()?).await?;
    client.batch_execute("SET synchronous_commit = off").await?;
    let insert = format!("INSERT INTO {}.item (version) VALUES (1)", road.schema);
    let mut beyond = Beyond::default();
    for round in 0..=rounds {
        let with = written(&road, transactions(&mut client, &insert, Some(&road.outbox), events)).await?;
        let without = written(&road, transactions(&mut client, &insert, None, events)).await?;
        if round > 0 {
            beyond.push(&road, with.records - without.records, with.images, events).await?;
        }
    }
    beyond.measured(road, "R6", &format!("one event in a transaction, {events} events")).await
}

async fn transactions(client: &mut Client, insert: &str, outbox: Option<&Outbox>, count: usize) -> anyhow::Result<()> {
    let insert = client.prepare(insert).await?;
    for n in 0..count {
        let mut transaction = client.transaction().await?;
        transaction.execute(&insert, &[]).await?;
        if let Some(outbox) = outbox {
            outbox.append(&mut transaction, [event(n)]).await?;
        }
        transaction.commit().await?;
    }
    Ok(())
}

/// Ten thousand events in a transaction.
pub(crate) async fn of_a_batch(quick: bool) -> anyhow::Result<Measured> {
    let (events, rounds) = if quick { (20_000, 3) } else { (100_000, 5) };
    let road = warmed().await?;
    let mut client = connect(&url()?).await?;
    let mut beyond = Beyond::default();
    for _ in 0..rounds {
        let fill = async {
            for batch in batches(events) {
                let mut transaction = client.transaction().await?;
                road.outbox.append(&mut transaction, batch).await?;
                transaction.commit().await?;
            }
            Ok(())
        };
        let all = written(&road, fill).await?;
        beyond.push(&road, all.records, all.images, events).await?;
    }
    beyond.measured(road, "R6-batch", &format!("10,000 events in a transaction, {events} events")).await
}

pub(crate) async fn of_the_relay(quick: bool) -> anyhow::Result<Measured> {
    let (events, rounds) = size(quick);
    let road = Road::filled(events).await?;
    let mut figures = Vec::new();
    for _ in 0..rounds {
        let before = road.number(POSITION).await?;
        relay(&road.outbox, events).await?;
        figures.push((road.number(POSITION).await? - before) / events as f64);
        road.forget().await?;
    }
    road.close().await?;
    let what = format!("PostgreSQL: write-ahead log per event, {events} events relayed, {rounds} rounds");
    Ok(Pairs::limit(RELAY_MAX, figures).at_most("R7", what, "bytes", 1.0))
}

/// Removed long after they were appended: a checkpoint was in between, so each page is written whole once more.
pub(crate) async fn of_the_janitor(quick: bool) -> anyhow::Result<Measured> {
    let (events, rounds) = if quick { (20_000, 3) } else { (100_000, 5) };
    let mut road = inspected().await?;
    let (mut figures, mut images) = (Vec::new(), 0.0);
    for _ in 0..rounds {
        road.fill(events).await?;
        let log = road.outbox.log(SINK).await?;
        relay_into(Arc::clone(&log), NotingBus::silent(), events).await?;
        road.checkpoint().await?;
        let prune = async {
            while log.prune("bench", Duration::ZERO, PRUNE_ROWS_MAX).await?.more {}
            Ok(())
        };
        let all = written(&road, prune).await?;
        figures.push((all.records + all.images) / events as f64);
        images += all.images / (events * rounds) as f64;
    }
    road.close().await?;
    let what = format!(
        "PostgreSQL: write-ahead log per event removed after a checkpoint, vacuum included, {events} events, {rounds} \
         rounds; {images:.1} of it are pages written whole"
    );
    Ok(Pairs::limit(JANITOR_MAX, figures).at_most("R7-janitor", what, "bytes", 1.0))
}
