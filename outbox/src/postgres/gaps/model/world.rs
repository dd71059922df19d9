//! The database: transactions that draw places, as PostgreSQL does it.

use std::collections::BTreeSet;

use bus_core::{Seq, SeqSet};

use super::{Holder, Mutant};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Idle,
    /// It holds its aggregate's lock and the table's.
    Open,
    /// The same, by another holder of the table's lock.
    Prepared,
    /// Out of the snapshots: visible, or rolled back. It still holds its locks.
    Ended,
    Done,
}

#[derive(Clone, Debug)]
struct Transaction {
    key: usize,
    stage: Stage,
    xid: Option<u64>,
    place: Option<Seq>,
    commits: bool,
    was_prepared: bool,
}

#[derive(Clone, Debug)]
pub(super) struct World {
    transactions: Vec<Transaction>,
    next_xid: u64,
    drawn: Seq,
    /// The places of each key in the order in which they were committed.
    committed: Vec<Vec<Seq>>,
    visible: SeqSet,
}

impl World {
    pub(super) fn new(keys: &[usize]) -> Self {
        let transaction = |key: &usize| Transaction {
            key: *key,
            stage: Stage::Idle,
            xid: None,
            place: None,
            commits: false,
            was_prepared: false,
        };
        Self {
            transactions: keys.iter().map(transaction).collect(),
            next_xid: 10,
            drawn: Seq::ZERO,
            committed: vec![Vec::new(); keys.iter().max().map_or(0, |max| max + 1)],
            visible: SeqSet::new(),
        }
    }

    /// What its transactions can do next.
    pub(super) fn steps(&self, mutant: Mutant) -> Vec<Self> {
        let mut next = Vec::new();
        for at in 0..self.transactions.len() {
            let mut go = |step: &dyn Fn(&mut Self)| {
                let mut world = self.clone();
                step(&mut world);
                next.push(world);
            };
            let transaction = &self.transactions[at];
            let wants_xid =
                transaction.xid.is_none() && (mutant != Mutant::PlaceBeforeXid || transaction.place.is_some());
            match transaction.stage {
                Stage::Idle if self.may_begin(at) => go(&|world| world.transactions[at].stage = Stage::Open),
                Stage::Open if wants_xid => go(&|world| world.transactions[at].xid = Some(world.take_xid())),
                Stage::Open if transaction.place.is_none() => go(&|world| world.draw(at)),
                Stage::Open | Stage::Prepared => {
                    go(&|world| world.end(at, true));
                    go(&|world| world.end(at, false));
                    if transaction.stage == Stage::Open {
                        go(&|world| world.prepare(at));
                    }
                }
                Stage::Ended => go(&|world| world.transactions[at].stage = Stage::Done),
                Stage::Idle | Stage::Done => {}
            }
        }
        next
    }

    /// Nobody else holds the aggregate's lock. Of those that could take it, which are alike, the first does.
    fn may_begin(&self, at: usize) -> bool {
        let key = self.transactions[at].key;
        let mut others = self.transactions.iter().enumerate().filter(|(other, them)| *other != at && them.key == key);
        others.all(|(other, them)| match them.stage {
            Stage::Idle => other > at,
            Stage::Open | Stage::Prepared | Stage::Ended => false,
            Stage::Done => true,
        })
    }

    fn draw(&mut self, at: usize) {
        self.drawn = self.drawn.next();
        self.transactions[at].place = Some(self.drawn);
    }

    fn prepare(&mut self, at: usize) {
        self.transactions[at].stage = Stage::Prepared;
        self.transactions[at].was_prepared = true;
    }

    fn end(&mut self, at: usize, commits: bool) {
        let transaction = &mut self.transactions[at];
        (transaction.stage, transaction.commits) = (Stage::Ended, commits);
        if commits {
            self.committed[transaction.key].extend(transaction.place);
            self.visible.extend(transaction.place);
        }
    }

    /// A transaction number, for a transaction or a checkpoint.
    pub(super) fn take_xid(&mut self) -> u64 {
        self.next_xid += 1;
        self.next_xid - 1
    }

    pub(super) fn is_done(&self) -> bool {
        self.transactions.iter().all(|transaction| transaction.stage == Stage::Done)
    }

    /// The places of each key in the order in which they were committed.
    pub(super) fn committed(&self) -> &[Vec<Seq>] {
        &self.committed
    }

    /// The key of a committed place, and which one of the key it is.
    pub(super) fn find(&self, place: Seq) -> Option<(usize, usize)> {
        let mut keys = self.committed.iter().enumerate();
        keys.find_map(|(key, places)| Some((key, places.iter().position(|other| *other == place)?)))
    }

    /// What a snapshot shows now.
    pub(super) fn visible(&self) -> &SeqSet {
        &self.visible
    }

    /// Places up to this one whose transactions can still commit.
    pub(super) fn open_places(&self, last: Seq) -> SeqSet {
        let open = self.transactions.iter().filter(|transaction| transaction.is_running());
        open.filter_map(|transaction| transaction.place).filter(|place| *place <= last).collect()
    }

    /// The oldest transaction that is not over, or the next number.
    pub(super) fn xmin(&self) -> u64 {
        self.running_xids().min().unwrap_or(self.next_xid)
    }

    /// The number that nobody has yet.
    pub(super) fn xmax(&self) -> u64 {
        self.next_xid
    }

    fn running_xids(&self) -> impl Iterator<Item = u64> {
        self.transactions.iter().filter(|transaction| transaction.is_running()).filter_map(|running| running.xid)
    }

    /// Who holds the table's lock.
    pub(super) fn holders(&self, mutant: Mutant) -> BTreeSet<Holder> {
        let mut holders = BTreeSet::new();
        for (at, transaction) in self.transactions.iter().enumerate() {
            let pid = (!transaction.was_prepared).then_some(at as i32);
            let is_hidden = pid.is_none() && mutant == Mutant::BlindToPrepared;
            if !is_hidden && (transaction.is_running() || transaction.stage == Stage::Ended) {
                holders.insert(Holder { transaction: at.to_string(), pid });
            }
        }
        holders
    }

    /// How many running transactions have a lower number: all of it that can matter later.
    pub(super) fn rank(&self, xid: u64) -> u8 {
        self.running_xids().filter(|running| *running < xid).count() as u8
    }

    pub(super) fn key(&self, key: &mut Vec<u8>) {
        for transaction in &self.transactions {
            let flags = u8::from(transaction.commits) | u8::from(transaction.was_prepared) << 1;
            let rank = transaction.xid.filter(|_| transaction.is_running()).map_or(u8::MAX, |xid| self.rank(xid));
            // What was prepared is not asked for any more when its lock is gone.
            let flags = if transaction.stage == Stage::Done { flags & 1 } else { flags };
            key.extend([transaction.stage as u8, flags, rank, transaction.place.map_or(0, |place| place.0 as u8)]);
        }
    }
}

impl Transaction {
    fn is_running(&self) -> bool {
        matches!(self.stage, Stage::Open | Stage::Prepared)
    }
}
