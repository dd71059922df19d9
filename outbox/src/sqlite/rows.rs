//! From a row to an event.

use bus_core::{Event, EventError, EventParts, Extensions, Seq, Text, Timestamp, Topic};
use bytes::Bytes;
use sqlx::{Row as _, sqlite::SqliteRow};

use super::log_error;
use crate::{InvalidRow, LogError, Row};

/// The columns of an event, in the order in which [`Decoder`] reads them from index 1 on; the place is index 0.
pub(super) const COLUMNS: &str = "seq, id, topic, key, type, source, subject, content_type, extensions, time, data";

/// Turns rows into events. Remembers the last topic, type, source and content type, which repeat, so that events share
/// them.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    topic: Option<Topic>,
    event_type: Text,
    source: Text,
    content_type: Text,
}

impl Decoder {
    /// Reads one row; what is no valid event is told as such, not skipped.
    pub(super) fn row(&mut self, row: &SqliteRow) -> Result<Row, LogError> {
        let seq: i64 = row.try_get(0).map_err(log_error)?;
        let event = self.event(row).map_err(|error| InvalidRow { key: event_key(row), error });
        Ok(Row { seq: Seq(seq.unsigned_abs()), event })
    }

    /// The bytes a row brings along, roughly: its data and its variable texts.
    pub(super) fn size(row: &Row) -> usize {
        row.event.as_ref().map_or(256, Event::size_bytes)
    }

    pub(super) fn event(&mut self, row: &SqliteRow) -> Result<Event, EventError> {
        // One buffer for the texts that differ from row to row.
        let (id, key, subject) = (text(row, 1, "id")?, optional(row, 3, "partitionkey")?, optional(row, 6, "subject")?);
        let joined = Text::from([id, key.unwrap_or_default(), subject.unwrap_or_default()].concat());
        let (id_end, key_end) = (id.len(), id.len() + key.map_or(0, str::len));
        Event::from_parts(EventParts {
            id: joined.slice_ref(&joined[..id_end]),
            source: repeated(&mut self.source, text(row, 5, "source")?),
            event_type: repeated(&mut self.event_type, text(row, 4, "type")?),
            subject: subject.map(|_| joined.slice_ref(&joined[key_end..])),
            time: Timestamp::from_unix_micros(time(row)?),
            content_type: repeated(&mut self.content_type, text(row, 7, "datacontenttype")?),
            topic: self.topic(text(row, 2, "topic")?)?,
            key: key.map(|_| joined.slice_ref(&joined[id_end..key_end])),
            extensions: extensions(optional(row, 8, "extensions")?)?,
            data: Bytes::copy_from_slice(data(row)?),
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

/// The last text again if it is the same.
fn repeated(last: &mut Text, text: &str) -> Text {
    if last.as_str() != text {
        *last = text.into();
    }
    last.clone()
}

fn event_key(row: &SqliteRow) -> Option<(Topic, Text)> {
    let topic = Topic::new(text(row, 2, "topic").ok()?).ok()?;
    Some((topic, optional(row, 3, "partitionkey").ok()??.into()))
}

fn text<'r>(row: &'r SqliteRow, column: usize, field: &'static str) -> Result<&'r str, EventError> {
    row.try_get_unchecked(column).map_err(|_| EventError::new(field, "is no valid UTF-8 in its row"))
}

fn optional<'r>(row: &'r SqliteRow, column: usize, field: &'static str) -> Result<Option<&'r str>, EventError> {
    row.try_get_unchecked(column).map_err(|_| EventError::new(field, "is no valid UTF-8 in its row"))
}

fn time(row: &SqliteRow) -> Result<i64, EventError> {
    row.try_get(9).map_err(|_| EventError::new("time", "must be an integer, microseconds since 1970"))
}

/// The data, whether it was inserted as a blob or as text.
fn data(row: &SqliteRow) -> Result<&[u8], EventError> {
    row.try_get_unchecked(10).map_err(|_| EventError::new("data", "cannot be read from its row"))
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
pub(super) fn extensions_json(extensions: &Extensions) -> Option<String> {
    if extensions.is_empty() {
        return None;
    }
    let object: serde_json::Map<String, serde_json::Value> =
        extensions.iter().map(|(name, value)| (name.to_string(), value.as_str().into())).collect();
    Some(serde_json::Value::Object(object).to_string())
}
