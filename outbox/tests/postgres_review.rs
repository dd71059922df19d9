//! What a relay and a reader on a real PostgreSQL leave alone, and what they do not believe: settings of a role, a pooler's
//! connections, another timeline, rows larger than the last ones. Each test says which mutant it catches.

#[path = "support/database.rs"]
mod database;
mod support;

use std::{
    env,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bus_core::{Event, OrderOnFailure, Seq, SeqSet};
use database::{Database, server};
use outbox::{
    Acquire, Acquisition, Change, LogAdmin, LogErrorKind, LogSource, Owned, PageLimit, Relay, RelayConfig, RequestKind,
    Selected, Start, TopicPattern,
};
use support::{Running, ScriptedBus, config, event, until, within};
use tokio::net::{TcpListener, TcpStream};

const ALL: PageLimit = PageLimit { events: 1_000, bytes: 1 << 20 };

fn request(ttl: Duration) -> Acquire {
    Acquire {
        owner: "test".to_owned(),
        ttl,
        epoch_min: 0,
        start: Start::Earliest,
        topics: vec![TopicPattern::any()],
        bus: String::new(),
        new_incarnation: false,
    }
}

async fn acquire(log: &dyn LogSource) -> Owned {
    match log.acquire(&request(Duration::from_secs(30))).await.expect("an answer") {
        Acquisition::Owned(owned) => *owned,
        Acquisition::Standby { owner, .. } => panic!("{owner} owns it"),
    }
}

/// A URL whose connections begin with these settings.
fn with_options(options: &str) -> String {
    let separator = if server().contains('?') { '&' } else { '?' };
    let options = options.replace(' ', "%20").replace('=', "%3D").replace(',', "%2C");
    format!("{}{separator}options={options}", server())
}

/// A pooler hands the notifier's connection to business transactions next: they must still wait for the disk. Catches the
/// mutant that switches `synchronous_commit` off for the session and not for the transaction.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn a_wake_through_a_pooler_leaves_its_connections_as_they_were() {
    let pooler =
        env::var("OUTBUS_TEST_PGBOUNCER_URL").expect("OUTBUS_TEST_PGBOUNCER_URL names a pooler: cargo xtask test");
    let (at, _) = pooler.rsplit_once('/').expect("a database in the URL");
    // A database of its own has a pool of its own.
    let name = format!("wake_{}", std::process::id());
    let direct = Database::client_at(&server()).await;
    direct.batch_execute(&format!("CREATE DATABASE {name}")).await.expect("a database");
    let database = Database::create_at(&format!("{at}/{name}")).await;
    database.outbox.wake();
    let notified =
        "SELECT count(*) FROM pg_stat_activity WHERE datname = $1 AND query LIKE '%pg_notify%' AND state = 'idle'";
    until("it has notified", async || {
        direct.query_one(notified, &[&name]).await.expect("a count").get::<_, i64>(0) > 0
    })
    .await;
    // Together they have every connection of the pool.
    let mut clients = Vec::new();
    for _ in 0..4 {
        let client = database.client().await;
        client.batch_execute("BEGIN").await.expect("a transaction");
        clients.push(client);
    }
    for client in &clients {
        let rows = client.simple_query("SHOW synchronous_commit").await.expect("a setting");
        let shown = rows.iter().find_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0),
            _ => None,
        });
        assert_eq!(shown, Some("on"), "business transactions of this connection do not wait for the disk");
    }
    drop((clients, database));
    direct.batch_execute(&format!("DROP DATABASE {name} WITH (FORCE)")).await.expect("it is dropped");
}

/// Who owns the log must survive a crash of the database, whatever the role's transactions are worth: otherwise two owners
/// have one epoch. And where commits wait for standbys, an owner's durable ones do too. Catches the mutants that leave the
/// role's `synchronous_commit = off` to the acquisition, and that put `on` in the place of `remote_apply`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn an_owner_commits_durably_whatever_the_role_has_set() {
    for (set, durable) in [("off", "on"), ("local", "local"), ("on", "on"), ("remote_apply", "remote_apply")] {
        let plain = Database::create().await;
        plain
            .run(&plain.sql(
                "CREATE TABLE {p}mode (id int GENERATED ALWAYS AS IDENTITY, mode text); \
                 CREATE FUNCTION {p}note() RETURNS trigger LANGUAGE plpgsql AS \
                 $$ BEGIN INSERT INTO {p}mode (mode) VALUES (current_setting('synchronous_commit')); RETURN NEW; END $$; \
                 CREATE TRIGGER note AFTER UPDATE ON {p}cursor FOR EACH ROW EXECUTE FUNCTION {p}note()",
            ))
            .await;
        let log = plain.at(&with_options(&format!("-c synchronous_commit={set}"))).log("main").await;
        let owned = acquire(&*log).await;
        for is_durable in [true, false] {
            let change = Change { durable: is_durable, ..Change::default() };
            log.commit(&owned.lease, &change).await.expect("a checkpoint");
        }
        let rows = plain.client().await.query(&plain.sql("SELECT mode FROM {p}mode ORDER BY id"), &[]).await;
        let modes: Vec<String> = rows.expect("modes").iter().map(|row| row.get(0)).collect();
        assert_eq!(modes, [durable, durable, "off"], "with {set}");
    }
}

/// Rows that become visible late may be far larger than what was read last; no more of them are read than were asked for.
/// Catches the mutant that collects all rows of a probe: by the size of the last page it asks for all of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn a_probe_brings_no_more_bytes_than_it_may() {
    const LARGE: usize = 256 << 10;
    let database = Database::create().await;
    let (mut late, log) = (database.client().await, database.log("main").await);
    let large = |n: usize| {
        let builder = Event::builder("orders", "order.placed").data(vec![b'x'; LARGE]).id(format!("large-{n}"));
        builder.build().expect("a valid event")
    };
    let mut transaction = late.transaction().await.expect("a transaction");
    database.outbox.append(&mut transaction, (0..40).map(large)).await.expect("they are appended");
    database.append([event("a", 0)]).await;
    let page = log.fetch(Seq::ZERO, ALL).await.expect("a page");
    assert_eq!(page.rows.iter().map(|row| row.seq.0).collect::<Vec<_>>(), [41]);
    let mut unseen = SeqSet::new();
    unseen.insert_range(Seq(1), Seq(40));
    let probe = log.probe(&unseen, ALL).await.expect("a probe");
    assert!(probe.rows.is_empty() && probe.through == Seq(40), "{:?}", probe.through);
    transaction.commit().await.expect("it commits");
    let mut found = 0;
    while let Some(first) = unseen.first() {
        let probe = log.probe(&unseen, ALL).await.expect("a probe");
        let bytes: usize = probe.rows.iter().map(|row| row.event.as_ref().map_or(0, Event::size_bytes)).sum();
        assert!(bytes <= ALL.bytes + LARGE + 1_024, "{bytes} bytes from {first} on");
        assert_eq!(probe.rows.last().map(|row| row.seq), Some(probe.through), "it is cut behind its last row");
        assert!(probe.dead.is_empty());
        found += probe.rows.len();
        unseen = unseen.within(probe.through.next(), Seq(u64::MAX));
    }
    assert_eq!(found, 40);
}

/// A database whose timeline can be changed by a row.
async fn with_a_timeline() -> (Database, String) {
    let plain = Database::create().await;
    let schema = format!("{}_wal", plain.schema);
    plain
        .run(&format!(
            "CREATE SCHEMA {schema}; CREATE TABLE {schema}.timeline (name text); \
             INSERT INTO {schema}.timeline VALUES ('00000001'); \
             CREATE FUNCTION {schema}.pg_walfile_name(pg_lsn) RETURNS text LANGUAGE sql STABLE AS \
             $$ SELECT name || '0000000000000001' FROM {schema}.timeline $$"
        ))
        .await;
    let database = plain.at(&with_options(&format!("-c search_path={schema},pg_catalog")));
    (database, format!("UPDATE {schema}.timeline SET name = '00000002'"))
}

/// On another timeline nothing is read, and that is said: an answer without rows would mean that there are none, that gaps
/// are dead and that held events were removed. Catches the mutant that answers nothing instead.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn what_is_read_on_another_timeline_is_an_error_and_not_nothing() {
    let (database, promote) = with_a_timeline().await;
    let log = database.log("main").await;
    let owned = acquire(&*log).await;
    database.append([event("a", 0)]).await;
    assert_eq!(log.fetch(Seq::ZERO, ALL).await.expect("a page").rows.len(), 1);
    let place: SeqSet = [Seq(1)].into_iter().collect();
    assert_eq!(log.read(&place, ALL).await.expect("rows").rows.len(), 1);
    assert_eq!(log.probe(&place, ALL).await.expect("a probe").rows.len(), 1);
    database.run(&promote).await;
    let errors = [
        log.fetch(Seq::ZERO, ALL).await.map(|_| ()).unwrap_err(),
        log.fetch(Seq(1), ALL).await.map(|_| ()).unwrap_err(),
        log.read(&place, ALL).await.map(|_| ()).unwrap_err(),
        log.probe(&place, ALL).await.map(|_| ()).unwrap_err(),
        log.commit(&owned.lease, &Change::default()).await.unwrap_err(),
    ];
    assert!(errors.iter().all(|error| error.kind() == LogErrorKind::Fenced), "{errors:?}");
    log.release(&owned.lease).await.expect("it is released");
    acquire(&*log).await;
    assert_eq!(log.fetch(Seq::ZERO, ALL).await.expect("a page").rows.len(), 1);
}

/// Catches the same mutant: a relay that is to publish what there is and then end ended with the first empty page, and said
/// that all was done.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn once_is_not_done_before_a_failover_is_noticed() {
    let (database, promote) = with_a_timeline().await;
    let bus = ScriptedBus::new(OrderOnFailure::FailStop);
    let config = RelayConfig { lease: Duration::from_secs(1), ..config() };
    let mut relay = Relay::new(database.log("main").await, bus.arc(), config).expect("a relay");
    // It takes the log.
    relay.turn().await.expect("a turn");
    database.run(&promote).await;
    database.append((0..10).map(|n| event("a", n))).await;
    within("an end", relay.run_once(std::future::pending())).await.expect("an orderly end");
    assert_eq!(bus.stored().len(), 10, "it said that all was done");
}

/// Catches the mutant whose `run_once` believes a page that was fetched before it began.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn once_after_a_turn_publishes_what_was_committed_between() {
    let (database, bus) = (Database::create().await, ScriptedBus::new(OrderOnFailure::FailStop));
    let mut relay = Relay::new(database.log("main").await, bus.arc(), config()).expect("a relay");
    relay.turn().await.expect("a turn");
    // The page that the turn asked for is there, and empty.
    tokio::time::sleep(Duration::from_millis(50)).await;
    database.append((0..10).map(|n| event("a", n))).await;
    within("an end", relay.run_once(std::future::pending())).await.expect("an orderly end");
    assert_eq!(bus.stored().len(), 10, "it said that all was done");
}

/// A role may have `SERIALIZABLE` as its default, and somebody may keep such a transaction open: a relay goes on, and fails
/// nobody's. Catches the mutant that leaves its statements to the role's default: as long as that transaction is open,
/// no checkpoint is written and nobody takes over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn our_statements_are_read_committed_whatever_the_role_has_set() {
    let plain = Database::create().await;
    plain
        .run(
            "CREATE TABLE {p}mode (mode text); \
             CREATE FUNCTION {p}note() RETURNS trigger LANGUAGE plpgsql AS \
             $$ BEGIN INSERT INTO {p}mode VALUES (current_setting('transaction_isolation')); RETURN NEW; END $$; \
             CREATE TRIGGER note AFTER UPDATE ON {p}cursor FOR EACH ROW EXECUTE FUNCTION {p}note()",
        )
        .await;
    for level in ["serializable", "repeatable\\ read"] {
        let options = format!("-c default_transaction_isolation={level}").replace('\\', "%5C");
        let log = plain.at(&with_options(&options)).log("main").await;
        let owned = acquire(&*log).await;
        log.commit(&owned.lease, &Change { durable: true, ..Change::default() }).await.expect("a checkpoint");
        log.release(&owned.lease).await.expect("it is released");
    }
    let rows = plain.client().await.query(&plain.sql("SELECT mode FROM {p}mode"), &[]).await.expect("modes");
    let modes: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(modes, ["read committed"; 6]);
}

/// What docs/postgres.md grants is enough for all that a service, a relay and an operator do. Catches a statement that needs
/// more, and a grant that is taken away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn the_documented_grants_are_enough() {
    let database = Database::create().await;
    let (shop, relay, operator) =
        (format!("{}_shop", database.schema), format!("{}_relay", database.schema), format!("{}_op", database.schema));
    let docs = include_str!("../../docs/postgres.md");
    // The consumer's are tried in inbox_postgres.rs.
    let ours = |line: &&str| line.starts_with("GRANT ") && !line.ends_with("TO billing;");
    let grants: String = docs.lines().filter(ours).collect::<Vec<_>>().join("\n");
    let grants = |shop: &str, relay: &str| {
        let grants = grants.replace("outbus", &database.schema);
        grants.replace("TO shop;", &format!("TO {shop};")).replace("TO relay;", &format!("TO {relay};"))
    };
    for role in [&shop, &relay, &operator] {
        database.run(&format!("CREATE ROLE {role} LOGIN PASSWORD '{role}'")).await;
    }
    database.run(&grants(&shop, &relay)).await;
    database.run(&grants(&shop, &operator)).await;
    database.run(&database.sql(&format!("REVOKE DELETE ON {{p}}outbox FROM {operator}"))).await;
    let place = server().split('@').nth(1).expect("an address").to_owned();
    let of = |role: &str| database.at(&format!("postgres://{role}:{role}@{place}"));

    let bus = ScriptedBus::new(OrderOnFailure::FailStop);
    bus.refuse("a-0");
    of(&shop).append((0..1_200).map(|n| event("b", n)).chain([event("a", 0), event("a", 1)])).await;
    let config = RelayConfig { retention: Some(Duration::ZERO), ..config() };
    let relayed = of(&relay);
    let mut first = Relay::new(relayed.log("main").await, bus.arc(), config.clone()).expect("a relay");
    within("an end", first.run_once(std::future::pending())).await.expect("an orderly end");
    assert_eq!(bus.stored().len(), 1_200);
    let admin = of(&operator).admin().await;
    assert_eq!(admin.status().await.expect("a status")[0].parked, 2);
    let all = Selected::default();
    bus.rule(|_| None);
    admin.ask("main", RequestKind::Retry, &all, None).await.expect("a request");
    let mut second = Relay::new(relayed.log("main").await, bus.arc(), config).expect("a relay");
    within("an end", second.run_once(std::future::pending())).await.expect("an orderly end");
    assert_eq!(bus.stored().len(), 1_202);
    until("rows are removed", async || {
        relayed.log("main").await.prune("test", Duration::ZERO, 5_000).await.expect("a janitor");
        database.committed().await.is_empty()
    })
    .await;
    assert_eq!(admin.discard_unowned("main", &all).await.expect("an answer"), Some(0));
    admin.remove_sink("main").await.expect("it is removed");
    drop((first, second, admin));
    for role in [&shop, &relay, &operator] {
        database.run(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
    }
}

/// A relay waits ever so shortly while a connection takes longer to be opened; that is finished all the same. Catches the
/// mutant whose wait drops a connection that is being opened: it opened one after the other, for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn connections_that_take_long_are_opened_once() {
    let plain = Database::create().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let target = server().split(['@', '/', '?']).nth(3).expect("an address in the URL").to_owned();
    let slow = plain.at(&format!(
        "{}?sslmode=disable",
        server().split('?').next().unwrap_or_default().replace(&target, &format!("127.0.0.1:{port}"))
    ));
    let accepted = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&accepted);
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::SeqCst);
            let target = target.clone();
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(200)).await;
                let mut far = TcpStream::connect(target).await.expect("the server");
                let _ended = tokio::io::copy_bidirectional(&mut near, &mut far).await;
            });
        }
    });
    let bus = ScriptedBus::new(OrderOnFailure::FailStop);
    let relay = Relay::new(slow.log("main").await, bus.arc(), config()).expect("a relay");
    let running = Running::start(relay);
    plain.append([event("a", 0)]).await;
    bus.until_stored(1).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let accepted = accepted.load(Ordering::SeqCst);
    assert!(accepted <= 5, "{accepted} connections");
    running.stop().await;
}
