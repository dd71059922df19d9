//! [`Consumer`]: a subscription and its handlers. Written once, for all brokers: what a failure, a panic, a time-out or
//! a shutdown means is decided here, and the broker's crate only delivers and settles.

mod lanes;
mod router;
mod run;

use std::{collections::HashSet, fmt, sync::Arc, time::Duration};

use serde::de::DeserializeOwned;

use crate::{
    BusError, Context, ErrorKind, EventBus, EventType, Group, Handler, HandlerError, RetryPolicy, SubscribeFrom,
    SubscribeRequest, Topic,
};
use router::{Router, Typed};

pub use router::Unknown;

/// Delivers the events of a topic to handlers, on behalf of a consumer group.
///
/// # Ordering
///
/// Events of one key are handled one at a time and in order, different keys in parallel up to
/// [`concurrency`](Consumer::concurrency). A failed call holds its key while it waits to be repeated; other keys go on.
///
/// # Errors
///
/// What a handler's error means is said at [`HandlerError`]. A panic, or a call longer than
/// [`timeout`](Consumer::timeout), is a retryable error of that attempt. After the last attempt the event is
/// dead-lettered. When ten keys in a row fail retryably, or all in hand but at least two, something they all need is
/// away: the consumer pauses, tries one event at a time with back-off, and spends no attempts until one succeeds. A
/// topic with a single active key cannot tell an outage from a bad event: it gives up after the last attempt.
///
/// # Examples
///
/// ```
/// use std::sync::Arc;
/// use bus_core::{Consumer, Event, EventBus, EventBusExt, InMemoryBus};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let bus: Arc<dyn EventBus> = Arc::new(InMemoryBus::new());
/// bus.publish(Event::json("orders", "order.placed", &7)?.key("order-7")).await?;
///
/// let (sender, mut handled) = tokio::sync::mpsc::channel(1);
/// let consumer = Consumer::new(bus, "orders", "billing").on_any(move |event: Event, _context| {
///     let sender = sender.clone();
///     async move { Ok(sender.send(event.id().to_owned()).await?) }
/// });
/// let summary = consumer.run(async move { drop(handled.recv().await) }).await?;
/// assert_eq!(summary.handled, 1);
/// # Ok(())
/// # }
/// ```
pub struct Consumer {
    bus: Arc<dyn EventBus>,
    topic: String,
    group: String,
    router: Router,
    registered_twice: HashSet<&'static str>,
    unknown: Unknown,
    from: SubscribeFrom,
    concurrency: usize,
    retry: RetryPolicy,
    timeout: Duration,
    drain: Duration,
    window_events: Option<usize>,
    window_bytes: Option<usize>,
}

/// What a consumer did, from its start to its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConsumerSummary {
    /// Events that were handled.
    pub handled: u64,
    /// Calls of a handler that failed.
    pub failed: u64,
    /// Events that were dead-lettered.
    pub dead: u64,
    /// Events acknowledged because no handler takes their type.
    pub unknown: u64,
    /// Events passed over because another group alone should handle them.
    pub skipped: u64,
}

impl Consumer {
    /// A consumer of `topic` for `group`, without handlers yet.
    pub fn new(bus: Arc<dyn EventBus>, topic: impl Into<String>, group: impl Into<String>) -> Self {
        Self {
            bus,
            topic: topic.into(),
            group: group.into(),
            router: Router::default(),
            registered_twice: HashSet::new(),
            unknown: Unknown::default(),
            from: SubscribeFrom::default(),
            concurrency: 64,
            retry: RetryPolicy::default(),
            timeout: Duration::from_secs(30),
            drain: Duration::from_secs(10),
            window_events: None,
            window_bytes: None,
        }
    }

    /// Handles events of `T`'s type with `handler`, which gets the decoded data. Data that does not decode is
    /// dead-lettered.
    pub fn on<T, F, Fut>(mut self, handler: F) -> Self
    where
        T: EventType + DeserializeOwned + Send + 'static,
        F: Fn(T, Context) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<(), HandlerError>> + Send + 'static,
    {
        if !self.router.on(T::TYPE, Arc::new(Typed::<T, F>::new(handler))) {
            self.registered_twice.insert(T::TYPE);
        }
        self
    }

    /// Handles events of all types that no other handler takes.
    pub fn on_any(mut self, handler: impl Handler) -> Self {
        if !self.router.on_any(Arc::new(handler)) {
            self.registered_twice.insert("any");
        }
        self
    }

    /// Sets what happens to types no handler takes. Default: acknowledged and counted.
    pub fn unknown(mut self, unknown: Unknown) -> Self {
        self.unknown = unknown;
        self
    }

    /// Sets where the group begins if it does not exist yet. Default: with the oldest event.
    pub fn from(mut self, from: SubscribeFrom) -> Self {
        self.from = from;
        self
    }

    /// Sets how many handlers run at a time. Default 64.
    pub fn concurrency(mut self, concurrency: usize) -> Self {
        self.concurrency = concurrency;
        self
    }

    /// Sets how often a failed call is repeated, and when.
    pub fn retry(mut self, retry: RetryPolicy) -> Self {
        self.retry = retry;
        self
    }

    /// Sets how long one call may take. Default 30 s.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sets how long running handlers are waited for when the consumer stops or a partition moves on. Default 10 s.
    pub fn drain(mut self, drain: Duration) -> Self {
        self.drain = drain;
        self
    }

    /// Sets how many events and bytes of each partition may be in this process. Default 1,024 and 8 MiB.
    pub fn window(mut self, events: usize, bytes: usize) -> Self {
        (self.window_events, self.window_bytes) = (Some(events), Some(bytes));
        self
    }

    /// Runs until `shutdown` completes, then stops reading, lets running handlers finish, and leaves the group in order.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] before anything is read: no handler, one type with two handlers, a bad name, a bus that
    /// cannot deliver. [`ErrorKind::Closed`] when the bus was closed under it. An outage of the broker is no error: the
    /// consumer goes on when it heals.
    ///
    /// # Cancel safety
    ///
    /// Dropping it is a crash: handlers are dropped, unsettled events come again elsewhere.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<ConsumerSummary, BusError> {
        let request = self.request()?;
        run::run(self, request, shutdown).await
    }

    fn request(&self) -> Result<SubscribeRequest, BusError> {
        let invalid = |message: String| BusError::new(ErrorKind::Invalid, message);
        if self.router.is_empty() {
            return Err(invalid("the consumer has no handler: add one with `on` or `on_any`".into()));
        }
        if let Some(twice) = self.registered_twice.iter().next() {
            return Err(invalid(format!(
                "type `{twice}` has two handlers: independent handlers are groups of their own"
            )));
        }
        if self.retry.attempts == 0 || self.concurrency == 0 {
            return Err(invalid("`attempts` and `concurrency` must be at least 1".into()));
        }
        let defaults = SubscribeRequest::new(Topic::new(&self.topic)?, Group::new(&self.group)?);
        Ok(SubscribeRequest {
            from: self.from,
            drain: self.drain,
            window_events: self.window_events.unwrap_or(defaults.window_events),
            window_bytes: self.window_bytes.unwrap_or(defaults.window_bytes),
            ..defaults
        })
    }
}

impl fmt::Debug for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumer")
            .field("topic", &self.topic)
            .field("group", &self.group)
            .field("router", &self.router)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
