//! The conformance suite notices what is broken: buses broken on purpose, each caught by a named case.
//!
//! Method: a wrapper around the in-memory bus breaks one promise. The case that guards the promise is run on it and must
//! panic. A control run shows that the wrapper as such breaks nothing.

mod saboteur;

use std::{panic, thread, time::Duration};

use bus_core::conformance::{CASES, Case, Fixture};
use saboteur::Sabotage;

/// One test per sabotage: its name, what is broken, and the case that must notice.
macro_rules! caught {
    ($($name:ident: $sabotage:ident => $case:ident;)*) => {$(
        #[test]
        fn $name() {
            let noticed = !passes(Sabotage::$sabotage, find(stringify!($case)));
            assert!(noticed, "{} did not notice {:?}", stringify!($case), Sabotage::$sabotage);
        }
    )*};
}

caught! {
    a_bus_that_loses_events: LosesEvents => what_is_confirmed_is_stored;
    a_bus_that_stores_twice: StoresTwice => what_is_confirmed_is_stored;
    a_bus_that_confirms_before_storing: ConfirmsBeforeStoring => what_is_confirmed_is_stored;
    a_bus_that_keeps_an_outcome_to_itself: ForgetsAnOutcome => confirms_each_event_of_a_batch_once;
    a_bus_that_makes_outcomes_up: AnswersTheEmpty => an_empty_batch_is_answered_with_nothing;
    a_bus_that_mixes_publishers_up: LetsBatchesOvertake => concurrent_publishers_keep_their_own_order;
    a_bus_that_reverses_batches: ReversesBatches => keeps_the_order_of_a_key_across_batches;
    a_bus_whose_batches_overtake_each_other: LetsBatchesOvertake => keeps_the_order_of_a_key_across_batches;
    a_bus_that_cuts_times_to_seconds: CutsTimes => every_attribute_survives;
    a_bus_that_drops_extensions: DropsExtensions => every_attribute_survives;
    a_bus_with_a_hash_of_its_own: HashesDifferently => a_key_goes_where_murmur2_says;
    a_bus_that_takes_events_of_any_size: TakesAnySize => refuses_an_event_above_its_limit_and_nothing_else;
    a_bus_that_fails_innocent_neighbours: FailsNeighbours => refuses_an_event_above_its_limit_and_nothing_else;
    a_bus_that_goes_on_behind_a_refused_event: GoesOnBehindRefused => keeps_the_order_behind_a_refused_event;
    a_bus_that_stays_open: StaysOpen => answers_closed_after_close;
    a_bus_that_ignores_the_group: IgnoresTheGroup => each_group_sees_every_event;
    a_bus_with_two_owners: HasTwoOwners => members_share_the_partitions_fairly;
    a_bus_whose_first_member_keeps_all: NeverRebalances => a_new_member_takes_its_share_without_loss;
    a_bus_that_loses_what_a_dead_member_held: LosesWithTheMember => the_events_of_a_member_that_dies_go_on_in_order;
    a_bus_that_acks_when_a_member_leaves: AcksOnLeave => a_member_that_leaves_hands_over_what_it_did_not_settle;
    a_bus_that_hides_the_past: StartsAtLatest => earliest_reads_the_past_or_is_refused;
    a_bus_that_replays_to_latest: ReplaysToLatest => latest_reads_only_what_follows;
    a_bus_that_starts_groups_anew: StartsGroupsAnew => a_group_goes_on_where_it_stood;
    a_bus_that_forgets_acks: ForgetsAcks => an_acked_event_does_not_come_again;
    a_bus_that_acks_on_drop: AcksOnDrop => a_dropped_delivery_comes_again;
    a_bus_that_releases_to_the_end: ReleasesToTheEnd => a_released_event_comes_before_what_follows_it;
    a_bus_that_commits_past_the_unsettled: CommitsPastUnsettled => acks_out_of_order_lose_nothing;
    a_bus_that_loses_a_dropped_read: LosesDroppedReads => a_dropped_read_loses_nothing;
    a_bus_without_a_window: IgnoresTheWindow => the_window_is_kept;
    a_bus_that_honours_late_settlements: HonoursLateAcks => settling_after_a_partition_moved_on_does_nothing;
    a_bus_that_honours_settlements_of_before_a_move: HonoursLateAcks => settling_after_a_group_was_moved_does_nothing;
    a_bus_that_drops_dead_letters: DropsDeadLetters => a_dead_letter_is_kept_with_its_reason;
    a_bus_that_lists_the_head_only: ListsTheHeadOnly => dead_letters_are_listed_and_removed_one_by_one;
    a_bus_that_shares_dead_letters: SharesDeadLetters => a_dead_letter_of_one_group_is_unseen_by_another;
    a_bus_that_suspects_nobody: SuspectsNobody => repeated_takeovers_without_progress_raise_suspicion;
    a_bus_that_forgets_attempts: ForgetsAttempts => repeated_takeovers_without_progress_raise_suspicion;
    a_bus_that_acks_what_a_consumer_gives_back: AcksOnDrop => a_consumer_that_stops_loses_nothing;
    a_bus_that_keeps_an_event_from_its_consumer: LosesEvents => a_failure_holds_its_key_and_only_that;
    a_bus_without_dead_letters: DropsDeadLetters => what_panics_or_hangs_is_given_up_and_the_rest_goes_on;
    a_bus_with_nothing_to_retry: DropsDeadLetters => a_dead_letter_is_retried_for_its_group_alone;
    a_writer_that_reverses_batches: ReversesBatches => a_writer_stores_in_order;
    a_bus_that_lets_two_writers_write: FencesNobody => an_older_writer_of_the_same_epoch_is_fenced;
    a_bus_that_takes_back_what_it_knew: FencesNobody => an_old_mark_forgets_nothing;
    a_bus_that_fences_nobody: FencesNobody => a_lower_epoch_is_fenced;
    a_bus_that_remembers_nothing: FencesNobody => what_a_writer_stored_is_not_stored_again;
    a_bus_that_keeps_a_bare_maximum: KeepsABareMaximum => a_late_event_is_stored_behind_later_ones;
    a_bus_that_mixes_histories: MixesHistories => another_history_is_not_taken_for_duplicates;
    a_bus_that_mixes_logs: MixesLogs => logs_and_sinks_do_not_share_a_position;
    a_bus_that_lands_batch_2_after_batch_1_failed: LandsBehindAFailure => a_batch_behind_a_failed_one_does_not_land;
    a_bus_that_takes_a_retry_for_a_duplicate: DropsRepublished => an_operators_event_is_stored_again;
    a_bus_that_agrees_to_any_topology: AgreesToAnything => a_declared_topology_is_created_and_checked;
    a_bus_whose_lag_hides_what_is_pending: HidesPending => lag_counts_what_is_not_settled;
    a_bus_that_moves_groups_under_their_members: MovesLiveGroups => a_group_can_be_moved_and_removed;
}

/// The control: unbroken, the wrapper passes every case.
#[test]
fn an_unbroken_bus_passes_all() {
    let failed: Vec<&str> =
        CASES.iter().filter(|(_, case)| !passes(Sabotage::Nothing, *case)).map(|(name, _)| *name).collect();
    assert!(failed.is_empty(), "the wrapper itself breaks {failed:?}");
}

fn find(name: &str) -> Case {
    CASES.iter().find(|(case, _)| *case == name).unwrap_or_else(|| panic!("there is no case {name}")).1
}

/// Runs a case on a thread of its own; false if it panicked.
fn passes(sabotage: Sabotage, case: Case) -> bool {
    // Something that never comes is given up soon; the control takes longer only on a very slow machine.
    let deadline = if sabotage == Sabotage::Nothing { 30 } else { 2 };
    let run = move || {
        let fixture = Fixture::new(saboteur::connector(sabotage)).deadline(Duration::from_secs(deadline));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(case(&fixture));
    };
    silence_panics();
    thread::Builder::new().name("sabotage".into()).spawn(run).expect("a thread").join().is_ok()
}

/// The panics of sabotaged cases are expected: they do not print.
fn silence_panics() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let default = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if thread::current().name() != Some("sabotage") {
                default(info);
            }
        }));
    });
}
