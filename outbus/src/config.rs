//! The configuration file: one struct per section, every field with its default. Unknown fields are refused.

use std::{
    collections::BTreeMap,
    fmt,
    num::NonZeroU32,
    path::{Path, PathBuf},
    time::Duration,
};

use bus::BusConfig;
use bus_core::{Group, RetryPolicy, Topic, TopicSpec, Topology, url_options::parse_duration};
use outbox::{OnFailure, PostgresConfig, RelayConfig, Start, TopicPattern};
use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, SeqAccess, Visitor, value::MapAccessDeserializer},
};

use crate::{database::Database, failure::Failure};

/// The file that is read where none is named.
const DEFAULT_FILE: &str = "outbus.toml";
/// Sections and fields, by their paths, that a later build has.
const LATER: [&str; 11] = [
    "http",
    "consumer",
    "bus.topology",
    "bus.replication_factor",
    "bus.prefix",
    "bus.ca",
    "bus.cert",
    "bus.key",
    "bus.verify",
    "bus.kafka",
    "bus.redis",
];

/// Everything that can be configured.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    database: DatabaseSection,
    bus: BusConfig,
    topics: BTreeMap<String, TopicSection>,
    relay: Relays,
    /// The file it was read from, for messages.
    #[serde(skip)]
    file: Option<PathBuf>,
}

#[derive(Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct DatabaseSection {
    /// `postgres://user:password@host/database`, `sqlite:relative.db`, `sqlite:///absolute.db`.
    url: String,
    /// Where notifications are listened for, if `url` leads through a pooler.
    listen_url: String,
}

/// Without user, password and options.
impl fmt::Debug for DatabaseSection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DatabaseSection").field("url", &bus::shown(&self.url)).finish_non_exhaustive()
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct TopicSection {
    /// Partitions of the topic; what exists must agree.
    partitions: Option<NonZeroU32>,
    /// Groups that exist before the first event is published.
    groups: Vec<String>,
}

/// One `[relay]`, or several `[[relay]]`.
#[derive(Clone, Debug)]
struct Relays(Vec<RelaySection>);

impl Default for Relays {
    fn default() -> Self {
        Self(vec![RelaySection::default()])
    }
}

/// A relay: which log it publishes for which sink, and how.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct RelaySection {
    /// The log it reads. There is one: `outbox`.
    log: String,
    /// The sink it reads it for: what it settles, parks and keeps is this sink's.
    pub(crate) sink: String,
    /// The topics it takes: `["*"]`, `["orders.*"]`.
    topics: Vec<String>,
    /// Where a new sink begins: `earliest` or `latest`.
    start: StartSetting,
    /// What becomes of an event whose attempts are spent: `park`, `dead_letter` or `halt`.
    on_failure: OnFailureSetting,
    /// Times an event is tried that the broker refuses.
    attempts: u32,
    /// Wait after the first attempt; it doubles up to `backoff_max`.
    backoff_min: Span,
    /// Longest wait between attempts.
    backoff_max: Span,
    /// Most events read and not settled.
    window_events: usize,
    /// Most bytes of them.
    window_bytes: Size,
    /// How long others wait when this relay dies.
    lease: Span,
    /// Longest wait before the log is looked at unasked.
    poll_interval: Span,
    /// How long rows stay after every sink has settled them; `never` keeps them.
    retention: Retention,
    /// How long events that are under way are waited for at shutdown.
    drain: Span,
    /// Accept a bus that forgets what it confirmed when its process ends.
    allow_volatile: bool,
}

impl Default for RelaySection {
    fn default() -> Self {
        let relay = RelayConfig::default();
        Self {
            log: "outbox".to_owned(),
            sink: "main".to_owned(),
            topics: vec!["*".to_owned()],
            start: StartSetting::Earliest,
            on_failure: OnFailureSetting::Park,
            attempts: relay.retry.attempts,
            backoff_min: Span(relay.retry.backoff_min),
            backoff_max: Span(relay.retry.backoff_max),
            window_events: relay.window_events,
            window_bytes: Size(relay.window_bytes),
            lease: Span(relay.lease),
            poll_interval: Span(relay.poll_interval),
            retention: Retention(relay.retention),
            drain: Span(relay.drain),
            allow_volatile: false,
        }
    }
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StartSetting {
    Earliest,
    Latest,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum OnFailureSetting {
    Park,
    DeadLetter,
    Halt,
}

/// A duration with its unit.
#[derive(Clone, Copy, Debug)]
struct Span(Duration);

/// A number of bytes: a number, or one with KiB, MiB or GiB.
#[derive(Clone, Copy, Debug)]
struct Size(usize);

/// A duration, or `never`.
#[derive(Clone, Copy, Debug)]
struct Retention(Option<Duration>);

impl Config {
    /// Reads the file that was named, by the flag or the environment, or the default one if it exists.
    pub(crate) fn load(flag: Option<&Path>) -> Result<Self, Failure> {
        let default = Path::new(DEFAULT_FILE);
        match flag.map_or_else(|| variable("OUTBUS_CONFIG").map(PathBuf::from), |flag| Some(flag.to_owned())) {
            Some(path) => Self::read(&path),
            None if default.exists() => Self::read(default),
            None => Ok(Self::default()),
        }
    }

    fn read(path: &Path) -> Result<Self, Failure> {
        let wrong = |problem: String| Failure::usage("config", format!("{}: {problem}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|error| wrong(format!("cannot be read: {error}")))?;
        let config = Self::parse(&text).map_err(wrong)?;
        Ok(Self { file: Some(path.to_owned()), ..config })
    }

    /// A field of the file that cannot be what it is.
    pub(crate) fn wrong(&self, problem: impl fmt::Display) -> Failure {
        let file = self.file.as_ref().map_or_else(String::new, |file| format!("{}: ", file.display()));
        Failure::usage("config", format!("{file}{problem}"))
    }

    /// The error names the field by its path, what was found, and what would be right.
    fn parse(text: &str) -> Result<Self, String> {
        let document = toml::Deserializer::parse(text).map_err(|error| {
            let (line, column) = position(text, error.span().map_or(0, |span| span.start));
            format!("line {line}, column {column}: {}", error.message())
        })?;
        serde_path_to_error::deserialize(document).map_err(|error| {
            let (path, message) = (error.path().to_string(), error.inner().message());
            if LATER.contains(&path.as_str()) && message.starts_with("unknown field") {
                return format!("`{path}` is not in this build yet");
            }
            match path.as_str() {
                "." => message.to_owned(),
                path => format!("`{path}`: {message}"),
            }
        })
    }

    /// The database: the flag's, else the environment's, else the file's.
    pub(crate) fn database(&self, flag: Option<&str>) -> Result<Database, Failure> {
        let missing = || {
            let message =
                "no database is named: use --database sqlite:shop.db, OUTBUS_DATABASE_URL, or `[database] url`";
            Failure::usage("database_missing", message)
        };
        let url = setting(flag, "OUTBUS_DATABASE_URL", &self.database.url)?.ok_or_else(missing)?;
        let listen_url = setting(None, "OUTBUS_DATABASE_LISTEN_URL", &self.database.listen_url)?;
        // Which of the two is wrong must be told.
        let listen = listen_url.map(|url| PostgresConfig::from_url(&url)).transpose();
        let listen = listen.map_err(|error| Failure::usage("config", format!("`database.listen_url`: {error}")))?;
        Database::from_url(&url, listen)
    }

    /// The bus: the flag's, else the environment's, else the file's.
    pub(crate) fn bus(&self, flag: Option<&str>) -> Result<BusConfig, Failure> {
        let missing = || {
            let message = "no bus is named: use --bus file:///var/events, OUTBUS_BUS_URL, or `[bus] url`";
            Failure::usage("bus_missing", message)
        };
        let url = setting(flag, "OUTBUS_BUS_URL", &self.bus.url)?.ok_or_else(missing)?;
        match url.split_once(':') {
            Some(("memory", _)) => {
                let message = "memory lives in one process; use outbus demo or the library";
                Err(Failure::usage("bus_memory", message))
            }
            Some((scheme @ ("redis" | "rediss" | "amqp" | "amqps" | "kafka" | "kafka+ssl"), _)) => {
                let message = format!("this build has no {scheme}:// yet: use file:///absolute/folder");
                Err(Failure::usage("bus_url", message))
            }
            _ => Ok(BusConfig { url, ..self.bus.clone() }),
        }
    }

    /// Topics and groups that should exist.
    pub(crate) fn topology(&self) -> Result<Topology, Failure> {
        let wrong = |name: &str, error: bus_core::EventError| self.wrong(format!("`topics.{name}`: {error}"));
        let mut topology = Topology::default();
        for (name, section) in &self.topics {
            let groups: Result<Vec<Group>, _> = section.groups.iter().map(|group| Group::new(group.as_str())).collect();
            topology.topics.push(TopicSpec {
                topic: Topic::new(name.as_str()).map_err(|error| wrong(name, error))?,
                partitions: section.partitions,
                groups: groups.map_err(|error| wrong(name, error))?,
            });
        }
        Ok(topology)
    }

    /// The relays to run, each with its sink.
    pub(crate) fn relays(&self, bus_name: &str) -> Result<Vec<(String, RelayConfig)>, Failure> {
        let mut relays: Vec<(String, RelayConfig)> = Vec::new();
        for (at, section) in self.relay.0.iter().enumerate() {
            let field = |name: &str| {
                if self.relay.0.len() == 1 { format!("relay.{name}") } else { format!("relay[{at}].{name}") }
            };
            if relays.iter().any(|(sink, _)| *sink == section.sink) {
                let message =
                    format!("`{}`: sink `{}` has two relays; give each a name of its own", field("sink"), section.sink);
                return Err(self.wrong(message));
            }
            let relay = section
                .relay(bus_name)
                .map_err(|(name, problem)| self.wrong(format!("`{}`: {problem}", field(name))))?;
            // Its message begins with the field's name in backticks.
            relay
                .validate()
                .map_err(|error| self.wrong(error.to_string().replacen('`', &format!("`{}", field("")), 1)))?;
            relays.push((section.sink.clone(), relay));
        }
        Ok(relays)
    }
}

/// The flag's value, else the environment's, else the file's, which is empty where it has none.
fn setting(flag: Option<&str>, name: &str, in_file: &str) -> Result<Option<String>, Failure> {
    if let Some(value) = flag.map(str::to_owned).or_else(|| variable(name)) {
        return Ok(Some(value));
    }
    let name = format!("{name}_FILE");
    match variable(&name) {
        // A secret ends with its file's line break.
        Some(path) => match std::fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text.trim_end().to_owned())),
            Err(error) => Err(Failure::usage("config", format!("{name}: cannot read {path}: {error}"))),
        },
        None => Ok(Some(in_file.to_owned()).filter(|value| !value.is_empty())),
    }
}

/// A variable of the environment; an empty one counts as absent.
pub(crate) fn variable(name: &str) -> Option<String> {
    let value = std::env::var_os(name).filter(|value| !value.is_empty());
    value.map(|value| value.to_string_lossy().into_owned())
}

/// Line and column of a place in a text, from 1.
fn position(text: &str, at: usize) -> (usize, usize) {
    let before = text.get(..at).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

impl RelaySection {
    fn relay(&self, bus_name: &str) -> Result<RelayConfig, (&'static str, String)> {
        if self.log != "outbox" {
            return Err(("log", format!("there is no log `{}`; there is `outbox`", self.log)));
        }
        Group::new(self.sink.as_str()).map_err(|error| ("sink", error.problem().to_owned()))?;
        let topics: Result<Vec<TopicPattern>, _> = self.topics.iter().map(|pattern| pattern.parse()).collect();
        Ok(RelayConfig {
            topics: topics.map_err(|error: bus_core::EventError| ("topics", error.problem().to_owned()))?,
            start: match self.start {
                StartSetting::Earliest => Start::Earliest,
                StartSetting::Latest => Start::Latest,
            },
            on_failure: match self.on_failure {
                OnFailureSetting::Park => OnFailure::Park,
                OnFailureSetting::DeadLetter => OnFailure::DeadLetter,
                OnFailureSetting::Halt => OnFailure::Halt,
            },
            retry: RetryPolicy {
                attempts: self.attempts,
                backoff_min: self.backoff_min.0,
                backoff_max: self.backoff_max.0,
            },
            window_events: self.window_events,
            window_bytes: self.window_bytes.0,
            lease: self.lease.0,
            poll_interval: self.poll_interval.0,
            retention: self.retention.0,
            drain: self.drain.0,
            bus_name: bus_name.to_owned(),
            allow_volatile: self.allow_volatile,
            ..RelayConfig::default()
        })
    }
}

impl<'de> Deserialize<'de> for Relays {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct RelaysVisitor;

        impl<'de> Visitor<'de> for RelaysVisitor {
            type Value = Relays;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("one [relay] or several [[relay]]")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Relays, A::Error> {
                RelaySection::deserialize(MapAccessDeserializer::new(map)).map(|section| Relays(vec![section]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut sections: A) -> Result<Relays, A::Error> {
                let mut relays = Vec::new();
                while let Some(section) = sections.next_element()? {
                    relays.push(section);
                }
                Ok(Relays(relays))
            }
        }

        deserializer.deserialize_any(RelaysVisitor)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse_duration(&text).map(Self).ok_or_else(|| wrong_span(&text))
    }
}

impl<'de> Deserialize<'de> for Retention {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match String::deserialize(deserializer)?.as_str() {
            "never" => Ok(Self(None)),
            text => parse_duration(text).map(|span| Self(Some(span))).ok_or_else(|| wrong_span(text)),
        }
    }
}

fn wrong_span<E: de::Error>(text: &str) -> E {
    E::custom(format!("found \"{text}\"; a time is written with its unit: 500ms, 10s, 5m, 1h, 7d"))
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizeVisitor;

        impl Visitor<'_> for SizeVisitor {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes, or one with its unit: \"512KiB\", \"32MiB\", \"1GiB\"")
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Size, E> {
                usize::try_from(number).map(Size).map_err(|_| E::invalid_value(de::Unexpected::Signed(number), &self))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
                parse_size(text).map(Size).ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }

        deserializer.deserialize_any(SizeVisitor)
    }
}

fn parse_size(text: &str) -> Option<usize> {
    let unit_at = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(unit_at);
    let factor: usize = match unit {
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    number.parse::<usize>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_those_of_the_library() {
        let relays = Config::parse("").unwrap().relays("file").unwrap();
        let defaults = RelayConfig { bus_name: "file".into(), ..RelayConfig::default() };
        assert_eq!(relays, [("main".to_owned(), defaults)]);
    }

    #[test]
    fn one_relay_or_several() {
        let one = Config::parse("[relay]\nsink = \"audit\"\nretention = \"never\"\nwindow_bytes = \"1MiB\"").unwrap();
        let (sink, relay) = one.relays("").unwrap().remove(0);
        assert_eq!((sink.as_str(), relay.retention, relay.window_bytes), ("audit", None, 1 << 20));
        let several =
            Config::parse("[[relay]]\nsink = \"a\"\n[[relay]]\nsink = \"b\"\ntopics = [\"orders.*\"]").unwrap();
        assert_eq!(several.relays("").unwrap().len(), 2);
        let twice = Config::parse("[[relay]]\n[[relay]]").unwrap().relays("").unwrap_err();
        assert!(twice.to_string().contains("relay[1].sink"), "{twice}");
    }

    #[test]
    fn what_is_wrong_is_named_by_its_path() {
        for (text, named) in [
            ("[relai]", "relai"),
            ("[relay]\nsinc = \"a\"", "relay"),
            ("[relay]\nlease = 5", "relay.lease"),
            ("[relay]\nlease = \"5 minutes\"", "relay.lease"),
            ("[relay]\nwindow_bytes = \"32MB\"", "relay.window_bytes"),
            ("[relay]\non_failure = \"ignore\"", "relay.on_failure"),
            ("[[relay]]\n[[relay]]\nattempts = \"many\"", "relay[1].attempts"),
            ("[database]\nurl = 5", "database.url"),
            ("[http]\nlisten = \"127.0.0.1:8080\"", "`http` is not in this build yet"),
            ("[consumer]\nattempts = 3", "`consumer` is not in this build yet"),
            ("[bus]\nurl = \"file:///x\"\ntopology = \"create\"", "`bus.topology` is not in this build yet"),
            ("[bus.kafka.native]\nacks = 1", "`bus.kafka` is not in this build yet"),
            ("[relay]\nprefix = \"a\"", "unknown field"),
            ("[topics.orders]\npartitions = 0", "topics.orders.partitions"),
            ("[relay]\ndatabase =", "line 2, column 11: "),
            ("[relay]\nsink = \"ä\"\nsink = \"b\"", "line 3, column 1: duplicate key"),
        ] {
            let error = Config::parse(text).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
        for (text, named) in [
            ("[relay]\nlog = \"inbox\"", "relay.log"),
            ("[relay]\nsink = \"a.b\"", "relay.sink"),
            ("[relay]\ntopics = [\"a/b\"]", "relay.topics"),
            ("[relay]\nwindow_events = 0", "`relay.window_events` is 0 and must be at least 1"),
            ("[[relay]]\n[[relay]]\nsink = \"b\"\nlease = \"0s\"", "`relay[1].lease` is 0ns and must be from 200ms"),
            ("[relay]\nbackoff_min = \"2s\"\nbackoff_max = \"1s\"", "`relay.backoff_min` is 2s and"),
            ("[relay]\ndrain = \"200000000000000d\"", "`relay.drain` is 17280000000000000000s and"),
        ] {
            let config = Config { file: Some("shop.toml".into()), ..Config::parse(text).unwrap() };
            let error = config.relays("").unwrap_err().to_string();
            assert!(error.starts_with("shop.toml: ") && error.contains(named), "{text}: {error}");
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        let text = "[database]\nurl = \"postgres://u:s3cret@h/d\"\n[bus]\nurl = \"redis://u:s3cret@h\"";
        assert!(!format!("{:?}", Config::parse(text).unwrap()).contains("s3cret"));
    }
}
