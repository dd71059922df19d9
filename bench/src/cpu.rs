//! R8 and R13: what a relay costs the database's processor while it drains, and itself while there is nothing to do.

use std::{sync::Arc, time::Duration};

use crate::{
    child::ChildRelay,
    noting::NotingBus,
    pairs::{Measured, Pairs, median, sorted},
    process::{cpu, percent},
    relay_memory::{SINK, relay_into, select},
    road::{Road, size, warm},
};

/// Microseconds of the database's processor per event.
const DATABASE_MAX: f64 = 0.6;
/// Percent of one processor.
const IDLE_MAX: f64 = 1.0;

/// The relay's connections are there before; so what is measured is the draining.
pub(crate) async fn of_the_database(quick: bool) -> anyhow::Result<Measured> {
    let (events, rounds) = size(quick);
    let road = Road::filled(events).await?;
    let (mut figures, mut plain) = (Vec::new(), Vec::new());
    for round in 0..=rounds {
        // Other names each time: a connection that was closed may still end.
        let (name, twin) = (format!("{}_{round}", road.schema), format!("{}_{round}_twin", road.schema));
        let (log, twin_log) = (road.named(&name)?.log(SINK).await?, road.named(&twin)?.log("twin").await?);
        warm(&*log).await?;
        let before = road.backends(&name).await?;
        relay_into(Arc::clone(&log), NotingBus::silent(), events).await?;
        let taken = road.backends(&name).await?.since(&before);
        road.forget().await?;
        let before = road.backends(&twin).await?;
        select(&*twin_log, events).await?;
        let plain_taken = road.backends(&twin).await?.since(&before);
        if round > 0 {
            figures.push(taken.as_secs_f64() * 1e6 / events as f64);
            plain.push(plain_taken.as_secs_f64() * 1e6 / events as f64);
        }
    }
    road.close().await?;
    let plain = median(&sorted(plain.into_iter()));
    let what = format!(
        "PostgreSQL: time of the relay's backends per event, {events} events drained, {rounds} rounds; a paged SELECT of \
         the same columns alone takes {plain:.2} us"
    );
    Ok(Pairs::limit(DATABASE_MAX, figures).at_most("R8", what, "us", 1.0))
}

/// A relay in a process of its own, with a log to which nobody appends.
pub(crate) async fn of_an_idle_relay(quick: bool) -> anyhow::Result<Measured> {
    let (span, rounds) = if quick { (Duration::from_secs(2), 2) } else { (Duration::from_secs(10), 5) };
    let road = Road::filled(1_000).await?;
    let name = format!("{}_idle", road.schema);
    let mut relay = ChildRelay::start(&road.schema, &name, false)?;
    relay.until("published").await?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (mut figures, mut backends) = (Vec::new(), 0.0);
    for _ in 0..rounds {
        let (before, of_server) = (cpu(relay.pid())?, road.backends(&name).await?);
        tokio::time::sleep(span).await;
        figures.push(percent(cpu(relay.pid())? - before, span));
        backends += road.backends(&name).await?.percent_since(&of_server) / f64::from(rounds);
    }
    drop(relay);
    road.close().await?;
    let what = format!(
        "PostgreSQL: an idle relay's process over {span:?}, {rounds} rounds; its backends take {backends:.2} %"
    );
    Ok(Pairs::limit(IDLE_MAX, figures).at_most("R13-cpu", what, "% of a core", 1.0))
}
