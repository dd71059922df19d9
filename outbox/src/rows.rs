//! From a row to an event, the same on every database; and what else their columns share.

use std::time::Duration;

use bus_core::{Event, EventError, EventParts, Extensions, Seq, Text, Timestamp, Topic};
use bytes::Bytes;

use crate::{InvalidRow, Lease, LogError, LogErrorKind, Row};

/// The log's name; the event store's own table follows later.
pub(crate) const LOG: &str = "outbox";

/// A row whose columns are, from index 0 on: `seq`, `id`, `topic`, `key`, `type`, `source`, `subject`, `content_type`,
/// `extensions` as JSON text, `time`, `data`. A column that cannot be read as such breaks the rule of its field.
pub(crate) trait EventRow {
    fn seq(&self) -> Result<Seq, LogError>;
    fn optional(&self, column: usize) -> Result<Option<&str>, Unreadable>;
    /// Column 9, in microseconds since 1970.
    fn time(&self) -> Result<i64, Unreadable>;
    /// Column 10.
    fn data(&self) -> Result<&[u8], Unreadable>;
}

/// A column holds something else.
#[derive(Debug)]
pub(crate) struct Unreadable;

/// Turns rows into events. Remembers the last topic, type, source and content type, which repeat, so that events share
/// them.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    topic: Option<Topic>,
    event_type: Text,
    source: Text,
    content_type: Text,
}

impl Decoder {
    /// Reads one row; what is no valid event is told as such, not skipped.
    pub(crate) fn row(&mut self, row: &impl EventRow) -> Result<Row, LogError> {
        let event = self.event(row).map_err(|error| InvalidRow {
            topic: text(row, 2, "topic").ok().and_then(|topic| Topic::new(topic).ok()),
            key: optional(row, 3, "partitionkey").ok().flatten().map(Text::from),
            error,
        });
        Ok(Row { seq: row.seq()?, event })
    }

    fn event(&mut self, row: &impl EventRow) -> Result<Event, EventError> {
        // One buffer for the texts that differ from row to row.
        let (id, key, subject) = (text(row, 1, "id")?, optional(row, 3, "partitionkey")?, optional(row, 6, "subject")?);
        let joined = Text::from([id, key.unwrap_or_default(), subject.unwrap_or_default()].concat());
        let (id_end, key_end) = (id.len(), id.len() + key.map_or(0, str::len));
        let time = row.time().map_err(|_| EventError::new("time", "must be a time, in microseconds since 1970"))?;
        let data = row.data().map_err(|_| EventError::new("data", "cannot be read from its row"))?;
        Event::from_parts(EventParts {
            id: joined.slice_ref(&joined[..id_end]),
            source: repeated(&mut self.source, text(row, 5, "source")?),
            event_type: repeated(&mut self.event_type, text(row, 4, "type")?),
            subject: subject.map(|_| joined.slice_ref(&joined[key_end..])),
            time: Timestamp::from_unix_micros(time),
            content_type: repeated(&mut self.content_type, text(row, 7, "datacontenttype")?),
            topic: self.topic(text(row, 2, "topic")?)?,
            key: key.map(|_| joined.slice_ref(&joined[id_end..key_end])),
            extensions: extensions(optional(row, 8, "extensions")?)?,
            data: Bytes::copy_from_slice(data),
        })
    }

    fn topic(&mut self, name: &str) -> Result<Topic, EventError> {
        match &self.topic {
            Some(last) if **last == *name => Ok(last.clone()),
            _ => {
                let topic = Topic::new(name)?;
                self.topic = Some(topic.clone());
                Ok(topic)
            }
        }
    }
}

impl Row {
    /// The bytes it brings along, roughly: its data and its variable texts.
    pub(crate) fn size_bytes(&self) -> usize {
        self.event.as_ref().map_or(256, Event::size_bytes)
    }
}

/// The last text again if it is the same.
fn repeated(last: &mut Text, text: &str) -> Text {
    if last.as_str() != text {
        *last = text.into();
    }
    last.clone()
}

fn text<'r>(row: &'r impl EventRow, column: usize, field: &'static str) -> Result<&'r str, EventError> {
    optional(row, column, field)?.ok_or_else(|| EventError::new(field, "is missing in its row"))
}

fn optional<'r>(row: &'r impl EventRow, column: usize, field: &'static str) -> Result<Option<&'r str>, EventError> {
    row.optional(column).map_err(|_| EventError::new(field, "is no valid UTF-8 in its row"))
}

fn extensions(json: Option<&str>) -> Result<Extensions, EventError> {
    let mut extensions = Extensions::default();
    let Some(json) = json.filter(|json| *json != "{}") else { return Ok(extensions) };
    let object: std::collections::BTreeMap<String, String> = serde_json::from_str(json)
        .map_err(|_| EventError::new("extensions", "must be a JSON object of strings, without nesting"))?;
    for (name, value) in object {
        extensions.insert(name, value)?;
    }
    Ok(extensions)
}

/// Extensions as their column has them; `None` where there are none.
pub(crate) fn extensions_json(extensions: &Extensions) -> Option<String> {
    if extensions.is_empty() {
        return None;
    }
    let object: serde_json::Map<String, serde_json::Value> =
        extensions.iter().map(|(name, value)| (name.to_string(), value.as_str().into())).collect();
    Some(serde_json::Value::Object(object).to_string())
}

/// The epoch of `lease` is over.
pub(crate) fn fenced(lease: &Lease) -> LogError {
    LogError::new(LogErrorKind::Fenced, format!("another relay owns this sink now: epoch {} is over", lease.epoch))
}

/// A number as its column has it.
pub(crate) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// A value as a column of JSON has it.
pub(crate) fn json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("numbers, strings and sets of them serialize")
}

/// A value from a column of JSON.
pub(crate) fn parse<T: serde::de::DeserializeOwned>(text: &str, column: &'static str) -> Result<T, LogError> {
    serde_json::from_str(text).map_err(|error| damaged(column, error))
}

pub(crate) fn damaged(column: &'static str, error: impl std::error::Error + Send + Sync + 'static) -> LogError {
    LogError::with_source(LogErrorKind::Schema, format!("column `{column}` holds something it should not"), error)
}

/// Beyond this many events a backlog is not counted to the end.
pub(crate) const COUNT_MAX: i64 = 100_000;

/// How long ago a time was, both in microseconds.
pub(crate) fn age(time: Option<i64>, now: i64) -> Option<Duration> {
    time.map(|time| elapsed(now, time))
}

pub(crate) fn elapsed(later: i64, earlier: i64) -> Duration {
    Duration::from_micros(later.saturating_sub(earlier).max(0).unsigned_abs())
}

/// Refuses to remove a sink that a relay owns now (`Some(true)`), or that is not there (`None`).
pub(crate) fn check_removable(sink: &str, leased: Option<bool>) -> Result<(), LogError> {
    let message = match leased {
        Some(false) => return Ok(()),
        Some(true) => format!("a relay owns sink `{sink}` now: stop it first"),
        None => format!("there is no sink `{sink}`: `outbus sinks list` names those there are"),
    };
    Err(LogError::new(LogErrorKind::Invalid, message))
}
