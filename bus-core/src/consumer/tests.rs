//! What a consumer does when something goes wrong in an unusual place, on the in-memory bus.
//!
//! Method: the clock is stopped and moves on only while everything waits, so a condition is awaited without a sleep, and
//! how often something happened in a span of time is exact.

use std::{
    fmt,
    num::NonZeroU32,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use crate::{
    BusAdmin, BusError, Capabilities, Confirmations, Consumer, Context, Delivery, ErrorKind, Event, EventBus,
    EventBusExt, Group, Handler, HandlerError, Health, InMemoryBus, InMemoryConfig, LogWriter, RetryPolicy,
    SubscribeRequest, Subscription, Topic, WriterId, partition::partition_of_key,
};
use async_trait::async_trait;
use tokio::{
    sync::{Notify, mpsc},
    time::timeout,
};

const TWO: NonZeroU32 = NonZeroU32::new(2).unwrap();

fn bus() -> Arc<dyn EventBus> {
    Arc::new(InMemoryBus::with_config(InMemoryConfig { partitions: TWO, ..InMemoryConfig::default() }))
}

/// Event `n`, with a key of its own in the second partition, which moves to a second member.
fn event(n: usize) -> Event {
    let keys = (0..).map(|n| format!("key-{n}"));
    let key = keys.filter(|key| partition_of_key(key.as_bytes(), TWO) == 1).nth(n).unwrap();
    Event::json("orders", "order.placed", &n).unwrap().id(n).key(key).build().unwrap()
}

fn request() -> SubscribeRequest {
    SubscribeRequest::new(Topic::new("orders").unwrap(), Group::new("billing").unwrap())
}

/// Goes wrong on its first calls in ways of its own.
struct Panics(AtomicU32);

/// An error that cannot be shown.
#[derive(Debug)]
struct Unspeakable;

impl fmt::Display for Unspeakable {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        panic!("while the error was shown")
    }
}

impl std::error::Error for Unspeakable {}

struct PanicsWhenDropped;

impl Drop for PanicsWhenDropped {
    fn drop(&mut self) {
        panic!("while the call was dropped");
    }
}

impl Handler for Panics {
    fn handle<'a, 'b, 'c, 'f>(
        &'a self,
        _event: &'b Event,
        _context: &'c Context,
    ) -> Pin<Box<dyn Future<Output = Result<(), HandlerError>> + Send + 'f>>
    where
        'a: 'f,
        'b: 'f,
        'c: 'f,
        Self: 'f,
    {
        match self.0.fetch_add(1, Ordering::SeqCst) {
            0 => panic!("before there is a future"),
            1 => Box::pin(async { Err(Unspeakable)? }),
            2 => Box::pin(async {
                let _bomb = PanicsWhenDropped;
                std::future::pending().await
            }),
            _ => Box::pin(async { Ok(()) }),
        }
    }
}

/// Catches the mutants that catch only a panic of the handler's future: the event's key, and a place among the calls,
/// would be taken for ever.
#[tokio::test(start_paused = true)]
async fn a_panic_anywhere_in_a_call_is_a_failure_of_it() {
    let bus = bus();
    bus.publish(event(0)).await.unwrap();
    let consumer = Consumer::new(Arc::clone(&bus), "orders", "billing").on_any(Panics(AtomicU32::new(0)));
    let summary = consumer.run(until_settled(&bus)).await.unwrap();
    assert_eq!((summary.handled, summary.failed), (1, 3));
}

/// Completes when the group has settled everything; panics if that does not happen.
async fn until_settled(bus: &Arc<dyn EventBus>) {
    let settled = async {
        let SubscribeRequest { topic, group, .. } = request();
        while bus.admin().lag(&topic, &group).await.unwrap().lag() > 0 {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    timeout(Duration::from_secs(600), settled).await.expect("everything is settled");
}

/// Catches the mutants that add any wait to a clock.
#[tokio::test(start_paused = true)]
async fn a_wait_may_be_for_ever() {
    let bus = bus();
    bus.publish(event(0)).await.unwrap();
    let (called, mut calls) = mpsc::unbounded_channel();
    let handler = move |_: Event, _: Context| {
        called.send(()).unwrap();
        async { Err(HandlerError::retryable("no")) }
    };
    let retry = RetryPolicy { attempts: 5, backoff_min: Duration::MAX, backoff_max: Duration::MAX };
    let consumer = Consumer::new(bus, "orders", "billing").on_any(handler).retry(retry);
    let consumer = consumer.drain(Duration::MAX).timeout(Duration::MAX);
    let summary = consumer.run(async { calls.recv().await.unwrap() }).await.unwrap();
    assert_eq!(summary.failed, 1);
}

/// Catches the mutant that gives up for good a partition it was told to give up: another member came for it and left
/// again while a call was running, and what follows would wait for that call.
#[tokio::test(start_paused = true)]
async fn a_partition_that_stays_goes_on() {
    let bus = bus();
    bus.publish(event(0)).await.unwrap();
    let release = Arc::new(Notify::new());
    let (called, mut calls) = mpsc::unbounded_channel();
    let gate = Arc::clone(&release);
    let handler = move |event: Event, _: Context| {
        let (called, gate) = (called.clone(), Arc::clone(&gate));
        async move {
            called.send(event.id().to_owned())?;
            if event.id() == "0" {
                gate.notified().await;
            }
            Ok(())
        }
    };
    let minute = Duration::from_secs(60);
    let consumer = Consumer::new(Arc::clone(&bus), "orders", "billing").on_any(handler);
    let consumer = consumer.timeout(minute * 10).drain(minute * 10);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(consumer.run(async { drop(stopped.await) }));
    assert_eq!(calls.recv().await.unwrap(), "0");

    let mut other = bus.subscribe(request()).await.unwrap();
    assert!(timeout(minute, other.next_batch(1)).await.is_err(), "a call is running");
    other.close().await.unwrap();
    bus.publish(event(1)).await.unwrap();
    let next = timeout(minute, calls.recv()).await.expect("it does not wait for the call");
    assert_eq!(next.unwrap(), "1");

    release.notify_one();
    until_settled(&bus).await;
    drop(stop);
    let summary = running.await.unwrap().unwrap();
    assert_eq!((summary.handled, summary.failed), (2, 0), "the call counts that ran all the while");
}

/// A bus whose subscriptions deliver one batch and then fail; counts how often they were read.
#[derive(Clone, Debug)]
struct Away {
    inner: Arc<dyn EventBus>,
    reads: Arc<AtomicU32>,
}

#[derive(Debug)]
struct AwayAfterOne {
    inner: Box<dyn Subscription>,
    reads: Arc<AtomicU32>,
}

#[async_trait]
impl Subscription for AwayAfterOne {
    async fn next_batch(&mut self, max: usize) -> Result<Vec<Delivery>, BusError> {
        match self.reads.fetch_add(1, Ordering::SeqCst) {
            0 => self.inner.next_batch(max).await,
            _ => Err(BusError::new(ErrorKind::Unavailable, "away")),
        }
    }

    async fn record_attempt(&mut self, delivery: &Delivery) -> Result<(), BusError> {
        self.inner.record_attempt(delivery).await
    }

    async fn close(&mut self) -> Result<(), BusError> {
        self.inner.close().await
    }
}

#[async_trait]
impl EventBus for Away {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn publish_batch(&self, batch: Vec<Event>) -> Confirmations {
        self.inner.publish_batch(batch).await
    }

    async fn open_writer(&self, id: WriterId) -> Result<Box<dyn LogWriter>, BusError> {
        self.inner.open_writer(id).await
    }

    async fn subscribe(&self, request: SubscribeRequest) -> Result<Box<dyn Subscription>, BusError> {
        let inner = self.inner.subscribe(request).await?;
        Ok(Box::new(AwayAfterOne { inner, reads: Arc::clone(&self.reads) }))
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

/// Catches the mutant that reads again whenever a failed event is due: a broker that is away would be asked for each.
#[tokio::test(start_paused = true)]
async fn reading_backs_off_whatever_else_is_due() {
    let inner = bus();
    inner.publish_all((0..30).map(event).collect()).await;
    let reads = Arc::new(AtomicU32::new(0));
    let bus: Arc<dyn EventBus> = Arc::new(Away { inner, reads: Arc::clone(&reads) });
    let failures: Arc<Mutex<u32>> = Arc::default();
    let notes = Arc::clone(&failures);
    let handler = move |_: Event, _: Context| {
        *notes.lock().unwrap() += 1;
        async { Err(HandlerError::of_event("no")) }
    };
    let consumer = Consumer::new(bus, "orders", "billing").on_any(handler);
    consumer.run(tokio::time::sleep(Duration::from_secs(4))).await.unwrap();
    assert!(*failures.lock().unwrap() > 100, "many retries were due");
    // 100 ms, doubled each time, shortened by a fifth at most: five waits and a sixth that has not ended.
    let reads = reads.load(Ordering::SeqCst);
    assert!((6..=8).contains(&reads), "{reads} reads");
}
