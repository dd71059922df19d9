//! R11: a relay far behind is as fast, and as small, as one that is nearly there; and removed events leave nothing behind.

use std::{sync::Arc, time::Duration};

use crate::{
    child::ChildRelay,
    noting::{Arrivals, NotingBus},
    pairs::{Measured, Pairs, median, sorted},
    relay_memory::{SINK, relay_into},
    road::Road,
};

const SMALL: usize = 10_000;
/// Drains of the small backlog beside one of the large.
const SMALL_DRAINS: usize = 20;
/// Rows a janitor removes in one transaction, as the relay's does.
const PRUNE_ROWS_MAX: usize = 5_000;

fn large(quick: bool) -> usize {
    if quick { 100_000 } else { 1_000_000 }
}

pub(crate) async fn rate(quick: bool) -> anyhow::Result<Measured> {
    let (events, rounds) = (large(quick), if quick { 3 } else { 7 });
    let (far, near) = (Road::filled(events).await?, Road::filled(SMALL).await?);
    let mut pairs = Pairs::default();
    for round in 0..=rounds {
        let ours = steady(&far, events).await?;
        let mut rates = Vec::new();
        for _ in 0..SMALL_DRAINS {
            rates.push(steady(&near, SMALL).await?);
        }
        if round > 0 {
            pairs.push(ours, median(&sorted(rates.into_iter())));
        }
    }
    near.close().await?;
    far.close().await?;
    let what = format!(
        "PostgreSQL: drain of a backlog of {events} events / of {SMALL}, from the first batch on, {rounds} pairs"
    );
    Ok(pairs.at_least("R11", what, "events/s", 0.95))
}

async fn steady(road: &Road, events: usize) -> anyhow::Result<f64> {
    let arrivals = Arrivals::default();
    relay_into(road.outbox.log(SINK).await?, arrivals.bus(), events).await?;
    road.forget().await?;
    arrivals.rate()
}

/// All are relayed, and then removed as the relay's janitor does.
pub(crate) async fn dead_rows(quick: bool) -> anyhow::Result<Measured> {
    let events = large(quick);
    let road = Road::filled(events).await?;
    road.client.batch_execute(&format!("CREATE EXTENSION pgstattuple SCHEMA {}", road.schema)).await?;
    let table = format!("{}.outbox", road.schema);
    let size = format!("pg_total_relation_size('{table}') / 1048576.0");
    let count = format!("SELECT dead_tuple_count FROM {}.pgstattuple('{table}')", road.schema);
    let log = road.outbox.log(SINK).await?;
    relay_into(Arc::clone(&log), NotingBus::silent(), events).await?;
    let before = road.number(&size).await?;
    let started = std::time::Instant::now();
    while log.prune("bench", Duration::ZERO, PRUNE_ROWS_MAX).await?.more {}
    let seconds = started.elapsed().as_secs_f64();
    let (after, dead) = (road.number(&size).await?, road.number(&count).await?);
    drop(log);
    road.close().await?;
    let what = format!(
        "PostgreSQL: dead rows after {events} events and the janitor's pass of {seconds:.1} s; the table has {before:.0} \
         MiB before and {after:.0} MiB after, free for the next events"
    );
    Ok(Pairs::limit(1.0, [dead]).at_most("R11-dead", what, "rows", 0.0))
}

/// The most memory a relay's process ever had.
pub(crate) async fn memory(quick: bool) -> anyhow::Result<Measured> {
    let (events, rounds) = (large(quick), if quick { 2 } else { 5 });
    let (far, near) = (Road::filled(events).await?, Road::filled(SMALL).await?);
    let mut pairs = Pairs::default();
    for _ in 0..rounds {
        pairs.push(peak(&far).await?, peak(&near).await?);
    }
    near.close().await?;
    far.close().await?;
    let what =
        format!("PostgreSQL: peak memory of a relay's process that drains {events} events / {SMALL}, {rounds} pairs");
    Ok(pairs.at_most("R11-memory", what, "MiB", 1.25))
}

/// In MiB.
async fn peak(road: &Road) -> anyhow::Result<f64> {
    let mut relay = ChildRelay::start(&road.schema, &road.schema, true)?;
    let (_, kib) = relay.until("peak").await?;
    road.forget().await?;
    Ok(kib.parse::<f64>()? / 1024.0)
}
