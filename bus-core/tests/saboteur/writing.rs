//! Broken writers of logs.

use async_trait::async_trait;
use bus_core::{
    BusError, Confirmations, Event, EventBus, InMemoryBus, LogId, LogWriter, Mark, Outcome, Position, Receipt, Seq,
    Text, WriterId,
};

use super::{Broker, Sabotage, Saboteur};

pub(super) async fn open(saboteur: &Saboteur, id: WriterId) -> Result<Box<dyn LogWriter>, BusError> {
    let one_log: LogId = "019a0000-0000-7000-8000-000000000000".parse().expect("a log id");
    let log = id.log;
    let id = match saboteur.how {
        Sabotage::FencesNobody | Sabotage::KeepsABareMaximum => WriterId { log: LogId::random(), ..id },
        Sabotage::MixesHistories => WriterId { incarnation: "always".into(), ..id },
        Sabotage::MixesLogs => WriterId { log: one_log, sink: "main".into(), ..id },
        _ => id,
    };
    let inner = saboteur.client.open_writer(id).await?;
    let (client, broker) = (saboteur.client.clone(), saboteur.broker.clone());
    Ok(Box::new(BrokenWriter { how: saboteur.how, inner, client, broker, log }))
}

#[derive(Debug)]
struct BrokenWriter {
    how: Sabotage,
    inner: Box<dyn LogWriter>,
    client: InMemoryBus,
    broker: Broker,
    log: LogId,
}

impl BrokenWriter {
    /// Takes everything up to the highest place for stored.
    async fn publish_above_maximum(&mut self, batch: Vec<(Seq, Event)>, mark: &Mark) -> Confirmations {
        let maximum = {
            let mut notes = self.broker.notes.lock().expect("not poisoned");
            let highest = notes.highest.entry(self.log).or_default();
            let before = *highest;
            *highest = batch.iter().map(|(seq, _)| *seq).max().unwrap_or(before).max(before);
            before
        };
        let outcomes: Vec<Outcome> =
            batch.iter().map(|(seq, _)| Ok(Receipt { already_stored: *seq <= maximum })).collect();
        let fresh = batch.into_iter().filter(|(seq, _)| *seq > maximum).collect();
        drop(self.inner.publish_batch(fresh, mark).await);
        Confirmations::ready(outcomes)
    }
}

#[async_trait]
impl LogWriter for BrokenWriter {
    async fn publish_batch(&mut self, mut batch: Vec<(Seq, Event)>, mark: &Mark) -> Confirmations {
        match self.how {
            Sabotage::ReversesBatches => {
                batch.reverse();
                self.inner.publish_batch(batch, mark).await
            }
            Sabotage::KeepsABareMaximum => self.publish_above_maximum(batch, mark).await,
            Sabotage::LandsBehindAFailure => {
                self.client.publish_batch(batch.into_iter().map(|(_, event)| event).collect()).await
            }
            _ => self.inner.publish_batch(batch, mark).await,
        }
    }

    async fn republish(&mut self, batch: Vec<Event>) -> Confirmations {
        match self.how {
            Sabotage::DropsRepublished => Confirmations::same(batch.len(), Ok(Receipt { already_stored: true })),
            _ => self.inner.republish(batch).await,
        }
    }

    fn position(&self) -> Position {
        self.inner.position()
    }

    fn high_marks(&self) -> Vec<(Seq, Text)> {
        self.inner.high_marks()
    }

    async fn close(&mut self) -> Result<(), BusError> {
        self.inner.close().await
    }
}
