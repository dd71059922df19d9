//! `outbus demo`: the whole road in one process.

mod ledger;
mod shop;

use std::{
    collections::{BTreeMap, BTreeSet},
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bus_core::{Consumer, Event, EventBus, InMemoryBus, OUTBUS_SEQ, Seq, SeqSet};
use indicatif::ProgressBar;
use outbox::{Relay, RelayConfig, Wake};
use serde::Serialize;
use tokio::{sync::watch, task::JoinSet};

use crate::{
    cli::{DemoArgs, Format},
    database::Database,
    failure::Failure,
    output,
    shutdown::shutdown,
};
use ledger::Ledger;
use shop::{Shop, Trade};

/// The consumer groups, each of which must see every event.
const GROUPS: [&str; 2] = ["billing", "shipping"];
/// The sink of the demo's relay.
const SINK: &str = "main";
/// A lease this short is over soon after its relay was killed.
const KILLED_LEASE: Duration = Duration::from_millis(300);
/// How long a relay lives that is to be killed, at most.
const LIFE_MAX: Duration = Duration::from_millis(400);
/// How long nothing may arrive before what is missing counts as lost.
const STALLED: Duration = Duration::from_secs(30);

#[derive(Serialize)]
struct Demo {
    committed: u64,
    published: u64,
    delivered: BTreeMap<&'static str, u64>,
    duplicates: u64,
    lost: u64,
    reordered: u64,
    /// Delivered and never committed.
    invented: u64,
    /// Transactions that were rolled back.
    rolled_back: u64,
    kills: u64,
    seed: u64,
    seconds: f64,
}

type Ledgers = BTreeMap<&'static str, Arc<Mutex<Ledger>>>;

pub(super) async fn run(args: DemoArgs, format: Format) -> Result<(), Failure> {
    let started = Instant::now();
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..));
    // Dropped, and so removed, at the end.
    let temporary =
        tempfile::tempdir().map_err(|error| Failure::runtime("demo", format!("no temporary folder: {error}")))?;
    let named = args.database.clone();
    let url = named.clone().unwrap_or_else(|| format!("sqlite://{}", temporary.path().join("demo.db").display()));
    let database = Database::from_url(&url, None)?;
    let trade = Trade::new(args.events, args.file)?;
    let mut shop = Shop::open(&database, seed).await?;
    let bus: Arc<dyn EventBus> = Arc::new(InMemoryBus::new());
    let ledgers: Ledgers = GROUPS.into_iter().map(|group| (group, Arc::default())).collect();
    let mut consumers = Consumers::new(Arc::clone(&bus), ledgers.clone());
    let relay = KillableRelay { database, bus, wake: shop.outbox().wake_signal().clone(), kill: args.kill_relay, seed };
    let (stop, stopped) = watch::channel(false);
    let relaying = tokio::spawn(relay.run(stopped));
    let total = (!matches!(trade, Trade::Lines(_))).then_some(args.events);
    let bar = output::progress(format, total, "delivered");

    let truth = drive(&mut shop, trade, &mut consumers, &ledgers, &bar).await;
    stop.send_replace(true);
    let kills = relaying.await.map_err(|error| Failure::runtime("demo", error.to_string()))??;
    consumers.stop().await?;
    bar.finish_and_clear();
    let demo = summary(&shop, &truth?, &ledgers, kills, seed, started);
    output::result(format, &demo, |demo| text(demo, named.as_deref()))?;
    if args.kill_relay && kills == 0 {
        output::to_stderr("the run was too short to kill the relay: use more events, as in --events 100000");
    }
    match demo.lost + demo.reordered + demo.invented {
        0 => Ok(()),
        _ => Err(Failure::runtime(
            "demo",
            "events were lost, reordered or invented: please report this with the seed above",
        )),
    }
}

/// Commits everything, then waits until every group has received it; answers what was committed.
async fn drive(
    shop: &mut Shop,
    mut trade: Trade,
    consumers: &mut Consumers,
    ledgers: &Ledgers,
    bar: &ProgressBar,
) -> Result<SeqSet, Failure> {
    let mut stop = pin!(shutdown()?);
    loop {
        // A signal ends the trade; what is committed is still delivered.
        let topics = tokio::select! {
            biased;
            () = &mut stop => None,
            topics = trade.next(shop) => topics?,
        };
        let Some(topics) = topics else { break };
        consumers.subscribe(topics);
        bar.set_position(least_delivered(ledgers));
    }
    let truth = shop.committed_seqs().await?;
    let (mut delivered, mut since) = (least_delivered(ledgers), Instant::now());
    while ledgers.values().any(|ledger| lock(ledger).lost(&truth) > 0) && since.elapsed() < STALLED {
        tokio::time::sleep(Duration::from_millis(10)).await;
        let now = least_delivered(ledgers);
        if now > delivered {
            (delivered, since) = (now, Instant::now());
        }
        bar.set_position(now);
    }
    Ok(truth)
}

fn lock(ledger: &Mutex<Ledger>) -> MutexGuard<'_, Ledger> {
    ledger.lock().unwrap_or_else(PoisonError::into_inner)
}

fn least_delivered(ledgers: &Ledgers) -> u64 {
    ledgers.values().map(|ledger| lock(ledger).delivered()).min().unwrap_or(0)
}

fn summary(shop: &Shop, truth: &SeqSet, ledgers: &Ledgers, kills: u64, seed: u64, started: Instant) -> Demo {
    let sum = |count: &dyn Fn(&Ledger) -> u64| ledgers.values().map(|ledger| count(&lock(ledger))).sum();
    Demo {
        committed: truth.len(),
        // What any group has received was published.
        published: ledgers.values().map(|ledger| lock(ledger).delivered()).max().unwrap_or(0),
        delivered: ledgers.iter().map(|(group, ledger)| (*group, lock(ledger).delivered())).collect(),
        duplicates: sum(&Ledger::duplicates),
        lost: sum(&|ledger| ledger.lost(truth)),
        reordered: sum(&Ledger::reordered),
        invented: sum(&|ledger| ledger.invented(truth)),
        rolled_back: shop.rolled_back,
        kills,
        seed,
        seconds: output::seconds(started.elapsed()),
    }
}

fn text(demo: &Demo, database: Option<&str>) -> String {
    let delivered: Vec<String> = demo.delivered.iter().map(|(group, count)| format!("{group} {count}")).collect();
    let mut table = output::Table::new(&[]);
    let mut row = |name: &str, value: String| table.row(vec![name.to_owned(), value]);
    row("committed", format!("{} events; {} transactions were rolled back", demo.committed, demo.rolled_back));
    row(
        "published",
        format!(
            "{}{}",
            demo.published,
            if demo.kills > 0 { format!("; the relay was killed {} times", demo.kills) } else { String::new() }
        ),
    );
    row("delivered", delivered.join(", "));
    row("duplicates", demo.duplicates.to_string());
    row("lost", demo.lost.to_string());
    row("reordered", demo.reordered.to_string());
    row("invented", demo.invented.to_string());
    row("time", format!("{} s (seed {})", demo.seconds, demo.seed));
    if let Some(database) = database {
        row("database", format!("{database} is kept: try `outbus status --database {database}`"));
    }
    table.render().trim_start().to_owned()
}

/// Two groups per topic, each with its ledger over all topics.
struct Consumers {
    bus: Arc<dyn EventBus>,
    ledgers: Ledgers,
    topics: BTreeSet<String>,
    stop: watch::Sender<bool>,
    running: JoinSet<Result<(), Failure>>,
}

impl Consumers {
    fn new(bus: Arc<dyn EventBus>, ledgers: Ledgers) -> Self {
        Self { bus, ledgers, topics: BTreeSet::new(), stop: watch::Sender::new(false), running: JoinSet::new() }
    }

    /// Starts the groups of topics that are new. They begin with the oldest event, so none is missed.
    fn subscribe(&mut self, topics: Vec<String>) {
        for topic in topics {
            if self.topics.insert(topic.clone()) {
                for (group, ledger) in &self.ledgers {
                    let consumer = Consumer::new(Arc::clone(&self.bus), topic.as_str(), *group);
                    let consumer = consumer.on_any(recorder(Arc::clone(ledger)));
                    let mut stopped = self.stop.subscribe();
                    self.running.spawn(async move {
                        let stop = async move { drop(stopped.wait_for(|stopped| *stopped).await) };
                        consumer.run(stop).await.map(drop).map_err(Failure::from)
                    });
                }
            }
        }
    }

    async fn stop(mut self) -> Result<(), Failure> {
        self.stop.send_replace(true);
        while let Some(ended) = self.running.join_next().await {
            ended.map_err(|error| Failure::runtime("demo", error.to_string()))??;
        }
        Ok(())
    }
}

/// A handler that notes what it is called with.
fn recorder(ledger: Arc<Mutex<Ledger>>) -> impl bus_core::Handler {
    move |event: Event, _context: bus_core::Context| {
        let seq = event.extension(OUTBUS_SEQ).and_then(|seq| seq.parse().ok()).unwrap_or(0);
        lock(&ledger).received(Seq(seq), event.topic(), event.key());
        async { Ok(()) }
    }
}

/// A relay that is killed and started again at random moments, if that is asked for.
struct KillableRelay {
    database: Database,
    bus: Arc<dyn EventBus>,
    wake: Wake,
    kill: bool,
    seed: u64,
}

impl KillableRelay {
    /// Relays until told to stop; answers how often it was killed.
    async fn run(self, stopped: watch::Receiver<bool>) -> Result<u64, Failure> {
        let mut random = fastrand::Rng::with_seed(self.seed);
        let mut kills = 0;
        loop {
            let mut relay = self.relay().await?;
            let mut stop = stopped.clone();
            let mut task = tokio::spawn(async move {
                relay.run(async move { drop(stop.wait_for(|stopped| *stopped).await) }).await.map(drop)
            });
            let life = if self.kill { LIFE_MAX.mul_f64(random.f64()) } else { Duration::MAX };
            match tokio::time::timeout(life, &mut task).await {
                Ok(ended) => {
                    ended.map_err(|error| Failure::runtime("demo", error.to_string()))??;
                    return Ok(kills);
                }
                // Dropped wherever it waits, as a crash would leave it.
                Err(_) => {
                    task.abort();
                    let _ = task.await;
                    kills += 1;
                }
            }
        }
    }

    async fn relay(&self) -> Result<Relay, Failure> {
        let log = self.database.log(SINK).await?;
        let mut config = RelayConfig {
            allow_volatile: true,
            retention: None,
            bus_name: "memory".to_owned(),
            ..RelayConfig::default()
        };
        if self.kill {
            config.lease = KILLED_LEASE;
        }
        Ok(Relay::new(log, Arc::clone(&self.bus), config)?.wake(&self.wake))
    }
}
