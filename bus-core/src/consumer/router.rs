//! Which handler takes an event.

use std::{collections::HashMap, fmt, marker::PhantomData, sync::Arc};

use async_trait::async_trait;
use serde::de::DeserializeOwned;

use crate::{Context, Event, EventType, Handler, HandlerError};

/// What happens to an event whose type no handler takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unknown {
    /// It is acknowledged and counted.
    #[default]
    Ack,
    /// It is dead-lettered with reason `unknown`.
    DeadLetter,
}

/// Handlers by type, and one for all other types.
#[derive(Clone, Default)]
pub(super) struct Router {
    by_type: HashMap<&'static str, Arc<dyn Handler>>,
    any: Option<Arc<dyn Handler>>,
}

impl Router {
    /// Registers a handler; false if there is one for this type already.
    pub(super) fn on(&mut self, event_type: &'static str, handler: Arc<dyn Handler>) -> bool {
        self.by_type.insert(event_type, handler).is_none()
    }

    /// Registers the handler of all other types; false if there is one already.
    pub(super) fn on_any(&mut self, handler: Arc<dyn Handler>) -> bool {
        self.any.replace(handler).is_none()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_type.is_empty() && self.any.is_none()
    }

    /// The handler for `event`.
    pub(super) fn route(&self, event: &Event) -> Option<&Arc<dyn Handler>> {
        self.by_type.get(event.event_type()).or(self.any.as_ref())
    }
}

impl fmt::Debug for Router {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let types: Vec<_> = self.by_type.keys().collect();
        f.debug_struct("Router").field("types", &types).field("any", &self.any.is_some()).finish()
    }
}

/// Decodes the data and calls a closure with it.
pub(super) struct Typed<T, F> {
    handler: F,
    event: PhantomData<fn() -> T>,
}

impl<T, F> Typed<T, F> {
    pub(super) fn new(handler: F) -> Self {
        Self { handler, event: PhantomData }
    }
}

#[async_trait]
impl<T, F, Fut> Handler for Typed<T, F>
where
    T: EventType + DeserializeOwned + Send + 'static,
    F: Fn(T, Context) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<(), HandlerError>> + Send,
{
    async fn handle(&self, event: &Event, context: &Context) -> Result<(), HandlerError> {
        let value: T = event.decode().map_err(HandlerError::undecodable)?;
        (self.handler)(value, context.clone()).await
    }
}
