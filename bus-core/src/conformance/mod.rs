//! The conformance suite: what every bus must do, one case per promise, failure semantics included.
//!
//! A bus's `tests/conformance.rs` is a fixture and one line:
//!
//! ```
//! use std::sync::Arc;
//! use bus_core::{EventBus, InMemoryBus, InMemoryConfig, conformance::Fixture};
//!
//! bus_core::conformance_tests!(Fixture::new(connect));
//!
//! /// A further client of the broker under test: what one client publishes, the others see.
//! async fn connect() -> Arc<dyn EventBus> {
//!     Arc::new(InMemoryBus::named("conformance", InMemoryConfig::default()))
//! }
//! # fn main() {}
//! ```
//!
//! It makes one test per case, so a report names what is broken. With `ignore = "needs Kafka: cargo xtask test"` the
//! tests are listed as ignored where the broker is not at hand.
//!
//! Where a bus lacks a [capability](crate::Capabilities), a case checks that it answers as documented. Each case uses
//! topics of its own, waits for conditions with a deadline, and can run beside all others. `tests/sabotage.rs` shows
//! that buses broken on purpose are caught.

mod kit;
mod publish;
mod groups;
mod settle;
mod consume;
mod writer;
mod admin;

use std::{fmt, sync::Arc, time::Duration};

use futures_util::future::{BoxFuture, LocalBoxFuture};

use crate::{Event, EventBus, Topic};

pub use admin::*;
pub use consume::*;
pub use groups::*;
pub use publish::*;
pub use settle::*;
pub use writer::*;

/// What a case needs of the bus under test.
pub struct Fixture {
    connect: Box<dyn Fn() -> BoxFuture<'static, Arc<dyn EventBus>> + Send + Sync>,
    stored: Option<Box<dyn Fn(Topic) -> Vec<Event> + Send + Sync>>,
    deadline: Duration,
}

impl Fixture {
    /// A fixture whose `connect` answers a further client of one broker each time.
    pub fn new<F, Fut>(connect: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Arc<dyn EventBus>> + Send + 'static,
    {
        let connect = Box::new(move || -> BoxFuture<'static, Arc<dyn EventBus>> { Box::pin(connect()) });
        Self { connect, stored: None, deadline: Duration::from_secs(60) }
    }

    /// For a bus that nobody can subscribe to: how to look at what it stored of a topic.
    pub fn stored(mut self, stored: impl Fn(Topic) -> Vec<Event> + Send + Sync + 'static) -> Self {
        self.stored = Some(Box::new(stored));
        self
    }

    /// How long a condition may take to come true. Default 60 s.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }
}

impl fmt::Debug for Fixture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fixture").field("deadline", &self.deadline).finish_non_exhaustive()
    }
}

/// A case of the suite: panics where the bus breaks the promise.
pub type Case = for<'a> fn(&'a Fixture) -> LocalBoxFuture<'a, ()>;

/// The list of cases, handed to another macro: the one place where it stands.
#[doc(hidden)]
#[macro_export]
macro_rules! conformance_cases {
    ($callback:ident $args:tt) => {
        $crate::$callback! { $args
            confirms_each_event_of_a_batch_once
            an_empty_batch_is_answered_with_nothing
            what_is_confirmed_is_stored
            every_attribute_survives
            a_key_goes_where_murmur2_says
            keeps_the_order_of_a_key_across_batches
            concurrent_publishers_keep_their_own_order
            refuses_an_event_above_its_limit_and_nothing_else
            keeps_the_order_behind_a_refused_event
            answers_closed_after_close
            each_group_sees_every_event
            members_share_the_partitions_fairly
            a_new_member_takes_its_share_without_loss
            the_events_of_a_member_that_dies_go_on_in_order
            a_member_that_leaves_hands_over_what_it_did_not_settle
            earliest_reads_the_past_or_is_refused
            latest_reads_only_what_follows
            a_group_goes_on_where_it_stood
            an_acked_event_does_not_come_again
            a_dropped_delivery_comes_again
            a_released_event_comes_before_what_follows_it
            acks_out_of_order_lose_nothing
            a_dropped_read_loses_nothing
            the_window_is_kept
            settling_after_a_partition_moved_on_does_nothing
            settling_after_a_group_was_moved_does_nothing
            a_dead_letter_is_kept_with_its_reason
            dead_letters_are_listed_and_removed_one_by_one
            a_dead_letter_of_one_group_is_unseen_by_another
            repeated_takeovers_without_progress_raise_suspicion
            a_failure_holds_its_key_and_only_that
            what_panics_or_hangs_is_given_up_and_the_rest_goes_on
            a_dead_letter_is_retried_for_its_group_alone
            a_consumer_that_stops_loses_nothing
            a_writer_stores_in_order
            what_a_writer_stored_is_not_stored_again
            a_late_event_is_stored_behind_later_ones
            another_history_is_not_taken_for_duplicates
            an_old_mark_forgets_nothing
            logs_and_sinks_do_not_share_a_position
            a_lower_epoch_is_fenced
            an_older_writer_of_the_same_epoch_is_fenced
            a_batch_behind_a_failed_one_does_not_land
            an_operators_event_is_stored_again
            a_declared_topology_is_created_and_checked
            lag_counts_what_is_not_settled
            a_group_can_be_moved_and_removed
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! conformance_case_list {
    ([] $($case:ident)*) => {
        /// Every case with its name.
        pub const CASES: &[(&str, Case)] = &[$((stringify!($case), |fixture| Box::pin($case(fixture)))),*];
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! conformance_case_tests {
    ([$fixture:expr; $attributes:tt] $($case:ident)*) => {
        $($crate::conformance_case_test! { $fixture; $attributes $case })*
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! conformance_case_test {
    ($fixture:expr; { $(#[$attribute:meta])* } $case:ident) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        $(#[$attribute])*
        async fn $case() {
            $crate::conformance::$case(&$fixture).await;
        }
    };
}

/// One named test per case of the [conformance suite](crate::conformance), for the bus of a
/// [`Fixture`](crate::conformance::Fixture).
#[macro_export]
macro_rules! conformance_tests {
    ($fixture:expr) => {
        $crate::conformance_cases! { conformance_case_tests [$fixture; {}] }
    };
    ($fixture:expr, ignore = $why:literal) => {
        $crate::conformance_cases! { conformance_case_tests [$fixture; { #[ignore = $why] }] }
    };
}

conformance_cases! { conformance_case_list [] }
