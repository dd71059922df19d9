#![doc = include_str!("../README.md")]

use std::sync::Arc;

use bus_core::{BusError, ErrorKind, FileBus, InMemoryBus, ObservedBus};
use serde::Deserialize;
use url::Url;

pub use bus_core::{EventBus, EventBusExt};

/// Which bus, and what it must be able to do.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BusConfig {
    /// Where the bus is: `memory://name`, `file:///folder`.
    pub url: String,
    /// Capabilities that are demanded: a bus that lacks one is refused at start. `persistent`, `replay`,
    /// `remembers_writers`, `counts_redeliveries`, `subscribe`, `fail_stop`.
    pub require: Vec<String>,
}

/// Without user, password and options.
impl std::fmt::Debug for BusConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BusConfig").field("url", &shown(&self.url)).field("require", &self.require).finish()
    }
}

/// Opens the bus at `url`.
///
/// # Errors
///
/// [`ErrorKind::Invalid`] if no bus of this build is at such a URL, or an option is unknown or wrong.
pub fn connect(url: &str) -> Result<Arc<dyn EventBus>, BusError> {
    let parsed = Url::parse(url).map_err(|error| {
        let message = format!("the bus URL cannot be read: {error}; it is written like file:///var/events");
        BusError::with_source(ErrorKind::Invalid, message, error)
    })?;
    match parsed.scheme() {
        "memory" => Ok(Arc::new(ObservedBus::new(InMemoryBus::from_url(&parsed)?, "memory"))),
        // The parser turns file:x, and file:, into /x and /.
        "file" if !url.get(..7).is_some_and(|start| start.eq_ignore_ascii_case("file://")) => {
            Err(BusError::new(ErrorKind::Invalid, "a file bus is written file:///absolute/folder"))
        }
        "file" => Ok(Arc::new(ObservedBus::new(FileBus::from_url(&parsed)?, "file"))),
        other => {
            let message = format!("no bus of this build is at `{other}://`: there are memory:// and file:///folder");
            Err(BusError::new(ErrorKind::Invalid, message))
        }
    }
}

/// Opens the bus of `config` and checks that it can do what is demanded.
///
/// # Errors
///
/// As [`connect`]; [`ErrorKind::Invalid`] with the sentence that says what it lacks.
pub fn connect_with(config: &BusConfig) -> Result<Arc<dyn EventBus>, BusError> {
    let bus = connect(&config.url)?;
    bus.capabilities().require(&config.require)?;
    Ok(bus)
}

/// A URL as it may be shown: without user, password, options and fragment.
pub fn shown(url: &str) -> String {
    match Url::parse(url) {
        Ok(mut url) => {
            // Fails for URLs that cannot have either; these have none then.
            let _ = url.set_username("");
            let _ = url.set_password(None);
            url.set_query(None);
            url.set_fragment(None);
            url.to_string()
        }
        Err(_) => "(a URL that cannot be read)".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use bus_core::{Event, EventBusExt as _};

    use super::*;

    #[tokio::test]
    async fn the_url_chooses_the_bus() {
        let dir = tempfile::tempdir().unwrap();
        for (url, persistent) in
            [("memory://".to_owned(), false), (format!("file://{}", dir.path().join("events").display()), true)]
        {
            let bus = connect(&url).unwrap();
            assert_eq!(bus.capabilities().persistent, persistent, "{url}");
            bus.publish(Event::builder("orders", "order.placed")).await.unwrap();
        }
        let topics = |url: &str| {
            let bus = connect(url).unwrap();
            async move { bus.admin().topics().await.unwrap().len() }
        };
        let one = connect("memory://shared").unwrap();
        one.publish(Event::builder("orders", "order.placed")).await.unwrap();
        assert_eq!(
            (topics("memory://shared").await, topics("memory://other").await, topics("memory://").await),
            (1, 0, 0)
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (url, named) in [
            ("nonsense", "cannot be read"),
            ("kafka://localhost", "kafka"),
            ("memory://?partitions=0", "partitions"),
            ("memory://?colour=red", "colour"),
            ("file://relative/x", "absolute"),
            ("file:relative", "absolute"),
            ("file:", "absolute"),
            ("file://", "absolute"),
            ("file:///", "absolute"),
        ] {
            let error = connect(url).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains(named), "{url}: {error}");
        }
        let demanding = BusConfig { url: "memory://".into(), require: vec!["persistent".into()] };
        assert!(connect_with(&demanding).unwrap_err().to_string().contains("persistent"));
        let unknown = BusConfig { require: vec!["colour".into()], ..demanding };
        assert!(connect_with(&unknown).unwrap_err().to_string().contains("colour"));
    }

    #[test]
    fn secrets_are_not_shown() {
        let config = BusConfig { url: "redis://user:s3cret@host/0?password=s3cret".into(), require: vec![] };
        assert!(!format!("{config:?}").contains("s3cret"));
        assert_eq!(shown("redis://user:s3cret@host:1/0?a=b"), "redis://host:1/0");
    }
}
