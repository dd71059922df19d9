//! A wrapper around the in-memory bus that breaks one promise.

mod reading;
mod writing;

use std::{
    collections::{HashMap, HashSet},
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use bus_core::{
    BusAdmin, BusError, Capabilities, Confirmations, ErrorKind, Event, EventBus, Group, GroupLag, Health, InMemoryBus,
    LogId, LogWriter, Receipt, Seq, StoredDeadLetter, SubscribeFrom, SubscribeRequest, Subscription, Text, Timestamp,
    Topic, TopicSpec, Topology, WriterId,
};

/// What is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sabotage {
    Nothing,
    LosesEvents,
    StoresTwice,
    ConfirmsBeforeStoring,
    ForgetsAnOutcome,
    AnswersTheEmpty,
    ReversesBatches,
    LetsBatchesOvertake,
    CutsTimes,
    DropsExtensions,
    HashesDifferently,
    TakesAnySize,
    FailsNeighbours,
    GoesOnBehindRefused,
    StaysOpen,
    IgnoresTheGroup,
    HasTwoOwners,
    NeverRebalances,
    LosesWithTheMember,
    AcksOnLeave,
    StartsAtLatest,
    ReplaysToLatest,
    StartsGroupsAnew,
    ForgetsAcks,
    AcksOnDrop,
    ReleasesToTheEnd,
    CommitsPastUnsettled,
    LosesDroppedReads,
    IgnoresTheWindow,
    HonoursLateAcks,
    DropsDeadLetters,
    ListsTheHeadOnly,
    SharesDeadLetters,
    SuspectsNobody,
    ForgetsAttempts,
    FencesNobody,
    KeepsABareMaximum,
    MixesHistories,
    MixesLogs,
    LandsBehindAFailure,
    DropsRepublished,
    AgreesToAnything,
    HidesPending,
    MovesLiveGroups,
}

/// A client of a broken broker.
#[derive(Clone, Debug)]
pub(crate) struct Saboteur {
    how: Sabotage,
    client: InMemoryBus,
    broker: Broker,
}

/// What all clients of one broken broker share.
#[derive(Clone, Debug)]
struct Broker {
    name: String,
    notes: Arc<Mutex<Notes>>,
}

/// What the saboteurs remember.
#[derive(Debug, Default)]
struct Notes {
    published: u64,
    highest: HashMap<LogId, Seq>,
    members: u64,
    acked_late: HashSet<String>,
}

/// A fixture's `connect`: each call is a further client of one broken broker.
pub(crate) fn connector(how: Sabotage) -> impl Fn() -> Pin<Box<dyn Future<Output = Arc<dyn EventBus>> + Send>> {
    let first = Saboteur::new(how);
    move || {
        let bus: Arc<dyn EventBus> = Arc::new(first.another_client());
        Box::pin(async move { bus })
    }
}

impl Saboteur {
    pub(crate) fn new(how: Sabotage) -> Self {
        let name = format!("sabotage-{}", LogId::random());
        let client = InMemoryBus::named(&name, bus_core::InMemoryConfig::default());
        Self { how, client, broker: Broker { name, notes: Arc::default() } }
    }

    fn another_client(&self) -> Self {
        let client = InMemoryBus::named(&self.broker.name, bus_core::InMemoryConfig::default());
        Self { client, ..self.clone() }
    }

    /// A client that `close` does not end.
    fn back_door(&self) -> InMemoryBus {
        InMemoryBus::named(&self.broker.name, bus_core::InMemoryConfig::default())
    }

    fn mutate(&self, mut batch: Vec<Event>) -> Vec<Event> {
        match self.how {
            Sabotage::ReversesBatches => batch.reverse(),
            Sabotage::StoresTwice => batch = batch.into_iter().flat_map(|event| [event.clone(), event]).collect(),
            Sabotage::CutsTimes => {
                batch = batch
                    .into_iter()
                    .map(|event| {
                        change(event, |parts| {
                            parts.time = Timestamp::from_unix_micros(parts.time.unix_micros() / 1_000_000 * 1_000_000);
                        })
                    })
                    .collect()
            }
            Sabotage::DropsExtensions => {
                batch = batch
                    .into_iter()
                    .map(|event| {
                        change(event, |parts| {
                            parts.extensions.remove("tenantid");
                        })
                    })
                    .collect()
            }
            _ => {}
        }
        batch
    }
}

/// The event with other parts.
fn change(event: Event, change: impl FnOnce(&mut bus_core::EventParts)) -> Event {
    let mut parts = event.into_parts();
    change(&mut parts);
    Event::from_parts(parts).expect("still valid")
}

fn small(event: &Event) -> bool {
    event.size_bytes() <= 1 << 20
}

#[async_trait]
impl EventBus for Saboteur {
    fn capabilities(&self) -> Capabilities {
        self.client.capabilities()
    }

    async fn publish_batch(&self, batch: Vec<Event>) -> Confirmations {
        let len = batch.len();
        let batch = self.mutate(batch);
        let stored = Ok(Receipt::default());
        match self.how {
            Sabotage::LosesEvents => {
                let mut kept = batch;
                kept.retain(|_| {
                    let mut notes = self.broker.notes.lock().expect("not poisoned");
                    notes.published += 1;
                    !notes.published.is_multiple_of(7)
                });
                drop(self.client.publish_batch(kept).await);
                Confirmations::same(len, stored)
            }
            Sabotage::StoresTwice => {
                drop(self.client.publish_batch(batch).await);
                Confirmations::same(len, stored)
            }
            Sabotage::ConfirmsBeforeStoring | Sabotage::LetsBatchesOvertake => {
                let (client, overtakes) = (self.client.clone(), self.how == Sabotage::LetsBatchesOvertake);
                let delay = if overtakes { 40u64.saturating_sub(batch.len() as u64 + later(&batch)) } else { 50 };
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(delay)).await;
                    drop(client.publish_batch(batch).await);
                });
                Confirmations::same(len, stored)
            }
            Sabotage::ForgetsAnOutcome if len > 0 => {
                let (confirmer, confirmations) = Confirmations::pending(len);
                confirmer.confirm_all((1..len).map(|index| (index, Ok(Receipt::default()))));
                std::mem::forget(confirmer);
                confirmations
            }
            Sabotage::AnswersTheEmpty => Confirmations::same(len.max(1), stored),
            Sabotage::TakesAnySize => {
                drop(self.client.publish_batch(batch).await);
                Confirmations::same(len, stored)
            }
            Sabotage::FailsNeighbours if !batch.iter().all(small) => {
                Confirmations::same(len, Err(BusError::new(ErrorKind::TooLarge, "one of them")))
            }
            Sabotage::GoesOnBehindRefused => {
                let mut outcomes = Vec::new();
                for event in batch {
                    outcomes.extend(self.client.publish_batch(vec![event]).await.all().await);
                }
                Confirmations::ready(outcomes)
            }
            Sabotage::StaysOpen => self.back_door().publish_batch(batch).await,
            _ => self.client.publish_batch(batch).await,
        }
    }

    async fn open_writer(&self, id: WriterId) -> Result<Box<dyn LogWriter>, BusError> {
        writing::open(self, id).await
    }

    async fn subscribe(&self, request: SubscribeRequest) -> Result<Box<dyn Subscription>, BusError> {
        reading::subscribe(self, request).await
    }

    fn admin(&self) -> &dyn BusAdmin {
        self
    }

    async fn ping(&self) -> Result<Health, BusError> {
        self.client.ping().await
    }

    async fn close(&self) -> Result<(), BusError> {
        self.client.close().await
    }
}

/// Grows with the place of a batch, so that later ones wait less.
fn later(batch: &[Event]) -> u64 {
    let number = batch.first().and_then(|event| event.id().rsplit('-').next()?.parse::<u64>().ok());
    number.unwrap_or(0) / 4
}

#[async_trait]
impl BusAdmin for Saboteur {
    async fn apply(&self, topology: &Topology) -> Result<(), BusError> {
        match self.client.admin().apply(topology).await {
            Err(_) if self.how == Sabotage::AgreesToAnything => Ok(()),
            applied => applied,
        }
    }

    async fn check(&self, topology: &Topology) -> Result<(), BusError> {
        match self.client.admin().check(topology).await {
            Err(_) if self.how == Sabotage::AgreesToAnything => Ok(()),
            checked => checked,
        }
    }

    async fn topics(&self) -> Result<Vec<TopicSpec>, BusError> {
        self.client.admin().topics().await
    }

    async fn groups(&self, topic: &Topic) -> Result<Vec<Group>, BusError> {
        self.client.admin().groups(topic).await
    }

    async fn lag(&self, topic: &Topic, group: &Group) -> Result<GroupLag, BusError> {
        let mut lag = self.client.admin().lag(topic, group).await?;
        if self.how == Sabotage::HidesPending {
            lag.partitions.iter_mut().for_each(|partition| partition.lag -= partition.pending);
        }
        Ok(lag)
    }

    async fn seek(&self, topic: &Topic, group: &Group, to: SubscribeFrom) -> Result<(), BusError> {
        match self.client.admin().seek(topic, group, to).await {
            Err(_) if self.how == Sabotage::MovesLiveGroups => Ok(()),
            sought => sought,
        }
    }

    async fn remove_group(&self, topic: &Topic, group: &Group) -> Result<(), BusError> {
        self.client.admin().remove_group(topic, group).await
    }

    async fn dead_letters(
        &self,
        topic: &Topic,
        group: &Group,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<StoredDeadLetter>, BusError> {
        let after = after.filter(|_| self.how != Sabotage::ListsTheHeadOnly);
        if self.how == Sabotage::SharesDeadLetters {
            let mut all = Vec::new();
            for group in self.groups(topic).await? {
                all.extend(self.client.admin().dead_letters(topic, &group, after, limit).await?);
            }
            return Ok(all);
        }
        self.client.admin().dead_letters(topic, group, after, limit).await
    }

    async fn remove_dead(&self, topic: &Topic, group: &Group, ids: &[Text]) -> Result<usize, BusError> {
        self.client.admin().remove_dead(topic, group, ids).await
    }
}
