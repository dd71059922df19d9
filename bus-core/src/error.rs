//! [`BusError`]: a kind to act on, a message to read, a source to debug.

use std::{borrow::Cow, error::Error, fmt, sync::Arc};

use crate::EventError;

/// Why something failed, as far as a caller can act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ErrorKind {
    /// The broker cannot be reached or cannot serve now: away, full, blocked.
    Unavailable,
    /// No answer in time: the event may have been stored or may yet be.
    Timeout,
    /// The broker has nowhere to put the event yet, such as no queue bound to its exchange.
    Unroutable,
    /// The event is larger than the broker takes.
    TooLarge,
    /// The broker looked at this event and refused it.
    Refused,
    /// Another owner with a higher epoch writes this log now.
    Fenced,
    /// The request itself is wrong, or this bus cannot do it.
    Invalid,
    /// The bus or subscription was closed on this side.
    Closed,
}

impl ErrorKind {
    /// Whether the same call can succeed later without being changed.
    pub fn is_retryable(self) -> bool {
        match self {
            Self::Unavailable | Self::Timeout | Self::Unroutable | Self::Refused => true,
            Self::TooLarge | Self::Fenced | Self::Invalid | Self::Closed => false,
        }
    }

    /// Whether it is a verdict on the single event, and so costs it one of its attempts.
    ///
    /// An outage spends none: it says nothing about the event.
    pub fn spends_attempt(self) -> bool {
        match self {
            Self::TooLarge | Self::Invalid | Self::Refused => true,
            Self::Unavailable | Self::Timeout | Self::Unroutable | Self::Fenced | Self::Closed => false,
        }
    }

    /// The kind in lower case with underscores, as JSON and metric labels have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unavailable => "unavailable",
            Self::Timeout => "timeout",
            Self::Unroutable => "unroutable",
            Self::TooLarge => "too_large",
            Self::Refused => "refused",
            Self::Fenced => "fenced",
            Self::Invalid => "invalid",
            Self::Closed => "closed",
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An error of a bus. Cheap to clone: a batch that fails as a whole shares one.
///
/// Its message names the thing and, where there is one, the remedy; never a payload or a secret.
#[derive(Clone)]
pub struct BusError(Arc<Inner>);

struct Inner {
    kind: ErrorKind,
    message: Cow<'static, str>,
    fence: Option<u64>,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl BusError {
    /// An error of `kind`.
    pub fn new(kind: ErrorKind, message: impl Into<Cow<'static, str>>) -> Self {
        Self(Arc::new(Inner { kind, message: message.into(), fence: None, source: None }))
    }

    /// An error of `kind` that `source` caused.
    pub fn with_source(
        kind: ErrorKind,
        message: impl Into<Cow<'static, str>>,
        source: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> Self {
        Self(Arc::new(Inner { kind, message: message.into(), fence: None, source: Some(source.into()) }))
    }

    /// The answer to a writer whose epoch is below `epoch`, which the broker holds.
    pub fn fenced_by(epoch: u64) -> Self {
        let message = format!("a writer with epoch {epoch} owns this log now");
        Self(Arc::new(Inner { kind: ErrorKind::Fenced, message: message.into(), fence: Some(epoch), source: None }))
    }

    /// The answer of a bus or subscription that was closed.
    pub fn closed() -> Self {
        Self::new(ErrorKind::Closed, "the bus is closed")
    }

    /// What a caller acts on.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The epoch that a fenced writer met.
    pub fn fence(&self) -> Option<u64> {
        self.0.fence
    }

    /// Whether the same call can succeed later without being changed.
    pub fn is_retryable(&self) -> bool {
        self.kind().is_retryable()
    }

    /// Whether it is a verdict on the single event, and so costs it one of its attempts.
    pub fn spends_attempt(&self) -> bool {
        self.kind().spends_attempt()
    }
}

impl fmt::Display for BusError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for BusError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BusError")
            .field("kind", &self.0.kind)
            .field("message", &self.0.message)
            .field("fence", &self.0.fence)
            .field("source", &self.0.source)
            .finish()
    }
}

impl Error for BusError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.0.source.as_deref().map(|source| source as &(dyn Error + 'static))
    }
}

impl From<EventError> for BusError {
    fn from(error: EventError) -> Self {
        Self::with_source(ErrorKind::Invalid, error.to_string(), error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_verdict_on_the_event_spends_an_attempt() {
        use ErrorKind::*;
        let all = [Unavailable, Timeout, Unroutable, TooLarge, Refused, Fenced, Invalid, Closed];
        let spending: Vec<_> = all.into_iter().filter(|kind| kind.spends_attempt()).collect();
        assert_eq!(spending, [TooLarge, Refused, Invalid]);
        let retryable: Vec<_> = all.into_iter().filter(|kind| kind.is_retryable()).collect();
        assert_eq!(retryable, [Unavailable, Timeout, Unroutable, Refused]);
    }
}
