//! A member of a group on the in-memory bus.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::{sync::watch, time::sleep_until};

use super::{
    InMemoryBus, Shared,
    state::{HoldId, Membership},
};
use crate::{BusError, Delivery, ErrorKind, Settle, Settled, SubscribeRequest, Subscription, Timestamp, now};

#[derive(Debug)]
pub(super) struct MemorySubscription {
    bus: InMemoryBus,
    membership: Membership,
    changed: watch::Receiver<()>,
    /// Where the next round over the partitions begins, so that none is served first for ever.
    first: usize,
    left: bool,
}

impl MemorySubscription {
    pub(super) fn join(bus: InMemoryBus, request: SubscribeRequest) -> Result<Self, BusError> {
        if bus.is_closed() {
            return Err(BusError::closed());
        }
        let mut state = bus.shared.lock();
        let (topic, member) = state.join(&request.topic, &request.group, request.from, request.member);
        let membership = Membership {
            topic,
            member,
            group: request.group,
            window_events: request.window_events,
            window_bytes: request.window_bytes,
            drain: request.drain,
        };
        let changed = state.changes(topic);
        drop(state);
        Ok(Self { bus, membership, changed, first: 0, left: false })
    }

    fn take(&mut self, max: usize) -> Vec<Delivery> {
        self.first = self.first.wrapping_add(1);
        let taken = self.bus.shared.lock().take(&self.membership, now(), max, self.first);
        let mut settlers: Vec<Arc<Settler>> = Vec::new();
        let mut deliveries = Vec::with_capacity(taken.len());
        for (hold, item, redeliveries) in taken {
            let (partition, ownership) = (hold.partition, hold.ownership.clone());
            let known = settlers.last().filter(|settler| settler.hold.partition == partition).cloned();
            let settler = known.unwrap_or_else(|| {
                let settler = Arc::new(Settler { shared: Arc::clone(&self.bus.shared), hold });
                settlers.push(Arc::clone(&settler));
                settler
            });
            let (attempt, position) = (item.attempt, item.position);
            deliveries.push(Delivery::new(item.event, attempt, redeliveries, partition, ownership, position, settler));
        }
        deliveries
    }

    fn leave(&mut self) {
        if !std::mem::replace(&mut self.left, true) {
            self.bus.shared.lock().leave(&self.membership);
        }
    }
}

#[async_trait]
impl Subscription for MemorySubscription {
    async fn next_batch(&mut self, max: usize) -> Result<Vec<Delivery>, BusError> {
        loop {
            if self.left || self.bus.is_closed() {
                self.leave();
                return Err(BusError::new(ErrorKind::Closed, "the subscription is closed"));
            }
            self.changed.mark_unchanged();
            let taken = self.take(max.max(1));
            if !taken.is_empty() {
                return Ok(taken);
            }
            let due = self.bus.shared.lock().next_due(&self.membership);
            let timer = async {
                match due {
                    Some(due) => sleep_until(due.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = self.changed.changed() => {}
                () = self.bus.until_closed() => {}
                () = timer => {}
            }
        }
    }

    async fn record_attempt(&mut self, delivery: &Delivery) -> Result<(), BusError> {
        let recorded = self.bus.shared.lock().record_attempt(&self.membership, delivery);
        recorded.then_some(()).ok_or_else(|| BusError::new(ErrorKind::Closed, "the partition has moved on"))
    }

    async fn close(&mut self) -> Result<(), BusError> {
        self.leave();
        Ok(())
    }
}

/// Dropped without being closed, as in a crash: the partitions are free at once.
impl Drop for MemorySubscription {
    fn drop(&mut self) {
        self.leave();
    }
}

/// Takes the settlements of one partition under one hold.
struct Settler {
    shared: Arc<Shared>,
    hold: HoldId,
}

impl Settle for Settler {
    fn settle(&self, settled: Settled) {
        self.shared.lock().settle(&self.hold, settled, now(), Timestamp::now());
        self.shared.room.notify_waiters();
    }
}

impl std::fmt::Debug for Settler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Settler").field(&self.hold).finish()
    }
}
