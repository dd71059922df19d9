//! Appending in the caller's transaction, the tables themselves, and the inbox.

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use bus_core::{Consumer, Event, EventBus, EventBusExt, EventType, HandlerError, InMemoryBus, RetryPolicy, Seq};
use outbox::{
    AppendErrorReason, Inbox, LogErrorKind, Outbox, OutboxConfig, PageLimit, SqliteLog, Tables, migrate,
    print_migrations, sqlite_options,
};
use serde::{Deserialize, Serialize};
use sqlx::{
    Acquire as _, SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous},
};
use support::{Shop, config, event, ids, until, within};

#[derive(Serialize, Deserialize)]
struct OrderPlaced {
    total: u32,
}

impl EventType for OrderPlaced {
    const TYPE: &'static str = "order.placed";
}

async fn rows(shop: &Shop) -> Vec<Event> {
    let page =
        shop.log("main").await.fetch(Seq::ZERO, PageLimit { events: 10_000, bytes: 1 << 30 }).await.expect("a page");
    page.rows.into_iter().map(|row| row.event.expect("a valid event")).collect()
}

/// Catches the mutant that writes outside the caller's transaction.
#[tokio::test]
async fn events_exist_if_and_only_if_their_transaction_commits() {
    let shop = Shop::open().await;
    let mut tx = shop.pool.begin_with("BEGIN IMMEDIATE").await.unwrap();
    shop.outbox.append(&mut tx, [Event::of("orders", &OrderPlaced { total: 5 }).unwrap().key(7)]).await.unwrap();
    assert!(rows(&shop).await.is_empty(), "nobody sees it before the commit");
    tx.rollback().await.unwrap();
    assert!(rows(&shop).await.is_empty());

    let mut tx = shop.pool.begin_with("BEGIN IMMEDIATE").await.unwrap();
    shop.outbox.append(&mut tx, [event("a", 0)]).await.unwrap();
    let mut savepoint = tx.begin().await.unwrap();
    shop.outbox.append(&mut savepoint, [event("a", 1)]).await.unwrap();
    savepoint.rollback().await.unwrap();
    let mut savepoint = tx.begin().await.unwrap();
    shop.outbox.append(&mut savepoint, [event("a", 2)]).await.unwrap();
    savepoint.commit().await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(ids(&rows(&shop).await), ["a-0", "a-2"]);
}

#[tokio::test]
async fn a_batch_of_any_length_keeps_its_order() {
    let shop = Shop::open().await;
    for count in [0, 1, 63, 64, 65, 500] {
        let before = rows(&shop).await.len();
        shop.append((0..count).map(|n| event("a", n))).await;
        assert_eq!(ids(&rows(&shop).await[before..]), (0..count).map(|n| format!("a-{n}")).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn what_is_wrong_is_named_before_anything_is_written() {
    let shop = Shop::open().await;
    let mut tx = shop.pool.begin_with("BEGIN IMMEDIATE").await.unwrap();
    let good = || Event::builder("orders", "order.placed");
    let large = vec![b'x'; 900 << 10];
    for (field, bad) in [
        ("topic", Event::builder("or/ders", "order.placed")),
        ("type", Event::builder("orders", "")),
        ("id", good().id("x".repeat(300))),
        ("data", good().data(large)),
    ] {
        let error = shop.outbox.append(&mut tx, [good(), good(), bad]).await.unwrap_err();
        assert_eq!(error.index(), 2);
        let AppendErrorReason::Event(event_error) = error.reason() else { panic!("{error}") };
        assert_eq!(event_error.field(), field, "{error}");
    }
    tx.commit().await.unwrap();
    assert!(rows(&shop).await.is_empty());
}

/// Events that are published must not be taken back by a power cut.
#[tokio::test]
async fn a_connection_that_does_not_wait_for_the_disk_is_refused() {
    let shop = Shop::open().await;
    let options = (*shop.pool.connect_options()).clone().synchronous(SqliteSynchronous::Normal);
    let relaxed = SqlitePool::connect_with(options).await.unwrap();
    let mut tx = relaxed.begin_with("BEGIN IMMEDIATE").await.unwrap();
    let error = shop.outbox.append(&mut tx, [event("a", 0)]).await.unwrap_err();
    assert!(matches!(error.reason(), AppendErrorReason::NotDurable), "{error}");
    assert!(error.to_string().contains("synchronous"), "{error}");
    let accepted = OutboxConfig { allow_relaxed_sync: true, ..OutboxConfig::default() };
    Outbox::sqlite(relaxed.clone(), accepted).append(&mut tx, [event("a", 0)]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_database_names_the_remedy() {
    let shop = Shop::open().await;
    let options = (*shop.pool.connect_options()).clone().busy_timeout(Duration::from_millis(50));
    let other = SqlitePool::connect_with(options).await.unwrap();
    let mut writing = shop.pool.begin_with("BEGIN IMMEDIATE").await.unwrap();
    shop.outbox.append(&mut writing, [event("a", 0)]).await.unwrap();
    let mut deferred = other.begin().await.unwrap();
    let error = shop.outbox.append(&mut deferred, [event("b", 0)]).await.unwrap_err();
    let AppendErrorReason::Log(log_error) = error.reason() else { panic!("{error}") };
    assert_eq!(log_error.kind(), LogErrorKind::Unavailable);
    assert!(error.to_string().contains("BEGIN IMMEDIATE"), "{error}");
}

/// Any program may insert with plain SQL: topic, type and data are enough.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plain_sql_is_enough() {
    let shop = Shop::open().await;
    let insert = "INSERT INTO outbus_outbox (topic, type, data) VALUES ('orders', 'order.placed', '{\"total\": 5}')";
    for _ in 0..100 {
        sqlx::query(insert).execute(&shop.pool).await.unwrap();
    }
    let events = rows(&shop).await;
    let distinct: std::collections::HashSet<_> = events.iter().map(|event| event.id()).collect();
    assert_eq!((events.len(), distinct.len()), (100, 100));
    let event = &events[0];
    assert_eq!((event.id().len(), event.source(), event.content_type()), (36, "/outbus", "application/json"));
    assert_eq!(&event.id()[14..15], "4", "a UUID of version 4: {}", event.id());
    assert_eq!(event.data().as_ref(), br#"{"total": 5}"#);
    let age = bus_core::Timestamp::now().unix_micros() - event.time().unix_micros();
    assert!((0..60_000_000).contains(&age), "{age} microseconds old");
    let bus: Arc<dyn EventBus> = Arc::new(InMemoryBus::new());
    assert_eq!(shop.relay_once(bus, config()).await.counts.published, 100);
    let large = sqlx::query("INSERT INTO outbus_outbox (topic, type, data) VALUES ('o', 't', zeroblob(921601))");
    assert!(large.execute(&shop.pool).await.is_err(), "the table has a limit");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn migrating_is_safe_to_repeat_and_to_do_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let options = sqlite_options(&format!("sqlite://{}", dir.path().join("shop.db").display())).unwrap();
    let tables = Tables::new("shop", 1_000).unwrap();
    let mut at_once = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let (options, tables) = (options.clone(), tables.clone());
        at_once.spawn(async move { migrate(&options, &tables).await.unwrap().len() });
    }
    let steps: usize = at_once.join_all().await.into_iter().sum();
    assert_eq!(steps, 1, "each step is taken once");
    let pool = SqlitePool::connect_with(options.clone()).await.unwrap();
    let mode: String = sqlx::query_scalar("PRAGMA journal_mode").fetch_one(&pool).await.unwrap();
    assert_eq!(mode, "wal");
    let outbox = Outbox::sqlite(pool.clone(), OutboxConfig { tables: tables.clone(), ..OutboxConfig::default() });
    let mut tx = pool.begin_with("BEGIN IMMEDIATE").await.unwrap();
    outbox.append(&mut tx, [event("a", 0)]).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(outbox.log("main").await.unwrap().last_seq().await.unwrap(), Seq(1));
    for bad in ["", "1a", "A", "pg_a", "a;b", "a b", "a\"b", &"x".repeat(33)] {
        assert_eq!(Tables::new(bad, 1).unwrap_err().field(), "name");
    }
}

/// What `--print` shows makes the same tables.
#[tokio::test]
async fn printed_migrations_can_be_run_by_hand() {
    let dir = tempfile::tempdir().unwrap();
    let options = SqliteConnectOptions::new()
        .filename(dir.path().join("shop.db"))
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal);
    let pool = SqlitePool::connect_with(options.clone()).await.unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(print_migrations(&Tables::default()))).execute(&pool).await.unwrap();
    assert!(migrate(&options, &Tables::default()).await.unwrap().is_empty(), "nothing is left to do");
    let outbox = Outbox::sqlite(pool.clone(), OutboxConfig::default());
    let mut tx = pool.begin_with("BEGIN IMMEDIATE").await.unwrap();
    outbox.append(&mut tx, [event("a", 0)]).await.unwrap();
    tx.commit().await.unwrap();
    let bus: Arc<dyn EventBus> = Arc::new(InMemoryBus::new());
    let mut relay = outbox::Relay::new(outbox.log("main").await.unwrap(), bus, config()).unwrap();
    assert_eq!(relay.run_once(std::future::pending()).await.unwrap().counts.published, 1);
}

/// Each a sentence that names the thing and the remedy.
#[tokio::test]
async fn what_is_no_database_of_ours_is_said_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let open = async |name: &str| {
        let options = SqliteConnectOptions::new().filename(path(name));
        SqliteLog::open(&options, Tables::default(), "main").await.expect_err(name)
    };
    let missing = open("missing.db").await;
    assert_eq!(missing.kind(), LogErrorKind::Schema);
    assert!(
        missing.to_string().contains("missing.db") && missing.to_string().contains("run `outbus migrate`"),
        "{missing}"
    );
    std::fs::write(path("text.db"), "this is a text, and long enough to be read as a page ".repeat(100)).unwrap();
    let text = open("text.db").await;
    assert!(text.to_string().contains("not a SQLite database"), "{text}");
    let empty =
        SqlitePool::connect_with(SqliteConnectOptions::new().filename(path("empty.db")).create_if_missing(true));
    let empty = empty.await.unwrap();
    sqlx::query("CREATE TABLE other (a)").execute(&empty).await.unwrap();
    assert!(open("empty.db").await.to_string().contains("run `outbus migrate`"));
    sqlx::query("CREATE TABLE outbus_migration (version INTEGER, name TEXT, at INTEGER)")
        .execute(&empty)
        .await
        .unwrap();
    assert!(open("empty.db").await.to_string().contains("run `outbus migrate`"));
    sqlx::query("INSERT INTO outbus_migration VALUES (9, 'future', 0)").execute(&empty).await.unwrap();
    assert!(open("empty.db").await.to_string().contains("use a newer outbus"));
    for url in ["sqlite::memory:", "sqlite:", "postgres://localhost/x"] {
        assert_eq!(sqlite_options(url).expect_err(url).kind(), LogErrorKind::Invalid, "{url}");
    }
}

/// Catches the mutants that note an event outside the effect's transaction, or not at all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_inbox_makes_an_effect_happen_once() {
    let shop = Shop::open().await;
    sqlx::query("CREATE TABLE effect (id TEXT)").execute(&shop.pool).await.unwrap();
    let bus: Arc<dyn EventBus> = Arc::new(InMemoryBus::new());
    for n in [0, 1, 0, 2, 1, 0] {
        bus.publish(event("a", n)).await.unwrap();
    }
    let failures = Arc::new(AtomicU32::new(0));
    let counter = Arc::clone(&failures);
    let handler = Inbox::new("billing").handle(shop.pool.clone(), move |tx, event, context| {
        let counter = Arc::clone(&counter);
        Box::pin(async move {
            sqlx::query("INSERT INTO effect VALUES (?)").bind(event.id()).execute(tx).await?;
            if event.id() == "a-1" && context.attempt() == 1 {
                counter.fetch_add(1, Ordering::SeqCst);
                return Err(HandlerError::of_event("after the effect"));
            }
            Ok(())
        })
    });
    let retry = RetryPolicy { backoff_min: Duration::from_millis(1), ..RetryPolicy::default() };
    let consumer = Consumer::new(Arc::clone(&bus), "orders", "billing").on_any(handler).retry(retry);
    let (topic, group) = ("orders".parse().unwrap(), "billing".parse().unwrap());
    let done = async {
        until("no lag", async || bus.admin().lag(&topic, &group).await.is_ok_and(|lag| lag.lag() == 0)).await;
    };
    let summary = within("consuming", consumer.run(done)).await.unwrap();
    assert_eq!((summary.handled, summary.failed), (6, failures.load(Ordering::SeqCst).into()));
    let effects: Vec<String> = sqlx::query_scalar("SELECT id FROM effect").fetch_all(&shop.pool).await.unwrap();
    assert_eq!(effects, ["a-0", "a-1", "a-2"]);

    sqlx::query("UPDATE outbus_inbox SET at = 0 WHERE id = 'a-0'").execute(&shop.pool).await.unwrap();
    assert_eq!(Inbox::new("billing").forget_old(&shop.pool).await.unwrap(), 1);
}
