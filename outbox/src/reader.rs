//! [`LogReader`]: a log in the order of its places. I/O around the decisions of [`InOrder`].

use std::{sync::Arc, time::Duration};

use bus_core::Seq;

use crate::{Awakened, LogError, LogErrorKind, LogSource, PageLimit, Row, Wake, in_order::InOrder};

/// Longest wait at the end of the log before it is looked at unasked.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Pause before a gap is looked at again: this short while it is new, and at most this long. A gap holds up everything
/// here, and nothing of a relay: it is looked at more often.
const GAP_PAUSE_MIN: Duration = Duration::from_millis(5);
const GAP_PAUSE_MAX: Duration = Duration::from_millis(100);

/// Reads a log in the order of its places: what a projection or a subscription does.
///
/// Every committed row is handed out exactly once, ascending, however transactions overlap. A row waits until all places
/// below it are handed out or proved dead, so a transaction that appended and stays open holds the reader up; no other
/// transaction does, in this database or another. A relay never waits like this: it keeps order per key only. On
/// PostgreSQL places that were rolled back cost some tens of milliseconds a page, however many they are: read in pages of
/// a thousand rows or more to catch up.
///
/// It owns nothing and writes nothing: any number of readers run beside each other and beside relays, and a role that
/// may only read is enough. On PostgreSQL it reads from the primary: a standby does not know who may still commit.
/// Give each reader a [`LogSource`] of its own; those that share one share its connection.
///
/// Whoever reads keeps the [`position`](LogReader::position), best in the transaction of what was made of the rows, and
/// begins there again.
///
/// # Retention
///
/// A place whose row was removed is a dead gap: a reader that begins below what was removed skips it in silence, and
/// relays alone decide when rows of the outbox may go. Read a table that keeps its rows; the event store's always does.
///
/// # Examples
///
/// ```
/// use bus_core::{Event, Seq};
/// use outbox::{LogReader, Outbox, OutboxConfig, PageLimit};
/// use sqlx::sqlite::{SqliteConnectOptions, SqlitePool};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let dir = tempfile::tempdir()?;
/// # let options = SqliteConnectOptions::new().filename(dir.path().join("shop.db")).create_if_missing(true);
/// # let pool = SqlitePool::connect_with(options).await?;
/// # let outbox = Outbox::sqlite(pool.clone(), OutboxConfig::default());
/// # outbox.migrate().await?;
/// let mut tx = pool.begin_with("BEGIN IMMEDIATE").await?;
/// outbox.append(&mut tx, [Event::json("orders", "order.placed", &7)?, Event::json("orders", "order.paid", &7)?]).await?;
/// tx.commit().await?;
///
/// let limit = PageLimit { events: 1, bytes: 1 << 20 };
/// let mut reader = LogReader::new(outbox.log("report").await?, Seq::ZERO).wake(outbox.wake_signal());
/// let first = reader.next_page(limit).await?;
/// assert_eq!(first[0].event.as_ref().expect("an event").event_type(), "order.placed");
/// let kept = reader.position();
///
/// let mut again = LogReader::new(outbox.log("report").await?, kept);
/// let rest = again.read(limit).await?;
/// assert_eq!(rest[0].event.as_ref().expect("an event").event_type(), "order.paid");
/// assert!(again.read(limit).await?.is_empty(), "that was all");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct LogReader {
    log: Arc<dyn LogSource>,
    order: InOrder,
    wake: Awakened,
    /// The gap that was waited at last, and how long.
    waited: Option<(Seq, Duration)>,
    /// Whether this log is long enough for the position to be one of its places.
    is_checked: bool,
}

impl LogReader {
    /// Begins behind `after`: a [`position`](LogReader::position) of an earlier reader, or [`Seq::ZERO`].
    ///
    /// The source's sink is not registered, and holds nothing back.
    pub fn new(log: Arc<dyn LogSource>, after: Seq) -> Self {
        // Nobody nudges until somebody is listened to.
        let wake = Wake::new().listen();
        Self { log, order: InOrder::behind(after), wake, waited: None, is_checked: false }
    }

    /// Listens to the nudges of an [`Outbox`](crate::Outbox) in this process.
    pub fn wake(mut self, wake: &Wake) -> Self {
        self.wake = wake.listen();
        self
    }

    /// The place of the last row that was handed out: begin here again. At first, where the reader began.
    pub fn position(&self) -> Seq {
        self.order.position()
    }

    /// The place that holds the reader up: a transaction drew it and has not ended yet, as far as the last look showed.
    pub fn waits_at(&self) -> Option<Seq> {
        self.order.waits_at()
    }

    /// The rows that come next and are there now.
    ///
    /// # Shape
    ///
    /// Ascending, all above [`position`](LogReader::position), which moves to the last of them; within `limit`, and at
    /// least one if there is one. None where the log ends, or where a gap [holds up](LogReader::waits_at) the rest.
    ///
    /// # Errors
    ///
    /// What the log answers; the next call goes on. [`Invalid`](LogErrorKind::Invalid) where the log is shorter than the
    /// position: it was restored to an earlier state, and what was made of its rows is to be made anew. One that has
    /// grown longer since cannot be told from the old.
    ///
    /// # Cancel safety
    ///
    /// A dropped call moves nothing and loses no row.
    pub async fn read(&mut self, limit: PageLimit) -> Result<Vec<Row>, LogError> {
        // After an error the log may be another: one that was restored meanwhile.
        let was_checked = std::mem::take(&mut self.is_checked);
        if !was_checked {
            self.check_length().await?;
        }
        if self.order.wants_page() {
            let page = self.log.fetch(self.order.position(), limit).await?;
            self.order.admit_page(page);
        }
        // Only what was looked at after the page shows what became of its gaps.
        if !self.order.unseen().is_empty() {
            let probe = self.log.probe(self.order.unseen(), limit).await?;
            self.order.admit_probe(probe, limit);
        }
        self.is_checked = true;
        Ok(self.order.take(limit))
    }

    /// As [`read`](LogReader::read), but waits for at least one row.
    ///
    /// A commit is noticed by a nudge in this process, by [`LogSource::changed`], or within a second.
    ///
    /// # Errors
    ///
    /// As [`read`](LogReader::read). It does not try again by itself.
    ///
    /// # Cancel safety
    ///
    /// A dropped call moves nothing and loses no row.
    pub async fn next_page(&mut self, limit: PageLimit) -> Result<Vec<Row>, LogError> {
        loop {
            let rows = self.read(limit).await?;
            if !rows.is_empty() {
                return Ok(rows);
            }
            self.pause().await;
        }
    }

    async fn check_length(&self) -> Result<(), LogError> {
        let (position, last) = (self.order.position(), self.log.last_seq().await?);
        if position <= last {
            return Ok(());
        }
        let message = format!(
            "the log ends at {last} and was read up to {position} before: it was restored to an earlier state, or is \
             another; build anew what was made of its rows, from the start"
        );
        Err(LogError::new(LogErrorKind::Invalid, message))
    }

    /// Waits until there may be more to read.
    async fn pause(&mut self) {
        self.waited = self.order.waits_at().map(|gap| (gap, gap_pause(self.waited, gap)));
        let pause = self.waited.map_or(POLL_INTERVAL, |(_, pause)| pause);
        tokio::select! {
            () = self.log.changed() => {}
            () = self.wake.wait() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// A gap is looked at again soon, and ever less often while it stays.
fn gap_pause(waited: Option<(Seq, Duration)>, gap: Seq) -> Duration {
    match waited {
        Some((same, pause)) if same == gap => (pause * 2).min(GAP_PAUSE_MAX),
        _ => GAP_PAUSE_MIN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_looked_at_ever_less_often_while_it_stays() {
        let mut waited = None;
        let mut pauses = Vec::new();
        for gap in [3, 3, 3, 3, 3, 3, 4] {
            let pause = gap_pause(waited, Seq(gap));
            waited = Some((Seq(gap), pause));
            pauses.push(pause.as_millis());
        }
        assert_eq!(pauses, [5, 10, 20, 40, 80, 100, 5]);
    }
}
