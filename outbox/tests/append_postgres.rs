//! Appending to PostgreSQL in a transaction of each client: with commit, rollback and savepoint; and with plain SQL.

#[path = "support/database.rs"]
mod database;

use std::time::Duration;

use bus_core::{Event, Seq, Timestamp};
use database::Database;
use diesel_async::{AsyncConnection, AsyncPgConnection, SimpleAsyncConnection};
use outbox::{AppendError, AppendErrorReason, Insert, LogError, LogErrorKind, OutboxTx, PageLimit, Tables};
use sqlx::Connection as _;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
};

/// One event, and more than one statement takes.
fn batches() -> [Vec<Event>; 2] {
    let event = |n: usize| {
        let builder = Event::json("orders", "order.placed", &n).expect("a number is JSON");
        // PostgreSQL's calendar has no year 0, an event's has.
        let time = if n == 1 { i64::MIN } else { 1_700_000_000_000_001 + n as i64 };
        let builder = builder.time(Timestamp::from_unix_micros(time));
        builder.id(format!("e-{n}")).key("k").subject("s").extension("traceparent", "00-1").build().expect("an event")
    };
    [vec![event(0)], (1..1_500).map(event).collect()]
}

/// All events of the log, in order, as a relay reads them.
async fn read(database: &Database) -> Vec<Event> {
    let limit = PageLimit { events: 10_000, bytes: 1 << 30 };
    let rows = database.log("main").await.fetch(Seq::ZERO, limit).await.expect("a page").rows;
    rows.into_iter().map(|row| row.event.expect("an event")).collect()
}

async fn check(database: &Database) {
    let expected: Vec<Event> = batches().into_iter().flatten().collect();
    let found = read(database).await;
    assert_eq!(found.len(), expected.len(), "what was committed");
    found.iter().zip(&expected).for_each(|(found, expected)| assert_eq!(found, expected));
}

#[tokio::test]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn by_tokio_postgres() {
    let database = Database::create().await;
    let mut client = database.client().await;
    for events in batches() {
        let mut transaction = client.transaction().await.unwrap();
        database.outbox.append(&mut transaction, events.clone()).await.unwrap();
        let mut savepoint = transaction.transaction().await.unwrap();
        database.outbox.append(&mut savepoint, events.clone()).await.unwrap();
        savepoint.rollback().await.unwrap();
        transaction.commit().await.unwrap();
        let mut rolled_back = client.transaction().await.unwrap();
        database.outbox.append(&mut rolled_back, events).await.unwrap();
        rolled_back.rollback().await.unwrap();
    }
    check(&database).await;
}

/// The last statement and the COMMIT are one round trip: a proxy keeps the server's answers back until it has seen the
/// COMMIT. Catches the mutant that awaits the insert first, and those that leave the transaction open or commit what was
/// refused (each tried).
#[tokio::test]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn by_tokio_postgres_with_the_commit_in_one_round_trip() {
    let database = Database::create().await;
    let proxy = Withholding::start(&database.url).await;
    let mut client = database.at(&proxy.url).client().await;
    let one = database.outbox.prepare(&client).await.unwrap();
    for events in batches() {
        let transaction = database.outbox.begin(client.build_transaction()).await.unwrap().prepared(&one);
        // Of several statements the last one is sent with the COMMIT.
        if events.len() == 1 {
            proxy.withhold();
        }
        let committing = transaction.append_and_commit(events.clone());
        tokio::time::timeout(Duration::from_secs(20), committing).await.expect("one round trip").unwrap();
        let mut rolled_back = database.outbox.begin(client.build_transaction()).await.unwrap();
        database.outbox.append(&mut *rolled_back, events.clone()).await.unwrap();
        rolled_back.rollback().await.unwrap();
        drop(database.outbox.begin(client.build_transaction()).await.unwrap());
    }
    let empty = database.outbox.begin(client.build_transaction()).await.unwrap();
    empty.append_and_commit(Vec::<Event>::new()).await.unwrap();
    let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    let state = "SELECT state FROM pg_stat_activity WHERE pid = $1";
    let state: String = database.client().await.query_one(state, &[&pid]).await.unwrap().get(0);
    assert_eq!(state, "idle", "no transaction is left open");
    check(&database).await;
}

/// What the server refuses, at the insert or at the commit, takes the whole transaction with it.
#[tokio::test]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn what_is_refused_with_the_commit_is_rolled_back() {
    let database = Database::create().await;
    let setting = "CREATE TABLE {p}parent (id int PRIMARY KEY); \
         CREATE TABLE {p}child (parent int REFERENCES {p}parent DEFERRABLE INITIALLY DEFERRED); \
         ALTER TABLE {p}outbox ADD CONSTRAINT none_is_bad CHECK (id <> 'bad')";
    database.run(setting).await;
    let mut client = database.client().await;
    let child = database.sql("INSERT INTO {p}child VALUES (1)");
    let bad = Event::json("orders", "order.placed", &0).unwrap().id("bad").build().unwrap();
    let with_bad = batches().into_iter().flatten().chain([bad]).collect::<Vec<_>>();
    for (events, says) in [(with_bad, "none_is_bad"), (batches()[0].clone(), "child_parent_fkey")] {
        let transaction = database.outbox.begin(client.build_transaction()).await.unwrap();
        transaction.execute(&child, &[]).await.unwrap();
        let refused = transaction.append_and_commit(events).await.unwrap_err();
        assert!(refused.to_string().contains(says), "{refused}");
    }
    let rows = database.sql("SELECT (SELECT count(*) FROM {p}child) + (SELECT count(*) FROM {p}outbox)");
    assert_eq!(client.query_one(&rows, &[]).await.unwrap().get::<_, i64>(0), 0, "nothing is committed");
}

/// A TCP proxy that, when told to, keeps the server's answers back until the client has sent a COMMIT.
struct Withholding {
    url: String,
    withhold: watch::Sender<bool>,
}

impl Withholding {
    async fn start(server: &str) -> Self {
        let (head, rest) = server.split_once('@').expect("a user in the URL");
        let (target, path) = rest.split_once('/').expect("a database in the URL");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("{head}@{}/{path}?sslmode=disable", listener.local_addr().expect("an address"));
        let far = TcpStream::connect(target).await.expect("the server");
        let (withhold, mut withheld) = watch::channel(false);
        let seen = withhold.clone();
        tokio::spawn(async move {
            let ((mut near_in, mut near_out), (mut far_in, mut far_out)) =
                (listener.accept().await.expect("the client").0.into_split(), far.into_split());
            let asking = async {
                let mut buffer = [0; 65_536];
                while let Ok(count @ 1..) = near_in.read(&mut buffer).await {
                    far_out.write_all(&buffer[..count]).await.expect("it is taken");
                    if buffer[..count].windows(6).any(|word| word == b"COMMIT") {
                        seen.send_replace(false);
                    }
                }
            };
            let answering = async {
                let mut buffer = [0; 65_536];
                while let Ok(count @ 1..) = far_in.read(&mut buffer).await {
                    withheld.wait_for(|withheld| !withheld).await.expect("its sender lives");
                    near_out.write_all(&buffer[..count]).await.expect("it is taken");
                }
            };
            tokio::join!(asking, answering)
        });
        Self { url, withhold }
    }

    fn withhold(&self) {
        self.withhold.send_replace(true);
    }
}

#[tokio::test]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn by_deadpool() {
    let database = Database::create().await;
    let config = deadpool_postgres::Config { url: Some(database.url.clone()), ..Default::default() };
    let pool = config.create_pool(None, tokio_postgres::NoTls).unwrap();
    let mut client = pool.get().await.unwrap();
    for events in batches() {
        let mut transaction = client.transaction().await.unwrap();
        database.outbox.append(&mut transaction, events.clone()).await.unwrap();
        let mut savepoint = transaction.transaction().await.unwrap();
        database.outbox.append(&mut savepoint, events.clone()).await.unwrap();
        savepoint.rollback().await.unwrap();
        transaction.commit().await.unwrap();
        let mut rolled_back = client.transaction().await.unwrap();
        database.outbox.append(&mut rolled_back, events).await.unwrap();
        rolled_back.rollback().await.unwrap();
    }
    check(&database).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn by_sqlx() {
    let database = Database::create().await;
    let mut connection = sqlx::PgConnection::connect(&database.url).await.unwrap();
    for events in batches() {
        let mut transaction = connection.begin().await.unwrap();
        database.outbox.append(&mut transaction, events.clone()).await.unwrap();
        let mut savepoint = transaction.begin().await.unwrap();
        database.outbox.append(&mut savepoint, events.clone()).await.unwrap();
        savepoint.rollback().await.unwrap();
        transaction.commit().await.unwrap();
        let mut rolled_back = connection.begin().await.unwrap();
        database.outbox.append(&mut rolled_back, events).await.unwrap();
        rolled_back.rollback().await.unwrap();
    }
    check(&database).await;
}

#[tokio::test]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn by_diesel() {
    type Manager = <AsyncPgConnection as AsyncConnection>::TransactionManager;
    use diesel_async::TransactionManager as _;

    let database = Database::create().await;
    let mut connection = AsyncPgConnection::establish(&database.url).await.unwrap();
    let outside = database.outbox.append(&mut connection, batches()[0].clone()).await.unwrap_err();
    assert!(matches!(outside.reason(), AppendErrorReason::NotInTransaction), "{outside}");
    for events in batches() {
        Manager::begin_transaction(&mut connection).await.unwrap();
        database.outbox.append(&mut connection, events.clone()).await.unwrap();
        Manager::begin_transaction(&mut connection).await.unwrap();
        database.outbox.append(&mut connection, events.clone()).await.unwrap();
        Manager::rollback_transaction(&mut connection).await.unwrap();
        Manager::commit_transaction(&mut connection).await.unwrap();
        Manager::begin_transaction(&mut connection).await.unwrap();
        database.outbox.append(&mut connection, events).await.unwrap();
        Manager::rollback_transaction(&mut connection).await.unwrap();
    }
    connection.batch_execute("SELECT 1").await.unwrap();
    check(&database).await;
}

/// The example of [`OutboxTx`].
struct Begun<'a>(&'a mut sqlx::PgConnection);

#[async_trait::async_trait]
impl OutboxTx for Begun<'_> {
    async fn insert(&mut self, insert: &Insert<'_>) -> Result<(), AppendError> {
        for rows in insert.postgres_rows() {
            let query = sqlx::query(sqlx::AssertSqlSafe(insert.postgres_many())).bind(&rows.id).bind(&rows.topic);
            let query = query.bind(&rows.key).bind(&rows.event_type).bind(&rows.source).bind(&rows.subject);
            let query = query.bind(&rows.content_type).bind(&rows.extensions).bind(&rows.time).bind(&rows.data);
            let refused = |error| LogError::with_source(LogErrorKind::Invalid, "the insert is refused", error);
            query.execute(&mut *self.0).await.map_err(refused)?;
        }
        Ok(())
    }
}

#[tokio::test]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn by_a_driver_that_is_adopted() {
    let database = Database::create().await;
    let mut connection = sqlx::PgConnection::connect(&database.url).await.unwrap();
    for events in batches() {
        for (savepoint, end) in [("SAVEPOINT one", "COMMIT"), ("SELECT 1", "ROLLBACK")] {
            sqlx::raw_sql("BEGIN").execute(&mut connection).await.unwrap();
            database.outbox.append(&mut Begun(&mut connection), events.clone()).await.unwrap();
            sqlx::raw_sql(savepoint).execute(&mut connection).await.unwrap();
            if end == "COMMIT" {
                database.outbox.append(&mut Begun(&mut connection), events.clone()).await.unwrap();
                sqlx::raw_sql("ROLLBACK TO one").execute(&mut connection).await.unwrap();
            }
            sqlx::raw_sql(end).execute(&mut connection).await.unwrap();
        }
    }
    check(&database).await;
}

/// Whoever gives a place is refused: a relay took the highest for the end of the log, and never published those below it.
///
/// Any language appends with an INSERT of three columns, or with the function.
#[tokio::test]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn by_plain_sql() {
    let database = Database::create().await;
    database.run("INSERT INTO {p}outbox (topic, type, data) VALUES ('orders', 'order.placed', '{\"n\":1}')").await;
    database.run("SELECT {p}append('orders', 'order.placed', '{\"n\":2}', key => 'k', subject => 'order/2')").await;
    let events = read(&database).await;
    assert_eq!(events.iter().map(|event| event.data().as_ref()).collect::<Vec<_>>(), [b"{\"n\":1}", b"{\"n\":2}"]);
    assert_eq!((events[0].key(), events[1].key(), events[1].subject()), (None, Some("k"), Some("order/2")));
    assert_eq!((events[0].source(), events[0].content_type()), ("/outbus", "application/json"));
    // A place that is given would be passed over, or make relays pass over others.
    for (drawn, given) in
        [("SELECT 1", 400), ("SELECT {p}append('o', 't', '1')", 400), ("SELECT {p}append('o', 't', '1')", 1)]
    {
        let client = database.client().await;
        client.batch_execute(&database.sql(drawn)).await.unwrap();
        client.batch_execute(&database.sql("DELETE FROM {p}outbox")).await.unwrap();
        let sql = format!("INSERT INTO {{p}}outbox (seq, topic, type, data) VALUES ({given}, 'o', 't', '1')");
        assert!(client.batch_execute(&database.sql(&sql)).await.is_err(), "{drawn}, {given}");
    }
    let large = database.client().await;
    let sql = database
        .sql("INSERT INTO {p}outbox (topic, type, data) VALUES ('o', 't', convert_to(repeat('x', 921601), 'UTF8'))");
    assert!(large.batch_execute(&sql).await.is_err(), "the table has a limit");
}

/// Migrating from several processes at once takes each step once; what `--print` shows makes the same tables.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn migrating_is_safe_to_repeat_and_to_do_at_once() {
    let database = Database::create().await;
    let name = format!("{}_again", database.schema);
    let tables = Tables::new(&name, 1_000).unwrap();
    let mut at_once = tokio::task::JoinSet::new();
    for _ in 0..6 {
        let (config, tables) = (database.config.clone(), tables.clone());
        at_once.spawn(async move { outbox::migrate_postgres(&config, &tables).await.unwrap().len() });
    }
    let steps: usize = at_once.join_all().await.into_iter().sum();
    assert_eq!(steps, 1, "each step is taken once");
    let shape = async |schema: &str| -> Vec<String> {
        let sql = "SELECT table_name || '.' || column_name || ' ' || data_type || ' ' || coalesce(column_default, '') \
             FROM information_schema.columns WHERE table_schema = $1 ORDER BY 1";
        let rows = database.client().await.query(sql, &[&schema]).await.unwrap();
        rows.iter().map(|row| row.get::<_, String>(0).replace(schema, "")).collect()
    };
    let printed = format!("{}_printed", database.schema);
    let sql = outbox::print_postgres_migrations(&Tables::new(&printed, 1_000).unwrap());
    database.client().await.batch_execute(&sql).await.unwrap();
    assert_eq!(shape(&printed).await, shape(&name).await);
}
