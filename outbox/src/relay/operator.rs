//! [`Operator`]: what people ask of a sink's owner, done by it alone: set-aside events are published again, or removed.
//!
//! A parked key is published from its head on, in order, until nothing of it is left or its head is refused again; only
//! then do its new events flow. It goes on in steps, so that nothing else waits for it.

use std::{
    collections::{HashSet, VecDeque},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bus_core::{BusError, Confirmations, Event, Outcome, Seq, Text, Topic, bus::too_large};

use crate::{
    Change, DeadRow, DeadState, EventKey, LogError, LogSource, Request, RequestKind, RequestProgress, Selected,
    SetAside, lanes::Lanes,
};

/// Rows removed in one transaction.
const DISCARD_MAX: usize = 500;
/// How long a parked key waits for its own earlier events before it is looked at again.
const UNDER_WAY_PAUSE: Duration = Duration::from_millis(20);

/// Carries out requests, one after the other.
#[derive(Debug)]
pub(super) struct Operator {
    /// Events published again at once: of one key only so many as the bus keeps in order.
    chunk_max: usize,
    event_bytes_max: usize,
    /// Whether the log was ever asked for requests.
    has_asked: bool,
    waiting: VecDeque<Job>,
    known: HashSet<i64>,
    step: Step,
    /// Keys of which something was removed: they flow again once nothing of them is left.
    emptied: Vec<EventKey>,
    /// The writer failed at a step, for an outage or not.
    failure: Option<Option<BusError>>,
    change: OperatorChange,
}

/// One request under way.
#[derive(Debug)]
struct Job {
    request: Request,
    /// Rows up to here are done with.
    after: Seq,
    /// The key that is being published from its head on.
    draining: Option<EventKey>,
    /// Keys whose head was refused again.
    stopped: HashSet<EventKey>,
    done: u64,
    failed: u64,
    not_before: Option<Instant>,
}

#[derive(Debug)]
enum Step {
    /// The next rows are to be read.
    Read,
    /// These are to be handed over.
    Ready(Vec<DeadRow>, Vec<Event>),
    /// These are with the writer.
    HandingOver(Vec<DeadRow>),
    /// These are awaited.
    InFlight(Vec<DeadRow>, Confirmations, Vec<Option<Outcome>>),
    /// What came of it is to be committed.
    Commit,
}

/// What is to be committed of it.
#[derive(Debug, Default)]
pub(super) struct OperatorChange {
    removed: Vec<Seq>,
    refused: Vec<SetAside>,
    requests: Vec<RequestProgress>,
}

impl OperatorChange {
    pub(super) fn is_empty(&self) -> bool {
        self.removed.is_empty() && self.refused.is_empty() && self.requests.is_empty()
    }

    pub(super) fn write_to(&self, change: &mut Change) {
        change.removed.clone_from(&self.removed);
        change.refused.clone_from(&self.refused);
        change.requests.clone_from(&self.requests);
    }
}

impl Operator {
    pub(super) fn new(chunk_max: usize, event_bytes_max: usize) -> Self {
        Self {
            chunk_max,
            event_bytes_max,
            has_asked: false,
            waiting: VecDeque::new(),
            known: HashSet::new(),
            step: Step::Read,
            emptied: Vec::new(),
            failure: None,
            change: OperatorChange::default(),
        }
    }

    /// Whether nothing is asked for. Not before the log was looked at.
    pub(super) fn is_idle(&self) -> bool {
        self.has_asked && self.waiting.is_empty() && self.emptied.is_empty() && self.change.is_empty()
    }

    pub(super) fn has_in_flight(&self) -> bool {
        matches!(self.step, Step::HandingOver(_) | Step::InFlight(..))
    }

    /// Takes what the log has; what is known already goes on.
    pub(super) fn asked(&mut self, requests: Vec<Request>) {
        self.has_asked = true;
        for request in requests {
            if self.known.insert(request.id) {
                tracing::info!(request = request.id, kind = request.kind.as_str(), "an operator asks");
                self.waiting.push_back(Job::new(request));
            }
        }
    }

    /// When it goes on without anything else happening.
    pub(super) fn next_due(&self) -> Option<Instant> {
        let job = self.waiting.front().filter(|_| matches!(self.step, Step::Read))?;
        job.not_before
    }

    /// Reads the next rows; answers whether there was something to do.
    pub(super) async fn read(
        &mut self,
        log: &dyn LogSource,
        lanes: &mut Lanes,
        now: Instant,
    ) -> Result<bool, LogError> {
        if !matches!(self.step, Step::Read) {
            return Ok(false);
        }
        let unparked = self.unpark_emptied(log, lanes).await?;
        let Some(job) = self.waiting.front_mut().filter(|job| job.not_before.is_none_or(|due| due <= now)) else {
            return Ok(unparked);
        };
        match job.request.kind {
            RequestKind::Discard => self.discard(log).await?,
            RequestKind::Retry => self.read_retry(log, lanes, now).await?,
        }
        Ok(true)
    }

    async fn discard(&mut self, log: &dyn LogSource) -> Result<(), LogError> {
        let Some(job) = self.waiting.front_mut() else { return Ok(()) };
        let rows = log.set_aside(&job.request.selected, job.after, DISCARD_MAX).await?;
        job.after = rows.last().map_or(job.after, |row| row.seq);
        job.done += rows.len() as u64;
        self.change.removed.extend(rows.iter().map(|row| row.seq));
        self.emptied.extend(rows.iter().filter_map(parked_key));
        self.finish_step(rows.is_empty());
        Ok(())
    }

    async fn read_retry(&mut self, log: &dyn LogSource, lanes: &mut Lanes, now: Instant) -> Result<(), LogError> {
        let chunk_max = self.chunk_max;
        let Some(job) = self.waiting.front_mut() else { return Ok(()) };
        let chunk_max = job.request.rate.map_or(chunk_max, |rate| chunk_max.min(rate.max(1) as usize));
        if let Some(key) = job.draining.clone() {
            if lanes.is_under_way(&key) {
                // Earlier events of the key come first.
                job.not_before = Some(now + UNDER_WAY_PAUSE);
                return Ok(());
            }
            let rows = log.set_aside(&of_key(&key), Seq::ZERO, chunk_max).await?;
            if !rows.is_empty() {
                return self.prepare(rows);
            }
            // Events that were parked in the meantime are published before the key's new ones flow.
            if !lanes.has_pending_set_aside() {
                lanes.unpark(&key);
                job.draining = None;
            }
            return Ok(());
        }
        let rows = log.set_aside(&job.request.selected, job.after, chunk_max).await?;
        let Some(first) = rows.first() else {
            self.finish_step(true);
            return Ok(());
        };
        match parked_key(first) {
            Some(key) if job.stopped.contains(&key) => job.after = first.seq,
            Some(key) => job.draining = Some(key),
            None => {
                let single: Vec<DeadRow> = rows.into_iter().take_while(|row| parked_key(row).is_none()).collect();
                job.after = single.last().map_or(job.after, |row| row.seq);
                return self.prepare(single);
            }
        }
        Ok(())
    }

    /// Sorts out what cannot be published at all; the others are to be handed over.
    fn prepare(&mut self, rows: Vec<DeadRow>) -> Result<(), LogError> {
        let (mut kept, mut events) = (Vec::new(), Vec::new());
        for row in rows {
            let refusal = match &row.event {
                Ok(event) if event.size_bytes() > self.event_bytes_max => too_large(event, self.event_bytes_max),
                Ok(event) => {
                    events.push(event.clone());
                    kept.push(row);
                    continue;
                }
                Err(invalid) => BusError::from(invalid.error.clone()),
            };
            let key = parked_key(&row);
            self.refuse(&row, &refusal);
            if key.is_some() {
                // Nothing of the key goes past it.
                break;
            }
        }
        if events.is_empty() {
            self.finish_step(false);
        } else {
            self.step = Step::Ready(kept, events);
        }
        Ok(())
    }

    /// The events to hand over now.
    pub(super) fn next_batch(&mut self) -> Option<Vec<Event>> {
        match std::mem::replace(&mut self.step, Step::Read) {
            Step::Ready(rows, events) => {
                self.step = Step::HandingOver(rows);
                Some(events)
            }
            other => {
                self.step = other;
                None
            }
        }
    }

    /// The writer has taken them.
    pub(super) fn handed_over(&mut self, confirmations: Confirmations) {
        if let Step::HandingOver(rows) = std::mem::replace(&mut self.step, Step::Read) {
            let outcomes = vec![None; rows.len()];
            self.step = Step::InFlight(rows, confirmations, outcomes);
        }
    }

    /// Takes outcomes; true when all are there.
    pub(super) fn poll(&mut self, context: &mut Context<'_>) -> bool {
        let Step::InFlight(_, confirmations, outcomes) = &mut self.step else { return false };
        loop {
            match confirmations.poll_outcome(context) {
                Poll::Ready(Some((index, outcome))) => outcomes[index] = Some(outcome),
                Poll::Ready(None) => break,
                Poll::Pending => return false,
            }
        }
        if let Step::InFlight(rows, _, outcomes) = std::mem::replace(&mut self.step, Step::Commit) {
            self.confirmed(rows, outcomes.into_iter().flatten().collect());
        }
        true
    }

    fn confirmed(&mut self, rows: Vec<DeadRow>, outcomes: Vec<Outcome>) {
        let mut last_done = None;
        if outcomes.iter().any(Result::is_err) {
            // A fail-stop writer takes nothing more; another one is opened.
            self.failure = Some(None);
        }
        for (row, outcome) in rows.iter().zip(outcomes) {
            match outcome {
                Ok(_) => {
                    last_done = Some(row.seq);
                    self.change.removed.push(row.seq);
                    self.change_job(|job| job.done += 1);
                }
                Err(error) if error.spends_attempt() => {
                    let key = parked_key(row);
                    self.refuse(row, &error);
                    if key.is_some() {
                        break;
                    }
                    last_done = Some(row.seq);
                }
                Err(error) => {
                    // It says nothing of the event: the same rows are read again once the writer is back.
                    self.failure = Some(Some(error));
                    let first = rows.first().map_or(Seq::ZERO, |row| row.seq);
                    self.change_job(|job| job.after = last_done.unwrap_or(first.previous()).min(job.after));
                    break;
                }
            }
        }
        self.finish_step(false);
    }

    fn refuse(&mut self, row: &DeadRow, error: &BusError) {
        let reason = if error.is_retryable() { "attempts" } else { error.kind().as_str() };
        let (seq, state) = (row.seq, DeadState::Retrying);
        self.change.refused.push(SetAside { seq, state, reason, error: error.to_string(), attempts: 1 });
        let key = parked_key(row);
        self.change_job(|job| {
            job.failed += 1;
            job.draining = None;
            job.stopped.extend(key);
        });
    }

    fn change_job(&mut self, change: impl FnOnce(&mut Job)) {
        if let Some(job) = self.waiting.front_mut() {
            change(job);
        }
    }

    /// What was done is to be committed with the request's progress.
    fn finish_step(&mut self, ended: bool) {
        let Some(job) = self.waiting.front_mut() else { return };
        let progress = RequestProgress { id: job.request.id, done: job.done, failed: job.failed, ended };
        if let Some(rate) = job.request.rate {
            let taken = self.change.removed.len().max(1) as f64 / f64::from(rate.max(1));
            job.not_before = Some(tokio::time::Instant::now().into_std() + Duration::from_secs_f64(taken));
        }
        self.change.requests.push(progress);
        if ended {
            self.waiting.pop_front();
        }
        self.step = Step::Commit;
    }

    /// What is to be committed now, if the step before is done.
    pub(super) fn take_change(&mut self) -> Option<OperatorChange> {
        let ready = matches!(self.step, Step::Commit) && !self.change.is_empty();
        ready.then(|| std::mem::take(&mut self.change))
    }

    /// The change is committed: it goes on.
    pub(super) fn committed(&mut self, change: OperatorChange) {
        for request in change.requests.iter().filter(|request| request.ended) {
            tracing::info!(request = request.id, done = request.done, failed = request.failed, "a request is done");
        }
        // A write that was under way before says nothing of what is still to be taken.
        if matches!(self.step, Step::Commit) && self.change.is_empty() {
            self.step = Step::Read;
        }
    }

    /// The change could not be committed: it is tried again.
    pub(super) fn not_committed(&mut self, change: OperatorChange) {
        self.change = change;
    }

    /// Whether the writer failed at a step, and the outage if it was one.
    pub(super) fn take_failure(&mut self) -> Option<Option<BusError>> {
        self.failure.take()
    }

    /// Keys of which nothing is set aside any more flow again.
    async fn unpark_emptied(&mut self, log: &dyn LogSource, lanes: &mut Lanes) -> Result<bool, LogError> {
        if self.emptied.is_empty() || lanes.has_pending_set_aside() {
            return Ok(false);
        }
        self.emptied.sort_unstable();
        self.emptied.dedup();
        while let Some(key) = self.emptied.last() {
            let rows = log.set_aside(&of_key(key), Seq::ZERO, 1).await?;
            if rows.is_empty() {
                lanes.unpark(key);
            }
            self.emptied.pop();
        }
        Ok(true)
    }
}

impl Job {
    fn new(request: Request) -> Self {
        Self {
            request,
            after: Seq::ZERO,
            draining: None,
            stopped: HashSet::new(),
            done: 0,
            failed: 0,
            not_before: None,
        }
    }
}

/// The key that waits for this row, if one does.
fn parked_key(row: &DeadRow) -> Option<EventKey> {
    let key = row.columns.key.as_ref().filter(|_| row.parked)?;
    Some((Topic::new(row.columns.topic.as_str()).ok()?, Text::from(key.as_str())))
}

/// What waits of a key. What was given up alone is not part of it.
fn of_key(key: &EventKey) -> Selected {
    Selected { key: Some((key.0.to_string(), key.1.to_string())), parked: true, ..Selected::default() }
}
