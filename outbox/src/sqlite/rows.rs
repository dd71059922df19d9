//! SQLite's rows, as the decoder reads them.

use bus_core::Seq;
use sqlx::{Row as _, sqlite::SqliteRow};

use super::log_error;
use crate::{
    LogError,
    rows::{EventRow, Unreadable},
};

/// The columns of an event, as [`EventRow`] has them.
pub(super) const COLUMNS: &str = "seq, id, topic, key, type, source, subject, content_type, extensions, time, data";

impl EventRow for SqliteRow {
    fn seq(&self) -> Result<Seq, LogError> {
        Ok(Seq(self.try_get::<i64, _>(0).map_err(log_error)?.unsigned_abs()))
    }

    fn optional(&self, column: usize) -> Result<Option<&str>, Unreadable> {
        self.try_get_unchecked(column).map_err(|_| Unreadable)
    }

    fn time(&self) -> Result<i64, Unreadable> {
        self.try_get(9).map_err(|_| Unreadable)
    }

    /// The data, whether it was inserted as a blob or as text.
    fn data(&self) -> Result<&[u8], Unreadable> {
        self.try_get_unchecked(10).map_err(|_| Unreadable)
    }
}
