//! [`Delivery`]: one arrival of an event, settled at most once.

use std::{fmt, sync::Arc};

use tokio::sync::watch;

use crate::Event;

/// Redeliveries without progress from which on a delivery is suspected of ending the process that handles it.
const SUSPECT_AFTER_REDELIVERIES: u32 = 3;

/// One arrival of an event at a member of a group.
///
/// Settling consumes it, so it happens at most once; dropping it unsettled releases it. Settling costs no round trip:
/// the bus collects settlements and [`Subscription::close`](crate::Subscription::close) flushes them.
pub struct Delivery {
    event: Event,
    attempt: u32,
    suspect: bool,
    partition: u32,
    ownership: Ownership,
    token: u64,
    settler: Option<Arc<dyn Settle>>,
}

/// Where a bus takes the settlements of its deliveries.
pub trait Settle: fmt::Debug + Send + Sync {
    /// Takes one settlement. Called at most once per delivery; must not block.
    fn settle(&self, settled: Settled);
}

/// A delivery that was settled, as its bus gets it back.
#[derive(Debug)]
pub struct Settled {
    /// What the bus named the delivery by.
    pub token: u64,
    /// The event.
    pub event: Event,
    /// The delivery's attempt.
    pub attempt: u32,
    /// What was decided.
    pub settlement: Settlement,
}

/// The one decision owed for a delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settlement {
    /// Done with.
    Ack,
    /// Not handled: it comes again.
    Release,
    /// Given up: kept aside with its reason.
    DeadLetter(DeadReason),
}

/// Why an event was given up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadReason {
    /// The kind of reason.
    pub cause: DeadCause,
    /// The last error, for people.
    pub error: String,
    /// How often a handler was called.
    pub attempts: u32,
}

/// The kind of reason for which an event was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeadCause {
    /// Its attempts are spent.
    Attempts,
    /// The handler said that no further attempt can succeed.
    Permanent,
    /// Its data is not what its type says.
    Undecodable,
    /// No handler takes its type, and the consumer was told to keep such events.
    Unknown,
    /// The broker's message cannot be read as an event.
    Malformed,
    /// Process after process ended while handling it.
    Killed,
}

impl DeadCause {
    /// The cause as `deadreason` has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Attempts => "attempts",
            Self::Permanent => "permanent",
            Self::Undecodable => "undecodable",
            Self::Unknown => "unknown",
            Self::Malformed => "malformed",
            Self::Killed => "killed",
        }
    }
}

impl Delivery {
    /// A delivery of `event`, which `settler` knows as `token`.
    ///
    /// `attempt` is one more than the attempts recorded for it; `redeliveries` is how often the broker has handed out
    /// its partition's head since it last moved.
    pub fn new(
        event: Event,
        attempt: u32,
        redeliveries: u32,
        partition: u32,
        ownership: Ownership,
        token: u64,
        settler: Arc<dyn Settle>,
    ) -> Self {
        let suspect = redeliveries >= SUSPECT_AFTER_REDELIVERIES;
        Self { event, attempt, suspect, partition, ownership, token, settler: Some(settler) }
    }

    /// The event.
    pub fn event(&self) -> &Event {
        &self.event
    }

    /// Which call of a handler this would be, from 1.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// The partition the event came from.
    pub fn partition(&self) -> u32 {
        self.partition
    }

    /// Whether its partition was handed out again and again without progress, as happens when an event ends the process
    /// that handles it. Suspects are handled one at a time, each attempt recorded before.
    pub fn suspect(&self) -> bool {
        self.suspect
    }

    /// This member's hold on the partition.
    pub fn ownership(&self) -> &Ownership {
        &self.ownership
    }

    /// Completes when the partition has left this member; settling does nothing then.
    pub async fn lost(&self) {
        self.ownership.lost().await;
    }

    /// What the bus named the delivery by.
    pub fn token(&self) -> u64 {
        self.token
    }

    /// The event was handled.
    pub fn ack(mut self) {
        self.settle(Settlement::Ack);
    }

    /// The event was not handled: it comes again, after at least 100 ms, before any undelivered event of its key.
    pub fn release(mut self) {
        self.settle(Settlement::Release);
    }

    /// The event is given up. It is acknowledged only once the broker has confirmed the copy that keeps it.
    pub fn dead_letter(mut self, reason: DeadReason) {
        self.settle(Settlement::DeadLetter(reason));
    }

    fn settle(&mut self, settlement: Settlement) {
        if let Some(settler) = self.settler.take() {
            settler.settle(Settled { token: self.token, event: self.event.clone(), attempt: self.attempt, settlement });
        }
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        self.settle(Settlement::Release);
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery")
            .field("event", &self.event)
            .field("attempt", &self.attempt)
            .field("suspect", &self.suspect)
            .field("partition", &self.partition)
            .field("settled", &self.settler.is_none())
            .finish_non_exhaustive()
    }
}

/// A member's hold on one partition: owned, then draining while its last deliveries are settled, then lost.
///
/// Clones share it. Each hold has one of its own; what is lost stays lost.
#[derive(Clone, Debug)]
pub struct Ownership(Arc<watch::Sender<Phase>>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Owned,
    Draining,
    Lost,
}

impl Ownership {
    /// A partition that was just taken.
    pub fn new() -> Self {
        Self(Arc::new(watch::Sender::new(Phase::Owned)))
    }

    /// The partition should move on: nothing more of it is delivered.
    pub fn drain(&self) {
        self.advance(Phase::Draining);
    }

    /// The partition need not move on any more: it stays, and more of it is delivered.
    pub fn keep(&self) {
        self.0.send_if_modified(|phase| {
            let draining = *phase == Phase::Draining;
            if draining {
                *phase = Phase::Owned;
            }
            draining
        });
    }

    /// The partition has moved on: settlements do nothing any more.
    pub fn lose(&self) {
        self.advance(Phase::Lost);
    }

    /// Whether it need not move on.
    pub fn is_owned(&self) -> bool {
        *self.0.borrow() == Phase::Owned
    }

    /// Whether the partition has moved on.
    pub fn is_lost(&self) -> bool {
        *self.0.borrow() == Phase::Lost
    }

    /// Completes when the partition should move on.
    pub async fn draining(&self) {
        self.reached(Phase::Draining).await;
    }

    /// Completes when the partition has moved on.
    pub async fn lost(&self) {
        self.reached(Phase::Lost).await;
    }

    /// Whether both are the same hold.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    fn advance(&self, to: Phase) {
        self.0.send_if_modified(|phase| {
            let forward = *phase < to;
            if forward {
                *phase = to;
            }
            forward
        });
    }

    async fn reached(&self, phase: Phase) {
        // The sender lives as long as `self`, so waiting cannot fail.
        let _ = self.0.subscribe().wait_for(|now| *now >= phase).await;
    }
}

impl Default for Ownership {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Debug, Default)]
    struct Log(Mutex<Vec<Settlement>>);

    impl Settle for Log {
        fn settle(&self, settled: Settled) {
            self.0.lock().unwrap().push(settled.settlement);
        }
    }

    #[test]
    fn is_settled_once_and_released_when_dropped() {
        let log = Arc::new(Log::default());
        let delivery = |redeliveries| {
            let event = Event::builder("orders", "order.placed").build().unwrap();
            Delivery::new(event, 1, redeliveries, 0, Ownership::new(), 7, log.clone())
        };
        delivery(0).ack();
        drop(delivery(0));
        delivery(0).release();
        assert_eq!(*log.0.lock().unwrap(), [Settlement::Ack, Settlement::Release, Settlement::Release]);
        assert!(!delivery(2).suspect() && delivery(3).suspect());
    }

    #[tokio::test]
    async fn what_drains_can_stay_and_what_is_lost_stays_lost() {
        let ownership = Ownership::new();
        ownership.drain();
        ownership.draining().await;
        ownership.keep();
        assert!(ownership.is_owned());
        ownership.lose();
        ownership.drain();
        ownership.keep();
        ownership.draining().await;
        ownership.lost().await;
        assert!(ownership.is_lost());
    }
}
