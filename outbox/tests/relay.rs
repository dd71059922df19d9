//! The relay on SQLite: ownership, failures, set-aside events, retention. Each test says which mutant it catches where
//! that is not plain.

mod support;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bus_core::{
    BusError, ErrorKind, Event, EventBus, FileBus, FileConfig, Group, InMemoryBus, OrderOnFailure, RetryPolicy, Seq,
    SeqSet, SubscribeRequest, Topic, WriterId, read_events,
};
use outbox::{
    Acquire, Acquisition, Change, DeadRow, Lease, LogAdmin, LogError, LogErrorKind, LogSource, OnFailure, Page,
    PageLimit, Probe, Progress, Pruned, ReadRows, Relay, RelayConfig, RelayError, RelayEvent, Request, RequestKind,
    Selected,
};
use support::{Running, ScriptedBus, Shop, config, event, event_of, first_by_key, ids, until, within};

const FAIL_STOP: OrderOnFailure = OrderOnFailure::FailStop;
const INDEPENDENT: OrderOnFailure = OrderOnFailure::Independent;

/// `per_key` events of each of `keys`, interleaved.
fn events(keys: usize, per_key: usize) -> Vec<Event> {
    (0..per_key).flat_map(|n| (0..keys).map(move |key| event(&format!("key-{key}"), n))).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_is_published_once_in_order_with_its_log_and_place() {
    for order in [FAIL_STOP, INDEPENDENT] {
        let (shop, bus) = (Shop::open().await, ScriptedBus::new(order));
        let all = events(20, 100);
        for chunk in all.chunks(333) {
            shop.append(chunk.to_vec()).await;
        }
        let summary = shop.relay_once(bus.arc(), config()).await;
        assert_eq!((summary.events, summary.counts.published, summary.counts.failed), (2_000, 2_000, 0));
        let stored = bus.stored();
        assert_eq!(first_by_key(&stored), first_by_key(&all));
        assert_eq!(stored.len(), 2_000);
        let log_id: String = sqlx::query_scalar("SELECT log_id FROM outbus_log").fetch_one(&shop.pool).await.unwrap();
        for (at, event) in stored.iter().enumerate().take(if order == FAIL_STOP { 2_000 } else { 0 }) {
            assert_eq!(event.extension("outbuslog"), Some(log_id.as_str()));
            assert_eq!(event.extension("outbusseq"), Some((at + 1).to_string().as_str()));
        }
        let again = shop.relay_once(bus.arc(), config()).await;
        assert_eq!(again.events, 0, "nothing is published twice");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_says_whose_it_is_and_takes_over() {
    let (shop, bus) = (Shop::open().await, ScriptedBus::new(FAIL_STOP));
    let first = Running::start(shop.relay(bus.arc(), RelayConfig { owner: "first:1".into(), ..config() }).await);
    shop.append(events(3, 3)).await;
    bus.until_stored(9).await;
    let told: Arc<Mutex<Vec<RelayEvent>>> = Arc::default();
    let notes = Arc::clone(&told);
    let second = shop.relay(bus.arc(), RelayConfig { owner: "second:2".into(), ..config() }).await;
    let second = Running::start(second.observe(move |event| notes.lock().unwrap().push(event.clone())));
    let standby = RelayEvent::Standby { owner: "first:1".into() };
    until("the standby's word", async || told.lock().unwrap().contains(&standby)).await;
    first.kill().await;
    shop.append(vec![event("late", 0)]).await;
    bus.until_stored(10).await;
    second.stop().await;
    assert_eq!(ids(&bus.stored()).iter().filter(|id| *id == "late-0").count(), 1);
}

/// Catches the mutants that drop what is under way at shutdown, or write no last checkpoint.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_graceful_stop_repeats_nothing_and_frees_the_lease() {
    let shop = Shop::open().await;
    let dir = shop.dir.path().join("bus");
    let bus: Arc<dyn EventBus> = Arc::new(FileBus::open(FileConfig { dir: dir.clone() }).unwrap());
    shop.append(events(10, 300)).await;
    // A lease of an hour: if it were not freed, the next owner would not come in time.
    let config = || RelayConfig { lease: Duration::from_secs(3_600), window_events: 64, ..config() };
    let mut stored = 0;
    while stored < 3_000 {
        let relay = Running::start(shop.relay(Arc::clone(&bus), config()).await);
        let goal = stored + 200;
        until("some events", async || {
            stored = read_events(&dir, "orders").unwrap().len();
            stored >= goal.min(3_000)
        })
        .await;
        relay.stop().await;
    }
    let read = read_events(&dir, "orders").unwrap();
    assert_eq!(read.len(), 3_000, "something was published twice");
    assert_eq!(first_by_key(&read), first_by_key(&events(10, 300)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_event_is_parked_with_its_key_and_retried_in_order() {
    for order in [FAIL_STOP, INDEPENDENT] {
        let (shop, bus) = (Shop::open().await, ScriptedBus::new(order));
        bus.refuse("a-1");
        let relay = Running::start(shop.relay(bus.arc(), config()).await);
        shop.append((0..4).flat_map(|n| [event("a", n), event("b", n)])).await;
        until("the key is parked", async || shop.set_aside().await.len() == 3).await;
        shop.append(vec![event("a", 4), event("b", 4)]).await;
        bus.until_stored(6).await;
        until("the later event is parked behind", async || shop.set_aside().await.len() == 4).await;
        let parked: Vec<_> = shop.set_aside().await;
        assert_eq!(
            parked,
            [("a-1", "parked"), ("a-2", "parked"), ("a-3", "parked"), ("a-4", "parked")]
                .map(|(id, state)| (id.to_owned(), state))
        );
        assert_eq!(first_by_key(&bus.stored())["b"].len(), 5, "the other key flows");

        // Still refused: it waits again, and nothing overtakes it.
        let admin = shop.admin().await;
        let all = Selected::default();
        let vain = admin.ask("main", RequestKind::Retry, &all, None).await.unwrap();
        until("the vain retry", async || admin.progress(vain).await.unwrap().is_some_and(|p| p.ended)).await;
        let progress = admin.progress(vain).await.unwrap().unwrap();
        assert_eq!((progress.done, progress.failed), (0, 1));
        assert_eq!(shop.set_aside().await, parked);

        bus.rule(|_| None);
        let one = Selected { ids: Some(vec!["a-3".into()]), ..Selected::default() };
        let retry = admin.ask("main", RequestKind::Retry, &one, None).await.unwrap();
        until("the retry", async || admin.progress(retry).await.unwrap().is_some_and(|p| p.ended)).await;
        shop.append(vec![event("a", 5)]).await;
        bus.until_stored(11).await;
        let expected: Vec<String> = (0..6).map(|n| format!("a-{n}")).collect();
        assert_eq!(first_by_key(&bus.stored())["a"], expected, "from its head on, then the new ones");
        assert!(shop.set_aside().await.is_empty());
        relay.stop().await;
        assert_eq!(bus.stored().len(), 11, "nothing was published twice");
    }
}

/// Catches the mutant that forgets parked keys with the owner: 2 would overtake 1.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_parked_key_stays_parked_under_the_next_owner() {
    let (shop, bus) = (Shop::open().await, ScriptedBus::new(FAIL_STOP));
    bus.refuse("a-0");
    shop.append(vec![event("a", 0), event("a", 1)]).await;
    let summary = shop.relay_once(bus.arc(), config()).await;
    assert_eq!((summary.counts.parked, summary.counts.published), (2, 0));
    bus.rule(|_| None);
    shop.append(vec![event("a", 2), event("b", 0)]).await;
    shop.relay_once(bus.arc(), config()).await;
    assert_eq!(ids(&bus.stored()), ["b-0"]);
    assert_eq!(shop.set_aside().await.len(), 3);
    // A request that nobody was there to hear is done by the next owner, also one that does not stay.
    let admin = shop.admin().await;
    let id = admin.ask("main", RequestKind::Retry, &Selected::default(), None).await.unwrap();
    shop.relay_once(bus.arc(), config()).await;
    assert!(admin.progress(id).await.unwrap().unwrap().ended);
    assert_eq!(ids(&bus.stored()), ["b-0", "a-0", "a-1", "a-2"]);
}

/// Catches the mutant that lets a key flow as soon as its retry begins: 3 would overtake 1 and 2.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_events_wait_until_a_retried_key_is_drained() {
    let (shop, bus) = (Shop::open().await, ScriptedBus::new(FAIL_STOP));
    bus.refuse("a-0");
    let relay = Running::start(shop.relay(bus.arc(), config()).await);
    shop.append((0..3).map(|n| event("a", n))).await;
    until("the key is parked", async || shop.set_aside().await.len() == 3).await;
    bus.rule(|_| None);
    // One a second, so that there is time for a new event in between.
    let one_a_second = Some(1);
    shop.admin().await.ask("main", RequestKind::Retry, &Selected::default(), one_a_second).await.unwrap();
    bus.until_stored(1).await;
    shop.append(vec![event("a", 3), event("b", 0)]).await;
    bus.until_stored(5).await;
    relay.stop().await;
    assert_eq!(first_by_key(&bus.stored())["a"], ["a-0", "a-1", "a-2", "a-3"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn discarding_the_head_lets_an_operator_retry_the_rest() {
    let (shop, bus) = (Shop::open().await, ScriptedBus::new(FAIL_STOP));
    bus.refuse("a-0");
    let relay = Running::start(shop.relay(bus.arc(), config()).await);
    shop.append((0..3).map(|n| event("a", n))).await;
    until("the key is parked", async || shop.set_aside().await.len() == 3).await;
    let admin = shop.admin().await;
    let head = Selected { ids: Some(vec!["a-0".into()]), ..Selected::default() };
    let discard = admin.ask("main", RequestKind::Discard, &head, None).await.unwrap();
    until("the discard", async || admin.progress(discard).await.unwrap().is_some_and(|p| p.ended)).await;
    shop.append(vec![event("a", 3)]).await;
    until("the new event waits behind the rest", async || shop.set_aside().await.len() == 3).await;
    let retry = admin.ask("main", RequestKind::Retry, &Selected::default(), None).await.unwrap();
    until("the retry", async || admin.progress(retry).await.unwrap().is_some_and(|p| p.ended)).await;
    assert_eq!(ids(&bus.stored()), ["a-1", "a-2", "a-3"]);
    // Discarding the last of a key lets its new events flow.
    bus.refuse("b-0");
    shop.append(vec![event("b", 0)]).await;
    until("the other key is parked", async || shop.set_aside().await.len() == 1).await;
    let discard = admin.ask("main", RequestKind::Discard, &Selected::default(), None).await.unwrap();
    until("the discard", async || admin.progress(discard).await.unwrap().is_some_and(|p| p.ended)).await;
    shop.append(vec![event("b", 1)]).await;
    bus.until_stored(4).await;
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_letter_lets_its_key_go_on() {
    for order in [FAIL_STOP, INDEPENDENT] {
        let (shop, bus) = (Shop::open().await, ScriptedBus::new(order));
        bus.refuse("a-1");
        shop.append((0..4).map(|n| event("a", n))).await;
        let config = RelayConfig { on_failure: OnFailure::DeadLetter, ..config() };
        let summary = shop.relay_once(bus.arc(), config.clone()).await;
        assert_eq!((summary.counts.dead, summary.counts.published), (1, 3));
        assert_eq!(ids(&bus.stored()), ["a-0", "a-2", "a-3"]);
        assert_eq!(shop.set_aside().await, [("a-1".to_owned(), "dead")]);
        bus.rule(|_| None);
        shop.admin().await.ask("main", RequestKind::Retry, &Selected::default(), None).await.unwrap();
        shop.relay_once(bus.arc(), config).await;
        assert_eq!(ids(&bus.stored()), ["a-0", "a-2", "a-3", "a-1"]);
        assert!(shop.set_aside().await.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn halt_ends_the_relay_and_settles_nothing() {
    let (shop, bus) = (Shop::open().await, ScriptedBus::new(FAIL_STOP));
    bus.refuse("a-1");
    shop.append((0..3).map(|n| event("a", n))).await;
    let config = RelayConfig { on_failure: OnFailure::Halt, ..config() };
    let error = Running::start(shop.relay(bus.arc(), config.clone()).await).ended().await.unwrap_err();
    assert!(matches!(&error, RelayError::Halted { seq: Seq(2), .. }), "{error}");
    assert!(shop.set_aside().await.is_empty());
    bus.rule(|_| None);
    shop.relay_once(bus.arc(), config).await;
    assert_eq!(ids(&bus.stored()), ["a-0", "a-1", "a-2"]);
}

/// Catches the mutants that spend attempts on an outage, or write per event and attempt.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_spends_nothing_writes_nothing_and_heals() {
    let (shop, bus) = (Shop::open().await, ScriptedBus::new(FAIL_STOP));
    let log = Arc::new(CountingLog::new(shop.log("main").await));
    let events_told: Arc<Mutex<Vec<RelayEvent>>> = Arc::default();
    let notes = Arc::clone(&events_told);
    let relay = Relay::new(log.clone(), bus.arc(), config()).unwrap().wake(shop.outbox.wake_signal());
    let relay = relay.observe(move |event| {
        if !matches!(event, RelayEvent::Progress(_)) {
            notes.lock().unwrap().push(event.clone());
        }
    });
    let relay = Running::start(relay);
    shop.append(events(5, 20)).await;
    bus.until_stored(100).await;
    until("a checkpoint", async || shop.admin().await.status().await.unwrap()[0].backlog == 0).await;
    bus.away(true);
    let (tries, commits) = (bus.opened(), log.commits.load(Ordering::SeqCst));
    shop.append((20..220).flat_map(|n| (0..5).map(move |key| event(&format!("key-{key}"), n)))).await;
    until("many tries", async || bus.opened() >= tries + 40).await;
    let commits = log.commits.load(Ordering::SeqCst) - commits;
    assert!(commits <= 10, "{commits} writes while nothing could be published");
    assert!(shop.set_aside().await.is_empty());
    bus.away(false);
    bus.until_stored(1_100).await;
    let summary = relay.stop().await;
    assert_eq!((summary.counts.published, summary.counts.parked), (1_100, 0));
    assert!(bus.stored().len() <= 1_100 + 100, "each is stored once");
    let told = events_told.lock().unwrap().clone();
    let away = told.iter().filter(|event| matches!(event, RelayEvent::BusAway { .. })).count();
    assert_eq!((away, told.iter().filter(|event| **event == RelayEvent::BusBack).count()), (1, 1), "{told:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_is_no_event_and_one_that_is_too_large_are_parked() {
    let (shop, bus) = (
        Shop::open().await,
        Arc::new(InMemoryBus::with_config(bus_core::InMemoryConfig { event_bytes_max: 5_000, ..Default::default() })),
    );
    let insert = "INSERT INTO outbus_outbox (topic, key, type, data) VALUES ('orders', 'x', 'order.placed', '{}'), ('or/ders', 'y', 'order.placed', '{}'), ('orders', 'x', '', '{}')";
    sqlx::query(insert).execute(&shop.pool).await.unwrap();
    let large = Event::builder("orders", "order.placed").id("large").key("z").data(vec![b'x'; 6_000]).build().unwrap();
    shop.append(vec![large, event("z", 1), event("ok", 0)]).await;
    let summary = shop.relay_once(bus, config()).await;
    assert_eq!((summary.counts.published, summary.counts.parked, summary.events), (2, 4, 6));
    let rows = shop.admin().await.dead_letters(&Selected::default(), None, 10).await.unwrap();
    let reasons: Vec<_> = rows.iter().map(|row| row.reason.as_str()).collect();
    assert_eq!(reasons, ["invalid", "invalid", "too_large", "behind"]);
    assert!(rows[0].error.contains("topic") && rows[1].error.contains("type"), "the column is named: {rows:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_sinks_take_their_topics_each_at_its_pace() {
    let shop = Shop::open().await;
    let (orders, all) = (ScriptedBus::new(FAIL_STOP), ScriptedBus::new(INDEPENDENT));
    all.away(true);
    let config = |topics: &str| RelayConfig { topics: vec![topics.parse().unwrap()], ..config() };
    let main = Relay::new(shop.log("main").await, orders.arc(), config("orders*")).unwrap();
    let audit = Relay::new(shop.log("audit").await, all.arc(), config("*")).unwrap();
    let (main, audit) = (Running::start(main), Running::start(audit));
    for n in 0..10 {
        shop.append(vec![event("a", n), event_of("orders.eu", "a", n), event_of("stock", "a", n)]).await;
    }
    orders.until_stored(20).await;
    all.away(false);
    all.until_stored(30).await;
    assert!(orders.stored().iter().all(|event| event.topic().starts_with("orders")));
    let (main, audit) = (main.stop().await, audit.stop().await);
    assert_eq!((main.events, main.counts.published, audit.counts.published), (30, 20, 30));
}

/// Catches the mutant that goes on publishing without a lease.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_that_cannot_renew_stops_and_goes_on_when_it_can() {
    let (shop, bus) = (Shop::open().await, ScriptedBus::new(FAIL_STOP));
    let log = Arc::new(CountingLog::new(shop.log("main").await));
    let config = RelayConfig { lease: Duration::from_millis(500), ..config() };
    let relay = Relay::new(log.clone(), bus.arc(), config).unwrap().wake(shop.outbox.wake_signal());
    let relay = Running::start(relay);
    shop.append(vec![event("a", 0)]).await;
    bus.until_stored(1).await;
    log.refuse_commits.store(1, Ordering::SeqCst);
    // Longer than the lease lasts: no renewal has succeeded since.
    let refused = log.refused.load(Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(600)).await;
    until("refused renewals", async || log.refused.load(Ordering::SeqCst) > refused).await;
    let handed_over = bus.handed_over();
    shop.append(vec![event("a", 1)]).await;
    let more = log.refused.load(Ordering::SeqCst) + 5;
    until("further tries", async || log.refused.load(Ordering::SeqCst) >= more).await;
    assert_eq!(bus.handed_over(), handed_over, "handed over without a lease");
    log.refuse_commits.store(0, Ordering::SeqCst);
    bus.until_stored(2).await;
    relay.stop().await;
    assert_eq!(ids(&bus.stored()), ["a-0", "a-1"]);
}

/// The broker was written by a higher epoch, as after a database was restored: the owner goes above it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_below_the_brokers_epoch_goes_above_it() {
    let (shop, bus) = (Shop::open().await, InMemoryBus::new());
    let log_id: String = sqlx::query_scalar("SELECT log_id FROM outbus_log").fetch_one(&shop.pool).await.unwrap();
    let id = WriterId {
        log: log_id.parse().unwrap(),
        sink: "main".into(),
        incarnation: "before".into(),
        epoch: 70,
        since: None,
    };
    bus.open_writer(id).await.unwrap();
    shop.append(vec![event("a", 0)]).await;
    let summary = shop.relay_once(Arc::new(bus), config()).await;
    assert_eq!(summary.counts.published, 1);
    assert_eq!(shop.admin().await.status().await.unwrap()[0].epoch, 71);
}

/// A backup was restored, and the numbers drawn since mean other events. Catches the mutant that believes the broker:
/// the new events would be taken for duplicates and lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_broker_remembers_of_another_history_is_not_believed() {
    let (shop, bus) = (Shop::open().await, InMemoryBus::new());
    shop.append(vec![event("before", 0)]).await;
    shop.relay_once(Arc::new(bus.clone()), config()).await;
    sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)").execute(&shop.pool).await.unwrap();
    let backup = std::fs::read(shop.dir.path().join("shop.db")).unwrap();
    shop.append((1..5).map(|n| event("before", n))).await;
    assert_eq!(shop.relay_once(Arc::new(bus.clone()), config()).await.counts.published, 4);

    let restored = Shop::open().await;
    restored.pool.close().await;
    let path = restored.dir.path().join("shop.db");
    for suffix in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(format!("{}{suffix}", path.display()));
    }
    std::fs::write(&path, backup).unwrap();
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(&path);
    let pool = sqlx::SqlitePool::connect_with(options).await.unwrap();
    let outbox = outbox::Outbox::sqlite(pool.clone(), outbox::OutboxConfig::default());
    let restored = Shop { dir: restored.dir, pool, outbox };
    restored.append((1..5).map(|n| event("after", n))).await;
    let summary = restored.relay_once(Arc::new(bus.clone()), config()).await;
    assert_eq!((summary.counts.published, summary.counts.duplicates), (4, 0));
    let request = SubscribeRequest::new(Topic::new("orders").unwrap(), Group::new("all").unwrap());
    let mut subscription = bus.subscribe(request).await.unwrap();
    let mut read = Vec::new();
    while read.len() < 9 {
        for delivery in within("nine events", subscription.next_batch(16)).await.unwrap() {
            read.push(delivery.event().id().to_owned());
            delivery.ack();
        }
    }
    assert!((1..5).all(|n| read.contains(&format!("after-{n}"))), "{read:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_than_the_window_is_in_memory() {
    let (shop, bus) = (Shop::open().await, ScriptedBus::new(FAIL_STOP));
    bus.silent();
    shop.append(events(10, 100)).await;
    let log = Arc::new(CountingLog::new(shop.log("main").await));
    let config = RelayConfig { window_events: 100, drain: Duration::from_millis(50), ..config() };
    let relay = Running::start(Relay::new(log.clone(), bus.arc(), config).unwrap());
    until("a full window", async || bus.handed_over() == 100).await;
    let polls = log.polls.load(Ordering::SeqCst) + 5;
    until("further polls", async || log.polls.load(Ordering::SeqCst) >= polls).await;
    assert_eq!(bus.handed_over(), 100);
    assert!(log.rows.load(Ordering::SeqCst) <= 125, "read ahead of the window");
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nudge_is_heard_in_the_process_and_across_processes() {
    let (shop, bus) = (Shop::open().await, ScriptedBus::new(FAIL_STOP));
    let config =
        || RelayConfig { poll_interval: Duration::from_secs(3_600), lease: Duration::from_secs(7_200), ..config() };
    let nudged = Running::start(shop.relay(bus.arc(), config()).await);
    for n in 0..5 {
        shop.append(vec![event("a", n)]).await;
        bus.until_stored(n + 1).await;
    }
    nudged.stop().await;
    // Nobody nudges this one: it sees that the file changed.
    let watching = Running::start(Relay::new(shop.log("main").await, bus.arc(), config()).unwrap());
    for n in 5..10 {
        shop.append(vec![event("a", n)]).await;
        bus.until_stored(n + 1).await;
    }
    watching.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unroutable_topic_waits_and_the_others_flow() {
    let (shop, bus) = (Shop::open().await, ScriptedBus::new(INDEPENDENT));
    bus.rule(|event| (*event.topic() == *"nowhere").then(|| BusError::new(ErrorKind::Unroutable, "no queue is bound")));
    let relay = Running::start(shop.relay(bus.arc(), config()).await);
    shop.append((0..20).flat_map(|n| [event("a", n), event_of("nowhere", "a", n)])).await;
    bus.until_stored(20).await;
    until("status names the topic", async || {
        shop.admin().await.status().await.unwrap()[0].blocked.topics == ["nowhere"]
    })
    .await;
    assert!(shop.set_aside().await.is_empty());
    bus.rule(|_| None);
    bus.until_stored(40).await;
    relay.stop().await;
    let order: Vec<_> = bus.stored().into_iter().filter(|event| *event.topic() == *"nowhere").collect();
    assert_eq!(ids(&order), (0..20).map(|n| format!("a-{n}")).collect::<Vec<_>>());
}

/// Catches the mutant that looks for a key's parked rows among so many of all its rows: those that were given up alone
/// hid them, the key flowed too early, and the request never ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_given_up_alone_does_not_hide_what_is_parked() {
    for (order, kind) in
        [(INDEPENDENT, RequestKind::Retry), (FAIL_STOP, RequestKind::Retry), (FAIL_STOP, RequestKind::Discard)]
    {
        let (shop, bus) = (Shop::open().await, ScriptedBus::new(order));
        bus.rule(|event| ["a-0", "a-1"].contains(&event.id()).then(|| BusError::new(ErrorKind::Refused, "no")));
        shop.append([event("a", 0)]).await;
        shop.relay_once(bus.arc(), RelayConfig { on_failure: OnFailure::DeadLetter, ..config() }).await;
        shop.append([event("a", 1), event("a", 2)]).await;
        shop.relay_once(bus.arc(), config()).await;
        bus.rule(|_| None);
        let one = Selected { ids: Some(vec!["a-1".into()]), ..Selected::default() };
        shop.admin().await.ask("main", kind, &one, Some(1)).await.unwrap();
        shop.append([event("a", 3)]).await;
        shop.relay_once(bus.arc(), config()).await;
        let expected: &[&str] = if kind == RequestKind::Retry { &["a-1", "a-2", "a-3"] } else { &[] };
        assert_eq!(ids(&bus.stored()), expected, "{order:?}, {kind:?}");
    }
}

/// Catches the mutant that reads all holes of the last owner at once, whatever the window.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_keeps_to_its_window() {
    let (shop, bus) = (Shop::open().await, ScriptedBus::new(INDEPENDENT));
    bus.rule(|event| (**event.topic() == *"nowhere").then(|| BusError::new(ErrorKind::Unroutable, "no queue")));
    shop.append((0..3_000).map(|n| event_of("nowhere", "k", n))).await;
    let config = RelayConfig { window_events: 100, drain: Duration::from_millis(100), ..config() };
    let relay = Running::start(shop.relay(bus.arc(), config.clone()).await);
    until("all are held", async || shop.admin().await.status().await.unwrap()[0].high >= Seq(3_000)).await;
    relay.stop().await;
    bus.away(true);
    let log = Arc::new(CountingLog::new(shop.log("main").await));
    let relay = Running::start(Relay::new(log.clone(), bus.arc(), config).unwrap());
    until("the holes are looked at", async || log.rows.load(Ordering::SeqCst) >= 100).await;
    until("the bus was tried", async || bus.opened() >= 4).await;
    relay.stop().await;
    let read = log.rows.load(Ordering::SeqCst);
    assert!(read <= 200, "{read} events were read with a window of 100 and no broker");
}

/// A database that takes no checkpoint stops the relay: what a crash repeats is bounded. Catches the mutant that goes on
/// publishing meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_repeats_no_more_than_the_window_and_4096() {
    let (shop, bus) = (Shop::open().await, ScriptedBus::new(FAIL_STOP));
    shop.append(events(10, 1_200)).await;
    let log = Arc::new(CountingLog::new(shop.log("main").await));
    log.refuse_commits.store(1, Ordering::SeqCst);
    let config = RelayConfig { lease: Duration::from_secs(5), window_events: 256, ..config() };
    let relay = Running::start(Relay::new(log.clone(), bus.arc(), config.clone()).unwrap());
    bus.until_stored(4_096).await;
    let refused = log.refused.load(Ordering::SeqCst);
    until("some more checkpoints are refused", async || log.refused.load(Ordering::SeqCst) > refused + 10).await;
    relay.kill().await;
    let stored = bus.stored().len();
    assert!(stored <= 4_096 + 256, "{stored} events were published without a checkpoint");
    let again = Running::start(shop.relay(bus.arc(), config).await);
    bus.until_stored(stored + 12_000).await;
    again.stop().await;
    assert_eq!(bus.stored().len(), stored + 12_000);
    assert_eq!(first_by_key(&bus.stored()), first_by_key(&events(10, 1_200)));
}

/// A database that is away for an hour is told of in a line, not in ten thousand. Catches the mutant that tells each time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_away_is_told_of_once() {
    let (shop, bus) = (Shop::open().await, ScriptedBus::new(FAIL_STOP));
    shop.append(vec![event("a", 0)]).await;
    let log = Arc::new(CountingLog::new(shop.log("main").await));
    log.refuse_acquires.store(20, Ordering::SeqCst);
    let told: Arc<Mutex<Vec<RelayEvent>>> = Arc::default();
    let notes = Arc::clone(&told);
    let relay = Relay::new(log, bus.arc(), config()).unwrap();
    let relay = Running::start(relay.observe(move |event| notes.lock().unwrap().push(event.clone())));
    bus.until_stored(1).await;
    relay.stop().await;
    let away = |event: &&RelayEvent| matches!(event, RelayEvent::LogAway { .. });
    assert_eq!(told.lock().unwrap().iter().filter(away).count(), 1);
}

/// Catches the mutant that compares with where the owner began: an outage looked like another history once retention
/// had removed the broker's last event.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_row_is_no_other_history() {
    let (shop, bus) = (Shop::open().await, ScriptedBus::remembering());
    let config = RelayConfig { retention: Some(Duration::ZERO), ..config() };
    let relay = Running::start(shop.relay(bus.arc(), config).await);
    shop.append(events(1, 10)).await;
    until("an empty table", async || shop.rows().await == 0).await;
    bus.away(true);
    shop.append([event("late", 0)]).await;
    until("the bus is away", async || bus.opened() >= 3).await;
    bus.away(false);
    bus.until_stored(11).await;
    let epoch = shop.admin().await.status().await.unwrap()[0].epoch;
    relay.stop().await;
    assert_eq!(epoch, 1, "the owner took its log for another one");
}

/// Catches the mutant that forgets, with a turn that was dropped, that it was reading a held key's events.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_turn_forgets_no_key() {
    let (shop, bus) = (Shop::open().await, ScriptedBus::new(FAIL_STOP));
    bus.refuse("a-0");
    shop.append([event("a", 0), event("b", 0)]).await;
    let log = Arc::new(CountingLog::new(shop.log("main").await));
    log.slow_reads.store(true, Ordering::SeqCst);
    let config = RelayConfig { retry: RetryPolicy { attempts: 100, ..config().retry }, ..config() };
    let mut relay = Relay::new(log.clone(), bus.arc(), config).unwrap();
    until("a turn is dropped while it reads", async || {
        let turn = tokio::time::timeout(Duration::from_millis(20), relay.turn()).await;
        turn.is_err() && log.reads.load(Ordering::SeqCst) > 2
    })
    .await;
    log.slow_reads.store(false, Ordering::SeqCst);
    bus.rule(|_| None);
    within("the rest", relay.run_once(std::future::pending())).await.unwrap();
    assert_eq!(ids(&bus.stored()).len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settled_rows_go_after_their_time() {
    let (shop, bus) = (Shop::open().await, ScriptedBus::new(FAIL_STOP));
    let config = RelayConfig { retention: Some(Duration::from_secs(1)), ..config() };
    let relay = Running::start(shop.relay(bus.arc(), config).await);
    shop.append(events(10, 20)).await;
    bus.until_stored(200).await;
    until("an empty table", async || shop.rows().await == 0).await;
    shop.append(vec![event("late", 0)]).await;
    bus.until_stored(201).await;
    relay.stop().await;
}

#[tokio::test]
async fn a_relay_refuses_what_cannot_work() {
    let shop = Shop::open().await;
    let bus = ScriptedBus::new(FAIL_STOP);
    let refused = |config: RelayConfig| async {
        Relay::new(shop.log("main").await, bus.arc(), config).expect_err("refused").to_string()
    };
    assert!(refused(RelayConfig { allow_volatile: false, ..config() }).await.contains("allow_volatile"));
    assert!(refused(RelayConfig { window_events: 0, ..config() }).await.contains("window_events"));
    assert!(refused(RelayConfig { topics: vec![], ..config() }).await.contains("topics"));
    assert!(refused(RelayConfig { lease: Duration::from_millis(10), ..config() }).await.contains("lease"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn once_gives_up_where_another_owner_stays() {
    let (shop, bus) = (Shop::open().await, ScriptedBus::new(FAIL_STOP));
    let config = RelayConfig { lease: Duration::from_millis(300), owner: "stays:1".into(), ..config() };
    let owner = Running::start(shop.relay(bus.arc(), config.clone()).await);
    until("an owner", async || shop.admin().await.status().await.unwrap()[0].owner.is_some()).await;
    let mut once = shop.relay(bus.arc(), config).await;
    let error = within("an answer", once.run_once(std::future::pending())).await.unwrap_err();
    assert!(matches!(&error, RelayError::Owned { owner } if owner == "stays:1"), "{error}");
    owner.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_turn_does_what_can_be_done_and_no_more() {
    let (shop, bus) = (Shop::open().await, ScriptedBus::new(FAIL_STOP));
    shop.append(vec![event("a", 0)]).await;
    let mut relay = shop.relay(bus.arc(), config()).await;
    until("the event is out", async || {
        let progress = relay.turn().await.unwrap();
        assert!(!matches!(progress, Progress::Standby { .. }));
        bus.stored().len() == 1
    })
    .await;
    until("nothing is left to do", async || relay.turn().await.unwrap() == Progress::Idle).await;
}

/// A log that counts and can be told to refuse writes.
#[derive(Debug)]
struct CountingLog {
    inner: Arc<dyn LogSource>,
    commits: AtomicU64,
    refused: AtomicU64,
    refuse_commits: AtomicU64,
    polls: AtomicU64,
    rows: AtomicU64,
    reads: AtomicU64,
    slow_reads: AtomicBool,
    refuse_acquires: AtomicU64,
    /// The database is away.
    away: AtomicBool,
    /// How often a relay began to wait.
    waits: AtomicU64,
}

impl CountingLog {
    fn new(inner: Arc<dyn LogSource>) -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            inner,
            commits: zero(),
            refused: zero(),
            refuse_commits: zero(),
            polls: zero(),
            rows: zero(),
            reads: zero(),
            slow_reads: AtomicBool::new(false),
            refuse_acquires: zero(),
            away: AtomicBool::new(false),
            waits: zero(),
        }
    }
}

impl CountingLog {
    fn check(&self) -> Result<(), LogError> {
        if self.away.load(Ordering::SeqCst) {
            return Err(LogError::new(LogErrorKind::Unavailable, "away, says the test"));
        }
        Ok(())
    }
}

#[async_trait]
impl LogSource for CountingLog {
    fn sink(&self) -> &str {
        self.inner.sink()
    }

    async fn fetch(&self, after: Seq, limit: PageLimit) -> Result<Page, LogError> {
        self.check()?;
        let page = self.inner.fetch(after, limit).await?;
        self.rows.fetch_add(page.rows.len() as u64, Ordering::SeqCst);
        Ok(page)
    }

    async fn probe(&self, unseen: &SeqSet, limit: PageLimit) -> Result<Probe, LogError> {
        let probe = self.inner.probe(unseen, limit).await?;
        self.rows.fetch_add(probe.rows.len() as u64, Ordering::SeqCst);
        Ok(probe)
    }

    async fn read(&self, seqs: &SeqSet, limit: PageLimit) -> Result<ReadRows, LogError> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        if self.slow_reads.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        self.inner.read(seqs, limit).await
    }

    async fn last_seq(&self) -> Result<Seq, LogError> {
        self.inner.last_seq().await
    }

    async fn acquire(&self, request: &Acquire) -> Result<Acquisition, LogError> {
        let left = self.refuse_acquires.load(Ordering::SeqCst);
        if left > 0 {
            self.refuse_acquires.store(left - 1, Ordering::SeqCst);
            return Err(LogError::new(LogErrorKind::Unavailable, "locked by the test"));
        }
        self.inner.acquire(request).await
    }

    async fn commit(&self, lease: &Lease, change: &Change) -> Result<(), LogError> {
        self.check()?;
        if self.refuse_commits.load(Ordering::SeqCst) > 0 {
            self.refused.fetch_add(1, Ordering::SeqCst);
            return Err(LogError::new(LogErrorKind::Unavailable, "locked by the test"));
        }
        self.commits.fetch_add(1, Ordering::SeqCst);
        self.inner.commit(lease, change).await
    }

    async fn release(&self, lease: &Lease) -> Result<(), LogError> {
        self.inner.release(lease).await
    }

    async fn set_aside(&self, of: &Selected, after: Seq, limit: usize) -> Result<Vec<DeadRow>, LogError> {
        self.inner.set_aside(of, after, limit).await
    }

    async fn requests(&self) -> Result<Vec<Request>, LogError> {
        self.polls.fetch_add(1, Ordering::SeqCst);
        self.check()?;
        self.inner.requests().await
    }

    async fn prune(&self, janitor: &str, retention: Duration, rows_max: usize) -> Result<Pruned, LogError> {
        self.inner.prune(janitor, retention, rows_max).await
    }

    fn checkpoint_interval(&self) -> Duration {
        self.inner.checkpoint_interval()
    }

    async fn changed(&self) {
        self.waits.fetch_add(1, Ordering::SeqCst);
        self.inner.changed().await;
    }
}

/// Catches the mutants whose relay waits for what is due of a log that is not to be tried before long: it turned a thousand
/// times a second; and that does not go on when that time has come.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_whose_log_is_away_waits_and_does_not_spin() {
    let (shop, bus) = (Shop::open().await, ScriptedBus::new(FAIL_STOP));
    let log = Arc::new(CountingLog::new(shop.log("main").await));
    let retry =
        RetryPolicy { attempts: 3, backoff_min: Duration::from_millis(500), backoff_max: Duration::from_millis(500) };
    let config = RelayConfig { retry, lease: Duration::from_secs(1), ..config() };
    let relay = Relay::new(Arc::<CountingLog>::clone(&log) as Arc<dyn LogSource>, bus.arc(), config).expect("a relay");
    let running = Running::start(relay);
    shop.append(events(1, 1)).await;
    bus.until_stored(1).await;
    log.away.store(true, Ordering::SeqCst);
    until("it was met away", async || log.polls.load(Ordering::SeqCst) > 1).await;
    let before = log.waits.load(Ordering::SeqCst);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let waits = log.waits.load(Ordering::SeqCst) - before;
    assert!(waits < 100, "it turned {waits} times in two seconds");
    log.away.store(false, Ordering::SeqCst);
    shop.append([event("key-0", 1)]).await;
    bus.until_stored(2).await;
    running.stop().await;
}
