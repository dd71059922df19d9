//! A reader in the order of the log, with the real [`InOrder`] and [`Gaps`], a statement at a time.
//!
//! It writes nothing, so only locks close its gaps. After a crash it begins where it was, on the same source or on another.

use std::{collections::BTreeSet, rc::Rc, time::Instant};

use bus_core::{EventError, Seq, SeqSet};

use super::{Client, Gaps, Holder, Mutant, Promise, Scope, World, gaps_key, holders_key, set_key};
use crate::{InvalidRow, Page, PageLimit, Probe, Row, in_order::InOrder};

/// The statement that is sent next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Fetch,
    Locks,
    Probe,
}

#[derive(Clone, Debug)]
pub(super) struct Reader {
    limit: PageLimit,
    now: Instant,
    step: Step,
    order: InOrder,
    gaps: Gaps,
    /// What mutants read too early: the locks before the page was fetched, and a probe.
    early: Option<BTreeSet<Holder>>,
    visible: SeqSet,
    handed_out: SeqSet,
}

impl Client for Reader {
    /// Locks prove it whether a place has a number or not, and nothing of a page overtakes what was probed before it: these
    /// mutants of the relay break nothing here.
    const MUTANTS: &[(Mutant, u8, &[Promise])] = &[
        (Mutant::LocksBeforeGap, 0, &[Promise::I1, Promise::I3]),
        (Mutant::ProbeBeforeLocks, 0, &[Promise::I1, Promise::I3]),
        (Mutant::BlindToPrepared, 0, &[Promise::I1, Promise::I3]),
        (Mutant::DeadAtSight, 0, &[Promise::I1, Promise::I3]),
    ];

    fn new(scope: &Scope) -> Self {
        Self {
            limit: PageLimit { events: scope.page_rows, bytes: usize::MAX },
            now: Instant::now(),
            step: Step::Fetch,
            order: InOrder::default(),
            gaps: Gaps::default(),
            early: None,
            visible: SeqSet::new(),
            handed_out: SeqSet::new(),
        }
    }

    fn steps(&self, world: &Rc<World>, mutant: Mutant) -> Result<Vec<(Rc<World>, Self)>, Promise> {
        let mut on = self.clone();
        on.read(world, mutant)?;
        let mut next = vec![(Rc::clone(world), on)];
        if self.step == Step::Locks {
            let mut on = self.clone();
            on.see();
            next.push((Rc::clone(world), on));
        }
        Ok(next)
    }

    fn crashes(&self, _world: &World, _mutant: Mutant) -> Result<Vec<Self>, Promise> {
        let same_source = Self {
            step: Step::Fetch,
            order: InOrder::behind(self.order.position()),
            early: None,
            visible: SeqSet::new(),
            ..self.clone()
        };
        let other_source = Self { gaps: Gaps::default(), ..same_source.clone() };
        Ok(vec![same_source, other_source])
    }

    fn is_between_rounds(&self) -> bool {
        self.step == Step::Fetch && self.early.is_none()
    }

    fn go_around(&mut self, world: &mut World, mutant: Mutant) -> Result<(), Promise> {
        self.read(world, mutant)?;
        while !self.is_between_rounds() {
            self.read(world, mutant)?;
        }
        Ok(())
    }

    fn check_end(&self, world: &World) -> Result<(), Promise> {
        if self.handed_out != *world.visible() {
            return Err(Promise::I1);
        }
        if self.order.unseen().is_empty() && self.order.wants_page() { Ok(()) } else { Err(Promise::I7) }
    }

    fn key(&self, world: &World, key: &mut Vec<u8>) {
        key.extend([self.step as u8, self.order.position().0 as u8, set_key(&self.handed_out)]);
        key.extend([set_key(self.order.unseen()), set_key(&self.order.waiting().collect())]);
        gaps_key(&self.gaps, world, None, key);
        key.extend(self.early.as_ref().map_or([u8::MAX; 2], holders_key));
        key.push(set_key(&self.visible));
    }
}

impl Reader {
    fn read(&mut self, world: &World, mutant: Mutant) -> Result<(), Promise> {
        match self.step {
            Step::Fetch => self.fetch(world, mutant),
            Step::Locks => {
                self.read_locks(world, mutant);
                Ok(())
            }
            Step::Probe => self.probe(world, mutant),
        }
    }

    fn fetch(&mut self, world: &World, mutant: Mutant) -> Result<(), Promise> {
        if mutant == Mutant::LocksBeforeGap && self.early.is_none() {
            self.early = Some(world.holders(mutant));
            return Ok(());
        }
        if self.order.wants_page() {
            let above = world.visible().within(self.order.position().next(), Seq(u64::MAX));
            let rows = above.iter().take(self.limit.events).map(row).collect();
            self.order.admit_page(Page { rows, gaps_are_dead: mutant == Mutant::DeadAtSight });
        }
        if self.order.unseen().is_empty() {
            return self.hand_out(world);
        }
        self.step = Step::Locks;
        Ok(())
    }

    /// Locks are not read with every probe: not while gaps are young.
    fn see(&mut self) {
        self.gaps.see(self.order.unseen(), self.now);
        self.step = Step::Probe;
    }

    fn read_locks(&mut self, world: &World, mutant: Mutant) {
        self.see();
        match mutant {
            Mutant::LocksBeforeGap => self.gaps.read_locks(&self.early.clone().unwrap_or_default(), self.now),
            Mutant::ProbeBeforeLocks => self.visible = world.visible().clone(),
            _ => self.gaps.read_locks(&world.holders(mutant), self.now),
        }
    }

    fn probe(&mut self, world: &World, mutant: Mutant) -> Result<(), Promise> {
        let mut visible = world.visible().clone();
        if mutant == Mutant::ProbeBeforeLocks {
            self.gaps.read_locks(&world.holders(mutant), self.now);
            visible = std::mem::take(&mut self.visible);
        }
        let unseen = self.order.unseen();
        let found: Vec<Seq> = unseen.iter().filter(|place| visible.contains(*place)).take(self.limit.events).collect();
        let last = if found.len() == self.limit.events { found.last().copied() } else { unseen.last() };
        let through = last.unwrap_or_default();
        let looked_at = unseen.within(Seq::ZERO, through);
        let dead = self.gaps.probed(&looked_at, &found.iter().copied().collect(), world.xmin());
        self.order.admit_probe(Probe { rows: found.into_iter().map(row).collect(), dead, through }, self.limit);
        self.hand_out(world)
    }

    fn hand_out(&mut self, world: &World) -> Result<(), Promise> {
        (self.step, self.early) = (Step::Fetch, None);
        for row in self.order.take(self.limit) {
            if !world.visible().contains(row.seq) {
                return Err(Promise::I2);
            }
            if self.handed_out.last().is_some_and(|last| last >= row.seq) {
                return Err(Promise::I4);
            }
            let mut below = world.visible().within(Seq::ZERO, row.seq.previous());
            below.remove_all(&self.handed_out);
            if !below.is_empty() || !world.open_places(row.seq).is_empty() {
                return Err(Promise::I3);
            }
            self.handed_out.insert(row.seq);
        }
        Ok(())
    }
}

/// A row whose content does not matter.
fn row(seq: Seq) -> Row {
    Row { seq, event: Err(InvalidRow { topic: None, key: None, error: EventError::new("type", "") }) }
}
