//! R13: from a commit that has returned to the bus, through a relay that had nothing to do.

use std::time::{Duration, Instant};

use outbox::{Outbox, OutboxConfig, Relay};
use sqlx::{SqlitePool, sqlite::SqliteConnectOptions};
use tokio::{
    sync::{
        mpsc::{UnboundedReceiver, unbounded_channel},
        oneshot,
    },
    task::JoinHandle,
};

use crate::{
    noting::NotingBus,
    pairs::{Measured, Pairs, median, sorted},
    relay_memory::{SINK, config, event},
    road::{Road, connect, url},
};

/// Milliseconds, in the median.
const WAKE_MAX: f64 = 0.5;
/// Between two events the relay falls idle.
const PAUSE: Duration = Duration::from_millis(40);
const DEADLINE: Duration = Duration::from_secs(10);

fn size(quick: bool) -> (usize, usize) {
    if quick { (20, 3) } else { (100, 9) }
}

/// The relay listens to the outbox that appends.
pub(crate) async fn in_the_process(quick: bool) -> anyhow::Result<Measured> {
    let road = Road::open().await?;
    let relay = Awaited::start(&road.outbox).await?;
    let what = "PostgreSQL: an outbox of the relay's process";
    on_postgres(quick, road, relay, "R13-wake-process", what).await
}

/// The relay has an outbox of its own, and hears of the other by a notification.
pub(crate) async fn across_processes(quick: bool) -> anyhow::Result<Measured> {
    let road = Road::open().await?;
    let relay = Awaited::start(&road.named("bench_relay")?).await?;
    let what = "PostgreSQL: an outbox of another process, by a notification";
    on_postgres(quick, road, relay, "R13-wake-postgres", what).await
}

async fn on_postgres(
    quick: bool,
    road: Road,
    mut relay: Awaited,
    id: &'static str,
    what: &str,
) -> anyhow::Result<Measured> {
    let mut client = connect(&url()?).await?;
    let (events, rounds) = size(quick);
    let mut medians = Vec::new();
    for round in 0..=rounds {
        let mut waits = Vec::new();
        for n in 0..events {
            let mut transaction = client.transaction().await?;
            road.outbox.append(&mut transaction, [event(n)]).await?;
            transaction.commit().await?;
            waits.push(relay.wait(&road.outbox).await?);
        }
        // The first round opens the connections that are opened when they are needed.
        if round > 0 {
            medians.push(median(&sorted(waits.into_iter())));
        }
    }
    relay.stop().await?;
    road.close().await?;
    Ok(measured(id, what, events, medians))
}

pub(crate) async fn on_sqlite(quick: bool) -> anyhow::Result<Measured> {
    let dir = tempfile::tempdir()?;
    let options = SqliteConnectOptions::new().filename(dir.path().join("bench.db")).create_if_missing(true);
    let pool = SqlitePool::connect_with(options).await?;
    let outbox = Outbox::sqlite(pool.clone(), OutboxConfig::default());
    outbox.migrate().await?;
    let mut relay = Awaited::start(&outbox).await?;
    let (events, rounds) = size(quick);
    let mut medians = Vec::new();
    for _ in 0..rounds {
        let mut waits = Vec::new();
        for n in 0..events {
            let mut transaction = pool.begin_with("BEGIN IMMEDIATE").await?;
            outbox.append(&mut transaction, [event(n)]).await?;
            transaction.commit().await?;
            waits.push(relay.wait(&outbox).await?);
        }
        medians.push(median(&sorted(waits.into_iter())));
    }
    relay.stop().await?;
    Ok(measured("R13-wake-sqlite", "SQLite: an outbox of the relay's process", events, medians))
}

fn measured(id: &'static str, what: &str, events: usize, medians: Vec<f64>) -> Measured {
    let rounds = medians.len();
    let what = format!("{what}: from commit returned to handed over, medians of {events} events, {rounds} rounds");
    Pairs::limit(WAKE_MAX, medians).at_most(id, what, "ms", 1.0)
}

/// A relay that runs, and tells when it hands something over.
struct Awaited {
    handed: UnboundedReceiver<Instant>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), outbox::RelayError>>,
}

impl Awaited {
    async fn start(outbox: &Outbox) -> anyhow::Result<Self> {
        let (sender, handed) = unbounded_channel();
        let bus = NotingBus::new(move |_| {
            // Nobody waits any more when it is stopped.
            let _stopped = sender.send(Instant::now());
        });
        let mut relay = Relay::new(outbox.log(SINK).await?, bus, config())?.wake(outbox.wake_signal());
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(async move { relay.run(async { drop(stopped.await) }).await.map(drop) });
        Ok(Self { handed, stop, task })
    }

    /// Wakes it for what was just committed; answers how many milliseconds it took. Then it may fall idle.
    async fn wait(&mut self, outbox: &Outbox) -> anyhow::Result<f64> {
        let committed = Instant::now();
        outbox.wake();
        let handed = tokio::time::timeout(DEADLINE, self.handed.recv()).await?;
        let handed = handed.ok_or_else(|| anyhow::anyhow!("the relay ended"))?;
        tokio::time::sleep(PAUSE).await;
        // It may have found the event by itself, before the commit was answered.
        Ok(handed.saturating_duration_since(committed).as_secs_f64() * 1_000.0)
    }

    async fn stop(self) -> anyhow::Result<()> {
        drop(self.stop);
        Ok(self.task.await??)
    }
}
