//! Broken subscriptions and deliveries.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use bus_core::{
    BusError, Delivery, EventBus, EventBusExt, Group, InMemoryBus, Settle, Settled, Settlement, SubscribeFrom,
    SubscribeRequest, Subscription,
};

use super::{Broker, Sabotage, Saboteur};

pub(super) async fn subscribe(
    saboteur: &Saboteur,
    request: SubscribeRequest,
) -> Result<Box<dyn Subscription>, BusError> {
    let mut request = request;
    let first = {
        let mut notes = saboteur.broker.notes.lock().expect("not poisoned");
        notes.members += 1;
        notes.members == 1
    };
    match saboteur.how {
        Sabotage::IgnoresTheGroup => request.group = Group::new("everyone").expect("a group"),
        Sabotage::HasTwoOwners => {
            let unique = format!("{}-{}", request.group, bus_core::LogId::random());
            request.group = Group::new(unique).expect("a group");
        }
        // Only the first member is a real one.
        Sabotage::NeverRebalances if !first => request.group = Group::new("idle").expect("a group"),
        Sabotage::StartsAtLatest => request.from = SubscribeFrom::Latest,
        Sabotage::ReplaysToLatest => request.from = SubscribeFrom::Earliest,
        Sabotage::StartsGroupsAnew if request.from == SubscribeFrom::Latest => {
            request.group = Group::new(format!("{}-{}", request.group, bus_core::LogId::random())).expect("a group");
        }
        Sabotage::IgnoresTheWindow => request.window_events = 1_000,
        Sabotage::ForgetsAcks => request.drain = Duration::ZERO,
        _ => {}
    }
    let inner = saboteur.client.subscribe(request).await?;
    let hands = Arc::new(Hands {
        how: saboteur.how,
        broker: saboteur.broker.clone(),
        client: saboteur.client.clone(),
        held: Mutex::default(),
    });
    Ok(Box::new(BrokenSubscription { how: saboteur.how, inner: Some(inner), hands }))
}

#[derive(Debug)]
struct BrokenSubscription {
    how: Sabotage,
    inner: Option<Box<dyn Subscription>>,
    hands: Arc<Hands>,
}

/// The inner deliveries that were handed out, by a token of ours.
#[derive(Debug)]
struct Hands {
    how: Sabotage,
    broker: Broker,
    client: InMemoryBus,
    held: Mutex<BTreeMap<u64, Delivery>>,
}

impl BrokenSubscription {
    fn wrap(&self, delivery: Delivery) -> Delivery {
        let mut held = self.hands.held.lock().expect("not poisoned");
        // Partition and position order the tokens, so that "everything before" can be told.
        let token = (u64::from(delivery.partition()) << 40) | delivery.token();
        let redeliveries = if delivery.suspect() && self.how != Sabotage::SuspectsNobody { 3 } else { 0 };
        let partition = match self.how {
            Sabotage::HashesDifferently => (delivery.partition() + 1) % 8,
            _ => delivery.partition(),
        };
        let (event, attempt, ownership) = (delivery.event().clone(), delivery.attempt(), delivery.ownership().clone());
        held.insert(token, delivery);
        Delivery::new(
            event,
            attempt,
            redeliveries,
            partition,
            ownership,
            token,
            Arc::clone(&self.hands) as Arc<dyn Settle>,
        )
    }

    fn drop_all(&mut self, settle: impl Fn(Delivery)) {
        let held = std::mem::take(&mut *self.hands.held.lock().expect("not poisoned"));
        held.into_values().for_each(settle);
    }

    fn acked_late(&self, delivery: &Delivery) -> bool {
        self.hands.broker.notes.lock().expect("not poisoned").acked_late.contains(delivery.event().id())
    }
}

impl Settle for Hands {
    fn settle(&self, settled: Settled) {
        let mut held = self.held.lock().expect("not poisoned");
        if matches!(self.how, Sabotage::CommitsPastUnsettled) && settled.settlement == Settlement::Ack {
            let later = held.split_off(&(settled.token + 1));
            let upto = std::mem::replace(&mut *held, later);
            return upto.into_values().for_each(Delivery::ack);
        }
        let Some(delivery) = held.remove(&settled.token) else { return };
        drop(held);
        if self.how == Sabotage::HonoursLateAcks && delivery.ownership().is_lost() {
            self.broker.notes.lock().expect("not poisoned").acked_late.insert(settled.event.id().to_owned());
        }
        match settled.settlement {
            Settlement::Ack if self.how == Sabotage::ForgetsAcks => delivery.release(),
            Settlement::Ack => delivery.ack(),
            Settlement::Release if self.how == Sabotage::AcksOnDrop => delivery.ack(),
            Settlement::Release if self.how == Sabotage::ReleasesToTheEnd => {
                let bus: Arc<dyn EventBus> = Arc::new(self.client.clone());
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    let _ = bus.publish(delivery.event().clone()).await;
                    delivery.ack();
                });
            }
            Settlement::Release => delivery.release(),
            Settlement::DeadLetter(_) if self.how == Sabotage::DropsDeadLetters => delivery.ack(),
            Settlement::DeadLetter(reason) => delivery.dead_letter(reason),
        }
    }
}

/// Acks what it holds when it is dropped before it was handed on.
struct Fragile(Vec<Delivery>);

impl Drop for Fragile {
    fn drop(&mut self) {
        self.0.drain(..).for_each(Delivery::ack);
    }
}

#[async_trait]
impl Subscription for BrokenSubscription {
    async fn next_batch(&mut self, max: usize) -> Result<Vec<Delivery>, BusError> {
        loop {
            let Some(inner) = &mut self.inner else { return Err(BusError::closed()) };
            let mut fragile = Fragile(inner.next_batch(max).await?);
            if self.how == Sabotage::LosesDroppedReads {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let batch = std::mem::take(&mut fragile.0);
            let (lost, kept): (Vec<Delivery>, Vec<Delivery>) =
                batch.into_iter().partition(|delivery| self.acked_late(delivery));
            lost.into_iter().for_each(Delivery::ack);
            if !kept.is_empty() {
                return Ok(kept.into_iter().map(|delivery| self.wrap(delivery)).collect());
            }
        }
    }

    async fn record_attempt(&mut self, delivery: &Delivery) -> Result<(), BusError> {
        let token = delivery.token();
        if self.how == Sabotage::ForgetsAttempts {
            return Ok(());
        }
        let inner = self.hands.held.lock().expect("not poisoned").remove(&token);
        let (Some(held), Some(subscription)) = (inner, &mut self.inner) else { return Err(BusError::closed()) };
        let recorded = subscription.record_attempt(&held).await;
        self.hands.held.lock().expect("not poisoned").insert(token, held);
        recorded
    }

    async fn close(&mut self) -> Result<(), BusError> {
        if self.how == Sabotage::AcksOnLeave {
            self.drop_all(Delivery::ack);
        }
        match &mut self.inner {
            Some(inner) => inner.close().await,
            None => Ok(()),
        }
    }
}

impl Drop for BrokenSubscription {
    fn drop(&mut self) {
        if self.how == Sabotage::LosesWithTheMember {
            self.drop_all(Delivery::ack);
        }
    }
}
