//! [`NotingBus`]: a bus that confirms at once and keeps nothing, so that only the relay and its database are measured.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use async_trait::async_trait;
use bus_core::{
    BusAdmin, BusError, Capabilities, Confirmations, Event, EventBus, Health, InMemoryBus, LogWriter, PlainWriter,
    Receipt, SubscribeRequest, Subscription, WriterId,
};

/// Tells what was handed over: how many events at once.
#[derive(Clone)]
pub(crate) struct NotingBus {
    note: Arc<dyn Fn(usize) + Send + Sync>,
    inner: InMemoryBus,
}

impl NotingBus {
    pub(crate) fn new(note: impl Fn(usize) + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { note: Arc::new(note), inner: InMemoryBus::new() })
    }

    /// Notes nothing.
    pub(crate) fn silent() -> Arc<Self> {
        Self::new(|_| {})
    }
}

impl fmt::Debug for NotingBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NotingBus")
    }
}

#[async_trait]
impl EventBus for NotingBus {
    fn capabilities(&self) -> Capabilities {
        Capabilities { remembers_writers: false, ..self.inner.capabilities() }
    }

    async fn publish_batch(&self, batch: Vec<Event>) -> Confirmations {
        (self.note)(batch.len());
        Confirmations::same(batch.len(), Ok(Receipt::default()))
    }

    async fn open_writer(&self, _id: WriterId) -> Result<Box<dyn LogWriter>, BusError> {
        Ok(Box::new(PlainWriter::new(Arc::new(self.clone()))))
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

/// When batches were handed over, and how many events each had.
#[derive(Clone, Debug, Default)]
pub(crate) struct Arrivals(Arc<Mutex<Vec<(Instant, usize)>>>);

impl Arrivals {
    pub(crate) fn bus(&self) -> Arc<NotingBus> {
        let arrivals = Arc::clone(&self.0);
        NotingBus::new(move |events| {
            arrivals.lock().unwrap_or_else(PoisonError::into_inner).push((Instant::now(), events));
        })
    }

    /// Events a second from the first batch to the last: without what comes before the first, however few they are.
    pub(crate) fn rate(&self) -> anyhow::Result<f64> {
        let arrivals = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let [(first, _), rest @ .., (last, _)] = &arrivals[..] else { anyhow::bail!("fewer than two batches") };
        let later: usize = rest.iter().chain(arrivals.last()).map(|(_, events)| events).sum();
        Ok(later as f64 / (*last - *first).as_secs_f64())
    }
}
