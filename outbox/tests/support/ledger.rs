//! What was committed against what was published. Every event's id is `<key>-<version>`, and a key's versions ascend in
//! the order of the transactions that committed them.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::collections::{BTreeMap, BTreeSet};

use bus_core::Event;

use super::{database::Database, support::ScriptedBus, support::ids, support::until};

/// Settled events that may stand in no checkpoint yet, whatever the window.
pub(crate) const UNCHECKED_MAX: usize = 4_096;

/// What was committed is published (I1), what was not is not (I2), each key's first occurrences are in the order of its
/// versions (I3), what comes again comes as the replay of a run that ends with the key's newest event (I4, I5), and no
/// more than `duplicates_max` events come again (I6).
pub(crate) async fn check_ledger(database: &Database, bus: &ScriptedBus, duplicates_max: usize) {
    let committed: BTreeSet<String> = database.committed().await.into_iter().collect();
    until("everything committed is published", async || {
        let stored: BTreeSet<String> = ids(&bus.stored()).into_iter().collect();
        committed.is_subset(&stored)
    })
    .await;
    check(&committed, &bus.stored(), duplicates_max);
}

/// The same of events that are all published.
pub(crate) fn check(committed: &BTreeSet<String>, stored: &[Event], duplicates_max: usize) {
    let mut keys = BTreeMap::<&str, Occurrences>::new();
    for event in stored {
        assert!(committed.contains(event.id()), "{} was never committed", event.id());
        keys.entry(event.key().expect("a key")).or_default().see(event.id());
    }
    let mut published = 0;
    for (key, of_key) in &keys {
        published += of_key.ids.len();
        let last = of_key.ids.last().expect("it occurred");
        assert_eq!(of_key.at + 1, of_key.ids.len(), "the last of {key} is not its newest, {last}");
    }
    assert_eq!(published, committed.len(), "some are lost");
    let duplicates = duplicates(stored);
    assert!(duplicates <= duplicates_max, "{duplicates} duplicates, at most {duplicates_max} are allowed");
}

/// How many occurrences are not the first one of their event.
pub(crate) fn duplicates(stored: &[Event]) -> usize {
    stored.len() - stored.iter().map(Event::id).collect::<BTreeSet<_>>().len()
}

/// A key's events in the order of their first occurrences, and which of them came last.
#[derive(Default)]
struct Occurrences<'a> {
    ids: Vec<&'a str>,
    index: BTreeMap<&'a str, usize>,
    at: usize,
}

impl<'a> Occurrences<'a> {
    fn see(&mut self, id: &'a str) {
        let next = self.ids.len();
        let index = *self.index.entry(id).or_insert(next);
        if index == next {
            let before = self.ids.last().copied();
            assert!(before.is_none_or(|before| version(before) < version(id)), "{id} came behind {before:?}");
            self.ids.push(id);
        }
        assert!(next == 0 || index <= self.at + 1, "{id} came after {}: a replay with a gap", self.ids[self.at]);
        self.at = index;
    }
}

fn version(id: &str) -> u64 {
    id.rsplit('-').next().expect("a version").parse().expect("a number")
}
