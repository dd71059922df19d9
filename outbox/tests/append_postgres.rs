//! Appending to PostgreSQL in a transaction of each client: with commit, rollback and savepoint; and with plain SQL.

#[path = "support/database.rs"]
mod database;

use bus_core::{Event, Seq, Timestamp};
use database::Database;
use diesel_async::{AsyncConnection, AsyncPgConnection, SimpleAsyncConnection};
use outbox::{AppendErrorReason, PageLimit, Tables};
use sqlx::Connection as _;

/// One event, and more than one statement takes.
fn batches() -> [Vec<Event>; 2] {
    let event = |n: usize| {
        let builder = Event::json("orders", "order.placed", &n).expect("a number is JSON");
        let builder = builder.time(Timestamp::from_unix_micros(1_700_000_000_000_001 + n as i64));
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
