//! [`TopicPattern`]: which topics a sink takes.

use std::{fmt, str::FromStr};

use bus_core::{EventError, limits::TOPIC_BYTES_MAX};

/// A topic's name in which `*` stands for any characters, also none: `*`, `orders`, `orders.*`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TopicPattern(String);

impl TopicPattern {
    /// The pattern that every topic matches.
    pub fn any() -> Self {
        Self("*".to_owned())
    }

    /// Whether `topic` matches.
    pub fn matches(&self, topic: &str) -> bool {
        let mut parts = self.0.split('*');
        let first = parts.next().unwrap_or_default();
        let Some(mut rest) = topic.strip_prefix(first) else { return false };
        let mut parts = parts.peekable();
        if parts.peek().is_none() {
            return rest.is_empty();
        }
        while let Some(part) = parts.next() {
            if parts.peek().is_none() {
                return rest.ends_with(part);
            }
            match rest.find(part) {
                Some(at) => rest = &rest[at + part.len()..],
                None => return false,
            }
        }
        true
    }

    /// The pattern as it was written; also one for SQL's `GLOB`, for it holds no other special character.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TopicPattern {
    type Err = EventError;

    fn from_str(text: &str) -> Result<Self, EventError> {
        let problem = match text.chars().find(|c| !c.is_ascii_alphanumeric() && !"._-*".contains(*c)) {
            Some(c) => format!("must not contain {c:?}; letters, digits, `._-` and `*` are allowed"),
            None if text.is_empty() => "must not be empty; `*` takes every topic".to_owned(),
            None if text.len() > TOPIC_BYTES_MAX => format!("is longer than a topic can be, {TOPIC_BYTES_MAX} bytes"),
            None => return Ok(Self(text.to_owned())),
        };
        Err(EventError::new("topics", problem))
    }
}

impl fmt::Display for TopicPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_characters() {
        let cases = [
            ("*", "orders", true),
            ("orders", "orders", true),
            ("orders", "orders.eu", false),
            ("orders.*", "orders.eu", true),
            ("orders.*", "orders", false),
            ("*.eu", "orders.eu", true),
            ("*.eu", "orders.eu.x", false),
            ("o*r*s", "orders", true),
            ("o*r*s", "os", false),
            ("a*a", "a", false),
            ("**", "", true),
        ];
        for (pattern, topic, matches) in cases {
            assert_eq!(pattern.parse::<TopicPattern>().unwrap().matches(topic), matches, "{pattern} {topic}");
        }
        for bad in ["", "or ders", "orders[12]", "a?"] {
            assert!(bad.parse::<TopicPattern>().is_err(), "{bad}");
        }
    }
}
