//! What PostgreSQL's columns hold, in our terms and back.

use std::{error::Error, fmt::Write as _};

use bus_core::{Seq, SeqSet};
use tokio_postgres::{
    Row,
    types::{FromSql, Type},
};

use super::log_error;
use crate::{
    LogError, LogErrorKind,
    rows::{EventRow, Unreadable},
};

/// The columns of an event, as [`EventRow`] has them.
pub(super) const COLUMNS: &str =
    "seq, id, topic, key, type, source, subject, content_type, extensions::text, time, data";
/// How many they are.
pub(super) const EVENT_COLUMNS: usize = 11;

/// Microseconds between 1970 and 2000, where PostgreSQL's clock begins.
const EPOCH: i64 = 946_684_800_000_000;

/// A `timestamptz` in microseconds since 1970; infinity is as far as it goes.
pub(super) struct Micros(pub(super) i64);

impl<'a> FromSql<'a> for Micros {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        Ok(Self(i64::from_be_bytes(raw.try_into()?).saturating_add(EPOCH)))
    }

    fn accepts(column: &Type) -> bool {
        *column == Type::TIMESTAMPTZ
    }
}

impl EventRow for Row {
    fn seq(&self) -> Result<Seq, LogError> {
        Ok(Seq(self.try_get::<_, i64>(0).map_err(log_error)?.unsigned_abs()))
    }

    fn optional(&self, column: usize) -> Result<Option<&str>, Unreadable> {
        self.try_get(column).map_err(|_| Unreadable)
    }

    fn time(&self) -> Result<i64, Unreadable> {
        self.try_get::<_, Micros>(9).map(|micros| micros.0).map_err(|_| Unreadable)
    }

    fn data(&self) -> Result<&[u8], Unreadable> {
        self.try_get(10).map_err(|_| Unreadable)
    }
}

/// Places as a multirange in text: `{[1,3],[7,7]}`.
pub(super) fn multirange(seqs: &SeqSet) -> String {
    let mut text = String::from("{");
    for (at, (first, last)) in seqs.ranges().enumerate() {
        let comma = if at > 0 { "," } else { "" };
        write!(text, "{comma}[{first},{}]", last.0.min(i64::MAX as u64 - 1)).expect("a string takes it");
    }
    text + "}"
}

/// Places from a multirange as PostgreSQL writes it: `{[1,4),[7,8)}`.
pub(super) fn parse_multirange(text: &str) -> Result<SeqSet, LogError> {
    let damaged = || LogError::new(LogErrorKind::Schema, "column `holes` holds something it should not");
    let inner = text.strip_prefix('{').and_then(|text| text.strip_suffix('}')).ok_or_else(damaged)?;
    let mut seqs = SeqSet::new();
    for range in inner.split_terminator(')') {
        let range = range.trim_start_matches(',').strip_prefix('[').ok_or_else(damaged)?;
        let (first, end) = range.split_once(',').ok_or_else(damaged)?;
        let (first, end): (u64, u64) = first.parse().ok().zip(end.parse().ok()).ok_or_else(damaged)?;
        if first >= end {
            return Err(damaged());
        }
        seqs.insert_range(Seq(first), Seq(end - 1));
    }
    Ok(seqs)
}

/// Topic patterns as `LIKE` has them.
pub(super) fn like<'a>(patterns: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let escape =
        |pattern: &str| pattern.replace('\\', "\\\\").replace('_', "\\_").replace('%', "\\%").replace('*', "%");
    patterns.into_iter().map(escape).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_go_there_and_back() {
        let seqs: SeqSet = [1, 2, 3, 7].into_iter().map(Seq).collect();
        assert_eq!(multirange(&seqs), "{[1,3],[7,7]}");
        assert_eq!(parse_multirange("{[1,4),[7,8)}").unwrap(), seqs);
        assert_eq!((multirange(&SeqSet::new()), parse_multirange("{}").unwrap()), ("{}".to_owned(), SeqSet::new()));
        for damaged in ["", "{", "{[1,4]}", "{(1,4)}", "{[4,1)}", "{[a,b)}", "{[1,)}"] {
            assert_eq!(parse_multirange(damaged).unwrap_err().kind(), LogErrorKind::Schema, "{damaged}");
        }
    }

    #[test]
    fn patterns_escape_what_like_gives_a_meaning() {
        assert_eq!(like(["*", "orders.*", "a_b"]), ["%", "orders.%", "a\\_b"]);
    }
}
