//! [`InMemoryBus`]: a bus inside one process, with the same rules as a broker.

mod admin;
mod state;
mod subscription;
mod writer;

use std::{
    collections::HashMap,
    fmt,
    num::NonZeroU32,
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use async_trait::async_trait;
use tokio::sync::{Notify, watch};
use url::Url;

use crate::{
    BusAdmin, BusError, Capabilities, Confirmations, ErrorKind, Event, EventBus, Health, LogWriter, OrderOnFailure,
    Outcome, Receipt, SubscribeRequest, Subscription, WriterId,
    bus::{AdmittedBatch, DEFAULT_PARTITIONS, admit_batch},
    url_options::UrlOptions,
};
use state::{Full, State, Turn};

/// Settings of an in-memory bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InMemoryConfig {
    /// Partitions of topics that are created without saying how many. Default 8.
    pub partitions: NonZeroU32,
    /// Events a partition keeps. When it is full the oldest goes that every group has settled; where there is none,
    /// publishing waits for the slowest group. Default 100,000.
    pub partition_events_max: usize,
    /// Bytes a partition keeps, likewise. Default 64 MiB.
    pub partition_bytes_max: usize,
    /// Largest event in bytes. Default 1 MiB.
    pub event_bytes_max: usize,
    /// How long publishing waits for room. Default 30 s.
    pub confirm_timeout: Duration,
}

impl Default for InMemoryConfig {
    fn default() -> Self {
        Self {
            partitions: DEFAULT_PARTITIONS,
            partition_events_max: 100_000,
            partition_bytes_max: 64 << 20,
            event_bytes_max: 1 << 20,
            confirm_timeout: Duration::from_secs(30),
        }
    }
}

impl InMemoryConfig {
    /// Reads the options of a `memory://` URL: `?partitions=4`, each field by its name.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] for an unknown option or a bad value, naming it.
    pub fn from_url(url: &Url) -> Result<Self, BusError> {
        let mut options = UrlOptions::new(url)?;
        let defaults = Self::default();
        let config = Self {
            partitions: options.take("partitions")?.unwrap_or(defaults.partitions),
            partition_events_max: options.take("partition_events_max")?.unwrap_or(defaults.partition_events_max),
            partition_bytes_max: options.take("partition_bytes_max")?.unwrap_or(defaults.partition_bytes_max),
            event_bytes_max: options.take("event_bytes_max")?.unwrap_or(defaults.event_bytes_max),
            confirm_timeout: options.take_duration("confirm_timeout")?.unwrap_or(defaults.confirm_timeout),
        };
        options.finish()?;
        Ok(config)
    }
}

/// A bus inside one process: topics, partitions, groups with fair ownership, redelivery and dead letters, by the same
/// rules as a broker. What it holds ends with the process.
///
/// Clones are one client; [`named`](InMemoryBus::named) gives further clients of the same bus.
#[derive(Clone)]
pub struct InMemoryBus {
    shared: Arc<Shared>,
    closed: Arc<watch::Sender<bool>>,
}

struct Shared {
    state: Mutex<State>,
    /// Told when a full partition may have room.
    room: Notify,
}

static NAMED: LazyLock<Mutex<HashMap<String, Weak<Shared>>>> = LazyLock::new(Mutex::default);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code of a user runs while the lock is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for InMemoryBus {
    fn default() -> Self {
        Self::new()
    }
}

impl InMemoryBus {
    /// A bus of its own, with the default settings.
    pub fn new() -> Self {
        Self::with_config(InMemoryConfig::default())
    }

    /// A bus of its own.
    pub fn with_config(config: InMemoryConfig) -> Self {
        let state = Mutex::new(State::new(config));
        Self::of(Arc::new(Shared { state, room: Notify::new() }))
    }

    /// A further client of the bus of that name in this process; `config` counts where it does not exist yet. The bus
    /// lives as long as one of its clients.
    pub fn named(name: &str, config: InMemoryConfig) -> Self {
        let mut named = NAMED.lock().unwrap_or_else(PoisonError::into_inner);
        named.retain(|_, bus| bus.strong_count() > 0);
        if let Some(shared) = named.get(name).and_then(Weak::upgrade) {
            return Self::of(shared);
        }
        let bus = Self::with_config(config);
        named.insert(name.to_owned(), Arc::downgrade(&bus.shared));
        bus
    }

    /// The bus of a URL: `memory://` is one of its own, `memory://name` one shared in the process.
    ///
    /// # Errors
    ///
    /// As [`InMemoryConfig::from_url`].
    pub fn from_url(url: &Url) -> Result<Self, BusError> {
        let config = InMemoryConfig::from_url(url)?;
        match url.host_str() {
            Some(name) => Ok(Self::named(name, config)),
            None => Ok(Self::with_config(config)),
        }
    }

    fn of(shared: Arc<Shared>) -> Self {
        Self { shared, closed: Arc::new(watch::Sender::new(false)) }
    }

    fn is_closed(&self) -> bool {
        *self.closed.borrow()
    }

    async fn until_closed(&self) {
        // The sender lives as long as `self`, so waiting cannot fail.
        let _ = self.closed.subscribe().wait_for(|closed| *closed).await;
    }

    /// Waits for its turns and for room, then stores what `store` does under the lock, all at once.
    async fn hand_over<T>(
        &self,
        turns: Vec<Turn>,
        store: impl FnMut(&mut State) -> Option<T> + Send,
    ) -> Result<T, BusError>
    where
        T: Send,
    {
        let timeout = self.shared.lock().config().confirm_timeout;
        tokio::select! {
            biased;
            () = self.until_closed() => Err(BusError::closed()),
            stored = tokio::time::timeout(timeout, self.store_when_room(turns, store)) => stored.map_err(|_| {
                let message = "a partition is full and its slowest group did not move on: run its consumer, or remove the group";
                BusError::new(ErrorKind::Timeout, message)
            }),
        }
    }

    async fn store_when_room<T>(&self, turns: Vec<Turn>, mut store: impl FnMut(&mut State) -> Option<T>) -> T {
        let mut taken = Vec::with_capacity(turns.len());
        for turn in turns {
            taken.push(turn.lock_owned().await);
        }
        loop {
            let mut room = std::pin::pin!(self.shared.room.notified());
            room.as_mut().enable();
            if let Some(stored) = store(&mut self.shared.lock()) {
                return stored;
            }
            room.await;
        }
    }
}

#[async_trait]
impl EventBus for InMemoryBus {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            order_on_failure: OrderOnFailure::FailStop,
            persistent: false,
            subscribe: true,
            replay: true,
            remembers_writers: true,
            counts_redeliveries: true,
            event_bytes_max: self.shared.lock().config().event_bytes_max,
        }
    }

    async fn publish_batch(&self, batch: Vec<Event>) -> Confirmations {
        let len = batch.len();
        if len == 0 {
            return Confirmations::ready(Vec::new());
        }
        let capabilities = self.capabilities();
        let AdmittedBatch { events: admitted, refused } =
            admit_batch(batch, capabilities.event_bytes_max, capabilities.order_on_failure);
        let turns = self.shared.lock().turns(&admitted);
        let (indexes, events): (Vec<usize>, Vec<Event>) = admitted.into_iter().unzip();
        let mut events = Some(events);
        let stored = self.hand_over(turns, |state| try_publish(state, &mut events)).await;
        merge(len, &indexes, stored.map(|()| Receipt::default()), refused)
    }

    async fn open_writer(&self, id: WriterId) -> Result<Box<dyn LogWriter>, BusError> {
        writer::MemoryWriter::open(self.clone(), &id).map(|writer| Box::new(writer) as Box<dyn LogWriter>)
    }

    async fn subscribe(&self, request: SubscribeRequest) -> Result<Box<dyn Subscription>, BusError> {
        subscription::MemorySubscription::join(self.clone(), request)
            .map(|subscription| Box::new(subscription) as Box<dyn Subscription>)
    }

    fn admin(&self) -> &dyn BusAdmin {
        self
    }

    async fn ping(&self) -> Result<Health, BusError> {
        if self.is_closed() { Err(BusError::closed()) } else { Ok(Health::default()) }
    }

    async fn close(&self) -> Result<(), BusError> {
        self.closed.send_replace(true);
        Ok(())
    }
}

/// Publishes the events, or puts them back for the next time when there is no room.
fn try_publish(state: &mut State, events: &mut Option<Vec<Event>>) -> Option<()> {
    match state.publish(events.take()?) {
        Ok(()) => Some(()),
        Err((Full, returned)) => {
            *events = Some(returned);
            None
        }
    }
}

/// The outcomes of a batch: `stored` for the events at `indexes`, `refused` for the others.
fn merge(
    len: usize,
    indexes: &[usize],
    stored: Result<Receipt, BusError>,
    refused: Vec<(usize, Outcome)>,
) -> Confirmations {
    if refused.is_empty() {
        return Confirmations::same(len, stored);
    }
    let mut outcomes: Vec<Outcome> = vec![stored; len];
    debug_assert_eq!(indexes.len() + refused.len(), len);
    for (index, outcome) in refused {
        outcomes[index] = outcome;
    }
    Confirmations::ready(outcomes)
}

impl fmt::Debug for InMemoryBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let topics: Vec<String> = self.shared.lock().topics().iter().map(|topic| topic.topic.to_string()).collect();
        f.debug_struct("InMemoryBus").field("topics", &topics).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::poll;

    use super::*;
    use crate::{EventBusExt, Group, Topic};

    fn event(topic: &str, n: usize) -> Event {
        Event::builder(topic, "order.placed").id(n).key("one").build().unwrap()
    }

    /// A bus whose partitions keep two events.
    fn narrow() -> Arc<dyn EventBus> {
        let config = InMemoryConfig { partition_events_max: 2, ..InMemoryConfig::default() };
        Arc::new(InMemoryBus::with_config(config))
    }

    fn request(topic: &str) -> SubscribeRequest {
        SubscribeRequest::new(Topic::new(topic).unwrap(), Group::new("billing").unwrap())
    }

    /// Catches the mutant with one turn for all: whoever waits for room in a topic would keep all others from theirs. And
    /// the one without turns: what was published to the full topic later would be stored first.
    #[tokio::test]
    async fn a_full_topic_keeps_its_own_publishers_waiting_and_no_others() {
        let bus = narrow();
        let mut member = bus.subscribe(request("orders")).await.unwrap();
        bus.publish_all(vec![event("orders", 0), event("orders", 1)]).await;
        let mut first = bus.publish_batch(vec![event("orders", 2), event("orders", 3)]);
        let mut second = bus.publish_batch(vec![event("orders", 4)]);
        assert!(poll!(&mut first).is_pending() && poll!(&mut second).is_pending());
        let mut other = bus.publish_batch(vec![event("invoices", 0)]);
        assert!(poll!(&mut other).is_ready(), "another topic has room");

        for n in 0..2 {
            let mut read = member.next_batch(1).await.unwrap();
            assert_eq!(read[0].event().id(), n.to_string());
            read.remove(0).ack();
            assert!(poll!(&mut second).is_pending(), "it has room, but not its turn");
        }
        assert!(poll!(&mut first).is_ready());
    }

    /// Catches the mutant that takes turns in the order of the batch: two that name their topics the other way round
    /// would wait for each other.
    #[tokio::test(start_paused = true)]
    async fn batches_that_span_topics_do_not_wait_for_each_other() {
        let bus = narrow();
        let mut member = bus.subscribe(request("orders")).await.unwrap();
        bus.publish_all(vec![event("orders", 0), event("orders", 1)]).await;
        bus.publish(event("invoices", 0)).await.unwrap();
        // Waits for room with the turn of orders, so that those behind stand in line for what they take first.
        let mut full = bus.publish_batch(vec![event("orders", 2)]);
        let mut there = bus.publish_batch(vec![event("orders", 3), event("invoices", 1)]);
        let mut back = bus.publish_batch(vec![event("invoices", 2), event("orders", 4)]);
        assert!(poll!(&mut full).is_pending() && poll!(&mut there).is_pending() && poll!(&mut back).is_pending());
        let reading = async {
            loop {
                member.next_batch(1).await.unwrap().remove(0).ack();
            }
        };
        let publishing = async {
            for confirmations in [full.await, there.await, back.await] {
                assert!(confirmations.all().await.iter().all(Result::is_ok), "they waited for each other");
            }
        };
        tokio::select! {
            () = publishing => {}
            () = reading => {}
        }
    }
}
