//! The cursor's decisions against a model of the database: every interleaving of a small scope, and seeded runs of a
//! larger one.
//!
//! The database has snapshots, transaction numbers, a sequence, locks and prepared transactions (`world`). On it work a
//! relay in the order of keys (`relay`) and a reader in the order of the log (`reader`), which are the real [`Cursor`],
//! [`Gaps`] and [`InOrder`] with a step for each statement they send. Between any two steps anybody else may take one, and
//! a relay or reader may crash. Each breach of a promise of design.md 6 is told by its name; and each mutant of what the
//! design forbids is told to break the promise that it should.
//!
//! A step that changes nothing leads to a state that is known, and states differ only by what can matter later: numbers
//! count by their order. So there is no limit on how often a relay goes around.

mod world;
mod relay;
mod reader;

use std::{
    collections::{BTreeSet, HashSet},
    rc::Rc,
};

use bus_core::SeqSet;

use super::{Gaps, Holder, Locks};
use reader::Reader;
use relay::Relay;
use world::World;

/// A promise of design.md 6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Promise {
    /// Everything committed arrives.
    I1,
    /// Nothing else does.
    I2,
    /// First occurrences are in order: a key's, or the log's.
    I3,
    /// Duplicates are contiguous replays, and there are none without a crash.
    I4,
    /// The last of a key is its newest.
    I5,
    /// It comes to rest, with nothing left open.
    I7,
    /// What counts as settled is; retention relies on it.
    I9,
}

/// What is done otherwise than the design says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutant {
    None,
    /// Places are drawn by transactions that have no number yet.
    PlaceBeforeXid,
    /// Gaps are looked at before the page is fetched, not after.
    ProbeBeforeFetch,
    /// The upper end of a probe's snapshot is taken for its lower one.
    BoundByXmax,
    /// A number is believed to be younger than gaps that were seen after it was handed out.
    BoundOfLaterGaps,
    /// The locks that count were read before the gap was seen.
    LocksBeforeGap,
    /// The probe that counts was sent before the locks were read.
    ProbeBeforeLocks,
    /// Prepared transactions are passed over.
    BlindToPrepared,
    /// What is not visible is taken for rolled back.
    DeadAtSight,
    /// A checkpoint leaves its first hole out.
    ForgetsHole,
}

/// What is gone through.
#[derive(Clone, Debug)]
struct Scope {
    /// The key of each transaction.
    keys: Vec<usize>,
    crashes: u8,
    /// Most rows a fetch or a probe brings.
    page_rows: usize,
}

/// Three transactions, the first two of one key, and a crash.
fn small(page_rows: usize) -> Scope {
    Scope { keys: vec![0, 0, 1], crashes: 1, page_rows }
}

/// Who reads the log, as far as it has come.
trait Client: Clone {
    /// What must be caught: with how many crashes, and which promises it can break first.
    const MUTANTS: &[(Mutant, u8, &[Promise])];

    fn new(scope: &Scope) -> Self;

    /// What it can do next, each with the world after that.
    fn steps(&self, world: &Rc<World>, mutant: Mutant) -> Result<Vec<(Rc<World>, Self)>, Promise>;

    /// What can be left of it after a crash now.
    fn crashes(&self, world: &World, mutant: Mutant) -> Result<Vec<Self>, Promise>;

    /// Whether it is about to begin a round.
    fn is_between_rounds(&self) -> bool;

    /// Goes around once.
    fn go_around(&mut self, world: &mut World, mutant: Mutant) -> Result<(), Promise>;

    /// Whether all is done, now that nothing happens any more.
    fn check_end(&self, world: &World) -> Result<(), Promise>;

    /// All that tells it apart from others, as far as it can matter.
    fn key(&self, world: &World, key: &mut Vec<u8>);
}

#[derive(Clone)]
struct State<C> {
    world: Rc<World>,
    client: Rc<C>,
    crashes: u8,
}

impl<C: Client> State<C> {
    fn new(scope: &Scope) -> Self {
        let (world, client) = (World::new(&scope.keys), C::new(scope));
        Self { world: Rc::new(world), client: Rc::new(client), crashes: scope.crashes }
    }

    fn next(&self, mutant: Mutant) -> Result<Vec<Self>, Promise> {
        let mut next = Vec::new();
        if self.crashes > 0 {
            for client in self.client.crashes(&self.world, mutant)? {
                next.push(Self { client: Rc::new(client), crashes: self.crashes - 1, ..self.clone() });
            }
        }
        for world in self.world.steps(mutant) {
            next.push(Self { world: Rc::new(world), ..self.clone() });
        }
        for (world, client) in self.client.steps(&self.world, mutant)? {
            next.push(Self { world, client: Rc::new(client), crashes: self.crashes });
        }
        Ok(next)
    }

    fn key(&self) -> Vec<u8> {
        let mut key = Vec::with_capacity(64);
        key.push(self.crashes);
        self.world.key(&mut key);
        self.client.key(&self.world, &mut key);
        key
    }

    /// Goes on until nothing changes any more, and looks whether all is done then.
    fn check_end(&self, mutant: Mutant) -> Result<(), Promise> {
        /// Far more than a gap takes that everybody has let go of.
        const ROUNDS_MAX: usize = 40;
        let mut last = self.clone();
        for _ in 0..ROUNDS_MAX {
            let before = last.key();
            Rc::make_mut(&mut last.client).go_around(Rc::make_mut(&mut last.world), mutant)?;
            if last.key() == before {
                return last.client.check_end(&last.world);
            }
        }
        Err(Promise::I7)
    }

    fn is_at_end(&self) -> bool {
        self.world.is_done() && self.client.is_between_rounds()
    }
}

/// What was gone through.
#[derive(Debug, Default)]
struct Explored {
    states: usize,
    ends: usize,
    broken: Option<Promise>,
}

/// Goes through all interleavings, until a promise is broken.
fn explore<C: Client>(scope: &Scope, mutant: Mutant) -> Explored {
    let mut explored = Explored::default();
    let mut known = HashSet::new();
    let mut todo = vec![State::<C>::new(scope)];
    while let Some(state) = todo.pop() {
        explored.states += 1;
        let next = state.next(mutant);
        let end = if state.is_at_end() { state.check_end(mutant) } else { Ok(()) };
        explored.ends += usize::from(state.is_at_end());
        match end.and(next) {
            Ok(next) => todo.extend(next.into_iter().filter(|next| known.insert(next.key()))),
            Err(promise) => {
                explored.broken = Some(promise);
                return explored;
            }
        }
    }
    explored
}

/// Takes steps at random until nothing happens any more.
fn run<C: Client>(scope: &Scope, mutant: Mutant, random: &mut fastrand::Rng) -> Result<(), Promise> {
    let mut state = State::<C>::new(scope);
    while !state.is_at_end() {
        let mut next = state.next(mutant)?;
        state = next.swap_remove(random.usize(..next.len()));
    }
    state.check_end(mutant)
}

// ---- States as bytes.

fn set_key(places: &SeqSet) -> u8 {
    places.iter().fold(0, |bits, place| bits | 1 << place.0)
}

fn holders_key(holders: &BTreeSet<Holder>) -> [u8; 2] {
    let bit = |holder: &Holder| {
        let at: u32 = holder.transaction.parse().expect("a transaction's index");
        at * 2 + u32::from(holder.pid.is_none())
    };
    holders.iter().fold(0_u16, |bits, holder| bits | 1 << bit(holder)).to_be_bytes()
}

/// Groups are told apart by what they are of, what is known of them, and whether a checkpoint under way began after them.
fn gaps_key(gaps: &Gaps, world: &World, seen: Option<u64>, key: &mut Vec<u8>) {
    for group in &gaps.groups {
        let (stage, holders) = match &group.locks {
            Locks::Unread => (0, [0, 0]),
            Locks::Holders(holders) => (1, holders_key(holders)),
            Locks::Prepared(holders) => (2, holders_key(holders)),
        };
        let is_older = seen.is_some_and(|seen| group.number <= seen);
        let bound = group.bound.map_or(u8::MAX, |bound| world.rank(bound));
        key.extend([set_key(&group.places), bound, u8::from(is_older), stage]);
        key.extend(holders);
    }
    key.push(u8::MAX);
}

// ---- The tests.

/// Whether more is asked for than the gate has time for.
fn is_full() -> bool {
    let full = std::env::var_os("OUTBUS_MODEL_FULL").is_some();
    tell(&format!("OUTBUS_MODEL_FULL={}", if full { "1" } else { "" }));
    full
}

fn tell(line: &str) {
    use std::io::Write as _;
    writeln!(std::io::stderr(), "{line}").expect("stderr takes it");
}

fn every_interleaving<C: Client>(states_min: usize) {
    let pages: &[usize] = if is_full() { &[1, 2, 3] } else { &[3] };
    for page_rows in pages {
        let (scope, started) = (small(*page_rows), std::time::Instant::now());
        let explored = explore::<C>(&scope, Mutant::None);
        tell(&format!("{scope:?}: {explored:?} in {:?}", started.elapsed()));
        assert_eq!(explored.broken, None);
        assert!(explored.states > states_min && explored.ends > 100, "only {explored:?}");
    }
}

/// Catches these mutants of the code itself: a bound that is one too low, one that holds for gaps seen later, locks that
/// count unread, no second round for prepared transactions, a cursor that passes or forgets what is unseen, also when it
/// is restored.
#[test]
fn every_interleaving_keeps_every_promise_in_key_order() {
    every_interleaving::<Relay>(1_000);
}

/// Catches these mutants of the code itself: a row handed out above a gap, a dead gap that stays, locks that count unread,
/// no second round for prepared transactions.
#[test]
fn every_interleaving_keeps_every_promise_in_log_order() {
    every_interleaving::<Reader>(1_000);
}

fn each_mutant_breaks_a_promise<C: Client>() {
    for (mutant, crashes, promises) in C::MUTANTS {
        let started = std::time::Instant::now();
        let explored = explore::<C>(&Scope { crashes: *crashes, ..small(3) }, *mutant);
        tell(&format!("{mutant:?}: {explored:?} in {:?}", started.elapsed()));
        let broken = explored.broken.unwrap_or_else(|| panic!("{mutant:?} is not caught"));
        assert!(promises.contains(&broken), "{mutant:?} breaks {broken:?}");
    }
}

#[test]
fn each_mutant_breaks_a_promise_in_key_order() {
    each_mutant_breaks_a_promise::<Relay>();
}

#[test]
fn each_mutant_breaks_a_promise_in_log_order() {
    each_mutant_breaks_a_promise::<Reader>();
}

/// Many transactions, several crashes, pages of any size: more than can be gone through, so at random.
fn seeded_runs<C: Client>() {
    let runs = if is_full() { 20_000 } else { 500 };
    let seed =
        std::env::var("OUTBUS_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| fastrand::u64(..));
    tell(&format!("OUTBUS_SEED={seed}, {runs} runs"));
    for run_number in 0..runs {
        let mut random = fastrand::Rng::with_seed(seed.wrapping_add(run_number));
        // As many as a state's bytes can tell apart.
        let keys = (0..random.usize(2..8)).map(|_| random.usize(..3)).collect();
        let scope = Scope { keys, crashes: random.u8(..4), page_rows: random.usize(1..5) };
        let outcome = run::<C>(&scope, Mutant::None, &mut random);
        assert_eq!(outcome, Ok(()), "{scope:?}, OUTBUS_SEED={}", seed.wrapping_add(run_number));
    }
}

/// Catches a cursor that passes what is unseen, and one that forgets it.
#[test]
fn seeded_runs_keep_every_promise_in_key_order() {
    seeded_runs::<Relay>();
}

/// Catches a row handed out above a gap, a dead gap that stays, and locks that count unread.
#[test]
fn seeded_runs_keep_every_promise_in_log_order() {
    seeded_runs::<Reader>();
}
