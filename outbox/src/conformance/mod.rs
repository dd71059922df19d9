//! The conformance suite for logs: what every database under a relay must do, one case per promise.
//!
//! A database's `tests/conformance.rs` says how a fresh one is made, and one line makes one test per case:
//!
//! ```text
//! outbox::log_conformance_tests!(SqliteDatabase::create().await);
//! ```

mod reading;
mod owning;
mod setting_aside;
mod administering;

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use bus_core::{Event, Seq};

use crate::{
    Acquire, Acquisition, Change, DeadState, Lease, LogAdmin, LogSource, Owned, SetAside, Start, TopicPattern,
};

pub use administering::*;
pub use owning::*;
pub use reading::*;
pub use setting_aside::*;

/// A fresh database with our tables, and what a case does to it beside a relay.
#[async_trait]
pub trait LogDatabase: fmt::Debug + Send + Sync {
    /// The log, read for a sink: each call has connections of its own, as another process would.
    async fn log(&self, sink: &str) -> Arc<dyn LogSource>;

    /// The log as an operator sees it.
    async fn admin(&self) -> Arc<dyn LogAdmin>;

    /// Appends events in one transaction.
    async fn append(&self, events: Vec<Event>);

    /// Appends events in a transaction that is rolled back.
    async fn append_and_roll_back(&self, events: Vec<Event>);

    /// Inserts a row with plain SQL that is no valid event: its type is empty.
    async fn insert_invalid(&self, topic: &str, key: &str);

    /// Puts another event in the place of `seq`, as a restore may do.
    async fn replace_event(&self, seq: Seq);

    /// Removes a row by hand.
    async fn delete_row(&self, seq: Seq);
}

/// The list of cases, handed to another macro: the one place where it stands.
#[doc(hidden)]
#[macro_export]
macro_rules! log_conformance_cases {
    ($callback:ident $args:tt) => {
        $crate::$callback! { $args
            rows_are_fetched_in_order_within_the_limits
            what_is_rolled_back_is_never_seen
            every_attribute_survives_the_table
            a_row_that_is_no_event_is_told_not_skipped
            read_says_how_far_it_looked
            probe_tells_the_visible_from_the_dead
            a_commit_elsewhere_is_noticed
            one_owner_at_a_time
            a_lease_ends_and_commits_extend_it
            a_stale_epoch_moves_nothing
            a_checkpoint_comes_back
            many_holes_are_joined_and_none_is_forgotten
            an_owner_can_ask_for_a_higher_epoch_and_another_history
            a_restored_log_is_another_history
            a_row_without_a_known_id_is_no_other_history
            set_aside_events_and_the_cursor_move_together
            parked_keys_are_found_by_the_next_owner
            set_aside_events_are_selected
            requests_reach_the_owner_and_report_back
            what_is_refused_again_waits_again
            without_an_owner_events_are_discarded_at_once
            nothing_is_removed_before_every_sink_settled_it
            retention_counts_from_when_all_had_settled
            an_event_that_no_sink_wants_stays
            what_was_settled_before_a_sink_came_is_not_settled_for_it
            one_janitor_at_a_time
            a_new_sink_begins_where_it_should
            a_new_sink_begins_with_what_nobody_wanted
            a_sink_that_takes_more_topics_gets_what_nobody_wanted
            status_counts
            a_sink_that_is_owned_cannot_be_removed
            a_sink_that_comes_back_fences_those_before_it
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! log_conformance_case_tests {
    ([$database:expr; $attributes:tt] $($case:ident)*) => {
        $($crate::log_conformance_case_test! { $database; $attributes $case })*
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! log_conformance_case_test {
    ($database:expr; { $(#[$attribute:meta])* } $case:ident) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        $(#[$attribute])*
        async fn $case() {
            let database = $database;
            $crate::conformance::$case(&database).await;
        }
    };
}

/// One named test per case of the [conformance suite](crate::conformance) for logs; the expression makes a fresh
/// database and may await.
#[macro_export]
macro_rules! log_conformance_tests {
    ($database:expr) => {
        $crate::log_conformance_cases! { log_conformance_case_tests [$database; {}] }
    };
    ($database:expr, ignore = $why:literal) => {
        $crate::log_conformance_cases! { log_conformance_case_tests [$database; { #[ignore = $why] }] }
    };
}

// ---- What the cases share.

/// Event number `n` of `key`.
fn event(topic: &str, key: &str, n: u64) -> Event {
    let builder = Event::json(topic, "conformance.happened", &n).expect("a number is JSON");
    builder.id(format!("{key}-{n}")).key(key).build().expect("a valid event")
}

fn events(count: u64) -> Vec<Event> {
    (0..count).map(|n| event("orders", "key", n)).collect()
}

/// The places of all rows, ascending.
async fn all_seqs(log: &Arc<dyn LogSource>) -> Vec<Seq> {
    let (mut seqs, mut after) = (Vec::new(), Seq::ZERO);
    loop {
        let page = log.fetch(after, crate::PageLimit { events: 1_000, bytes: 1 << 30 }).await.expect("a page");
        let Some(last) = page.rows.last() else { return seqs };
        after = last.seq;
        seqs.extend(page.rows.iter().map(|row| row.seq));
    }
}

fn request(owner: &str) -> Acquire {
    Acquire {
        owner: owner.to_owned(),
        ttl: Duration::from_secs(30),
        epoch_min: 0,
        start: Start::Earliest,
        topics: vec![TopicPattern::any()],
        bus: "memory".to_owned(),
        new_incarnation: false,
    }
}

async fn own(log: &Arc<dyn LogSource>) -> Owned {
    own_with(log, request("one:1")).await
}

async fn own_with(log: &Arc<dyn LogSource>, request: Acquire) -> Owned {
    match log.acquire(&request).await.expect("the log answers") {
        Acquisition::Owned(owned) => *owned,
        standby => panic!("somebody else owns it: {standby:?}"),
    }
}

/// A change in which everything up to `low` is settled.
fn settled(low: Seq) -> Change {
    Change { low, high: low, ..Change::default() }
}

fn aside(seq: Seq, state: DeadState, reason: &'static str) -> SetAside {
    SetAside { seq, state, reason, error: "no".to_owned(), attempts: 3 }
}

/// Gives the log up as one that died would: its lease stays.
async fn settle_all(log: &Arc<dyn LogSource>, lease: &Lease) -> Seq {
    let last = log.last_seq().await.expect("the log answers");
    log.commit(lease, &settled(last)).await.expect("the owner commits");
    last
}
