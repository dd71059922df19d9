//! Names, validated once by the strictest broker's rule.

use std::{borrow::Cow, fmt, ops::Deref, str::FromStr};

use crate::Text;

/// Longest accepted topic, in bytes.
///
/// Source: with a group of [`GROUP_BYTES_MAX`], `<topic>.<group>.dead` fits Kafka's 249 and
/// `<topic>.<group>.members` fits AMQP's 255.
pub const TOPIC_BYTES_MAX: usize = 120;

/// Longest accepted consumer group, in bytes. See [`TOPIC_BYTES_MAX`].
pub const GROUP_BYTES_MAX: usize = 80;

/// Endings that name what is derived from a topic, so a topic may not have them.
const TOPIC_ENDINGS_RESERVED: [&str; 5] = [".dead", ".members", ".partitions", ".owner", ".suspect"];

/// An event, a topic or a group that breaks a rule: which field, and what would be right.
///
/// Never holds a payload.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{field}` {problem}")]
pub struct EventError {
    field: Cow<'static, str>,
    problem: String,
}

impl EventError {
    /// An error of `field`; `problem` continues a sentence that starts with the field's name.
    pub fn new(field: impl Into<Cow<'static, str>>, problem: impl Into<String>) -> Self {
        Self { field: field.into(), problem: problem.into() }
    }

    /// The attribute at fault, by its CloudEvents name (`partitionkey` for the key).
    pub fn field(&self) -> &str {
        &self.field
    }

    /// What is wrong with the field, without its name.
    pub fn problem(&self) -> &str {
        &self.problem
    }
}

impl From<std::convert::Infallible> for EventError {
    fn from(never: std::convert::Infallible) -> Self {
        match never {}
    }
}

/// Where events go: a Kafka topic, a RabbitMQ exchange, a set of Redis streams.
///
/// `[a-zA-Z0-9][a-zA-Z0-9._-]*`, at most [`TOPIC_BYTES_MAX`] bytes, not starting with `amq.`, and not ending with
/// a name that is derived from topics (`.dead`, `.members`, `.partitions`, `.owner`, `.suspect`).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Topic(Text);

/// A consumer group: its members share the events of a topic; every group sees all of them.
///
/// `[a-zA-Z0-9_-]+`, at most [`GROUP_BYTES_MAX`] bytes. No dot, so that derived names read one way only.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Group(Text);

impl Topic {
    /// Checks `name` and makes a topic of it.
    pub fn new(name: impl Into<Text>) -> Result<Self, EventError> {
        let name = name.into();
        check_topic(&name)?;
        Ok(Self(name))
    }
}

impl Group {
    /// Checks `name` and makes a group of it.
    pub fn new(name: impl Into<Text>) -> Result<Self, EventError> {
        let name = name.into();
        check_length("group", &name, GROUP_BYTES_MAX)?;
        check_characters("group", &name, "_-")?;
        Ok(Self(name))
    }
}

macro_rules! name_type {
    ($name:ident) => {
        impl $name {
            /// The name as text, sharing its buffer.
            pub fn as_text(&self) -> &Text {
                &self.0
            }
        }

        impl Deref for $name {
            type Target = str;

            fn deref(&self) -> &str {
                &self.0
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = EventError;

            fn from_str(name: &str) -> Result<Self, EventError> {
                Self::new(name)
            }
        }

        impl TryFrom<&str> for $name {
            type Error = EventError;

            fn try_from(name: &str) -> Result<Self, EventError> {
                Self::new(name)
            }
        }

        impl PartialEq<str> for $name {
            fn eq(&self, other: &str) -> bool {
                **self == *other
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

name_type!(Topic);
name_type!(Group);

fn check_topic(name: &str) -> Result<(), EventError> {
    check_length("topic", name, TOPIC_BYTES_MAX)?;
    check_characters("topic", name, "._-")?;
    if !name.starts_with(|first: char| first.is_ascii_alphanumeric()) {
        return Err(EventError::new("topic", "must start with a letter or a digit"));
    }
    if name.starts_with("amq.") {
        return Err(EventError::new("topic", "must not start with `amq.`: RabbitMQ keeps these names for itself"));
    }
    match TOPIC_ENDINGS_RESERVED.iter().find(|ending| name.ends_with(**ending)) {
        Some(ending) => {
            Err(EventError::new("topic", format!("must not end with `{ending}`: such names are derived from topics")))
        }
        None => Ok(()),
    }
}

/// Checks that `value` is not empty and not longer than `bytes_max`.
pub(crate) fn check_length(field: &'static str, value: &str, bytes_max: usize) -> Result<(), EventError> {
    match value.len() {
        0 => Err(EventError::new(field, "must not be empty")),
        length if length > bytes_max => {
            Err(EventError::new(field, format!("is {length} bytes long; at most {bytes_max} are allowed")))
        }
        _ => Ok(()),
    }
}

/// Checks that `value` holds only ASCII letters, digits and `others`.
pub(crate) fn check_characters(field: &'static str, value: &str, others: &str) -> Result<(), EventError> {
    let refused = value.chars().find(|c| !c.is_ascii_alphanumeric() && !others.contains(*c));
    match refused {
        Some(c) => {
            Err(EventError::new(field, format!("must not contain {c:?}; letters, digits and `{others}` are allowed")))
        }
        None => Ok(()),
    }
}

/// Checks that `value` holds no control character.
///
/// Source: CloudEvents 1.0, type String; and PostgreSQL's text cannot hold U+0000.
pub(crate) fn check_printable(field: &'static str, value: &str) -> Result<(), EventError> {
    // The usual case, plain ASCII, is checked bytewise.
    if value.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
        return Ok(());
    }
    match value.chars().find(|c| c.is_control()) {
        Some(c) => {
            Err(EventError::new(field, format!("must not contain control characters, found U+{:04X}", u32::from(c))))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_follow_the_strictest_broker() {
        for good in ["orders", "a", "A-b_c.d", "0", &"x".repeat(120)] {
            assert!(Topic::new(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            ".orders",
            "a/b",
            "a b",
            "amq.topic",
            "orders.dead",
            "a.members",
            "x.partitions",
            "x.owner",
            "x.suspect",
            "ordérs",
            &"x".repeat(121),
        ] {
            let error = Topic::new(bad).expect_err(bad);
            assert_eq!(error.field(), "topic");
        }
    }

    #[test]
    fn groups_have_no_dots() {
        assert!(Group::new("billing-2_b").is_ok());
        for bad in ["", "a.b", "a/b", &"g".repeat(81)] {
            assert!(Group::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn errors_name_the_field_and_the_remedy() {
        assert_eq!(
            Topic::new("a/b").unwrap_err().to_string(),
            "`topic` must not contain '/'; letters, digits and `._-` are allowed"
        );
    }
}
