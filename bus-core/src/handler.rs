//! [`Handler`]: application code for one event.

use std::{error::Error, fmt};

use async_trait::async_trait;

use crate::{Event, Group, Ownership};

/// Application code for one event. Implemented by closures, `|event, context| async move { ... }`, and nested by
/// wrappers.
///
/// An event can arrive more than once: a handler is idempotent, or is wrapped in one that recognises duplicates.
///
/// # Cancel safety
///
/// A call is dropped when its time-out passes, and when the consumer's shutdown takes too long.
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    /// Handles `event`. An error says whether to call again; see [`HandlerError`].
    async fn handle(&self, event: &Event, context: &Context) -> Result<(), HandlerError>;
}

#[async_trait]
impl<F, Fut> Handler for F
where
    F: Fn(Event, Context) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<(), HandlerError>> + Send,
{
    async fn handle(&self, event: &Event, context: &Context) -> Result<(), HandlerError> {
        self(event.clone(), context.clone()).await
    }
}

/// What a handler is told of the delivery beside the event.
#[derive(Clone, Debug)]
pub struct Context {
    event: Event,
    group: Group,
    attempt: u32,
    partition: u32,
    ownership: Ownership,
}

impl Context {
    /// The context of one call.
    pub fn new(event: Event, group: Group, attempt: u32, partition: u32, ownership: Ownership) -> Self {
        Self { event, group, attempt, partition, ownership }
    }

    /// The event, with all its attributes.
    pub fn event(&self) -> &Event {
        &self.event
    }

    /// The group on whose behalf it is handled.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// Which call this is, from 1.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// The partition it came from.
    pub fn partition(&self) -> u32 {
        self.partition
    }

    /// Completes when the partition has moved on to another member, which will handle the event again: long work can
    /// stop.
    pub async fn lost(&self) {
        self.ownership.lost().await;
    }
}

/// Why a handler failed, and whether to call it again.
///
/// Every [`std::error::Error`] converts into a retryable one, so `?` retries.
pub struct HandlerError {
    kind: HandlerErrorKind,
    error: Box<dyn Error + Send + Sync>,
}

/// What a consumer does about a failed call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandlerErrorKind {
    /// Calls again later; many of them are a sign that something the handlers need is away.
    Retryable,
    /// Calls again later, but never takes it for a sign of an outage.
    OfEvent,
    /// Dead-letters the event: no further call can succeed.
    Permanent,
    /// Dead-letters the event: its data is not what its type says.
    Undecodable,
}

impl HandlerError {
    /// An error after which the handler is called again. For what is no [`std::error::Error`], such as a string.
    pub fn retryable(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { kind: HandlerErrorKind::Retryable, error: error.into() }
    }

    /// A retryable error that this event is to blame for, and not something all events need.
    pub fn of_event(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { kind: HandlerErrorKind::OfEvent, error: error.into() }
    }

    /// An error that no further call can mend: the event is dead-lettered.
    pub fn permanent(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { kind: HandlerErrorKind::Permanent, error: error.into() }
    }

    /// The data does not decode: the event is dead-lettered.
    pub fn undecodable(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { kind: HandlerErrorKind::Undecodable, error: error.into() }
    }

    /// What a consumer does about it.
    pub fn kind(&self) -> HandlerErrorKind {
        self.kind
    }
}

/// Not implemented for `HandlerError` itself to be an `Error`: this conversion would then collide with the identity.
impl<E: Error + Send + Sync + 'static> From<E> for HandlerError {
    fn from(error: E) -> Self {
        Self::retryable(error)
    }
}

impl fmt::Display for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.error, f)
    }
}

impl fmt::Debug for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HandlerError").field("kind", &self.kind).field("error", &self.error).finish()
    }
}
