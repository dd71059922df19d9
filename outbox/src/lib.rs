#![doc = include_str!("../README.md")]

mod error;
mod topics;
mod log;
mod cursor;
mod lanes;

pub use cursor::{Cursor, HOLE_RANGES_MAX};
pub use error::{AppendError, AppendErrorReason, LogError, LogErrorKind};
pub use lanes::{Counts, OnFailure};
pub use log::{
    Acquire, Acquisition, Blocked, Change, DeadColumns, DeadRow, DeadState, EventKey, InvalidRow, Lease, LogAdmin,
    LogSource, Owned, Page, PageLimit, Probe, Pruned, ReadRows, Request, RequestKind, RequestProgress, Row, Selected,
    SetAside, Sink, SinkStatus, Start,
};
pub use topics::TopicPattern;
