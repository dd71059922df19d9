//! A [`LogReader`] against everything writers do: what was committed is handed out once, in the order of places.

#[path = "support/database.rs"]
mod database;
mod support;
#[path = "support/writer.rs"]
mod writer;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bus_core::{Event, Seq};
use database::{Database, server};
use outbox::{LogErrorKind, LogReader, LogSource, PageLimit, Row};
use support::{Shop, event, until, within};

const ALL: PageLimit = PageLimit { events: 1_000, bytes: 1 << 20 };

fn id(row: &Row) -> String {
    row.event.as_ref().expect("a valid event").id().to_owned()
}

fn ids(rows: &[Row]) -> Vec<String> {
    rows.iter().map(id).collect()
}

/// A projection: it keeps what it was handed together with the position, and begins there again.
struct Projection {
    reader: LogReader,
    shared: Arc<dyn LogSource>,
    random: fastrand::Rng,
    rows: Vec<(Seq, String)>,
}

impl Projection {
    fn new(shared: Arc<dyn LogSource>, seed: u64) -> Self {
        let random = fastrand::Rng::with_seed(seed);
        Self { reader: LogReader::new(Arc::clone(&shared), Seq::ZERO), shared, random, rows: Vec::new() }
    }

    /// Reads a page of some size, or gives up after some time; now and then it is killed and begins again.
    async fn turn(&mut self, database: &Database) {
        let limit = PageLimit { events: self.random.usize(1..200), bytes: 1 << self.random.u32(0..20) };
        let patience = Duration::from_micros(self.random.u64(..50_000));
        if let Ok(page) = tokio::time::timeout(patience, self.reader.next_page(limit)).await {
            let page = page.expect("a page");
            assert!(!page.is_empty() && page.len() <= limit.events);
            self.rows.extend(page.iter().map(|row| (row.seq, id(row))));
            assert_eq!(self.reader.position(), page[page.len() - 1].seq);
        }
        if self.random.u8(..30) == 0 {
            let log = if self.random.bool() { Arc::clone(&self.shared) } else { database.log("other").await };
            let position = self.rows.last().map_or(Seq::ZERO, |(seq, _)| *seq);
            self.reader = LogReader::new(log, position).wake(database.outbox.wake_signal());
        }
    }

    async fn run(mut self, database: Arc<Database>, stop: Arc<AtomicBool>) -> Vec<(Seq, String)> {
        while !stop.load(Ordering::SeqCst) {
            self.turn(&database).await;
        }
        // Nothing is committed any more, and what was rolled back last holds nobody up.
        let committed = committed(&database).await;
        within("everything that was committed", async {
            while self.rows.last().map(|(seq, _)| *seq) < committed.last().map(|(seq, _)| *seq) {
                self.turn(&database).await;
            }
        })
        .await;
        self.rows
    }
}

async fn committed(database: &Database) -> Vec<(Seq, String)> {
    let rows = database.client().await.query(&database.sql("SELECT seq, id FROM {p}outbox ORDER BY seq"), &[]).await;
    let row = |row: &tokio_postgres::Row| (Seq(row.get::<_, i64>(0).unsigned_abs()), row.get(1));
    rows.expect("a list").iter().map(row).collect()
}

/// Writers side by side with rollbacks, savepoints, two-phase commit, serialization failures and slow inserts; write
/// transactions that stay open in the same database and in another one of the server; and readers that give up waiting and
/// are killed again and again, two of them on one source. Catches the mutants that take a gap for dead at sight, and that
/// wait for every write transaction of the database or the server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn whatever_writers_do_is_read_once_in_order() {
    let database = Arc::new(Database::create().await);
    let seed = writer::seed();
    let mut foreign = [database.client().await, Database::client_at(&other_database(&server())).await];
    let [here, there] = &mut foreign;
    let (here, there) = (here.transaction().await.expect("it begins"), there.transaction().await.expect("it begins"));
    for open in [&here, &there] {
        open.batch_execute("CREATE TEMPORARY TABLE foreign_work (n int); INSERT INTO foreign_work VALUES (1)")
            .await
            .expect("an xid");
    }
    let (stop, end) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let writers = writer::start(&database, seed, &stop).await;
    let shared = database.log("projection").await;
    let mut projections = tokio::task::JoinSet::new();
    for n in 0..3 {
        let log = if n < 2 { Arc::clone(&shared) } else { database.log("projection").await };
        projections.spawn(Projection::new(log, seed ^ n).run(Arc::clone(&database), Arc::clone(&end)));
    }
    let (counting, count) = (database.client().await, database.sql("SELECT count(*) FROM {p}outbox"));
    until("enough is committed", async || {
        counting.query_one(&count, &[]).await.expect("a count").get::<_, i64>(0) > 800
    })
    .await;
    stop.store(true, Ordering::SeqCst);
    writers.join_all().await;
    end.store(true, Ordering::SeqCst);
    let committed = committed(&database).await;
    for rows in projections.join_all().await {
        assert!(rows.is_sorted_by(|one, two| one.0 < two.0), "the order of places, and nothing twice");
        let lost: Vec<_> = committed.iter().filter(|row| !rows.contains(row)).collect();
        assert!(lost.is_empty(), "lost: {lost:?}");
        assert_eq!(rows, committed, "and nothing else");
    }
    assert!(committed.len() > 200, "only {} events", committed.len());
    here.rollback().await.expect("it was open all the time");
    there.rollback().await.expect("it was open all the time");
}

/// Another database of the same server: its transactions have numbers of the same row.
fn other_database(url: &str) -> String {
    let (server, _) = url.rsplit_once('/').expect("a database in the URL");
    format!("{server}/postgres?sslmode=disable")
}

/// A transaction that drew a place holds the reader up until it ends, whichever way; a relay goes on meanwhile. Catches the
/// mutants that pass a gap and that wait at one whose transaction was rolled back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn a_reader_waits_at_a_gap_until_its_transaction_ends() {
    let database = Database::create().await;
    let mut reader = LogReader::new(database.log("projection").await, Seq::ZERO);
    let (mut slow, mut failing) = (database.client().await, database.client().await);
    database.append([event("a", 0)]).await;
    let mut open = slow.transaction().await.expect("a transaction");
    database.outbox.append(&mut open, [event("slow", 0)]).await.expect("it is appended");
    database.append([event("a", 1)]).await;
    let mut never = failing.transaction().await.expect("a transaction");
    database.outbox.append(&mut never, [event("never", 0)]).await.expect("it is appended");
    database.append([event("a", 2)]).await;
    assert_eq!(ids(&reader.next_page(ALL).await.expect("a page")), ["a-0"]);
    wait_at_gap(&mut reader).await;
    assert_eq!(reader.waits_at(), Some(Seq(2)));
    open.commit().await.expect("it commits");
    let page = within("what waited", reader.next_page(ALL)).await.expect("a page");
    assert_eq!(ids(&page), ["slow-0", "a-1"]);
    assert_eq!((reader.position(), reader.read(ALL).await.expect("a page")), (Seq(3), vec![]));
    never.rollback().await.expect("it rolls back");
    let page = within("what is behind a rolled-back place", reader.next_page(ALL)).await.expect("a page");
    assert_eq!((ids(&page), reader.waits_at()), (vec!["a-2".to_owned()], None));
}

/// A prepared transaction holds a reader up as an open one does, whether it was prepared before its gap was seen or after.
/// Catches the mutant that is blind to prepared transactions: it hands out what is behind the gap.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn a_reader_waits_for_a_prepared_transaction() {
    let database = Database::create().await;
    let mut reader = LogReader::new(database.log("projection").await, Seq::ZERO);
    let mut client = database.client().await;
    for (n, is_seen_first) in [false, true].into_iter().enumerate() {
        let name = format!("{}_{n}", database.schema);
        let mut open = client.transaction().await.expect("a transaction");
        database.outbox.append(&mut open, [event("slow", n)]).await.expect("it is appended");
        database.append([event("a", n)]).await;
        if is_seen_first {
            wait_at_gap(&mut reader).await;
        }
        open.batch_execute(&format!("PREPARE TRANSACTION '{name}'")).await.expect("it is prepared");
        drop(open);
        wait_at_gap(&mut reader).await;
        client.batch_execute(&format!("COMMIT PREPARED '{name}'")).await.expect("it commits");
        let page = within("what waited", reader.next_page(ALL)).await.expect("a page");
        assert_eq!(ids(&page), [format!("slow-{n}"), format!("a-{n}")]);
    }
}

/// Looks again and again at a gap that stays, for longer than it takes to close one.
async fn wait_at_gap(reader: &mut LogReader) {
    for _ in 0..40 {
        assert_eq!(ids(&reader.read(ALL).await.expect("a page")), Vec::<String>::new(), "it waits");
        assert!(reader.waits_at().is_some());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Where nothing may be written, and little read, gaps are closed all the same. Catches the mutant that reads rows FOR SHARE.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn a_role_that_may_only_read_reads_the_log() {
    let database = Database::create().await;
    let role = format!("{}_reader", database.schema);
    database
        .run(&format!(
            "CREATE ROLE {role} LOGIN PASSWORD 'reader'; ALTER ROLE {role} SET default_transaction_read_only = on; \
             GRANT USAGE ON SCHEMA {schema} TO {role}; GRANT SELECT ON {schema}.migration, {{p}}outbox, {{p}}outbox_seq \
             TO {role}",
            schema = database.schema
        ))
        .await;
    let mut client = database.client().await;
    let mut failed = client.transaction().await.expect("a transaction");
    database.outbox.append(&mut failed, [event("never", 0)]).await.expect("it is appended");
    failed.rollback().await.expect("it rolls back");
    database.append([event("a", 0), event("a", 1)]).await;
    let (_, rest) = database.url.split_once('@').expect("a user in the URL");
    let mut reader =
        LogReader::new(database.at(&format!("postgres://{role}:reader@{rest}")).log("report").await, Seq::ZERO);
    let page = within("the log", reader.next_page(ALL)).await.expect("a page");
    assert_eq!(ids(&page), ["a-0", "a-1"]);
    drop(reader);
    database.run(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
}

/// What was removed is skipped, and what was not yet removed follows. Catches the mutant that keeps a dead gap.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn removed_rows_are_skipped_on_postgresql() {
    let database = Database::create().await;
    database.append((0..100).map(|n| event("a", n))).await;
    database.run("DELETE FROM {p}outbox WHERE seq <= 40 OR seq BETWEEN 60 AND 69").await;
    let mut reader = LogReader::new(database.log("late").await, Seq(10));
    let mut read = Vec::new();
    while read.len() < 50 {
        read.extend(within("the rest", reader.next_page(PageLimit { events: 7, ..ALL })).await.expect("a page"));
    }
    let expected: Vec<String> = (40..59).chain(69..100).map(|n| format!("a-{n}")).collect();
    assert_eq!(ids(&read), expected);
}

/// Writers in several tasks, and a reader that gives up waiting and begins again. Catches the mutant that moves its
/// position before the rows are handed out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_on_sqlite_is_read_once_in_order() {
    const EVENTS: usize = 200;
    let shop = Arc::new(Shop::open().await);
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..2 {
        let shop = Arc::clone(&shop);
        writers.spawn(async move {
            for n in 0..EVENTS / 2 {
                shop.append([event(&format!("w{writer}"), n)]).await;
            }
        });
    }
    let mut random = fastrand::Rng::with_seed(7);
    let mut reader = LogReader::new(shop.log("report").await, Seq::ZERO).wake(shop.outbox.wake_signal());
    let mut read: Vec<Row> = Vec::new();
    within("everything", async {
        while read.len() < EVENTS {
            let limit = PageLimit { events: random.usize(1..9), ..ALL };
            let patience = Duration::from_micros(random.u64(..3_000));
            if let Ok(page) = tokio::time::timeout(patience, reader.next_page(limit)).await {
                read.extend(page.expect("a page"));
            }
            if random.u8(..10) == 0 {
                reader = LogReader::new(shop.log("report").await, reader.position());
            }
        }
    })
    .await;
    writers.join_all().await;
    assert!(read.is_sorted_by(|one, two| one.seq < two.seq));
    for writer in ["w0", "w1"] {
        let of_writer: Vec<String> = ids(&read).into_iter().filter(|id| id.starts_with(writer)).collect();
        assert_eq!(of_writer, (0..EVENTS / 2).map(|n| format!("{writer}-{n}")).collect::<Vec<_>>());
    }
    assert!(reader.read(ALL).await.expect("a page").is_empty());
}

/// A reader that waits is told of a commit, and not only by the clock: twenty commits take less than a second each.
/// Catches the mutant that only polls.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiting_reader_hears_of_a_commit() {
    let shop = Shop::open().await;
    let mut reader = LogReader::new(shop.log("report").await, Seq::ZERO).wake(shop.outbox.wake_signal());
    let started = std::time::Instant::now();
    for n in 0..20 {
        let (page, ()) = tokio::join!(reader.next_page(ALL), async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            shop.append([event("a", n)]).await;
        });
        assert_eq!(ids(&page.expect("a page")), [format!("a-{n}")]);
    }
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
}

/// A log that was restored to an earlier state is told, where going on would skip what is appended from then on; one whose
/// rows went by retention is none. Catches the mutant that takes the last row for the last place.
#[tokio::test]
async fn a_log_that_was_restored_is_told_and_one_that_was_pruned_goes_on() {
    let shop = Shop::open().await;
    let append = async |n: usize| shop.append([event("a", n)]).await;
    for n in 0..3 {
        append(n).await;
    }
    let mut reader = LogReader::new(shop.log("report").await, Seq::ZERO);
    assert_eq!(reader.next_page(ALL).await.expect("a page").len(), 3);
    sqlx::query("DELETE FROM outbus_outbox").execute(&shop.pool).await.expect("the rows go");
    let mut pruned = LogReader::new(shop.log("report").await, reader.position());
    assert!(pruned.read(ALL).await.expect("a page").is_empty());
    append(3).await;
    assert_eq!(ids(&pruned.read(ALL).await.expect("a page")), ["a-3"]);
    sqlx::query("DELETE FROM outbus_outbox").execute(&shop.pool).await.expect("the rows go");
    sqlx::query("UPDATE sqlite_sequence SET seq = 1").execute(&shop.pool).await.expect("it is set back");
    let mut restored = LogReader::new(shop.log("report").await, pruned.position());
    let error = restored.read(ALL).await.expect_err("the places mean other events");
    assert_eq!(error.kind(), LogErrorKind::Invalid);
    assert!(error.to_string().contains("ends at 1 and was read up to 4"), "{error}");
}

/// A row that is no event is handed out as such, in its place: whoever reads decides. A promise of the shape alone.
#[tokio::test]
async fn a_row_that_is_no_event_is_handed_out_in_its_place() {
    let shop = Shop::open().await;
    shop.append([event("a", 0)]).await;
    let insert = "INSERT INTO outbus_outbox (topic, type, data) VALUES ('orders', '', x'31')";
    sqlx::query(insert).execute(&shop.pool).await.expect("a row");
    shop.append([event("a", 1)]).await;
    let mut reader = LogReader::new(shop.log("report").await, Seq::ZERO);
    let rows = reader.read(ALL).await.expect("a page");
    let events: Vec<Option<&Event>> = rows.iter().map(|row| row.event.as_ref().ok()).collect();
    assert_eq!(events.iter().map(Option::is_some).collect::<Vec<_>>(), [true, false, true]);
    until("nothing is left", async || reader.read(ALL).await.expect("a page").is_empty()).await;
}
