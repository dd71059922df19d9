//! [`Confirmations`]: one outcome per event of a batch, as the broker makes them known.

use std::{
    collections::VecDeque,
    fmt,
    future::poll_fn,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use futures_core::Stream;

use crate::{BusError, ErrorKind};

/// What became of one event of a batch.
pub type Outcome = Result<Receipt, BusError>;

/// The broker stored and routed the event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Receipt {
    /// The broker had it already, from an earlier attempt, and did not store it again.
    pub already_stored: bool,
}

/// The outcomes of one batch that was handed over: `(index, outcome)`, each index of the batch once, in the order in
/// which they become known, so that a slow partition does not hide the others.
///
/// Dropping it recalls nothing. Also a [`Stream`].
///
/// # Cancel safety
///
/// A dropped [`next`](Confirmations::next) loses no outcome.
#[must_use = "an outcome nobody reads may be an error"]
pub struct Confirmations {
    len: usize,
    known: Known,
    later: Option<Arc<Shared>>,
    inspect: Option<Inspect>,
}

type Inspect = Box<dyn FnMut(&Outcome) + Send>;

enum Known {
    /// From this index to the end, all the same.
    Same(usize, Outcome),
    /// Known here and not handed out yet.
    Each(VecDeque<(usize, Outcome)>),
}

impl Confirmations {
    /// Outcomes that are all the same and known already: a batch that was stored, or refused, as a whole.
    pub fn same(len: usize, outcome: Outcome) -> Self {
        Self { len, known: Known::Same(0, outcome), later: None, inspect: None }
    }

    /// Outcomes that are known already, in batch order.
    pub fn ready(outcomes: Vec<Outcome>) -> Self {
        let (len, known) = (outcomes.len(), Known::Each(outcomes.into_iter().enumerate().collect()));
        Self { len, known, later: None, inspect: None }
    }

    /// Outcomes of a batch of `len` that will be told through the [`Confirmer`].
    pub fn pending(len: usize) -> (Confirmer, Self) {
        let state = State { told: VecDeque::new(), open: vec![true; len], open_count: len, waker: None };
        let shared = Arc::new(Shared(Mutex::new(state)));
        let later = (len > 0).then(|| Arc::clone(&shared));
        let confirmations = Self { len, known: Known::Each(VecDeque::new()), later, inspect: None };
        (Confirmer(shared), confirmations)
    }

    /// Calls `inspect` with each outcome as it is handed out: for wrappers that count.
    pub fn inspect(mut self, inspect: impl FnMut(&Outcome) + Send + 'static) -> Self {
        self.inspect = Some(Box::new(inspect));
        self
    }

    /// How many events the batch had.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the batch was empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The next outcome that is known, with its event's index in the batch; `None` after the last.
    pub async fn next(&mut self) -> Option<(usize, Outcome)> {
        poll_fn(|context| self.poll_outcome(context)).await
    }

    /// All outcomes, in batch order.
    pub async fn all(mut self) -> Vec<Outcome> {
        let mut outcomes: Vec<Option<Outcome>> = vec![None; self.len];
        while let Some((index, outcome)) = self.next().await {
            outcomes[index] = Some(outcome);
        }
        outcomes.into_iter().map(|outcome| outcome.expect("each index is told once")).collect()
    }

    /// As [`next`](Confirmations::next), for code that polls.
    pub fn poll_outcome(&mut self, context: &mut Context<'_>) -> Poll<Option<(usize, Outcome)>> {
        let polled = self.poll_known(context);
        if let (Some(inspect), Poll::Ready(Some((_, outcome)))) = (&mut self.inspect, &polled) {
            inspect(outcome);
        }
        polled
    }

    fn poll_known(&mut self, context: &mut Context<'_>) -> Poll<Option<(usize, Outcome)>> {
        match &mut self.known {
            Known::Same(index, outcome) => {
                if *index == self.len {
                    return Poll::Ready(None);
                }
                *index += 1;
                Poll::Ready(Some((*index - 1, outcome.clone())))
            }
            Known::Each(known) => {
                if known.is_empty() {
                    let Some(shared) = &self.later else { return Poll::Ready(None) };
                    let mut state = shared.lock();
                    std::mem::swap(known, &mut state.told);
                    if known.is_empty() {
                        state.waker = Some(context.waker().clone());
                        return Poll::Pending;
                    }
                    let all_told = state.open_count == 0;
                    drop(state);
                    if all_told {
                        self.later = None;
                    }
                }
                Poll::Ready(known.pop_front())
            }
        }
    }
}

impl Stream for Confirmations {
    type Item = (usize, Outcome);

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_outcome(context)
    }
}

impl fmt::Debug for Confirmations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Confirmations").field("len", &self.len).finish_non_exhaustive()
    }
}

/// Where a bus tells the outcomes of one batch.
///
/// Every outcome resolves: what was not told when the confirmer is dropped becomes [`ErrorKind::Unavailable`], for the
/// events' fate is unknown.
pub struct Confirmer(Arc<Shared>);

struct Shared(Mutex<State>);

struct State {
    told: VecDeque<(usize, Outcome)>,
    open: Vec<bool>,
    open_count: usize,
    waker: Option<Waker>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while the lock is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Confirmer {
    /// Tells the outcome of the event at `index`; what is told twice keeps its first outcome.
    pub fn confirm(&self, index: usize, outcome: Outcome) {
        self.confirm_all([(index, outcome)]);
    }

    /// Tells several outcomes at once.
    pub fn confirm_all(&self, outcomes: impl IntoIterator<Item = (usize, Outcome)>) {
        let mut state = self.0.lock();
        for (index, outcome) in outcomes {
            if std::mem::take(&mut state.open[index]) {
                state.open_count -= 1;
                state.told.push_back((index, outcome));
            }
        }
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Gives every event that has no outcome yet this one.
    pub fn confirm_rest(&self, outcome: Outcome) {
        let open: Vec<usize> = {
            let state = self.0.lock();
            state.open.iter().enumerate().filter(|(_, open)| **open).map(|(index, _)| index).collect()
        };
        self.confirm_all(open.into_iter().map(|index| (index, outcome.clone())));
    }
}

impl Drop for Confirmer {
    fn drop(&mut self) {
        let nothing_open = self.0.lock().open_count == 0;
        if !nothing_open {
            self.confirm_rest(Err(BusError::new(ErrorKind::Unavailable, "the bus gave up the batch unconfirmed")));
        }
    }
}

impl fmt::Debug for Confirmer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Confirmer").field("open", &self.0.lock().open_count).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn tells_outcomes_as_they_become_known() {
        let (confirmer, mut confirmations) = Confirmations::pending(3);
        confirmer.confirm(2, Ok(Receipt::default()));
        assert_eq!(confirmations.next().await.unwrap().0, 2);
        confirmer.confirm(0, Err(BusError::closed()));
        confirmer.confirm(0, Ok(Receipt::default()));
        let (index, outcome) = confirmations.next().await.unwrap();
        assert_eq!((index, outcome.unwrap_err().kind()), (0, ErrorKind::Closed), "the first outcome counts");
        drop(confirmer);
        let (index, outcome) = confirmations.next().await.unwrap();
        assert_eq!((index, outcome.unwrap_err().kind()), (1, ErrorKind::Unavailable), "a dropped confirmer resolves");
        assert!(confirmations.next().await.is_none());
        assert!(confirmations.next().await.is_none());
    }

    #[tokio::test]
    async fn all_gives_batch_order() {
        let (confirmer, confirmations) = Confirmations::pending(3);
        let telling = tokio::spawn(async move {
            for index in [1, 2, 0] {
                tokio::task::yield_now().await;
                confirmer.confirm(index, Ok(Receipt { already_stored: index == 1 }));
            }
        });
        let stored: Vec<bool> = confirmations.all().await.into_iter().map(|o| o.unwrap().already_stored).collect();
        assert_eq!(stored, [false, true, false]);
        telling.await.unwrap();
    }

    #[tokio::test]
    async fn an_empty_batch_has_no_outcomes() {
        assert!(Confirmations::pending(0).1.all().await.is_empty());
        assert!(Confirmations::ready(Vec::new()).all().await.is_empty());
        assert_eq!(Confirmations::same(2, Ok(Receipt::default())).all().await.len(), 2);
    }
}
