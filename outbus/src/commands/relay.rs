//! `outbus relay`

use std::{
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use bus_core::EventBus;
use indicatif::ProgressBar;
use outbox::{LogError, LogSource, Relay, RelayConfig, RelayEvent, RelaySummary};
use serde::Serialize;
use tokio::{sync::watch, task::JoinSet};

use crate::{
    cli::{Format, RelayArgs},
    config::Config,
    database::Database,
    failure::Failure,
    output,
    shutdown::shutdown,
};

#[derive(Serialize)]
struct Relayed {
    events: u64,
    published: u64,
    failed: u64,
    duplicates: u64,
    parked: u64,
    dead: u64,
    seconds: f64,
}

pub(super) async fn run(config: &Config, args: &RelayArgs, format: Format) -> Result<(), Failure> {
    let database = config.database(args.database.database.as_deref())?;
    let bus_config = config.bus(args.bus.as_deref())?;
    let relays = config.relays(&bus::shown(&bus_config.url))?;
    let bus = bus::connect(&bus_config.url)?;
    bus.capabilities().require(&bus_config.require).map_err(|error| config.wrong(format!("`bus.require`: {error}")))?;
    let topology = config.topology()?;
    if !topology.topics.is_empty() {
        bus.admin().apply(&topology).await?;
    }
    let started = Instant::now();
    let stop = shutdown()?;
    let (stopping, stopped) = watch::channel(false);
    let signal = tokio::spawn(async move {
        stop.await;
        stopping.send_replace(true);
    });
    let bar = output::progress(if args.once { format } else { Format::Json }, None, "relaying");
    let daemon = Daemon { database, bus: Arc::clone(&bus), once: args.once, stopped, bar: bar.clone() };
    let summary = daemon.relay_all(relays).await;
    bar.finish_and_clear();
    signal.abort();
    bus.close().await?;
    let summary = summary?;
    if !args.once {
        return Ok(());
    }
    let counts = summary.counts;
    let relayed = Relayed {
        events: summary.events,
        published: counts.published,
        failed: counts.failed,
        duplicates: counts.duplicates,
        parked: counts.parked,
        dead: counts.dead,
        seconds: output::seconds(started.elapsed()),
    };
    output::result(format, &relayed, text)?;
    match counts.parked + counts.dead {
        0 => Ok(()),
        aside => {
            Err(Failure::runtime("set_aside", format!("{aside} events were set aside; `outbus dead list` says why")))
        }
    }
}

fn text(relayed: &Relayed) -> String {
    let Relayed { events, published, failed, duplicates, parked, dead, seconds } = relayed;
    let mut text = format!("settled {events} events in {seconds} s: {published} published");
    for (count, what) in
        [(duplicates, "already stored"), (parked, "parked"), (dead, "dead"), (failed, "attempts failed")]
    {
        if *count > 0 {
            text += &format!(", {count} {what}");
        }
    }
    text
}

/// What every relay of this process shares.
#[derive(Clone)]
struct Daemon {
    database: Database,
    bus: Arc<dyn EventBus>,
    once: bool,
    stopped: watch::Receiver<bool>,
    bar: ProgressBar,
}

impl Daemon {
    /// Runs every relay until it ends by itself, or all are told to stop. One that fails stops the others.
    async fn relay_all(&self, relays: Vec<(String, RelayConfig)>) -> Result<RelaySummary, Failure> {
        let (failing, failed) = watch::channel(false);
        let mut running = JoinSet::new();
        for (sink, config) in relays {
            let (daemon, failed) = (self.clone(), failed.clone());
            running.spawn(async move { daemon.relay_one(sink, config, failed).await });
        }
        let (mut summary, mut failure) = (RelaySummary::default(), None);
        while let Some(ended) = running.join_next().await {
            match ended {
                Ok(Ok(done)) => summary.add(done),
                Ok(Err(error)) => {
                    failing.send_replace(true);
                    failure.get_or_insert(error);
                }
                Err(panic) => std::panic::resume_unwind(panic.into_panic()),
            }
        }
        failure.map_or(Ok(summary), Err)
    }

    async fn relay_one(
        mut self,
        sink: String,
        config: RelayConfig,
        mut failed: watch::Receiver<bool>,
    ) -> Result<RelaySummary, Failure> {
        let mut stop = pin!(async {
            tokio::select! {
                _ = self.stopped.wait_for(|stopped| *stopped) => {}
                _ = failed.wait_for(|failed| *failed) => {}
            }
        });
        let log = tokio::select! {
            log = open_log(&self.database, &sink, &config) => log?,
            () = &mut stop => return Ok(RelaySummary::default()),
        };
        let mut relay =
            Relay::new(log, Arc::clone(&self.bus), config)?.observe(observer(sink.clone(), self.bar.clone()));
        let ended = if self.once { relay.run_once(stop).await } else { relay.run(stop).await };
        ended.map_err(|error| Failure::from(error).of_sink(&sink))
    }
}

/// Opens the log; what may heal is waited for.
async fn open_log(database: &Database, sink: &str, config: &RelayConfig) -> Result<Arc<dyn LogSource>, LogError> {
    let mut failures = 0;
    loop {
        match database.log(sink).await {
            Err(error) if error.kind().may_heal() => {
                if failures == 0 {
                    output::to_stderr(&format!("{sink}: {error}; trying again"));
                }
                failures += 1;
                tokio::time::sleep(config.retry.backoff(failures, fastrand::f64())).await;
            }
            opened => return opened,
        }
    }
}

/// Says on stderr what an operator should know; nothing twice in a row.
fn observer(sink: String, bar: ProgressBar) -> impl Fn(&RelayEvent) + Send + Sync {
    let last_standby = Mutex::new(String::new());
    let published = AtomicU64::new(0);
    move |event| {
        let text = match event {
            RelayEvent::Standby { owner } => {
                let mut last = last_standby.lock().unwrap_or_else(PoisonError::into_inner);
                if *last == *owner {
                    return;
                }
                last.clone_from(owner);
                format!("standby of {owner}")
            }
            RelayEvent::Owner { epoch, previous_bus } => {
                let before =
                    previous_bus.as_ref().map_or_else(String::new, |bus| format!("; it published to {bus} before"));
                format!("owner of outbox for sink {sink} (epoch {epoch}){before}")
            }
            RelayEvent::BusAway { error } => format!("the bus does not take events: {error}; trying again"),
            RelayEvent::BusBack => "the bus takes events again".to_owned(),
            RelayEvent::LogAway { error } => format!("the database cannot be used: {error}; trying again"),
            RelayEvent::Progress(counts) => {
                let now = counts.published + counts.duplicates;
                bar.inc(now.saturating_sub(published.swap(now, Ordering::Relaxed)));
                return;
            }
        };
        bar.suspend(|| output::to_stderr(&text));
    }
}
