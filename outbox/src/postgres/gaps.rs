//! [`Gaps`]: which places that are not visible never will be. Pure.
//!
//! A place is drawn before its row is inserted, and the row becomes visible when its transaction commits. A gap is *dead*
//! when that cannot happen any more. Two proofs, of which either suffices; neither ever says so of a place that can
//! still become visible:
//!
//! - *By the snapshot.* Whoever draws a place has a transaction number already (the column's default sees to that). So
//!   once every transaction is over that began before some number which was handed out after the gap was seen, the one
//!   that drew it is over, and a snapshot that shows no row shows that it was rolled back. That number is what a
//!   checkpoint returns. Neither the snapshot's upper end nor a time-out is proof.
//! - *By the locks.* Whoever draws a place holds a lock on the table from before the draw to the end of its
//!   transaction. Once all who held it after the gap was seen are gone, and then all prepared ones of that moment (a
//!   PREPARE hands the lock to another holder), a probe that comes after that and shows no row shows that it was rolled
//!   back. So only those who write this log keep its gaps open.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use bus_core::{SeqSet, mutant};

use crate::Row;

/// Gaps as young as this are only probed: most are filled by a commit that is under way.
const LOCKS_AFTER: Duration = Duration::from_millis(20);
/// How often the locks are read while gaps are young, and when they are old.
const LOCKS_EVERY: Duration = Duration::from_millis(20);
const LOCKS_EVERY_MAX: Duration = Duration::from_secs(1);
/// Groups of gaps that are told apart; beyond that, older ones are taken together.
const GROUPS_MAX: usize = 64;

/// Who holds the table's lock: a virtual transaction, and its process unless it is prepared.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Holder {
    pub(super) transaction: String,
    pub(super) pid: Option<i32>,
}

/// The gaps of a log, in groups that were seen together.
#[derive(Clone, Debug, Default)]
pub(super) struct Gaps {
    groups: Vec<Group>,
    /// Counts what was seen, so that a checkpoint knows which gaps it began after.
    seen: u64,
    locks_read: Option<Instant>,
}

#[derive(Clone, Debug)]
struct Group {
    places: SeqSet,
    since: Instant,
    /// Its number in the order of what was seen.
    number: u64,
    /// A transaction number that was handed out after the gaps were seen.
    bound: Option<u64>,
    locks: Locks,
}

/// How far the proof by locks is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Locks {
    /// They were not read since the gaps were seen.
    Unread,
    /// Those who held the lock then, and hold it still.
    Holders(BTreeSet<Holder>),
    /// Those are gone; the prepared ones of that moment, who hold it still.
    Prepared(BTreeSet<Holder>),
}

impl Locks {
    fn is_free(&self) -> bool {
        matches!(self, Self::Prepared(holders) if holders.is_empty())
    }
}

impl Gaps {
    /// These places are not visible: those that were not known as gaps are, from now on.
    pub(super) fn see(&mut self, unseen: &SeqSet, now: Instant) {
        let mut new = unseen.clone();
        self.groups.iter().for_each(|group| new.remove_all(&group.places));
        if new.is_empty() {
            return;
        }
        self.seen += 1;
        self.groups.push(Group { places: new, since: now, number: self.seen, bound: None, locks: Locks::Unread });
        if self.groups.len() > GROUPS_MAX {
            let younger = self.groups.remove(1);
            self.groups[0].join(younger);
        }
    }

    /// Whether the locks should be read before the next probe.
    pub(super) fn wants_locks(&self, now: Instant) -> bool {
        let open = self.groups.iter().filter(|group| !group.locks.is_free());
        let Some(oldest) = open.map(|group| group.since).min() else { return false };
        let age = now.saturating_duration_since(oldest);
        let every = (age / 8).clamp(LOCKS_EVERY, LOCKS_EVERY_MAX);
        age >= LOCKS_AFTER && self.locks_read.is_none_or(|last| now.saturating_duration_since(last) >= every)
    }

    /// These hold the table's lock now, which was read after all gaps were seen.
    pub(super) fn read_locks(&mut self, holders: &BTreeSet<Holder>, now: Instant) {
        self.locks_read = Some(now);
        for group in &mut self.groups {
            match &mut group.locks {
                Locks::Unread => group.locks = Locks::Holders(holders.clone()),
                Locks::Holders(left) | Locks::Prepared(left) => left.retain(|holder| holders.contains(holder)),
            }
            if group.locks == Locks::Holders(BTreeSet::new()) {
                let prepared = holders
                    .iter()
                    .filter(|holder| holder.pid.is_none() && !mutant("blind-to-prepared"))
                    .cloned()
                    .collect();
                group.locks = Locks::Prepared(prepared);
            }
        }
    }

    /// A probe that began after all that showed `visible` of `looked_at`; every transaction below `xmin` was over when
    /// it did. Answers which places are dead.
    pub(super) fn probed(&mut self, looked_at: &SeqSet, visible: &SeqSet, xmin: u64) -> SeqSet {
        let mut dead = SeqSet::new();
        for group in &mut self.groups {
            group.places.remove_all(visible);
            if group.is_over(xmin) {
                let mut here = looked_at.clone();
                let mut others = looked_at.clone();
                others.remove_all(&group.places);
                here.remove_all(&others);
                dead.insert_all(&here);
                group.places.remove_all(&here);
            }
        }
        self.groups.retain(|group| !group.places.is_empty());
        dead
    }

    /// Rows were fetched, ascending, beside any probe: a reader that gave them up before has their places as gaps still.
    pub(super) fn fetched(&mut self, rows: &[Row]) {
        let Some(first) = rows.first() else { return };
        for group in self.groups.iter_mut().filter(|group| group.places.last() >= Some(first.seq)) {
            rows.iter().for_each(|row| {
                group.places.remove(row.seq);
            });
        }
        self.groups.retain(|group| !group.places.is_empty());
    }

    /// What was seen so far: to be told to [`bound`](Gaps::bound) by a transaction that begins now.
    pub(super) fn seen(&self) -> u64 {
        self.seen
    }

    /// A transaction got number `xid` that began when so much was `seen`.
    pub(super) fn bound(&mut self, seen: u64, xid: u64) {
        for group in self.groups.iter_mut().filter(|group| group.number <= seen && group.bound.is_none()) {
            group.bound = Some(xid);
        }
    }
}

impl Group {
    /// Whether a probe that sees nothing proves these places dead: every transaction below `xmin` was over then.
    fn is_over(&self, xmin: u64) -> bool {
        self.locks.is_free() || self.bound.is_some_and(|bound| xmin >= bound) || mutant("gap-closed-at-sight")
    }

    /// Takes another group's gaps; what is proved afterwards is proved of both.
    fn join(&mut self, other: Self) {
        self.places.insert_all(&other.places);
        self.number = self.number.max(other.number);
        self.bound = self.bound.zip(other.bound).map(|(one, two)| one.max(two));
        self.locks = match (std::mem::replace(&mut self.locks, Locks::Unread), other.locks) {
            (Locks::Unread, _) | (_, Locks::Unread) => Locks::Unread,
            (Locks::Prepared(mut one), Locks::Prepared(two)) => {
                one.extend(two);
                Locks::Prepared(one)
            }
            (Locks::Holders(mut one) | Locks::Prepared(mut one), Locks::Holders(two) | Locks::Prepared(two)) => {
                one.extend(two);
                Locks::Holders(one)
            }
        };
    }
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
