//! [`LogSource`]: a log as its relay reads it, and [`LogAdmin`]: as an operator sees it.

use std::{fmt, time::Duration};

use async_trait::async_trait;
use bus_core::{Event, EventError, LogId, Position, Seq, SeqSet, Text, Timestamp, Topic};

use crate::{LogError, TopicPattern};

/// One log as one sink reads it: what a relay needs of a database.
///
/// Its methods can be called beside each other: reading never waits for writing.
#[async_trait]
pub trait LogSource: fmt::Debug + Send + Sync + 'static {
    /// The sink it is read for.
    fn sink(&self) -> &str;

    /// The rows above `after`, ascending: as many as there are within `limit`, at least one if there is one.
    async fn fetch(&self, after: Seq, limit: PageLimit) -> Result<Page, LogError>;

    /// Looks at places that were not visible before, from the lowest on. Called after [`fetch`](LogSource::fetch), never
    /// before, and what it finds is handed out first: otherwise a later event of a key would overtake an earlier one.
    async fn probe(&self, unseen: &SeqSet, limit: PageLimit) -> Result<Probe, LogError>;

    /// The rows at these places within `limit`; at least one if there is one.
    async fn read(&self, seqs: &SeqSet, limit: PageLimit) -> Result<ReadRows, LogError>;

    /// The highest place that was drawn, committed or not.
    async fn last_seq(&self) -> Result<Seq, LogError>;

    /// Tries to become the owner of this log for this sink, for [`Acquire::ttl`]; registers the sink if it is new.
    async fn acquire(&self, request: &Acquire) -> Result<Acquisition, LogError>;

    /// Writes what changed, all or nothing, and extends the lease: the owner's only way to write.
    ///
    /// # Errors
    ///
    /// [`Fenced`](crate::LogErrorKind::Fenced) if the lease's epoch is not the current one; nothing was written then.
    async fn commit(&self, lease: &Lease, change: &Change) -> Result<(), LogError>;

    /// Gives the lease back.
    async fn release(&self, lease: &Lease) -> Result<(), LogError>;

    /// Events that were set aside, in the order of their places: at most `limit`, above `after`.
    async fn set_aside(&self, of: &Selected, after: Seq, limit: usize) -> Result<Vec<DeadRow>, LogError>;

    /// What operators asked of this sink's owner and nobody has done yet.
    async fn requests(&self) -> Result<Vec<Request>, LogError>;

    /// Removes rows that every sink of the log settled at least `retention` ago, at most `rows_max`; answers how many
    /// it removed, and whether there may be more. Does nothing where another janitor is at work.
    async fn prune(&self, janitor: &str, retention: Duration, rows_max: usize) -> Result<Pruned, LogError>;

    /// How long a [`commit`](LogSource::commit) that is not [`durable`](Change::durable) may take to reach the disk: a crash
    /// of the database can take back younger ones.
    fn write_delay(&self) -> Duration {
        Duration::ZERO
    }

    /// How long events that were settled may wait for a checkpoint: short where one costs little.
    fn checkpoint_interval(&self) -> Duration;

    /// Completes when another connection changed the database since the last call; polling is the guarantee, this the
    /// speed-up.
    ///
    /// # Cancel safety
    ///
    /// A dropped call forgets nothing.
    async fn changed(&self);
}

fn _log_source_is_object_safe(_: &dyn LogSource) {}

/// How much to read at once. One row is always read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageLimit {
    /// Most rows.
    pub events: usize,
    /// Bytes after which no further row is read.
    pub bytes: usize,
}

/// One row of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Its place.
    pub seq: Seq,
    /// Its event, or why it is none: anybody may insert with plain SQL.
    pub event: Result<Event, InvalidRow>,
}

/// A row that is no valid event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidRow {
    /// The topic it is for, if that much can be read.
    pub topic: Option<Topic>,
    /// The key it belongs to, if it has one.
    pub key: Option<Text>,
    /// Which column breaks which rule.
    pub error: EventError,
}

/// A topic and a key: what keeps its order.
pub type EventKey = (Topic, Text);

/// Rows read in one go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// Ascending by place.
    pub rows: Vec<Row>,
    /// Whether a place missing between them is empty for good. A database with one writer knows that; another may show
    /// the row later.
    pub gaps_are_dead: bool,
}

/// Rows read by their places.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReadRows {
    /// Ascending by place.
    pub rows: Vec<Row>,
    /// Everything up to here was looked at: what is missing of it does not exist.
    pub through: Seq,
}

/// What became of places that were not visible.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Probe {
    /// The rows that are visible now, ascending.
    pub rows: Vec<Row>,
    /// Places that will never be.
    pub dead: SeqSet,
    /// Everything up to here was looked at, in one view of the database.
    pub through: Seq,
}

/// A wish to own a log for a sink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acquire {
    /// Who asks, for people: `<host>:<pid>`.
    pub owner: String,
    /// How long the lease lasts unless it is extended.
    pub ttl: Duration,
    /// The new epoch is at least this: one more than what the broker holds.
    pub epoch_min: u64,
    /// Where a sink begins that is registered now.
    pub start: Start,
    /// The topics the sink takes.
    pub topics: Vec<TopicPattern>,
    /// What the sink publishes to, for people. Never a secret.
    pub bus: String,
    /// Begin a new incarnation: the broker remembers another history.
    pub new_incarnation: bool,
}

/// Where a new sink begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Start {
    /// With the oldest event that no other sink has settled, or the oldest there is.
    #[default]
    Earliest,
    /// With what is appended from now on.
    Latest,
}

/// The answer to an [`Acquire`].
#[derive(Clone, Debug, PartialEq)]
pub enum Acquisition {
    /// The log is ours.
    Owned(Box<Owned>),
    /// Another owner has it.
    Standby {
        /// Who.
        owner: String,
        /// How long its lease still lasts unless it is extended.
        remaining: Duration,
    },
}

/// What a new owner finds.
#[derive(Clone, Debug, PartialEq)]
pub struct Owned {
    /// The right to write.
    pub lease: Lease,
    /// The log's identity in the world.
    pub log_id: LogId,
    /// The history its places belong to.
    pub incarnation: Text,
    /// Everything up to here is settled.
    pub low: Seq,
    /// The highest place the last owner had seen.
    pub high: Seq,
    /// What between them is not settled.
    pub holes: SeqSet,
    /// Where the last owner's writer stood.
    pub position: Option<Position>,
    /// Keys whose events are set aside until an operator decides, each with the place of its first.
    pub parked: Vec<(EventKey, Seq)>,
    /// What the last owner published to, if that was something else.
    pub previous_bus: Option<String>,
}

/// The right to write a sink's state: its epoch fences all earlier ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Ascends with every owner.
    pub epoch: u64,
    /// How long it lasts unless it is extended.
    pub ttl: Duration,
}

/// What an owner writes in one transaction.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Change {
    /// Everything up to here is settled.
    pub low: Seq,
    /// The highest place seen.
    pub high: Seq,
    /// The id of the event there, if its row was seen.
    pub high_id: Option<Text>,
    /// What between them is not settled, what is set aside here not included.
    pub holes: SeqSet,
    /// Where the writer stands.
    pub position: Position,
    /// What is held up, for people.
    pub blocked: Blocked,
    /// Events given up.
    pub set_aside: Vec<SetAside>,
    /// Set-aside events that are done with, by place: published again, or discarded.
    pub removed: Vec<Seq>,
    /// Set-aside events that were tried again in vain.
    pub refused: Vec<SetAside>,
    /// Requests that went on.
    pub requests: Vec<RequestProgress>,
    /// It must survive a power cut before anyone acts on it.
    pub durable: bool,
}

impl Change {
    /// Whether nothing but the cursor moves.
    pub fn is_checkpoint_only(&self) -> bool {
        self.set_aside.is_empty() && self.removed.is_empty() && self.refused.is_empty() && self.requests.is_empty()
    }
}

/// What is held up in a relay.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Blocked {
    /// Keys that wait to be tried again.
    pub keys: u64,
    /// Topics the broker has nowhere to put yet.
    pub topics: Vec<String>,
}

/// An event that is set aside, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetAside {
    /// Its place.
    pub seq: Seq,
    /// Whether its key waits for it.
    pub state: DeadState,
    /// The kind of reason: `attempts`, `too_large`, `invalid`, `refused`, `behind`.
    pub reason: &'static str,
    /// The last error, for people.
    pub error: String,
    /// How often it was published in vain.
    pub attempts: u32,
}

/// The state of an event that is set aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeadState {
    /// Its key waits: later events of the key are set aside behind it.
    Parked,
    /// It alone was given up; its key goes on.
    Dead,
    /// An operator asked to publish it again.
    Retrying,
}

impl DeadState {
    /// The state as tables have it; they take no other.
    pub(crate) fn from_column(text: &str) -> Self {
        match text {
            "dead" => Self::Dead,
            "retrying" => Self::Retrying,
            _ => Self::Parked,
        }
    }

    /// The state as tables and JSON have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Parked => "parked",
            Self::Dead => "dead",
            Self::Retrying => "retrying",
        }
    }
}

/// An event that is set aside, as it lies in the database.
#[derive(Clone, Debug, PartialEq)]
pub struct DeadRow {
    /// The sink that set it aside.
    pub sink: String,
    /// Its place.
    pub seq: Seq,
    /// Its event, or why it is none.
    pub event: Result<Event, InvalidRow>,
    /// Its id, topic, key and type as they stand in the row.
    pub columns: DeadColumns,
    /// Its state.
    pub state: DeadState,
    /// Whether its key waits for it, also while it is retried.
    pub parked: bool,
    /// The kind of reason.
    pub reason: String,
    /// The last error.
    pub error: String,
    /// How often it was published in vain.
    pub attempts: u32,
    /// When it was set aside.
    pub at: Timestamp,
}

/// The columns of a set-aside row that name it, valid or not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeadColumns {
    /// The event's id.
    pub id: String,
    /// Its topic.
    pub topic: String,
    /// Its key.
    pub key: Option<String>,
    /// Its type.
    pub event_type: String,
    /// Everything else, of a row that is no valid event: one that is has it there.
    pub rest: Option<DeadRest>,
}

/// What stands in the other columns of a set-aside row that is no valid event. Text that is no UTF-8 has replacement
/// characters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeadRest {
    /// Its source.
    pub source: String,
    /// Its subject.
    pub subject: Option<String>,
    /// The data's type.
    pub content_type: String,
    /// What should be a JSON object of its extensions.
    pub extensions: Option<String>,
    /// Its time, as it stands there.
    pub time: String,
    /// Its data.
    pub data: Vec<u8>,
}

/// Which set-aside events are meant.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Selected {
    /// Those of these events; all where it is `None`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ids: Option<Vec<String>>,
    /// Only those with this reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Only those of this topic and key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<(String, String)>,
    /// Only those up to this place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Seq>,
    /// Only those whose keys wait for them.
    #[serde(default)]
    pub parked: bool,
}

/// What an operator asked of a sink's owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Its number.
    pub id: i64,
    /// What to do.
    pub kind: RequestKind,
    /// With which set-aside events.
    pub selected: Selected,
    /// At most so many a second.
    pub rate: Option<u32>,
}

/// What an operator can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// Publish set-aside events again.
    Retry,
    /// Remove set-aside events.
    Discard,
}

impl RequestKind {
    /// The kind as tables have it; they take no other.
    pub(crate) fn from_column(text: &str) -> Self {
        if text == "discard" { Self::Discard } else { Self::Retry }
    }

    /// The kind as tables have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Retry => "retry",
            Self::Discard => "discard",
        }
    }
}

/// How far a request is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestProgress {
    /// Its number.
    pub id: i64,
    /// Events done so far.
    pub done: u64,
    /// Events that failed again so far.
    pub failed: u64,
    /// Nothing is left of it.
    pub ended: bool,
}

/// What a janitor did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Rows it removed.
    pub rows: u64,
    /// Whether there may be more to remove now.
    pub more: bool,
}

/// A log as an operator sees it, all its sinks together.
#[async_trait]
pub trait LogAdmin: fmt::Debug + Send + Sync {
    /// One entry per log and sink, and one without a sink for a log that has none.
    async fn status(&self) -> Result<Vec<SinkStatus>, LogError>;

    /// The sinks that read a log.
    async fn sinks(&self) -> Result<Vec<Sink>, LogError>;

    /// Forgets a sink, its cursor and what it set aside.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::LogErrorKind::Invalid) if there is none of this name, or a relay owns it now.
    async fn remove_sink(&self, sink: &str) -> Result<(), LogError>;

    /// Set-aside events of all sinks, in the order of their places: at most `limit`, behind `after` (sink and place).
    async fn dead_letters(
        &self,
        selected: &Selected,
        after: Option<(&str, Seq)>,
        limit: usize,
    ) -> Result<Vec<DeadRow>, LogError>;

    /// Asks the owner of `sink` for something; answers the request's number.
    async fn ask(&self, sink: &str, kind: RequestKind, selected: &Selected, rate: Option<u32>)
    -> Result<i64, LogError>;

    /// Removes set-aside events where no relay owns the sink now; answers how many, or `None` if one does: ask it then.
    async fn discard_unowned(&self, sink: &str, selected: &Selected) -> Result<Option<u64>, LogError>;

    /// How far a request is; `None` if there is none of this number.
    async fn progress(&self, id: i64) -> Result<Option<RequestProgress>, LogError>;
}

fn _log_admin_is_object_safe(_: &dyn LogAdmin) {}

/// A sink that reads a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sink {
    /// The log it reads.
    pub log: String,
    /// Its name.
    pub sink: String,
    /// The topics it takes.
    pub topics: Vec<String>,
    /// What it publishes to.
    pub bus: Option<String>,
    /// Everything up to here is settled.
    pub low: Seq,
    /// The owner, while its lease lasts.
    pub owner: Option<String>,
}

/// How a sink stands.
#[derive(Clone, Debug, PartialEq)]
pub struct SinkStatus {
    /// The log.
    pub log: String,
    /// The sink; `None` if the log has none.
    pub sink: Option<String>,
    /// Events not settled.
    pub backlog: u64,
    /// Whether `backlog` is the exact number, or only the least.
    pub backlog_exact: bool,
    /// Age of the oldest event that is not settled.
    pub oldest_age: Option<Duration>,
    /// Everything up to here is settled.
    pub low: Seq,
    /// The highest place seen.
    pub high: Seq,
    /// Places between them that are not settled.
    pub holes: u64,
    /// The owner, while its lease lasts.
    pub owner: Option<String>,
    /// The last owner's number.
    pub epoch: u64,
    /// How long the lease still lasts.
    pub lease_remaining: Option<Duration>,
    /// What is held up.
    pub blocked: Blocked,
    /// Set-aside events whose keys wait.
    pub parked: u64,
    /// Set-aside events whose keys go on.
    pub dead: u64,
    /// Events that no sink of the log wants.
    pub unclaimed: u64,
    /// The oldest transaction that may keep gaps open, where there are holes.
    pub oldest_transaction: Option<OldestTransaction>,
}

/// A transaction that holds the log's lock, as whoever appends does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OldestTransaction {
    /// Its server process.
    pub pid: i32,
    /// How long it has been open.
    pub age: Duration,
}

impl SinkStatus {
    /// The status of a log that nobody reads.
    pub(crate) fn unread(log: &str, backlog: u64, backlog_exact: bool, oldest_age: Option<Duration>) -> Self {
        Self {
            log: log.to_owned(),
            sink: None,
            backlog,
            backlog_exact,
            oldest_age,
            low: Seq::ZERO,
            high: Seq::ZERO,
            holes: 0,
            owner: None,
            epoch: 0,
            lease_remaining: None,
            blocked: Blocked::default(),
            parked: 0,
            dead: 0,
            unclaimed: backlog,
            oldest_transaction: None,
        }
    }
}
