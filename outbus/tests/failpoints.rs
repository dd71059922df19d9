//! `kill -9` at every named point of the relay: whatever it had done by then, its successor loses, invents and reorders
//! nothing. Random kills seldom meet what lies between two steps; these do.
//!
//! A relay is started with the name of a point in its environment, and dies there; the next one goes on with the next
//! point. What they published in turn is compared with what was appended.

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::Instant,
};

use support::{Folder, PostgresDatabase, Ran, finish, root};

/// Events that are appended before each kill, and the window of the relays.
const CHUNK: usize = 1_200;
const WINDOW: usize = 64;
/// Settled events after which a checkpoint is written at the latest.
const CHECKPOINT_EVENTS: usize = 4_096;

/// Where a relay is killed: a point's name, the times of reaching it that kill, and whether only PostgreSQL has it. The
/// janitor's come first: a janitor that is killed keeps others away for a minute.
const POINTS: [(&str, &[u32], bool); 15] = [
    ("in-prune", &[1], false),
    ("before-vacuum", &[1], true),
    ("after-acquire", &[1], false),
    ("after-checkpoint", &[1, 2], false),
    ("after-confirmation", &[1, 4], false),
    ("after-fetch", &[1, 5], false),
    ("after-probe", &[1], true),
    ("after-publish", &[1, 4], false),
    ("before-checkpoint", &[1, 2], false),
    ("before-publish", &[1, 6], false),
    ("before-release", &[1], false),
    ("in-acquire", &[1], false),
    ("in-commit", &[1], false),
    ("in-drain", &[1], false),
    ("mid-batch", &[1, 2, 7], false),
];

/// What a test knows of a database.
trait Log {
    /// Adds what makes every point be reached: a row that is no event, and a place that was rolled back.
    fn disturb(&self, round: usize);
    fn is_postgres(&self) -> bool;
}

struct Sqlite<'a>(&'a Folder);

impl Log for Sqlite<'_> {
    fn disturb(&self, round: usize) {
        let row = format!(
            "INSERT INTO outbus_outbox (id, topic, key, type, data) VALUES ('bad-{round}', 'orders', 'bad', '', '1')"
        );
        self.0.sqlite(&row);
    }

    fn is_postgres(&self) -> bool {
        false
    }
}

impl Log for PostgresDatabase {
    fn disturb(&self, round: usize) {
        self.run(&format!(
            "BEGIN; INSERT INTO outbus.outbox (topic, type, data) VALUES ('orders', 'order.placed', '1'); ROLLBACK; \
             INSERT INTO outbus.outbox (id, topic, key, type, data) VALUES ('bad-{round}', 'orders', 'bad', '', '1')"
        ));
    }

    fn is_postgres(&self) -> bool {
        true
    }
}

/// Catches a checkpoint that covers what is not confirmed, and a successor that forgets the holes (each tried, and both are
/// among `cargo xtask mutants`).
#[test]
#[cfg_attr(not(feature = "failpoints"), ignore = "needs the feature failpoints: cargo xtask test")]
fn a_relay_that_is_killed_at_any_point_loses_invents_and_reorders_nothing() {
    let folder = Folder::migrated();
    kill_at_every_point(&folder, "sqlite:shop.db", &Sqlite(&folder));
}

#[test]
#[cfg_attr(not(feature = "failpoints"), ignore = "needs the feature failpoints and PostgreSQL: cargo xtask test")]
#[cfg_attr(feature = "failpoints", ignore = "needs PostgreSQL: cargo xtask test")]
fn a_relay_that_is_killed_at_any_point_loses_invents_and_reorders_nothing_on_postgres() {
    let (folder, database) = (Folder::new(), PostgresDatabase::create());
    folder.run(&["migrate", "--database", &database.url]).ok();
    kill_at_every_point(&folder, &database.url, &database);
}

fn kill_at_every_point(folder: &Folder, url: &str, log: &dyn Log) {
    // Rows are removed as soon as they are settled: what is lost then is gone for good.
    folder.write("outbus.toml", &format!(
        "[database]\nurl = \"{url}\"\n[bus]\nurl = \"{}\"\n[relay]\nlease = \"300ms\"\nretention = \"0s\"\nwindow_events = {WINDOW}\n",
        folder.bus_url()
    ));
    let cases = POINTS.iter().filter(|(.., only_postgres)| !only_postgres || log.is_postgres());
    let cases: Vec<String> =
        cases.flat_map(|(name, times, _)| times.iter().map(move |times| format!("{name}:{times}"))).collect();
    for (round, point) in cases.iter().enumerate() {
        log.disturb(round);
        folder.run_with_input(&["append", "--per-tx", "50"], events(round).as_bytes()).ok();
        let started = Instant::now();
        let killed = relay(folder, Some(point));
        assert!(killed.status == -1 && started.elapsed() < support::DEADLINE, "{point} is not reached: {killed:?}");
    }
    let last = relay(folder, None);
    // The rows that are no events are parked.
    assert_eq!(last.status, 1, "{last:?}");
    let status = folder.run(&["status", "--output", "json"]).ok().json()["logs"][0].clone();
    assert_eq!((&status["backlog"], &status["holes"], &status["parked"]), (&0.into(), &0.into(), &cases.len().into()));
    let mut repeated = 0;
    for topic in ["orders", "returns"] {
        repeated += check(&folder.published(topic), topic, cases.len());
    }
    assert!(repeated <= cases.len() * (WINDOW + CHECKPOINT_EVENTS), "{repeated} events were published again");
}

fn relay(folder: &Folder, point: Option<&str>) -> Ran {
    // The janitor comes round while a relay stays.
    let stays = point.is_some_and(|point| point.starts_with("in-prune") || point.starts_with("before-vacuum"));
    let mut relay = folder.command(if stays { &["relay"] } else { &["relay", "--once"] });
    relay.env_remove("OUTBUS_FAILPOINT");
    if let Some(point) = point {
        relay.env("OUTBUS_FAILPOINT", point);
    }
    finish(relay.spawn().expect("it starts"))
}

/// JSON lines of one round's events: two topics with five keys each.
fn events(round: usize) -> String {
    let line = |n: usize| {
        format!(
            "{{\"topic\":\"{}\",\"type\":\"order.placed\",\"id\":\"{}\",\"partitionkey\":\"k{}\",\"data\":{n}}}\n",
            topic(n),
            id(round, n),
            n % 10
        )
    };
    (0..CHUNK).map(line).collect()
}

fn topic(n: usize) -> &'static str {
    if n.is_multiple_of(2) { "orders" } else { "returns" }
}

fn id(round: usize, n: usize) -> String {
    format!("{round}-{n}")
}

/// Every event of the topic is there, each key's first occurrences in order, and what came again came as a replay: each
/// occurrence is followed by the next of its key, or by one that was there before, and the last is the newest. Answers how
/// many came again.
fn check(published: &[String], of: &str, rounds: usize) -> usize {
    let all = (0..rounds).flat_map(|round| (0..CHUNK).map(move |n| (round, n))).filter(|(_, n)| topic(*n) == of);
    let mut keys: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    all.for_each(|(round, n)| keys.entry(n % 10).or_default().push(id(round, n)));
    let expected: BTreeSet<&String> = keys.values().flatten().collect();
    let found: BTreeSet<&String> = published.iter().collect();
    assert_eq!(expected.difference(&found).count(), 0, "lost");
    assert_eq!(found.difference(&expected).count(), 0, "invented");
    for ids in keys.values() {
        let place: BTreeMap<&String, usize> = ids.iter().enumerate().map(|(at, id)| (id, at)).collect();
        let places: Vec<usize> = published.iter().filter_map(|id| place.get(id).copied()).collect();
        assert_eq!(places.first(), Some(&0));
        for pair in places.windows(2) {
            assert!(pair[1] <= pair[0] + 1, "{} is followed by {}", ids[pair[0]], ids[pair[1]]);
        }
        assert_eq!(places.last(), Some(&(ids.len() - 1)), "the last record of a key is its newest");
    }
    published.len() - found.len()
}

/// A point that is added to the road is added to this test.
#[test]
fn every_point_of_the_road_is_tried() {
    let mut named = BTreeSet::new();
    for folder in ["bus-core/src", "outbox/src"] {
        collect(&root().join(folder), &mut named);
    }
    let tried: BTreeSet<String> = POINTS.iter().map(|(name, ..)| (*name).to_owned()).collect();
    assert_eq!(named, tried);
}

fn collect(folder: &Path, named: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).expect("a folder of sources") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            collect(&path, named);
            continue;
        }
        let text = std::fs::read_to_string(&path).expect("a source");
        let points = text.split("failpoint(\"").skip(1).filter_map(|rest| rest.split_once("\")"));
        named.extend(points.map(|(name, _)| name.to_owned()));
    }
}
