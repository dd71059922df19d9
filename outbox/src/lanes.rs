//! [`Lanes`]: what a relay does next with the rows it has seen. Pure: time and randomness are passed in.
//!
//! An event goes from its page to `ready`, to a batch in flight, and is settled by its confirmation. What goes wrong on
//! the way:
//!
//! - A verdict on the event itself holds its key. The events of a held key leave memory and stay as places, until the
//!   head of the key was tried again with success; then they are read again, in order.
//! - Spent attempts, or a verdict that no attempt can mend, set the event aside, as [`OnFailure`] says.
//! - Anything else says nothing of the event: all that was handed over is awaited, the writer is closed and opened
//!   again, and what has no confirmation is handed over again, in order. No attempt is spent.
//! - A broker that has nowhere to put a topic's events yet holds that topic.
//!
//! A [fail-stop](OrderOnFailure::FailStop) bus is handed any number of a key's events behind each other; of another, one
//! event of a key is in flight at a time.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::Instant,
};

use bus_core::{
    BusError, ErrorKind, Event, Mark, OrderOnFailure, Outcome, RetryPolicy, Seq, SeqSet, Text, Topic, bus::too_large,
    mutant,
};

use crate::{
    Blocked, DeadState, EventKey, Page, PageLimit, Probe, ReadRows, Row, SetAside, TopicPattern, cursor::Cursor,
};

/// Most events in one batch.
const BATCH_EVENTS_MAX: usize = 2_048;
/// Bytes after which a batch takes no further event.
const BATCH_BYTES_MAX: usize = 4 << 20;
/// Events of a held key that are read again at once.
const DRAIN_EVENTS_MAX: u64 = 512;
/// Ranges of held places beyond which nothing new is read, so that memory stays bounded.
const HELD_RANGES_MAX: usize = 100_000;

/// What becomes of an event whose attempts are spent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFailure {
    /// It is set aside, and its key's later events behind it, in order, until an operator decides.
    #[default]
    Park,
    /// It alone is set aside, and its key goes on.
    DeadLetter,
    /// The relay ends.
    Halt,
}

/// How rows are handed over.
#[derive(Clone, Debug)]
pub(crate) struct LanesConfig {
    pub(crate) order: OrderOnFailure,
    pub(crate) event_bytes_max: usize,
    pub(crate) topics: Vec<TopicPattern>,
    pub(crate) retry: RetryPolicy,
    pub(crate) on_failure: OnFailure,
    pub(crate) window_events: usize,
    pub(crate) window_bytes: usize,
}

/// A batch to hand over.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) id: u64,
    pub(crate) entries: Vec<(Seq, Event)>,
    pub(crate) mark: Mark,
}

/// What a relay did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Events the broker confirmed as newly stored.
    pub published: u64,
    /// Events the broker had already.
    pub duplicates: u64,
    /// Outcomes that were errors.
    pub failed: u64,
    /// Events set aside whose keys wait.
    pub parked: u64,
    /// Events set aside whose keys go on.
    pub dead: u64,
}

/// The event that made a relay end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Halt {
    pub(crate) seq: Seq,
    pub(crate) error: String,
}

#[derive(Debug)]
pub(crate) struct Lanes {
    config: LanesConfig,
    takes_all: bool,
    cursor: Cursor,
    /// The last of the holes that were there at the start, until all of them were probed.
    restored: Option<Seq>,
    high_id: Option<Text>,
    /// To be handed over next, each key in order.
    ready: VecDeque<(Seq, Event)>,
    /// Keys with events under way on a bus that keeps no order behind a failure.
    lanes: HashMap<EventKey, Lane>,
    holds: BTreeMap<HoldKey, Hold>,
    /// Heads of holds that are under way: not to be tried beside themselves, whatever hold they are in by now.
    trying: SeqSet,
    /// Keys whose events are set aside from this place on.
    parked: HashMap<EventKey, Seq>,
    in_flight: BTreeMap<u64, InFlight>,
    next_batch: u64,
    /// Events in `ready`, `lanes` and `in_flight`, and their bytes.
    window_events: usize,
    window_bytes: usize,
    bus: BusState,
    set_aside: Vec<SetAside>,
    halt: Option<Halt>,
    counts: Counts,
    settled: u64,
}

/// Whether anything can be handed over.
#[derive(Debug)]
enum BusState {
    /// It can, by a writer that is open.
    Open,
    /// An outcome was an error: what is in flight is awaited, and these are to be handed over again.
    Stopping(Stop),
    /// A writer is to be opened, not before `due`.
    Closed { due: Option<Instant> },
}

#[derive(Debug, Default)]
struct Stop {
    again: Vec<(Seq, Event)>,
    verdicts: Vec<(Seq, Event, BusError)>,
    outage: Option<BusError>,
}

/// One key on a bus that keeps no order behind a failure: its first event is ready or in flight, the others wait.
#[derive(Debug, Default)]
struct Lane {
    waiting: VecDeque<Row>,
}

#[derive(Debug)]
struct InFlight {
    entries: Vec<Option<(Seq, Event)>>,
    left: usize,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum HoldKey {
    Key(EventKey),
    /// An event without key is a key of its own.
    Single(Topic, Seq),
    /// All keys of a topic. While it waits, no key of the topic has a hold of its own.
    Topic(Topic),
}

impl HoldKey {
    fn topic(&self) -> &Topic {
        match self {
            Self::Key((topic, _)) | Self::Single(topic, _) | Self::Topic(topic) => topic,
        }
    }
}

/// Events that wait for the first of them.
#[derive(Debug)]
struct Hold {
    queue: SeqSet,
    state: HoldState,
    /// Times the head was published in vain.
    attempts: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HoldState {
    /// Its head is tried again then.
    Waiting(Instant),
    /// Its head is being read, or is under way.
    Probing(Seq),
    /// Its head succeeded: the others are read and follow.
    Draining { reading: bool },
}

impl Lanes {
    pub(crate) fn new(config: LanesConfig, cursor: Cursor, parked: impl IntoIterator<Item = (EventKey, Seq)>) -> Self {
        Self {
            takes_all: config.topics.contains(&TopicPattern::any()),
            config,
            restored: cursor.unseen().last(),
            cursor,
            high_id: None,
            ready: VecDeque::new(),
            lanes: HashMap::new(),
            holds: BTreeMap::new(),
            trying: SeqSet::new(),
            parked: parked.into_iter().filter(|_| !mutant("parked-keys-forgotten")).collect(),
            in_flight: BTreeMap::new(),
            next_batch: 0,
            window_events: 0,
            window_bytes: 0,
            bus: BusState::Closed { due: None },
            set_aside: Vec::new(),
            halt: None,
            counts: Counts::default(),
            settled: 0,
        }
    }

    // ---- Rows come in.

    /// Everything up to here is settled.
    pub(crate) fn low(&self) -> Seq {
        self.cursor.low()
    }

    /// The highest place seen: the next page begins behind it.
    pub(crate) fn high(&self) -> Seq {
        self.cursor.high()
    }

    /// Places to be probed after each page.
    pub(crate) fn unseen(&self) -> &SeqSet {
        self.cursor.unseen()
    }

    /// How much more may be read; `None` while the window is full.
    pub(crate) fn room(&self) -> Option<PageLimit> {
        let held: usize = self.holds.values().map(|hold| hold.queue.ranges().len()).sum();
        let room = self.window_has_room() && held < HELD_RANGES_MAX && self.halt.is_none();
        room.then(|| PageLimit {
            events: self.config.window_events - self.window_events,
            bytes: self.config.window_bytes - self.window_bytes,
        })
    }

    fn window_has_room(&self) -> bool {
        self.window_events < self.config.window_events && self.window_bytes < self.config.window_bytes
    }

    /// Takes what a probe found. Called before [`admit_page`](Lanes::admit_page) with the page that was fetched before
    /// it: an event that became visible together with a later one of its key goes first.
    pub(crate) fn admit_probe(&mut self, probe: Probe, now: Instant, random: f64) {
        self.cursor.close(&probe.dead);
        self.restored = self.restored.filter(|last| probe.through < *last);
        for row in probe.rows {
            if self.cursor.appear(row.seq) {
                self.admit(row, None, now, random);
            }
        }
    }

    /// Takes the page behind [`high`](Lanes::high), once a probe that came after it has looked at every unseen place.
    pub(crate) fn admit_page(&mut self, page: Page, now: Instant, random: f64) {
        self.cursor.observe(page.rows.iter().map(|row| row.seq), page.gaps_are_dead);
        if let Some(last) = page.rows.last() {
            self.high_id = last.event.as_ref().ok().map(|event| event.parts().id.clone());
        }
        for row in page.rows {
            self.admit(row, None, now, random);
        }
    }

    /// Finds the place of a row: to be handed over, held, set aside, or nothing to this sink. `bypass` is the hold it
    /// just came out of.
    ///
    /// A row that cannot be published at all takes its place like any other: it is judged when it is its key's turn.
    fn admit(&mut self, row: Row, bypass: Option<&HoldKey>, now: Instant, random: f64) {
        let seq = row.seq;
        if self.halt.as_ref().is_some_and(|halt| halt.seq < seq) {
            // The relay ends: what follows stays unsettled.
            return;
        }
        let topic = row.topic();
        if !self.takes_all && topic.is_some_and(|topic| !self.takes(topic)) {
            return self.settle(seq);
        }
        // The usual way first: nothing is held, nothing parked.
        if !self.holds.is_empty() && !mutant("retry-overtaken") && self.join_hold(&row, bypass) {
            return;
        }
        if !self.parked.is_empty() && self.join_parked(&row) {
            return;
        }
        // A fail-stop bus keeps a key's events in order by itself.
        let one_at_a_time = self.config.order == OrderOnFailure::Independent && !mutant("key-pipelined");
        let key = one_at_a_time.then(|| row.event_key()).flatten();
        if let Some(lane) = key.as_ref().and_then(|key| self.lanes.get_mut(key)) {
            let bytes = row.size_bytes();
            lane.waiting.push_back(row);
            return self.enter_window(bytes);
        }
        match self.publishable(row) {
            Ok((seq, event)) => {
                if let Some(key) = key {
                    self.lanes.insert(key, Lane::default());
                }
                self.enter_window(event.size_bytes());
                self.ready.push_back((seq, event));
            }
            Err((row, error)) => self.verdict(seq, row.own_hold(), &error, now, random),
        }
    }

    fn takes(&self, topic: &Topic) -> bool {
        self.config.topics.iter().any(|pattern| pattern.matches(topic))
    }

    /// The event of a row, or why no attempt can publish it.
    #[allow(clippy::result_large_err, reason = "it gives back the row that it took")]
    fn publishable(&self, row: Row) -> Result<(Seq, Event), (Row, BusError)> {
        let max = self.config.event_bytes_max;
        match row.event {
            Ok(event) if event.size_bytes() <= max => Ok((row.seq, event)),
            Ok(ref event) => {
                let error = too_large(event, max);
                Err((row, error))
            }
            Err(ref invalid) => {
                let error = BusError::from(invalid.error.clone());
                Err((row, error))
            }
        }
    }

    /// True if the row's key is parked: it is set aside behind what is there. What is older than that is not.
    fn join_parked(&mut self, row: &Row) -> bool {
        let Some(key) = row.event_key() else { return false };
        let behind = self.parked.get(&key).is_some_and(|head| *head < row.seq);
        if behind {
            self.park_behind(row.seq, &key);
        }
        behind
    }

    /// A held topic is asked before a held key: what the key's hold has is older than what the topic's has.
    fn join_hold(&mut self, row: &Row, bypass: Option<&HoldKey>) -> bool {
        let (seq, own, topic) = (row.seq, row.own_hold(), row.topic().cloned().map(HoldKey::Topic));
        if own.as_ref().and_then(|own| self.holds.get(own)).is_some_and(|hold| hold.queue.contains(seq)) {
            return true;
        }
        let from_own = bypass.is_some() && bypass == own.as_ref();
        for key in [topic, own].into_iter().flatten().filter(|key| Some(key) != bypass) {
            // A parked key has no hold; behind a topic's hold it is found parked when the topic goes on.
            if let Some(hold) = self.holds.get_mut(&key) {
                // What a key held is older than what its topic still has, and need not queue behind it.
                if from_own && !hold.is_waiting() {
                    return false;
                }
                hold.queue.insert(seq);
                return true;
            }
        }
        false
    }

    // ---- Batches go out and are confirmed.

    /// The next batch to hand over.
    pub(crate) fn next_batch(&mut self) -> Option<Batch> {
        let held_up = mutant("held-key-holds-all") && !self.holds.is_empty();
        if !matches!(self.bus, BusState::Open) || self.ready.is_empty() || held_up {
            return None;
        }
        let (mut count, mut bytes) = (0, 0);
        for (_, event) in &self.ready {
            if count == BATCH_EVENTS_MAX || bytes >= BATCH_BYTES_MAX {
                break;
            }
            count += 1;
            bytes += event.size_bytes();
        }
        let entries: Vec<(Seq, Event)> = self.ready.drain(..count).collect();
        let id = self.next_batch;
        self.next_batch += 1;
        self.in_flight.insert(id, InFlight { entries: entries.iter().cloned().map(Some).collect(), left: count });
        Some(Batch { id, entries, mark: self.cursor.mark() })
    }

    /// Whether a batch is under way.
    pub(crate) fn has_in_flight(&self) -> bool {
        !self.in_flight.is_empty()
    }

    /// Takes the outcome of the event at `index` of a batch.
    pub(crate) fn outcome(&mut self, batch: u64, index: usize, outcome: Outcome, now: Instant, random: f64) {
        let Some(in_flight) = self.in_flight.get_mut(&batch) else { return };
        let Some((seq, event)) = in_flight.entries.get_mut(index).and_then(Option::take) else { return };
        in_flight.left -= 1;
        if in_flight.left == 0 {
            self.in_flight.remove(&batch);
        }
        self.trying.remove(seq);
        match outcome {
            Ok(receipt) => {
                let counter =
                    if receipt.already_stored { &mut self.counts.duplicates } else { &mut self.counts.published };
                *counter += 1;
                self.confirmed(seq, &event);
            }
            Err(error) => {
                self.counts.failed += 1;
                self.failed(seq, event, error, now, random);
            }
        }
    }

    fn confirmed(&mut self, seq: Seq, event: &Event) {
        self.leave_window(event.size_bytes());
        self.settle(seq);
        if !self.lanes.is_empty()
            && let Some(key) = event_key(event)
        {
            self.advance_lane(&key);
        }
        if !self.holds.is_empty() {
            self.advance_hold(seq, event);
        }
    }

    fn failed(&mut self, seq: Seq, event: Event, error: BusError, now: Instant, random: f64) {
        let verdict = error.spends_attempt() || mutant("outage-spends-attempts");
        let order = self.config.order;
        match (&mut self.bus, order) {
            (BusState::Stopping(stop), _) if verdict => stop.verdicts.push((seq, event, error)),
            (BusState::Stopping(stop), _) => {
                stop.outage.get_or_insert(error);
                stop.again.push((seq, event));
            }
            (_, OrderOnFailure::Independent) if verdict => {
                self.leave_window(event.size_bytes());
                let [own, _] = hold_keys(seq, &event);
                self.verdict(seq, Some(own), &error, now, random);
                if let Some(key) = event_key(&event) {
                    self.advance_lane(&key);
                }
            }
            (_, OrderOnFailure::Independent) if error.kind() == ErrorKind::Unroutable => {
                self.leave_window(event.size_bytes());
                self.hold_topic(seq, &event, now, random);
            }
            _ => {
                self.bus = BusState::Stopping(Stop::default());
                self.failed(seq, event, error, now, random);
            }
        }
    }

    /// The next event of a key may go; what cannot be published is given up on the way to it.
    fn advance_lane(&mut self, key: &EventKey) {
        while let Some(lane) = self.lanes.get_mut(key).filter(|_| self.halt.is_none()) {
            let Some(next) = lane.waiting.pop_front() else {
                self.lanes.remove(key);
                return;
            };
            match self.publishable(next) {
                Ok(next) => return self.ready.push_back(next),
                Err((row, error)) => {
                    self.leave_window(row.size_bytes());
                    self.give_up(row.seq, row.own_hold(), &error, 1);
                }
            }
        }
    }

    /// The head of a hold was confirmed: the others may follow.
    fn advance_hold(&mut self, seq: Seq, event: &Event) {
        for key in hold_keys(seq, event) {
            let Some(hold) = self.holds.get_mut(&key) else { continue };
            hold.queue.remove(seq);
            if hold.state == HoldState::Probing(seq) {
                hold.attempts = 0;
                hold.state = HoldState::Draining { reading: false };
            }
            if hold.queue.is_empty() {
                self.holds.remove(&key);
            }
        }
    }

    // ---- The writer ends and is opened again.

    /// Whether a writer is to be opened now. Everything in flight was awaited.
    pub(crate) fn wants_writer(&self, now: Instant) -> bool {
        matches!(self.bus, BusState::Closed { due } if due.is_none_or(|due| due <= now))
    }

    /// Whether the current writer is done with: nothing more may be handed to it.
    pub(crate) fn is_stopping(&self) -> bool {
        matches!(self.bus, BusState::Stopping(_))
    }

    /// The writer failed at something else, for an outage or not: what is in flight is awaited, and all is handed over
    /// again by another writer.
    pub(crate) fn stop(&mut self, outage: Option<BusError>) {
        if !self.is_stopping() {
            self.bus = BusState::Stopping(Stop::default());
        }
        if let BusState::Stopping(stop) = &mut self.bus {
            stop.outage = stop.outage.take().or(outage);
        }
    }

    /// A writer is open.
    pub(crate) fn writer_opened(&mut self) {
        self.bus = BusState::Open;
    }

    /// No writer could be opened; it is tried again at `due`.
    pub(crate) fn writer_failed(&mut self, due: Instant) {
        self.bus = BusState::Closed { due: Some(due) };
    }

    /// Everything in flight was awaited after a failure: decides what becomes of what is not confirmed. Answers the
    /// outage, if it was one.
    pub(crate) fn stopped(&mut self, now: Instant, random: f64) -> Option<BusError> {
        debug_assert!(self.in_flight.is_empty());
        let BusState::Stopping(stop) = std::mem::replace(&mut self.bus, BusState::Closed { due: None }) else {
            return None;
        };
        let mut again = stop.again;
        again.extend(self.ready.drain(..));
        self.trying = SeqSet::new();
        again.iter().for_each(|(seq, event)| self.try_head_again(*seq, event, now));
        let mut again: Vec<Row> = again.into_iter().map(|(seq, event)| Row { seq, event: Ok(event) }).collect();
        again.extend(self.lanes.drain().flat_map(|(_, lane)| lane.waiting));
        let mut verdicts: BTreeMap<Seq, BusError> = BTreeMap::new();
        for (seq, event, error) in stop.verdicts {
            verdicts.insert(seq, error);
            again.push(Row { seq, event: Ok(event) });
        }
        again.iter().for_each(|row| self.leave_window(row.size_bytes()));
        again.sort_unstable_by_key(|row| row.seq);
        for row in again {
            match verdicts.get(&row.seq) {
                Some(error) => self.verdict(row.seq, row.own_hold(), error, now, random),
                None => self.admit(row, None, now, random),
            }
        }
        stop.outage.filter(|_| verdicts.is_empty())
    }

    /// If the event is the head of a hold, it is tried again from there; what is behind it stays behind it.
    fn try_head_again(&mut self, seq: Seq, event: &Event, now: Instant) {
        for key in hold_keys(seq, event) {
            if let Some(hold) = self.holds.get_mut(&key).filter(|hold| hold.state == HoldState::Probing(seq)) {
                hold.state = HoldState::Waiting(now);
            }
        }
    }

    // ---- Events fail for good, or for a while.

    /// The event itself was refused: its key is held and it is tried again, or it is given up. `own` is the hold it has
    /// or would have; a row that is no event may have none.
    fn verdict(&mut self, seq: Seq, own: Option<HoldKey>, error: &BusError, now: Instant, random: f64) {
        self.judged(seq);
        if let Some(own) = own.as_ref().filter(|own| self.waits_behind(seq, own)) {
            return self.leave_lane(own, own);
        }
        let attempts = own.as_ref().and_then(|own| self.holds.get(own)).map_or(0, |hold| hold.attempts) + 1;
        let delay = if error.is_retryable() { self.config.retry.delay_after(attempts, random) } else { None };
        let (Some(delay), Some(own)) = (delay, &own) else { return self.give_up(seq, own, error, attempts) };
        let waiting_topic = HoldKey::Topic(own.topic().clone());
        if let Some(hold) = self.holds.get_mut(&waiting_topic).filter(|hold| hold.is_waiting()) {
            hold.queue.insert(seq);
            return self.leave_lane(own, &waiting_topic);
        }
        let hold = self.holds.entry(own.clone()).or_insert_with(|| Hold::new(now));
        hold.queue.insert(seq);
        hold.attempts = attempts;
        hold.state = HoldState::Waiting(now + delay);
        self.leave_lane(own, own);
    }

    /// True if an earlier event of the key is held: this one joins it, and is judged when it is its turn.
    fn waits_behind(&mut self, seq: Seq, own: &HoldKey) -> bool {
        let Some(hold) = self.holds.get_mut(own) else { return false };
        let behind = hold.queue.first().is_some_and(|first| first < seq);
        if behind {
            hold.queue.insert(seq);
        }
        behind
    }

    /// An event that was tried for its whole topic was judged for itself: the topic goes on.
    fn judged(&mut self, seq: Seq) {
        let tried = |(key, hold): &(&HoldKey, &mut Hold)| {
            matches!(key, HoldKey::Topic(_)) && hold.state == HoldState::Probing(seq)
        };
        if let Some((key, hold)) = self.holds.iter_mut().find(tried) {
            hold.queue.remove(seq);
            hold.attempts = 0;
            hold.state = HoldState::Draining { reading: false };
            if hold.queue.is_empty() {
                let key = key.clone();
                self.holds.remove(&key);
            }
        }
    }

    fn give_up(&mut self, seq: Seq, own: Option<HoldKey>, error: &BusError, attempts: u32) {
        let reason = if error.is_retryable() { "attempts" } else { error.kind().as_str() };
        tracing::warn!(%seq, reason, %error, attempts, "an event is given up");
        let state = match self.config.on_failure {
            OnFailure::Halt => {
                return self.halt_at(seq, error.to_string());
            }
            OnFailure::DeadLetter => DeadState::Dead,
            OnFailure::Park => DeadState::Parked,
        };
        self.put_aside(seq, state, reason, error.to_string(), attempts);
        if let Some(own) = &own {
            self.leave_hold(seq, &HoldKey::Topic(own.topic().clone()));
        }
        match own {
            Some(HoldKey::Key(key)) if state == DeadState::Parked => self.park(seq, key),
            Some(own) => self.go_on_behind(seq, &own),
            None => {}
        }
    }

    /// Nothing that stands behind it in the log is handed over any more.
    fn halt_at(&mut self, seq: Seq, error: String) {
        let (before, behind) = std::mem::take(&mut self.ready).into_iter().partition(|(other, _)| *other < seq);
        self.ready = before;
        let behind: VecDeque<(Seq, Event)> = behind;
        behind.iter().for_each(|(_, event)| self.leave_window(event.size_bytes()));
        self.halt = Some(Halt { seq, error });
    }

    /// Everything of the key that waits behind `head`, its first unsettled event, is set aside behind it.
    fn park(&mut self, head: Seq, key: EventKey) {
        let lane = self.lanes.remove(&key).unwrap_or_default();
        for row in lane.waiting {
            self.leave_window(row.size_bytes());
            self.park_behind(row.seq, &key);
        }
        let hold = self.holds.remove(&HoldKey::Key(key.clone()));
        let behind = hold.map(|hold| hold.queue).unwrap_or_default();
        behind.iter().filter(|seq| *seq != head).for_each(|seq| self.park_behind(seq, &key));
        let first = self.parked.entry(key).or_insert(head);
        *first = head.min(*first);
    }

    /// An event that needs nothing more waits in no hold, whatever the hold does.
    fn leave_hold(&mut self, seq: Seq, key: &HoldKey) {
        if let Some(hold) = self.holds.get_mut(key) {
            hold.queue.remove(seq);
            if hold.queue.is_empty() {
                self.holds.remove(key);
            }
        }
    }

    /// The key goes on behind an event that alone was given up.
    fn go_on_behind(&mut self, seq: Seq, own: &HoldKey) {
        let Some(hold) = self.holds.get_mut(own) else { return };
        let was_head = hold.queue.first() == Some(seq);
        hold.queue.remove(seq);
        if was_head {
            hold.attempts = 0;
            hold.state = HoldState::Draining { reading: false };
        }
        if hold.queue.is_empty() {
            self.holds.remove(own);
        }
    }

    /// The events that wait in a key's lane leave memory and join a hold, in whose order they are.
    fn leave_lane(&mut self, own: &HoldKey, hold: &HoldKey) {
        let HoldKey::Key(key) = own else { return };
        let lane = self.lanes.remove(key).unwrap_or_default();
        for row in lane.waiting {
            self.leave_window(row.size_bytes());
            if let Some(hold) = self.holds.get_mut(hold) {
                hold.queue.insert(row.seq);
            }
        }
    }

    fn park_behind(&mut self, seq: Seq, key: &EventKey) {
        let error = format!("behind an earlier event of its key in {}", key.0);
        self.put_aside(seq, DeadState::Parked, "behind", error, 0);
    }

    fn put_aside(&mut self, seq: Seq, state: DeadState, reason: &'static str, error: String, attempts: u32) {
        self.set_aside.push(SetAside { seq, state, reason, error, attempts });
    }

    /// The broker has nowhere to put the topic's events yet: all of them wait, and no attempt is spent.
    fn hold_topic(&mut self, seq: Seq, event: &Event, now: Instant, random: f64) {
        let [own, key] = hold_keys(seq, event);
        if !self.holds.contains_key(&key) {
            tracing::warn!(topic = %event.topic(), "the broker has nowhere to put this topic's events yet: they wait");
        }
        // What its keys hold joins it, so that each event waits in one place.
        let of_topic = |other: &&HoldKey| other.topic() == event.topic() && **other != key;
        let keys: Vec<HoldKey> = self.holds.keys().filter(of_topic).cloned().collect();
        let held: Vec<Hold> = keys.iter().filter_map(|key| self.holds.remove(key)).collect();
        let hold = self.holds.entry(key.clone()).or_insert_with(|| Hold::new(now));
        hold.queue.insert(seq);
        held.iter().for_each(|other| hold.queue.insert_all(&other.queue));
        // Its head may be under way: then that outcome decides.
        let waits = match hold.state {
            HoldState::Waiting(due) => due > now,
            HoldState::Probing(head) => head != seq,
            HoldState::Draining { .. } => false,
        };
        if !waits {
            hold.attempts += 1;
            hold.state = HoldState::Waiting(now + self.config.retry.backoff(hold.attempts, random));
        }
        self.leave_lane(&own, &key);
    }

    // ---- Held events are read again.

    /// The places to be read again now; each is asked for once.
    pub(crate) fn reads(&mut self, now: Instant) -> SeqSet {
        let mut wanted = SeqSet::new();
        if !matches!(self.bus, BusState::Open) || !self.window_has_room() {
            return wanted;
        }
        for (key, hold) in &mut self.holds {
            if wanted.len() >= DRAIN_EVENTS_MAX {
                break;
            }
            match hold.state {
                HoldState::Waiting(due) if due <= now => {
                    if let Some(head) = hold.queue.first().filter(|head| !self.trying.contains(*head)) {
                        hold.state = HoldState::Probing(head);
                        wanted.insert(head);
                    }
                }
                HoldState::Draining { reading: false } => {
                    // What a topic took over from its keys may be under way: its outcome takes it out of the queue.
                    let topic = matches!(key, HoldKey::Topic(_));
                    let tried = self.trying.iter().find(|seq| topic && hold.queue.contains(*seq));
                    let end = tried.map_or(hold.queue.last(), |seq| Some(seq.previous())).unwrap_or_default();
                    let next = hold.queue.lowest(DRAIN_EVENTS_MAX).within(Seq::ZERO, end);
                    if !next.is_empty() {
                        hold.state = HoldState::Draining { reading: true };
                        wanted.insert_all(&next);
                    }
                }
                _ => {}
            }
        }
        wanted
    }

    /// Takes what was read of `wanted`. A row that was looked for and is gone was removed by somebody: it needs nothing
    /// more.
    pub(crate) fn admit_read(&mut self, wanted: &SeqSet, read: ReadRows, now: Instant, random: f64) {
        let looked_at = wanted.within(Seq::ZERO, read.through);
        let mut rows: HashMap<Seq, Option<Row>> = read.rows.into_iter().map(|row| (row.seq, Some(row))).collect();
        let keys: Vec<HoldKey> = self.holds.keys().cloned().collect();
        for key in keys {
            match self.holds.get(&key).map(|hold| hold.state) {
                Some(HoldState::Probing(head)) if wanted.contains(head) => {
                    if !looked_at.contains(head) {
                        self.wait_until(&key, now);
                    } else {
                        match rows.get_mut(&head).map(Option::take) {
                            Some(Some(row)) => self.hand_over_head(row, &key, now, random),
                            Some(None) => self.wait_until(&key, now),
                            None => self.forget(head, &key),
                        }
                    }
                }
                Some(HoldState::Draining { reading: true }) => self.drain(&key, &looked_at, &mut rows, now, random),
                _ => {}
            }
        }
    }

    /// What was wanted could not be read: it is wanted again.
    pub(crate) fn read_failed(&mut self, wanted: &SeqSet, now: Instant) {
        self.admit_read(wanted, ReadRows { rows: Vec::new(), through: Seq::ZERO }, now, 0.5);
    }

    fn wait_until(&mut self, key: &HoldKey, due: Instant) {
        if let Some(hold) = self.holds.get_mut(key) {
            hold.state = HoldState::Waiting(due);
        }
    }

    /// The events that waited follow their head, in order and without gaps.
    fn drain(
        &mut self,
        key: &HoldKey,
        looked_at: &SeqSet,
        rows: &mut HashMap<Seq, Option<Row>>,
        now: Instant,
        random: f64,
    ) {
        while let Some(hold) = self.holds.get_mut(key)
            && hold.state == (HoldState::Draining { reading: true })
            && let Some(seq) = hold.queue.first().filter(|seq| looked_at.contains(*seq))
        {
            match rows.get_mut(&seq).map(Option::take) {
                Some(Some(row)) => {
                    hold.queue.remove(seq);
                    self.admit(row, Some(key), now, random);
                }
                // It came here from another hold a moment ago.
                Some(None) => break,
                None => self.forget(seq, key),
            }
        }
        if let Some(hold) = self.holds.get_mut(key)
            && let HoldState::Draining { reading } = &mut hold.state
        {
            *reading = false;
            if hold.queue.is_empty() {
                self.holds.remove(key);
            }
        }
    }

    /// The head of a hold goes alone, before everything that waits behind it.
    fn hand_over_head(&mut self, row: Row, key: &HoldKey, now: Instant, random: f64) {
        if matches!(key, HoldKey::Topic(_)) {
            let behind = row.event_key().filter(|key| self.lanes.contains_key(key));
            if behind.is_some() || self.join_parked(&row) {
                self.leave_topic(row.seq, key, now);
                if let Some(lane) = behind.and_then(|key| self.lanes.get_mut(&key)) {
                    lane.waiting.push_back(row.clone());
                    self.enter_window(row.size_bytes());
                }
                return;
            }
        }
        match self.publishable(row) {
            Ok((seq, event)) => {
                self.enter_window(event.size_bytes());
                self.trying.insert(seq);
                self.ready.push_back((seq, event));
            }
            Err((row, error)) => self.verdict(row.seq, row.own_hold(), &error, now, random),
        }
    }

    /// The head of a held topic belongs to a key with earlier events under way, or that was parked meanwhile: it follows
    /// those, and the topic is tried with its next event.
    fn leave_topic(&mut self, seq: Seq, topic: &HoldKey, now: Instant) {
        self.wait_until(topic, now);
        self.leave_hold(seq, topic);
    }

    fn forget(&mut self, seq: Seq, key: &HoldKey) {
        tracing::warn!(%seq, "a held event's row was removed by somebody; it is passed over");
        self.settle(seq);
        if let Some(hold) = self.holds.get_mut(key) {
            hold.queue.remove(seq);
            hold.attempts = 0;
            if hold.state == HoldState::Probing(seq) {
                hold.state = HoldState::Draining { reading: false };
                if hold.queue.is_empty() {
                    self.holds.remove(key);
                }
            }
        }
    }

    // ---- What is settled, set aside, counted.

    fn settle(&mut self, seq: Seq) {
        self.cursor.settle(seq);
        self.settled += 1;
    }

    fn enter_window(&mut self, bytes: usize) {
        self.window_events += 1;
        self.window_bytes += bytes;
    }

    fn leave_window(&mut self, bytes: usize) {
        self.window_events -= 1;
        self.window_bytes -= bytes;
    }

    /// Events to be set aside and not committed yet.
    pub(crate) fn pending_set_aside(&self) -> &[SetAside] {
        &self.set_aside
    }

    /// The first `count` of them are committed, and so settled.
    pub(crate) fn set_aside_committed(&mut self, count: usize) {
        for aside in self.set_aside.drain(..count).collect::<Vec<_>>() {
            match aside.state {
                DeadState::Dead => self.counts.dead += 1,
                DeadState::Parked | DeadState::Retrying => self.counts.parked += 1,
            }
            self.settle(aside.seq);
        }
    }

    /// The cursor as it is once the first `count` pending set-aside events are committed: low, high and holes.
    pub(crate) fn checkpoint(&mut self, count: usize) -> (Seq, Seq, SeqSet) {
        let mut cursor = self.cursor.clone();
        let count = if mutant("settled-before-set-aside") { self.set_aside.len() } else { count };
        self.set_aside[..count].iter().for_each(|aside| cursor.settle(aside.seq));
        let holes = cursor.holes();
        (cursor.low(), cursor.high(), holes)
    }

    /// The id of the event at [`high`](Lanes::high), if it was seen.
    pub(crate) fn high_id(&self) -> Option<Text> {
        self.high_id.clone()
    }

    /// Events settled since the relay began to own the log.
    pub(crate) fn settled(&self) -> u64 {
        self.settled
    }

    /// Whether everything up to `seq` that was visible when it was looked at is settled. What becomes visible later was
    /// committed later.
    pub(crate) fn is_settled_to(&mut self, seq: Seq) -> bool {
        self.restored.is_none() && self.cursor.is_settled_to(seq)
    }

    pub(crate) fn counts(&self) -> Counts {
        self.counts
    }

    pub(crate) fn halt(&self) -> Option<&Halt> {
        self.halt.as_ref()
    }

    pub(crate) fn blocked(&self) -> Blocked {
        let mut blocked = Blocked::default();
        for key in self.holds.keys() {
            match key {
                HoldKey::Topic(topic) => blocked.topics.push(topic.to_string()),
                HoldKey::Key(_) | HoldKey::Single(..) => blocked.keys += 1,
            }
        }
        blocked.topics.sort();
        blocked
    }

    /// Whether a set-aside event of `key` waits to be committed.
    pub(crate) fn has_pending_set_aside(&self) -> bool {
        !self.set_aside.is_empty()
    }

    /// Whether an event of a parked key, one from before its head, is not settled yet.
    pub(crate) fn is_under_way(&self, key: &EventKey) -> bool {
        let is_of_key = |event: &Event| event.key() == Some(key.1.as_str()) && *event.topic() == key.0;
        let in_flight = self.in_flight.values().flat_map(|batch| batch.entries.iter().flatten());
        self.restored.is_some()
            || self.lanes.contains_key(key)
            || self.holds.contains_key(&HoldKey::Key(key.clone()))
            || self.holds.contains_key(&HoldKey::Topic(key.0.clone()))
            || self.ready.iter().chain(in_flight).any(|(_, event)| is_of_key(event))
            || matches!(&self.bus, BusState::Stopping(_))
    }

    /// The events of `key` flow again: an operator saw to those that were set aside.
    pub(crate) fn unpark(&mut self, key: &EventKey) {
        self.parked.remove(key);
    }

    /// When there may be something to do without anything else happening.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        match &self.bus {
            BusState::Closed { due } => *due,
            BusState::Open if self.window_has_room() => {
                let waiting = |hold: &Hold| match (hold.state, hold.queue.first()) {
                    (HoldState::Waiting(due), Some(head)) if !self.trying.contains(head) => Some(due),
                    _ => None,
                };
                self.holds.values().filter_map(waiting).min()
            }
            _ => None,
        }
    }
}

impl Hold {
    fn new(now: Instant) -> Self {
        Self { queue: SeqSet::new(), state: HoldState::Waiting(now), attempts: 0 }
    }

    /// Whether its head was not tried with success yet.
    fn is_waiting(&self) -> bool {
        !matches!(self.state, HoldState::Draining { .. })
    }
}

impl Row {
    fn topic(&self) -> Option<&Topic> {
        match &self.event {
            Ok(event) => Some(event.topic()),
            Err(invalid) => invalid.topic.as_ref(),
        }
    }

    fn event_key(&self) -> Option<EventKey> {
        match &self.event {
            Ok(event) => event_key(event),
            Err(invalid) => Some((invalid.topic.clone()?, invalid.key.clone()?)),
        }
    }

    /// The hold it can be the head of, apart from its topic's.
    fn own_hold(&self) -> Option<HoldKey> {
        let single = || Some(HoldKey::Single(self.topic()?.clone(), self.seq));
        self.event_key().map(HoldKey::Key).or_else(single)
    }
}

fn event_key(event: &Event) -> Option<EventKey> {
    event.parts().key.as_ref().map(|key| (event.topic().clone(), key.clone()))
}

/// The holds an event can be the head of.
fn hold_keys(seq: Seq, event: &Event) -> [HoldKey; 2] {
    let own = event_key(event).map_or_else(|| HoldKey::Single(event.topic().clone(), seq), HoldKey::Key);
    [own, HoldKey::Topic(event.topic().clone())]
}

#[cfg(test)]
mod tests;
