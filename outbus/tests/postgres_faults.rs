//! The binary against a PostgreSQL that is away, full, read-only or taken over from, and against its own sleep. Each test
//! says which mutant it catches.

#[path = "../../outbox/tests/support/server.rs"]
mod private;
mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    process::Child,
    time::Instant,
};

use private::Server;
use serde_json::Value;
use support::{Folder, PostgresDatabase, finish, lines, signal, until};

/// A relay whose standard error goes to a file; killed at the end whatever happens.
struct Daemon {
    child: Option<Child>,
    log: std::path::PathBuf,
}

impl Daemon {
    fn start(folder: &Folder, name: &str, args: &[&str]) -> Self {
        let log = folder.path(name);
        let file = File::create(&log).expect("a file");
        let child = folder.command(args).stderr(file).spawn().expect("it starts");
        Self { child: Some(child), log }
    }

    fn id(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    fn said(&self) -> String {
        std::fs::read_to_string(&self.log).expect("its standard error")
    }

    fn until_said(&mut self, what: &str) {
        until(&format!("{what:?} on standard error"), || {
            let ended = self.child.as_mut().expect("it runs").try_wait().expect("a status");
            assert!(ended.is_none(), "it ended: {}", self.said());
            self.said().contains(what)
        });
    }

    fn stop(mut self) -> String {
        let child = self.child.take().expect("it runs");
        signal(child.id(), "TERM");
        finish(child).ok();
        self.said()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Stops a process, and waits until each of its threads has.
fn put_to_sleep(process: u32) {
    signal(process, "STOP");
    until("a stopped process", || {
        let threads = std::fs::read_dir(format!("/proc/{process}/task")).expect("its threads");
        threads.flatten().all(|thread| {
            let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('T'))
        })
    });
}

fn status(folder: &Folder, url: &str) -> Value {
    folder.run(&["status", "--database", url, "--output", "json"]).ok().json()["logs"][0].clone()
}

fn append(folder: &Folder, url: &str, prefix: &str, count: usize) {
    let ran = folder.run_with_input(&["append", "--database", url], lines(prefix, count).as_bytes());
    ran.ok();
}

/// Everything that was published, once each, is `<prefix>-0..count` of these; each key's first occurrences are in order.
fn check(folder: &Folder, committed: &[(&str, usize)]) {
    let published = folder.published("orders");
    let mut expected = BTreeMap::new();
    for (prefix, count) in committed {
        for n in 0..*count {
            expected.insert(format!("{prefix}-{n}"), (format!("k{}", n % 5), expected.len()));
        }
    }
    let (mut seen, mut latest) = (BTreeSet::new(), BTreeMap::new());
    for id in published.iter().filter(|id| seen.insert(*id)) {
        let (key, place) = expected.get(id).unwrap_or_else(|| panic!("{id} is invented"));
        let before = latest.insert(key, *place);
        assert!(before.is_none_or(|before| before < *place), "{id} came behind a later event of its key");
    }
    assert_eq!(seen.len(), expected.len(), "some are lost");
}

/// An owner that sleeps past its lease, idle and at work: a standby takes over and loses nothing. When the sleeper wakes,
/// what its bus already held may land, no more; it moves no cursor, and stands by. Catches the mutant whose checkpoint does
/// not look at the epoch; one that does not look at its clock is caught by `outbox/tests/postgres_faults.rs`.
#[test]
#[ignore = "needs PostgreSQL: cargo xtask test"]
fn an_owner_that_sleeps_past_its_lease_becomes_a_standby() {
    const WINDOW: usize = 64;
    let (folder, database) = (Folder::new(), PostgresDatabase::create());
    let url = database.url.as_str();
    folder.run(&["migrate", "--database", url]).ok();
    folder.write("outbus.toml", &format!(
        "[database]\nurl = \"{url}\"\n[bus]\nurl = \"{}\"\n[relay]\nlease = \"2s\"\nretention = \"never\"\nwindow_events = {WINDOW}\n",
        folder.bus_url()
    ));
    let owned = |epoch: u64, settled: usize| {
        let status = status(&folder, url);
        status["epoch"] == epoch && status["low"] == settled && !status["owner"].is_null()
    };
    let mut first = Daemon::start(&folder, "first", &["relay"]);
    first.until_said("(epoch 1)");
    append(&folder, url, "a", 500);
    until("the first relay settles", || owned(1, 500));

    // Asleep while it has nothing to do.
    put_to_sleep(first.id());
    let mut second = Daemon::start(&folder, "second", &["relay"]);
    second.until_said("(epoch 2)");
    append(&folder, url, "b", 500);
    until("the second relay settles", || owned(2, 1_000));
    signal(first.id(), "CONT");
    first.until_said("standby of");
    assert_eq!(folder.published("orders").len(), 1_000, "it published what another one had");
    assert!(owned(2, 1_000), "it moved the cursor: {}", status(&folder, url));

    // Asleep at work.
    folder.write("more.jsonl", &lines("c", 6_000));
    let mut appending =
        folder.command(&["append", "--file", "more.jsonl", "--per-tx", "50"]).spawn().expect("it starts");
    until("some events", || folder.published("orders").len() > 2_000);
    // One that falls asleep while it writes to the file keeps it locked.
    until("it sleeps and does not write", || {
        put_to_sleep(second.id());
        let is_free = File::open(folder.path("bus/orders.jsonl")).expect("the file").try_lock().is_ok();
        if !is_free {
            signal(second.id(), "CONT");
        }
        is_free
    });
    let asleep = folder.published("orders").len();
    first.until_said("(epoch 3)");
    assert!(appending.wait().expect("it ends").success());
    until("the first relay settles", || owned(3, 7_000));
    let before = folder.published("orders").len();
    assert!(asleep < 7_000, "it slept too late: {asleep}");
    signal(second.id(), "CONT");
    second.until_said("standby of");
    append(&folder, url, "d", 100);
    until("the first relay settles", || owned(3, 7_100));
    first.stop();
    second.stop();
    let late = folder.published("orders").len() - before - 100;
    assert!(late <= WINDOW, "{late} events landed late");
    let repeated = before - 7_000;
    assert!(repeated <= WINDOW + 4_096, "{repeated} events were repeated");
    check(&folder, &[("a", 500), ("b", 500), ("c", 6_000), ("d", 100)]);
}

/// A server, a role or a database that takes no more connections: each command says so and what to do, and a relay goes on
/// by itself, whether it starts then or runs already. Catches the mutants that take it for an error that waiting does not
/// mend.
#[test]
#[ignore = "needs PostgreSQL: cargo xtask test"]
fn too_many_connections_are_said_and_waited_for() {
    let server = Server::with_options("-c max_connections=14 -c max_wal_senders=0");
    let (folder, url) = (Folder::new(), server.url.as_str());
    folder.run(&["migrate", "--database", url]).ok();
    support::run_sql(
        url,
        "CREATE ROLE few LOGIN PASSWORD 'few' CONNECTION LIMIT 0; CREATE ROLE many LOGIN PASSWORD 'many'",
    );
    support::run_sql(url, "CREATE DATABASE narrow CONNECTION LIMIT 0");
    let as_few = url.replace("outbus:outbus@", "few:few@");
    let narrow = server.url_of("narrow").replace("outbus:outbus@", "many:many@");
    let event = "{\"topic\":\"orders\",\"type\":\"order.placed\",\"id\":\"n-0\"}\n";
    let refused = |url: &str| {
        for args in [&["status"][..], &["append"], &["migrate"], &["dead", "list"], &["sinks", "list"]] {
            let ran = folder.run_with_input(&[args, &["--database", url]].concat(), event.as_bytes()).is(1);
            assert_eq!(ran.stderr.lines().count(), 1, "{args:?}: {}", ran.stderr);
            for says in ["connection limit", "max_connections", "pooler"] {
                assert!(ran.stderr.contains(says), "{args:?}: {}", ran.stderr);
            }
        }
    };
    refused(&as_few);
    refused(&narrow);

    let bus = folder.bus_url();
    let relay = ["relay", "--database", url, "--bus", &bus];
    append(&folder, url, "a", 10);
    let full = support::Connections::fill(url);
    refused(url);
    let mut started = Daemon::start(&folder, "relay", &relay);
    started.until_said("max_connections");
    drop(full);
    until("it goes on", || folder.published("orders").len() == 10);

    // It runs already, and loses its connections to others.
    let full = support::Connections::take_from(url, "outbus");
    started.until_said("cannot be used");
    full.run(
        "INSERT INTO outbus.outbox (id, topic, key, type, data) \
         SELECT 'b-' || n, 'orders', 'k' || n % 5, 'order.placed', '1' FROM generate_series(0, 9) n",
    );
    let waiting = Instant::now();
    while waiting.elapsed().as_millis() < 500 {
        assert_eq!(folder.published("orders").len(), 10, "it has no connection");
    }
    drop(full);
    until("it goes on", || folder.published("orders").len() == 20);
    started.stop();
    check(&folder, &[("a", 10), ("b", 10)]);
}

/// A streaming standby: `status` reads it, what writes says that it is read-only and what to do, and a relay waits until
/// the standby is promoted, and goes on as a new incarnation without skipping anything. Catches the mutants that take a
/// read-only server for an error that waiting does not mend, and that do not look at the timeline.
#[test]
#[ignore = "needs PostgreSQL: cargo xtask test"]
fn a_standby_is_waited_for_until_it_is_promoted() {
    let primary = Server::start();
    let folder = Folder::new();
    folder.run(&["migrate", "--database", &primary.url]).ok();
    append(&folder, &primary.url, "a", 100);
    let bus = folder.bus_url();
    folder.run(&["relay", "--once", "--database", &primary.url, "--bus", &bus]).ok();
    support::run_sql(&primary.url, "CREATE DATABASE empty");
    let standby = Server::standby_of(&primary);
    append(&folder, &primary.url, "b", 50);
    let url = standby.url.as_str();
    until("the standby has it", || status(&folder, url)["backlog"] == 50);
    let incarnation = || {
        let rows = support::query_sql(url, "SELECT incarnation, history FROM outbus.cursor");
        rows.into_iter().next().expect("a sink")
    };
    let before = incarnation();

    let event = "{\"topic\":\"orders\",\"type\":\"order.placed\",\"id\":\"n-0\"}\n";
    let empty = standby.url_of("empty");
    for args in [
        &["append", "--database", url][..],
        &["sinks", "remove", "main", "--database", url],
        &["migrate", "--database", &empty],
    ] {
        let ran = folder.run_with_input(args, event.as_bytes()).is(1);
        assert_eq!(ran.stderr.lines().count(), 1, "{args:?}: {}", ran.stderr);
        assert!(ran.stderr.contains("read-only standby; point the URL at the primary"), "{args:?}: {}", ran.stderr);
    }
    // Where nothing is missing, nothing is written.
    folder.run(&["migrate", "--database", url]).ok();
    folder.run(&["dead", "list", "--database", url]).ok();

    let mut relay = Daemon::start(&folder, "relay", &["relay", "--database", url, "--bus", &bus]);
    relay.until_said("read-only standby; point the URL at the primary");
    primary.run(&["immediate", "postgres"]);
    standby.run(&["promote", "postgres"]);
    until("it goes on", || folder.published("orders").len() >= 150);
    append(&folder, url, "c", 50);
    until("it goes on", || folder.published("orders").len() >= 200);
    let after = incarnation();
    assert_ne!(before.0, after.0, "what a broker remembers is believed");
    assert!(before.1.ends_with("/00000001") && after.1.ends_with("/00000002"), "{before:?} {after:?}");
    relay.stop();
    check(&folder, &[("a", 100), ("b", 50), ("c", 50)]);
}
