//! [`PostgresTransaction`]: a transaction that ends with its events, in one round trip.

use std::{
    fmt,
    ops::{Deref, DerefMut},
};

use bus_core::{Event, EventError};
use tokio_postgres::{Client, Statement, Transaction, TransactionBuilder};

use super::{
    append::{insert_and_commit, prepare},
    log_error,
};
use crate::{AppendError, LogError, Outbox};

impl Outbox {
    /// Begins a transaction of tokio-postgres that can end with its events:
    /// [`append_and_commit`](PostgresTransaction::append_and_commit).
    ///
    /// # Errors
    ///
    /// What the database answers.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use bus_core::Event;
    /// # async fn place(outbox: outbox::Outbox, client: &mut tokio_postgres::Client) -> Result<(), Box<dyn std::error::Error>> {
    /// let tx = outbox.begin(client.build_transaction()).await?;
    /// tx.execute("UPDATE shop.order SET state = 'placed' WHERE id = 7", &[]).await?;
    /// tx.append_and_commit([Event::json("orders", "order.placed", &7)?.key("order-7")]).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn begin<'a>(&'a self, builder: TransactionBuilder<'a>) -> Result<PostgresTransaction<'a>, LogError> {
        let transaction = builder.start().await.map_err(log_error)?;
        Ok(PostgresTransaction { outbox: self, transaction, one: None })
    }

    /// Has the server parse and plan the insert of one event, for [`prepared`](PostgresTransaction::prepared): once for each
    /// connection that stays. It saves about 50 us of each append of a single event.
    ///
    /// # Errors
    ///
    /// What the database answers.
    pub async fn prepare(&self, client: &Client) -> Result<PreparedAppend, LogError> {
        prepare(client, self.tables()).await.map(PreparedAppend)
    }
}

/// The insert of one event, prepared on one connection: [`Outbox::prepare`].
///
/// Not behind a pooler that gives each transaction another connection, unless it takes care of prepared statements.
#[derive(Clone, Debug)]
pub struct PreparedAppend(Statement);

/// A transaction of tokio-postgres, begun by [`Outbox::begin`]: it can append events and commit in one round trip.
///
/// That saves one round trip of each business transaction, and gives a place in the log to others for as short as can be.
/// It is a type of its own because a savepoint, which is a `Transaction` too, must not commit what it stands in. It derefs
/// to the transaction; dropping it rolls back.
pub struct PostgresTransaction<'a> {
    outbox: &'a Outbox,
    transaction: Transaction<'a>,
    one: Option<&'a PreparedAppend>,
}

impl<'a> PostgresTransaction<'a> {
    /// Appends a single event by what was prepared on this connection.
    pub fn prepared(mut self, one: &'a PreparedAppend) -> Self {
        self.one = Some(one);
        self
    }

    /// Appends events as [`Outbox::append`] does, commits, and wakes the relays.
    ///
    /// # Ordering
    ///
    /// As [`Outbox::append`]: the aggregate's row is locked, or its version checked, before this is called. That nothing
    /// can follow is what makes this the right place.
    ///
    /// # Errors
    ///
    /// As [`Outbox::append`], and whatever a commit may answer, such as a serialization failure: nothing is committed then.
    /// The one exception is a connection that breaks before it answered; as with every commit, nobody knows then.
    ///
    /// # Cancel safety
    ///
    /// A dropped call may have committed.
    pub async fn append_and_commit<E>(self, events: impl IntoIterator<Item = E>) -> Result<(), AppendError>
    where
        E: TryInto<Event>,
        E::Error: Into<EventError>,
    {
        let Self { outbox, transaction, one } = self;
        let events = outbox.checked(events)?;
        if events.is_empty() {
            return transaction.commit().await.map_err(|error| AppendError::new(0, log_error(error)));
        }
        insert_and_commit(transaction, &outbox.insert_of(&events), one.map(|one| &one.0)).await?;
        outbox.wake();
        Ok(())
    }

    /// Commits without events.
    ///
    /// # Errors
    ///
    /// What the database answers.
    pub async fn commit(self) -> Result<(), LogError> {
        self.transaction.commit().await.map_err(log_error)
    }

    /// Rolls back.
    ///
    /// # Errors
    ///
    /// What the database answers.
    pub async fn rollback(self) -> Result<(), LogError> {
        self.transaction.rollback().await.map_err(log_error)
    }
}

impl<'a> Deref for PostgresTransaction<'a> {
    type Target = Transaction<'a>;

    fn deref(&self) -> &Self::Target {
        &self.transaction
    }
}

impl DerefMut for PostgresTransaction<'_> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.transaction
    }
}

impl fmt::Debug for PostgresTransaction<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresTransaction").field("outbox", &self.outbox).finish_non_exhaustive()
    }
}
