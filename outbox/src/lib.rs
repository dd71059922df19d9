#![cfg_attr(feature = "sqlite", doc = include_str!("../README.md"))]
#![cfg_attr(
    not(feature = "sqlite"),
    doc = "A transactional outbox; without a database there is little of it.",
    allow(dead_code)
)]

mod tables;
mod append;
mod error;
mod topics;
mod log;
mod rows;
mod marks;
mod cursor;
mod in_order;
mod lanes;
mod wake;
mod reader;
#[cfg(feature = "conformance")]
pub mod conformance;
mod relay;
mod inbox;
#[cfg(feature = "sqlite")]
mod sqlite;
#[cfg(feature = "postgres")]
mod postgres;

pub use append::{EVENT_BYTES_MAX, Insert, Outbox, OutboxConfig, OutboxTx};
pub use cursor::{Cursor, HOLE_RANGES_MAX};
pub use error::{AppendError, AppendErrorReason, LogError, LogErrorKind};
pub use inbox::{Deduplicated, Effect, Inbox, InboxPool};
pub use lanes::{Counts, OnFailure};
pub use log::{
    Acquire, Acquisition, Blocked, Change, DeadColumns, DeadRest, DeadRow, DeadState, EventKey, InvalidRow, Lease,
    LogAdmin, LogSource, OldestTransaction, Owned, Page, PageLimit, Probe, Pruned, ReadRows, Request, RequestKind,
    RequestProgress, Row, Selected, SetAside, Sink, SinkStatus, Start,
};
#[cfg(feature = "postgres")]
pub use postgres::{
    PostgresConfig, PostgresLog, PostgresRows, PostgresTransaction, PreparedAppend, log_error as postgres_error,
    migrate as migrate_postgres, print_migrations as print_postgres_migrations,
};
pub use reader::LogReader;
pub use relay::{LEASE_MIN, Progress, Relay, RelayConfig, RelayError, RelayEvent, RelaySummary, SPAN_MAX};
#[cfg(feature = "sqlite")]
pub use sqlite::{SqliteLog, log_error as sqlite_error, migrate, print_migrations, sqlite_options};
pub use tables::Tables;
pub use topics::TopicPattern;
pub use wake::{Awakened, Wake};

/// A sink's name is a group's: it stands in keys and file names of brokers.
pub(crate) fn check_sink(sink: &str) -> Result<(), LogError> {
    bus_core::Group::new(sink)
        .map(drop)
        .map_err(|error| LogError::with_source(LogErrorKind::Invalid, format!("`sink` {}", error.problem()), error))
}
