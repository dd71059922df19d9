//! [`Relay`]: publishes a log to a bus.

mod lease;
mod operator;
mod session;
mod task;

use std::{fmt, pin::pin, sync::Arc, time::Duration};

use bus_core::{BusError, Capabilities, ErrorKind, EventBus, OrderOnFailure, RetryPolicy, failpoint, host_name};
use tokio::time::{Instant, sleep};

use crate::{
    Acquire, Acquisition, Counts, LogError, LogErrorKind, LogSource, OnFailure, Owned, Start, TopicPattern, Wake,
};
use session::{End, Session};

/// Shortest lease that leaves time to renew it.
pub const LEASE_MIN: Duration = Duration::from_millis(200);
/// Longest lease, poll interval, drain and back-off: far above what makes sense, far below where clocks overflow.
pub const SPAN_MAX: Duration = Duration::from_secs(24 * 3_600);
/// Longest pause between two tries of a standby to become the owner: after an orderly stop events wait no longer. A try is
/// one look at one row.
const STANDBY_PAUSE_MAX: Duration = Duration::from_millis(100);

/// Settings of a relay.
#[derive(Clone, Debug, PartialEq)]
pub struct RelayConfig {
    /// The topics it takes; others are nothing to this sink. Default: all.
    pub topics: Vec<TopicPattern>,
    /// Where a sink begins that does not exist yet. Default: with the oldest event.
    pub start: Start,
    /// What becomes of an event whose attempts are spent. Default: it is parked with its key.
    pub on_failure: OnFailure,
    /// How often a refused event is tried, and how long to wait between, also for a broker that is away.
    pub retry: RetryPolicy,
    /// Most events read and not settled, held ones not counted. Default 8,192.
    pub window_events: usize,
    /// Most bytes of them. Default 32 MiB.
    pub window_bytes: usize,
    /// How long others wait after this relay has died. Default 5 s.
    pub lease: Duration,
    /// Longest wait before the log is looked at unasked. Default 1 s.
    pub poll_interval: Duration,
    /// How long rows stay after every sink has settled them; `None` keeps them for ever. Default 1 h.
    pub retention: Option<Duration>,
    /// How long events that are under way are waited for at shutdown. Default 10 s.
    pub drain: Duration,
    /// Who the owner is, for people. Default: host and process id.
    pub owner: String,
    /// What the bus is called, for people. Never a secret.
    pub bus_name: String,
    /// Accept a bus that forgets what it confirmed when its process ends.
    pub allow_volatile: bool,
}

impl Default for RelayConfig {
    fn default() -> Self {
        Self {
            topics: vec![TopicPattern::any()],
            start: Start::default(),
            on_failure: OnFailure::default(),
            retry: RetryPolicy::default(),
            window_events: 8_192,
            window_bytes: 32 << 20,
            lease: Duration::from_secs(5),
            poll_interval: Duration::from_secs(1),
            retention: Some(Duration::from_secs(3_600)),
            drain: Duration::from_secs(10),
            owner: format!("{}:{}", host_name(), std::process::id()),
            bus_name: String::new(),
            allow_volatile: false,
        }
    }
}

impl RelayConfig {
    /// Refuses settings that cannot work.
    ///
    /// # Errors
    ///
    /// The field, what was found, and what would be right. The message begins with the field's name in backticks.
    pub fn validate(&self) -> Result<(), RelayError> {
        let retry = &self.retry;
        if self.topics.is_empty() {
            let message = "`topics` must name at least one pattern; \"*\" takes every topic";
            return Err(RelayError::Config(message.to_owned()));
        }
        at_least_one("window_events", self.window_events)?;
        at_least_one("window_bytes", self.window_bytes)?;
        at_least_one("attempts", retry.attempts as usize)?;
        within("lease", self.lease, LEASE_MIN, SPAN_MAX)?;
        within("poll_interval", self.poll_interval, Duration::from_millis(1), SPAN_MAX)?;
        within("drain", self.drain, Duration::ZERO, SPAN_MAX)?;
        within("backoff_max", retry.backoff_max, Duration::ZERO, SPAN_MAX)?;
        within("backoff_min", retry.backoff_min, Duration::ZERO, retry.backoff_max)
    }
}

fn at_least_one(field: &str, found: usize) -> Result<(), RelayError> {
    match found {
        0 => Err(RelayError::Config(format!("`{field}` is 0 and must be at least 1"))),
        _ => Ok(()),
    }
}

fn within(field: &str, found: Duration, min: Duration, max: Duration) -> Result<(), RelayError> {
    if (min..=max).contains(&found) {
        return Ok(());
    }
    Err(RelayError::Config(format!("`{field}` is {found:?} and must be from {min:?} to {max:?}")))
}

/// Why a relay ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RelayError {
    /// Its settings cannot work.
    #[error("{0}")]
    Config(String),
    /// The bus cannot be published to, and waiting will not mend that.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The log cannot be read, and waiting will not mend that.
    #[error(transparent)]
    Log(#[from] LogError),
    /// An event was refused for good, and the sink is told to halt then.
    #[error("halted at event {seq} of the log: {error}")]
    Halted {
        /// Its place.
        seq: bus_core::Seq,
        /// Why it was refused.
        error: String,
    },
    /// Another owner kept the lease for longer than it lasts.
    #[error("another relay owns this sink: {owner}")]
    Owned {
        /// Who.
        owner: String,
    },
}

/// What happens in a relay, for logs and terminals.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RelayEvent {
    /// Another owner has the log; this relay waits for its end.
    Standby {
        /// Who.
        owner: String,
    },
    /// This relay owns the log now.
    Owner {
        /// Its number.
        epoch: u64,
        /// What the last owner published to, if that was something else.
        previous_bus: Option<String>,
    },
    /// The bus does not take events; the relay tries again.
    BusAway {
        /// Why.
        error: String,
    },
    /// The bus takes events again.
    BusBack,
    /// The log cannot be read or written; the relay tries again.
    LogAway {
        /// Why.
        error: String,
    },
    /// So much is done by now.
    Progress(Counts),
}

/// What a relay did until it ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RelaySummary {
    /// Events that need nothing more: published, set aside, or not for this sink.
    pub events: u64,
    /// What became of them.
    pub counts: Counts,
}

/// What one turn did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Another owner has the log.
    Standby {
        /// Who.
        owner: String,
        /// How long its lease still lasts unless it is extended.
        remaining: Duration,
    },
    /// Something was done; another turn may do more at once.
    Worked,
    /// There is nothing to do now.
    Idle,
}

/// Publishes a log to a bus: every committed event, each key in order, whatever fails in between.
///
/// Several relays may run for one log and sink; one of them owns it, the others stand by.
///
/// # Examples
///
/// See the crate's page.
pub struct Relay {
    log: Arc<dyn LogSource>,
    bus: Arc<dyn EventBus>,
    config: Arc<RelayConfig>,
    wake: Wake,
    observer: Option<Observer>,
    session: Option<Session>,
    /// What the next acquisition asks for: an epoch above the broker's, another incarnation.
    epoch_min: u64,
    new_incarnation: bool,
    /// Why the log could not be taken last, as it was told.
    away: Option<String>,
    done: RelaySummary,
}

type Observer = Arc<dyn Fn(&RelayEvent) + Send + Sync>;

/// When [`Relay::run_until`] is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Until {
    Shutdown,
    /// Everything committed before the start is settled.
    CaughtUp,
}

impl Relay {
    /// A relay of `log` to `bus`.
    ///
    /// # Errors
    ///
    /// [`RelayError::Config`] for settings that cannot work, and for a bus that forgets what it confirmed when its process
    /// ends, unless [`allow_volatile`](RelayConfig::allow_volatile) is set.
    pub fn new(log: Arc<dyn LogSource>, bus: Arc<dyn EventBus>, config: RelayConfig) -> Result<Self, RelayError> {
        config.validate()?;
        if !bus.capabilities().persistent && !config.allow_volatile {
            let message = "this bus loses confirmed events when its process ends: choose a persistent one, or set `allow_volatile`";
            return Err(RelayError::Config(message.to_owned()));
        }
        Ok(Self {
            log,
            bus,
            config: Arc::new(config),
            wake: Wake::new(),
            observer: None,
            session: None,
            epoch_min: 0,
            new_incarnation: false,
            away: None,
            done: RelaySummary::default(),
        })
    }

    /// Listens to the nudges of an [`Outbox`](crate::Outbox) in this process.
    pub fn wake(mut self, wake: &Wake) -> Self {
        self.wake = wake.clone();
        self
    }

    /// Tells `observer` what happens. It must not block.
    pub fn observe(mut self, observer: impl Fn(&RelayEvent) + Send + Sync + 'static) -> Self {
        self.observer = Some(Arc::new(observer));
        self
    }

    /// What was done so far.
    pub fn summary(&self) -> RelaySummary {
        let mut summary = self.done;
        if let Some(session) = &self.session {
            summary.add(session.summary());
        }
        summary
    }

    /// One pass: becomes the owner if nobody is, and does what can be done without waiting.
    ///
    /// # Errors
    ///
    /// What waiting will not mend. An outage is no error.
    ///
    /// # Cancel safety
    ///
    /// A dropped call loses nothing: another turn goes on where it was.
    pub async fn turn(&mut self) -> Result<Progress, RelayError> {
        if self.session.is_none()
            && let Some(standby) = self.acquire().await?
        {
            return Ok(standby);
        }
        let Some(session) = &mut self.session else { return Ok(Progress::Idle) };
        match session.turn().await {
            Ok(true) => Ok(Progress::Worked),
            Ok(false) => Ok(Progress::Idle),
            Err(end) => self.ended(end).await.map(|()| Progress::Worked),
        }
    }

    /// Relays until `shutdown` completes; then waits for what is under way, writes where it stands, and frees the lease.
    ///
    /// # Errors
    ///
    /// What waiting will not mend: wrong tables, a bus that is closed, an event at which the sink is told to halt. A
    /// broker or database that is away is waited for.
    ///
    /// # Cancel safety
    ///
    /// Dropping it is a crash: another relay goes on once the lease is over, and may publish some events again.
    pub async fn run(&mut self, shutdown: impl Future<Output = ()>) -> Result<RelaySummary, RelayError> {
        self.run_until(Until::Shutdown, shutdown).await
    }

    /// Relays until everything that was committed when it began is settled, or `shutdown` completes.
    ///
    /// # Errors
    ///
    /// As [`run`](Relay::run); [`RelayError::Owned`] if another owner keeps the lease for longer than it lasts.
    pub async fn run_once(&mut self, shutdown: impl Future<Output = ()>) -> Result<RelaySummary, RelayError> {
        self.run_until(Until::CaughtUp, shutdown).await
    }

    async fn run_until(
        &mut self,
        until: Until,
        shutdown: impl Future<Output = ()>,
    ) -> Result<RelaySummary, RelayError> {
        let mut shutdown = pin!(shutdown);
        let ended = tokio::select! {
            biased;
            () = &mut shutdown => Ok(()),
            ended = self.work(until) => ended,
        };
        if let Some(mut session) = self.session.take() {
            session.drain().await;
            self.done.add(session.summary());
            if until == Until::CaughtUp && ended.is_ok() {
                session.prune_once().await;
            }
        }
        ended.map(|()| self.done)
    }

    async fn work(&mut self, until: Until) -> Result<(), RelayError> {
        let target = match until {
            Until::Shutdown => None,
            Until::CaughtUp => {
                let target = self.last_seq().await?;
                if let Some(session) = &mut self.session {
                    session.look_again();
                }
                Some(target)
            }
        };
        let started = Instant::now();
        loop {
            match self.turn().await? {
                Progress::Standby { owner, remaining } => {
                    // It had all its time, and somebody still extends it.
                    if until == Until::CaughtUp && started.elapsed() > self.config.lease * 2 {
                        return Err(RelayError::Owned { owner });
                    }
                    sleep(remaining.clamp(Duration::from_millis(20), STANDBY_PAUSE_MAX)).await;
                }
                Progress::Worked => tokio::task::yield_now().await,
                Progress::Idle => {
                    let Some(session) = &mut self.session else { continue };
                    if target.is_some_and(|target| session.has_caught_up(target)) {
                        return Ok(());
                    }
                    session.wait().await;
                }
            }
        }
    }

    async fn last_seq(&mut self) -> Result<bus_core::Seq, RelayError> {
        loop {
            match self.log.last_seq().await {
                Ok(seq) => return Ok(seq),
                Err(error) => self.log_away(error).await?,
            }
        }
    }

    /// Tries to become the owner; answers who is, if somebody else is.
    async fn acquire(&mut self) -> Result<Option<Progress>, RelayError> {
        let sent = Instant::now().into_std();
        let request = Acquire {
            owner: self.config.owner.clone(),
            ttl: self.config.lease,
            epoch_min: self.epoch_min,
            start: self.config.start,
            topics: self.config.topics.clone(),
            bus: self.config.bus_name.clone(),
            new_incarnation: self.new_incarnation,
        };
        let answer = self.log.acquire(&request).await;
        self.away = self.away.take().filter(|_| answer.is_err());
        match answer {
            Ok(Acquisition::Owned(owned)) => {
                failpoint("after-acquire");
                self.new_incarnation = false;
                self.tell(RelayEvent::Owner { epoch: owned.lease.epoch, previous_bus: owned.previous_bus.clone() });
                self.session = Some(self.open_session(*owned, sent));
                Ok(None)
            }
            Ok(Acquisition::Standby { owner, remaining }) => {
                self.tell(RelayEvent::Standby { owner: owner.clone() });
                Ok(Some(Progress::Standby { owner, remaining }))
            }
            Err(error) => {
                self.log_away(error).await?;
                Ok(None)
            }
        }
    }

    fn open_session(&self, owned: Owned, sent: std::time::Instant) -> Session {
        let tell: Observer = self.observer.clone().unwrap_or_else(|| Arc::new(|_| {}));
        Session::new(
            Arc::clone(&self.log),
            Arc::clone(&self.bus),
            Arc::clone(&self.config),
            owned,
            sent,
            &self.wake,
            tell,
        )
    }

    /// A session is over: what follows from that. One that failed stays, to be drained.
    async fn ended(&mut self, end: End) -> Result<(), RelayError> {
        let keeps_lease = match end {
            End::Failed(error) => return Err(error),
            End::Fenced { by: None } => false,
            End::Fenced { by: Some(epoch) } => {
                self.epoch_min = self.epoch_min.max(epoch + 1);
                true
            }
            End::OtherHistory => {
                self.new_incarnation = true;
                true
            }
        };
        if let Some(mut session) = self.session.take() {
            self.done.add(session.summary());
            session.close_writer().await;
            // The lease is still ours: it is given back, to be taken again with what was learnt.
            if keeps_lease {
                session.release().await;
            }
        }
        Ok(())
    }

    /// Waits a little for a log that may heal; passes on what will not.
    async fn log_away(&mut self, error: LogError) -> Result<(), RelayError> {
        if !error.kind().may_heal() {
            return Err(error.into());
        }
        let says = error.to_string();
        // Said once, however often it is tried again.
        if error.kind() == LogErrorKind::Unavailable && self.away.as_ref() != Some(&says) {
            self.tell(RelayEvent::LogAway { error: says.clone() });
            self.away = Some(says);
        }
        sleep(self.config.retry.backoff(2, fastrand::f64())).await;
        Ok(())
    }

    fn tell(&self, event: RelayEvent) {
        if let Some(observer) = &self.observer {
            observer(&event);
        }
    }
}

impl RelaySummary {
    /// Adds what another relay, or another time of this one, did.
    pub fn add(&mut self, other: Self) {
        self.events += other.events;
        self.counts.published += other.counts.published;
        self.counts.duplicates += other.counts.duplicates;
        self.counts.failed += other.counts.failed;
        self.counts.parked += other.counts.parked;
        self.counts.dead += other.counts.dead;
    }
}

impl fmt::Debug for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Relay")
            .field("log", &self.log)
            .field("owns", &self.session.is_some())
            .field("done", &self.done)
            .finish_non_exhaustive()
    }
}

/// Whether a bus that answered with this error will never take events.
fn is_final(error: &BusError) -> bool {
    matches!(error.kind(), ErrorKind::Closed | ErrorKind::Invalid | ErrorKind::TooLarge)
}

/// How many events of a key an operator's retry may have under way.
fn retry_chunk(capabilities: Capabilities) -> usize {
    match capabilities.order_on_failure {
        OrderOnFailure::FailStop => 64,
        OrderOnFailure::Independent => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each of them would overflow a clock in the middle of a run.
    #[test]
    fn spans_have_limits_and_say_which() {
        let config = RelayConfig::default;
        let retry = config().retry;
        let day = Duration::from_secs(86_400);
        let backoff = |backoff_min, backoff_max| RelayConfig {
            retry: RetryPolicy { backoff_min, backoff_max, ..retry },
            ..config()
        };
        for (wrong, named) in [
            (RelayConfig { lease: Duration::MAX, ..config() }, "`lease` is 18446744073709551615.999999999s"),
            (RelayConfig { lease: Duration::ZERO, ..config() }, "`lease` is 0ns and must be from 200ms to 86400s"),
            (RelayConfig { poll_interval: day + LEASE_MIN, ..config() }, "`poll_interval`"),
            (RelayConfig { poll_interval: Duration::ZERO, ..config() }, "`poll_interval`"),
            (RelayConfig { drain: Duration::MAX, ..config() }, "`drain`"),
            (backoff(retry.backoff_min, Duration::MAX), "`backoff_max`"),
            (backoff(Duration::MAX, Duration::MAX), "`backoff_max`"),
            (backoff(day, LEASE_MIN), "`backoff_min` is 86400s and must be from 0ns to 200ms"),
            (RelayConfig { window_bytes: 0, ..config() }, "`window_bytes` is 0 and"),
            (RelayConfig { retry: RetryPolicy { attempts: 0, ..retry }, ..config() }, "`attempts` is 0 and"),
        ] {
            let error = wrong.validate().unwrap_err().to_string();
            assert!(error.starts_with(named), "{error}");
        }
        RelayConfig { lease: day, poll_interval: day, drain: day, ..backoff(day, day) }.validate().unwrap();
        RelayConfig { retention: Some(Duration::MAX), ..backoff(Duration::ZERO, Duration::ZERO) }.validate().unwrap();
    }
}
