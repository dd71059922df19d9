//! [`EventBus`]: the contract between those who implement a bus and those who publish and consume.

use std::{collections::BTreeMap, fmt, num::NonZeroU32, sync::Arc};

use async_trait::async_trait;

use crate::{
    BusAdmin, BusError, Confirmations, ErrorKind, Event, EventError, LogWriter, Outcome, Receipt, SubscribeRequest,
    Subscription, WriterId,
};

/// Partitions of a topic that is created without saying how many.
pub const DEFAULT_PARTITIONS: NonZeroU32 = NonZeroU32::new(8).expect("8 is not 0");

/// Carries events to other processes: the minimum a broker's crate must write.
///
/// What can be said in its terms once for all brokers is in [`EventBusExt`] and [`Consumer`](crate::Consumer).
///
/// # Ordering
///
/// Events of one topic with equal keys go to one partition, `(murmur2(key) & 0x7fffffff) mod partitions` on every
/// broker, and are delivered in the order in which their batches were handed over.
#[async_trait]
pub trait EventBus: fmt::Debug + Send + Sync + 'static {
    /// The promises this bus keeps beyond the contract.
    fn capabilities(&self) -> Capabilities;

    /// Hands `batch` to the broker, after every batch handed over before, and promises its outcomes.
    ///
    /// Awaiting the call is the hand-over: it waits its turn for capacity, then queues the whole batch at once. A batch
    /// larger than the whole window is admitted alone.
    ///
    /// # Shape
    ///
    /// The confirmations yield one outcome per event of the batch, each with its index. An empty batch is answered
    /// with no outcomes and no network traffic.
    ///
    /// # Ordering
    ///
    /// The order of batches is the order in which hand-overs complete. Where event *k* of a key fails, what follows *k*
    /// in its batch with the same key fails too, if the bus is [`OrderOnFailure::FailStop`].
    ///
    /// # Errors
    ///
    /// `Ok` means the broker confirmed that it stored and routed the event. Any error leaves the event's fate unknown
    /// to the caller, who may publish it again under the same id. Every outcome resolves: after the bus's confirm
    /// time-out to [`ErrorKind::Timeout`], after [`close`](EventBus::close) to [`ErrorKind::Closed`].
    ///
    /// # Cancel safety
    ///
    /// Dropped before it completes, nothing was sent, or all of it. Dropping the confirmations recalls nothing.
    async fn publish_batch(&self, batch: Vec<Event>) -> Confirmations;

    /// Opens the way by which a relay publishes a log: the broker learns where in which log an event stands, and one
    /// that can remember it drops duplicates and fences owners of the past.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Fenced`], with the epoch that was met, if a writer of a higher epoch opened this log for this sink.
    async fn open_writer(&self, id: WriterId) -> Result<Box<dyn LogWriter>, BusError>;

    /// Joins a consumer group as a new member. When it returns, the start of a group that did not exist is fixed: what is
    /// published from then on will be delivered.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] where the bus cannot deliver, or not from where the request says.
    async fn subscribe(&self, request: SubscribeRequest) -> Result<Box<dyn Subscription>, BusError>;

    /// Topics, groups, lag and dead letters.
    fn admin(&self) -> &dyn BusAdmin;

    /// Asks the broker whether it serves, and what an operator should know of it.
    async fn ping(&self) -> Result<Health, BusError>;

    /// Ends the bus: later calls answer [`ErrorKind::Closed`], open subscriptions end. Closing twice is fine.
    async fn close(&self) -> Result<(), BusError>;
}

fn _event_bus_is_object_safe(_: &dyn EventBus) {}

/// What happens to the events behind one that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OrderOnFailure {
    /// The bus itself keeps later events of the key from landing before the failed one was published again.
    FailStop,
    /// One event may fail and the next of its key land: a publisher that needs the order keeps one of a key in flight.
    Independent,
}

/// The few facts about a bus that code reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// What happens to the events behind one that failed.
    pub order_on_failure: OrderOnFailure,
    /// Confirmed events survive the end of the broker's process.
    pub persistent: bool,
    /// Groups can subscribe; false for a bus that only stores.
    pub subscribe: bool,
    /// A new group can read what was published before it existed.
    pub replay: bool,
    /// The broker remembers a log's writer: it drops what it already stored and fences lower epochs.
    pub remembers_writers: bool,
    /// The broker counts how often it delivered an event again.
    pub counts_redeliveries: bool,
    /// Largest event, as [`Event::size_bytes`] counts.
    pub event_bytes_max: usize,
}

impl Capabilities {
    /// Refuses a bus that lacks what configuration demands by name: `persistent`, `replay`, `remembers_writers`,
    /// `counts_redeliveries`, `subscribe`, `fail_stop`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] with the sentence that says what is lacking, or that a name is unknown.
    pub fn require(&self, names: &[String]) -> Result<(), BusError> {
        for name in names {
            let has = match name.as_str() {
                "persistent" => self.persistent,
                "replay" => self.replay,
                "remembers_writers" => self.remembers_writers,
                "counts_redeliveries" => self.counts_redeliveries,
                "subscribe" => self.subscribe,
                "fail_stop" => self.order_on_failure == OrderOnFailure::FailStop,
                _ => {
                    let known = "persistent, replay, remembers_writers, counts_redeliveries, subscribe, fail_stop";
                    let message = format!("`require` names an unknown capability `{name}`; known are: {known}");
                    return Err(BusError::new(ErrorKind::Invalid, message));
                }
            };
            if !has {
                let message =
                    format!("this bus is not `{name}`, which `require` demands: choose another bus or drop the demand");
                return Err(BusError::new(ErrorKind::Invalid, message));
            }
        }
        Ok(())
    }
}

/// What a broker says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// What an operator should know, by name: a version, a replication factor. Never a secret.
    pub facts: BTreeMap<&'static str, String>,
}

/// What everyone who holds a bus can do with it, written once in terms of [`EventBus`].
#[async_trait]
pub trait EventBusExt {
    /// Publishes one event and waits until the broker stored and routed it.
    ///
    /// # Errors
    ///
    /// As [`EventBus::publish_batch`]; [`ErrorKind::Invalid`] if a builder was passed whose event breaks a rule.
    async fn publish<E>(&self, event: E) -> Outcome
    where
        E: TryInto<Event> + Send,
        E::Error: Into<EventError>;

    /// Publishes `events` in order and waits for every outcome, in the same order.
    async fn publish_all(&self, events: Vec<Event>) -> Vec<Outcome>;

    /// A handle that can only publish.
    fn publisher(&self) -> Publisher;
}

#[async_trait]
impl EventBusExt for Arc<dyn EventBus> {
    async fn publish<E>(&self, event: E) -> Outcome
    where
        E: TryInto<Event> + Send,
        E::Error: Into<EventError>,
    {
        let event = event.try_into().map_err(Into::into)?;
        let outcomes = self.publish_all(vec![event]).await;
        outcomes.into_iter().next().unwrap_or(Ok(Receipt::default()))
    }

    async fn publish_all(&self, events: Vec<Event>) -> Vec<Outcome> {
        self.publish_batch(events).await.all().await
    }

    fn publisher(&self) -> Publisher {
        Publisher(Arc::clone(self))
    }
}

/// A handle on a bus that can only publish: for code that should not subscribe, seek or close.
#[derive(Clone, Debug)]
pub struct Publisher(Arc<dyn EventBus>);

impl Publisher {
    /// As [`EventBusExt::publish`].
    pub async fn publish<E>(&self, event: E) -> Outcome
    where
        E: TryInto<Event> + Send,
        E::Error: Into<EventError>,
    {
        self.0.publish(event).await
    }

    /// As [`EventBusExt::publish_all`].
    pub async fn publish_all(&self, events: Vec<Event>) -> Vec<Outcome> {
        self.0.publish_all(events).await
    }

    /// As [`EventBus::publish_batch`].
    pub async fn publish_batch(&self, batch: Vec<Event>) -> Confirmations {
        self.0.publish_batch(batch).await
    }
}

/// A batch, split into what may go to the broker and what is refused before.
#[derive(Debug, Default)]
pub struct AdmittedBatch {
    /// The events that may go, each with its index in the batch.
    pub events: Vec<(usize, Event)>,
    /// The outcomes of the others, by their index in the batch.
    pub refused: Vec<(usize, Outcome)>,
}

/// Refuses events above `event_bytes_max` and, for a [`OrderOnFailure::FailStop`] bus, every later event of a refused
/// one's key.
pub fn admit_batch(batch: Vec<Event>, event_bytes_max: usize, order: OrderOnFailure) -> AdmittedBatch {
    let mut admitted = AdmittedBatch { events: Vec::with_capacity(batch.len()), refused: Vec::new() };
    let mut stopped: Vec<Event> = Vec::new();
    for (index, event) in batch.into_iter().enumerate() {
        let same_key = |other: &Event| other.key().is_some() && other.key() == event.key();
        if event.size_bytes() > event_bytes_max {
            admitted.refused.push((index, Err(too_large(&event, event_bytes_max))));
            if order == OrderOnFailure::FailStop {
                stopped.push(event);
            }
        } else if stopped.iter().any(|other| same_key(other) && other.topic() == event.topic()) {
            let message = "held back: an earlier event of its key was refused";
            admitted.refused.push((index, Err(BusError::new(ErrorKind::Unavailable, message))));
        } else {
            admitted.events.push((index, event));
        }
    }
    admitted
}

/// The verdict on an event larger than a bus takes.
pub fn too_large(event: &Event, event_bytes_max: usize) -> BusError {
    let message = format!("event {} has {} bytes; this bus takes {event_bytes_max}", event.id(), event.size_bytes());
    BusError::new(ErrorKind::TooLarge, message)
}
