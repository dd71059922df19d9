//! The options in a bus's URL, `?partitions=8&...`: known ones are taken, what is left is refused.

use std::{collections::BTreeMap, str::FromStr, time::Duration};

use url::Url;

use crate::{BusError, ErrorKind};

/// Takes options out of a URL's query one by one.
#[derive(Debug)]
pub struct UrlOptions(BTreeMap<String, String>);

impl UrlOptions {
    /// The options of `url`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if one stands twice.
    pub fn new(url: &Url) -> Result<Self, BusError> {
        let mut options = BTreeMap::new();
        for (name, value) in url.query_pairs() {
            if options.insert(name.to_string(), value.to_string()).is_some() {
                return Err(BusError::new(ErrorKind::Invalid, format!("bus URL: option `{name}` stands twice")));
            }
        }
        Ok(Self(options))
    }

    /// Takes an option that is written as `T` is.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] with the option's name if its value is no `T`.
    pub fn take<T: FromStr>(&mut self, name: &str) -> Result<Option<T>, BusError> {
        let parsed = self.0.remove(name).map(|value| value.parse().map_err(|_| bad_value(name, &value)));
        parsed.transpose()
    }

    /// Takes a duration: `250ms`, `30s`, `5m`, `1h`, `7d`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] with the option's name if its value is no duration.
    pub fn take_duration(&mut self, name: &str) -> Result<Option<Duration>, BusError> {
        let parsed = self.0.remove(name).map(|value| parse_duration(&value).ok_or_else(|| bad_value(name, &value)));
        parsed.transpose()
    }

    /// Refuses what was not taken.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] with the name of the first unknown option.
    pub fn finish(self) -> Result<(), BusError> {
        match self.0.keys().next() {
            Some(name) => Err(BusError::new(ErrorKind::Invalid, format!("bus URL: unknown option `{name}`"))),
            None => Ok(()),
        }
    }
}

/// Reads a duration with its unit: `250ms`, `30s`, `5m`, `1h`, `7d`; whole numbers only.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let unit_at = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(unit_at);
    let number: u64 = number.parse().ok()?;
    let seconds = match unit {
        "ms" => return Some(Duration::from_millis(number)),
        "s" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => 86_400,
        _ => return None,
    };
    number.checked_mul(seconds).map(Duration::from_secs)
}

fn bad_value(name: &str, value: &str) -> BusError {
    let shown: String = value.chars().take(40).collect();
    BusError::new(ErrorKind::Invalid, format!("bus URL: option `{name}` has a value it cannot have: `{shown}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_is_known_and_refuses_the_rest() {
        let url: Url = "memory://?partitions=4&confirm_timeout=250ms&colour=red".parse().unwrap();
        let mut options = UrlOptions::new(&url).unwrap();
        assert_eq!(options.take::<u32>("partitions").unwrap(), Some(4));
        assert_eq!(options.take_duration("confirm_timeout").unwrap(), Some(Duration::from_millis(250)));
        assert!(options.finish().unwrap_err().to_string().contains("colour"));
        let twice: Url = "memory://?a=1&a=2".parse().unwrap();
        assert!(UrlOptions::new(&twice).is_err());
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(parse_duration("5m"), Some(Duration::from_secs(300)));
        assert_eq!(parse_duration("7d"), Some(Duration::from_secs(604_800)));
        for bad in ["", "5", "m", "1.5s", "-1s", "5 s", "5w", "99999999999999999999s", "18446744073709551615d"] {
            assert_eq!(parse_duration(bad), None, "{bad}");
        }
    }
}
