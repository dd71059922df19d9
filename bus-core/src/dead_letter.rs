//! What is written on an event that was given up, and how it is published again.
//!
//! A dead letter is the original event plus `deadreason`, `deaderror`, `deadattempts`, `deadtime` and `deadgroup`. Each
//! group has its own, so that one group's failure is unseen by the others; an event that is published again carries
//! `outbusgroup`, and consumers of other groups pass over it.

use std::sync::Arc;

use crate::{BusError, DeadReason, ErrorKind, Event, EventBus, EventBusExt, Extensions, Group, Text, Timestamp, Topic};

/// Why it was given up: [`DeadCause::as_str`](crate::DeadCause::as_str).
pub const DEAD_REASON: &str = "deadreason";
/// The last error.
pub const DEAD_ERROR: &str = "deaderror";
/// How often a handler was called.
pub const DEAD_ATTEMPTS: &str = "deadattempts";
/// When it was given up.
pub const DEAD_TIME: &str = "deadtime";
/// The group that gave it up.
pub const DEAD_GROUP: &str = "deadgroup";
/// How often it was published again after it was given up.
pub const DEAD_RETRIES: &str = "deadretries";
/// The only group that handles it; the others pass over it.
pub const ONLY_GROUP: &str = "outbusgroup";

/// Times an event is published again before it takes force.
pub const DEAD_RETRIES_MAX: u32 = 3;

/// Longest error text that is kept, in bytes.
const ERROR_BYTES_MAX: usize = 1_000;

/// Dead letters read at once.
const PAGE: usize = 256;

/// The dead letter that keeps `event`.
pub fn dead_letter(event: &Event, group: &Group, reason: &DeadReason, now: Timestamp) -> Event {
    with(event, |extensions| {
        set(extensions, DEAD_REASON, reason.cause.as_str());
        set(extensions, DEAD_ERROR, one_line(&reason.error));
        set(extensions, DEAD_ATTEMPTS, reason.attempts);
        set(extensions, DEAD_TIME, now.to_string());
        set(extensions, DEAD_GROUP, group.as_text());
    })
}

/// The event to publish again for a dead letter of `group`: the original, for that group alone.
///
/// # Errors
///
/// [`ErrorKind::Invalid`] if it was published again [`DEAD_RETRIES_MAX`] times already, unless `force`.
pub fn revive(dead: &Event, group: &Group, force: bool) -> Result<Event, BusError> {
    let retries: u32 = dead.extension(DEAD_RETRIES).and_then(|text| text.parse().ok()).unwrap_or(0);
    if retries >= DEAD_RETRIES_MAX && !force {
        let message =
            format!("event {} was retried {retries} times already: mend its cause, or use --force", dead.id());
        return Err(BusError::new(ErrorKind::Invalid, message));
    }
    Ok(with(dead, |extensions| {
        for name in [DEAD_REASON, DEAD_ERROR, DEAD_ATTEMPTS, DEAD_TIME, DEAD_GROUP] {
            extensions.remove(name);
        }
        set(extensions, DEAD_RETRIES, retries + 1);
        set(extensions, ONLY_GROUP, group.as_text());
    }))
}

/// Which dead letters are meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// Every one that is there now.
    All,
    /// Those of these events.
    Ids(Vec<Text>),
}

/// What became of an attempt to publish dead letters again.
#[derive(Debug, Default)]
pub struct Revival {
    /// Published, confirmed and removed from the dead letters.
    pub retried: u64,
    /// Still dead, each with the reason.
    pub failed: Vec<(Text, BusError)>,
}

/// Publishes dead letters of `group` to their topic again; each is removed only after its confirmation.
///
/// They arrive after later events of their keys, and only `group` handles them.
pub async fn retry_dead(
    bus: &Arc<dyn EventBus>,
    topic: &Topic,
    group: &Group,
    selection: &Selection,
    force: bool,
) -> Result<Revival, BusError> {
    let mut revival = Revival::default();
    // What is published again may die again behind this place; it is not met a second time.
    let end = last_position(bus, topic, group).await?;
    let mut after: Option<Text> = None;
    while end.is_some() && after != end {
        let page = bus.admin().dead_letters(topic, group, after.as_deref(), PAGE).await?;
        if page.is_empty() {
            break;
        }
        for dead in page {
            if selection.has(dead.event.id()) {
                retry_one(bus, topic, group, &dead.event, force, &mut revival).await?;
            }
            after = Some(dead.position);
            if after == end {
                break;
            }
        }
    }
    Ok(revival)
}

impl Selection {
    fn has(&self, id: &str) -> bool {
        match self {
            Self::All => true,
            Self::Ids(ids) => ids.iter().any(|wanted| wanted.as_str() == id),
        }
    }
}

async fn last_position(bus: &Arc<dyn EventBus>, topic: &Topic, group: &Group) -> Result<Option<Text>, BusError> {
    let mut last: Option<Text> = None;
    loop {
        let page = bus.admin().dead_letters(topic, group, last.as_deref(), PAGE).await?;
        match page.into_iter().next_back() {
            Some(dead) => last = Some(dead.position),
            None => return Ok(last),
        }
    }
}

async fn retry_one(
    bus: &Arc<dyn EventBus>,
    topic: &Topic,
    group: &Group,
    dead: &Event,
    force: bool,
    revival: &mut Revival,
) -> Result<(), BusError> {
    let id = dead.parts().id.clone();
    let published = match revive(dead, group, force) {
        Ok(event) => bus.publish(event).await,
        Err(error) => Err(error),
    };
    match published {
        Ok(_) => {
            bus.admin().remove_dead(topic, group, &[id]).await?;
            revival.retried += 1;
        }
        Err(error) => revival.failed.push((id, error)),
    }
    Ok(())
}

fn with(event: &Event, change: impl FnOnce(&mut Extensions)) -> Event {
    let mut parts = event.parts().clone();
    change(&mut parts.extensions);
    Event::from_parts(parts).expect("only extensions were changed, and they are checked one by one")
}

fn set(extensions: &mut Extensions, name: &'static str, value: impl Into<Text>) {
    extensions.insert(Text::from_static(name), value).expect("our own names are valid and not counted");
}

/// `text` without control characters, at most 1,000 bytes.
pub fn one_line(text: &str) -> String {
    let mut line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if line.len() > ERROR_BYTES_MAX {
        line.truncate(line.floor_char_boundary(ERROR_BYTES_MAX));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DeadCause;

    #[test]
    fn a_dead_letter_is_the_original_with_its_reason() {
        let group = Group::new("billing").unwrap();
        let event = Event::builder("orders", "order.placed").key("k").data("x").build().unwrap();
        let reason = DeadReason { cause: DeadCause::Attempts, error: "é".repeat(600) + "\n", attempts: 20 };
        let dead = dead_letter(&event, &group, &reason, Timestamp::from_unix_micros(0));
        assert_eq!((dead.id(), dead.key(), dead.data()), (event.id(), event.key(), event.data()));
        assert_eq!(dead.extension(DEAD_REASON), Some("attempts"));
        assert_eq!(dead.extension(DEAD_ATTEMPTS), Some("20"));
        assert_eq!(dead.extension(DEAD_TIME), Some("1970-01-01T00:00:00.000000Z"));
        assert_eq!(dead.extension(DEAD_ERROR).unwrap().len(), 1_000);

        let again = revive(&dead, &group, false).unwrap();
        assert_eq!((again.extension(ONLY_GROUP), again.extension(DEAD_REASON)), (Some("billing"), None));
        let third = revive(&revive(&again, &group, false).unwrap(), &group, false).unwrap();
        assert_eq!(third.extension(DEAD_RETRIES), Some("3"));
        assert_eq!(revive(&third, &group, false).unwrap_err().kind(), ErrorKind::Invalid, "loops end");
        assert!(revive(&third, &group, true).is_ok());
    }
}
