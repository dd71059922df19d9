//! What a consumer does next: which handler to call, what to settle, when to pause. Pure: time and randomness are
//! passed in, deliveries are numbers.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    time::Instant,
};

use crate::{DeadCause, DeadReason, HandlerErrorKind, RetryPolicy, Text};

/// Different keys that must fail in a row before the consumer takes it for an outage.
const OUTAGE_KEYS: usize = 10;
/// Of fewer keys in hand than [`OUTAGE_KEYS`], all must fail, but at least this many.
const OUTAGE_KEYS_MIN: usize = 2;

/// A delivery, by the number the consumer gave it; ascends in the order of arrival.
pub(super) type Slot = u64;
type LaneId = u64;

/// A delivery as it arrives.
#[derive(Clone, Debug)]
pub(super) struct Arrival {
    pub(super) slot: Slot,
    pub(super) partition: u32,
    pub(super) key: Option<Text>,
    pub(super) attempt: u32,
    pub(super) suspect: bool,
}

/// What is to be done now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Call the handler; this is attempt number `attempt`.
    Call { slot: Slot, attempt: u32 },
    /// Make the attempt durable, then say [`Lanes::recorded`].
    Record { slot: Slot },
    /// Settle as acknowledged.
    Ack { slot: Slot },
    /// Settle as given up.
    DeadLetter { slot: Slot, reason: DeadReason },
    /// Give back unhandled.
    Release { slot: Slot },
}

/// How a call ended.
#[derive(Clone, Debug)]
pub(super) enum Answer {
    Handled,
    Failed { kind: HandlerErrorKind, error: String },
}

/// The events in hand, in lanes: those of one key one at a time and in order, different keys in parallel.
#[derive(Debug)]
pub(super) struct Lanes {
    policy: RetryPolicy,
    concurrency: usize,
    lanes: HashMap<LaneId, Lane>,
    by_key: HashMap<(u32, Text), LaneId>,
    lane_of: HashMap<Slot, LaneId>,
    /// Lanes whose head may be called, in the order in which they became so.
    ready: VecDeque<LaneId>,
    /// Lanes whose head is to be called again, by time.
    waiting: BTreeSet<(Instant, LaneId)>,
    partitions: BTreeMap<u32, Partition>,
    running: usize,
    /// Lanes that failed in a row, each with the attempts that were spent on it.
    failing: HashMap<LaneId, u32>,
    pause: Option<Pause>,
    stopping: bool,
    next_lane: LaneId,
}

#[derive(Debug)]
struct Lane {
    key: Option<(u32, Text)>,
    partition: u32,
    queue: VecDeque<Entry>,
    state: LaneState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LaneState {
    /// In `ready`.
    Ready,
    /// Its head is with the handler, or its attempt is being recorded.
    Running,
    /// In `waiting`.
    Waiting(Instant),
}

#[derive(Debug)]
struct Entry {
    slot: Slot,
    attempt: u32,
    suspect: bool,
}

/// How many calls run in a partition, and whether one of them is of a suspect, which runs alone.
#[derive(Debug, Default)]
struct Partition {
    running: usize,
    suspect_running: bool,
    draining: bool,
}

/// Something the handlers need seems to be away: one event is tried now and then, and no attempts are spent.
#[derive(Debug)]
struct Pause {
    failures: u32,
    due: Instant,
    probe: Option<LaneId>,
}

impl Lanes {
    pub(super) fn new(policy: RetryPolicy, concurrency: usize) -> Self {
        Self {
            policy,
            concurrency: concurrency.max(1),
            lanes: HashMap::new(),
            by_key: HashMap::new(),
            lane_of: HashMap::new(),
            ready: VecDeque::new(),
            waiting: BTreeSet::new(),
            partitions: BTreeMap::new(),
            running: 0,
            failing: HashMap::new(),
            pause: None,
            stopping: false,
            next_lane: 0,
        }
    }

    /// Whether nothing is in hand.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.lane_of.is_empty()
    }

    /// Whether the consumer takes what it sees for an outage.
    pub(super) fn is_paused(&self) -> bool {
        self.pause.is_some()
    }

    /// Takes a delivery. Those of a partition arrive in order.
    pub(super) fn arrived(&mut self, arrival: Arrival) {
        let key = arrival.key.map(|key| (arrival.partition, key));
        let entry = Entry { slot: arrival.slot, attempt: arrival.attempt, suspect: arrival.suspect };
        let existing = key.as_ref().and_then(|key| self.by_key.get(key)).copied();
        let id = existing.unwrap_or_else(|| self.open_lane(key, arrival.partition));
        self.lane_of.insert(entry.slot, id);
        self.lane_mut(id).queue.push_back(entry);
    }

    fn open_lane(&mut self, key: Option<(u32, Text)>, partition: u32) -> LaneId {
        let id = self.next_lane;
        self.next_lane += 1;
        if let Some(key) = &key {
            self.by_key.insert(key.clone(), id);
        }
        self.lanes.insert(id, Lane { key, partition, queue: VecDeque::new(), state: LaneState::Ready });
        self.ready.push_back(id);
        id
    }

    fn lane_mut(&mut self, id: LaneId) -> &mut Lane {
        self.lanes.get_mut(&id).expect("a lane lives while it has deliveries")
    }

    /// What may start now: calls up to the concurrency, none while stopping, one at a time while paused.
    pub(super) fn start(&mut self, now: Instant) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.stopping {
            return actions;
        }
        self.wake(now);
        if self.pause.is_some() {
            while let Some(action) = self.start_probe(now) {
                actions.push(action);
            }
            return actions;
        }
        let mut passed_over = Vec::new();
        while self.running < self.concurrency
            && let Some(id) = self.ready.pop_front()
        {
            match self.start_head(id) {
                Some(action) => actions.push(action),
                None => passed_over.push(id),
            }
        }
        for id in passed_over.into_iter().rev().filter(|id| self.lanes.contains_key(id)) {
            self.ready.push_front(id);
        }
        actions
    }

    /// When [`start`](Lanes::start), called with `started` last, may have something to do without anything else
    /// happening.
    pub(super) fn next_due(&self, started: Instant) -> Option<Instant> {
        if self.stopping {
            return None;
        }
        match &self.pause {
            Some(pause) if pause.probe.is_some() => None,
            Some(pause) if pause.due >= started => Some(pause.due),
            // Where a probe was due and none could start, the next lane that is woken is the first to try.
            _ => self.waiting.first().map(|(due, _)| *due),
        }
    }

    fn wake(&mut self, now: Instant) {
        while let Some((due, id)) = self.waiting.first().copied().filter(|(due, _)| *due <= now) {
            self.waiting.remove(&(due, id));
            self.lane_mut(id).state = LaneState::Ready;
            self.ready.push_back(id);
        }
    }

    /// While paused: the lane longest ready, so that a healthy event is tried as well as those that failed.
    fn start_probe(&mut self, now: Instant) -> Option<Action> {
        let pause = self.pause.as_ref().filter(|pause| pause.probe.is_none() && now >= pause.due)?;
        let failures = pause.failures;
        let mut tried = 0;
        let candidates = self.ready.len();
        while tried < candidates
            && let Some(id) = self.ready.pop_front()
        {
            tried += 1;
            if let Some(action) = self.start_head(id) {
                if !matches!(action, Action::DeadLetter { .. }) {
                    self.pause = Some(Pause { failures, due: now, probe: Some(id) });
                }
                return Some(action);
            }
            if self.lanes.contains_key(&id) {
                self.ready.push_back(id);
            }
        }
        None
    }

    /// Starts the head of a lane that was taken off `ready`; `None` if its partition does not let it run now.
    fn start_head(&mut self, id: LaneId) -> Option<Action> {
        let attempts_max = self.policy.attempts;
        let lane = self.lanes.get_mut(&id)?;
        let entry = lane.queue.front()?;
        let (slot, attempt, suspect) = (entry.slot, entry.attempt, entry.suspect);
        if suspect && attempt > attempts_max {
            let error = format!("{attempts_max} attempts were begun and none ended");
            let reason = DeadReason { cause: DeadCause::Killed, error, attempts: attempt - 1 };
            self.finish_head(id);
            return Some(Action::DeadLetter { slot, reason });
        }
        let partition = self.partitions.entry(lane.partition).or_default();
        if partition.draining || partition.suspect_running || (suspect && partition.running > 0) {
            return None;
        }
        lane.state = LaneState::Running;
        partition.running += 1;
        partition.suspect_running = suspect;
        self.running += 1;
        Some(if suspect { Action::Record { slot } } else { Action::Call { slot, attempt } })
    }

    /// The attempt of a suspect is durable, or could not be made so and is tried again later.
    pub(super) fn recorded(&mut self, slot: Slot, durable: bool, now: Instant, random: f64) -> Vec<Action> {
        let Some(&id) = self.lane_of.get(&slot) else { return Vec::new() };
        if durable {
            return vec![Action::Call { slot, attempt: self.head_attempt(id) }];
        }
        self.stopped_running(id);
        self.probe_ended(id, now, random);
        self.retry_later(id, slot, now + self.policy.backoff(1, random))
    }

    /// A call ended: decides what becomes of its delivery.
    pub(super) fn answered(&mut self, slot: Slot, answer: Answer, now: Instant, random: f64) -> Vec<Action> {
        let Some(&id) = self.lane_of.get(&slot) else { return Vec::new() };
        self.stopped_running(id);
        let attempts = self.head_attempt(id);
        let (kind, error) = match answer {
            Answer::Handled => {
                self.resume();
                self.failing.clear();
                self.finish_head(id);
                return vec![Action::Ack { slot }];
            }
            Answer::Failed { kind, error } => (kind, error),
        };
        let dead = |cause| Action::DeadLetter { slot, reason: DeadReason { cause, error: error.clone(), attempts } };
        match kind {
            HandlerErrorKind::Permanent | HandlerErrorKind::Undecodable => {
                self.resume();
                self.finish_head(id);
                let permanent = kind == HandlerErrorKind::Permanent;
                vec![dead(if permanent { DeadCause::Permanent } else { DeadCause::Undecodable })]
            }
            HandlerErrorKind::Retryable if self.is_outage(id, now, random) => self.retry_later(id, slot, now),
            HandlerErrorKind::Retryable | HandlerErrorKind::OfEvent => {
                if kind == HandlerErrorKind::OfEvent {
                    // The handler got as far as judging the event: nothing it needs is away.
                    self.resume();
                }
                match self.policy.delay_after(attempts, random) {
                    Some(delay) => {
                        self.spend_attempt(id);
                        self.retry_later(id, slot, now + delay)
                    }
                    None => {
                        self.finish_head(id);
                        vec![dead(DeadCause::Attempts)]
                    }
                }
            }
        }
    }

    /// Counts a retryable failure; true if by now it looks as if something all events need were away.
    fn is_outage(&mut self, id: LaneId, now: Instant, random: f64) -> bool {
        if self.pause.is_some() {
            self.probe_ended(id, now, random);
            return true;
        }
        self.failing.entry(id).or_default();
        let keys = self.failing.len();
        if keys < OUTAGE_KEYS && (keys < OUTAGE_KEYS_MIN || keys < self.lanes.len()) {
            return false;
        }
        self.pause = Some(Pause { failures: 1, due: now + self.policy.backoff(1, random), probe: None });
        // What the others spent on the outage is given back, and they wait for its end like all.
        for (lane, spent) in std::mem::take(&mut self.failing) {
            if let Some(entry) = self.lanes.get_mut(&lane).and_then(|lane| lane.queue.front_mut()) {
                entry.attempt -= spent;
            }
        }
        true
    }

    /// The event tried while paused failed as well: the next one is tried later.
    fn probe_ended(&mut self, id: LaneId, now: Instant, random: f64) {
        if let Some(pause) = self.pause.as_mut().filter(|pause| pause.probe == Some(id)) {
            pause.probe = None;
            pause.failures += 1;
            pause.due = now + self.policy.backoff(pause.failures, random);
        }
    }

    /// Ends a pause, if there is one.
    fn resume(&mut self) {
        self.pause = None;
    }

    fn head_attempt(&self, id: LaneId) -> u32 {
        self.lanes.get(&id).and_then(|lane| lane.queue.front()).map_or(1, |entry| entry.attempt)
    }

    fn spend_attempt(&mut self, id: LaneId) {
        if let Some(spent) = self.failing.get_mut(&id) {
            *spent += 1;
        }
        if let Some(entry) = self.lane_mut(id).queue.front_mut() {
            entry.attempt += 1;
        }
    }

    fn stopped_running(&mut self, id: LaneId) {
        let partition = self.lane_mut(id).partition;
        self.running -= 1;
        let partition = self.partitions.entry(partition).or_default();
        partition.running -= 1;
        partition.suspect_running = false;
    }

    /// Calls the head again at `due`, unless the partition is leaving or the consumer is stopping.
    fn retry_later(&mut self, id: LaneId, slot: Slot, due: Instant) -> Vec<Action> {
        let partition = self.lane_mut(id).partition;
        if self.stopping || self.partitions.get(&partition).is_some_and(|partition| partition.draining) {
            self.finish_head(id);
            return vec![Action::Release { slot }];
        }
        self.wait(id, due);
        Vec::new()
    }

    fn wait(&mut self, id: LaneId, due: Instant) {
        self.lane_mut(id).state = LaneState::Waiting(due);
        self.waiting.insert((due, id));
    }

    /// The head of a lane is decided; its next one may be called.
    fn finish_head(&mut self, id: LaneId) {
        let lane = self.lane_mut(id);
        let Some(entry) = lane.queue.pop_front() else { return };
        self.lane_of.remove(&entry.slot);
        self.failing.remove(&id);
        let lane = self.lane_mut(id);
        if lane.queue.is_empty() {
            self.close_lane(id);
        } else {
            lane.state = LaneState::Ready;
            self.ready.push_back(id);
        }
    }

    fn close_lane(&mut self, id: LaneId) {
        if let Some(key) = self.lanes.remove(&id).and_then(|lane| lane.key) {
            self.by_key.remove(&key);
        }
        if let Some(pause) = self.pause.as_mut().filter(|pause| pause.probe == Some(id)) {
            pause.probe = None;
        }
    }

    /// A partition should move on: whatever is not running is given back, and no call of it starts any more.
    pub(super) fn drain(&mut self, partition: u32) -> Vec<Action> {
        self.partitions.entry(partition).or_default().draining = true;
        self.release(|lane| lane.partition == partition)
    }

    /// A partition was taken (again).
    pub(super) fn owned(&mut self, partition: u32) {
        self.partitions.entry(partition).or_default().draining = false;
    }

    /// The consumer is stopping: whatever is not running is given back.
    pub(super) fn stop(&mut self) -> Vec<Action> {
        self.stopping = true;
        self.release(|_| true)
    }

    fn release(&mut self, chosen: impl Fn(&Lane) -> bool) -> Vec<Action> {
        let ids: Vec<LaneId> = self.lanes.iter().filter(|(_, lane)| chosen(lane)).map(|(id, _)| *id).collect();
        let mut released = Vec::new();
        for id in ids {
            let lane = self.lane_mut(id);
            let kept = usize::from(lane.state == LaneState::Running);
            released.extend(lane.queue.drain(kept..).map(|entry| entry.slot));
            if kept == 0 {
                if let LaneState::Waiting(due) = lane.state {
                    self.waiting.remove(&(due, id));
                }
                self.failing.remove(&id);
                self.close_lane(id);
            }
        }
        self.ready.retain(|id| self.lanes.contains_key(id));
        released.sort_unstable();
        for slot in &released {
            self.lane_of.remove(slot);
        }
        released.into_iter().map(|slot| Action::Release { slot }).collect()
    }
}

#[cfg(test)]
mod tests;
