//! All interleavings of a small scope: two writers and a reader, step by step as PostgreSQL takes them.
//!
//! A writer takes the table's lock and a transaction number, draws a place, and ends: it becomes visible or not, and only
//! then lets go of its lock; or it is prepared, which hands the lock to another holder, and ends later. The reader
//! fetches, tells the gaps what is unseen, reads the locks, probes, and writes a checkpoint that draws a number, over and
//! over. Whatever the order: a place that is called dead never becomes visible, and in the end every place that was rolled
//! back is called dead.

use std::collections::{BTreeMap, HashSet};

use bus_core::Seq;

use super::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Stage {
    Idle,
    /// Holds the lock and has a transaction number.
    Begun,
    /// Has drawn its place.
    Drawn,
    Prepared,
    /// Out of the snapshots, and still holding its lock.
    Ended,
    Done,
}

#[derive(Clone, Debug)]
struct Writer {
    stage: Stage,
    xid: u64,
    place: Option<u64>,
    /// Whether a number was drawn that the transaction had not: a mutant of the column's default.
    prepared: bool,
}

#[derive(Clone, Debug)]
struct World {
    writers: Vec<Writer>,
    next_xid: u64,
    next_place: u64,
    visible: SeqSet,
    rolled_back: SeqSet,
    gaps: Gaps,
    /// What the reader has seen as rows, and called dead.
    read: SeqSet,
    dead: SeqSet,
    high: u64,
    unseen: SeqSet,
    seen: u64,
    /// What the last probe saw: visible places, and the oldest transaction that was not over.
    view: (SeqSet, u64),
    /// Which of the reader's steps is next.
    step: usize,
    now: Instant,
}

/// What a mutant does otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutant {
    None,
    /// The upper end of the snapshot is the bound.
    BoundByXmax,
    /// Places are drawn by transactions that have no number yet.
    PlaceBeforeXid,
    /// The probe's view is older than the locks.
    ProbeFirst,
    /// Prepared transactions are passed over.
    BlindToPrepared,
}

const STEPS: usize = 6;
const CYCLES: usize = 4;

impl World {
    fn new(now: Instant) -> Self {
        let writer = Writer { stage: Stage::Idle, xid: 0, place: None, prepared: false };
        Self {
            writers: vec![writer.clone(), writer],
            next_xid: 10,
            next_place: 1,
            visible: SeqSet::new(),
            rolled_back: SeqSet::new(),
            gaps: Gaps::default(),
            read: SeqSet::new(),
            dead: SeqSet::new(),
            high: 0,
            unseen: SeqSet::new(),
            seen: 0,
            view: (SeqSet::new(), 0),
            step: 0,
            now,
        }
    }

    fn holders(&self) -> BTreeSet<Holder> {
        let holding = |writer: &&Writer| !matches!(writer.stage, Stage::Idle | Stage::Done);
        let holders = self.writers.iter().enumerate().filter(|(_, writer)| holding(writer));
        holders
            .map(|(at, writer)| match writer.prepared {
                true => Holder { transaction: format!("-1/{}", writer.xid), pid: None },
                false => Holder { transaction: format!("{at}/1"), pid: Some(at as i32) },
            })
            .collect()
    }

    fn xmin(&self) -> u64 {
        let running = |writer: &&Writer| matches!(writer.stage, Stage::Begun | Stage::Drawn | Stage::Prepared);
        let oldest = self.writers.iter().filter(running).filter(|writer| writer.xid > 0).map(|writer| writer.xid).min();
        oldest.unwrap_or(self.next_xid)
    }

    /// What the writer can do next, each in a world of its own.
    fn write(&self, at: usize, mutant: Mutant) -> Vec<Self> {
        let mut next = Vec::new();
        let mut go = |change: &dyn Fn(&mut Self)| {
            let mut world = self.clone();
            change(&mut world);
            next.push(world);
        };
        let late_xid = mutant == Mutant::PlaceBeforeXid;
        match self.writers[at].stage {
            Stage::Idle => go(&|world| {
                world.writers[at].stage = Stage::Begun;
                if !late_xid {
                    world.writers[at].xid = world.next_xid;
                    world.next_xid += 1;
                }
            }),
            Stage::Begun => go(&|world| {
                world.writers[at].stage = Stage::Drawn;
                world.writers[at].place = Some(world.next_place);
                world.next_place += 1;
            }),
            Stage::Drawn | Stage::Prepared => {
                go(&|world| world.end(at, true));
                go(&|world| world.end(at, false));
                if self.writers[at].stage == Stage::Drawn {
                    go(&|world| {
                        world.writers[at].stage = Stage::Prepared;
                        world.writers[at].prepared = true;
                    });
                }
            }
            Stage::Ended => go(&|world| world.writers[at].stage = Stage::Done),
            Stage::Done => {}
        }
        next
    }

    fn end(&mut self, at: usize, commit: bool) {
        self.writers[at].stage = Stage::Ended;
        let place = Seq(self.writers[at].place.expect("it was drawn"));
        if commit {
            assert!(!self.dead.contains(place), "{place} was called dead and became visible: {self:?}");
            self.visible.insert(place);
        } else {
            self.rolled_back.insert(place);
        }
    }

    fn read(&mut self, mutant: Mutant) {
        match self.step % STEPS {
            0 => {
                self.high = self.visible.last().map_or(self.high, |last| last.0.max(self.high));
                self.read.insert_all(&self.visible);
                self.unseen = (1..=self.high).map(Seq).collect();
                self.unseen.remove_all(&self.read);
                self.unseen.remove_all(&self.dead);
            }
            1 => self.gaps.see(&self.unseen, self.now),
            2 if mutant == Mutant::ProbeFirst => self.view = (self.visible.clone(), self.xmin()),
            2 => self.read_locks(mutant),
            3 => {
                if mutant == Mutant::ProbeFirst {
                    self.read_locks(mutant);
                } else {
                    self.view = (self.visible.clone(), self.xmin());
                }
                let (visible, xmin) = self.view.clone();
                let xmin = if mutant == Mutant::BoundByXmax { xmin + 1 } else { xmin };
                let dead = self.gaps.probed(&self.unseen, &visible, xmin);
                let alive = dead.iter().find(|place| self.visible.contains(*place));
                assert_eq!(alive, None, "a visible place is called dead");
                self.dead.insert_all(&dead);
            }
            4 => self.seen = self.gaps.seen(),
            _ => {
                self.gaps.bound(self.seen, self.next_xid);
                self.next_xid += 1;
            }
        }
        self.step += 1;
    }

    fn read_locks(&mut self, mutant: Mutant) {
        let mut holders = self.holders();
        if mutant == Mutant::BlindToPrepared {
            holders.retain(|holder| holder.pid.is_some());
        }
        self.gaps.read_locks(&holders, self.now);
    }

    /// All there is to tell two worlds apart.
    fn key(&self) -> String {
        let locks: Vec<_> =
            self.gaps.groups.iter().map(|group| (&group.places, group.number, group.bound, &group.locks)).collect();
        let rest = (&self.view, self.high, self.seen, self.step, self.next_xid, self.next_place, self.gaps.seen);
        format!(
            "{:?}{:?}{:?}{:?}{:?}{:?}{:?}{locks:?}{rest:?}",
            self.writers,
            self.visible,
            self.rolled_back,
            self.read,
            self.dead,
            self.unseen,
            self.gaps.groups.len()
        )
    }
}

/// Goes through all interleavings; answers how many worlds there are.
fn explore(mutant: Mutant) -> usize {
    let mut todo = vec![World::new(Instant::now())];
    let mut known = HashSet::new();
    let mut outcomes: BTreeMap<String, usize> = BTreeMap::new();
    while let Some(world) = todo.pop() {
        if !known.insert(world.key()) {
            continue;
        }
        if world.writers.iter().all(|writer| writer.stage == Stage::Done) {
            // Nothing happens any more: two rounds close everything.
            let mut last = world;
            (0..3 * STEPS).for_each(|_| last.read(mutant));
            let mut open = last.rolled_back.within(Seq::ZERO, Seq(last.high));
            open.remove_all(&last.dead);
            assert!(open.is_empty(), "{open:?} is never closed: {last:?}");
            *outcomes.entry(format!("{:?}", (last.visible, last.dead))).or_default() += 1;
            continue;
        }
        (0..world.writers.len()).for_each(|at| todo.extend(world.write(at, mutant)));
        if world.step < CYCLES * STEPS {
            let mut next = world;
            next.read(mutant);
            todo.push(next);
        }
    }
    assert!(outcomes.len() >= 4, "{outcomes:?}");
    known.len()
}

#[test]
fn no_place_that_can_become_visible_is_called_dead() {
    let worlds = explore(Mutant::None);
    assert!(worlds > 10_000, "only {worlds} worlds");
}

/// The mutants of the design: each closes a gap whose row comes later. That the locks are read before a gap is seen cannot
/// be written down: a gap takes no notice of what was read before it was told.
#[test]
fn each_mutant_is_caught() {
    for mutant in [Mutant::BoundByXmax, Mutant::PlaceBeforeXid, Mutant::ProbeFirst, Mutant::BlindToPrepared] {
        assert!(std::panic::catch_unwind(|| explore(mutant)).is_err(), "{mutant:?} is not caught");
    }
}

#[test]
fn many_groups_are_taken_together_and_none_is_closed_by_that() {
    let (mut gaps, now) = (Gaps::default(), Instant::now());
    let holder = |name: &str| Holder { transaction: name.to_owned(), pid: Some(1) };
    for n in 0..200_u64 {
        gaps.see(&[Seq(n * 2)].into_iter().collect(), now);
        gaps.bound(gaps.seen(), 100 + n);
        gaps.read_locks(&[holder("a"), holder(&n.to_string())].into(), now);
    }
    assert!(gaps.groups.len() <= GROUPS_MAX);
    let all: SeqSet = (0..200).map(|n| Seq(n * 2)).collect();
    assert!(gaps.probed(&all, &SeqSet::new(), 50).is_empty());
    assert_eq!(gaps.probed(&all, &SeqSet::new(), 1_000), all);
    assert!(gaps.groups.is_empty());
}

#[test]
fn locks_are_read_for_gaps_that_stay_and_ever_less_often() {
    let (mut gaps, now) = (Gaps::default(), Instant::now());
    assert!(!gaps.wants_locks(now));
    gaps.see(&[Seq(1)].into_iter().collect(), now);
    assert!(!gaps.wants_locks(now), "a commit may be under way");
    let mut reads = 0;
    for millis in 0..60_000 {
        let at = now + Duration::from_millis(millis);
        if gaps.wants_locks(at) {
            reads += 1;
            gaps.read_locks(&[Holder { transaction: "1/1".to_owned(), pid: Some(1) }].into(), at);
        }
    }
    assert!((60..160).contains(&reads), "{reads} reads in a minute");
}
