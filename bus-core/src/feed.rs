//! [`PartitionFeed`]: what a member holds of one partition, and in which order it delivers it. Pure.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    time::{Duration, Instant},
};

use crate::{Event, Text};

/// How long a released event stays away at least, so that a release in a loop does not spin.
pub const RELEASE_DELAY: Duration = Duration::from_millis(100);

/// The events of one partition that are in this process: fetched in order, delivered, settled or released.
///
/// Every bus's subscription uses one per partition it owns, so that all deliver by the same rules: in order, never an
/// event of a key before one of the same key that was released, never more in hand than the window.
#[derive(Debug)]
pub struct PartitionFeed {
    events_max: usize,
    bytes_max: usize,
    /// Fetched, in order, not delivered.
    fresh: VecDeque<FeedItem>,
    /// Released, or behind a released one of the same key; by position.
    held: BTreeMap<u64, Held>,
    /// Delivered and not settled: position to size.
    delivered: HashMap<u64, usize>,
    bytes: usize,
}

/// An event with its place in its partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeedItem {
    /// Its place in the partition, ascending.
    pub position: u64,
    /// The event.
    pub event: Event,
    /// Which call of a handler its delivery would be, from 1.
    pub attempt: u32,
}

#[derive(Debug)]
struct Held {
    item: FeedItem,
    not_before: Option<Instant>,
}

impl Held {
    fn key(&self) -> Option<&Text> {
        self.item.event.parts().key.as_ref()
    }
}

impl PartitionFeed {
    /// An empty feed that holds at most `events_max` events and `bytes_max` bytes; one event always fits.
    pub fn new(events_max: usize, bytes_max: usize) -> Self {
        Self {
            events_max: events_max.max(1),
            bytes_max,
            fresh: VecDeque::new(),
            held: BTreeMap::new(),
            delivered: HashMap::new(),
            bytes: 0,
        }
    }

    /// How many more events may be fetched; 0 as well when the window is full by bytes.
    pub fn room(&self) -> usize {
        let in_hand = self.in_hand();
        if in_hand > 0 && self.bytes >= self.bytes_max { 0 } else { self.events_max.saturating_sub(in_hand) }
    }

    /// Takes a fetched event, whose position is above all fetched before.
    pub fn push(&mut self, item: FeedItem) {
        self.bytes += item.event.size_bytes();
        self.fresh.push_back(item);
    }

    /// At most `max` events to deliver now, each key in order.
    pub fn take(&mut self, now: Instant, max: usize) -> Vec<FeedItem> {
        let mut taken = Vec::with_capacity(max.min(self.fresh.len() + self.held.len()));
        let mut blocked: HashSet<Text> = HashSet::new();
        if !self.held.is_empty() {
            self.take_held(now, max, &mut taken, &mut blocked);
        }
        while taken.len() < max
            && let Some(item) = self.fresh.pop_front()
        {
            match item.event.parts().key.as_ref().filter(|key| blocked.contains(*key)) {
                Some(_) => drop(self.held.insert(item.position, Held { item, not_before: None })),
                None => taken.push(item),
            }
        }
        for item in &taken {
            self.delivered.insert(item.position, item.event.size_bytes());
        }
        taken
    }

    fn take_held(&mut self, now: Instant, max: usize, taken: &mut Vec<FeedItem>, blocked: &mut HashSet<Text>) {
        let mut ready = Vec::new();
        for (position, held) in &self.held {
            let key = held.key();
            if key.is_some_and(|key| blocked.contains(key)) {
                continue;
            }
            if ready.len() == max || held.not_before.is_some_and(|due| now < due) {
                blocked.extend(key.cloned());
            } else {
                ready.push(*position);
            }
        }
        taken.extend(ready.into_iter().filter_map(|position| self.held.remove(&position)).map(|held| held.item));
    }

    /// The delivered event at `position` is settled; false if it is not in hand.
    pub fn settle(&mut self, position: u64) -> bool {
        match self.delivered.remove(&position) {
            Some(size) => {
                self.bytes -= size;
                true
            }
            None => false,
        }
    }

    /// A delivered event comes back, to be delivered again after [`RELEASE_DELAY`]; false if it is not in hand.
    pub fn release(&mut self, item: FeedItem, now: Instant) -> bool {
        if self.delivered.remove(&item.position).is_none() {
            return false;
        }
        self.held.insert(item.position, Held { item, not_before: Some(now + RELEASE_DELAY) });
        true
    }

    /// How many are delivered and not settled.
    pub fn delivered(&self) -> usize {
        self.delivered.len()
    }

    /// How many are in hand: fetched, held and delivered.
    pub fn in_hand(&self) -> usize {
        self.fresh.len() + self.held.len() + self.delivered.len()
    }

    /// When a released event may be delivered again, if one waits. What is behind another of its key waits for that one.
    pub fn next_due(&self) -> Option<Instant> {
        let mut keys: HashSet<&Text> = HashSet::new();
        let held = self.held.values().filter(|held| held.key().is_none_or(|key| keys.insert(key)));
        held.filter_map(|held| held.not_before).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(position: u64, key: Option<&str>) -> FeedItem {
        let mut builder = Event::builder("orders", "order.placed").id(position);
        if let Some(key) = key {
            builder = builder.key(key);
        }
        FeedItem { position, event: builder.build().unwrap(), attempt: 1 }
    }

    fn positions(items: &[FeedItem]) -> Vec<u64> {
        items.iter().map(|item| item.position).collect()
    }

    /// Catches the mutant that delivers a released event behind what follows it.
    #[test]
    fn what_follows_a_released_event_of_its_key_waits() {
        let (mut feed, now) = (PartitionFeed::new(100, 1 << 20), Instant::now());
        for (position, key) in [(1, Some("a")), (2, Some("a")), (3, Some("b")), (4, None), (5, Some("a"))] {
            feed.push(item(position, key));
        }
        let mut first = feed.take(now, 1);
        assert!(feed.release(first.remove(0), now));
        assert_eq!(positions(&feed.take(now, 10)), [3, 4], "only the released key waits");
        assert_eq!(feed.next_due(), Some(now + RELEASE_DELAY));
        assert!(feed.take(now + RELEASE_DELAY / 2, 10).is_empty());
        assert_eq!(positions(&feed.take(now + RELEASE_DELAY, 2)), [1, 2]);
        feed.push(item(6, Some("a")));
        assert_eq!(positions(&feed.take(now + RELEASE_DELAY, 10)), [5, 6]);
    }

    /// Catches the mutant that answers when the earliest release is over: behind a later one of its key, it is read for
    /// in a loop.
    #[test]
    fn a_released_event_behind_another_of_its_key_is_due_with_it() {
        let (mut feed, now) = (PartitionFeed::new(100, 1 << 20), Instant::now());
        (1..=2).for_each(|position| feed.push(item(position, Some("a"))));
        let mut taken = feed.take(now, 2);
        assert!(feed.release(taken.remove(1), now));
        assert!(feed.release(taken.remove(0), now + RELEASE_DELAY / 2));
        assert!(feed.take(now + RELEASE_DELAY, 10).is_empty());
        assert_eq!(feed.next_due(), Some(now + RELEASE_DELAY / 2 + RELEASE_DELAY));
    }

    #[test]
    fn a_small_take_does_not_let_a_key_overtake_itself() {
        let (mut feed, now) = (PartitionFeed::new(100, 1 << 20), Instant::now());
        (1..=4).for_each(|position| feed.push(item(position, Some("a"))));
        let taken = feed.take(now, 3);
        taken.into_iter().for_each(|item| assert!(feed.release(item, now)));
        let later = now + RELEASE_DELAY;
        let order: Vec<u64> = (0..4).flat_map(|_| positions(&feed.take(later, 1))).collect();
        assert_eq!(order, [1, 2, 3, 4]);
    }

    #[test]
    fn the_window_counts_everything_in_hand() {
        let (mut feed, now) = (PartitionFeed::new(3, 1 << 20), Instant::now());
        (1..=3).for_each(|position| feed.push(item(position, None)));
        assert_eq!(feed.room(), 0);
        let taken = feed.take(now, 2);
        assert_eq!((feed.room(), feed.delivered()), (0, 2));
        assert!(feed.settle(taken[0].position) && !feed.settle(taken[0].position));
        assert_eq!(feed.room(), 1);
        let mut narrow = PartitionFeed::new(3, 1);
        assert_eq!(narrow.room(), 3, "one event always fits");
        narrow.push(item(1, None));
        assert_eq!(narrow.room(), 0);
    }
}
