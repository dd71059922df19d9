//! An order service and a consumer in one process: the example of the project's front page.

#![allow(clippy::print_stdout, reason = "an example")]

use std::sync::Arc;

use bus_core::{Consumer, Event, EventBus, EventType, InMemoryBus};
use outbox::{Outbox, OutboxConfig, Relay, RelayConfig};
use sqlx::sqlite::{SqliteConnectOptions, SqlitePool};

#[derive(serde::Serialize, serde::Deserialize)]
struct OrderPlaced {
    total: u32,
}

impl EventType for OrderPlaced {
    const TYPE: &'static str = "order.placed";
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    let options = SqliteConnectOptions::new().filename(dir.path().join("shop.db")).create_if_missing(true);
    let pool = SqlitePool::connect_with(options).await?;
    let outbox = Outbox::sqlite(pool.clone(), OutboxConfig::default());
    outbox.migrate().await?;

    // The order and its event are committed together, or not at all.
    let mut tx = pool.begin_with("BEGIN IMMEDIATE").await?;
    sqlx::query("CREATE TABLE orders (id INTEGER, total INTEGER)").execute(&mut *tx).await?;
    sqlx::query("INSERT INTO orders VALUES (7, 5)").execute(&mut *tx).await?;
    outbox.append(&mut tx, [Event::of("orders", &OrderPlaced { total: 5 })?.key(7)]).await?;
    tx.commit().await?;

    // The relay publishes what is committed; any bus will do.
    let bus: Arc<dyn EventBus> = Arc::new(InMemoryBus::new());
    let config = RelayConfig { allow_volatile: true, ..RelayConfig::default() };
    Relay::new(outbox.log("main").await?, Arc::clone(&bus), config)?.run_once(std::future::pending()).await?;

    // A consumer handles each key in order; its errors are retried, then dead-lettered.
    let (done, mut handled) = tokio::sync::mpsc::channel(1);
    let consumer = Consumer::new(bus, "orders", "billing").on::<OrderPlaced, _, _>(move |placed, _context| {
        let done = done.clone();
        async move { Ok(done.send(placed.total).await?) }
    });
    consumer.run(async move { println!("billed {}", handled.recv().await.unwrap_or_default()) }).await?;
    Ok(())
}
