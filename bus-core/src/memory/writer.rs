//! How a relay publishes a log to the in-memory bus: fenced, and nothing stored twice.

use async_trait::async_trait;

use super::{
    InMemoryBus,
    state::{State, WriterHold},
    try_publish,
};
use crate::{
    BusError, Confirmations, ErrorKind, Event, EventBus, LogWriter, Mark, Outcome, Position, Receipt, Seq, Text,
    WriterId,
    bus::{AdmittedBatch, admit_batch},
    writer::stopped,
};

#[derive(Debug)]
pub(super) struct MemoryWriter {
    bus: InMemoryBus,
    hold: WriterHold,
    high_mark: Option<(Seq, Text)>,
    event_bytes_max: usize,
    /// Why nothing more is stored until the relay has opened another writer: an outcome was an error.
    broken: Option<BusError>,
}

impl MemoryWriter {
    pub(super) fn open(bus: InMemoryBus, id: &WriterId) -> Result<Self, BusError> {
        if bus.is_closed() {
            return Err(BusError::closed());
        }
        let (hold, high_mark) = bus.shared.lock().open_writer(id)?;
        let event_bytes_max = bus.capabilities().event_bytes_max;
        Ok(Self { bus, hold, high_mark, event_bytes_max, broken: None })
    }

    /// Hands a batch over unless an earlier one failed; remembers if this one does.
    async fn write(&mut self, batch: Vec<Event>, seqs: Option<(&[Seq], &Mark)>) -> Confirmations {
        let len = batch.len();
        if let Some(broken) = &self.broken {
            return Confirmations::same(len, Err(broken.clone()));
        }
        let capabilities = self.bus.capabilities();
        let AdmittedBatch { events: admitted, refused } =
            admit_batch(batch, self.event_bytes_max, capabilities.order_on_failure);
        self.broken = (!refused.is_empty()).then(stopped);
        let turns = self.bus.shared.lock().turns(&admitted);
        let mut pending = Pending::new(admitted, seqs);
        let hold = &self.hold;
        let stored = self.bus.hand_over(turns, |state| pending.store(state, hold)).await.flatten();
        let fates = match stored {
            Ok(()) => pending.fates,
            Err(error) => {
                self.broken = Some(if error.kind() == ErrorKind::Fenced { error.clone() } else { stopped() });
                return Confirmations::same(len, Err(error));
            }
        };
        if refused.is_empty() && fates.iter().all(|(_, already_stored)| !already_stored) {
            return Confirmations::same(len, Ok(Receipt::default()));
        }
        let mut outcomes: Vec<Outcome> = vec![Ok(Receipt::default()); len];
        for (index, already_stored) in fates {
            outcomes[index] = Ok(Receipt { already_stored });
        }
        for (index, outcome) in refused {
            outcomes[index] = outcome;
        }
        Confirmations::ready(outcomes)
    }
}

/// A batch that waits for room, with what is remembered once it is stored.
struct Pending<'a> {
    /// Index in the batch, and whether it was stored before.
    fates: Vec<(usize, bool)>,
    events: Vec<(usize, Event)>,
    seqs: Option<(&'a [Seq], &'a Mark)>,
    fresh: Option<Vec<Event>>,
    written: Vec<(Seq, Text)>,
}

impl<'a> Pending<'a> {
    fn new(events: Vec<(usize, Event)>, seqs: Option<(&'a [Seq], &'a Mark)>) -> Self {
        Self { fates: Vec::with_capacity(events.len()), events, seqs, fresh: None, written: Vec::new() }
    }

    /// `None` while there is no room; an error if another writer has the log now.
    fn store(&mut self, state: &mut State, hold: &WriterHold) -> Option<Result<(), BusError>> {
        if let Err(error) = state.check_writer(hold) {
            return Some(Err(error));
        }
        if self.fresh.is_none() {
            self.sort(state, hold);
        }
        try_publish(state, &mut self.fresh)?;
        if let Some((_, mark)) = self.seqs {
            state.advance(hold, &self.written, mark);
        }
        Some(Ok(()))
    }

    /// Tells what is new from what is stored already.
    fn sort(&mut self, state: &State, hold: &WriterHold) {
        let mut fresh = Vec::with_capacity(self.events.len());
        for (index, event) in self.events.drain(..) {
            let seq = self.seqs.map(|(seqs, _)| seqs[index]);
            let already_stored = seq.is_some_and(|seq| state.holds(hold, seq));
            self.fates.push((index, already_stored));
            if !already_stored {
                self.written.extend(seq.map(|seq| (seq, event.parts().id.clone())));
                fresh.push(event);
            }
        }
        self.fresh = Some(fresh);
    }
}

#[async_trait]
impl LogWriter for MemoryWriter {
    async fn publish_batch(&mut self, batch: Vec<(Seq, Event)>, mark: &Mark) -> Confirmations {
        let (seqs, events): (Vec<Seq>, Vec<Event>) = batch.into_iter().unzip();
        self.write(events, Some((&seqs, mark))).await
    }

    async fn republish(&mut self, batch: Vec<Event>) -> Confirmations {
        self.write(batch, None).await
    }

    fn position(&self) -> Position {
        Position::default()
    }

    fn high_marks(&self) -> Vec<(Seq, Text)> {
        self.high_mark.clone().into_iter().collect()
    }

    async fn close(&mut self) -> Result<(), BusError> {
        self.broken = Some(stopped());
        Ok(())
    }
}
