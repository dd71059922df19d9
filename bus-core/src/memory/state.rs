//! What the in-memory bus holds: topics, partitions, groups. Pure: time is passed in, waking others is the caller's.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    num::NonZeroU32,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::watch;

use super::InMemoryConfig;
use crate::{
    BusError, Delivery, ErrorKind, Event, FOREVER, Group, LogId, Mark, Ownership, PartitionFeed, Seq, SeqSet, Settled,
    Settlement, StoredDeadLetter, StreamPosition, SubscribeFrom, Text, Timestamp, Topic, WriterId,
    dead_letter::dead_letter, feed::FeedItem, partition::partition_of,
};

pub(super) type MemberId = u64;
/// The publishers of a topic take turns, first come, first served.
pub(super) type Turn = Arc<tokio::sync::Mutex<()>>;

/// Everything one in-memory bus holds, shared by all its clients.
#[derive(Debug)]
pub(super) struct State {
    config: InMemoryConfig,
    topics: Vec<TopicState>,
    by_name: HashMap<Topic, usize>,
    writers: HashMap<(LogId, Text), WriterState>,
    next_member: MemberId,
}

/// What is remembered of the writers of one log and sink.
#[derive(Debug, Default)]
struct WriterState {
    epoch: u64,
    /// Counts openings: only the last one writes.
    opening: u64,
    position: StreamPosition,
}

/// The right to write a log for a sink, until the next opening.
#[derive(Debug)]
pub(super) struct WriterHold {
    key: (LogId, Text),
    epoch: u64,
    opening: u64,
}

#[derive(Debug)]
pub(super) struct TopicState {
    pub(super) topic: Topic,
    partitions: Vec<PartitionLog>,
    pub(super) groups: BTreeMap<Group, GroupState>,
    turn: Turn,
    /// Told whenever a member may have something to do.
    changed: watch::Sender<()>,
}

/// The events of one partition: `base` is the offset of the first that is kept.
#[derive(Debug, Default)]
struct PartitionLog {
    base: u64,
    events: VecDeque<Event>,
    bytes: usize,
}

#[derive(Debug)]
pub(super) struct GroupState {
    partitions: Vec<GroupPartition>,
    /// Members in the order of joining.
    pub(super) members: BTreeMap<MemberId, Text>,
    dead: VecDeque<(u64, Event)>,
    next_dead: u64,
    /// Settlements that came after their partition had moved on.
    pub(super) stale: u64,
}

/// How far a group is in one partition, and who reads it.
#[derive(Debug, Default)]
struct GroupPartition {
    /// Everything below is settled.
    committed: u64,
    /// Settled offsets above `committed`.
    settled: SeqSet,
    /// Recorded attempts by offset.
    attempts: HashMap<u64, u32>,
    /// How often what is pending was handed out again since anything was settled.
    redeliveries: u32,
    hold: Option<Hold>,
}

#[derive(Debug)]
struct Hold {
    member: MemberId,
    ownership: Ownership,
    feed: PartitionFeed,
    read_to: u64,
    /// How long it may take to move on, as its member asked.
    drain: Duration,
    drain_until: Option<Instant>,
}

/// What a subscription needs to take part in its group.
#[derive(Clone, Debug)]
pub(super) struct Membership {
    pub(super) topic: usize,
    pub(super) group: Group,
    pub(super) member: MemberId,
    pub(super) window_events: usize,
    pub(super) window_bytes: usize,
    pub(super) drain: Duration,
}

/// Names one partition of a group under one hold, so that late settlements are told from current ones: each hold has an
/// [`Ownership`] of its own.
#[derive(Clone, Debug)]
pub(super) struct HoldId {
    topic: usize,
    group: Group,
    pub(super) partition: u32,
    pub(super) ownership: Ownership,
}

/// Some partition has no room and its slowest group has not moved on.
pub(super) struct Full;

impl State {
    pub(super) fn new(config: InMemoryConfig) -> Self {
        Self { config, topics: Vec::new(), by_name: HashMap::new(), writers: HashMap::new(), next_member: 0 }
    }

    pub(super) fn config(&self) -> &InMemoryConfig {
        &self.config
    }

    pub(super) fn topics(&self) -> &[TopicState] {
        &self.topics
    }

    /// The topic's place, created if need be.
    pub(super) fn topic(&mut self, topic: &Topic, partitions: Option<NonZeroU32>) -> usize {
        if let Some(at) = self.by_name.get(topic) {
            return *at;
        }
        let partitions = partitions.unwrap_or(self.config.partitions).get() as usize;
        self.topics.push(TopicState {
            topic: topic.clone(),
            partitions: (0..partitions).map(|_| PartitionLog::default()).collect(),
            groups: BTreeMap::new(),
            turn: Turn::default(),
            changed: watch::Sender::new(()),
        });
        self.by_name.insert(topic.clone(), self.topics.len() - 1);
        self.topics.len() - 1
    }

    /// The topic, if it exists.
    pub(super) fn find(&mut self, topic: &Topic) -> Result<&mut TopicState, BusError> {
        match self.by_name.get(topic) {
            Some(at) => Ok(&mut self.topics[*at]),
            None => Err(BusError::new(ErrorKind::Invalid, format!("there is no topic `{topic}`"))),
        }
    }

    /// The turns a batch waits for. All batches take them in one order, so that no two wait for each other.
    pub(super) fn turns(&mut self, batch: &[(usize, Event)]) -> Vec<Turn> {
        let runs = batch.chunk_by(|(_, one), (_, other)| one.topic() == other.topic());
        let topics: BTreeSet<usize> = runs.map(|run| self.topic(run[0].1.topic(), None)).collect();
        topics.into_iter().map(|topic| Turn::clone(&self.topics[topic].turn)).collect()
    }

    /// Stores all of `events` or, where one partition is full, none.
    pub(super) fn publish(&mut self, events: Vec<Event>) -> Result<(), (Full, Vec<Event>)> {
        let routes = self.route(&events);
        if !self.has_room(&routes) {
            return Err((Full, events));
        }
        for (event, (topic, partition)) in events.into_iter().zip(&routes) {
            self.topics[*topic].partitions[*partition].push(event);
        }
        let mut touched: Vec<(usize, usize)> = routes;
        touched.sort_unstable();
        touched.dedup();
        for (topic, partition) in &touched {
            self.evict(*topic, *partition);
        }
        touched.dedup_by_key(|(topic, _)| *topic);
        touched.iter().for_each(|(topic, _)| self.topics[*topic].wake());
        Ok(())
    }

    fn route(&mut self, events: &[Event]) -> Vec<(usize, usize)> {
        let mut last: Option<(Topic, usize, NonZeroU32)> = None;
        let mut routes = Vec::with_capacity(events.len());
        for event in events {
            let (topic, partitions) = match &last {
                Some((name, topic, partitions)) if name == event.topic() => (*topic, *partitions),
                _ => {
                    let topic = self.topic(event.topic(), None);
                    let partitions = self.topics[topic].partition_count();
                    last = Some((event.topic().clone(), topic, partitions));
                    (topic, partitions)
                }
            };
            routes.push((topic, partition_of(event, partitions) as usize));
        }
        routes
    }

    fn has_room(&self, routes: &[(usize, usize)]) -> bool {
        let mut counts: HashMap<(usize, usize), usize> = HashMap::new();
        routes.iter().for_each(|route| *counts.entry(*route).or_default() += 1);
        counts.into_iter().all(|((topic, partition), adding)| {
            let (topic, log) = (&self.topics[topic], &self.topics[topic].partitions[partition]);
            let kept = log.end() - topic.settled_by_all(partition).clamp(log.base, log.end());
            let fits = log.bytes < self.config.partition_bytes_max || kept == 0;
            // A batch larger than the whole partition is let in alone.
            fits && (kept as usize + adding <= self.config.partition_events_max || kept == 0)
        })
    }

    /// Lets the oldest go that every group has settled, once a partition holds more than it should.
    fn evict(&mut self, topic: usize, partition: usize) {
        let settled = self.topics[topic].settled_by_all(partition);
        let log = &mut self.topics[topic].partitions[partition];
        while (log.events.len() > self.config.partition_events_max || log.bytes > self.config.partition_bytes_max)
            && log.base < settled
        {
            log.pop();
        }
    }

    /// Opens a log for writing: fences lower epochs and earlier openings.
    pub(super) fn open_writer(&mut self, id: &WriterId) -> Result<(WriterHold, Option<(Seq, Text)>), BusError> {
        let key = (id.log, id.sink.clone());
        let writer = self.writers.entry(key.clone()).or_default();
        if id.epoch < writer.epoch {
            return Err(BusError::fenced_by(writer.epoch));
        }
        writer.epoch = id.epoch;
        writer.opening += 1;
        if writer.position.incarnation != *id.incarnation {
            writer.position = StreamPosition::new(&id.incarnation);
        }
        let position = &writer.position;
        let high_mark = (position.high > Seq::ZERO).then(|| (position.high, position.high_id.as_str().into()));
        Ok((WriterHold { key, epoch: id.epoch, opening: writer.opening }, high_mark))
    }

    /// Fails unless `hold` is the last opening.
    pub(super) fn check_writer(&self, hold: &WriterHold) -> Result<(), BusError> {
        match self.writers.get(&hold.key) {
            Some(writer) if writer.epoch == hold.epoch && writer.opening == hold.opening => Ok(()),
            Some(writer) => Err(BusError::fenced_by(writer.epoch)),
            None => Err(BusError::closed()),
        }
    }

    /// Whether the writer's stream holds the event at `seq` already.
    pub(super) fn holds(&self, hold: &WriterHold, seq: Seq) -> bool {
        self.writers.get(&hold.key).is_some_and(|writer| writer.position.holds(seq))
    }

    /// Remembers what a writer just stored.
    pub(super) fn advance(&mut self, hold: &WriterHold, written: &[(Seq, Text)], mark: &Mark) {
        if let Some(writer) = self.writers.get_mut(&hold.key) {
            writer.position.advance(written.iter().map(|(seq, id)| (*seq, id.as_str())), mark);
        }
    }

    /// Joins a group.
    pub(super) fn join(&mut self, topic: &Topic, group: &Group, from: SubscribeFrom, name: Text) -> (usize, MemberId) {
        let topic = self.topic(topic, None);
        let member = self.next_member;
        self.next_member += 1;
        let state = &mut self.topics[topic];
        state.group_or_create(group, from).members.insert(member, name);
        state.wake();
        (topic, member)
    }

    /// Leaves a group: its partitions are free at once.
    pub(super) fn leave(&mut self, membership: &Membership) {
        let topic = &mut self.topics[membership.topic];
        if let Some(group) = topic.groups.get_mut(&membership.group) {
            group.members.remove(&membership.member);
            for partition in &mut group.partitions {
                if partition.hold.as_ref().is_some_and(|hold| hold.member == membership.member) {
                    partition.end_hold();
                }
            }
        }
        topic.wake();
    }

    /// What `member` may have now, at most `max`, with the hold each was delivered under.
    pub(super) fn take(
        &mut self,
        membership: &Membership,
        now: Instant,
        max: usize,
        first: usize,
    ) -> Vec<(HoldId, FeedItem, u32)> {
        let topic = &mut self.topics[membership.topic];
        topic.rebalance(membership, now);
        let Some(group) = topic.groups.get_mut(&membership.group) else { return Vec::new() };
        let count = group.partitions.len();
        let mut taken = Vec::new();
        for at in (0..count).map(|offset| (first + offset) % count) {
            let (log, partition) = (&topic.partitions[at], &mut group.partitions[at]);
            let redeliveries = partition.redeliveries;
            let items = partition.take(log, membership.member, now, max - taken.len());
            let Some(hold) = &partition.hold else { continue };
            let (topic, group, ownership) = (membership.topic, membership.group.clone(), hold.ownership.clone());
            let hold = HoldId { topic, group, partition: at as u32, ownership };
            taken.extend(items.into_iter().map(|item| (hold.clone(), item, redeliveries)));
        }
        taken
    }

    /// When `take` may have something without anything else happening.
    pub(super) fn next_due(&self, membership: &Membership) -> Option<Instant> {
        let group = self.topics[membership.topic].groups.get(&membership.group)?;
        let holds = group.partitions.iter().filter_map(|partition| partition.hold.as_ref());
        // While a partition drains nothing of it is delivered, so what was released of it is not waited for.
        let released = |hold: &Hold| hold.feed.next_due().filter(|_| hold.member == membership.member);
        holds.filter_map(|hold| hold.drain_until.or_else(|| released(hold))).min()
    }

    pub(super) fn changes(&self, topic: usize) -> watch::Receiver<()> {
        self.topics[topic].changed.subscribe()
    }

    /// Settles a delivery; what comes after its partition has moved on is counted and does nothing.
    pub(super) fn settle(&mut self, hold: &HoldId, settled: Settled, now: Instant, time: Timestamp) {
        let dead_max = self.config.partition_events_max;
        let topic = &mut self.topics[hold.topic];
        let group = topic.groups.get_mut(&hold.group);
        if group.is_some_and(|group| group.settle(hold, settled, now, time, dead_max)) {
            topic.wake();
        }
        self.evict(hold.topic, hold.partition as usize);
    }

    /// Remembers that an attempt was begun; false if the partition has moved on.
    pub(super) fn record_attempt(&mut self, membership: &Membership, delivery: &Delivery) -> bool {
        let group = self.topics[membership.topic].groups.get_mut(&membership.group);
        let partition = group.and_then(|group| group.partitions.get_mut(delivery.partition() as usize));
        let Some(partition) = partition.filter(|partition| partition.is_held_under(delivery.ownership())) else {
            return false;
        };
        *partition.attempts.entry(delivery.token()).or_default() += 1;
        true
    }
}

impl PartitionLog {
    fn push(&mut self, event: Event) {
        self.bytes += event.size_bytes();
        self.events.push_back(event);
    }

    fn pop(&mut self) {
        if let Some(event) = self.events.pop_front() {
            self.bytes -= event.size_bytes();
            self.base += 1;
        }
    }

    fn end(&self) -> u64 {
        self.base + self.events.len() as u64
    }

    fn get(&self, offset: u64) -> Option<&Event> {
        self.events.get(usize::try_from(offset.checked_sub(self.base)?).ok()?)
    }
}

impl TopicState {
    pub(super) fn partition_count(&self) -> NonZeroU32 {
        NonZeroU32::new(self.partitions.len() as u32).expect("a topic has at least one partition")
    }

    pub(super) fn wake(&self) {
        self.changed.send_replace(());
    }

    /// The group, made where it does not exist.
    pub(super) fn group_or_create(&mut self, group: &Group, from: SubscribeFrom) -> &mut GroupState {
        let partitions = &self.partitions;
        self.groups.entry(group.clone()).or_insert_with(|| GroupState {
            partitions: partitions.iter().map(|log| GroupPartition::starting(log, from)).collect(),
            members: BTreeMap::new(),
            dead: VecDeque::new(),
            next_dead: 0,
            stale: 0,
        })
    }

    /// The group, if it exists.
    pub(super) fn group(&mut self, group: &Group) -> Result<&mut GroupState, BusError> {
        let topic = &self.topic;
        let missing = || BusError::new(ErrorKind::Invalid, format!("topic `{topic}` has no group `{group}`"));
        self.groups.get_mut(group).ok_or_else(missing)
    }

    /// Moves a group to the start or the end of what is kept.
    pub(super) fn seek(&mut self, group: &Group, to: SubscribeFrom) -> Result<(), BusError> {
        self.without_members(group)?;
        let partitions = self.partitions.iter().map(|log| GroupPartition::starting(log, to)).collect();
        self.group(group)?.partitions = partitions;
        Ok(())
    }

    pub(super) fn without_members(&mut self, group: &Group) -> Result<(), BusError> {
        match self.group(group)?.members.len() {
            0 => Ok(()),
            members => {
                let message = format!("group `{group}` has {members} members: stop them first");
                Err(BusError::new(ErrorKind::Invalid, message))
            }
        }
    }

    /// The offset below which every group has settled; the end where there is no group.
    fn settled_by_all(&self, partition: usize) -> u64 {
        let committed = self.groups.values().map(|group| group.partitions[partition].committed);
        committed.min().unwrap_or_else(|| self.partitions[partition].end())
    }

    /// Lets partitions move towards their fair owners: `p mod members = rank`, ranks in the order of joining.
    fn rebalance(&mut self, membership: &Membership, now: Instant) {
        let Some(group) = self.groups.get_mut(&membership.group) else { return };
        let members: Vec<MemberId> = group.members.keys().copied().collect();
        let mut moved = false;
        for (at, partition) in group.partitions.iter_mut().enumerate() {
            let Some(fair) = members.get(at % members.len().max(1)).copied() else { continue };
            moved |= partition.move_to(fair, membership, now);
        }
        if moved {
            self.wake();
        }
    }

    /// Lag, pending, the oldest event that is not settled, and the owner of one partition.
    pub(super) fn lag<'a>(
        &'a self,
        group: &'a GroupState,
        partition: u32,
    ) -> (u64, u64, Option<&'a Event>, Option<&'a Text>) {
        let (log, read) = (&self.partitions[partition as usize], &group.partitions[partition as usize]);
        let from = read.committed.max(log.base);
        let lag = log.end() - from - read.settled.len();
        let pending = read.hold.as_ref().map_or(0, |hold| hold.feed.delivered() as u64);
        let owner = read.hold.as_ref().and_then(|hold| group.members.get(&hold.member));
        (lag, pending, log.get(from).filter(|_| lag > 0), owner)
    }
}

impl GroupState {
    /// True if a member may have something to do now.
    fn settle(&mut self, id: &HoldId, settled: Settled, now: Instant, time: Timestamp, dead_max: usize) -> bool {
        let partition = &mut self.partitions[id.partition as usize];
        let current = partition.is_held_under(&id.ownership);
        let Some(hold) = partition.hold.as_mut().filter(|_| current) else {
            self.stale += 1;
            return false;
        };
        let position = settled.token;
        let was_waiting = hold.drain_until.is_some() || hold.feed.room() == 0;
        let dead_is_full = self.dead.len() >= dead_max;
        match settled.settlement {
            Settlement::Release => {
                hold.release(position, settled.event, settled.attempt, now);
                return true;
            }
            // Kept nowhere, it would be lost: it comes again instead.
            Settlement::DeadLetter(_) if dead_is_full => {
                hold.release(position, settled.event, settled.attempt, now);
                return true;
            }
            Settlement::DeadLetter(reason) => {
                let dead = dead_letter(&settled.event, &id.group, &reason, time);
                self.dead.push_back((self.next_dead, dead));
                self.next_dead += 1;
            }
            Settlement::Ack => {}
        }
        if hold.feed.settle(position) {
            partition.settled(position);
        }
        was_waiting
    }

    /// Dead letters behind `after`.
    pub(super) fn dead_letters(&self, after: Option<u64>, limit: usize) -> Vec<StoredDeadLetter> {
        let behind = |position: u64| after.is_none_or(|after| position > after);
        let dead = self.dead.iter().filter(|(position, _)| behind(*position)).take(limit);
        dead.map(|(position, event)| StoredDeadLetter { position: (*position).into(), event: event.clone() }).collect()
    }

    pub(super) fn remove_dead(&mut self, ids: &[Text]) -> usize {
        let before = self.dead.len();
        self.dead.retain(|(_, event)| !ids.iter().any(|id| id.as_str() == event.id()));
        before - self.dead.len()
    }
}

impl Hold {
    fn release(&mut self, position: u64, event: Event, attempt: u32, now: Instant) {
        self.feed.release(FeedItem { position, event, attempt: attempt + 1 }, now);
    }
}

impl GroupPartition {
    fn starting(log: &PartitionLog, from: SubscribeFrom) -> Self {
        let committed = match from {
            SubscribeFrom::Earliest => log.base,
            SubscribeFrom::Latest => log.end(),
        };
        Self { committed, ..Self::default() }
    }

    fn settled(&mut self, offset: u64) {
        self.attempts.remove(&offset);
        self.redeliveries = 0;
        self.settled.insert(Seq(offset));
        let prefix = self.settled.ranges().next().filter(|(first, _)| first.0 == self.committed);
        if let Some((first, last)) = prefix {
            self.committed = last.0 + 1;
            self.settled.remove_range(first, last);
        }
    }

    /// Whether it still is under the hold of `ownership`.
    fn is_held_under(&self, ownership: &Ownership) -> bool {
        self.hold.as_ref().is_some_and(|hold| hold.ownership.is_same(ownership))
    }

    /// Gives the partition to `fair` once its owner has drained it; true if that changed anything.
    fn move_to(&mut self, fair: MemberId, membership: &Membership, now: Instant) -> bool {
        match &mut self.hold {
            None if fair == membership.member => {
                self.hold = Some(Hold {
                    member: fair,
                    ownership: Ownership::new(),
                    feed: PartitionFeed::new(membership.window_events, membership.window_bytes),
                    read_to: self.committed,
                    drain: membership.drain.min(FOREVER),
                    drain_until: None,
                });
                true
            }
            Some(hold) if hold.member != fair => {
                let until = *hold.drain_until.get_or_insert(now + hold.drain);
                hold.ownership.drain();
                let drained = hold.feed.delivered() == 0 || now >= until;
                if drained {
                    self.end_hold();
                }
                drained
            }
            // Its fair owner again before it was drained: it stays.
            Some(hold) if hold.drain_until.is_some() => {
                hold.drain_until = None;
                hold.ownership.keep();
                true
            }
            _ => false,
        }
    }

    fn end_hold(&mut self) {
        if let Some(hold) = self.hold.take() {
            hold.ownership.lose();
            if hold.feed.delivered() > 0 {
                self.redeliveries += 1;
            }
        }
    }

    fn take(&mut self, log: &PartitionLog, member: MemberId, now: Instant, max: usize) -> Vec<FeedItem> {
        let (settled, attempts) = (&self.settled, &self.attempts);
        let Some(hold) = self.hold.as_mut().filter(|hold| hold.member == member && hold.drain_until.is_none()) else {
            return Vec::new();
        };
        hold.read_to = hold.read_to.max(log.base);
        while hold.feed.room() > 0
            && let Some(event) = log.get(hold.read_to)
        {
            let position = hold.read_to;
            hold.read_to += 1;
            if !settled.contains(Seq(position)) {
                let attempt = attempts.get(&position).copied().unwrap_or(0) + 1;
                hold.feed.push(FeedItem { position, event: event.clone(), attempt });
            }
        }
        hold.feed.take(now, max)
    }
}

#[cfg(test)]
mod tests;
