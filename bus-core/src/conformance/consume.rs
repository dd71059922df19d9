//! The consumer on this bus: failures, dead letters and shutdown, end to end.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio::{sync::oneshot, task::JoinHandle};

use super::{
    Fixture,
    kit::{by_key, event, events, group, ids, topic},
    publish::refuses_to_subscribe,
    settle::dead_letters,
};
use crate::{
    BusError, Consumer, ConsumerSummary, Context, Event, EventBus, HandlerError, RetryPolicy, Topic,
    dead_letter::{DEAD_ATTEMPTS, DEAD_REASON, Selection, retry_dead},
};

/// Waits of a few milliseconds, so that attempts are spent soon.
fn hasty(attempts: u32) -> RetryPolicy {
    RetryPolicy { attempts, backoff_min: Duration::from_millis(5), backoff_max: Duration::from_millis(20) }
}

/// A consumer on a task of its own, and what its handler was called with.
struct Running {
    calls: Arc<Mutex<Vec<Event>>>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<ConsumerSummary, BusError>>,
}

impl Running {
    fn start<F>(bus: &Arc<dyn EventBus>, topic: &Topic, group_name: &str, retry: RetryPolicy, answer: F) -> Self
    where
        F: AsyncAnswer,
    {
        let calls: Arc<Mutex<Vec<Event>>> = Arc::default();
        let (stop, stopped) = oneshot::channel();
        let (notes, answer) = (Arc::clone(&calls), Arc::new(answer));
        let handler = move |event: Event, context: Context| {
            notes.lock().expect("not poisoned").push(event.clone());
            let answer = Arc::clone(&answer);
            async move { answer.answer(event, context).await }
        };
        let consumer = Consumer::new(Arc::clone(bus), &**topic, group_name)
            .on_any(handler)
            .retry(retry)
            .timeout(Duration::from_millis(500))
            .drain(Duration::from_secs(5));
        let task = tokio::spawn(consumer.run(async move { drop(stopped.await) }));
        Self { calls, stop, task }
    }

    fn calls(&self) -> Vec<Event> {
        self.calls.lock().expect("not poisoned").clone()
    }

    async fn until_called(&self, fixture: &Fixture, what: &str, done: impl Fn(&[Event]) -> bool) {
        fixture.until(what, async || done(&self.calls()).then_some(())).await;
    }

    async fn stop(self, fixture: &Fixture) -> ConsumerSummary {
        drop(self.stop);
        fixture.within("the consumer's end", self.task).await.expect("no panic").expect("an orderly end")
    }
}

/// A closure that answers a call, boxed.
trait AsyncAnswer: Send + Sync + 'static {
    fn answer(
        &self,
        event: Event,
        context: Context,
    ) -> futures_util::future::BoxFuture<'static, Result<(), HandlerError>>;
}

impl<F, Fut> AsyncAnswer for F
where
    F: Fn(Event, Context) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<(), HandlerError>> + Send + 'static,
{
    fn answer(
        &self,
        event: Event,
        context: Context,
    ) -> futures_util::future::BoxFuture<'static, Result<(), HandlerError>> {
        Box::pin(self(event, context))
    }
}

/// One key fails for a while: its later events wait, all others are handled meanwhile, and in the end all are.
pub async fn a_failure_holds_its_key_and_only_that(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().subscribe {
        return refuses_to_subscribe(fixture, &bus).await;
    }
    fixture.declare(&bus, &topic, &["workers"]).await;
    let healed = Arc::new(AtomicU32::new(0));
    let gate = Arc::clone(&healed);
    let running = Running::start(&bus, &topic, "workers", hasty(u32::MAX), move |event: Event, _| {
        let fails = event.key() == Some("key-0") && gate.load(Ordering::SeqCst) == 0;
        async move { if fails { Err(HandlerError::of_event("not yet")) } else { Ok(()) } }
    });
    let all = events(&topic, 8, 5);
    fixture.publish(&bus, all.clone()).await;
    let others_done = |calls: &[Event]| calls.iter().filter(|event| event.key() != Some("key-0")).count() == 35;
    running.until_called(fixture, "the other keys", others_done).await;
    let held = |calls: &[Event]| calls.iter().filter(|event| event.key() == Some("key-0")).count() >= 3;
    running.until_called(fixture, "retries", held).await;
    let of_the_key = by_key(&running.calls()).remove("key-0").unwrap_or_default();
    assert!(of_the_key.iter().all(|id| id == "key-0-0"), "overtaken: {of_the_key:?}");
    healed.store(1, Ordering::SeqCst);
    let last_done = |calls: &[Event]| calls.iter().any(|event| event.id() == "key-0-4");
    running.until_called(fixture, "the held key", last_done).await;
    let calls = running.calls();
    let summary = running.stop(fixture).await;
    assert_eq!((summary.handled, summary.dead), (40, 0));
    let mut order = by_key(&calls).remove("key-0").unwrap_or_default();
    order.dedup();
    assert_eq!(order, (0..5).map(|n| format!("key-0-{n}")).collect::<Vec<_>>());
}

/// An event that panics and one that hangs are dead-lettered after their attempts; their neighbours are handled.
pub async fn what_panics_or_hangs_is_given_up_and_the_rest_goes_on(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().subscribe {
        return refuses_to_subscribe(fixture, &bus).await;
    }
    fixture.declare(&bus, &topic, &["workers"]).await;
    let running = Running::start(&bus, &topic, "workers", hasty(2), |event: Event, _| async move {
        match event.key() {
            Some("panics") => panic!("a poison event"),
            Some("hangs") => std::future::pending().await,
            _ => Ok(()),
        }
    });
    let mut all = vec![event(&topic, "panics", 0), event(&topic, "hangs", 0), event(&topic, "panics", 1)];
    all.extend(events(&topic, 6, 2));
    fixture.publish(&bus, all).await;
    // Healthy events keep coming: an outage would look the same as two events that fail and nothing else.
    let healthy = {
        let (bus, topic) = (Arc::clone(&bus), topic.clone());
        tokio::spawn(async move {
            use crate::EventBusExt;
            for n in 0.. {
                assert!(bus.publish(event(&topic, "healthy", n)).await.is_ok());
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
    };
    let dead = dead_letters(fixture, &bus, &topic, "workers", 3).await;
    healthy.abort();
    let mut dead_ids = ids(&dead);
    dead_ids.sort();
    assert_eq!(dead_ids, ["hangs-0", "panics-0", "panics-1"]);
    assert!(dead.iter().all(|dead| dead.extension(DEAD_REASON) == Some("attempts")));
    assert!(dead.iter().all(|dead| dead.extension(DEAD_ATTEMPTS) == Some("2")));
    let others =
        |calls: &[Event]| calls.iter().filter(|event| event.key().is_some_and(|k| k.starts_with("key-"))).count() == 12;
    running.until_called(fixture, "the healthy events", others).await;
    running.stop(fixture).await;
}

/// A dead letter that is retried is handled by its group, once, and unseen by the other.
pub async fn a_dead_letter_is_retried_for_its_group_alone(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().subscribe {
        return refuses_to_subscribe(fixture, &bus).await;
    }
    fixture.declare(&bus, &topic, &["billing", "shipping"]).await;
    let healed = Arc::new(AtomicU32::new(0));
    let gate = Arc::clone(&healed);
    let billing = Running::start(&bus, &topic, "billing", hasty(1), move |_, _| {
        let fails = gate.load(Ordering::SeqCst) == 0;
        async move { if fails { Err(HandlerError::permanent("closed")) } else { Ok(()) } }
    });
    let shipping = Running::start(&bus, &topic, "shipping", hasty(1), |_, _| async { Ok(()) });
    fixture.publish(&bus, vec![event(&topic, "a", 0), event(&topic, "b", 0)]).await;
    dead_letters(fixture, &bus, &topic, "billing", 2).await;
    healed.store(1, Ordering::SeqCst);

    let one = Selection::Ids(vec!["b-0".into()]);
    let revival = fixture.within("retrying", retry_dead(&bus, &topic, &group("billing"), &one, false)).await;
    let revival = revival.expect("dead letters are retried");
    assert_eq!((revival.retried, revival.failed.len()), (1, 0));
    let again = |calls: &[Event]| calls.iter().filter(|event| event.id() == "b-0").count() == 2;
    billing.until_called(fixture, "the retried event", again).await;
    dead_letters(fixture, &bus, &topic, "billing", 1).await;
    // What is published after the retry is behind it for the other group as well.
    let count = super::kit::partitions(&bus, &topic).await.get() as usize;
    fixture.publish(&bus, events(&topic, count * 4, 1)).await;
    shipping.until_called(fixture, "later events", |calls| calls.len() == 2 + count * 4).await;
    assert_eq!(shipping.calls().iter().filter(|event| event.id() == "b-0").count(), 1, "seen by another group");
    billing.stop(fixture).await;
    assert_eq!(shipping.stop(fixture).await.skipped, 1);
}

/// A consumer that is stopped while it works finishes what runs and gives back the rest: nothing is lost, and nothing
/// that was handled comes again.
pub async fn a_consumer_that_stops_loses_nothing(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().subscribe {
        return refuses_to_subscribe(fixture, &bus).await;
    }
    fixture.declare(&bus, &topic, &["workers"]).await;
    let all = events(&topic, 10, 20);
    fixture.publish(&bus, all.clone()).await;
    let mut calls: Vec<Event> = Vec::new();
    while calls.len() < all.len() {
        let running = Running::start(&bus, &topic, "workers", hasty(3), |_, _| async {
            tokio::time::sleep(Duration::from_millis(1)).await;
            Ok(())
        });
        running.until_called(fixture, "some calls", |calls| calls.len() >= 30.min(all.len())).await;
        let notes = Arc::clone(&running.calls);
        let handled = running.stop(fixture).await.handled;
        let called = notes.lock().expect("not poisoned").clone();
        assert_eq!(handled as usize, called.len(), "what was begun is finished");
        calls.extend(called);
        if all.len() - calls.len() < 30 {
            let last = Running::start(&bus, &topic, "workers", hasty(3), |_, _| async { Ok(()) });
            let rest = all.len() - calls.len();
            last.until_called(fixture, "the rest", |calls| calls.len() >= rest).await;
            calls.extend(last.calls());
            last.stop(fixture).await;
        }
    }
    assert_eq!(by_key(&calls), by_key(&all), "each event once, each key in order");
}
