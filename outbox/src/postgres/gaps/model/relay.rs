//! A relay in the order of keys, with the real [`Cursor`] and [`Gaps`], a statement at a time.
//!
//! The bus stores at once what it is handed, so every event is settled as it is published. A checkpoint is written beside
//! the reading: it begins, is committed, and is answered, with anything between. A crash can come between any two of a
//! page's events, too.

use std::{collections::BTreeSet, rc::Rc, time::Instant};

use bus_core::{Seq, SeqSet};

use super::{Client, Gaps, Holder, Mutant, Promise, Scope, World, gaps_key, holders_key, set_key};
use crate::cursor::Cursor;

/// The statement that is sent next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Fetch,
    Locks,
    Probe,
    /// The mutant's fetch.
    LateFetch,
}

#[derive(Clone, Debug)]
pub(super) struct Relay {
    page_rows: usize,
    now: Instant,
    step: Step,
    cursor: Cursor,
    gaps: Gaps,
    /// The page that was fetched, and up to where gaps were probed since.
    page: Vec<Seq>,
    through: Seq,
    /// What mutants read too early: the locks before this page was fetched and before the last one, and a probe.
    early: Option<BTreeSet<Holder>>,
    earlier: BTreeSet<Holder>,
    view: (SeqSet, u64),
    checkpoint: Option<Checkpoint>,
    stored: Stored,
    ledger: Vec<Published>,
    /// It crashes when it has published so many more.
    events_left: usize,
}

/// A checkpoint under way.
#[derive(Clone, Debug)]
struct Checkpoint {
    seen: u64,
    content: Stored,
    /// Its number, from its commit on.
    xid: Option<u64>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Stored {
    low: Seq,
    high: Seq,
    holes: SeqSet,
}

/// What was published of a key, as numbers in the order of its commits.
#[derive(Clone, Copy, Debug, Default)]
struct Published {
    /// So many are published.
    firsts: usize,
    /// The last one since the last crash, and the last one ever.
    of_run: Option<usize>,
    last: Option<usize>,
}

impl Client for Relay {
    const MUTANTS: &[(Mutant, u8, &[Promise])] = &[
        (Mutant::PlaceBeforeXid, 0, &[Promise::I1, Promise::I9]),
        (Mutant::ProbeBeforeFetch, 0, &[Promise::I3]),
        (Mutant::BoundByXmax, 0, &[Promise::I1, Promise::I9]),
        (Mutant::BoundOfLaterGaps, 0, &[Promise::I1, Promise::I9]),
        (Mutant::LocksBeforeGap, 0, &[Promise::I1, Promise::I9]),
        (Mutant::ProbeBeforeLocks, 0, &[Promise::I1, Promise::I9]),
        (Mutant::BlindToPrepared, 0, &[Promise::I1, Promise::I9]),
        (Mutant::DeadAtSight, 0, &[Promise::I1, Promise::I9]),
        (Mutant::ForgetsHole, 1, &[Promise::I1, Promise::I9]),
    ];

    fn new(scope: &Scope) -> Self {
        let keys = scope.keys.iter().max().map_or(0, |max| max + 1);
        Self { ledger: vec![Published::default(); keys], ..Self::blank(scope.page_rows, Instant::now()) }
    }

    fn steps(&self, world: &Rc<World>, mutant: Mutant) -> Result<Vec<(Rc<World>, Self)>, Promise> {
        let mut next = Vec::new();
        let mut on = self.clone();
        on.read(world, mutant)?;
        next.push((Rc::clone(world), on));
        if self.step == Step::Locks {
            let mut on = self.clone();
            on.see();
            next.push((Rc::clone(world), on));
        }
        if self.checkpoint.is_some() {
            let (mut later, mut on) = (World::clone(world), self.clone());
            on.go_on_with_checkpoint(&mut later, mutant)?;
            next.push((Rc::new(later), on));
        } else if matches!(self.step, Step::Fetch | Step::Locks) && self.has_news() && mutant != Mutant::LocksBeforeGap
        {
            // That mutant needs none, and what it remembers makes the scope large enough.
            let mut on = self.clone();
            on.begin_checkpoint(mutant);
            next.push((Rc::clone(world), on));
        }
        if self.step == Step::Probe && self.checkpoint.is_some() {
            // The probe is answered before, and its answer taken after the checkpoint's.
            let (mut later, mut on) = (World::clone(world), self.clone());
            while on.checkpoint.is_some() {
                on.go_on_with_checkpoint(&mut later, mutant)?;
            }
            on.probe(world, mutant)?;
            next.push((Rc::new(later), on));
        }
        Ok(next)
    }

    fn crashes(&self, world: &World, mutant: Mutant) -> Result<Vec<Self>, Promise> {
        let mut left = vec![self.crashed()];
        // Reading the locks publishes nothing.
        for events in 1..if self.step == Step::Locks { 1 } else { usize::MAX } {
            let mut on = Self { events_left: events, ..self.clone() };
            on.read(world, mutant)?;
            if on.events_left > 0 {
                break;
            }
            left.push(on.crashed());
        }
        Ok(left)
    }

    fn is_between_rounds(&self) -> bool {
        self.is_round_over() && self.checkpoint.is_none()
    }

    fn go_around(&mut self, world: &mut World, mutant: Mutant) -> Result<(), Promise> {
        self.read(world, mutant)?;
        while !self.is_round_over() {
            self.read(world, mutant)?;
        }
        if self.has_news() {
            self.begin_checkpoint(mutant);
        }
        while self.checkpoint.is_some() {
            self.go_on_with_checkpoint(world, mutant)?;
        }
        Ok(())
    }

    fn check_end(&self, world: &World) -> Result<(), Promise> {
        for (published, committed) in self.ledger.iter().zip(world.committed()) {
            if published.firsts < committed.len() {
                return Err(Promise::I1);
            }
            if published.last != committed.len().checked_sub(1) {
                return Err(Promise::I5);
            }
        }
        let is_open = !self.cursor.clone().holes().is_empty() || !self.stored.holes.is_empty();
        if is_open || self.stored.low != self.cursor.high() { Err(Promise::I7) } else { Ok(()) }
    }

    fn key(&self, world: &World, key: &mut Vec<u8>) {
        key.extend([self.step as u8, self.cursor.high().0 as u8, self.through.0 as u8]);
        key.extend([set_key(self.cursor.unseen()), set_key(&self.page.iter().copied().collect())]);
        gaps_key(&self.gaps, world, self.checkpoint.as_ref().map(|checkpoint| checkpoint.seen), key);
        key.extend(self.early.as_ref().map_or([u8::MAX; 2], holders_key));
        key.extend(holders_key(&self.earlier));
        key.extend([set_key(&self.view.0), world.rank(self.view.1)]);
        self.stored.key(key);
        if let Some(checkpoint) = &self.checkpoint {
            key.push(checkpoint.xid.map_or(u8::MAX, |xid| world.rank(xid)));
            checkpoint.content.key(key);
        }
        for published in &self.ledger {
            let number = |index: Option<usize>| index.map_or(0, |index| index as u8 + 1);
            key.extend([published.firsts as u8, number(published.of_run), number(published.last)]);
        }
    }
}

impl Stored {
    fn key(&self, key: &mut Vec<u8>) {
        key.extend([self.low.0 as u8, self.high.0 as u8, set_key(&self.holes)]);
    }
}

impl Relay {
    /// Goes on where its last checkpoint was; what is in the bus stays.
    fn crashed(&self) -> Self {
        let Stored { low, high, holes } = &self.stored;
        let mut ledger = self.ledger.clone();
        ledger.iter_mut().for_each(|published| published.of_run = None);
        let cursor = Cursor::restore(*low, *high, holes);
        Self { cursor, stored: self.stored.clone(), ledger, ..Self::blank(self.page_rows, self.now) }
    }

    fn blank(page_rows: usize, now: Instant) -> Self {
        Self {
            page_rows,
            now,
            step: Step::Fetch,
            cursor: Cursor::default(),
            gaps: Gaps::default(),
            page: Vec::new(),
            through: Seq::ZERO,
            early: None,
            earlier: BTreeSet::new(),
            view: (SeqSet::new(), 0),
            checkpoint: None,
            stored: Stored::default(),
            ledger: Vec::new(),
            events_left: usize::MAX,
        }
    }

    fn read(&mut self, world: &World, mutant: Mutant) -> Result<(), Promise> {
        match self.step {
            Step::Fetch => self.fetch(world, mutant),
            Step::Locks => {
                self.read_locks(world, mutant);
                Ok(())
            }
            Step::Probe => self.probe(world, mutant),
            Step::LateFetch => {
                self.page = self.rows(world);
                self.admit_page(world, mutant)
            }
        }
    }

    fn rows(&self, world: &World) -> Vec<Seq> {
        world.visible().within(self.cursor.high().next(), Seq(u64::MAX)).iter().take(self.page_rows).collect()
    }

    fn is_round_over(&self) -> bool {
        self.step == Step::Fetch && self.early.is_none()
    }

    fn fetch(&mut self, world: &World, mutant: Mutant) -> Result<(), Promise> {
        if mutant == Mutant::LocksBeforeGap && self.early.is_none() {
            self.early = Some(world.holders(mutant));
            return Ok(());
        }
        if mutant == Mutant::ProbeBeforeFetch {
            self.step = if self.cursor.unseen().is_empty() { Step::LateFetch } else { Step::Locks };
            return Ok(());
        }
        self.page = self.rows(world);
        if self.unseen().is_empty() {
            return self.admit_page(world, mutant);
        }
        self.step = Step::Locks;
        Ok(())
    }

    /// What was not probed since the page was fetched.
    fn unseen(&self) -> SeqSet {
        self.cursor.unseen().within(self.through.next(), Seq(u64::MAX))
    }

    /// Locks are not read with every probe: not while gaps are young.
    fn see(&mut self) {
        self.gaps.see(&self.unseen(), self.now);
        self.step = Step::Probe;
    }

    fn read_locks(&mut self, world: &World, mutant: Mutant) {
        self.see();
        match mutant {
            Mutant::LocksBeforeGap => self.gaps.read_locks(&self.earlier, self.now),
            Mutant::ProbeBeforeLocks => self.view = (world.visible().clone(), world.xmin()),
            _ => self.gaps.read_locks(&world.holders(mutant), self.now),
        }
    }

    fn probe(&mut self, world: &World, mutant: Mutant) -> Result<(), Promise> {
        let (visible, xmin) = match mutant {
            Mutant::ProbeBeforeLocks => {
                self.gaps.read_locks(&world.holders(mutant), self.now);
                std::mem::take(&mut self.view)
            }
            Mutant::BoundByXmax => (world.visible().clone(), world.xmax()),
            _ => (world.visible().clone(), world.xmin()),
        };
        let unseen = self.unseen();
        let rows: Vec<Seq> = unseen.iter().filter(|place| visible.contains(*place)).take(self.page_rows).collect();
        let last = if rows.len() == self.page_rows { rows.last().copied() } else { unseen.last() };
        self.through = last.unwrap_or_default();
        let dead = self.gaps.probed(&unseen.within(Seq::ZERO, self.through), &rows.iter().copied().collect(), xmin);
        self.cursor.close(&dead);
        for place in rows {
            self.cursor.appear(place);
            self.publish(place, world)?;
        }
        if !self.unseen().is_empty() {
            self.step = Step::Locks;
            return Ok(());
        }
        if mutant == Mutant::ProbeBeforeFetch {
            self.step = Step::LateFetch;
            return Ok(());
        }
        self.admit_page(world, mutant)
    }

    fn admit_page(&mut self, world: &World, mutant: Mutant) -> Result<(), Promise> {
        let page = std::mem::take(&mut self.page);
        self.cursor.observe(page.iter().copied(), mutant == Mutant::DeadAtSight);
        for place in page {
            self.publish(place, world)?;
        }
        (self.step, self.through) = (Step::Fetch, Seq::ZERO);
        self.earlier = self.early.take().unwrap_or_default();
        Ok(())
    }

    fn publish(&mut self, place: Seq, world: &World) -> Result<(), Promise> {
        if self.events_left == 0 {
            return Ok(());
        }
        self.events_left -= 1;
        let (key, number) = world.find(place).ok_or(Promise::I2)?;
        self.ledger[key].publish(number)?;
        self.cursor.settle(place);
        Ok(())
    }

    // ---- Checkpoints.

    fn has_news(&self) -> bool {
        let Stored { low, high, holes } = &self.stored;
        let is_same = self.cursor.low() == *low && self.cursor.high() == *high && self.cursor.unseen() == holes;
        !is_same || self.gaps.groups.iter().any(|group| group.bound.is_none())
    }

    fn content(&self) -> Stored {
        let mut cursor = self.cursor.clone();
        Stored { low: cursor.low(), high: cursor.high(), holes: cursor.holes() }
    }

    fn begin_checkpoint(&mut self, mutant: Mutant) {
        let mut content = self.content();
        if mutant == Mutant::ForgetsHole
            && let Some(first) = content.holes.first()
        {
            content.holes.remove(first);
        }
        self.checkpoint = Some(Checkpoint { seen: self.gaps.seen(), content, xid: None });
    }

    fn go_on_with_checkpoint(&mut self, world: &mut World, mutant: Mutant) -> Result<(), Promise> {
        let Some(mut checkpoint) = self.checkpoint.take() else { return Ok(()) };
        let Some(xid) = checkpoint.xid else {
            self.check_settled(checkpoint.content.low, world)?;
            self.stored = checkpoint.content.clone();
            checkpoint.xid = Some(world.take_xid());
            self.checkpoint = Some(checkpoint);
            return Ok(());
        };
        let seen = if mutant == Mutant::BoundOfLaterGaps { self.gaps.seen() } else { checkpoint.seen };
        self.gaps.bound(seen, xid);
        Ok(())
    }

    /// Everything up to `low` was published or can never be.
    fn check_settled(&self, low: Seq, world: &World) -> Result<(), Promise> {
        let mut keys = self.ledger.iter().zip(world.committed());
        let is_missing =
            keys.any(|(published, committed)| committed[published.firsts..].iter().any(|place| *place <= low));
        if is_missing || !world.open_places(low).is_empty() { Err(Promise::I9) } else { Ok(()) }
    }
}

impl Published {
    fn publish(&mut self, number: usize) -> Result<(), Promise> {
        if number > self.firsts {
            return Err(Promise::I3);
        }
        if self.of_run.is_some_and(|last| number != last + 1) {
            return Err(Promise::I4);
        }
        self.firsts = self.firsts.max(number + 1);
        (self.of_run, self.last) = (Some(number), Some(number));
        Ok(())
    }
}
