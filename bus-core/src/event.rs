//! [`Event`]: an immutable fact with an address.

use std::{fmt, sync::Arc};

use bytes::Bytes;
use serde::Serialize;
use uuid::Uuid;

use crate::{
    EventError, Text, Timestamp, Topic,
    name::{check_characters, check_length, check_printable},
};

/// Longest accepted id, in bytes. Source: AMQP's short string, which carries it as `message_id`.
pub const ID_BYTES_MAX: usize = 255;
/// Longest accepted type, in bytes. Source: the routing key `<partition>.<type>` is an AMQP short string.
pub const TYPE_BYTES_MAX: usize = 200;
/// Longest accepted key, in bytes: a key is an id, not a document.
pub const KEY_BYTES_MAX: usize = 1_024;
/// Longest accepted source and subject, in bytes.
pub const SOURCE_BYTES_MAX: usize = 1_024;
/// Longest accepted content type, in bytes. Source: AMQP's short string.
pub const CONTENT_TYPE_BYTES_MAX: usize = 255;
/// Most extensions an event may have, what the road itself adds (`outbus...`, `dead...`) not counted.
pub const EXTENSIONS_MAX: usize = 64;
/// What the road adds to an event starts with one of these.
const OWN_PREFIXES: [&str; 2] = ["outbus", "dead"];
/// Longest accepted name of an extension, in bytes. CloudEvents advises 20.
pub const EXTENSION_NAME_BYTES_MAX: usize = 64;
/// Longest accepted value of an extension, in bytes. Source: W3C Baggage may be this long.
pub const EXTENSION_VALUE_BYTES_MAX: usize = 8_192;

/// The source of events that name none.
pub const DEFAULT_SOURCE: &str = "/outbus";
/// The content type of events that name none.
pub const DEFAULT_CONTENT_TYPE: &str = "application/json";

/// Names an extension may not have: CloudEvents' own, ours, and what `outbus consume` adds to an event it prints.
const RESERVED_NAMES: [&str; 13] = [
    "specversion",
    "id",
    "source",
    "type",
    "subject",
    "time",
    "datacontenttype",
    "data",
    "data_base64",
    "partitionkey",
    "topic",
    "attempt",
    "partition",
];

/// An immutable fact, past tense: a CloudEvents 1.0 event with the address it is published to.
///
/// Every `Event` is valid: its names and lengths were checked when it was built. Cloning shares it.
///
/// # Ordering
///
/// Events of one topic with equal [keys](Event::key) keep their order on the whole road. An event without a key is a
/// key of its own.
///
/// # Examples
///
/// ```
/// use bus_core::Event;
///
/// let event = Event::json("orders", "order.placed", &serde_json::json!({"total": 5}))?.key("order-7").build()?;
/// assert_eq!(event.topic(), "orders");
/// assert_eq!(event.data().as_ref(), br#"{"total":5}"#);
/// # Ok::<(), bus_core::EventError>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Event(Arc<EventParts>);

/// Ties a Rust type to the `type` of its events, so that typed code need not repeat it.
///
/// # Examples
///
/// ```
/// #[derive(serde::Serialize, serde::Deserialize)]
/// struct OrderPlaced {
///     total: u32,
/// }
///
/// impl bus_core::EventType for OrderPlaced {
///     const TYPE: &'static str = "order.placed";
/// }
///
/// let event = bus_core::Event::of("orders", &OrderPlaced { total: 5 })?.key(7).build()?;
/// assert_eq!(event.event_type(), "order.placed");
/// # Ok::<(), bus_core::EventError>(())
/// ```
pub trait EventType {
    /// The event's type, in the past tense: `order.placed`.
    const TYPE: &'static str;
}

/// What an event consists of, for code that reads or writes events of another shape: a codec, a table.
#[derive(Clone, PartialEq, Eq)]
pub struct EventParts {
    /// Identifies the event together with its source; stays the same when it is published again.
    pub id: Text,
    /// Who made it, a URI reference.
    pub source: Text,
    /// What happened: `order.placed`.
    pub event_type: Text,
    /// What it happened to, where the source alone does not say.
    pub subject: Option<Text>,
    /// When it happened.
    pub time: Timestamp,
    /// The media type of `data`.
    pub content_type: Text,
    /// Where it goes.
    pub topic: Topic,
    /// Events of a topic with equal keys keep their order.
    pub key: Option<Text>,
    /// Further attributes.
    pub extensions: Extensions,
    /// The payload. Never logged.
    pub data: Bytes,
}

impl Event {
    /// An event of `topic` and `event_type` with `value` as its JSON data.
    ///
    /// # Errors
    ///
    /// Field `data`, if `value` cannot be written as JSON. Everything else is checked by [`EventBuilder::build`].
    pub fn json<T: Serialize + ?Sized>(
        topic: impl Into<Text>,
        event_type: impl Into<Text>,
        value: &T,
    ) -> Result<EventBuilder, EventError> {
        let data = serde_json::to_vec(value)
            .map_err(|error| EventError::new("data", format!("cannot be written as JSON: {error}")))?;
        Ok(Self::builder(topic, event_type).data(data))
    }

    /// An event that `value` is: its type says which `type`, its JSON is the data.
    ///
    /// # Errors
    ///
    /// As [`json`](Event::json).
    pub fn of<T: EventType + Serialize>(topic: impl Into<Text>, value: &T) -> Result<EventBuilder, EventError> {
        Self::json(topic, Text::from_static(T::TYPE), value)
    }

    /// An event without data yet, of any content type.
    pub fn builder(topic: impl Into<Text>, event_type: impl Into<Text>) -> EventBuilder {
        EventBuilder::new(topic.into(), event_type.into())
    }

    /// The event that `parts` are.
    ///
    /// # Errors
    ///
    /// The first field that breaks a rule.
    pub fn from_parts(parts: EventParts) -> Result<Self, EventError> {
        parts.check()?;
        Ok(Self(Arc::new(parts)))
    }

    /// What the event consists of.
    pub fn parts(&self) -> &EventParts {
        &self.0
    }

    /// What the event consists of, to build another from.
    pub fn into_parts(self) -> EventParts {
        Arc::unwrap_or_clone(self.0)
    }

    /// Identifies the event together with its [source](Event::source); 1 to 255 bytes.
    pub fn id(&self) -> &str {
        &self.0.id
    }

    /// Who made the event, a URI reference.
    pub fn source(&self) -> &str {
        &self.0.source
    }

    /// What happened: CloudEvents' `type`.
    pub fn event_type(&self) -> &str {
        &self.0.event_type
    }

    /// What it happened to.
    pub fn subject(&self) -> Option<&str> {
        self.0.subject.as_deref()
    }

    /// When it happened.
    pub fn time(&self) -> Timestamp {
        self.0.time
    }

    /// The media type of the data.
    pub fn content_type(&self) -> &str {
        &self.0.content_type
    }

    /// Where the event goes.
    pub fn topic(&self) -> &Topic {
        &self.0.topic
    }

    /// Events of one topic with equal keys keep their order.
    pub fn key(&self) -> Option<&str> {
        self.0.key.as_deref()
    }

    /// Further attributes.
    pub fn extensions(&self) -> &Extensions {
        &self.0.extensions
    }

    /// The value of one extension.
    pub fn extension(&self, name: &str) -> Option<&str> {
        self.0.extensions.get(name)
    }

    /// The payload.
    pub fn data(&self) -> &Bytes {
        &self.0.data
    }

    /// The data as the type its JSON was made from.
    ///
    /// # Errors
    ///
    /// Field `data`, if it does not decode.
    pub fn decode<'a, T: serde::Deserialize<'a>>(&'a self) -> Result<T, EventError> {
        serde_json::from_slice(&self.0.data).map_err(|error| {
            // Not serde_json's own sentence: it can quote the payload.
            let problem = format!(
                "does not decode as {} at line {}, column {}",
                std::any::type_name::<T>(),
                error.line(),
                error.column()
            );
            EventError::new("data", problem)
        })
    }

    /// The bytes of the data and of all attributes' values and extension names: what windows and limits count.
    ///
    /// # Units
    ///
    /// Bytes; what a broker stores is a little more, by its own names and framing.
    pub fn size_bytes(&self) -> usize {
        self.0.size_bytes()
    }

    /// The same event with one more extension, or with another value for it.
    ///
    /// # Errors
    ///
    /// The extension, if its name or value breaks a rule.
    pub fn with_extension(mut self, name: impl Into<Text>, value: impl Into<Text>) -> Result<Self, EventError> {
        Arc::make_mut(&mut self.0).extensions.insert(name, value)?;
        Ok(self)
    }
}

/// The extension that names the log an event was relayed from.
pub const OUTBUS_LOG: &str = "outbuslog";
/// The extension that holds an event's place in that log.
pub const OUTBUS_SEQ: &str = "outbusseq";

impl Event {
    /// Writes on the event from which log and place it is relayed. That replaces what it says of itself.
    pub fn stamp(&mut self, log: &Text, seq: crate::Seq) {
        let extensions = &mut Arc::make_mut(&mut self.0).extensions;
        // Both names are valid, and the values are a UUID and a number.
        extensions.put(Text::from_static(OUTBUS_LOG), log.clone());
        extensions.put(Text::from_static(OUTBUS_SEQ), seq.0.into());
    }
}

impl EventParts {
    fn check(&self) -> Result<(), EventError> {
        check_length("id", &self.id, ID_BYTES_MAX)?;
        check_printable("id", &self.id)?;
        check_length("source", &self.source, SOURCE_BYTES_MAX)?;
        check_printable("source", &self.source)?;
        check_length("type", &self.event_type, TYPE_BYTES_MAX)?;
        check_characters("type", &self.event_type, "._-")?;
        check_length("datacontenttype", &self.content_type, CONTENT_TYPE_BYTES_MAX)?;
        check_printable("datacontenttype", &self.content_type)?;
        if let Some(subject) = &self.subject {
            check_length("subject", subject, SOURCE_BYTES_MAX)?;
            check_printable("subject", subject)?;
        }
        if let Some(key) = &self.key {
            check_length("partitionkey", key, KEY_BYTES_MAX)?;
            check_printable("partitionkey", key)?;
        }
        Ok(())
    }

    fn size_bytes(&self) -> usize {
        let option = |text: &Option<Text>| text.as_ref().map_or(0, |text| text.len());
        self.id.len()
            + self.source.len()
            + self.event_type.len()
            + option(&self.subject)
            + "2026-11-21T09:30:00.000000Z".len()
            + self.content_type.len()
            + self.topic.len()
            + option(&self.key)
            + self.extensions.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>()
            + self.data.len()
    }
}

/// Shows every attribute; of the payload only its length.
impl fmt::Debug for EventParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Event")
            .field("id", &self.id)
            .field("source", &self.source)
            .field("type", &self.event_type)
            .field("subject", &self.subject)
            .field("time", &self.time)
            .field("content_type", &self.content_type)
            .field("topic", &self.topic)
            .field("key", &self.key)
            .field("extensions", &self.extensions)
            .field("data_bytes", &self.data.len())
            .finish()
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

/// Collects an event's attributes; [`build`](EventBuilder::build) checks them.
///
/// What is left out is filled in: a new UUIDv7 as id, now as time, [`DEFAULT_SOURCE`], [`DEFAULT_CONTENT_TYPE`].
/// Wherever an event is expected, a builder is accepted and built.
#[derive(Clone, Debug)]
#[must_use]
pub struct EventBuilder {
    topic: Text,
    event_type: Text,
    id: Option<Text>,
    source: Text,
    subject: Option<Text>,
    time: Option<Timestamp>,
    content_type: Text,
    key: Option<Text>,
    extensions: Vec<(Text, Text)>,
    data: Payload,
}

/// Data whose `Debug` tells only its length.
#[derive(Clone)]
struct Payload(Bytes);

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl EventBuilder {
    fn new(topic: Text, event_type: Text) -> Self {
        Self {
            topic,
            event_type,
            id: None,
            source: Text::from_static(DEFAULT_SOURCE),
            subject: None,
            time: None,
            content_type: Text::from_static(DEFAULT_CONTENT_TYPE),
            key: None,
            extensions: Vec::new(),
            data: Payload(Bytes::new()),
        }
    }

    /// Sets where the event goes and what happened.
    pub(crate) fn address(mut self, topic: Text, event_type: Text) -> Self {
        (self.topic, self.event_type) = (topic, event_type);
        self
    }

    /// Sets the id; without it the event gets a new UUIDv7.
    pub fn id(mut self, id: impl Into<Text>) -> Self {
        self.id = Some(id.into());
        self
    }

    /// Sets who made the event.
    pub fn source(mut self, source: impl Into<Text>) -> Self {
        self.source = source.into();
        self
    }

    /// Sets what the event happened to.
    pub fn subject(mut self, subject: impl Into<Text>) -> Self {
        self.subject = Some(subject.into());
        self
    }

    /// Sets when it happened; without it the event gets the time it is built.
    pub fn time(mut self, time: Timestamp) -> Self {
        self.time = Some(time);
        self
    }

    /// Sets the media type of the data.
    pub fn content_type(mut self, content_type: impl Into<Text>) -> Self {
        self.content_type = content_type.into();
        self
    }

    /// Sets the key, usually the aggregate's id: events of one topic with equal keys keep their order.
    pub fn key(mut self, key: impl Into<Text>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Adds an extension; the last value of a name counts.
    pub fn extension(mut self, name: impl Into<Text>, value: impl Into<Text>) -> Self {
        self.extensions.push((name.into(), value.into()));
        self
    }

    /// Sets the payload.
    pub fn data(mut self, data: impl Into<Bytes>) -> Self {
        self.data = Payload(data.into());
        self
    }

    /// Checks everything and makes the event.
    ///
    /// # Errors
    ///
    /// The first field that breaks a rule.
    pub fn build(self) -> Result<Event, EventError> {
        let mut extensions = Extensions::default();
        for (name, value) in self.extensions {
            extensions.insert(name, value)?;
        }
        Event::from_parts(EventParts {
            id: self.id.unwrap_or_else(|| Uuid::now_v7().into()),
            source: self.source,
            event_type: self.event_type,
            subject: self.subject,
            time: self.time.unwrap_or_else(Timestamp::now),
            content_type: self.content_type,
            topic: Topic::new(self.topic)?,
            key: self.key,
            extensions,
            data: self.data.0,
        })
    }
}

impl TryFrom<EventBuilder> for Event {
    type Error = EventError;

    fn try_from(builder: EventBuilder) -> Result<Self, EventError> {
        builder.build()
    }
}

/// Further attributes of an event, ordered by name: `traceparent`, `correlationid`, `tenantid`, ...
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Extensions(Vec<(Text, Text)>);

impl Extensions {
    /// The value of `name`.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.position(name).ok().map(|at| self.0[at].1.as_str())
    }

    /// All names with their values, ordered by name.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&Text, &Text)> {
        self.0.iter().map(|(name, value)| (name, value))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds an extension or replaces its value.
    ///
    /// # Errors
    ///
    /// The name as field, if it is not lower-case letters and digits, is reserved or too long, or if the value is too
    /// long or holds control characters, or if there are [`EXTENSIONS_MAX`] already.
    pub fn insert(&mut self, name: impl Into<Text>, value: impl Into<Text>) -> Result<(), EventError> {
        let (name, value) = (name.into(), value.into());
        check_extension(&name, &value).map_err(|problem| EventError::new(display_name(&name), problem))?;
        let is_full = || self.0.iter().filter(|(name, _)| !is_own(name)).count() == EXTENSIONS_MAX;
        if self.position(&name).is_err() && !is_own(&name) && is_full() {
            let problem = format!("is one too many; at most {EXTENSIONS_MAX} extensions are allowed");
            return Err(EventError::new(display_name(&name), problem));
        }
        self.put(name, value);
        Ok(())
    }

    /// Adds an extension that needs no check.
    fn put(&mut self, name: Text, value: Text) {
        match self.position(&name) {
            Ok(at) => self.0[at].1 = value,
            Err(at) => self.0.insert(at, (name, value)),
        }
    }

    /// Takes an extension away and answers its value.
    pub fn remove(&mut self, name: &str) -> Option<Text> {
        self.position(name).ok().map(|at| self.0.remove(at).1)
    }

    fn position(&self, name: &str) -> Result<usize, usize> {
        self.0.binary_search_by(|(other, _)| other.as_str().cmp(name))
    }
}

impl fmt::Debug for Extensions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

fn is_own(name: &str) -> bool {
    OWN_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

fn check_extension(name: &str, value: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > EXTENSION_NAME_BYTES_MAX {
        return Err(format!("is a name of {} bytes; 1 to {EXTENSION_NAME_BYTES_MAX} are allowed", name.len()));
    }
    if !name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit()) {
        return Err("is no name for an extension: lower-case letters and digits are allowed".into());
    }
    if RESERVED_NAMES.contains(&name) {
        return Err("is a reserved name".into());
    }
    if value.len() > EXTENSION_VALUE_BYTES_MAX {
        return Err(format!("is {} bytes long; at most {EXTENSION_VALUE_BYTES_MAX} are allowed", value.len()));
    }
    check_printable("value", value).map_err(|error| error.problem().to_owned())
}

/// A refused name, short enough for an error message and without control characters.
fn display_name(name: &str) -> String {
    name.chars().filter(|c| !c.is_control()).take(EXTENSION_NAME_BYTES_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order() -> EventBuilder {
        Event::json("orders", "order.placed", &serde_json::json!({"secret": 4711})).unwrap()
    }

    #[test]
    fn fills_in_what_is_left_out() {
        let (first, second) = (order().build().unwrap(), order().build().unwrap());
        assert_ne!(first.id(), second.id());
        assert!(first.id() < second.id(), "UUIDv7 ids of one process ascend");
        assert_eq!((first.source(), first.content_type(), first.key()), ("/outbus", "application/json", None));
    }

    #[test]
    fn refuses_by_field() {
        let wrong = [
            ("id", order().id("")),
            ("id", order().id("x".repeat(300))),
            ("id", order().id("a\nb")),
            ("source", order().source("")),
            ("subject", order().subject("\u{0}")),
            ("datacontenttype", order().content_type("")),
            ("partitionkey", order().key("")),
            ("partitionkey", order().key("k".repeat(1_025))),
            ("type", Event::builder("orders", "")),
            ("type", Event::builder("orders", "order placed")),
            ("topic", Event::builder("or/ders", "order.placed")),
            ("Trace", order().extension("Trace", "x")),
            ("partitionkey", order().extension("partitionkey", "x")),
            ("tenantid", order().extension("tenantid", "x".repeat(8_193))),
        ];
        for (field, builder) in wrong {
            let error = builder.build().expect_err(field);
            assert_eq!(error.field(), field, "{error}");
        }
    }

    #[test]
    fn never_shows_its_data() {
        let builder = order();
        assert!(!format!("{builder:?}").contains("4711"));
        assert!(!format!("{:?}", builder.build().unwrap()).contains("4711"));
    }

    #[test]
    fn does_not_quote_its_data_when_it_does_not_decode() {
        let event = order().data(r#"{"total":"4711"}"#).build().unwrap();
        let error = event.decode::<std::collections::BTreeMap<String, u32>>().unwrap_err();
        assert!(!error.to_string().contains("4711"), "{error}");
    }

    #[test]
    fn a_clone_with_an_extension_leaves_the_original_alone() {
        let event = order().extension("tenantid", "a").build().unwrap();
        let other = event.clone().with_extension("tenantid", "b").unwrap();
        assert_eq!((event.extension("tenantid"), other.extension("tenantid")), (Some("a"), Some("b")));
    }
}
