//! Whatever call of a relay fails, or is the last one before it dies, nothing is lost, reordered or stuck.
//!
//! Method: a small scenario, with an event that the bus refuses for a while, is run once to count the relay's calls to
//! log and bus. Then it is run once for each call and each fault: the call answers an error undone, answers an error
//! though it was done, or never returns and the relay is killed there, before or after it was done. Another relay goes
//! on. In the end the bus holds every event, each key's first occurrences in order, and what was refused is set aside
//! with what follows it; an operator's retry then publishes these, in order.
//!
//! Catches, each tried: a relay that settles on error, that forgets the hole of a failed event, that commits the cursor
//! before what is set aside, that reads no holes when it takes over.

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bus_core::{
    BusAdmin, BusError, Capabilities, Confirmations, ErrorKind, Event, EventBus, Health, LogWriter, Mark,
    OrderOnFailure, Position, Seq, SeqSet, SubscribeRequest, Subscription, Text, WriterId,
};
use outbox::{
    Acquire, Acquisition, Change, DeadRow, Lease, LogAdmin, LogError, LogErrorKind, LogSource, Page, PageLimit, Probe,
    Pruned, ReadRows, Relay, RelayConfig, Request, RequestKind, Selected,
};
use support::{ScriptedBus, Shop, config, event, first_by_key, within};
use tokio::{sync::Notify, task::JoinSet};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    FailUndone,
    FailDone,
    DieUndone,
    DieDone,
}

/// Which call gets which fault, and where it is told that the relay should die.
#[derive(Debug)]
struct Plan {
    calls: AtomicU64,
    at: u64,
    fault: Fault,
    dies: Notify,
}

impl Plan {
    fn new(at: u64, fault: Fault) -> Arc<Self> {
        Arc::new(Self { calls: AtomicU64::new(0), at, fault, dies: Notify::new() })
    }

    /// Makes one call, with its fault: `None` if it is to answer an error.
    async fn call<T>(&self, call: impl Future<Output = T>) -> Option<T> {
        let fault = if self.calls.fetch_add(1, Ordering::SeqCst) + 1 == self.at { self.fault } else { Fault::None };
        match fault {
            Fault::None => Some(call.await),
            Fault::FailUndone => None,
            Fault::FailDone => {
                call.await;
                None
            }
            Fault::DieUndone => self.die().await,
            Fault::DieDone => {
                call.await;
                self.die().await
            }
        }
    }

    async fn die<T>(&self) -> T {
        self.dies.notify_one();
        std::future::pending().await
    }
}

/// Appends the scenario: three keys, of which one has an event that is refused at first.
async fn scenario(shop: &Shop) {
    for n in 0..3 {
        shop.append(["a", "b", "poison"].map(|key| event(key, n))).await;
    }
}

/// Runs the scenario with one fault; answers the calls that were made.
async fn run(order: OrderOnFailure, at: u64, fault: Fault) -> u64 {
    let shop = Shop::open().await;
    let bus = ScriptedBus::new(order);
    bus.refuse("poison-1");
    scenario(&shop).await;
    let plan = Plan::new(at, fault);
    let config = || RelayConfig { lease: Duration::from_millis(250), window_events: 8, ..config() };
    {
        let log = FaultyLog { plan: Arc::clone(&plan), inner: shop.log("main").await };
        let faulty = FaultyBus { plan: Arc::clone(&plan), inner: bus.clone() };
        let mut relay = Relay::new(Arc::new(log), Arc::new(faulty), config()).expect("a relay");
        let ended = async {
            tokio::select! {
                ended = relay.run_once(std::future::pending()) => drop(ended.expect("an outage is no error")),
                () = plan.dies.notified() => {}
            }
        };
        within(&format!("call {at} {fault:?}"), ended).await;
    }
    shop.append(["a", "b", "poison"].map(|key| event(key, 3))).await;
    shop.relay_once(bus.arc(), config()).await;

    let context = format!("{order:?}, call {at}, {fault:?}");
    let published = first_by_key(&bus.stored());
    let expected = |key: &str, count| (0..count).map(|n| format!("{key}-{n}")).collect::<Vec<_>>();
    assert_eq!(published["a"], expected("a", 4), "{context}");
    assert_eq!(published["b"], expected("b", 4), "{context}");
    assert_eq!(published["poison"], expected("poison", 1), "{context}");
    let set_aside: Vec<String> = shop.set_aside().await.into_iter().map(|(id, _)| id).collect();
    assert_eq!(set_aside, ["poison-1", "poison-2", "poison-3"], "{context}");

    bus.rule(|_| None);
    shop.admin().await.ask("main", RequestKind::Retry, &Selected::default(), None).await.expect("it is asked");
    shop.relay_once(bus.arc(), config()).await;
    assert_eq!(first_by_key(&bus.stored())["poison"], expected("poison", 4), "{context}");
    assert!(shop.set_aside().await.is_empty(), "{context}");
    let status = shop.admin().await.status().await.expect("a status").remove(0);
    assert_eq!((status.backlog, status.holes), (0, 0), "{context}");
    plan.calls.load(Ordering::SeqCst)
}

async fn every_call(order: OrderOnFailure) {
    let calls = run(order, 0, Fault::None).await;
    assert!(calls >= 10, "{calls} calls are no relay");
    let mut runs = JoinSet::new();
    for at in 1..=calls {
        for fault in [Fault::FailUndone, Fault::FailDone, Fault::DieUndone, Fault::DieDone] {
            if runs.len() == 8 {
                runs.join_next().await.expect("a run").expect("the promises hold");
            }
            runs.spawn(run(order, at, fault));
        }
    }
    while let Some(ended) = runs.join_next().await {
        ended.expect("the promises hold");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_fault_loses_or_reorders_on_a_fail_stop_bus() {
    every_call(OrderOnFailure::FailStop).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_fault_loses_or_reorders_on_an_independent_bus() {
    every_call(OrderOnFailure::Independent).await;
}

fn log_away<T>(answer: Option<Result<T, LogError>>) -> Result<T, LogError> {
    answer.unwrap_or_else(|| Err(LogError::new(LogErrorKind::Unavailable, "cut by the test")))
}

#[derive(Debug)]
struct FaultyLog {
    plan: Arc<Plan>,
    inner: Arc<dyn LogSource>,
}

#[async_trait]
impl LogSource for FaultyLog {
    fn sink(&self) -> &str {
        self.inner.sink()
    }

    async fn fetch(&self, after: Seq, limit: PageLimit) -> Result<Page, LogError> {
        log_away(self.plan.call(self.inner.fetch(after, limit)).await)
    }

    async fn probe(&self, unseen: &SeqSet, limit: PageLimit) -> Result<Probe, LogError> {
        log_away(self.plan.call(self.inner.probe(unseen, limit)).await)
    }

    async fn read(&self, seqs: &SeqSet, limit: PageLimit) -> Result<ReadRows, LogError> {
        log_away(self.plan.call(self.inner.read(seqs, limit)).await)
    }

    async fn last_seq(&self) -> Result<Seq, LogError> {
        log_away(self.plan.call(self.inner.last_seq()).await)
    }

    async fn acquire(&self, request: &Acquire) -> Result<Acquisition, LogError> {
        log_away(self.plan.call(self.inner.acquire(request)).await)
    }

    async fn commit(&self, lease: &Lease, change: &Change) -> Result<(), LogError> {
        log_away(self.plan.call(self.inner.commit(lease, change)).await)
    }

    async fn release(&self, lease: &Lease) -> Result<(), LogError> {
        log_away(self.plan.call(self.inner.release(lease)).await)
    }

    async fn set_aside(&self, of: &Selected, after: Seq, limit: usize) -> Result<Vec<DeadRow>, LogError> {
        log_away(self.plan.call(self.inner.set_aside(of, after, limit)).await)
    }

    async fn requests(&self) -> Result<Vec<Request>, LogError> {
        log_away(self.plan.call(self.inner.requests()).await)
    }

    async fn prune(&self, janitor: &str, retention: Duration, rows_max: usize) -> Result<Pruned, LogError> {
        log_away(self.plan.call(self.inner.prune(janitor, retention, rows_max)).await)
    }

    fn checkpoint_interval(&self) -> Duration {
        // So short that the scenario has several checkpoints.
        Duration::from_millis(2)
    }

    async fn changed(&self) {
        self.inner.changed().await;
    }
}

fn bus_away() -> BusError {
    BusError::new(ErrorKind::Unavailable, "cut by the test")
}

#[derive(Debug)]
struct FaultyBus {
    plan: Arc<Plan>,
    inner: ScriptedBus,
}

#[async_trait]
impl EventBus for FaultyBus {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn publish_batch(&self, batch: Vec<Event>) -> Confirmations {
        self.inner.publish_batch(batch).await
    }

    async fn open_writer(&self, id: WriterId) -> Result<Box<dyn LogWriter>, BusError> {
        let opened = self.plan.call(self.inner.open_writer(id)).await.unwrap_or_else(|| Err(bus_away()));
        let writer = |inner| FaultyWriter { plan: Arc::clone(&self.plan), inner, broken: false };
        opened.map(|inner| Box::new(writer(inner)) as Box<dyn LogWriter>)
    }

    async fn subscribe(&self, request: SubscribeRequest) -> Result<Box<dyn Subscription>, BusError> {
        self.inner.subscribe(request).await
    }

    fn admin(&self) -> &dyn BusAdmin {
        self.inner.admin()
    }

    async fn ping(&self) -> Result<Health, BusError> {
        self.inner.ping().await
    }

    async fn close(&self) -> Result<(), BusError> {
        self.inner.close().await
    }
}

#[derive(Debug)]
struct FaultyWriter {
    plan: Arc<Plan>,
    inner: Box<dyn LogWriter>,
    /// A call failed: as a fail-stop bus has it, nothing behind it lands. An independent one loses nothing by that.
    broken: bool,
}

impl FaultyWriter {
    fn answered(&mut self, len: usize, confirmations: Option<Confirmations>) -> Confirmations {
        self.broken |= confirmations.is_none();
        confirmations.unwrap_or_else(|| Confirmations::same(len, Err(bus_away())))
    }
}

#[async_trait]
impl LogWriter for FaultyWriter {
    async fn publish_batch(&mut self, batch: Vec<(Seq, Event)>, mark: &Mark) -> Confirmations {
        let len = batch.len();
        if self.broken {
            return Confirmations::same(len, Err(bus_away()));
        }
        let published = self.plan.call(self.inner.publish_batch(batch, mark)).await;
        self.answered(len, published)
    }

    async fn republish(&mut self, batch: Vec<Event>) -> Confirmations {
        let len = batch.len();
        if self.broken {
            return Confirmations::same(len, Err(bus_away()));
        }
        let published = self.plan.call(self.inner.republish(batch)).await;
        self.answered(len, published)
    }

    fn position(&self) -> Position {
        self.inner.position()
    }

    fn high_marks(&self) -> Vec<(Seq, Text)> {
        self.inner.high_marks()
    }

    async fn close(&mut self) -> Result<(), BusError> {
        self.plan.call(self.inner.close()).await.unwrap_or_else(|| Err(bus_away()))
    }
}
