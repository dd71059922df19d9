#![doc = include_str!("../README.md")]

mod text;
mod name;
mod timestamp;
mod event;
pub mod cloudevents;
pub mod partition;
mod seq;
mod error;
mod confirm;
pub mod bus;
pub mod writer;
mod admin;
mod subscription;
mod delivery;
pub mod feed;
pub mod retry;
mod handler;
mod consumer;
pub mod dead_letter;
pub mod observed;
pub mod url_options;
mod failpoint;
mod mutant;
mod memory;
mod file;
pub mod testing;
#[cfg(feature = "conformance")]
pub mod conformance;

pub use admin::{BusAdmin, GroupLag, PartitionLag, StoredDeadLetter, TopicSpec, Topology};
pub use bus::{Capabilities, EventBus, EventBusExt, Health, OrderOnFailure, Publisher};
pub use confirm::{Confirmations, Confirmer, Outcome, Receipt};
pub use consumer::{Consumer, ConsumerSummary, Unknown};
pub use delivery::{DeadCause, DeadReason, Delivery, Ownership, Settle, Settled, Settlement};
pub use error::{BusError, ErrorKind};
pub use event::{Event, EventBuilder, EventParts, EventType, Extensions, OUTBUS_LOG, OUTBUS_SEQ};
#[cfg(feature = "failpoints")]
pub use failpoint::FAILPOINT_VARIABLE;
#[doc(hidden)]
pub use failpoint::failpoint;
pub use feed::PartitionFeed;
pub use file::{FileBus, FileConfig, read_events};
pub use handler::{Context, Handler, HandlerError, HandlerErrorKind};
pub use memory::{InMemoryBus, InMemoryConfig};
#[cfg(outbus_mutants)]
pub use mutant::MUTANT_VARIABLE;
#[doc(hidden)]
pub use mutant::mutant;
pub use name::{EventError, Group, Topic};
pub use observed::ObservedBus;
pub use retry::RetryPolicy;
pub use seq::{Seq, SeqSet};
pub use subscription::{SubscribeFrom, SubscribeRequest, Subscription, host_name};
pub use text::Text;
pub use timestamp::Timestamp;
pub use writer::{LogId, LogWriter, Mark, PlainWriter, Position, StreamPosition, WriterId};

/// Limits and defaults of an event's attributes.
pub mod limits {
    pub use crate::event::{
        CONTENT_TYPE_BYTES_MAX, DEFAULT_CONTENT_TYPE, DEFAULT_SOURCE, EXTENSION_NAME_BYTES_MAX,
        EXTENSION_VALUE_BYTES_MAX, EXTENSIONS_MAX, ID_BYTES_MAX, KEY_BYTES_MAX, SOURCE_BYTES_MAX, TYPE_BYTES_MAX,
    };
    pub use crate::name::{GROUP_BYTES_MAX, TOPIC_BYTES_MAX};
}

/// A wait that never ends, and the longest any wait is: a clock can hold it.
const FOREVER: std::time::Duration = std::time::Duration::from_secs(86_400 * 365);

/// The runtime's clock, which tests can stop.
fn now() -> std::time::Instant {
    tokio::time::Instant::now().into_std()
}
