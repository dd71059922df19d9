//! What the tests of the relay share: a shop that appends, and a bus that does what it is told.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bus_core::{
    BusAdmin, BusError, Capabilities, Confirmations, ErrorKind, Event, EventBus, Health, InMemoryBus, LogWriter, Mark,
    OrderOnFailure, Outcome, Position, Receipt, RetryPolicy, Seq, SubscribeRequest, Subscription, Text, WriterId,
    writer::stopped,
};
use outbox::{
    LogAdmin, LogSource, Outbox, OutboxConfig, Relay, RelayConfig, RelayError, RelaySummary, Selected, SqliteLog,
};
use sqlx::{SqlitePool, sqlite::SqliteConnectOptions};
use tempfile::TempDir;
use tokio::{sync::oneshot, task::JoinHandle};

/// How long anything may take. Nothing here takes a second on an idle machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// A service with a SQLite file.
pub(crate) struct Shop {
    pub(crate) dir: TempDir,
    pub(crate) pool: SqlitePool,
    pub(crate) outbox: Outbox,
}

impl Shop {
    pub(crate) async fn open() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let options = SqliteConnectOptions::new().filename(dir.path().join("shop.db")).create_if_missing(true);
        let pool = SqlitePool::connect_with(options).await.expect("a database");
        let outbox = Outbox::sqlite(pool.clone(), OutboxConfig::default());
        outbox.migrate().await.expect("the tables are made");
        Self { dir, pool, outbox }
    }

    /// Appends events in one transaction and nudges the relays.
    pub(crate) async fn append(&self, events: impl IntoIterator<Item = Event>) {
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await.expect("a transaction");
        self.outbox.append(&mut transaction, events).await.expect("the events are appended");
        transaction.commit().await.expect("it commits");
        self.outbox.wake();
    }

    pub(crate) async fn log(&self, sink: &str) -> Arc<dyn LogSource> {
        self.outbox.log(sink).await.expect("the log opens")
    }

    pub(crate) async fn admin(&self) -> SqliteLog {
        let tables = self.outbox.tables().clone();
        SqliteLog::open_admin(&self.pool.connect_options(), tables).await.expect("the log opens")
    }

    pub(crate) async fn relay(&self, bus: Arc<dyn EventBus>, config: RelayConfig) -> Relay {
        Relay::new(self.log("main").await, bus, config).expect("a relay").wake(self.outbox.wake_signal())
    }

    /// Relays until everything is settled.
    pub(crate) async fn relay_once(&self, bus: Arc<dyn EventBus>, config: RelayConfig) -> RelaySummary {
        let mut relay = self.relay(bus, config).await;
        within("relaying", relay.run_once(std::future::pending())).await.expect("the relay ends in order")
    }

    /// How many rows the log has.
    pub(crate) async fn rows(&self) -> i64 {
        sqlx::query_scalar("SELECT count(*) FROM outbus_outbox").fetch_one(&self.pool).await.expect("a count")
    }

    /// Ids of set-aside events with their states.
    pub(crate) async fn set_aside(&self) -> Vec<(String, &'static str)> {
        let rows = self.admin().await.dead_letters(&Selected::default(), None, 1_000).await.expect("a list");
        rows.into_iter().map(|row| (row.columns.id, row.state.as_str())).collect()
    }
}

/// A relay on a task of its own.
pub(crate) struct Running {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<RelaySummary, RelayError>>,
}

impl Running {
    pub(crate) fn start(mut relay: Relay) -> Self {
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(async move { relay.run(async { drop(stopped.await) }).await });
        Self { stop, task }
    }

    pub(crate) async fn stop(self) -> RelaySummary {
        drop(self.stop);
        within("the relay's end", self.task).await.expect("no panic").expect("an orderly end")
    }

    /// Its end without being asked.
    pub(crate) async fn ended(self) -> Result<RelaySummary, RelayError> {
        within("the relay's end", self.task).await.expect("no panic")
    }

    /// Ends it as a crash would.
    pub(crate) async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

/// Short leases and waits, so that tests need not wait for them.
pub(crate) fn config() -> RelayConfig {
    RelayConfig {
        allow_volatile: true,
        lease: Duration::from_secs(2),
        retry: RetryPolicy {
            attempts: 3,
            backoff_min: Duration::from_millis(5),
            backoff_max: Duration::from_millis(20),
        },
        poll_interval: Duration::from_millis(50),
        retention: None,
        ..RelayConfig::default()
    }
}

/// Event number `n` of `key`.
pub(crate) fn event(key: &str, n: usize) -> Event {
    event_of("orders", key, n)
}

pub(crate) fn event_of(topic: &str, key: &str, n: usize) -> Event {
    let builder = Event::json(topic, "order.placed", &n).expect("a number is JSON");
    builder.id(format!("{key}-{n}")).key(key).build().expect("a valid event")
}

pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("{what}: not within {DEADLINE:?}"))
}

/// Asks again and again until `condition` holds.
pub(crate) async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    within(what, async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

pub(crate) fn ids(events: &[Event]) -> Vec<String> {
    events.iter().map(|event| event.id().to_owned()).collect()
}

/// The ids of each key in order, each where it came first.
pub(crate) fn first_by_key(events: &[Event]) -> BTreeMap<String, Vec<String>> {
    let mut keys: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for event in events {
        let ids = keys.entry(event.key().unwrap_or(event.id()).to_owned()).or_default();
        if !ids.iter().any(|id| id == event.id()) {
            ids.push(event.id().to_owned());
        }
    }
    keys
}

type Rule = Box<dyn Fn(&Event) -> Option<BusError> + Send + Sync>;

/// A bus that keeps what it stores, and refuses, loses or breaks down as it is told.
#[derive(Clone)]
pub(crate) struct ScriptedBus(Arc<Script>);

struct Script {
    order: OrderOnFailure,
    stored: Mutex<Vec<Event>>,
    rule: Mutex<Rule>,
    away: AtomicBool,
    silent: AtomicBool,
    handed_over: AtomicU64,
    opened: AtomicU64,
    /// The highest place that was stored, on a bus that remembers it.
    high: Option<Mutex<(Seq, Text)>>,
    inner: InMemoryBus,
}

impl std::fmt::Debug for ScriptedBus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ScriptedBus")
    }
}

impl ScriptedBus {
    pub(crate) fn new(order: OrderOnFailure) -> Self {
        Self::with(order, None)
    }

    /// A fail-stop bus that tells each writer the highest place it has stored.
    pub(crate) fn remembering() -> Self {
        Self::with(OrderOnFailure::FailStop, Some(Mutex::default()))
    }

    fn with(order: OrderOnFailure, high: Option<Mutex<(Seq, Text)>>) -> Self {
        Self(Arc::new(Script {
            high,
            order,
            stored: Mutex::default(),
            rule: Mutex::new(Box::new(|_| None)),
            away: AtomicBool::new(false),
            silent: AtomicBool::new(false),
            handed_over: AtomicU64::new(0),
            opened: AtomicU64::new(0),
            inner: InMemoryBus::new(),
        }))
    }

    pub(crate) fn arc(&self) -> Arc<dyn EventBus> {
        Arc::new(self.clone())
    }

    /// From now on, events for which `rule` answers an error get it.
    pub(crate) fn rule(&self, rule: impl Fn(&Event) -> Option<BusError> + Send + Sync + 'static) {
        *self.0.rule.lock().expect("not poisoned") = Box::new(rule);
    }

    pub(crate) fn refuse(&self, id: &'static str) {
        self.rule(move |event| (event.id() == id).then(|| BusError::new(ErrorKind::Refused, "refused by the test")));
    }

    /// Cuts the broker off, or brings it back.
    pub(crate) fn away(&self, away: bool) {
        self.0.away.store(away, Ordering::SeqCst);
    }

    /// Takes events and never answers.
    pub(crate) fn silent(&self) {
        self.0.silent.store(true, Ordering::SeqCst);
    }

    pub(crate) fn stored(&self) -> Vec<Event> {
        self.0.stored.lock().expect("not poisoned").clone()
    }

    pub(crate) fn handed_over(&self) -> u64 {
        self.0.handed_over.load(Ordering::SeqCst)
    }

    pub(crate) fn opened(&self) -> u64 {
        self.0.opened.load(Ordering::SeqCst)
    }

    pub(crate) async fn until_stored(&self, count: usize) {
        until(&format!("{count} events stored"), async || self.stored().len() >= count).await;
    }

    /// Stores what it may; `broken` tells and is told whether an earlier event failed.
    fn store(&self, batch: Vec<Event>, broken: &mut bool) -> Vec<Outcome> {
        self.0.handed_over.fetch_add(batch.len() as u64, Ordering::SeqCst);
        let rule = self.0.rule.lock().expect("not poisoned");
        let mut stored = self.0.stored.lock().expect("not poisoned");
        let mut outcomes = Vec::new();
        for event in batch {
            let outcome = if *broken && self.0.order == OrderOnFailure::FailStop {
                Err(stopped())
            } else if self.0.away.load(Ordering::SeqCst) {
                Err(BusError::new(ErrorKind::Unavailable, "away"))
            } else if let Some(error) = rule(&event) {
                Err(error)
            } else {
                stored.push(event);
                Ok(Receipt::default())
            };
            *broken |= outcome.is_err();
            outcomes.push(outcome);
        }
        outcomes
    }
}

#[async_trait]
impl EventBus for ScriptedBus {
    fn capabilities(&self) -> Capabilities {
        let order_on_failure = self.0.order;
        Capabilities { order_on_failure, remembers_writers: false, ..self.0.inner.capabilities() }
    }

    async fn publish_batch(&self, batch: Vec<Event>) -> Confirmations {
        Confirmations::ready(self.store(batch, &mut false))
    }

    async fn open_writer(&self, _id: WriterId) -> Result<Box<dyn LogWriter>, BusError> {
        self.0.opened.fetch_add(1, Ordering::SeqCst);
        if self.0.away.load(Ordering::SeqCst) {
            return Err(BusError::new(ErrorKind::Unavailable, "away"));
        }
        Ok(Box::new(ScriptedWriter { bus: self.clone(), broken: false, unanswered: Vec::new() }))
    }

    async fn subscribe(&self, request: SubscribeRequest) -> Result<Box<dyn Subscription>, BusError> {
        self.0.inner.subscribe(request).await
    }

    fn admin(&self) -> &dyn BusAdmin {
        self.0.inner.admin()
    }

    async fn ping(&self) -> Result<Health, BusError> {
        self.0.inner.ping().await
    }

    async fn close(&self) -> Result<(), BusError> {
        self.0.inner.close().await
    }
}

#[derive(Debug)]
struct ScriptedWriter {
    bus: ScriptedBus,
    broken: bool,
    unanswered: Vec<bus_core::Confirmer>,
}

#[async_trait]
impl LogWriter for ScriptedWriter {
    async fn publish_batch(&mut self, batch: Vec<(Seq, Event)>, _mark: &Mark) -> Confirmations {
        if let (Some(high), Some((seq, event))) = (&self.bus.0.high, batch.last())
            && !self.bus.0.away.load(Ordering::SeqCst)
        {
            *high.lock().expect("not poisoned") = (*seq, event.id().into());
        }
        self.republish(batch.into_iter().map(|(_, event)| event).collect()).await
    }

    async fn republish(&mut self, batch: Vec<Event>) -> Confirmations {
        if self.bus.0.silent.load(Ordering::SeqCst) {
            self.bus.0.handed_over.fetch_add(batch.len() as u64, Ordering::SeqCst);
            let (confirmer, confirmations) = Confirmations::pending(batch.len());
            self.unanswered.push(confirmer);
            return confirmations;
        }
        Confirmations::ready(self.bus.store(batch, &mut self.broken))
    }

    fn position(&self) -> Position {
        Position::default()
    }

    fn high_marks(&self) -> Vec<(Seq, Text)> {
        let high = self.bus.0.high.as_ref().map(|high| high.lock().expect("not poisoned").clone());
        high.filter(|(seq, _)| *seq > Seq::ZERO).into_iter().collect()
    }

    async fn close(&mut self) -> Result<(), BusError> {
        Ok(())
    }
}
