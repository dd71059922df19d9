//! CloudEvents 1.0: attribute names shared by all codecs, and the structured JSON form, both ways.
//!
//! One event is one line: JSON data that holds a line break, or is `null`, is written as `data_base64`, so that lines
//! stay lines and every byte comes back as it was.

use std::{borrow::Cow, fmt};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use bytes::Bytes;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{MapAccess, Visitor},
    ser::SerializeMap,
};
use serde_json::value::RawValue;

use crate::{
    Event, EventBuilder, EventError, Text, Timestamp,
    event::{CONTENT_TYPE_BYTES_MAX, EXTENSIONS_MAX},
    name::check_length,
};

/// The version of CloudEvents that is written and read.
pub const SPECVERSION: &str = "1.0";

/// Most members one JSON object is read with: every attribute and every extension an event may have.
const MEMBERS_MAX: usize = EXTENSIONS_MAX + 32;

/// What `outbus consume` adds to the events it prints; they describe the delivery and are passed over when read back.
const DELIVERY_MEMBERS: [&str; 2] = ["attempt", "partition"];

/// How the data of a content type is written in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataFormat {
    /// `application/json`, `*/json` and `*+json`: the value itself.
    Json,
    /// `text/*`: a string.
    Text,
    /// Anything else: base64.
    Binary,
}

impl DataFormat {
    /// The format of `content_type`, whose parameters (`; charset=utf-8`) do not matter.
    pub fn of(content_type: &str) -> Self {
        let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        match essence.split_once('/') {
            Some((_, subtype)) if subtype == "json" || subtype.ends_with("+json") => Self::Json,
            Some(("text", _)) => Self::Text,
            _ => Self::Binary,
        }
    }
}

impl Event {
    /// The event as one line of structured JSON, with `topic` as a further member.
    pub fn to_json(&self) -> String {
        self.to_json_with(&[])
    }

    /// As [`to_json`](Event::to_json), with further members that describe a delivery, not the event.
    pub fn to_json_with(&self, members: &[(&str, u64)]) -> String {
        serde_json::to_string(&Structured { event: self, members })
            .expect("strings, numbers and checked JSON serialize")
    }

    /// Reads one event of structured JSON.
    ///
    /// `specversion`, `id`, `source` and `time` may be left out; `topic` and `type` may not.
    ///
    /// # Errors
    ///
    /// The field at fault: a rule it breaks, a member that stands twice or is null, data that is not what the content
    /// type says. Field `event`, if the text is no JSON object.
    pub fn from_json(json: &[u8]) -> Result<Self, EventError> {
        let members: Members<'_> = serde_json::from_slice(json).map_err(|error| not_an_object(&error))?;
        read(members.0)?.build()
    }
}

impl Serialize for Event {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Structured { event: self, members: &[] }.serialize(serializer)
    }
}

struct Structured<'a> {
    event: &'a Event,
    members: &'a [(&'a str, u64)],
}

impl Serialize for Structured<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let parts = self.event.parts();
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("specversion", SPECVERSION)?;
        map.serialize_entry("id", parts.id.as_str())?;
        map.serialize_entry("source", parts.source.as_str())?;
        map.serialize_entry("type", parts.event_type.as_str())?;
        if let Some(subject) = &parts.subject {
            map.serialize_entry("subject", subject.as_str())?;
        }
        map.serialize_entry("time", &format_args!("{}", parts.time))?;
        map.serialize_entry("datacontenttype", parts.content_type.as_str())?;
        map.serialize_entry("topic", &*parts.topic)?;
        if let Some(key) = &parts.key {
            map.serialize_entry("partitionkey", key.as_str())?;
        }
        for (name, value) in parts.extensions.iter() {
            map.serialize_entry(name.as_str(), value.as_str())?;
        }
        for (name, value) in self.members {
            map.serialize_entry(name, value)?;
        }
        serialize_data(&mut map, &parts.content_type, &parts.data)?;
        map.end()
    }
}

fn serialize_data<M: SerializeMap>(map: &mut M, content_type: &str, data: &Bytes) -> Result<(), M::Error> {
    if data.is_empty() {
        return Ok(());
    }
    match DataFormat::of(content_type) {
        DataFormat::Json => {
            if let Some(value) = verbatim_json(data) {
                return map.serialize_entry("data", value);
            }
        }
        DataFormat::Text => {
            if let Ok(text) = std::str::from_utf8(data) {
                return map.serialize_entry("data", text);
            }
        }
        DataFormat::Binary => {}
    }
    map.serialize_entry("data_base64", &BASE64.encode(data))
}

/// `data` as JSON that can stand inside a line byte for byte, if it is that.
fn verbatim_json(data: &[u8]) -> Option<&RawValue> {
    if data.iter().any(|byte| matches!(byte, b'\n' | b'\r')) || data == b"null" {
        return None;
    }
    // White space around the value would not come back.
    serde_json::from_slice::<&RawValue>(data).ok().filter(|value| value.get().len() == data.len())
}

/// The members of a JSON object, in order, duplicates included.
struct Members<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MembersVisitor;

        impl<'de> Visitor<'de> for MembersVisitor {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::with_capacity(16);
                while let Some(name) = map.next_key::<Name<'de>>()? {
                    if members.len() == MEMBERS_MAX {
                        return Err(serde::de::Error::custom("too many members"));
                    }
                    members.push((name.0, map.next_value()?));
                }
                Ok(Members(members))
            }
        }

        deserializer.deserialize_map(MembersVisitor)
    }
}

/// A member's name, borrowed where it has no escapes.
#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

fn not_an_object(error: &serde_json::Error) -> EventError {
    // Built here and not taken from serde_json, whose sentence can quote what it found.
    let problem = match error.classify() {
        serde_json::error::Category::Data => {
            format!("must be one JSON object of at most {MEMBERS_MAX} members with proper names")
        }
        serde_json::error::Category::Eof => format!("is not JSON: it ends too early, at column {}", error.column()),
        _ => format!("is not JSON: unexpected character at column {}", error.column()),
    };
    EventError::new("event", problem)
}

fn read(members: Vec<(Cow<'_, str>, &RawValue)>) -> Result<EventBuilder, EventError> {
    let mut seen: Vec<&str> = Vec::with_capacity(members.len());
    let mut builder = Event::builder("", "");
    let (mut topic, mut event_type, mut data, mut data_base64, mut content_type) = (None, None, None, None, None);
    for (name, value) in &members {
        if seen.contains(&&**name) {
            return Err(EventError::new(shown(name), "stands twice"));
        }
        seen.push(name);
        if value.get() == "null" {
            return Err(EventError::new(shown(name), "must not be null; leave it out"));
        }
        match &**name {
            "specversion" => read_specversion(value)?,
            "topic" => topic = Some(read_string("topic", value)?),
            "type" => event_type = Some(read_string("type", value)?),
            "id" => builder = builder.id(read_string("id", value)?),
            "source" => builder = builder.source(read_string("source", value)?),
            "subject" => builder = builder.subject(read_string("subject", value)?),
            "time" => builder = builder.time(read_string("time", value)?.parse::<Timestamp>()?),
            "datacontenttype" => content_type = Some(read_string("datacontenttype", value)?),
            "partitionkey" => builder = builder.key(read_string("partitionkey", value)?),
            "data" => data = Some(*value),
            "data_base64" => data_base64 = Some(*value),
            name if DELIVERY_MEMBERS.contains(&name) => {}
            name => builder = builder.extension(name, read_extension(name, value)?),
        }
    }
    let format = content_type.as_deref().map_or(DataFormat::Json, DataFormat::of);
    if let Some(content_type) = content_type {
        // Otherwise the data would be blamed, which is read as the content type says.
        check_length("datacontenttype", &content_type, CONTENT_TYPE_BYTES_MAX)?;
        builder = builder.content_type(content_type);
    }
    let topic = topic.ok_or_else(|| EventError::new("topic", "is missing"))?;
    let event_type = event_type.ok_or_else(|| EventError::new("type", "is missing"))?;
    Ok(builder.address(topic, event_type).data(read_data(format, data, data_base64)?))
}

fn read_specversion(value: &RawValue) -> Result<(), EventError> {
    match &*read_string("specversion", value)? {
        SPECVERSION => Ok(()),
        _ => Err(EventError::new("specversion", format!("must be \"{SPECVERSION}\""))),
    }
}

fn read_string(field: &'static str, value: &RawValue) -> Result<Text, EventError> {
    let text: Name<'_> =
        serde_json::from_str(value.get()).map_err(|_| EventError::new(field, "must be a string of valid Unicode"))?;
    Ok(text.0.into())
}

/// The canonical string of an extension's value.
fn read_extension(name: &str, value: &RawValue) -> Result<Text, EventError> {
    match serde_json::from_str(value.get()) {
        Ok(serde_json::Value::String(text)) => Ok(text.into()),
        Ok(serde_json::Value::Bool(flag)) => Ok(flag.into()),
        Ok(serde_json::Value::Number(number)) => Ok(number.to_string().into()),
        _ => Err(EventError::new(shown(name), "must be a string, a number or a boolean")),
    }
}

fn read_data(format: DataFormat, data: Option<&RawValue>, data_base64: Option<&RawValue>) -> Result<Bytes, EventError> {
    match (data, data_base64) {
        (None, None) => Ok(Bytes::new()),
        (Some(_), Some(_)) => Err(EventError::new("data_base64", "must not stand beside `data`")),
        (Some(value), None) if format == DataFormat::Json => Ok(Bytes::copy_from_slice(value.get().as_bytes())),
        (Some(value), None) => {
            let text: Name<'_> = serde_json::from_str(value.get()).map_err(|_| {
                EventError::new("data", "must be a string for this content type; use `data_base64` for bytes")
            })?;
            Ok(Bytes::from(text.0.into_owned()))
        }
        (None, Some(value)) => {
            let text = read_string("data_base64", value)?;
            BASE64
                .decode(text.as_str())
                .map(Bytes::from)
                .map_err(|_| EventError::new("data_base64", "must be base64 in the standard alphabet, padded"))
        }
    }
}

/// A member's name as an error shows it.
fn shown(name: &str) -> String {
    name.chars().filter(|c| !c.is_control()).take(64).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FULL: &str = r#"{"specversion":"1.0","id":"e-1","source":"/shop","type":"order.placed","subject":"order/7","time":"2026-11-21T09:30:00.000000Z","datacontenttype":"application/json","topic":"orders","partitionkey":"order-7","tenantid":"acme","data":{"total": 5.00, "a":1}}"#;

    #[test]
    fn a_full_event_comes_back_byte_for_byte() {
        let event = Event::from_json(FULL.as_bytes()).unwrap();
        assert_eq!(event.to_json(), FULL);
        assert_eq!(event.data().as_ref(), br#"{"total": 5.00, "a":1}"#, "the data is kept verbatim, 5.00 included");
    }

    #[test]
    fn fills_in_what_may_be_left_out() {
        let event = Event::from_json(br#"{"topic":"orders","type":"order.placed"}"#).unwrap();
        assert_eq!((event.source(), event.content_type(), event.data().len()), ("/outbus", "application/json", 0));
        assert_eq!(event.id().len(), 36);
    }

    #[test]
    fn numbers_and_booleans_in_extensions_become_strings() {
        let event =
            Event::from_json(br#"{"topic":"o","type":"t","n":42,"f":1.50,"b":true,"big":18446744073709551615}"#);
        let event = event.unwrap();
        let of = |name| event.extension(name).unwrap();
        assert_eq!((of("n"), of("f"), of("b"), of("big")), ("42", "1.5", "true", "18446744073709551615"));
    }

    #[test]
    fn refuses_by_field() {
        let wrong = [
            ("event", "{"),
            ("event", "[]"),
            ("event", r#""4711""#),
            ("event", r#"{"topic":"o","type":"t"} x"#),
            ("event", "\u{feff}{}"),
            ("topic", r#"{"type":"t"}"#),
            ("topic", r#"{"topic":"a/b","type":"t"}"#),
            ("topic", r#"{"topic":5,"type":"t"}"#),
            ("type", r#"{"topic":"o"}"#),
            ("type", r#"{"topic":"o","type":""}"#),
            ("id", r#"{"topic":"o","type":"t","id":"a","id":"b"}"#),
            ("id", r#"{"topic":"o","type":"t","id":null}"#),
            ("id", r#"{"topic":"o","type":"t","id":"\ud800"}"#),
            ("data", r#"{"topic":"o","type":"t","data":null}"#),
            ("data", r#"{"topic":"o","type":"t","datacontenttype":"text/plain","data":{"a":1}}"#),
            ("datacontenttype", r#"{"topic":"o","type":"t","datacontenttype":"","data":1}"#),
            ("data_base64", r#"{"topic":"o","type":"t","data":1,"data_base64":"AA=="}"#),
            ("data_base64", r#"{"topic":"o","type":"t","data_base64":"*"}"#),
            ("time", r#"{"topic":"o","type":"t","time":"noon"}"#),
            ("specversion", r#"{"topic":"o","type":"t","specversion":"0.3"}"#),
            ("nested", r#"{"topic":"o","type":"t","nested":{"a":1}}"#),
            ("Tenant", r#"{"topic":"o","type":"t","Tenant":"a"}"#),
        ];
        for (field, json) in wrong {
            let error = Event::from_json(json.as_bytes()).expect_err(json);
            assert_eq!(error.field(), field, "{json}: {error}");
            assert!(!error.to_string().contains("4711"), "{error}");
        }
        let many: String = (0..200).map(|n| format!(r#","x{n}":"v""#)).collect();
        assert!(Event::from_json(format!(r#"{{"topic":"o","type":"t"{many}}}"#).as_bytes()).is_err());
    }

    #[test]
    fn data_is_written_as_its_content_type_says() {
        let with = |content_type: &str, data: &str| {
            Event::builder("o", "t").content_type(content_type).data(data.to_owned()).build().unwrap().to_json()
        };
        assert!(with("application/json", r#"{"a":1}"#).contains(r#""data":{"a":1}"#));
        assert!(with("application/problem+json; charset=utf-8", "[1]").contains(r#""data":[1]"#));
        assert!(with("text/plain", "a \"b\"").contains(r#""data":"a \"b\"""#));
        assert!(with("application/octet-stream", "abc").contains(r#""data_base64":"YWJj""#));
        for not_in_a_line in ["{", "{\n}", " 1", "1 ", "null"] {
            assert!(with("application/json", not_in_a_line).contains("data_base64"), "{not_in_a_line:?}");
        }
    }

    #[test]
    fn what_consume_adds_is_passed_over_when_read_back() {
        let event = Event::from_json(FULL.as_bytes()).unwrap();
        let printed = event.to_json_with(&[("attempt", 2), ("partition", 7)]);
        assert!(printed.contains(r#""attempt":2,"partition":7"#));
        assert_eq!(Event::from_json(printed.as_bytes()).unwrap(), event);
    }

    proptest! {
        #[test]
        fn every_event_survives_the_way_through_json(
            id in "\\PC{1,40}", key in proptest::option::of("\\PC{1,40}"), subject in proptest::option::of("\\PC{1,20}"),
            content_type in prop_oneof![Just("application/json"), Just("text/plain"), Just("image/png"), Just("a+json")],
            data in proptest::collection::vec(any::<u8>(), 0..60), json in any::<bool>(),
            micros in any::<i64>(), tenant in "\\PC{0,30}",
        ) {
            let data = if json { format!("{{\"a\": {micros}}}").into_bytes() } else { data };
            let mut builder = Event::builder("orders", "order.placed").id(id).content_type(content_type)
                .time(Timestamp::from_unix_micros(micros)).extension("tenantid", tenant).data(data);
            if let Some(key) = key { builder = builder.key(key) }
            if let Some(subject) = subject { builder = builder.subject(subject) }
            let event = builder.build().unwrap();
            let line = event.to_json();
            prop_assert!(!line.contains('\n'));
            prop_assert_eq!(Event::from_json(line.as_bytes()).unwrap(), event);
        }

        #[test]
        fn no_input_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Event::from_json(&bytes);
        }
    }
}
