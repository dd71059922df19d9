#![doc = include_str!("../README.md")]

mod append;
mod error;
mod topics;
mod log;
mod cursor;
mod lanes;
mod wake;
#[cfg(feature = "conformance")]
pub mod conformance;
mod relay;
#[cfg(feature = "sqlite")]
mod sqlite;

pub use append::{EVENT_BYTES_MAX, Insert, Outbox, OutboxConfig, OutboxTx};
pub use cursor::{Cursor, HOLE_RANGES_MAX};
pub use error::{AppendError, AppendErrorReason, LogError, LogErrorKind};
pub use lanes::{Counts, OnFailure};
pub use log::{
    Acquire, Acquisition, Blocked, Change, DeadColumns, DeadRow, DeadState, EventKey, InvalidRow, Lease, LogAdmin,
    LogSource, Owned, Page, PageLimit, Probe, Pruned, ReadRows, Request, RequestKind, RequestProgress, Row, Selected,
    SetAside, Sink, SinkStatus, Start,
};
pub use relay::{LEASE_MIN, Progress, Relay, RelayConfig, RelayError, RelayEvent, RelaySummary};
#[cfg(feature = "sqlite")]
pub use sqlite::{
    Deduplicated, Inbox, SqliteLog, Tables, log_error as sqlite_error, migrate, print_migrations, sqlite_options,
};
pub use topics::TopicPattern;
pub use wake::{Awakened, Wake};
