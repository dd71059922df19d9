//! The inbox on PostgreSQL: each event's effect once, whatever client has the pool.
//!
//! Method: the same cases on the pool of each client, and on one that is adopted; an effect is a row, written in the
//! handler's transaction. Handlers are called as a consumer calls them, and dropped as its time-out drops them.

#![allow(clippy::unwrap_used, reason = "the cases are functions that the tests call")]

#[path = "support/database.rs"]
mod database;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bus_core::{Context, Event, Handler, HandlerError, HandlerErrorKind, Ownership};
use database::Database;
use diesel_async::{AsyncPgConnection, SimpleAsyncConnection};
use futures_util::{FutureExt, future::BoxFuture};
use outbox::{Effect, Inbox, InboxPool, LogError};
use tokio::sync::Semaphore;
use tokio_postgres::NoTls;

/// Connections of a pool.
const POOL_MAX: usize = 2;
/// Nobody listens there.
const AWAY: &str = "postgres://nobody@127.0.0.1:1/away?sslmode=disable";

type DieselPool = diesel_async::pooled_connection::deadpool::Pool<AsyncPgConnection>;

/// A pool, and how its client runs a statement.
trait Driver: InboxPool {
    async fn pool(url: &str) -> Self;

    fn run<'a>(tx: &'a mut Self::Transaction<'_>, sql: String) -> BoxFuture<'a, Result<(), HandlerError>>;
}

impl Driver for sqlx::PgPool {
    async fn pool(url: &str) -> Self {
        let options = sqlx::postgres::PgPoolOptions::new().max_connections(POOL_MAX as u32);
        // It tries again until then where nobody listens.
        let patience = Duration::from_secs(if url == AWAY { 1 } else { 20 });
        options.acquire_timeout(patience).connect_lazy(url).expect("a pool")
    }

    fn run<'a>(tx: &'a mut Self::Transaction<'_>, sql: String) -> BoxFuture<'a, Result<(), HandlerError>> {
        Box::pin(async move {
            sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&mut **tx).await?;
            Ok(())
        })
    }
}

impl Driver for deadpool_postgres::Pool {
    async fn pool(url: &str) -> Self {
        let mut config = deadpool_postgres::Config { url: Some(url.to_owned()), ..Default::default() };
        config.pool = Some(deadpool_postgres::PoolConfig::new(POOL_MAX));
        config.create_pool(Some(deadpool_postgres::Runtime::Tokio1), NoTls).expect("a pool")
    }

    fn run<'a>(tx: &'a mut Self::Transaction<'_>, sql: String) -> BoxFuture<'a, Result<(), HandlerError>> {
        Box::pin(async move { Ok(tx.batch_execute(&sql).await?) })
    }
}

impl Driver for DieselPool {
    async fn pool(url: &str) -> Self {
        let manager = diesel_async::pooled_connection::AsyncDieselConnectionManager::new(url);
        Self::builder(manager).max_size(POOL_MAX).build().expect("a pool")
    }

    fn run<'a>(tx: &'a mut Self::Transaction<'_>, sql: String) -> BoxFuture<'a, Result<(), HandlerError>> {
        Box::pin(async move { Ok(tx.batch_execute(&sql).await?) })
    }
}

/// The example of [`InboxPool`].
struct One(tokio::sync::Mutex<tokio_postgres::Client>);

#[async_trait]
impl InboxPool for One {
    type Transaction<'t> = tokio_postgres::Transaction<'t>;

    async fn once(&self, effect: &Effect<'_, Self>) -> Result<bool, HandlerError> {
        let mut client = self.0.lock().await;
        let mut tx = client.transaction().await?;
        let (consumer, source, id) = effect.note();
        if tx.execute(&effect.postgres_note(), &[&consumer, &source, &id]).await? == 0 {
            return Ok(false);
        }
        effect.run(&mut tx).await?;
        tx.batch_execute("SELECT 1").await?;
        tx.commit().await?;
        Ok(true)
    }

    async fn forget_old(&self, inbox: &Inbox) -> Result<u64, LogError> {
        self.0.lock().await.execute(&inbox.postgres_forget(), &[]).await.map_err(outbox::postgres_error)
    }
}

impl Driver for One {
    async fn pool(url: &str) -> Self {
        Self(tokio::sync::Mutex::new(Database::client_at(url).await))
    }

    fn run<'a>(tx: &'a mut Self::Transaction<'_>, sql: String) -> BoxFuture<'a, Result<(), HandlerError>> {
        Box::pin(async move { Ok(tx.batch_execute(&sql).await?) })
    }
}

async fn tables() -> Database {
    let database = Database::create().await;
    database.run("CREATE TABLE {p}effect (id text)").await;
    database
}

fn inbox(database: &Database, consumer: &str) -> Inbox {
    Inbox::new(consumer).tables(database.outbox.tables().clone())
}

/// A member of group `consumer` with a pool of its own. Its effect is a row, then `sql` whose error is overlooked, then
/// what `ending` does.
async fn member<D: Driver, Fut>(
    database: &Database,
    consumer: &str,
    sql: &'static str,
    ending: impl Fn() -> Fut + Send + Sync + 'static,
) -> Arc<dyn Handler>
where
    Fut: Future<Output = Result<(), HandlerError>> + Send + 'static,
{
    let row = database.sql("INSERT INTO {p}effect VALUES ('{id}')");
    let pool = D::pool(&database.url).await;
    Arc::new(inbox(database, consumer).handle(pool, move |tx, event, _| {
        let (row, end) = (row.replace("{id}", event.id()), ending());
        Box::pin(async move {
            D::run(tx, row).await?;
            if !sql.is_empty() {
                let _ = D::run(tx, sql.to_owned()).await;
            }
            end.await
        })
    }))
}

async fn call(handler: &dyn Handler, event: &Event) -> Result<(), HandlerError> {
    let group = "billing".parse().expect("a group");
    let context = Context::new(event.clone(), group, 1, 0, Ownership::new());
    let called = tokio::time::timeout(Duration::from_secs(30), handler.handle(event, &context));
    called.await.expect("nobody waits for a transaction that ended")
}

fn event(id: &str) -> Event {
    Event::json("orders", "order.placed", &7).expect("a number is JSON").id(id).build().expect("an event")
}

async fn done() -> Result<(), HandlerError> {
    Ok(())
}

async fn strings(database: &Database, sql: &str) -> Vec<String> {
    let rows = database.client().await.query(&database.sql(sql), &[]).await.expect("a list");
    rows.iter().map(|row| row.get(0)).collect()
}

async fn effects(database: &Database) -> Vec<String> {
    strings(database, "SELECT id FROM {p}effect ORDER BY id").await
}

async fn notes(database: &Database) -> Vec<String> {
    strings(database, "SELECT consumer || ' ' || source || ' ' || id FROM {p}inbox ORDER BY 1").await
}

/// Until a statement that has the schema's name in it, or `what`, waits as `condition` says.
async fn until_waiting(database: &Database, what: &str, condition: &str) {
    let client = database.client().await;
    let sql = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND query LIKE '%{what}%' AND {condition}"
    );
    let waiting = async {
        while client.query_one(&sql, &[]).await.expect("a count").get::<_, i64>(0) == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), waiting).await.expect("it waits");
}

/// Catches the mutant that does not look whether the note was there, and the one that notes no source.
async fn a_duplicate_has_no_second_effect<D: Driver>() {
    let database = tables().await;
    let elsewhere = Event::json("orders", "order.placed", &7).unwrap().id("a").source("/elsewhere").build().unwrap();
    let billing = member::<D, _>(&database, "billing", "", done).await;
    let shipping = member::<D, _>(&database, "shipping", "", done).await;
    for event in [event("a"), event("a"), event("b"), event("a"), event("b")] {
        call(&*billing, &event).await.unwrap();
    }
    assert_eq!(effects(&database).await, ["a", "b"]);
    call(&*shipping, &event("a")).await.unwrap();
    call(&*billing, &elsewhere).await.unwrap();
    assert_eq!(effects(&database).await, ["a", "a", "a", "b"], "another consumer, another source");
    let source = event("a").source().to_owned();
    let mut expected: Vec<String> = ["a", "b"].map(|id| format!("billing {source} {id}")).into();
    expected.extend(["billing /elsewhere a".to_owned(), format!("shipping {source} a")]);
    expected.sort();
    assert_eq!(notes(&database).await, expected);
}

/// Catches the mutants that commit the note before the effect, that commit after an error, and that have no statement before
/// the commit; with diesel, the one that gives a connection back within its transaction.
async fn what_failed_leaves_nothing_and_is_handled_again<D: Driver>() {
    let database = tables().await;
    let fails = member::<D, _>(&database, "billing", "", async || Err(HandlerError::permanent("no"))).await;
    for _ in 0..2 * POOL_MAX {
        let error = call(&*fails, &event("a")).await.unwrap_err();
        assert_eq!(error.kind(), HandlerErrorKind::Permanent, "the handler's own error: {error}");
    }
    let panics = member::<D, _>(&database, "billing", "", async || panic!("of the test")).await;
    for _ in 0..2 * POOL_MAX {
        let panicked = std::panic::AssertUnwindSafe(call(&*panics, &event("a"))).catch_unwind().await;
        assert!(panicked.is_err(), "the consumer turns it into an error");
    }
    let overlooks = member::<D, _>(&database, "billing", "SELECT 1 / 0", done).await;
    let error = call(&*overlooks, &event("a")).await.expect_err("what was rolled back is not handled");
    assert_eq!(error.kind(), HandlerErrorKind::Retryable, "{error}");
    assert_eq!((effects(&database).await, notes(&database).await), (vec![], vec![]));
    let handles = member::<D, _>(&database, "billing", "", done).await;
    call(&*handles, &event("a")).await.unwrap();
    assert_eq!(effects(&database).await, ["a"]);
}

/// Catches the mutants that look for the note before they insert it, that commit it before the effect, and that commit after
/// an error.
async fn of_two_at_once_the_second_waits<D: Driver>() {
    let database = tables().await;
    for (id, fails) in [("committed", false), ("failed", true)] {
        let (began, go_on) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
        let gates = (Arc::clone(&began), Arc::clone(&go_on));
        let first = member::<D, _>(&database, "billing", "", move || {
            let (began, go_on) = gates.clone();
            async move {
                began.add_permits(1);
                go_on.acquire().await.expect("open").forget();
                if fails { Err(HandlerError::retryable("of the test")) } else { Ok(()) }
            }
        });
        let first = first.await;
        let first = tokio::spawn(async move { call(&*first, &event(id)).await });
        let waiting = tokio::time::timeout(Duration::from_secs(20), began.acquire());
        waiting.await.expect("it is called").expect("open").forget();
        let calls = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&calls);
        let second = member::<D, _>(&database, "billing", "", move || {
            counter.fetch_add(1, Ordering::SeqCst);
            done()
        });
        let second = second.await;
        let second = tokio::spawn(async move { call(&*second, &event(id)).await });
        until_waiting(&database, &database.schema, "wait_event_type = 'Lock'").await;
        assert!(!second.is_finished() && calls.load(Ordering::SeqCst) == 0, "it waits");
        go_on.add_permits(1);
        assert_eq!(first.await.unwrap().is_err(), fails);
        second.await.unwrap().unwrap();
        assert_eq!(calls.load(Ordering::SeqCst), u32::from(fails), "{id}");
    }
    assert_eq!(effects(&database).await, ["committed", "failed"]);
}

/// Between statements and within one, more often than the pool has connections. Catches the mutant that commits the note
/// before the effect; with diesel, the one that gives a connection back within its transaction.
async fn a_dropped_handler_is_rolled_back<D: Driver>() {
    let database = tables().await;
    let began = Arc::new(Semaphore::new(0));
    let counter = Arc::clone(&began);
    let idle = member::<D, _>(&database, "billing", "", move || {
        counter.add_permits(1);
        std::future::pending()
    });
    let idle = idle.await;
    // Each is retried while the pool still has the connection of the one before.
    for _ in 0..=POOL_MAX {
        let handler = Arc::clone(&idle);
        let dropped = tokio::spawn(async move { call(&*handler, &event("idle")).await });
        let waiting = tokio::time::timeout(Duration::from_secs(20), began.acquire());
        waiting.await.expect("the pool has a connection, the note is gone").expect("open").forget();
        // The row is on its way before the effect's end is.
        until_waiting(&database, &database.schema, "state = 'idle in transaction'").await;
        dropped.abort();
        assert!(dropped.await.unwrap_err().is_cancelled());
    }
    let other = member::<D, _>(&database, "billing", "", done).await;
    call(&*other, &event("idle")).await.unwrap();
    assert_eq!(effects(&database).await, ["idle"]);

    let sleeps = member::<D, _>(&database, "billing", "SELECT pg_sleep(0.5), 'inbox_test'", std::future::pending);
    let sleeps = sleeps.await;
    let sleep = Arc::clone(&sleeps);
    let dropped = tokio::spawn(async move { call(&*sleep, &event("busy")).await });
    until_waiting(&database, "inbox_test", "wait_event = 'PgSleep'").await;
    dropped.abort();
    assert!(dropped.await.unwrap_err().is_cancelled());
    call(&*other, &event("busy")).await.unwrap();
    assert_eq!(effects(&database).await, ["busy", "idle"]);
    drop(idle);
}

/// Catches the mutants that forget all at once, and too early.
async fn old_notes_are_forgotten_in_bites<D: Driver>() {
    let database = tables().await;
    let note = "INSERT INTO {p}inbox (consumer, source, id, at) SELECT 'billing', '/s', 'n' || n, now() - ";
    database.run(&format!("{note} interval '30 days 1 minute' FROM generate_series(1, 1500) n")).await;
    database.run(&format!("{note} interval '29 days 23 hours' FROM generate_series(1501, 1503) n")).await;
    let (inbox, pool) = (inbox(&database, "billing"), D::pool(&database.url).await);
    for forgotten in [1000, 500, 0] {
        assert_eq!(inbox.forget_old(&pool).await.unwrap(), forgotten);
    }
    assert_eq!(notes(&database).await, ["billing /s n1501", "billing /s n1502", "billing /s n1503"]);
}

/// A server that is not there, and one that goes in the middle of a handler. Catches the mutant that calls a pool without
/// connections `Invalid`, and the one that commits the note before the effect.
async fn a_database_that_is_away_is_a_retryable_error<D: Driver>() {
    let database = tables().await;
    let lost = member::<D, _>(&database, "billing", "SELECT pg_terminate_backend(pg_backend_pid())", done).await;
    for _ in 0..2 * POOL_MAX {
        let error = call(&*lost, &event("a")).await.unwrap_err();
        assert_eq!(error.kind(), HandlerErrorKind::Retryable, "{error}");
    }
    let handles = member::<D, _>(&database, "billing", "", done).await;
    call(&*handles, &event("a")).await.unwrap();
    assert_eq!(effects(&database).await, ["a"]);

    let away = database.at(AWAY);
    let nowhere = member::<D, _>(&away, "billing", "", done).await;
    let error = call(&*nowhere, &event("b")).await.unwrap_err();
    assert_eq!(error.kind(), HandlerErrorKind::Retryable, "{error}");
    let error = inbox(&away, "billing").forget_old(&D::pool(&away.url).await).await.unwrap_err();
    assert!(error.kind().may_heal(), "{error}");
}

/// The cases of a client, one by one.
macro_rules! cases {
    ($($client:ident, $pool:ty: $($case:ident)*;)*) => {
        $(mod $client {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            #[ignore = "needs PostgreSQL: cargo xtask test"]
            async fn $case() {
                super::$case::<$pool>().await;
            })*
        })*
    };
}

cases! {
    by_sqlx, sqlx::PgPool:
        a_duplicate_has_no_second_effect what_failed_leaves_nothing_and_is_handled_again of_two_at_once_the_second_waits
        a_dropped_handler_is_rolled_back old_notes_are_forgotten_in_bites a_database_that_is_away_is_a_retryable_error;
    by_deadpool, deadpool_postgres::Pool:
        a_duplicate_has_no_second_effect what_failed_leaves_nothing_and_is_handled_again of_two_at_once_the_second_waits
        a_dropped_handler_is_rolled_back old_notes_are_forgotten_in_bites a_database_that_is_away_is_a_retryable_error;
    by_diesel, crate::DieselPool:
        a_duplicate_has_no_second_effect what_failed_leaves_nothing_and_is_handled_again of_two_at_once_the_second_waits
        a_dropped_handler_is_rolled_back old_notes_are_forgotten_in_bites a_database_that_is_away_is_a_retryable_error;
    by_a_driver_that_is_adopted, crate::One:
        a_duplicate_has_no_second_effect what_failed_leaves_nothing_and_is_handled_again of_two_at_once_the_second_waits
        a_dropped_handler_is_rolled_back old_notes_are_forgotten_in_bites;
}

/// A role with the grants of docs/postgres.md handles, appends in the same transaction, and forgets by itself. Catches the
/// mutants that never forget by themselves, and that lock what they forget `FOR UPDATE`, which takes another grant.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL: cargo xtask test"]
async fn a_consumers_role_handles_appends_and_forgets() {
    let database = Database::create().await;
    let (schema, role) = (&database.schema, format!("{}_consumer", database.schema));
    database
        .run(&format!(
            "CREATE ROLE {role} LOGIN PASSWORD 'consumer'; ALTER ROLE {role} SET synchronous_commit = off; \
             GRANT USAGE ON SCHEMA {schema} TO {role}; \
             GRANT SELECT, INSERT, DELETE ON {{p}}inbox TO {role}; \
             GRANT INSERT ON {{p}}outbox TO {role}; GRANT USAGE ON SEQUENCE {{p}}outbox_seq TO {role}; \
             INSERT INTO {{p}}inbox VALUES ('billing', '/s', 'old', now() - interval '31 days')"
        ))
        .await;
    let (_, rest) = database.url.split_once('@').expect("a user in the URL");
    let pool = <deadpool_postgres::Pool as Driver>::pool(&format!("postgres://{role}:consumer@{rest}")).await;
    let outbox = database.outbox.clone();
    let handler = inbox(&database, "billing").handle(pool, move |tx, event, _| {
        let outbox = outbox.clone();
        Box::pin(async move {
            let billed = Event::json("bills", "order.billed", &7)?.id(format!("billed-{}", event.id()));
            outbox.append(tx, [billed]).await?;
            Ok(())
        })
    });
    for n in 0..1_000 {
        if n == 999 {
            assert!(notes(&database).await.contains(&"billing /s old".to_owned()), "not before its time");
        }
        call(&handler, &event(&n.to_string())).await.unwrap();
        if n % 100 == 0 {
            call(&handler, &event(&n.to_string())).await.unwrap();
        }
    }
    assert_eq!(database.committed().await.len(), 1_000);
    assert!(!notes(&database).await.contains(&"billing /s old".to_owned()), "it forgets by itself");
    database.run(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
}
