//! Writers of a log on PostgreSQL that do what writers do, side by side.

use std::{
    io::Write as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::task::JoinSet;
use tokio_postgres::IsolationLevel;

use crate::{database::Database, support::event};

/// Writers side by side.
const WRITERS: usize = 8;

/// The seed of a run: `OUTBUS_SEED`, or a new one, which is told.
pub(crate) fn seed() -> u64 {
    let seed =
        std::env::var("OUTBUS_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| fastrand::u64(..));
    writeln!(std::io::stderr(), "OUTBUS_SEED={seed}").expect("stderr takes it");
    seed
}

/// Starts writers that go on until `stop` is set.
pub(crate) async fn start(database: &Arc<Database>, seed: u64, stop: &Arc<AtomicBool>) -> JoinSet<()> {
    database
        .run(
            "CREATE TABLE {p}aggregate (id int PRIMARY KEY, version bigint NOT NULL); \
         INSERT INTO {p}aggregate SELECT n, 0 FROM generate_series(0, 5) n",
        )
        .await;
    let mut writers = JoinSet::new();
    for name in 0..WRITERS {
        let random = fastrand::Rng::with_seed(seed.wrapping_add(name as u64));
        writers.spawn(Writer { database: Arc::clone(database), random, name }.run(Arc::clone(stop)));
    }
    writers
}

/// A writer that does what writers do: it locks an aggregate, appends its next versions, and commits, or does not.
struct Writer {
    database: Arc<Database>,
    random: fastrand::Rng,
    name: usize,
}

impl Writer {
    async fn run(mut self, stop: Arc<AtomicBool>) {
        let mut client = self.database.client().await;
        for n in 0.. {
            if stop.load(Ordering::SeqCst) {
                return;
            }
            // What PostgreSQL refuses, as it may under SERIALIZABLE, is rolled back.
            let _refused = self.transact(&mut client, n).await;
        }
    }

    async fn transact(&mut self, client: &mut tokio_postgres::Client, n: usize) -> Result<(), tokio_postgres::Error> {
        let level = if self.random.u8(..6) == 0 { IsolationLevel::Serializable } else { IsolationLevel::ReadCommitted };
        let mut transaction = client.build_transaction().isolation_level(level).start().await?;
        let key = self.random.usize(..6);
        let lock = self.database.sql("SELECT version FROM {p}aggregate WHERE id = $1 FOR UPDATE");
        let mut version: i64 = transaction.query_one(&lock, &[&(key as i32)]).await?.get(0);
        for _ in 0..1 + self.random.usize(..3) {
            version += 1;
            if self.random.u8(..5) == 0 {
                // A place that is drawn, and rolled back with its savepoint.
                let mut savepoint = transaction.transaction().await?;
                self.append(&mut savepoint, key, version).await;
                self.pause(20).await;
                savepoint.rollback().await?;
            }
            if self.random.u8(..4) == 0 {
                self.slow_insert(&transaction, key, version).await?;
            } else {
                self.append(&mut transaction, key, version).await;
            }
            self.pause(8).await;
        }
        let update = self.database.sql("UPDATE {p}aggregate SET version = $2 WHERE id = $1");
        transaction.execute(&update, &[&(key as i32), &version]).await?;
        match self.random.u8(..10) {
            0 | 1 => transaction.rollback().await,
            2 => {
                let id = format!("{}_{}_{n}", self.database.schema, self.name);
                transaction.batch_execute(&format!("PREPARE TRANSACTION '{id}'")).await?;
                drop(transaction);
                self.pause(40).await;
                let how = if self.random.bool() { "COMMIT" } else { "ROLLBACK" };
                client.batch_execute(&format!("{how} PREPARED '{id}'")).await
            }
            _ => {
                transaction.commit().await?;
                self.database.outbox.wake();
                Ok(())
            }
        }
    }

    async fn append(&self, transaction: &mut tokio_postgres::Transaction<'_>, key: usize, version: i64) {
        let event = event(&format!("k{key}"), version as usize);
        // The test is about what is committed; a refusal shows at the commit.
        let _refused = self.database.outbox.append(transaction, [event]).await;
    }

    /// Plain SQL whose row is inserted some time after its place was drawn.
    async fn slow_insert(
        &mut self,
        transaction: &tokio_postgres::Transaction<'_>,
        key: usize,
        version: i64,
    ) -> Result<(), tokio_postgres::Error> {
        let sql = self.database.sql(
            "INSERT INTO {p}outbox (id, topic, key, type, data) SELECT $1, 'orders', $2, 'order.placed', '1'::bytea \
             FROM (SELECT pg_sleep($3)) slept",
        );
        let (id, name) = (format!("k{key}-{version}"), format!("k{key}"));
        let slept = f64::from(self.random.u8(..20)) / 1_000.0;
        transaction.execute(&sql, &[&id, &name, &slept]).await.map(|_| ())
    }

    async fn pause(&mut self, millis_max: u64) {
        if self.random.bool() {
            tokio::time::sleep(Duration::from_millis(self.random.u64(..millis_max))).await;
        }
    }
}
