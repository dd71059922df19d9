//! [`Ledger`]: what one group received, against what was committed. Pure.

use std::collections::HashMap;

use bus_core::{Seq, SeqSet};

/// What one consumer group received, by the events' places in the outbox.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    seen: SeqSet,
    seen_count: u64,
    /// The highest place received of each topic and key.
    latest: HashMap<(String, String), Seq>,
    duplicates: u64,
    reordered: u64,
}

impl Ledger {
    /// Notes an arrival.
    pub(super) fn received(&mut self, seq: Seq, topic: &str, key: Option<&str>) {
        if self.seen.contains(seq) {
            self.duplicates += 1;
            return;
        }
        self.seen.insert(seq);
        self.seen_count += 1;
        let Some(key) = key else { return };
        let latest = self.latest.entry((topic.to_owned(), key.to_owned())).or_default();
        if seq < *latest {
            self.reordered += 1;
        }
        *latest = seq.max(*latest);
    }

    /// Events received, each counted once.
    pub(super) fn delivered(&self) -> u64 {
        self.seen_count
    }

    /// Arrivals of events that had arrived before.
    pub(super) fn duplicates(&self) -> u64 {
        self.duplicates
    }

    /// Events that first arrived behind a later one of their key.
    pub(super) fn reordered(&self) -> u64 {
        self.reordered
    }

    /// Events that were committed and did not arrive.
    pub(super) fn lost(&self, committed: &SeqSet) -> u64 {
        let mut missing = committed.clone();
        missing.remove_all(&self.seen);
        missing.len()
    }

    /// Events that arrived and were never committed.
    pub(super) fn invented(&self, committed: &SeqSet) -> u64 {
        let mut extra = self.seen.clone();
        extra.remove_all(committed);
        extra.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each of the four things it must notice.
    #[test]
    fn notices_what_is_lost_invented_repeated_and_reordered() {
        let mut ledger = Ledger::default();
        for (seq, key) in [(1, Some("a")), (3, Some("a")), (2, Some("a")), (2, Some("a")), (4, None), (9, Some("b"))] {
            ledger.received(Seq(seq), "orders", key);
        }
        let committed: SeqSet = (1..=5).map(Seq).collect();
        assert_eq!((ledger.delivered(), ledger.duplicates(), ledger.reordered()), (5, 1, 1));
        assert_eq!((ledger.lost(&committed), ledger.invented(&committed)), (1, 1));
    }
}
