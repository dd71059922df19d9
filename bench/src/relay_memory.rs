//! R1: the relay into the in-memory bus without groups, against a plain paged SELECT with the same client into the same
//! `Event`.

use std::{
    sync::{Arc, LazyLock},
    time::Instant,
};

use bus_core::{Event, EventBuilder, EventBus, InMemoryBus, Seq};
use outbox::{LogAdmin, LogSource, Outbox, OutboxConfig, PageLimit, Relay, RelayConfig, SqliteLog};
use sqlx::{SqlitePool, sqlite::SqliteConnectOptions};

use crate::pairs::{Measured, Pairs};

const TARGET: f64 = 0.75;
/// Bytes of an event's data, and keys they are spread over.
pub(crate) const DATA_BYTES: usize = 100;
const KEYS: usize = 10_000;
pub(crate) const SINK: &str = "main";
/// Rows of one page of the twin.
const PAGE: PageLimit = PageLimit { events: 5_000, bytes: 64 << 20 };

pub(crate) async fn run(quick: bool) -> anyhow::Result<Measured> {
    let (events, rounds) = if quick { (20_000, 3) } else { (300_000, 9) };
    let dir = tempfile::tempdir()?;
    let options = SqliteConnectOptions::new().filename(dir.path().join("bench.db")).create_if_missing(true);
    let pool = SqlitePool::connect_with(options).await?;
    let outbox = Outbox::sqlite(pool.clone(), OutboxConfig::default());
    outbox.migrate().await?;
    fill(&outbox, &pool, events).await?;
    let twin_log = outbox.log("twin").await?;
    let admin = SqliteLog::open_admin(&pool.connect_options(), outbox.tables().clone()).await?;
    let mut pairs = Pairs::default();
    for round in 0..=rounds {
        let ours = relay(&outbox, events).await?;
        // Its successor begins with the oldest event again.
        admin.remove_sink(SINK).await?;
        let twin = select(&*twin_log, events).await?;
        // The first round warms the page cache for both.
        if round > 0 {
            pairs.push(ours, twin);
        }
    }
    let what = format!(
        "SQLite: relay of {events} events of {DATA_BYTES} B into the in-memory bus / paged SELECT, {rounds} pairs"
    );
    Ok(pairs.at_least("R1", what, "events/s", TARGET))
}

async fn fill(outbox: &Outbox, pool: &SqlitePool, events: usize) -> anyhow::Result<()> {
    for batch in batches(events) {
        let mut transaction = pool.begin_with("BEGIN IMMEDIATE").await?;
        outbox.append(&mut transaction, batch).await?;
        transaction.commit().await?;
    }
    Ok(())
}

/// So many events, ten thousand at a time.
pub(crate) fn batches(events: usize) -> impl Iterator<Item = impl Iterator<Item = EventBuilder>> {
    (0..events).step_by(10_000).map(move |first| (first..events.min(first + 10_000)).map(event))
}

/// An event with [`DATA_BYTES`] of data.
pub(crate) fn event(n: usize) -> EventBuilder {
    static DATA: LazyLock<String> = LazyLock::new(|| format!("{{\"filler\":\"{}\"}}", "x".repeat(DATA_BYTES - 13)));
    Event::builder("orders", "order.placed").key(format!("order-{}", n % KEYS)).data(DATA.clone())
}

/// Events a second through the relay into the in-memory bus, from its start to its last checkpoint.
pub(crate) async fn relay(outbox: &Outbox, events: usize) -> anyhow::Result<f64> {
    relay_into(outbox.log(SINK).await?, Arc::new(InMemoryBus::new()), events).await
}

/// Events a second through the relay into this bus.
pub(crate) async fn relay_into(log: Arc<dyn LogSource>, bus: Arc<dyn EventBus>, events: usize) -> anyhow::Result<f64> {
    let mut relay = Relay::new(log, bus, config())?;
    let started = Instant::now();
    let summary = relay.run_once(std::future::pending()).await?;
    anyhow::ensure!(summary.counts.published == events as u64, "{summary:?}");
    Ok(events as f64 / started.elapsed().as_secs_f64())
}

/// The defaults, without a janitor.
pub(crate) fn config() -> RelayConfig {
    RelayConfig { allow_volatile: true, retention: None, ..RelayConfig::default() }
}

/// Events a second of the same SELECT into the same `Event`, page by page.
pub(crate) async fn select(log: &dyn LogSource, events: usize) -> anyhow::Result<f64> {
    let (mut after, mut read, started) = (Seq::ZERO, 0, Instant::now());
    loop {
        let page = log.fetch(after, PAGE).await?;
        let Some(last) = page.rows.last() else { break };
        after = last.seq;
        read += page.rows.iter().filter(|row| row.event.is_ok()).count();
    }
    anyhow::ensure!(read == events, "{read} of {events} read");
    Ok(events as f64 / started.elapsed().as_secs_f64())
}
