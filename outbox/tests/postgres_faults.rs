//! The relay on a real PostgreSQL against single faults, each brought about on purpose. Each test says which mutant it
//! catches.

#[path = "support/database.rs"]
mod database;
#[path = "support/ledger.rs"]
mod ledger;
#[path = "support/server.rs"]
mod private;
mod support;

use std::{
    collections::BTreeSet,
    io::Write as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use bus_core::{Event, OrderOnFailure, Seq};
use database::{Database, server};
use ledger::{UNCHECKED_MAX, check_ledger};
use outbox::{
    Acquire, Acquisition, LogAdmin, LogSource, Owned, PostgresLog, Progress, Relay, RelayConfig, RequestKind, Selected,
    SinkStatus, Start, TopicPattern,
};
use private::Server;
use support::{Running, ScriptedBus, config, event, ids, until, within};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tokio_postgres::{Client, Transaction};

const FAIL_STOP: OrderOnFailure = OrderOnFailure::FailStop;

async fn relay(database: &Database, sink: &str, bus: &ScriptedBus, config: RelayConfig) -> Relay {
    Relay::new(database.log(sink).await, bus.arc(), config).expect("a relay").wake(database.outbox.wake_signal())
}

async fn status_of(admin: &PostgresLog, sink: &str) -> Option<SinkStatus> {
    let status = admin.status().await.expect("a status");
    status.into_iter().find(|status| status.sink.as_deref() == Some(sink))
}

/// A connection of its own takes longer than a statement.
async fn append(database: &Database, client: &mut Client, events: impl IntoIterator<Item = Event>) {
    let mut transaction = client.transaction().await.expect("a transaction");
    database.outbox.append(&mut transaction, events).await.expect("it is appended");
    transaction.commit().await.expect("it commits");
    database.outbox.wake();
}

/// By plain SQL, which wakes nobody; answers the place.
async fn insert(database: &Database, transaction: &Transaction<'_>, id: &str) -> Seq {
    let sql = "INSERT INTO {p}outbox (id, topic, key, type, data) VALUES ($1, 'orders', split_part($1, '-', 1), \
         'order.placed', '1') RETURNING seq";
    let row = transaction.query_one(&database.sql(sql), &[&id]).await.expect("a row");
    Seq(row.get::<_, i64>(0).unsigned_abs())
}

async fn transaction(client: &mut Client) -> Transaction<'_> {
    let transaction = client.transaction().await.expect("a transaction");
    transaction.execute("SELECT pg_current_xact_id()", &[]).await.expect("a number");
    transaction
}

// ---- Who owns the log.

/// A relay that slept past its lease finds that another one came: it hands nothing over and moves no cursor, and stands
/// by. Catches the mutants whose owner does not look at its clock before it hands over, and whose checkpoint does not look
/// at the epoch.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn a_relay_that_slept_past_its_lease_hands_nothing_over_and_stands_by() {
    let (database, bus) = (Database::create().await, ScriptedBus::new(FAIL_STOP));
    let admin = database.admin().await;
    let config = RelayConfig { lease: Duration::from_secs(2), window_events: 64, ..config() };
    database.append((0..2_000).map(|n| event(&format!("k{}", n % 5), n))).await;
    let mut sleeper = relay(&database, "main", &bus, config.clone()).await;
    within("a start", async {
        while bus.stored().len() < 128 {
            sleeper.turn().await.expect("a turn");
            tokio::task::yield_now().await;
        }
    })
    .await;
    let handed_over = bus.handed_over();
    let other = Running::start(relay(&database, "main", &bus, config.clone()).await);
    until("the other relay settles everything", async || {
        status_of(&admin, "main").await.is_some_and(|status| status.low == Seq(2_000) && status.epoch == 2)
    })
    .await;
    assert!(bus.handed_over() - handed_over <= 2_000, "the sleeper slept");
    let handed_over = bus.handed_over();
    within("a standby", async {
        while !matches!(sleeper.turn().await.expect("a turn"), Progress::Standby { .. }) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    assert_eq!(bus.handed_over(), handed_over, "it handed over what it had read before it slept");
    let status = status_of(&admin, "main").await.expect("a sink");
    assert_eq!((status.low, status.epoch), (Seq(2_000), 2), "it moved the cursor");
    database.append((2_000..2_100).map(|n| event(&format!("k{}", n % 5), n))).await;
    check_ledger(&database, &bus, config.window_events + UNCHECKED_MAX).await;
    other.stop().await;
}

/// The database's clock alone judges the lease: it may be an hour ahead of this machine's, or behind. Catches the mutant
/// that writes the lease by the host's clock (a standby takes the log from a living owner, or never from a dead one).
async fn judged_by_a_clock_that_is_off_by(shift: &str) {
    let plain = Database::create().await;
    let clock = format!("{}_clock", plain.schema);
    plain
        .run(&format!(
            "CREATE SCHEMA {clock}; CREATE FUNCTION {clock}.clock_timestamp() RETURNS timestamptz LANGUAGE sql \
                 VOLATILE AS $$ SELECT pg_catalog.clock_timestamp() + interval '{shift}' $$"
        ))
        .await;
    let separator = if server().contains('?') { '&' } else { '?' };
    let options = format!("options=-csearch_path%3D{clock}%2Cpg_catalog");
    let database = plain.at(&format!("{}{separator}{options}", server()));
    let (admin, bus, lease) = (database.admin().await, ScriptedBus::new(FAIL_STOP), Duration::from_secs(3));
    let (one, two) = (database.log("main").await, database.log("main").await);
    let owned = register(&*one, Start::Earliest).await;
    match two.acquire(&request(Start::Earliest)).await.expect("an answer") {
        Acquisition::Standby { remaining, .. } => {
            assert!(remaining <= request(Start::Earliest).ttl, "{remaining:?}")
        }
        Acquisition::Owned(_) => panic!("{shift}: took over from a living owner"),
    }
    one.release(&owned.lease).await.expect("it is released");
    let config = RelayConfig { lease, retention: Some(Duration::ZERO), ..config() };
    let owner = Running::start(relay(&database, "main", &bus, config.clone()).await);
    database.append((0..10).map(|n| event("a", n))).await;
    bus.until_stored(10).await;
    let mut standby = relay(&database, "main", &bus, config.clone()).await;
    let asked = Instant::now();
    while asked.elapsed() < lease * 5 / 4 {
        let progress = standby.turn().await.expect("a turn");
        let Progress::Standby { remaining, .. } = progress else { panic!("{shift}: took over from a living owner") };
        assert!(remaining <= lease, "{shift}: {remaining:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let left = status_of(&admin, "main").await.and_then(|status| status.lease_remaining).expect("a lease");
    assert!(left <= lease, "{shift}: {left:?}");
    until("the janitor has removed what is settled", async || database.committed().await.is_empty()).await;
    owner.kill().await;
    let killed = Instant::now();
    let standby = Running::start(standby);
    database.append([event("a", 10)]).await;
    bus.until_stored(11).await;
    assert!(killed.elapsed() < lease * 5, "{shift}: took {:?}", killed.elapsed());
    standby.stop().await;
    plain.run(&format!("DROP SCHEMA {clock} CASCADE")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn a_lease_is_judged_by_the_databases_clock_that_is_ahead() {
    judged_by_a_clock_that_is_off_by("1 hour").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn a_lease_is_judged_by_the_databases_clock_that_is_behind() {
    judged_by_a_clock_that_is_off_by("-1 hour").await;
}

/// An owner that freezes, or whose machine is gone, in the middle of a transaction keeps its locks for some seconds only.
/// Catches the mutant that leaves them to the operating system, which takes hours to give up a peer that is gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn an_owner_that_freezes_within_a_transaction_is_taken_over_from() {
    let (database, bus) = (Database::create().await, ScriptedBus::new(FAIL_STOP));
    let switch = Switch::start(&address_of(&server()), Some("SET epoch = $3, owner = $4")).await;
    let frozen = database.at(&switch.url(&server()));
    let log = frozen.log("main").await;
    let freezing = tokio::spawn(async move { log.acquire(&request(Start::Earliest)).await.map(|_| ()) });
    let held = "SELECT count(*) FROM pg_stat_activity JOIN pg_locks USING (pid) WHERE state = 'idle in transaction' \
         AND relation = $1::text::regclass AND mode = 'RowShareLock'";
    let (client, cursor) = (database.client().await, database.sql("{p}cursor"));
    until("it holds the cursor's row", async || {
        client.query_one(held, &[&cursor]).await.expect("a count").get::<_, i64>(0) > 0
    })
    .await;
    let frozen_at = Instant::now();
    let running = Running::start(relay(&database, "main", &bus, config()).await);
    database.append([event("a", 0)]).await;
    bus.until_stored(1).await;
    assert!(frozen_at.elapsed() < Duration::from_secs(12), "took {:?}", frozen_at.elapsed());
    freezing.abort();
    running.stop().await;
}

/// The same of an operator's command: none keeps its locks, of the sink, of its set-aside events or of the log, for longer
/// than a relay would. Catches the mutant whose commands set no limit: `acquire`, or each write of a set-aside event, failed
/// until somebody ended the frozen process.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn an_operator_that_freezes_within_a_transaction_holds_up_nobody_for_long() {
    let database = Database::create().await;
    let owned = register(&*database.log("main").await, Start::Earliest).await;
    database.log("main").await.release(&owned.lease).await.expect("it is released");
    let all = Selected::default;
    for sql in ["'retrying'", "DELETE FROM", "SET epoch_floor"] {
        let switch = Switch::start(&address_of(&server()), Some(sql)).await;
        let frozen = database.at(&switch.url(&server()));
        let admin = frozen.admin().await;
        let freezing = tokio::spawn(async move {
            match sql {
                "'retrying'" => admin.ask("main", RequestKind::Retry, &all(), None).await.map(drop),
                "DELETE FROM" => admin.discard_unowned("main", &all()).await.map(drop),
                _ => admin.remove_sink("main").await,
            }
        });
        let idle = "SELECT count(DISTINCT pid) FROM pg_stat_activity JOIN pg_locks USING (pid) \
             WHERE state = 'idle in transaction' AND mode IN ('RowShareLock', 'RowExclusiveLock') \
             AND relation IN (SELECT oid FROM pg_class WHERE relnamespace = $1::text::regnamespace)";
        let client = database.client().await;
        let idle = async || client.query_one(idle, &[&database.schema]).await.expect("a count").get::<_, i64>(0);
        until("it is frozen with a lock", async || idle().await > 0).await;
        let frozen_at = Instant::now();
        until("it is ended", async || idle().await == 0).await;
        assert!(frozen_at.elapsed() < Duration::from_secs(12), "{sql}: took {:?}", frozen_at.elapsed());
        freezing.abort();
    }
}

/// A relay that runs while its database fails over to a standby that had not got everything: events that take the places
/// of those that were lost are published too, each key in order. Catches the mutants whose checkpoint and whose reading do
/// not look at the timeline: the owner's cursor is ahead of the new primary, and passes over what comes there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn a_failover_under_a_relay_that_runs_skips_no_place_that_is_drawn_again() {
    let primary = Server::start();
    let (database, bus) = (Database::create_at(&primary.url).await, ScriptedBus::new(FAIL_STOP));
    let standby = Server::standby_of(&primary);
    let switch = Switch::start(&primary.address(), None).await;
    // The failover is over long before the lease is.
    let config = RelayConfig { lease: Duration::from_secs(9), ..config() };
    let running = Running::start(relay(&database.at(&switch.url(&primary.url)), "main", &bus, config).await);
    database.append((0..10).map(|n| event("a", n))).await;
    let after = database.at(&standby.url);
    let replica = after.client().await;
    until("the standby has the cursor", async || {
        let row = replica.query_opt(&after.sql("SELECT high FROM {p}cursor"), &[]).await.expect("an answer");
        row.is_some_and(|row| row.get::<_, i64>(0) == 10)
    })
    .await;
    // A sequence is written ahead by 32 places: more are lost here.
    replica.batch_execute("ALTER SYSTEM SET primary_conninfo = ''").await.expect("a setting");
    replica.batch_execute("SELECT pg_reload_conf()").await.expect("a reload");
    until("the standby is cut off", async || {
        let sql = "SELECT count(*) FROM pg_stat_wal_receiver";
        replica.query_one(sql, &[]).await.expect("a count").get::<_, i64>(0) == 0
    })
    .await;
    database.append((0..200).map(|n| event("lost", n))).await;
    bus.until_stored(210).await;

    primary.run(&["immediate", "postgres"]);
    standby.run(&["promote", "postgres"]);
    // Some of them take such places, and later ones of their key do not: they must not overtake them.
    let mut client = after.client().await;
    after.run("UPDATE {p}cursor SET lease_until = '-infinity'").await;
    append(&after, &mut client, (0..250).map(|n| event("b", n))).await;
    switch.to(&standby.address());
    append(&after, &mut client, (250..300).map(|n| event("b", n))).await;
    let expected: BTreeSet<String> = (0..300).map(|n| format!("b-{n}")).collect();
    until("everything there is published", async || expected.is_subset(&ids(&bus.stored()).into_iter().collect()))
        .await;
    let firsts = support::first_by_key(&bus.stored()).remove("b").expect("events");
    assert_eq!(firsts, (0..300).map(|n| format!("b-{n}")).collect::<Vec<_>>());
    let first_place = after.sql("SELECT min(seq) FROM {p}outbox WHERE key = 'b'");
    let first_place: i64 = client.query_one(&first_place, &[]).await.expect("a place").get(0);
    assert!(first_place < 210, "no place was drawn again: {first_place}");
    running.stop().await;
}

/// A TCP proxy whose target can be changed, which cuts the connections there are; and that freezes a connection, both ways
/// and for ever, when a client sends a certain text.
struct Switch {
    port: u16,
    target: watch::Sender<String>,
}

impl Switch {
    async fn start(target: &str, freezes_at: Option<&'static str>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let (sender, targets) = watch::channel(target.to_owned());
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let mut targets = targets.clone();
                tokio::spawn(async move {
                    let target = targets.borrow_and_update().clone();
                    let Ok(far) = TcpStream::connect(target).await else { return };
                    tokio::select! {
                        () = forward(near, far, freezes_at) => {}
                        _ = targets.changed() => {}
                    }
                });
            }
        });
        Self { port, target: sender }
    }

    fn to(&self, target: &str) {
        self.target.send_replace(target.to_owned());
    }

    /// The same database through this proxy, which must be able to read.
    fn url(&self, url: &str) -> String {
        let (plain, _) = url.split_once('?').unwrap_or((url, ""));
        format!("{}?sslmode=disable", plain.replace(&address_of(url), &format!("127.0.0.1:{}", self.port)))
    }
}

fn address_of(url: &str) -> String {
    url.split(['@', '/', '?']).nth(3).expect("an address in the URL").to_owned()
}

async fn forward(near: TcpStream, far: TcpStream, freezes_at: Option<&'static str>) {
    let ((mut near_in, mut near_out), (mut far_in, mut far_out)) = (near.into_split(), far.into_split());
    let there = async {
        let mut buffer = vec![0; 65_536];
        while let Ok(count @ 1..) = near_in.read(&mut buffer).await {
            let text = String::from_utf8_lossy(&buffer[..count]);
            if freezes_at.is_some_and(|at| text.contains(at)) {
                std::future::pending::<()>().await;
            }
            if far_out.write_all(&buffer[..count]).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = there => {}
        _ = tokio::io::copy(&mut far_in, &mut near_out) => {}
    }
}

// ---- Gaps.

/// Write transactions that stay open, in another database and beside the log in this one, hold up nothing: events are
/// published, and the gaps of those that were rolled back close. Catches the mutant that closes gaps by the snapshot
/// alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn transactions_that_do_not_write_the_log_keep_no_gap_open() {
    let (database, bus) = (Database::create().await, ScriptedBus::new(FAIL_STOP));
    let other = format!("{}_other", database.schema);
    database.run(&format!("CREATE DATABASE {other}")).await;
    let (mut here, mut there) = (database.client().await, {
        let (base, _) = database.url.rsplit_once('/').expect("a database in the URL");
        database.at(&format!("{base}/{other}")).client().await
    });
    let (here, there) = (transaction(&mut here).await, transaction(&mut there).await);
    here.batch_execute(&database.sql("CREATE TABLE {p}work ()")).await.expect("a table");
    there.batch_execute("CREATE TABLE work ()").await.expect("a table");
    let running = Running::start(relay(&database, "main", &bus, config()).await);
    let (mut client, admin) = (database.client().await, database.admin().await);
    for n in 0..20 {
        let failed = transaction(&mut client).await;
        insert(&database, &failed, &format!("never-{n}")).await;
        failed.rollback().await.expect("it rolls back");
        append(&database, &mut client, [event("a", n)]).await;
        bus.until_stored(n + 1).await;
    }
    until("no hole is left", async || {
        status_of(&admin, "main").await.is_some_and(|status| status.holes == 0 && status.low == Seq(40))
    })
    .await;
    for open in [here, there] {
        open.execute("SELECT 1", &[]).await.expect("it is open still");
        open.rollback().await.expect("it ends");
    }
    running.stop().await;
    database.run(&format!("DROP DATABASE {other} WITH (FORCE)")).await;
}

/// A place that is drawn long before its row is there, for a trigger of the service takes its time, is published when its
/// transaction commits. Catches the mutants whose places are drawn before the transaction has a number, and that do not
/// see who holds the table's lock. On a server of its own: transactions of others would hide the first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn a_place_that_is_drawn_long_before_its_row_is_published() {
    let server = Server::with_options("-c autovacuum=off");
    let (database, bus) = (Database::create_at(&server.url).await, ScriptedBus::new(FAIL_STOP));
    database
        .run(
            "CREATE FUNCTION {p}late() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
             IF NEW.id = 'slow-0' THEN PERFORM pg_advisory_xact_lock(1); END IF; RETURN NEW; END $$; \
             CREATE TRIGGER late BEFORE INSERT ON {p}outbox FOR EACH ROW EXECUTE FUNCTION {p}late()",
        )
        .await;
    let running = Running::start(relay(&database, "main", &bus, config()).await);
    // A sequence takes a number for itself only when it is written to the log, which is every 32 places.
    database.append((0..3).map(|n| event("a", n))).await;
    bus.until_stored(3).await;
    let (client, sql) = (
        database.client().await,
        "INSERT INTO {p}outbox (id, topic, key, type, data) \
         VALUES ('slow-0', 'orders', 'slow', 'order.placed', '1')",
    );
    let sql = database.sql(sql);
    let holder = database.client().await;
    holder.batch_execute("SELECT pg_advisory_lock(1)").await.expect("a lock");
    let slow = tokio::spawn(async move { client.batch_execute(&sql).await });
    let log = database.log("main").await;
    until("its place is drawn", async || log.last_seq().await.expect("a place") == Seq(4)).await;
    let (mut client, admin) = (database.client().await, database.admin().await);
    for n in 3..15 {
        append(&database, &mut client, [event("a", n)]).await;
        bus.until_stored(n + 1).await;
        let place = Seq(n as u64 + 2);
        until("a checkpoint", async || status_of(&admin, "main").await.is_some_and(|status| status.high == place))
            .await;
        assert!(!slow.is_finished(), "it waits for the lock");
    }
    holder.batch_execute("SELECT pg_advisory_unlock(1)").await.expect("it is unlocked");
    slow.await.expect("no panic").expect("it is inserted");
    check_ledger(&database, &bus, 0).await;
    until("no hole is left", async || status_of(&admin, "main").await.is_some_and(|status| status.holes == 0)).await;
    running.stop().await;
}

/// A snapshot's upper end is no bound: a transaction that runs may have that very number. The one that holds the lower
/// place has the higher number here, and commits last. Catches the mutant that takes the upper end of the checkpoint's
/// snapshot. On a server of its own, where no other transaction ends in between.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn a_gap_is_not_closed_by_the_upper_end_of_a_snapshot() {
    let server = Server::with_options("-c autovacuum=off");
    let (database, bus) = (Database::create_at(&server.url).await, ScriptedBus::new(FAIL_STOP));
    // Nothing is renewed meanwhile: that would take numbers too.
    let config = RelayConfig { lease: Duration::from_secs(600), ..config() };
    let running = Running::start(relay(&database, "main", &bus, config).await);
    let admin = database.admin().await;
    until("an owner", async || status_of(&admin, "main").await.is_some_and(|status| status.owner.is_some())).await;
    let [mut first, mut second, mut third] =
        [database.client().await, database.client().await, database.client().await];
    let second = transaction(&mut second).await;
    let first = transaction(&mut first).await;
    assert_eq!(insert(&database, &first, "first-0").await, Seq(1));
    assert_eq!(insert(&database, &second, "second-0").await, Seq(2));
    // Nothing is settled, and so no checkpoint written, before the gap has been seen.
    bus.away(true);
    second.commit().await.expect("it commits");
    until("the relay has tried for a while", async || bus.opened() > 12).await;
    bus.away(false);
    for seq in 2..6 {
        until("a checkpoint", async || status_of(&admin, "main").await.is_some_and(|status| status.high == Seq(seq)))
            .await;
        append(&database, &mut third, [event("third", seq as usize)]).await;
    }
    bus.until_stored(5).await;
    first.commit().await.expect("it commits");
    check_ledger(&database, &bus, 0).await;
    running.stop().await;
}

// ---- Sinks that come and go.

fn request(start: Start) -> Acquire {
    Acquire {
        owner: "test".to_owned(),
        ttl: Duration::from_secs(30),
        epoch_min: 0,
        start,
        topics: vec![TopicPattern::any()],
        bus: String::new(),
        new_incarnation: false,
    }
}

async fn register(log: &dyn LogSource, start: Start) -> Owned {
    match log.acquire(&request(start)).await.expect("an answer") {
        Acquisition::Owned(owned) => *owned,
        Acquisition::Standby { owner, .. } => panic!("{owner} owns it"),
    }
}

/// Appends one event per transaction, of which some are rolled back, until it is told to stop.
async fn write(database: Arc<Database>, key: String, stop: Arc<AtomicBool>, mut random: fastrand::Rng) {
    let mut client = database.client().await;
    for n in 0.. {
        if stop.load(Ordering::SeqCst) {
            return;
        }
        let mut transaction = client.transaction().await.expect("a transaction");
        database.outbox.append(&mut transaction, [event(&key, n)]).await.expect("it is appended");
        tokio::time::sleep(Duration::from_millis(random.u64(0..8))).await;
        let rolls_back = random.u8(..4) == 0;
        let ended = if rolls_back { transaction.rollback().await } else { transaction.commit().await };
        ended.expect("it ends");
        database.outbox.wake();
    }
}

/// A sink that is added while events are under way. `earliest` gets everything above the least that another sink has not
/// settled, whoever held it open then; `latest` gets what draws its place afterwards, and nothing whose place was drawn
/// before, whenever it commits. Catches the mutants that begin at what the others have seen, and at the highest place
/// that is visible.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn a_sink_that_is_added_misses_nothing_it_was_promised() {
    let seed = fastrand::u64(..);
    writeln!(std::io::stderr(), "OUTBUS_SEED={seed}").expect("stderr takes it");
    let (database, stop) = (Arc::new(Database::create().await), Arc::new(AtomicBool::new(false)));
    let buses = ["main", "earliest", "latest", "edge"].map(|sink| (sink, ScriptedBus::new(FAIL_STOP)));
    let [main, earliest, latest, edge] = &buses;
    let admin = database.admin().await;
    let mut running = vec![Running::start(relay(&database, main.0, &main.1, config()).await)];
    let mut writers = tokio::task::JoinSet::new();
    for n in 0..3 {
        let random = fastrand::Rng::with_seed(seed.wrapping_add(n));
        writers.spawn(write(Arc::clone(&database), format!("w{n}"), Arc::clone(&stop), random));
    }
    main.1.until_stored(30).await;
    let mut early = database.client().await;
    let early = transaction(&mut early).await;
    let early_at = insert(&database, &early, "early-0").await;
    let stored = main.1.stored().len();
    main.1.until_stored(stored + 30).await;

    let mut begins = Vec::new();
    for ((sink, bus), start) in [(earliest, Start::Earliest), (latest, Start::Latest)] {
        let log = database.log(sink).await;
        let owned = register(&*log, start).await;
        log.release(&owned.lease).await.expect("it is released");
        begins.push(owned.low);
        running.push(Running::start(relay(&database, sink, bus, config()).await));
    }
    assert!(begins[0] < early_at && early_at < begins[1], "{begins:?}, {early_at}");
    let stored = main.1.stored().len();
    main.1.until_stored(stored + 30).await;
    early.commit().await.expect("it commits");
    stop.store(true, Ordering::SeqCst);
    writers.join_all().await;

    // The highest place of all is open when this one comes.
    let mut late = database.client().await;
    let late = transaction(&mut late).await;
    let late_at = insert(&database, &late, "late-0").await;
    let log = database.log(edge.0).await;
    let owned = register(&*log, Start::Latest).await;
    log.release(&owned.lease).await.expect("it is released");
    assert_eq!(owned.low, late_at);
    begins.push(owned.low);
    running.push(Running::start(relay(&database, edge.0, &edge.1, config()).await));
    late.commit().await.expect("it commits");
    database.append([event("after", 0)]).await;

    let rows = database.client().await.query(&database.sql("SELECT id, seq FROM {p}outbox"), &[]).await.expect("rows");
    begins.insert(0, Seq::ZERO);
    for ((sink, bus), begin) in buses.iter().zip(begins) {
        let above = rows.iter().filter(|row| row.get::<_, i64>(1).unsigned_abs() > begin.0);
        let expected: BTreeSet<String> = above.map(|row| row.get(0)).collect();
        until(&format!("everything above {begin} at {sink}"), async || {
            expected.is_subset(&ids(&bus.stored()).into_iter().collect())
        })
        .await;
        until("no hole is left", async || status_of(&admin, sink).await.is_some_and(|status| status.holes == 0)).await;
        let stored = ids(&bus.stored());
        assert_eq!(stored.len(), expected.len(), "{sink} got something that is not its own, or twice");
    }
    for relay in running {
        relay.stop().await;
    }
}

/// While a janitor removes whatever it may and sinks come and go, every row above the place where a sink began is there
/// as long as the sink has not settled it. Catches the mutant in which a registration does not hold the log's row: between
/// its look at the other sinks and its own row, the slowest of them goes and its rows with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn no_row_is_removed_before_a_sink_that_just_came_settled_it() {
    let seed = fastrand::u64(..);
    writeln!(std::io::stderr(), "OUTBUS_SEED={seed}").expect("stderr takes it");
    let (database, bus) = (Arc::new(Database::create().await), ScriptedBus::new(FAIL_STOP));
    // What was ever committed; and registrations that take their time.
    database
        .run(
            "CREATE TABLE {p}ever (seq bigint PRIMARY KEY); \
             CREATE FUNCTION {p}remember() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
             INSERT INTO {p}ever VALUES (NEW.seq); RETURN NULL; END $$; \
             CREATE TRIGGER remember AFTER INSERT ON {p}outbox FOR EACH ROW EXECUTE FUNCTION {p}remember(); \
             CREATE FUNCTION {p}late() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
             PERFORM pg_sleep(0.03); RETURN NEW; END $$; \
             CREATE TRIGGER late BEFORE INSERT ON {p}cursor FOR EACH ROW EXECUTE FUNCTION {p}late()"
                .replace("INTO {p}", &format!("INTO {}.", database.schema))
                .as_str(),
        )
        .await;
    let stop = Arc::new(AtomicBool::new(false));
    let main = Running::start(relay(&database, "main", &bus, config()).await);
    let mut others = tokio::task::JoinSet::new();
    others.spawn(write(Arc::clone(&database), "w0".to_owned(), Arc::clone(&stop), fastrand::Rng::with_seed(seed)));
    let (log, stopped) = (database.log("main").await, Arc::clone(&stop));
    others.spawn(async move {
        while !stopped.load(Ordering::SeqCst) {
            log.prune("janitor", Duration::ZERO, 5_000).await.expect("it prunes");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    bus.until_stored(1).await;
    let mut sinks = tokio::task::JoinSet::new();
    for task in 0..3 {
        let (database, mut random) = (Arc::clone(&database), fastrand::Rng::with_seed(seed.wrapping_add(task)));
        sinks.spawn(async move {
            let (client, admin) = (database.client().await, database.admin().await);
            let missing = database.sql(
                "SELECT count(*) FROM {p}ever WHERE seq > $1 AND NOT EXISTS \
                 (SELECT 1 FROM {p}outbox WHERE outbox.seq = ever.seq)",
            );
            for n in 0..8 {
                let sink = format!("s{task}_{n}");
                let log = database.log(&sink).await;
                let owned = register(&*log, Start::Earliest).await;
                for _ in 0..random.u8(2..6) {
                    let count = client.query_one(&missing, &[&(owned.low.0 as i64)]).await.expect("a count");
                    assert_eq!(count.get::<_, i64>(0), 0, "seed {seed}: {sink} began at {}", owned.low);
                    tokio::time::sleep(Duration::from_millis(random.u64(0..20))).await;
                }
                log.release(&owned.lease).await.expect("it is released");
                admin.remove_sink(&sink).await.expect("it is removed");
            }
        });
    }
    within("the sinks", sinks.join_all()).await;
    until("something was removed", async || !database.committed().await.contains(&ids(&bus.stored())[0])).await;
    stop.store(true, Ordering::SeqCst);
    others.join_all().await;
    main.stop().await;
}

/// `sinks remove` beside a relay that just begins: one of them waits for the other. Catches the mutant that takes their
/// two locks in another order (one of them fails, and says `deadlock detected`).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn a_sink_is_removed_beside_a_relay_that_begins() {
    let database = Arc::new(Database::create().await);
    let log = database.log("main").await;
    let owned = register(&*log, Start::Earliest).await;
    log.release(&owned.lease).await.expect("it is released");
    let mut client = database.client().await;
    let holder = transaction(&mut client).await;
    holder.batch_execute(&database.sql("SELECT 1 FROM {p}cursor FOR UPDATE")).await.expect("a lock");
    let watch = database.client().await;
    let waiting = async |count: i64| {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE $1";
        let like = format!("%{}%", database.schema);
        until("a wait", async || watch.query_one(sql, &[&like]).await.expect("a count").get::<_, i64>(0) == count)
            .await;
    };
    let admin = database.admin().await;
    let removing = tokio::spawn(async move { admin.remove_sink("main").await });
    waiting(1).await;
    let beginning = tokio::spawn(async move { register(&*log, Start::Earliest).await });
    waiting(2).await;
    holder.rollback().await.expect("it ends");
    within("the removal", removing).await.expect("no panic").expect("it is removed");
    within("the beginning", beginning).await.expect("no panic");
}
