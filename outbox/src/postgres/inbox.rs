//! The inbox on PostgreSQL, whatever client has the pool.

use crate::{
    Effect, Inbox, InboxPool,
    inbox::{KEPT, PRUNE_EVERY},
};

/// No row if it was noted before. Where another transaction has noted it and is open, this waits for its end.
const NOTE: &str = "INSERT INTO {p}inbox (consumer, source, id) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING";
/// Members of a group forget side by side: each locks what it forgets in the table's order, so they wait for each other at
/// most. Rows are never updated, so a `ctid` names one row for as long as the statement lasts.
const FORGET: &str = "DELETE FROM {p}inbox WHERE ctid = ANY (ARRAY( \
     SELECT ctid FROM {p}inbox WHERE at < now() - interval '{kept} seconds' ORDER BY at LIMIT {bite}))";
/// What fails in a transaction in which something failed. A COMMIT does not: it rolls back, and calls that a success.
#[cfg(any(feature = "sqlx-postgres", feature = "deadpool-postgres", feature = "diesel-async"))]
const IS_WHOLE: &str = "SELECT 1";

impl<P: InboxPool> Effect<'_, P> {
    /// The statement that notes the event: three parameters, the texts of [`note`](Effect::note). It changes no row if the
    /// event was noted before.
    pub fn postgres_note(&self) -> String {
        self.inbox.tables.qualify(NOTE)
    }
}

impl Inbox {
    /// The statement that forgets a bite of what is old, without parameters.
    pub fn postgres_forget(&self) -> String {
        let (kept, bite) = (KEPT.as_secs().to_string(), PRUNE_EVERY.to_string());
        self.tables.qualify(FORGET).replace("{kept}", &kept).replace("{bite}", &bite)
    }
}

#[cfg(feature = "deadpool-postgres")]
mod with_deadpool {
    use async_trait::async_trait;
    use bus_core::HandlerError;
    use deadpool_postgres::{Client, Pool, PoolError, Transaction};
    use tokio_postgres::types::Type;

    use super::IS_WHOLE;
    use crate::{Effect, Inbox, InboxPool, LogError, LogErrorKind, postgres::log_error};

    #[async_trait]
    impl InboxPool for Pool {
        type Transaction<'t> = Transaction<'t>;

        async fn once(&self, effect: &Effect<'_, Self>) -> Result<bool, HandlerError> {
            let mut client = get(self).await?;
            let mut transaction = client.transaction().await.map_err(log_error)?;
            let (consumer, source, id) = effect.note();
            let parameters = [(&consumer as _, Type::TEXT), (&source as _, Type::TEXT), (&id as _, Type::TEXT)];
            let noted = transaction.execute_typed(&effect.postgres_note(), &parameters).await.map_err(log_error)?;
            if noted == 0 {
                transaction.rollback().await.map_err(log_error)?;
                return Ok(false);
            }
            effect.run(&mut transaction).await?;
            transaction.batch_execute(IS_WHOLE).await.map_err(log_error)?;
            transaction.commit().await.map_err(log_error)?;
            Ok(true)
        }

        async fn forget_old(&self, inbox: &Inbox) -> Result<u64, LogError> {
            get(self).await?.execute_typed(&inbox.postgres_forget(), &[]).await.map_err(log_error)
        }
    }

    async fn get(pool: &Pool) -> Result<Client, LogError> {
        pool.get().await.map_err(|error| match error {
            PoolError::Backend(error) => log_error(error),
            PoolError::Timeout(_) => LogError::with_source(LogErrorKind::Unavailable, "no connection is free", error),
            other => {
                LogError::with_source(LogErrorKind::Invalid, format!("the pool gives no connection: {other}"), other)
            }
        })
    }
}

#[cfg(feature = "sqlx-postgres")]
mod with_sqlx {
    use async_trait::async_trait;
    use bus_core::HandlerError;
    use sqlx::{AssertSqlSafe, PgPool, Postgres, Transaction};

    use super::IS_WHOLE;
    use crate::{Effect, Inbox, InboxPool, LogError, postgres::append::with_sqlx::log_error};

    #[async_trait]
    impl InboxPool for PgPool {
        type Transaction<'t> = Transaction<'static, Postgres>;

        async fn once(&self, effect: &Effect<'_, Self>) -> Result<bool, HandlerError> {
            let mut transaction = self.begin().await.map_err(log_error)?;
            let (consumer, source, id) = effect.note();
            // Safe: our own statement, with a schema that was checked to be an identifier.
            let note = sqlx::query(AssertSqlSafe(effect.postgres_note())).bind(consumer).bind(source).bind(id);
            if note.execute(&mut *transaction).await.map_err(log_error)?.rows_affected() == 0 {
                transaction.rollback().await.map_err(log_error)?;
                return Ok(false);
            }
            effect.run(&mut transaction).await?;
            sqlx::raw_sql(IS_WHOLE).execute(&mut *transaction).await.map_err(log_error)?;
            transaction.commit().await.map_err(log_error)?;
            Ok(true)
        }

        async fn forget_old(&self, inbox: &Inbox) -> Result<u64, LogError> {
            // Safe: as above.
            let forget = sqlx::raw_sql(AssertSqlSafe(inbox.postgres_forget()));
            Ok(forget.execute(self).await.map_err(log_error)?.rows_affected())
        }
    }
}

#[cfg(feature = "diesel-async")]
mod with_diesel {
    use async_trait::async_trait;
    use bus_core::HandlerError;
    use diesel::{sql_query, sql_types::Text};
    use diesel_async::{
        AsyncConnection, AsyncPgConnection, RunQueryDsl, SimpleAsyncConnection, TransactionManager,
        pooled_connection::deadpool::{Object, Pool, PoolError},
    };

    use super::IS_WHOLE;
    use crate::{Effect, Inbox, InboxPool, LogError, LogErrorKind, postgres::append::with_diesel::log_error};

    type Manager = <AsyncPgConnection as AsyncConnection>::TransactionManager;

    #[async_trait]
    impl InboxPool for Pool<AsyncPgConnection> {
        type Transaction<'t> = AsyncPgConnection;

        async fn once(&self, effect: &Effect<'_, Self>) -> Result<bool, HandlerError> {
            let mut held = Held(Some(get(self).await?));
            let connection = held.get();
            Manager::begin_transaction(connection).await.map_err(log_error)?;
            let (consumer, source, id) = effect.note();
            let note = sql_query(effect.postgres_note()).bind::<Text, _>(consumer).bind::<Text, _>(source);
            if note.bind::<Text, _>(id).execute(connection).await.map_err(log_error)? == 0 {
                Manager::rollback_transaction(connection).await.map_err(log_error)?;
                held.give_back();
                return Ok(false);
            }
            if let Err(error) = effect.run(connection).await {
                if Manager::rollback_transaction(connection).await.is_ok() {
                    held.give_back();
                }
                return Err(error);
            }
            connection.batch_execute(IS_WHOLE).await.map_err(log_error)?;
            Manager::commit_transaction(connection).await.map_err(log_error)?;
            held.give_back();
            Ok(true)
        }

        async fn forget_old(&self, inbox: &Inbox) -> Result<u64, LogError> {
            let mut connection = get(self).await?;
            let forgotten = sql_query(inbox.postgres_forget()).execute(&mut *connection).await.map_err(log_error)?;
            Ok(forgotten as u64)
        }
    }

    /// A connection that is closed unless it is given back: the client has no transaction that rolls back when it is
    /// dropped, and in the pool it would stay open.
    struct Held(Option<Object<AsyncPgConnection>>);

    impl Held {
        fn get(&mut self) -> &mut AsyncPgConnection {
            self.0.as_mut().expect("it is held")
        }

        /// Its transaction has ended.
        fn give_back(mut self) {
            drop(self.0.take());
        }
    }

    impl Drop for Held {
        fn drop(&mut self) {
            if let Some(object) = self.0.take() {
                drop(Object::take(object));
            }
        }
    }

    async fn get(pool: &Pool<AsyncPgConnection>) -> Result<Object<AsyncPgConnection>, LogError> {
        pool.get().await.map_err(|error| {
            let kind = match error {
                PoolError::Backend(_) | PoolError::Timeout(_) => LogErrorKind::Unavailable,
                _ => LogErrorKind::Invalid,
            };
            LogError::with_source(kind, format!("the pool gives no connection: {error}"), error)
        })
    }
}
