//! [`LogWriter`]: how a relay publishes a log, and the bookkeeping of brokers that remember it.

use std::{fmt, str::FromStr, sync::Arc};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{BusError, Confirmations, ErrorKind, Event, EventBus, Seq, SeqSet, Text};

/// Identifies one log in the world: made once when its tables are made, so that two services that publish to one
/// topic never share a position, whatever their logs are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LogId(Uuid);

impl LogId {
    /// A new id.
    pub fn random() -> Self {
        Self(Uuid::now_v7())
    }
}

impl fmt::Display for LogId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for LogId {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, uuid::Error> {
        text.parse().map(Self)
    }
}

impl TryFrom<String> for LogId {
    type Error = uuid::Error;

    fn try_from(text: String) -> Result<Self, uuid::Error> {
        text.parse()
    }
}

impl From<LogId> for String {
    fn from(id: LogId) -> Self {
        id.to_string()
    }
}

/// Who writes which log where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriterId {
    /// The log.
    pub log: LogId,
    /// The sink, one of those that read the log.
    pub sink: Text,
    /// The log's history: another one after a restore, whose numbers mean other events.
    pub incarnation: Text,
    /// The owner's number: a higher one fences all lower ones.
    pub epoch: u64,
    /// Where an earlier writer of this log and sink stood, from [`LogWriter::position`].
    pub since: Option<Position>,
}

/// Where a writer stands in its broker: opaque JSON, which the relay keeps for the next writer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Position(pub serde_json::Value);

/// What of its log a relay had settled when it handed a batch over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// Everything up to here is settled.
    pub low: Seq,
    /// The highest place seen, the batch included.
    pub high: Seq,
    /// The places up to `high` that are not settled, the batch's own included.
    pub holes: SeqSet,
}

/// Publishes one log for one sink, on behalf of one owner.
///
/// # Ordering
///
/// As [`EventBus::publish_batch`]. On a bus that is [`FailStop`](crate::OrderOnFailure::FailStop), an outcome that is
/// an error ends the writer: every batch behind it fails as well until the relay has closed it and opened another.
#[async_trait]
pub trait LogWriter: fmt::Debug + Send {
    /// Hands `batch` over, in ascending order of places or not, and promises its outcomes.
    ///
    /// A broker that remembers writers answers `already_stored` for a place it has, instead of storing it again.
    ///
    /// # Errors
    ///
    /// As [`EventBus::publish_batch`]; [`ErrorKind::Fenced`] once a higher epoch, or another
    /// writer of this one, was opened.
    async fn publish_batch(&mut self, batch: Vec<(Seq, Event)>, mark: &Mark) -> Confirmations;

    /// Hands over events that an operator publishes again: fenced as all others, but never taken for duplicates.
    async fn republish(&mut self, batch: Vec<Event>) -> Confirmations;

    /// Where this writer stands, for the next one's [`WriterId::since`].
    fn position(&self) -> Position;

    /// The highest places the broker remembers of this log, each with the id of its event, as found on opening.
    ///
    /// The relay compares them with its log. One that is missing there, or has another id, belongs to another history:
    /// the relay opens the writer again under a new incarnation, for which the broker remembers nothing.
    fn high_marks(&self) -> Vec<(Seq, Text)>;

    /// Ends the writer: when it returns, nothing that was handed over can land any more.
    async fn close(&mut self) -> Result<(), BusError>;
}

fn _log_writer_is_object_safe(_: &dyn LogWriter) {}

/// The writer of brokers that remember nothing: it publishes, and that is all.
#[derive(Debug)]
pub struct PlainWriter {
    bus: Arc<dyn EventBus>,
}

impl PlainWriter {
    /// A writer that publishes to `bus`.
    pub fn new(bus: Arc<dyn EventBus>) -> Self {
        Self { bus }
    }
}

#[async_trait]
impl LogWriter for PlainWriter {
    async fn publish_batch(&mut self, batch: Vec<(Seq, Event)>, _mark: &Mark) -> Confirmations {
        self.bus.publish_batch(batch.into_iter().map(|(_, event)| event).collect()).await
    }

    async fn republish(&mut self, batch: Vec<Event>) -> Confirmations {
        self.bus.publish_batch(batch).await
    }

    fn position(&self) -> Position {
        Position::default()
    }

    fn high_marks(&self) -> Vec<(Seq, Text)> {
        Vec::new()
    }

    async fn close(&mut self) -> Result<(), BusError> {
        Ok(())
    }
}

/// The answer of a writer to what is handed over behind a failure, or behind its end.
pub fn stopped() -> BusError {
    BusError::new(ErrorKind::Unavailable, "an earlier batch failed: close this writer and open another")
}

/// What a broker remembers of one log and sink in one of its streams, so that nothing is stored twice.
///
/// A bare highest place would not do: an event whose place is lower may become visible later, and would be taken for a
/// duplicate and lost. So the places below the highest that are *not* stored are kept too.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamPosition {
    /// The history these places belong to.
    pub incarnation: String,
    /// Everything up to here is settled for the relay.
    pub low: Seq,
    /// The highest place stored in this stream.
    pub high: Seq,
    /// The id of the event there.
    pub high_id: String,
    /// Places up to `high` that are not stored here and not settled elsewhere.
    pub holes: SeqSet,
}

impl StreamPosition {
    /// Nothing stored yet of this history.
    pub fn new(incarnation: &str) -> Self {
        Self { incarnation: incarnation.to_owned(), ..Self::default() }
    }

    /// Whether the event at `seq` is stored in this stream or was settled otherwise.
    pub fn holds(&self, seq: Seq) -> bool {
        seq <= self.high && !self.holes.contains(seq)
    }

    /// What is remembered once `written` is stored, handed over with `mark`: it only grows, whatever the mark says.
    pub fn advance<'a>(&mut self, written: impl Iterator<Item = (Seq, &'a str)> + Clone, mark: &Mark) {
        let highest = written.clone().max_by_key(|(seq, _)| *seq);
        if let Some((seq, id)) = highest.filter(|(seq, _)| *seq > self.high) {
            self.holes.insert_all(&mark.holes.within(self.high.next(), seq));
            self.high = seq;
            self.high_id = id.to_owned();
        }
        for (seq, _) in written {
            self.holes.remove(seq);
        }
        self.low = self.low.max(mark.low);
        self.holes.remove_range(Seq::ZERO, self.low);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(low: u64, high: u64, holes: &[u64]) -> Mark {
        Mark { low: Seq(low), high: Seq(high), holes: holes.iter().copied().map(Seq).collect() }
    }

    fn written(seqs: &[u64]) -> Vec<(Seq, &'static str)> {
        seqs.iter().map(|seq| (Seq(*seq), "id")).collect()
    }

    /// Catches the mutant that keeps a bare highest place: 3 becomes visible after 5 and would be dropped.
    #[test]
    fn a_late_event_is_not_taken_for_a_duplicate() {
        let mut position = StreamPosition::new("a");
        position.advance(written(&[1, 2, 4, 5]).into_iter(), &mark(0, 5, &[1, 2, 3, 4, 5]));
        assert!(position.holds(Seq(2)) && position.holds(Seq(5)) && !position.holds(Seq(3)) && !position.holds(Seq(6)));
        position.advance(written(&[3]).into_iter(), &mark(2, 5, &[3]));
        assert!(position.holds(Seq(3)));
        assert_eq!((position.low, position.high, position.holes.is_empty()), (Seq(2), Seq(5), true));
    }

    /// Catches the mutant that overwrites instead of growing: a mark older than the stored state opens no hole again.
    #[test]
    fn an_old_mark_forgets_nothing() {
        let mut position = StreamPosition::new("a");
        position.advance(written(&[1, 2, 3]).into_iter(), &mark(0, 3, &[1, 2, 3]));
        position.advance(written(&[4]).into_iter(), &mark(0, 4, &[1, 2, 3, 4]));
        assert!((1..=4).all(|seq| position.holds(Seq(seq))));
        position.advance(written(&[]).into_iter(), &mark(0, 0, &[]));
        assert_eq!((position.low, position.high), (Seq(0), Seq(4)));
    }
}
