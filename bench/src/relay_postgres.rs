//! The relay on PostgreSQL: R1 as on SQLite, and R10 (throughput while another session holds a write transaction open).

use crate::{
    pairs::{Measured, Pairs},
    relay_memory::{DATA_BYTES, select},
    road::{Road, connect, size, url},
};

pub(crate) async fn throughput(quick: bool) -> anyhow::Result<Measured> {
    let (events, rounds) = size(quick);
    let road = Road::filled(events).await?;
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

pub(crate) async fn beside_an_open_transaction(quick: bool) -> anyhow::Result<Measured> {
    let (events, rounds) = size(quick);
    let road = Road::filled(events).await?;
    let mut other = connect(&url()?).await?;
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
