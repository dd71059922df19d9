//! Spans and counters, in wrappers around the contract, so that they stand between nobody's lines.
//!
//! Metrics go to the `metrics` facade; spans follow OpenTelemetry's messaging conventions. Labels never carry keys or
//! ids, and nothing carries a payload.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use metrics::{Counter, Histogram, counter, histogram};
use tracing::{Instrument, info_span};

use crate::{
    BusAdmin, BusError, Capabilities, Confirmations, Delivery, Event, EventBus, Group, Health, LogWriter, Mark,
    Outcome, Position, Seq, SubscribeRequest, Subscription, Text, Topic, WriterId,
};

/// A bus whose publishing is traced and counted.
#[derive(Debug)]
pub struct ObservedBus<B> {
    inner: B,
    /// What spans call the broker: `kafka`, `rabbitmq`, `redis`, `memory`.
    system: &'static str,
}

impl<B: EventBus> ObservedBus<B> {
    /// Observes `inner`, a bus of `system`.
    pub fn new(inner: B, system: &'static str) -> Self {
        Self { inner, system }
    }
}

#[deny(clippy::missing_trait_methods)]
#[async_trait]
impl<B: EventBus> EventBus for ObservedBus<B> {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn publish_batch(&self, batch: Vec<Event>) -> Confirmations {
        let span = publish_span(self.system, batch.len(), batch.first());
        counted(self.inner.publish_batch(batch).instrument(span).await)
    }

    async fn open_writer(&self, id: WriterId) -> Result<Box<dyn LogWriter>, BusError> {
        let inner = self.inner.open_writer(id).await?;
        Ok(Box::new(ObservedWriter { inner, system: self.system }))
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
struct ObservedWriter {
    inner: Box<dyn LogWriter>,
    system: &'static str,
}

#[deny(clippy::missing_trait_methods)]
#[async_trait]
impl LogWriter for ObservedWriter {
    async fn publish_batch(&mut self, batch: Vec<(Seq, Event)>, mark: &Mark) -> Confirmations {
        let span = publish_span(self.system, batch.len(), batch.first().map(|(_, event)| event));
        counted(self.inner.publish_batch(batch, mark).instrument(span).await)
    }

    async fn republish(&mut self, batch: Vec<Event>) -> Confirmations {
        let span = publish_span(self.system, batch.len(), batch.first());
        counted(self.inner.republish(batch).instrument(span).await)
    }

    fn position(&self) -> Position {
        self.inner.position()
    }

    fn high_marks(&self) -> Vec<(Seq, Text)> {
        self.inner.high_marks()
    }

    async fn close(&mut self) -> Result<(), BusError> {
        self.inner.close().await
    }
}

fn publish_span(system: &'static str, count: usize, first: Option<&Event>) -> tracing::Span {
    info_span!(
        "publish",
        messaging.system = system,
        messaging.operation.r#type = "send",
        messaging.batch.message_count = count,
        messaging.destination.name = first.map(|event| event.topic().as_ref()),
    )
}

fn counted(confirmations: Confirmations) -> Confirmations {
    let (published, duplicates) = (counter!("outbus_published_total"), counter!("outbus_duplicates_total"));
    confirmations.inspect(move |outcome: &Outcome| match outcome {
        Ok(receipt) if receipt.already_stored => duplicates.increment(1),
        Ok(_) => published.increment(1),
        Err(error) => counter!("outbus_publish_failures_total", "kind" => error.kind().as_str()).increment(1),
    })
}

/// The counters of one consumer.
#[derive(Clone)]
pub(crate) struct ConsumerMetrics(Arc<ConsumerCounters>);

struct ConsumerCounters {
    topic: String,
    group: String,
    redeliveries: Counter,
    handler_seconds: Histogram,
}

impl ConsumerMetrics {
    pub(crate) fn new(topic: &Topic, group: &Group) -> Self {
        let (topic, group) = (topic.to_string(), group.to_string());
        let labels = || [("topic", topic.clone()), ("group", group.clone())];
        let redeliveries = counter!("outbus_redeliveries_total", &labels());
        let handler_seconds = histogram!("outbus_handler_seconds", &labels());
        Self(Arc::new(ConsumerCounters { topic, group, redeliveries, handler_seconds }))
    }

    /// A delivery arrived.
    pub(crate) fn delivered(&self, delivery: &Delivery) {
        if delivery.attempt() > 1 || delivery.suspect() {
            self.0.redeliveries.increment(1);
        }
    }

    /// A handler's call ended.
    pub(crate) fn called(&self, took: Duration) {
        self.0.handler_seconds.record(took.as_secs_f64());
    }

    /// A delivery was decided, or a call failed.
    pub(crate) fn consumed(&self, result: &'static str) {
        let labels = [("topic", self.0.topic.clone()), ("group", self.0.group.clone()), ("result", result.to_owned())];
        counter!("outbus_consumed_total", &labels).increment(1);
    }
}
