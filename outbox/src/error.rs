//! [`LogError`] and [`AppendError`]: a kind to act on, a message to read, a source to debug.

use std::{borrow::Cow, error::Error, fmt};

use bus_core::EventError;

/// Why a log could not be read or written, as far as a caller can act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogErrorKind {
    /// The database is away, busy or full now.
    Unavailable,
    /// Another owner has the lease: this one's epoch is over.
    Fenced,
    /// The tables are missing, older or newer than this build, or no database is there at all.
    Schema,
    /// The database does not let us write.
    Denied,
    /// The request is wrong.
    Invalid,
}

impl LogErrorKind {
    /// Whether the same call can succeed later without anybody changing something on purpose.
    pub fn may_heal(self) -> bool {
        match self {
            Self::Unavailable | Self::Fenced => true,
            Self::Schema | Self::Denied | Self::Invalid => false,
        }
    }
}

/// An error of a log. Its message names the thing and the remedy; never a payload or a secret.
pub struct LogError {
    kind: LogErrorKind,
    message: Cow<'static, str>,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl LogError {
    /// An error of `kind`.
    pub fn new(kind: LogErrorKind, message: impl Into<Cow<'static, str>>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// An error of `kind` that `source` caused.
    pub fn with_source(
        kind: LogErrorKind,
        message: impl Into<Cow<'static, str>>,
        source: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> Self {
        Self { kind, message: message.into(), source: Some(source.into()) }
    }

    /// What a caller acts on.
    pub fn kind(&self) -> LogErrorKind {
        self.kind
    }
}

impl fmt::Display for LogError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl fmt::Debug for LogError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogError")
            .field("kind", &self.kind)
            .field("message", &self.message)
            .field("source", &self.source)
            .finish()
    }
}

impl Error for LogError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn Error + 'static))
    }
}

/// Why events were not appended. Nothing of the batch is in the transaction's log then; roll it back.
#[derive(Debug)]
pub struct AppendError {
    index: usize,
    reason: AppendErrorReason,
}

/// The reason of an [`AppendError`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AppendErrorReason {
    /// An event breaks a rule.
    #[error(transparent)]
    Event(#[from] EventError),
    /// The connection does not wait for the disk at commit, so a power cut could take back what was published.
    #[error(
        "the connection runs with PRAGMA synchronous below FULL, so a power cut could take back events that are \
         published already: set `synchronous(SqliteSynchronous::Full)`, or `allow_relaxed_sync` if you accept that"
    )]
    NotDurable,
    /// The connection is in no transaction, so the events would not stand or fall with what they are about.
    #[error("the connection is in no transaction: append within the one that writes what the events are about")]
    NotInTransaction,
    /// The database failed.
    #[error(transparent)]
    Log(#[from] LogError),
}

impl AppendError {
    pub(crate) fn new(index: usize, reason: impl Into<AppendErrorReason>) -> Self {
        Self { index, reason: reason.into() }
    }

    /// The same, of a batch that stands behind so many events.
    #[cfg(feature = "postgres")]
    pub(crate) fn behind(self, events: usize) -> Self {
        Self { index: events + self.index, ..self }
    }

    /// The event at fault, by its index in the batch; 0 where it is the batch as a whole.
    pub fn index(&self) -> usize {
        self.index
    }

    /// What is wrong.
    pub fn reason(&self) -> &AppendErrorReason {
        &self.reason
    }
}

/// The batch as a whole: for those who adopt another driver.
impl From<LogError> for AppendError {
    fn from(error: LogError) -> Self {
        Self::new(0, error)
    }
}

impl fmt::Display for AppendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.reason {
            AppendErrorReason::Event(error) => write!(f, "event {}: {error}", self.index),
            reason => fmt::Display::fmt(reason, f),
        }
    }
}

impl Error for AppendError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.reason.source()
    }
}
