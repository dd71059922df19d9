//! [`Timestamp`]: UTC, in microseconds.

use std::{fmt, str::FromStr};

use chrono::{DateTime, SecondsFormat, Utc};

use crate::EventError;

/// First instant that RFC 3339 can write, 0000-01-01T00:00:00Z.
const MICROS_MIN: i64 = -62_167_219_200_000_000;
/// Last instant that RFC 3339 can write, 9999-12-31T23:59:59.999999Z.
const MICROS_MAX: i64 = 253_402_300_799_999_999;

/// An instant in UTC with microsecond precision, written as RFC 3339 with six digits and `Z`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

impl Timestamp {
    /// The host's clock, now.
    pub fn now() -> Self {
        Self(Utc::now().timestamp_micros())
    }

    /// The instant `micros` microseconds after 1970-01-01T00:00:00Z, held inside the years 0 to 9999.
    pub fn from_unix_micros(micros: i64) -> Self {
        Self(micros.clamp(MICROS_MIN, MICROS_MAX))
    }

    /// Microseconds since 1970-01-01T00:00:00Z.
    pub fn unix_micros(self) -> i64 {
        self.0
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time: DateTime<Utc> =
            DateTime::from_timestamp_micros(self.0).expect("the range is checked where a timestamp is made");
        f.write_str(&time.to_rfc3339_opts(SecondsFormat::Micros, true))
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Timestamp {
    type Err = EventError;

    /// Reads RFC 3339 with any offset; digits beyond microseconds are cut.
    fn from_str(text: &str) -> Result<Self, EventError> {
        let wrong = || EventError::new("time", "must be RFC 3339, such as 2026-11-21T09:30:00.000000Z");
        let micros = DateTime::parse_from_rfc3339(text).map_err(|_| wrong())?.timestamp_micros();
        if !(MICROS_MIN..=MICROS_MAX).contains(&micros) {
            return Err(wrong());
        }
        Ok(Self(micros))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_written_with_six_digits_in_utc() {
        let time: Timestamp = "2026-11-21T10:30:00.1234567+01:00".parse().unwrap();
        assert_eq!(time.to_string(), "2026-11-21T09:30:00.123456Z");
        assert_eq!(Timestamp::from_unix_micros(0).to_string(), "1970-01-01T00:00:00.000000Z");
    }

    #[test]
    fn stays_inside_what_can_be_written() {
        for micros in [i64::MIN, MICROS_MIN, -1, 0, MICROS_MAX, i64::MAX] {
            let time = Timestamp::from_unix_micros(micros);
            assert_eq!(time.to_string().parse::<Timestamp>().unwrap(), time);
        }
        assert!("0000-01-01T00:00:00+23:00".parse::<Timestamp>().is_err(), "the year before 0 cannot be written");
        assert!("yesterday".parse::<Timestamp>().is_err());
    }
}
