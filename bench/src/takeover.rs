//! R14: how long events wait when their relay dies or is stopped and another process takes over.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crate::{
    child::ChildRelay,
    pairs::{Measured, Pairs},
    relay_memory::{config, event},
    road::{Road, connect, url},
};

/// Seconds from the end of the lease, and from an orderly stop.
const KILL_MAX: f64 = 0.5;
const TERM_MAX: f64 = 0.2;
/// Between two events of the service that goes on appending.
const PACE: Duration = Duration::from_millis(5);

pub(crate) async fn after_kill(quick: bool) -> anyhow::Result<Measured> {
    let rounds = if quick { 1 } else { 5 };
    let lease = config().lease;
    let figures = takeovers(rounds, "-KILL").await?;
    let what = format!(
        "PostgreSQL: from kill -9 of the owner to its successor's first event, a lease of {lease:?}, {rounds} rounds"
    );
    Ok(Pairs::limit(lease.as_secs_f64() + KILL_MAX, figures).at_most("R14-kill", what, "s", 1.0))
}

pub(crate) async fn after_term(quick: bool) -> anyhow::Result<Measured> {
    let rounds = if quick { 5 } else { 25 };
    let figures = takeovers(rounds, "-TERM").await?;
    let what = format!("PostgreSQL: from SIGTERM of the owner to its successor's first event, {rounds} rounds");
    Ok(Pairs::limit(TERM_MAX, figures).at_most("R14-term", what, "s", 1.0))
}

/// Seconds each, while a service appends.
async fn takeovers(rounds: u32, signal: &str) -> anyhow::Result<Vec<f64>> {
    let road = Road::open().await?;
    let stop = Arc::new(AtomicBool::new(false));
    let service = tokio::spawn(append(road.named("bench_service")?, Arc::clone(&stop)));
    let mut owner = ChildRelay::start(&road.schema, "bench_relay", false)?;
    owner.until("published").await?;
    let mut figures = Vec::new();
    for _ in 0..rounds {
        let mut standby = ChildRelay::start(&road.schema, "bench_relay", false)?;
        standby.until("standby").await?;
        // Anywhere between two of its looks at the lease.
        tokio::time::sleep(Duration::from_millis(fastrand::u64(500..1_500))).await;
        let signalled = owner.signal(signal)?;
        let (published, _) = standby.until("published").await?;
        figures.push((published - signalled).as_secs_f64());
        owner = standby;
    }
    drop(owner);
    stop.store(true, Ordering::Relaxed);
    service.await??;
    road.close().await?;
    Ok(figures)
}

async fn append(outbox: outbox::Outbox, stop: Arc<AtomicBool>) -> anyhow::Result<()> {
    let mut client = connect(&url()?).await?;
    for n in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let mut transaction = client.transaction().await?;
        outbox.append(&mut transaction, [event(n)]).await?;
        transaction.commit().await?;
        outbox.wake();
        tokio::time::sleep(PACE).await;
    }
    Ok(())
}
