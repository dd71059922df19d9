//! The relay on a real PostgreSQL, against everything that writers, other sessions and a bad connection do to it. A ledger
//! compares what was committed with what was published. Each test says which mutant it catches.

#[path = "support/database.rs"]
mod database;
#[path = "support/ledger.rs"]
mod ledger;
#[path = "support/server.rs"]
mod private;
mod support;
#[path = "support/writer.rs"]
mod writer;

use std::{
    collections::BTreeSet,
    io::Write as _,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bus_core::{OrderOnFailure, Seq};
use database::{Database, server};
use ledger::{UNCHECKED_MAX, check_ledger, duplicates};
use outbox::{LogAdmin, Relay, RelayConfig, Selected};
use private::Server;
use support::{Running, ScriptedBus, config, event, ids, until, within};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use writer::seed;

const FAIL_STOP: OrderOnFailure = OrderOnFailure::FailStop;
const INDEPENDENT: OrderOnFailure = OrderOnFailure::Independent;

async fn relay(database: &Database, bus: &ScriptedBus, config: RelayConfig) -> Relay {
    Relay::new(database.log("main").await, bus.arc(), config).expect("a relay").wake(database.outbox.wake_signal())
}

/// Writers side by side with rollbacks, savepoints, two-phase commit, serialization failures and sleeps, a transaction
/// that stays open all the time, and a relay that is killed or stopped again and again. Catches the mutants that probe
/// before they fetch (reorders) and that close gaps by locks blind to prepared transactions (loses); each was tried.
async fn writers_against_a_relay(order: OrderOnFailure) {
    let database = Arc::new(Database::create().await);
    let seed = seed();
    let mut idle = database.client().await;
    let open = idle.transaction().await.expect("a transaction");
    open.batch_execute(&database.sql("CREATE TABLE {p}foreign_work (); SELECT pg_current_xact_id()"))
        .await
        .expect("an xid");
    let stop = Arc::new(AtomicBool::new(false));
    let writers = writer::start(&database, seed, &stop).await;
    let bus = ScriptedBus::new(order);
    let config = RelayConfig { lease: Duration::from_millis(400), window_events: 256, ..config() };
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut killed, mut repeated_max) = (false, 0);
    for round in 0..6 {
        let running = Running::start(relay(&database, &bus, config.clone()).await);
        tokio::time::sleep(Duration::from_millis(random.u64(400..1_200))).await;
        repeated_max += if killed { config.window_events + UNCHECKED_MAX } else { 0 };
        let repeated = duplicates(&bus.stored());
        assert!(repeated <= repeated_max, "seed {seed}, round {round}: {repeated} duplicates");
        killed = random.u8(..3) > 0;
        if killed {
            running.kill().await;
        } else {
            // An end in order repeats nothing: whatever comes again until the next end is the fault of earlier ones.
            running.stop().await;
            repeated_max = duplicates(&bus.stored());
        }
    }
    repeated_max += if killed { config.window_events + UNCHECKED_MAX } else { 0 };
    stop.store(true, Ordering::SeqCst);
    writers.join_all().await;
    let running = Running::start(relay(&database, &bus, config).await);
    check_ledger(&database, &bus, repeated_max).await;
    // The open transaction wrote nothing of this log: its gaps close all the same.
    until("no hole is left", async || database.admin().await.status().await.expect("a status")[0].holes == 0).await;
    open.rollback().await.expect("it ends");
    running.stop().await;
    assert!(bus.stored().len() > 200, "only {} events", bus.stored().len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn whatever_writers_do_is_published_in_order_on_a_fail_stop_bus() {
    writers_against_a_relay(FAIL_STOP).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn whatever_writers_do_is_published_in_order_on_an_independent_bus() {
    writers_against_a_relay(INDEPENDENT).await;
}

/// A transaction that holds a place of this log open delays nobody but itself; what it holds is published when it commits.
/// Catches the mutant that waits at a gap.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn an_open_transaction_of_this_log_delays_only_itself() {
    let (database, bus) = (Database::create().await, ScriptedBus::new(FAIL_STOP));
    let running = Running::start(relay(&database, &bus, config()).await);
    let mut slow = database.client().await;
    let mut open = slow.transaction().await.expect("a transaction");
    database.outbox.append(&mut open, [event("slow", 0)]).await.expect("it is appended");
    database.append((0..100).map(|n| event("quick", n))).await;
    bus.until_stored(100).await;
    let status = database.admin().await.status().await.expect("a status").remove(0);
    assert!(status.low < Seq(2), "its place is not settled");
    assert!(status.oldest_transaction.is_some(), "somebody keeps its gap open");
    assert_eq!((status.backlog, status.oldest_age), (0, None), "what is not committed is no backlog");
    open.commit().await.expect("it commits");
    database.outbox.wake();
    bus.until_stored(101).await;
    until("no hole is left", async || database.admin().await.status().await.expect("a status")[0].holes == 0).await;
    running.stop().await;
}

/// `--once` ends when everything that was committed before it began is settled: an open transaction's places and those
/// that were rolled back hold nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn once_waits_for_no_open_transaction() {
    let (database, bus) = (Database::create().await, ScriptedBus::new(FAIL_STOP));
    let (mut slow, mut failed) = (database.client().await, database.client().await);
    let mut open = slow.transaction().await.expect("a transaction");
    database.outbox.append(&mut open, [event("slow", 0)]).await.expect("it is appended");
    database.append([event("a", 0)]).await;
    let mut rolled_back = failed.transaction().await.expect("a transaction");
    database.outbox.append(&mut rolled_back, [event("never", 0)]).await.expect("it is appended");
    rolled_back.rollback().await.expect("it rolls back");
    let mut once = relay(&database, &bus, config()).await;
    within("the end", once.run_once(std::future::pending())).await.expect("it ends in order");
    assert_eq!(ids(&bus.stored()), ["a-0"]);
    open.commit().await.expect("it commits");
    let mut once = relay(&database, &bus, config()).await;
    within("the end", once.run_once(std::future::pending())).await.expect("it ends in order");
    assert_eq!(ids(&bus.stored()), ["a-0", "slow-0"]);
}

/// Two relays that start together, `OUTBUS_ROUNDS` times: one owns the log, and nothing is published twice. Catches the
/// mutant that reads the lease without locking its row.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn of_two_relays_that_start_together_one_publishes() {
    let (database, bus) = (Database::create().await, ScriptedBus::new(FAIL_STOP));
    let rounds = std::env::var("OUTBUS_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(20);
    writeln!(std::io::stderr(), "OUTBUS_ROUNDS={rounds}").expect("stderr takes it");
    for round in 0..rounds {
        database.append((0..20).map(|n| event("a", round * 20 + n))).await;
        let both = [relay(&database, &bus, config()).await, relay(&database, &bus, config()).await];
        let both = both.map(Running::start);
        bus.until_stored((round + 1) * 20).await;
        for running in both {
            running.stop().await;
        }
    }
    assert_eq!(ids(&bus.stored()), (0..rounds * 20).map(|n| format!("a-{n}")).collect::<Vec<_>>());
}

/// What a relay that is killed had settled since its last checkpoint is published again, and no more; one that is stopped
/// repeats nothing. Catches the mutants that write no checkpoints while they work, and that stop without one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn a_crash_repeats_no_more_than_was_unchecked_and_a_stop_nothing() {
    let (database, bus) = (Database::create().await, ScriptedBus::new(FAIL_STOP));
    // Renewing the lease is a checkpoint too; here it comes too late to help.
    let config = RelayConfig { lease: Duration::from_secs(60), window_events: 256, ..config() };
    let most = config.window_events + UNCHECKED_MAX;
    database.append((0..4 * most).map(|n| event(&format!("k{}", n % 7), n))).await;
    let running = Running::start(relay(&database, &bus, config.clone()).await);
    bus.until_stored(most).await;
    running.stop().await;
    let running = Running::start(relay(&database, &bus, config.clone()).await);
    bus.until_stored(3 * most).await;
    running.kill().await;
    assert_eq!(duplicates(&bus.stored()), 0, "after a stop");
    database.run("UPDATE {p}cursor SET lease_until = '-infinity'").await;
    let running = Running::start(relay(&database, &bus, config).await);
    check_ledger(&database, &bus, most).await;
    running.stop().await;
}

/// A restored dump draws places again that the cursor had settled: what stands there is published, and nothing is skipped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn a_restored_dump_repeats_and_skips_nothing() {
    let (database, bus) = (Database::create().await, ScriptedBus::new(FAIL_STOP));
    database.append((0..10).map(|n| event("a", n))).await;
    let once = async || {
        let mut once = relay(&database, &bus, config()).await;
        within("the end", once.run_once(std::future::pending())).await.expect("it ends in order");
    };
    once().await;
    database.run("DELETE FROM {p}outbox WHERE seq > 4; SELECT setval('{p}outbox_seq', 4)").await;
    database.append((0..10).map(|n| event("b", n))).await;
    once().await;
    let stored: BTreeSet<String> = ids(&bus.stored()).into_iter().collect();
    assert!((0..10).all(|n| stored.contains(&format!("b-{n}"))), "{stored:?}");
}

/// A proxy cuts the connection after ever more bytes, inside every statement and answer of the relay. Catches the mutant
/// that believes a commit whose answer was lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn a_connection_that_breaks_anywhere_loses_and_reorders_nothing() {
    let database = Database::create().await;
    database.run("CREATE TABLE {p}aggregate (id int)").await;
    let bus = ScriptedBus::new(FAIL_STOP);
    bus.refuse("k0-7");
    let proxy = Proxy::start(&server()).await;
    let through = database.at(&proxy.url);
    let config = RelayConfig { lease: Duration::from_secs(2), ..config() };
    let running = Running::start(relay(&through, &bus, config).await);
    for n in 0..60 {
        proxy.cut_after(200 + n * 137);
        database.append((0..4).map(|key| event(&format!("k{key}"), n as usize))).await;
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    proxy.cut_after(u64::MAX);
    until("everything is settled", async || {
        let status = database.admin().await.status().await.expect("a status").remove(0);
        status.backlog == 0 && status.parked > 0
    })
    .await;
    running.stop().await;
    assert!(proxy.cuts() > 20, "only {} cuts", proxy.cuts());
    let parked = database.admin().await.dead_letters(&Selected::default(), None, 1_000).await.expect("a list");
    let parked: BTreeSet<String> = parked.into_iter().map(|row| row.columns.id).collect();
    let stored = ids(&bus.stored());
    for id in database.committed().await {
        assert!(stored.contains(&id) || parked.contains(&id), "{id} is lost");
    }
    for key in 0..4 {
        let mut seen = BTreeSet::new();
        let of_key = bus.stored().into_iter().filter(|event| event.key() == Some(&*format!("k{key}")));
        let firsts: Vec<String> =
            of_key.map(|event| event.id().to_owned()).filter(|id| seen.insert(id.clone())).collect();
        let expected: Vec<String> = (0..60).map(|n| format!("k{key}-{n}")).filter(|id| !parked.contains(id)).collect();
        assert_eq!(firsts, expected);
    }
}

/// A TCP proxy whose connections end after so many bytes, in the middle of a message or not.
struct Proxy {
    url: String,
    left: Arc<AtomicU64>,
    cuts: Arc<AtomicU64>,
}

impl Proxy {
    async fn start(server: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let (head, rest) = server.split_once('@').expect("a user in the URL");
        let (target, path) = rest.split_once('/').expect("a database in the URL");
        let url = format!("{head}@{}/{path}?sslmode=disable", listener.local_addr().expect("an address"));
        let (target, left, cuts) = (target.to_owned(), Arc::new(AtomicU64::new(u64::MAX)), Arc::new(AtomicU64::new(0)));
        let proxy = Self { url, left: Arc::clone(&left), cuts: Arc::clone(&cuts) };
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let Ok(far) = TcpStream::connect(&target).await else { continue };
                let (left, cuts) = (Arc::clone(&left), Arc::clone(&cuts));
                tokio::spawn(async move {
                    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
                    tokio::select! {
                        () = pass(near_in, far_out, &left) => {}
                        () = pass(far_in, near_out, &left) => {}
                    }
                    cuts.fetch_add(1, Ordering::SeqCst);
                });
            }
        });
        proxy
    }

    fn cut_after(&self, bytes: u64) {
        self.left.store(bytes, Ordering::SeqCst);
    }

    fn cuts(&self) -> u64 {
        self.cuts.load(Ordering::SeqCst)
    }
}

async fn pass(mut from: impl AsyncReadExt + Unpin, mut to: impl AsyncWriteExt + Unpin, left: &AtomicU64) {
    let mut buffer = [0; 4_096];
    loop {
        let Ok(count @ 1..) = from.read(&mut buffer).await else { return };
        let before = left.load(Ordering::SeqCst);
        let may = usize::try_from(before).unwrap_or(usize::MAX).min(count);
        if before != u64::MAX {
            left.fetch_sub(may as u64, Ordering::SeqCst);
        }
        if to.write_all(&buffer[..may]).await.is_err() || may < count {
            // The next connection lives.
            left.store(u64::MAX, Ordering::SeqCst);
            return;
        }
    }
}

/// Whoever may insert may insert anything: a key that is too long for an event, and for an index, is parked with its row.
/// Catches the mutant that puts whole keys into an index: one such row ended every relay.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn a_row_with_a_huge_key_is_parked_and_the_others_flow() {
    let (database, bus) = (Database::create().await, ScriptedBus::new(FAIL_STOP));
    // Such that compressing it does not help.
    let keys = "SELECT string_agg(md5(n::text), '') FROM generate_series(1, 20000) n";
    database
        .run(&format!(
            "INSERT INTO {{p}}outbox (topic, type, key, data) SELECT 'orders', 'order.placed', ({keys}), '1'"
        ))
        .await;
    database.append([event("a", 0)]).await;
    let refused =
        database.sql("INSERT INTO {p}outbox (topic, type, key, data) VALUES ('o', 't', repeat('k', 1048577), '1')");
    assert!(database.client().await.batch_execute(&refused).await.is_err(), "the table has a limit");
    let running = Running::start(relay(&database, &bus, config()).await);
    bus.until_stored(1).await;
    let parked = async || database.admin().await.status().await.expect("a status")[0].parked;
    until("it is parked", async || parked().await == 1).await;
    running.stop().await;
    let key = Selected { parked: true, ..Selected::default() };
    let rows = database.admin().await.dead_letters(&key, None, 10).await.expect("a list");
    assert_eq!((rows.len(), rows[0].reason.as_str()), (1, "invalid"));
    // Its next owner loads the key, too.
    let mut once = relay(&database, &bus, config()).await;
    within("the end", once.run_once(std::future::pending())).await.expect("it ends in order");
}

/// The janitor gives the space free of what it removed, without waiting for autovacuum. How many dead rows are left is a
/// matter of the oldest transaction on the whole server, so it is measured on one of its own (R11).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn the_janitor_vacuums_what_it_removed() {
    let (database, bus) = (Database::create().await, ScriptedBus::new(FAIL_STOP));
    database.append((0..6_000).map(|n| event("a", n))).await;
    let config = RelayConfig { retention: Some(Duration::ZERO), ..config() };
    let running = Running::start(relay(&database, &bus, config).await);
    let vacuumed = async || -> i64 {
        let sql = "SELECT vacuum_count FROM pg_stat_user_tables WHERE schemaname = $1 AND relname = 'outbox'";
        database.client().await.query_one(sql, &[&database.schema]).await.expect("a count").get(0)
    };
    until("an empty table", async || database.committed().await.is_empty()).await;
    until("a vacuum", async || vacuumed().await > 0).await;
    running.stop().await;
}

/// A log that was empty when it was vacuumed counts as empty until it is analyzed. Catches the mutant whose statement is
/// planned for what should be there: it never ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn the_janitor_does_not_depend_on_statistics() {
    let (database, bus) = (Database::create().await, ScriptedBus::new(FAIL_STOP));
    let fill = "INSERT INTO {p}outbox (topic, type, data) SELECT 'orders', 'order.placed', '1'::bytea \
         FROM generate_series(1, {n})";
    database.run(&fill.replace("{n}", "1000")).await;
    database.run("DELETE FROM {p}outbox").await;
    database.run("VACUUM (ANALYZE, TRUNCATE false) {p}outbox").await;
    database.run(&fill.replace("{n}", "60000")).await;
    let config = RelayConfig { retention: Some(Duration::ZERO), ..config() };
    let running = Running::start(relay(&database, &bus, config).await);
    until("an empty table", async || database.committed().await.is_empty()).await;
    running.stop().await;
}

/// An event is heard of in another process by its notification.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn an_event_that_was_appended_elsewhere_is_published_without_a_poll() {
    let (database, bus) = (Database::create().await, ScriptedBus::new(FAIL_STOP));
    let config = RelayConfig { poll_interval: Duration::from_secs(3_600), ..config() };
    let relay = Relay::new(database.log("main").await, bus.arc(), config).expect("a relay");
    let running = Running::start(relay);
    for n in 0..20 {
        let elsewhere = database.at(&database.url);
        elsewhere.append([event("a", n)]).await;
        bus.until_stored(n + 1).await;
    }
    running.stop().await;
}

/// The server is killed, paused, shut down at once and started again while a service appends and a relay publishes: what
/// was committed is published, in order, without a restart of the relay. Catches the mutants that let a cursor pass what
/// the server's own crash took back, and that take a server's shutdown for an error that waiting does not mend.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn a_server_that_is_killed_and_paused_loses_and_reorders_nothing() {
    let server = Server::start();
    let (database, bus) = (Database::create_at(&server.url).await, ScriptedBus::new(FAIL_STOP));
    let config = RelayConfig { lease: Duration::from_secs(1), ..config() };
    let running = Running::start(relay(&database, &bus, config).await);
    let mut version = 0;
    for fault in ["kill", "pause", "immediate", "kill"] {
        append_versions(&database, &mut version, 40).await;
        server.run(&[fault, "postgres"]);
        // Nobody answers now: an append in vain must not make anything up.
        append_versions(&database, &mut version, 2).await;
        server.run(&[if fault == "pause" { "resume" } else { "start" }, "postgres"]);
        append_versions(&database, &mut version, 40).await;
    }
    // The relay lives, so it knows what it settled, whatever the server forgot.
    check_ledger(&database, &bus, 0).await;
    until("no hole is left", async || database.admin().await.status().await.expect("a status")[0].holes == 0).await;
    running.stop().await;
    assert!(bus.stored().len() >= 200, "only {} events", bus.stored().len());
}

/// Appends one event per transaction; what the server does not answer in time is left, committed or not.
async fn append_versions(database: &Database, version: &mut usize, count: usize) {
    let mut client = None;
    for _ in 0..count {
        *version += 1;
        let appending = async {
            if client.is_none() {
                let (opened, connection) = tokio_postgres::connect(&database.url, tokio_postgres::NoTls).await.ok()?;
                tokio::spawn(connection);
                client = Some(opened);
            }
            let mut transaction = client.as_mut()?.transaction().await.ok()?;
            database.outbox.append(&mut transaction, [event("k", *version)]).await.ok()?;
            transaction.commit().await.ok()
        };
        if !matches!(tokio::time::timeout(Duration::from_secs(1), appending).await, Ok(Some(()))) {
            client = None;
        }
        database.outbox.wake();
    }
}
