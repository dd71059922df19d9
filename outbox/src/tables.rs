//! [`Tables`]: what the outbox's tables are called.

use bus_core::EventError;

/// What the tables are called, and what they allow.
///
/// On PostgreSQL they stand in a schema of this name; on SQLite the names of all begin with it and an underscore.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tables {
    name: String,
    event_bytes_max: usize,
}

impl Tables {
    /// Tables called after `name`, for events of at most `event_bytes_max` bytes of data.
    ///
    /// # Errors
    ///
    /// Field `name`, unless it is a lower-case letter followed by lower-case letters, digits and underscores, at most 32
    /// characters, and does not begin with `pg_`, which is PostgreSQL's own.
    pub fn new(name: &str, event_bytes_max: usize) -> Result<Self, EventError> {
        let word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        let fits = name.starts_with(|c: char| c.is_ascii_lowercase()) && name.chars().all(word) && name.len() <= 32;
        if !fits || name.starts_with("pg_") {
            let problem = "must be a lower-case letter followed by lower-case letters, digits and underscores, at most \
                 32 characters, and not begin with pg_";
            return Err(EventError::new("name", problem));
        }
        Ok(Self { name: name.to_owned(), event_bytes_max })
    }

    /// Largest event in bytes, as [`Event::size_bytes`](bus_core::Event::size_bytes) counts.
    pub fn event_bytes_max(&self) -> usize {
        self.event_bytes_max
    }

    /// Fills in the names of a statement for SQLite.
    #[cfg(feature = "sqlite")]
    pub(crate) fn expand(&self, template: &str) -> String {
        self.fill(template, &format!("{}_", self.name))
    }

    /// Fills in the names of a statement for PostgreSQL.
    #[cfg(feature = "postgres")]
    pub(crate) fn qualify(&self, template: &str) -> String {
        self.fill(template, &format!("\"{}\".", self.name)).replace("{schema}", &self.name)
    }

    fn fill(&self, template: &str, names: &str) -> String {
        template.replace("{p}", names).replace("{event_bytes_max}", &self.event_bytes_max.to_string())
    }
}

impl Default for Tables {
    fn default() -> Self {
        Self { name: "outbus".to_owned(), event_bytes_max: crate::EVENT_BYTES_MAX }
    }
}
