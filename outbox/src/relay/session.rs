//! One owner's time with a log: I/O around the decisions of [`Lanes`].

use std::{
    future::poll_fn,
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use bus_core::{
    BusError, Confirmations, ErrorKind, EventBus, LogWriter, Position, Seq, SeqSet, Text, WriterId, failpoint, mutant,
};
use futures_util::{FutureExt, future::BoxFuture};
use tokio::time::sleep_until;

use super::{
    Observer, RelayConfig, RelayError, RelayEvent, RelaySummary, is_final,
    lease::LeaseClock,
    operator::{Operator, OperatorChange},
    retry_chunk,
    task::Running,
};
use crate::{
    Awakened, Change, Lease, LogError, LogErrorKind, LogSource, Owned, Page, PageLimit, Pruned, Row, Wake,
    cursor::Cursor,
    lanes::{Lanes, LanesConfig},
};

/// Settled events after which a checkpoint is written.
const CHECKPOINT_EVENTS: u64 = 3_072;
/// Settled events without a checkpoint beyond which nothing is handed over: together with the window this bounds the
/// duplicates of a crash, however slow the database is. Some more than above, so that a checkpoint holds nobody up.
const UNWRITTEN_MAX: u64 = 4_096;
/// Set-aside events written in one transaction.
const SET_ASIDE_MAX: usize = 500;
/// A page is at most this part of the window, so that the next one is read while this one is published.
const PAGES_PER_WINDOW: usize = 4;
/// Pause before gaps are looked at again: this short while they are new, and at most this long.
const GAP_PAUSE_MIN: Duration = Duration::from_millis(5);
const GAP_PAUSE_MAX: Duration = Duration::from_secs(1);
/// Rows a janitor removes in one transaction.
const PRUNE_ROWS_MAX: usize = 5_000;
/// Pause between two rounds of the janitor: at most this long, and this short while there is more to remove.
const PRUNE_PAUSE_MAX: Duration = Duration::from_secs(60);
const PRUNE_PAUSE_MIN: Duration = Duration::from_millis(100);

/// Why an owner's time is over.
#[derive(Debug)]
pub(super) enum End {
    /// Another owner came; `by` is its epoch where the broker told it.
    Fenced { by: Option<u64> },
    /// The broker remembers places that mean other events here.
    OtherHistory,
    /// Waiting will not mend it.
    Failed(RelayError),
}

pub(super) struct Session {
    log: Arc<dyn LogSource>,
    bus: Arc<dyn EventBus>,
    config: Arc<RelayConfig>,
    tell: Observer,
    lanes: Lanes,
    operator: Operator,
    lease: Lease,
    clock: LeaseClock,
    log_name: Text,
    writer_id: WriterId,
    /// Where the last writer stood, also while there is none.
    position: Position,
    writer: Option<Box<dyn LogWriter>>,
    opening: Running<Result<Box<dyn LogWriter>, BusError>>,
    handing: Option<BoxFuture<'static, Handed>>,
    confirmations: Vec<(u64, Confirmations)>,
    fetching: Running<Result<Page, LogError>>,
    fetch_wanted: bool,
    /// A page that was fetched, and up to where the unseen places were probed since.
    fetched: Option<(Page, Seq)>,
    /// The first gap there was at the last page, and when it is looked at again.
    gap: Option<Seq>,
    gap_pause: Duration,
    gap_due: Option<Instant>,
    /// Held places that are being read.
    reading: Option<SeqSet>,
    /// The last page was empty: everything that was visible then was read.
    at_end: bool,
    storing: Running<Result<(), LogError>>,
    store: Option<Store>,
    /// The settled events and the time of the last checkpoint.
    checkpoint: (u64, Instant),
    pruning: Running<Result<Pruned, LogError>>,
    prune_due: Option<Instant>,
    wake: Awakened,
    /// When the log is looked at unasked.
    poll_due: Instant,
    bus_failures: u32,
    log_failures: u32,
    /// Not before then is the log tried again.
    log_due: Option<Instant>,
}

/// A batch that was handed over, with the writer that did it.
struct Handed {
    writer: Box<dyn LogWriter>,
    /// The batch, or `None` for an operator's.
    batch: Option<u64>,
    confirmations: Confirmations,
}

/// A change that is being written.
struct Store {
    sent: Instant,
    durable: bool,
    set_aside: usize,
    settled: u64,
    operator: OperatorChange,
}

impl Session {
    pub(super) fn new(
        log: Arc<dyn LogSource>,
        bus: Arc<dyn EventBus>,
        config: Arc<RelayConfig>,
        owned: Owned,
        sent: Instant,
        wake: &Wake,
        tell: Observer,
    ) -> Self {
        let capabilities = bus.capabilities();
        let lanes = LanesConfig {
            order: capabilities.order_on_failure,
            event_bytes_max: capabilities.event_bytes_max,
            topics: config.topics.clone(),
            retry: config.retry,
            on_failure: config.on_failure,
            window_events: config.window_events,
            window_bytes: config.window_bytes,
        };
        let now = now();
        Self {
            lanes: Lanes::new(lanes, Cursor::restore(owned.low, owned.high, &owned.holes), owned.parked),
            operator: Operator::new(retry_chunk(capabilities), capabilities.event_bytes_max),
            clock: LeaseClock::new(owned.lease.ttl, sent),
            log_name: owned.log_id.to_string().into(),
            writer_id: WriterId {
                log: owned.log_id,
                sink: log.sink().into(),
                incarnation: owned.incarnation,
                epoch: owned.lease.epoch,
                since: owned.position.clone(),
            },
            position: owned.position.unwrap_or_default(),
            lease: owned.lease,
            writer: None,
            opening: Running::nothing(),
            handing: None,
            confirmations: Vec::new(),
            fetching: Running::nothing(),
            fetch_wanted: true,
            fetched: None,
            gap: None,
            gap_pause: GAP_PAUSE_MIN,
            gap_due: None,
            reading: None,
            at_end: false,
            storing: Running::nothing(),
            store: None,
            checkpoint: (0, now),
            pruning: Running::nothing(),
            prune_due: config.retention.map(|retention| now + prune_pause(retention)),
            wake: wake.listen(),
            poll_due: now,
            bus_failures: 0,
            log_failures: 0,
            log_due: None,
            log,
            bus,
            config,
            tell,
        }
    }

    pub(super) fn summary(&self) -> RelaySummary {
        RelaySummary { events: self.lanes.settled(), counts: self.lanes.counts() }
    }

    /// Does what can be done without waiting for others; answers whether that was anything.
    pub(super) async fn turn(&mut self) -> Result<bool, End> {
        self.clock.ripen(now(), self.log.write_delay());
        self.log_due = self.log_due.filter(|due| now() < *due);
        let mut worked = self.poll(&mut Context::from_waker(Waker::noop()));
        worked |= self.stored()?;
        worked |= self.mend_writer().await?;
        worked |= self.read().await?;
        worked |= self.operate().await?;
        worked |= self.hand_over();
        worked |= self.store_when_due();
        self.prune_when_due();
        match self.lanes.halt() {
            Some(halt) => Err(End::Failed(RelayError::Halted { seq: halt.seq, error: halt.error.clone() })),
            None => Ok(worked),
        }
    }

    /// Waits until another turn may have something to do.
    pub(super) async fn wait(&mut self) {
        let (log, mut wake) = (Arc::clone(&self.log), self.wake.clone());
        {
            let mut timer = pin!(sleep_until(self.next_due().into()));
            // One future each for the whole wait: a future that is dropped wakes nobody.
            let (mut changed, mut nudge) = (pin!(log.changed()), pin!(wake.wait()));
            poll_fn(|context| {
                let nudged = nudge.as_mut().poll(context).is_ready() | changed.as_mut().poll(context).is_ready();
                self.fetch_wanted |= nudged;
                let woken = nudged | timer.as_mut().poll(context).is_ready() | self.poll(context);
                if woken { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
        }
        self.wake = wake;
    }

    fn next_due(&self) -> Instant {
        // What needs the log, in the order in which it is due.
        let mut of_log = self.poll_due.min(self.gap_due.unwrap_or(self.poll_due));
        of_log = of_log.min(self.operator.next_due().unwrap_or(of_log));
        // While a write is under way, no other one is due.
        if !self.storing.is_busy() {
            of_log = of_log.min(self.clock.renewal_due());
            if self.unwritten() > 0 {
                of_log = of_log.min(self.checkpoint.1 + self.log.checkpoint_interval());
            }
        }
        // Before the log is tried again, nothing of that can be done, however long it has been due.
        let mut due = self.log_due.unwrap_or(of_log);
        let mut earlier = |other: Option<Instant>| due = due.min(other.unwrap_or(due));
        earlier(self.prune_due);
        // Without a lease nothing is handed over, however long it has been due.
        earlier(self.lanes.next_due().filter(|_| self.clock.is_held(now())));
        // A time that has passed and changed nothing is not waited for in a tight loop.
        due.max(now() + Duration::from_millis(1))
    }

    /// Looks at everything that runs beside this task; answers whether something came of it.
    fn poll(&mut self, context: &mut Context<'_>) -> bool {
        let published = self.poll_handing(context) | self.poll_confirmations(context) | self.operator.poll(context);
        let opened = self.opening.poll(context);
        let read = self.fetching.poll(context);
        let written = self.storing.poll(context) | self.pruning.poll(context);
        published | opened | read | written
    }

    // ---- Publishing.

    /// Hands over what is ready, batch by batch, as long as the writer takes them at once.
    fn hand_over(&mut self) -> bool {
        let mut handed = false;
        while self.handing.is_none() && self.may_hand_over() {
            let Some(mut writer) = self.writer.take() else { break };
            if let Some(events) = self.operator.next_batch() {
                self.handing = Some(Box::pin(async move {
                    let confirmations = writer.republish(events).await;
                    Handed { writer, batch: None, confirmations }
                }));
            } else if let Some(batch) = self.lanes.next_batch() {
                failpoint("before-publish");
                self.handing = Some(Box::pin(async move {
                    let confirmations = writer.publish_batch(batch.entries, &batch.mark).await;
                    Handed { writer, batch: Some(batch.id), confirmations }
                }));
            } else {
                self.writer = Some(writer);
                break;
            }
            handed = true;
            self.poll_handing(&mut Context::from_waker(Waker::noop()));
        }
        handed
    }

    /// Whether the lease is held, and a crash would not repeat more than it may.
    fn may_hand_over(&self) -> bool {
        let is_held = self.clock.is_held(now()) || mutant("lease-outlived");
        is_held && (self.unwritten() < UNWRITTEN_MAX || mutant("checkpoints-unawaited"))
    }

    /// Settled events that no checkpoint covers.
    fn unwritten(&self) -> u64 {
        self.lanes.settled() - self.checkpoint.0
    }

    fn poll_handing(&mut self, context: &mut Context<'_>) -> bool {
        let Some(handing) = &mut self.handing else { return false };
        let Poll::Ready(handed) = handing.poll_unpin(context) else { return false };
        self.handing = None;
        self.position = handed.writer.position();
        self.writer = Some(handed.writer);
        failpoint("after-publish");
        match handed.batch {
            Some(batch) => self.confirmations.push((batch, handed.confirmations)),
            None => self.operator.handed_over(handed.confirmations),
        }
        true
    }

    fn poll_confirmations(&mut self, context: &mut Context<'_>) -> bool {
        let (lanes, now) = (&mut self.lanes, now());
        let (mut progress, mut confirmed) = (false, false);
        self.confirmations.retain_mut(|(batch, confirmations)| {
            loop {
                match confirmations.poll_outcome(context) {
                    Poll::Ready(Some((index, outcome))) => {
                        progress = true;
                        confirmed |= outcome.is_ok();
                        lanes.outcome(*batch, index, outcome, now, fastrand::f64());
                    }
                    Poll::Ready(None) => break false,
                    Poll::Pending => break true,
                }
            }
        });
        if confirmed {
            failpoint("after-confirmation");
            self.bus_took_events();
        }
        progress
    }

    /// Closes a writer that failed, decides what follows from the failure, and opens another.
    async fn mend_writer(&mut self) -> Result<bool, End> {
        if let Some(outage) = self.operator.take_failure() {
            self.lanes.stop(outage);
        }
        let awaited = self.handing.is_none() && !self.lanes.has_in_flight() && !self.operator.has_in_flight();
        if self.lanes.is_stopping() && awaited {
            self.close_writer().await;
            if let Some(error) = self.lanes.stopped(now(), fastrand::f64()) {
                self.bus_failed(error)?;
            }
            return Ok(true);
        }
        match self.opening.take() {
            Some(Ok(writer)) => self.writer_opened(writer).await?,
            Some(Err(error)) => self.bus_failed(error)?,
            None => return Ok(self.open_writer()),
        }
        Ok(true)
    }

    fn open_writer(&mut self) -> bool {
        let wanted = self.lanes.wants_writer(now()) && !self.opening.is_busy() && self.clock.is_held(now());
        if wanted {
            let (bus, id) = (Arc::clone(&self.bus), self.writer_id.clone());
            self.opening.start(async move { bus.open_writer(id).await });
        }
        wanted
    }

    /// Ends the writer: nothing that was handed over can land any more.
    pub(super) async fn close_writer(&mut self) {
        if let Some(mut writer) = self.writer.take() {
            self.position = writer.position();
            self.writer_id.since = Some(self.position.clone());
            // It failed already; what matters is that nothing of it can land any more.
            if let Err(error) = writer.close().await {
                tracing::debug!(%error, "closing a writer failed");
            }
        }
    }

    /// What the broker remembers must be what stands in the log; otherwise it is of another history.
    async fn writer_opened(&mut self, writer: Box<dyn LogWriter>) -> Result<(), End> {
        // What is settled may have been removed since.
        let low = self.lanes.low();
        for (seq, id) in writer.high_marks().into_iter().filter(|(seq, _)| *seq > low) {
            let place: SeqSet = [seq].into_iter().collect();
            let read = match self.log.read(&place, PageLimit { events: 1, bytes: 1 }).await {
                Ok(read) => read,
                Err(error) => {
                    self.log_failed(error)?;
                    self.lanes.writer_failed(now() + self.config.retry.backoff(1, fastrand::f64()));
                    return Ok(());
                }
            };
            let same =
                read.rows.first().and_then(|row| row.event.as_ref().ok()).is_some_and(|event| event.id() == &*id);
            if !same {
                return Err(End::OtherHistory);
            }
        }
        self.position = writer.position();
        self.writer = Some(writer);
        self.lanes.writer_opened();
        Ok(())
    }

    fn bus_failed(&mut self, error: BusError) -> Result<(), End> {
        if error.kind() == ErrorKind::Fenced {
            return Err(End::Fenced { by: error.fence() });
        }
        if is_final(&error) {
            return Err(End::Failed(error.into()));
        }
        self.bus_failures += 1;
        if self.bus_failures == 1 {
            (self.tell)(&RelayEvent::BusAway { error: error.to_string() });
        }
        self.lanes.writer_failed(now() + self.config.retry.backoff(self.bus_failures, fastrand::f64()));
        Ok(())
    }

    fn bus_took_events(&mut self) {
        if std::mem::take(&mut self.bus_failures) > 0 {
            (self.tell)(&RelayEvent::BusBack);
        }
        (self.tell)(&RelayEvent::Progress(self.lanes.counts()));
    }

    // ---- Reading.

    /// Takes the page that was fetched and has the next one fetched; reads held events whose time has come.
    async fn read(&mut self) -> Result<bool, End> {
        let at = now();
        if self.log_due.is_some_and(|due| at < due) {
            return Ok(false);
        }
        if self.gap_due.is_some_and(|due| at >= due) {
            self.gap_due = None;
            self.fetch_wanted = true;
        }
        if at >= self.poll_due {
            self.poll_due = at + self.config.poll_interval;
            self.fetch_wanted = true;
            let requests = self.log.requests().await;
            self.log_answered(requests)?.into_iter().for_each(|requests| self.operator.asked(requests));
        }
        let mut worked = self.take_page().await?;
        if let Some(wanted) = self.reading.take() {
            // A turn that was dropped never took what it read.
            self.lanes.read_failed(&wanted, now());
        }
        let wanted = self.lanes.reads(now());
        if !wanted.is_empty() {
            worked = true;
            self.read_held(wanted).await?;
        }
        self.fetch_ahead();
        Ok(worked)
    }

    fn fetch_ahead(&mut self) {
        let Some(room) =
            self.lanes.room().filter(|_| self.fetch_wanted && !self.fetching.is_busy() && self.fetched.is_none())
        else {
            return;
        };
        let limit = PageLimit {
            events: room.events.min(self.config.window_events.div_ceil(PAGES_PER_WINDOW)),
            bytes: room.bytes.min(self.config.window_bytes.div_ceil(PAGES_PER_WINDOW)),
        };
        let (log, name, after) = (Arc::clone(&self.log), self.log_name.clone(), self.lanes.high());
        self.fetch_wanted = false;
        self.fetching.start(async move {
            let mut page = log.fetch(after, limit).await?;
            stamp(&mut page.rows, &name);
            Ok(page)
        });
    }

    /// Takes the page that was fetched, once every unseen place was probed since: otherwise an event of the page could
    /// overtake an earlier one of its key.
    async fn take_page(&mut self) -> Result<bool, End> {
        if let Some(fetched) = self.fetching.take() {
            match self.log_answered(fetched)? {
                Some(page) => self.fetched = Some((page, Seq::ZERO)),
                None => self.fetch_wanted = true,
            }
        }
        let probed = self.probe().await?;
        let Some((page, _)) = self.fetched.take_if(|(_, through)| Some(*through) >= self.lanes.unseen().last()) else {
            return Ok(probed);
        };
        let worked = !page.rows.is_empty();
        // A page that is not empty is followed at once; an empty one by the next nudge or poll.
        self.fetch_wanted |= worked;
        self.at_end = !worked;
        self.lanes.admit_page(page, now(), fastrand::f64());
        failpoint("after-fetch");
        self.plan_probe();
        Ok(worked || probed)
    }

    /// Gaps are looked at again soon, and ever less often while they stay.
    fn plan_probe(&mut self) {
        let first = self.lanes.unseen().first();
        self.gap_pause = match first {
            Some(_) if first == self.gap => (self.gap_pause * 2).min(GAP_PAUSE_MAX),
            _ => GAP_PAUSE_MIN,
        };
        self.gap = first;
        self.gap_due = first.map(|_| now() + self.gap_pause);
    }

    /// Looks at the places that were not visible when the page was fetched, as far as there is room for what they bring;
    /// answers whether that was anything.
    async fn probe(&mut self) -> Result<bool, End> {
        let Some(room) = self.lanes.room() else { return Ok(false) };
        let Some((_, through)) = &self.fetched else { return Ok(false) };
        let unseen = self.lanes.unseen().within(through.next(), Seq(u64::MAX));
        if unseen.is_empty() {
            return Ok(false);
        }
        let probed = self.log.probe(&unseen, room).await;
        let Some(mut probe) = self.log_answered(probed)? else { return Ok(true) };
        stamp(&mut probe.rows, &self.log_name);
        if let Some((_, through)) = &mut self.fetched {
            *through = probe.through;
        }
        self.lanes.admit_probe(probe, now(), fastrand::f64());
        failpoint("after-probe");
        Ok(true)
    }

    async fn read_held(&mut self, wanted: SeqSet) -> Result<(), End> {
        let limit = PageLimit { events: self.config.window_events, bytes: self.config.window_bytes };
        let read = self.log.read(self.reading.insert(wanted), limit).await;
        let Some(wanted) = self.reading.take() else { return Ok(()) };
        match self.log_answered(read)? {
            Some(mut read) => {
                stamp(&mut read.rows, &self.log_name);
                self.lanes.admit_read(&wanted, read, now(), fastrand::f64());
            }
            None => self.lanes.read_failed(&wanted, now()),
        }
        Ok(())
    }

    async fn operate(&mut self) -> Result<bool, End> {
        if self.log_due.is_some_and(|due| now() < due) {
            return Ok(false);
        }
        let read = self.operator.read(&*self.log, &mut self.lanes, now()).await;
        Ok(self.log_answered(read)?.unwrap_or(false))
    }

    // ---- Writing.

    /// Writes a checkpoint, set-aside events or a renewal of the lease, if one is due and none is under way.
    fn store_when_due(&mut self) -> bool {
        let at = now();
        if self.storing.is_busy() || self.store.is_some() || self.log_due.is_some_and(|due| at < due) {
            return false;
        }
        let operator = self.operator.take_change();
        let due = operator.is_some()
            || self.lanes.has_pending_set_aside()
            || self.unwritten() >= CHECKPOINT_EVENTS
            || (self.unwritten() > 0 && at >= self.checkpoint.1 + self.log.checkpoint_interval())
            || at >= self.clock.renewal_due();
        if due {
            self.start_store(operator.unwrap_or_default());
        }
        due
    }

    fn start_store(&mut self, operator: OperatorChange) {
        let set_aside = self.lanes.pending_set_aside().len().min(SET_ASIDE_MAX);
        let change = self.change(set_aside, &operator);
        let store = Store {
            sent: now(),
            durable: change.durable,
            set_aside,
            settled: self.lanes.settled() + set_aside as u64,
            operator,
        };
        let (log, lease) = (Arc::clone(&self.log), self.lease.clone());
        failpoint("before-checkpoint");
        self.store = Some(store);
        self.storing.start(async move { log.commit(&lease, &change).await });
    }

    fn change(&mut self, set_aside: usize, operator: &OperatorChange) -> Change {
        let (low, high, holes) = match self.lanes.checkpoint(set_aside) {
            (_, high, _) if mutant("checkpoint-ahead") => (high, high, SeqSet::new()),
            checkpoint => checkpoint,
        };
        let renewal = now() >= self.clock.renewal_due();
        let mut change = Change {
            low,
            high,
            high_id: self.lanes.high_id(),
            holes,
            position: self.position.clone(),
            blocked: self.lanes.blocked(),
            set_aside: self.lanes.pending_set_aside()[..set_aside].to_vec(),
            // What is settled by being set aside must be there; and a lease that nothing else extends.
            durable: set_aside > 0 || !operator.is_empty() || renewal,
            ..Change::default()
        };
        operator.write_to(&mut change);
        change
    }

    /// Takes what became of the last write.
    fn stored(&mut self) -> Result<bool, End> {
        let Some(result) = self.storing.take() else { return Ok(false) };
        let Some(store) = self.store.take() else { return Ok(false) };
        failpoint("after-checkpoint");
        match if mutant("lost-answer-believed") { Ok(()) } else { result } {
            Ok(()) => {
                if store.durable {
                    self.clock.renewed(store.sent)
                } else {
                    self.clock.renewed_soon(store.sent)
                }
                self.lanes.set_aside_committed(store.set_aside);
                self.operator.committed(store.operator);
                self.checkpoint = (store.settled, store.sent);
                self.log_is_back();
            }
            Err(error) => {
                self.operator.not_committed(store.operator);
                self.log_failed(error)?;
            }
        }
        Ok(true)
    }

    fn prune_when_due(&mut self) {
        let Some(retention) = self.config.retention else { return };
        if let Some(pruned) = self.pruning.take() {
            let more = pruned.inspect_err(janitor_failed).is_ok_and(|pruned| pruned.more);
            self.prune_due = Some(now() + if more { PRUNE_PAUSE_MIN } else { prune_pause(retention) });
        }
        if !self.pruning.is_busy() && self.prune_due.is_some_and(|due| due <= now()) {
            let (log, janitor) = (Arc::clone(&self.log), self.config.owner.clone());
            self.prune_due = None;
            self.pruning.start(async move { log.prune(&janitor, retention, PRUNE_ROWS_MAX).await });
        }
    }

    /// Removes what may be removed now, for a relay that does not stay.
    pub(super) async fn prune_once(&mut self) {
        let Some(retention) = self.config.retention else { return };
        loop {
            match self.log.prune(&self.config.owner, retention, PRUNE_ROWS_MAX).await {
                Ok(pruned) if pruned.more => {}
                Ok(_) => return,
                Err(error) => return janitor_failed(&error),
            }
        }
    }

    // ---- The end.

    /// Forgets what was read and not taken yet: it may be older than what is to be read now.
    pub(super) fn look_again(&mut self) {
        (self.fetching, self.fetched) = (Running::nothing(), None);
        (self.fetch_wanted, self.at_end) = (true, false);
    }

    /// Whether everything up to `target` needs nothing more, and operators ask for nothing.
    pub(super) fn has_caught_up(&mut self, target: Seq) -> bool {
        // Somebody may have removed the row at the target, or it was rolled back: then the end of the log is the goal.
        let target = if self.at_end { target.min(self.lanes.high()) } else { target };
        self.lanes.is_settled_to(target) && !self.lanes.has_pending_set_aside() && self.operator.is_idle()
    }

    /// Waits for what is under way, writes where the relay stands, and frees the lease; gives up at the deadline.
    pub(super) async fn drain(&mut self) {
        let deadline = tokio::time::Instant::now() + self.config.drain;
        if tokio::time::timeout_at(deadline, self.settle_and_release()).await.is_err() {
            tracing::warn!("not everything under way was confirmed in time: some events may be published again");
        }
    }

    async fn settle_and_release(&mut self) {
        poll_fn(|context| {
            while self.poll(context) {}
            let busy = self.handing.is_some() || !self.confirmations.is_empty() || self.operator.has_in_flight();
            if busy { Poll::Pending } else { Poll::Ready(()) }
        })
        .await;
        self.close_writer().await;
        poll_fn(|context| {
            self.storing.poll(context);
            if self.store.is_some() && !self.storing.is_ready() { Poll::Pending } else { Poll::Ready(()) }
        })
        .await;
        if let Err(end) = self.stored() {
            return tracing::debug!(?end, "another owner came before the last checkpoint");
        }
        failpoint("in-drain");
        let operator = self.operator.take_change().unwrap_or_default();
        let set_aside = self.lanes.pending_set_aside().len();
        let change = Change { durable: true, ..self.change(set_aside, &operator) };
        match self.log.commit(&self.lease, &change).await {
            Ok(()) => self.lanes.set_aside_committed(set_aside),
            Err(error) => tracing::warn!(%error, "the last checkpoint failed: some events may be published again"),
        }
        self.release().await;
    }

    /// Gives the lease back, so that the next owner need not wait for its end.
    pub(super) async fn release(&mut self) {
        failpoint("before-release");
        if let Err(error) = self.log.release(&self.lease).await {
            tracing::debug!(%error, "the lease could not be given back: it runs out");
        }
    }

    // ---- The log's failures.

    /// What the log answered, or `None` if it may answer later.
    fn log_answered<T>(&mut self, answer: Result<T, LogError>) -> Result<Option<T>, End> {
        match answer {
            Ok(value) => {
                self.log_is_back();
                Ok(Some(value))
            }
            Err(error) => self.log_failed(error).map(|()| None),
        }
    }

    fn log_is_back(&mut self) {
        self.log_failures = 0;
        self.log_due = None;
    }

    fn log_failed(&mut self, error: LogError) -> Result<(), End> {
        match error.kind() {
            LogErrorKind::Fenced => return Err(End::Fenced { by: None }),
            kind if !kind.may_heal() => return Err(End::Failed(error.into())),
            _ => {}
        }
        self.log_failures += 1;
        if self.log_failures == 1 {
            (self.tell)(&RelayEvent::LogAway { error: error.to_string() });
        }
        self.log_due = Some(now() + self.config.retry.backoff(self.log_failures, fastrand::f64()));
        Ok(())
    }
}

/// Rows that are settled stay; what will not mend by itself must be seen.
fn janitor_failed(error: &LogError) {
    match error.kind().may_heal() {
        true => tracing::warn!(%error, "settled rows could not be removed now"),
        false => tracing::error!(%error, "settled rows cannot be removed: grant it, or set retention to never"),
    }
}

/// Writes log and place on each event, by which consumers and operators find it again.
fn stamp(rows: &mut [Row], log: &Text) {
    for row in rows {
        if let Ok(event) = &mut row.event {
            event.stamp(log, row.seq);
        }
    }
}

fn prune_pause(retention: Duration) -> Duration {
    (retention / 4).clamp(Duration::from_secs(1), PRUNE_PAUSE_MAX)
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
