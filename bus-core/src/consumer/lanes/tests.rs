//! The consumer's decisions, one by one, and a random run that must keep every key in order and settle all once.

use std::{collections::HashMap, time::Duration};

use proptest::prelude::*;

use super::*;

const SOON: Duration = Duration::from_secs(1);

fn lanes(attempts: u32, concurrency: usize) -> Lanes {
    Lanes::new(RetryPolicy { attempts, ..RetryPolicy::default() }, concurrency)
}

fn arrive(lanes: &mut Lanes, slot: Slot, key: &str) {
    let key = (!key.is_empty()).then(|| key.into());
    lanes.arrived(Arrival { slot, partition: 0, key, attempt: 1, suspect: false });
}

fn calls(actions: &[Action]) -> Vec<Slot> {
    let call = |action: &Action| match action {
        Action::Call { slot, .. } => Some(*slot),
        _ => None,
    };
    actions.iter().filter_map(call).collect()
}

fn failed(kind: HandlerErrorKind) -> Answer {
    Answer::Failed { kind, error: "no".into() }
}

fn retryable() -> Answer {
    failed(HandlerErrorKind::Retryable)
}

#[test]
fn a_key_runs_one_at_a_time_and_keys_run_in_parallel() {
    let (mut lanes, now) = (lanes(3, 3), Instant::now());
    for (slot, key) in [(1, "a"), (2, "a"), (3, "b"), (4, ""), (5, "")] {
        arrive(&mut lanes, slot, key);
    }
    assert_eq!(calls(&lanes.start(now)), [1, 3, 4], "three at a time, never two of a key");
    assert!(lanes.start(now).is_empty());
    assert_eq!(lanes.answered(1, Answer::Handled, now, 0.5), [Action::Ack { slot: 1 }]);
    assert_eq!(calls(&lanes.start(now)), [5]);
    lanes.answered(4, Answer::Handled, now, 0.5);
    assert_eq!(calls(&lanes.start(now)), [2]);
}

/// Catches the mutant that lets a retry be overtaken by the next event of its key.
#[test]
fn a_failure_holds_its_key_and_only_that() {
    let (mut lanes, now) = (lanes(3, 8), Instant::now());
    for (slot, key) in [(1, "a"), (2, "a"), (3, "b"), (4, "c")] {
        arrive(&mut lanes, slot, key);
    }
    assert_eq!(calls(&lanes.start(now)), [1, 3, 4]);
    assert!(lanes.answered(1, retryable(), now, 0.5).is_empty());
    lanes.answered(3, Answer::Handled, now, 0.5);
    assert!(lanes.start(now).is_empty(), "2 waits behind 1");
    let due = lanes.next_due(now).unwrap();
    assert_eq!(due, now + Duration::from_millis(100));
    assert_eq!(lanes.start(due), [Action::Call { slot: 1, attempt: 2 }]);
    lanes.answered(1, Answer::Handled, due, 0.5);
    assert_eq!(calls(&lanes.start(due)), [2]);
}

#[test]
fn gives_up_after_the_last_attempt() {
    let (mut lanes, mut now) = (lanes(3, 1), Instant::now());
    arrive(&mut lanes, 1, "a");
    for attempt in 1..=3 {
        assert_eq!(lanes.start(now), [Action::Call { slot: 1, attempt }]);
        let actions = lanes.answered(1, retryable(), now, 0.5);
        let reason = DeadReason { cause: DeadCause::Attempts, error: "no".into(), attempts: 3 };
        let last = vec![Action::DeadLetter { slot: 1, reason }];
        assert_eq!(actions, if attempt == 3 { last } else { vec![] });
        now += SOON;
    }
    assert!(lanes.is_empty());
}

#[test]
fn what_no_attempt_can_mend_is_given_up_at_once() {
    let (mut lanes, now) = (lanes(3, 2), Instant::now());
    arrive(&mut lanes, 1, "a");
    arrive(&mut lanes, 2, "b");
    lanes.start(now);
    for (slot, kind, cause) in [
        (1, HandlerErrorKind::Permanent, DeadCause::Permanent),
        (2, HandlerErrorKind::Undecodable, DeadCause::Undecodable),
    ] {
        let reason = DeadReason { cause, error: "no".into(), attempts: 1 };
        assert_eq!(lanes.answered(slot, failed(kind), now, 0.5), [Action::DeadLetter { slot, reason }]);
    }
}

/// Catches the mutant that spends attempts in an outage: with 3 attempts, 100 failures give nothing up.
#[test]
fn an_outage_gives_nothing_up() {
    let (mut lanes, mut now) = (lanes(3, 64), Instant::now());
    (0..40).for_each(|slot| arrive(&mut lanes, slot, &format!("key-{slot}")));
    let mut running = calls(&lanes.start(now));
    assert_eq!(running.len(), 40);
    for _ in 0..100 {
        for slot in running.drain(..) {
            assert_eq!(lanes.answered(slot, retryable(), now, 0.5), [], "nothing is settled");
        }
        assert!(lanes.is_paused());
        now += Duration::from_secs(40);
        running = calls(&lanes.start(now));
        assert_eq!(running.len(), 1, "one is tried at a time");
    }
    lanes.answered(running[0], Answer::Handled, now, 0.5);
    assert!(!lanes.is_paused());
    let rest = lanes.start(now);
    assert_eq!(calls(&rest).len(), 39, "then all the others");
    let firsts = |action: &Action| matches!(action, Action::Call { attempt: 1, .. });
    assert!(rest.iter().all(firsts), "what was spent before the pause is given back: {rest:?}");
}

/// Catches the mutant that retries only what failed: a pair of poison events would pause the consumer for ever.
#[test]
fn while_paused_a_healthy_event_is_tried_too() {
    let (mut lanes, mut now) = (lanes(3, 8), Instant::now());
    arrive(&mut lanes, 1, "a");
    arrive(&mut lanes, 2, "b");
    for slot in calls(&lanes.start(now)) {
        lanes.answered(slot, retryable(), now, 0.5);
    }
    assert!(lanes.is_paused());
    arrive(&mut lanes, 3, "c");
    let mut dead = 0;
    for _ in 0..20 {
        now += Duration::from_secs(40);
        for slot in calls(&lanes.start(now)) {
            let answer = if slot == 3 { Answer::Handled } else { retryable() };
            let given_up = |action: &Action| matches!(action, Action::DeadLetter { .. });
            dead += lanes.answered(slot, answer, now, 0.5).iter().filter(|action| given_up(action)).count();
        }
    }
    assert_eq!(lanes.lane_of.len(), 2 - dead, "3 was handled");
}

/// Catches the mutant that is due as soon as a probe is, with nothing to try: it would read the clock in a loop.
#[test]
fn a_pause_with_nothing_to_try_waits_for_a_lane() {
    let (mut lanes, now) = (lanes(3, 8), Instant::now());
    arrive(&mut lanes, 1, "a");
    arrive(&mut lanes, 2, "b");
    for slot in calls(&lanes.start(now)) {
        lanes.answered(slot, retryable(), now, 0.5);
    }
    assert!(lanes.is_paused());
    let due = lanes.next_due(now).unwrap();
    assert!(due > now && lanes.start(now).is_empty());
    lanes.drain(0);
    let later = due + SOON;
    assert!(lanes.start(later).is_empty());
    assert_eq!(lanes.next_due(later), None);
    lanes.arrived(Arrival { slot: 3, partition: 1, key: None, attempt: 1, suspect: false });
    assert_eq!(calls(&lanes.start(later)), [3]);
}

/// Catches the mutant that tries one event when a probe is due, though that one is given up uncalled: the rest would
/// wait for ever.
#[test]
fn a_probe_goes_past_what_is_given_up_uncalled() {
    let (mut lanes, now) = (lanes(2, 8), Instant::now());
    arrive(&mut lanes, 1, "a");
    arrive(&mut lanes, 2, "b");
    for slot in calls(&lanes.start(now)) {
        lanes.answered(slot, retryable(), now, 0.5);
    }
    lanes.drain(0);
    lanes.arrived(Arrival { slot: 3, partition: 1, key: None, attempt: 3, suspect: true });
    lanes.arrived(Arrival { slot: 4, partition: 1, key: None, attempt: 1, suspect: true });
    let actions = lanes.start(now + SOON);
    assert!(matches!(actions[..], [Action::DeadLetter { slot: 3, .. }, Action::Record { slot: 4 }]), "{actions:?}");
}

#[test]
fn an_error_that_blames_the_event_never_pauses() {
    let (mut lanes, mut now) = (lanes(2, 64), Instant::now());
    (0..20).for_each(|slot| arrive(&mut lanes, slot, &format!("key-{slot}")));
    for _ in 0..2 {
        for slot in calls(&lanes.start(now)) {
            lanes.answered(slot, failed(HandlerErrorKind::OfEvent), now, 0.5);
            assert!(!lanes.is_paused());
        }
        now += SOON;
    }
    assert!(lanes.is_empty(), "all were given up");
}

#[test]
fn a_single_key_cannot_be_told_from_an_outage_and_gives_up() {
    let (mut lanes, mut now) = (lanes(2, 64), Instant::now());
    arrive(&mut lanes, 1, "a");
    arrive(&mut lanes, 2, "a");
    for _ in 0..2 {
        let slots = calls(&lanes.start(now));
        assert_eq!(slots, [1]);
        lanes.answered(1, retryable(), now, 0.5);
        now += SOON;
    }
    assert_eq!(calls(&lanes.start(now)), [2]);
}

/// Catches the mutants that call a suspect unrecorded, or beside its neighbours.
#[test]
fn suspects_run_alone_and_are_recorded_before() {
    let (mut lanes, now) = (lanes(2, 8), Instant::now());
    let suspect = |slot, attempt| Arrival { slot, partition: 0, key: None, attempt, suspect: true };
    lanes.arrived(suspect(1, 1));
    lanes.arrived(suspect(2, 1));
    lanes.arrived(Arrival { partition: 1, ..suspect(3, 1) });
    assert_eq!(lanes.start(now), [Action::Record { slot: 1 }, Action::Record { slot: 3 }], "one per partition");
    assert!(lanes.recorded(1, false, now, 0.5).is_empty());
    assert_eq!(lanes.start(now), [Action::Record { slot: 2 }], "unrecorded, 1 is not handled");
    assert_eq!(lanes.recorded(2, true, now, 0.5), [Action::Call { slot: 2, attempt: 1 }]);
    let later = now + SOON;
    assert!(lanes.start(later).is_empty(), "1 waits for 2");
    lanes.answered(2, Answer::Handled, later, 0.5);
    assert_eq!(lanes.start(later), [Action::Record { slot: 1 }]);
}

/// Catches the mutant that calls an event again however often its process has died of it.
#[test]
fn a_suspect_whose_attempts_are_spent_is_given_up_uncalled() {
    let (mut lanes, now) = (lanes(2, 8), Instant::now());
    lanes.arrived(Arrival { slot: 1, partition: 0, key: None, attempt: 3, suspect: true });
    let error = "2 attempts were begun and none ended".into();
    let reason = DeadReason { cause: DeadCause::Killed, error, attempts: 2 };
    assert_eq!(lanes.start(now), [Action::DeadLetter { slot: 1, reason }]);
}

#[test]
fn stopping_and_draining_give_back_what_is_not_running() {
    let (mut lanes, now) = (lanes(3, 1), Instant::now());
    arrive(&mut lanes, 1, "a");
    arrive(&mut lanes, 2, "a");
    lanes.arrived(Arrival { slot: 3, partition: 1, key: None, attempt: 1, suspect: false });
    assert_eq!(calls(&lanes.start(now)), [1]);
    assert_eq!(lanes.drain(0), [Action::Release { slot: 2 }]);
    assert_eq!(lanes.answered(1, retryable(), now, 0.5), [Action::Release { slot: 1 }]);
    assert_eq!(lanes.stop(), [Action::Release { slot: 3 }]);
    assert!(lanes.is_empty() && lanes.start(now).is_empty());
}

proptest! {
    /// Random arrivals, answers, drains and time: each delivery is settled exactly once, calls of a key are in order
    /// and one at a time, and the concurrency is kept.
    #[test]
    fn keeps_order_and_settles_all_once(
        events in proptest::collection::vec((0u8..6, 0u32..3, 0u8..12), 1..60), answers in proptest::collection::vec(0u8..8, 400), concurrency in 1usize..5,
    ) {
        let (mut lanes, mut now) = (lanes(3, concurrency), Instant::now());
        let mut keys: HashMap<Slot, (u32, String)> = HashMap::new();
        let mut settled: HashMap<Slot, Action> = HashMap::new();
        let mut running: Vec<Slot> = Vec::new();
        let mut answers = answers.into_iter().cycle();
        let mut events = events.into_iter().enumerate();
        for step in 0..2_000 {
            if let Some((slot, (key, partition, suspect))) = events.next() {
                let name = if key == 0 { format!("none-{slot}") } else { format!("k{key}") };
                keys.insert(slot as Slot, (partition, name.clone()));
                let key = (key > 0).then(|| name.into());
                lanes.owned(partition);
                lanes.arrived(Arrival { slot: slot as Slot, partition, key, attempt: 1 + u32::from(suspect == 1), suspect: suspect < 2 });
            }
            let mut actions = lanes.start(now);
            if step % 3 == 0 && !running.is_empty() {
                let slot = running.remove(0);
                let answer = match answers.next().unwrap() {
                    0 => failed(HandlerErrorKind::Permanent),
                    1 => failed(HandlerErrorKind::OfEvent),
                    2 | 3 => retryable(),
                    _ => Answer::Handled,
                };
                actions.extend(lanes.answered(slot, answer, now, 0.5));
            }
            if step == 50 {
                actions.extend(lanes.drain(1));
            }
            while let Some(action) = actions.pop() {
                match action {
                    Action::Record { slot } => actions.extend(lanes.recorded(slot, answers.next().unwrap() > 0, now, 0.5)),
                    Action::Call { slot, .. } => {
                        let key = &keys[&slot];
                        prop_assert!(running.iter().all(|other| keys[other] != *key), "one of a key at a time");
                        let earlier = keys.iter().filter(|(other, other_key)| **other < slot && *other_key == key);
                        prop_assert!(earlier.into_iter().all(|(other, _)| settled.contains_key(other)), "in order");
                        running.push(slot);
                        prop_assert!(running.len() <= concurrency);
                    }
                    Action::Ack { slot } | Action::Release { slot } | Action::DeadLetter { slot, .. } => {
                        prop_assert!(settled.insert(slot, action.clone()).is_none(), "{slot} settled twice");
                    }
                }
            }
            now += Duration::from_millis(700);
        }
        prop_assert_eq!(settled.len(), keys.len(), "left: {:?}", lanes);
        prop_assert!(lanes.is_empty() && lanes.by_key.is_empty() && lanes.lanes.is_empty() && lanes.waiting.is_empty());
    }
}
