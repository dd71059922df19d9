//! [`Tables`]: what the outbox's tables are called.

use bus_core::EventError;

/// What the tables are called, and what they allow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tables {
    prefix: String,
    event_bytes_max: usize,
}

impl Tables {
    /// Tables whose names begin with `prefix`, for events of at most `event_bytes_max` bytes of data.
    ///
    /// # Errors
    ///
    /// Field `prefix`, unless it is a letter followed by letters, digits and underscores, at most 32 characters.
    pub fn new(prefix: &str, event_bytes_max: usize) -> Result<Self, EventError> {
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let fits =
            prefix.starts_with(|c: char| c.is_ascii_alphabetic()) && prefix.chars().all(word) && prefix.len() <= 32;
        if !fits {
            let problem = "must be a letter followed by letters, digits and underscores, at most 32 characters";
            return Err(EventError::new("prefix", problem));
        }
        Ok(Self { prefix: prefix.to_owned(), event_bytes_max })
    }

    /// Largest event in bytes, as [`Event::size_bytes`](bus_core::Event::size_bytes) counts.
    pub fn event_bytes_max(&self) -> usize {
        self.event_bytes_max
    }

    /// Fills in the names of a statement.
    pub(crate) fn expand(&self, template: &str) -> String {
        template.replace("{p}", &self.prefix).replace("{event_bytes_max}", &self.event_bytes_max.to_string())
    }
}

impl Default for Tables {
    fn default() -> Self {
        Self { prefix: "outbus_".to_owned(), event_bytes_max: crate::EVENT_BYTES_MAX }
    }
}
