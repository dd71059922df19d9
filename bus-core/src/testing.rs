//! For the tests of code that publishes: a bus that records.

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;

use crate::{
    BusAdmin, BusError, Capabilities, Confirmations, Event, EventBus, Health, InMemoryBus, LogWriter, Receipt,
    SubscribeRequest, Subscription, WriterId,
};

/// A bus that confirms everything it is given and remembers it, in order.
///
/// # Examples
///
/// ```
/// use std::sync::Arc;
/// use bus_core::{Event, EventBus, EventBusExt, testing::RecordingBus};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let recording = RecordingBus::new();
/// let bus: Arc<dyn EventBus> = Arc::new(recording.clone());
/// bus.publish(Event::json("orders", "order.placed", &7)?).await?;
/// assert_eq!(recording.published()[0].event_type(), "order.placed");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct RecordingBus {
    published: Arc<Mutex<Vec<Event>>>,
    /// Answers everything but plain publishing.
    inner: InMemoryBus,
}

impl RecordingBus {
    /// A bus that has recorded nothing yet.
    pub fn new() -> Self {
        Self { published: Arc::default(), inner: InMemoryBus::new() }
    }

    /// What was published so far, in order.
    pub fn published(&self) -> Vec<Event> {
        self.published.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Default for RecordingBus {
    fn default() -> Self {
        Self::new()
    }
}

#[deny(clippy::missing_trait_methods)]
#[async_trait]
impl EventBus for RecordingBus {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn publish_batch(&self, batch: Vec<Event>) -> Confirmations {
        let len = batch.len();
        self.published.lock().unwrap_or_else(PoisonError::into_inner).extend(batch);
        Confirmations::same(len, Ok(Receipt::default()))
    }

    async fn open_writer(&self, _id: WriterId) -> Result<Box<dyn LogWriter>, BusError> {
        Ok(Box::new(crate::PlainWriter::new(Arc::new(self.clone()))))
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
