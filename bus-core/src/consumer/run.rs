//! The consumer's loop: I/O around the decisions of [`Lanes`].

use std::{
    any::Any,
    collections::{HashMap, VecDeque},
    panic::AssertUnwindSafe,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use tokio::{task::JoinSet, time::sleep_until};

use super::{
    Consumer, ConsumerSummary, Unknown,
    lanes::{Action, Answer, Arrival, Lanes, Slot},
    router::Router,
};
use crate::{
    BusError, Context, DeadCause, DeadReason, Delivery, FOREVER, Group, Handler, HandlerErrorKind, Ownership,
    RetryPolicy, SubscribeRequest, Subscription, dead_letter::ONLY_GROUP, now, observed::ConsumerMetrics,
};

/// Deliveries asked for at once.
const BATCH_MAX: usize = 256;

pub(super) async fn run(
    consumer: Consumer,
    request: SubscribeRequest,
    shutdown: impl Future<Output = ()>,
) -> Result<ConsumerSummary, BusError> {
    let subscription = consumer.bus.subscribe(request.clone()).await?;
    let mut session = Session {
        subscription,
        lanes: Lanes::new(consumer.retry, consumer.concurrency),
        router: consumer.router,
        unknown: consumer.unknown,
        group: request.group.clone(),
        timeout: consumer.timeout,
        retry: consumer.retry,
        metrics: ConsumerMetrics::new(&request.topic, &request.group),
        deliveries: HashMap::new(),
        calls: JoinSet::new(),
        partitions: HashMap::new(),
        draining: FuturesUnordered::new(),
        read_failures: 0,
        read_again: None,
        next_slot: 0,
        summary: ConsumerSummary::default(),
    };
    let ended = session.consume(shutdown).await;
    session.finish(consumer.drain).await;
    let closed = session.subscription.close().await;
    ended.and(closed).map(|()| session.summary)
}

struct Session {
    subscription: Box<dyn Subscription>,
    lanes: Lanes,
    router: Router,
    unknown: Unknown,
    group: Group,
    timeout: Duration,
    retry: RetryPolicy,
    metrics: ConsumerMetrics,
    deliveries: HashMap<Slot, Delivery>,
    calls: JoinSet<(Slot, Answer)>,
    /// The hold under which deliveries of each partition arrived last.
    partitions: HashMap<u32, Ownership>,
    /// One per hold: completes when the partition should move on.
    draining: FuturesUnordered<BoxFuture<'static, (u32, Ownership)>>,
    read_failures: u32,
    read_again: Option<Instant>,
    next_slot: Slot,
    summary: ConsumerSummary,
}

impl Session {
    /// Reads, calls and settles until `shutdown` completes or the subscription ends.
    async fn consume(&mut self, shutdown: impl Future<Output = ()>) -> Result<(), BusError> {
        let mut shutdown = pin!(shutdown);
        loop {
            let started = now();
            let actions = self.lanes.start(started);
            self.act(actions).await;
            let due = [self.lanes.next_due(started), self.read_again].into_iter().flatten().min();
            tokio::select! {
                () = &mut shutdown => return Ok(()),
                Some(called) = self.calls.join_next() => self.answered(called).await,
                Some((partition, ownership)) = self.draining.next() => self.drain(partition, &ownership).await,
                read = self.subscription.next_batch(BATCH_MAX), if self.read_again.is_none() => self.arrived(read)?,
                () = sleep_until(due.unwrap_or(started + FOREVER).into()) => {
                    self.read_again = self.read_again.filter(|again| *again > now());
                }
            }
        }
    }

    /// Lets running handlers finish for at most `drain`; what is left is released.
    async fn finish(&mut self, drain: Duration) {
        let released = self.lanes.stop();
        self.act(released).await;
        let deadline = tokio::time::Instant::now() + drain.min(FOREVER);
        while let Ok(Some(called)) = tokio::time::timeout_at(deadline, self.calls.join_next()).await {
            self.answered(called).await;
        }
        self.calls.shutdown().await;
        self.deliveries.clear();
    }

    fn arrived(&mut self, read: Result<Vec<Delivery>, BusError>) -> Result<(), BusError> {
        match read {
            Ok(batch) => {
                self.read_failures = 0;
                batch.into_iter().for_each(|delivery| self.take(delivery));
                Ok(())
            }
            Err(error) if error.is_retryable() => {
                self.read_failures += 1;
                tracing::warn!(group = %self.group, %error, "cannot read; trying again");
                self.read_again = Some(now() + self.retry.backoff(self.read_failures, fastrand::f64()));
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn take(&mut self, delivery: Delivery) {
        self.watch(delivery.partition(), delivery.ownership());
        self.metrics.delivered(&delivery);
        if delivery.event().extension(ONLY_GROUP).is_some_and(|group| group != &*self.group) {
            self.summary.skipped += 1;
            self.metrics.consumed("skipped");
            return delivery.ack();
        }
        if self.router.route(delivery.event()).is_none() {
            return self.settle_unknown(delivery);
        }
        let slot = self.next_slot;
        self.next_slot += 1;
        self.lanes.arrived(Arrival {
            slot,
            partition: delivery.partition(),
            key: delivery.event().parts().key.clone(),
            attempt: delivery.attempt(),
            suspect: delivery.suspect(),
        });
        self.deliveries.insert(slot, delivery);
    }

    fn settle_unknown(&mut self, delivery: Delivery) {
        match self.unknown {
            Unknown::Ack => {
                self.summary.unknown += 1;
                self.metrics.consumed("unknown");
                delivery.ack();
            }
            Unknown::DeadLetter => {
                self.summary.dead += 1;
                self.metrics.consumed("dead");
                let error = format!("no handler takes type {}", delivery.event().event_type());
                delivery.dead_letter(DeadReason { cause: DeadCause::Unknown, error, attempts: 0 });
            }
        }
    }

    /// Learns of a partition's hold with its first delivery.
    fn watch(&mut self, partition: u32, ownership: &Ownership) {
        if self.partitions.get(&partition).is_some_and(|known| known.is_same(ownership)) {
            return;
        }
        self.partitions.insert(partition, ownership.clone());
        self.lanes.owned(partition);
        let ownership = ownership.clone();
        self.draining.push(Box::pin(async move {
            ownership.draining().await;
            (partition, ownership)
        }));
    }

    /// A partition should move on: gives back what is not running.
    async fn drain(&mut self, partition: u32, ownership: &Ownership) {
        if self.partitions.get(&partition).is_some_and(|current| current.is_same(ownership)) {
            // Should it stay after all, its next delivery tells.
            self.partitions.remove(&partition);
            let released = self.lanes.drain(partition);
            self.act(released).await;
        }
    }

    async fn act(&mut self, actions: Vec<Action>) {
        let mut actions = VecDeque::from(actions);
        while let Some(action) = actions.pop_front() {
            match action {
                Action::Call { slot, attempt } => self.call(slot, attempt),
                Action::Record { slot } => actions.extend(self.record(slot).await),
                Action::Ack { slot } => {
                    self.summary.handled += 1;
                    self.metrics.consumed("handled");
                    self.settle(slot, Delivery::ack);
                }
                Action::DeadLetter { slot, reason } => {
                    self.summary.dead += 1;
                    self.metrics.consumed("dead");
                    self.settle(slot, |delivery| delivery.dead_letter(reason));
                }
                Action::Release { slot } => self.settle(slot, Delivery::release),
            }
        }
    }

    fn settle(&mut self, slot: Slot, decide: impl FnOnce(Delivery)) {
        if let Some(delivery) = self.deliveries.remove(&slot) {
            decide(delivery);
        }
    }

    /// Makes an attempt durable; answers what to do then.
    async fn record(&mut self, slot: Slot) -> Vec<Action> {
        let Some(delivery) = self.deliveries.get(&slot) else { return Vec::new() };
        let recorded = self.subscription.record_attempt(delivery).await;
        if let Err(error) = &recorded {
            tracing::warn!(group = %self.group, %error, "cannot record an attempt; the event waits");
        }
        self.lanes.recorded(slot, recorded.is_ok(), now(), fastrand::f64())
    }

    fn call(&mut self, slot: Slot, attempt: u32) {
        let Some(delivery) = self.deliveries.get(&slot) else { return };
        let Some(handler) = self.router.route(delivery.event()) else { return };
        let context = Context::new(
            delivery.event().clone(),
            self.group.clone(),
            attempt,
            delivery.partition(),
            delivery.ownership().clone(),
        );
        self.calls.spawn(call(Arc::clone(handler), context, self.timeout, slot, self.metrics.clone()));
    }

    async fn answered(&mut self, called: Result<(Slot, Answer), tokio::task::JoinError>) {
        // A call catches its own panic, so joining fails only for calls that were aborted at the end.
        let Ok((slot, answer)) = called else { return };
        if let (Answer::Failed { kind, error }, Some(delivery)) = (&answer, self.deliveries.get(&slot)) {
            self.summary.failed += 1;
            self.metrics.consumed("failed");
            tracing::warn!(group = %self.group, event = delivery.event().id(), ?kind, %error, "a handler failed");
        }
        let was_paused = self.lanes.is_paused();
        let actions = self.lanes.answered(slot, answer, now(), fastrand::f64());
        if !was_paused && self.lanes.is_paused() {
            tracing::warn!(group = %self.group, "all keys fail: pausing until one event is handled");
        }
        self.act(actions).await;
    }
}

/// Calls a handler; a panic and a passed time-out are errors of this attempt.
async fn call(
    handler: Arc<dyn Handler>,
    context: Context,
    timeout: Duration,
    slot: Slot,
    metrics: ConsumerMetrics,
) -> (Slot, Answer) {
    let started = now();
    let event = context.event().clone();
    let failed = |kind, error| Answer::Failed { kind, error };
    // All code of the user runs in here: the handler before its future exists, its drop, and the error's text as well.
    let answer = AssertUnwindSafe(async {
        match tokio::time::timeout(timeout, handler.handle(&event, &context)).await {
            Ok(Ok(())) => Answer::Handled,
            Ok(Err(error)) => failed(error.kind(), error.to_string()),
            Err(_) => failed(HandlerErrorKind::Retryable, format!("took longer than {timeout:?}")),
        }
    });
    let answer = answer
        .catch_unwind()
        .await
        .unwrap_or_else(|panic| failed(HandlerErrorKind::Retryable, format!("panicked: {}", panic_message(&*panic))));
    metrics.called(started.elapsed());
    (slot, answer)
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&'static str>().copied()).unwrap_or("without a message")
}
