//! Writing a log: order, duplicates, late events, histories and epochs.

use std::sync::Arc;

use super::{
    Fixture,
    kit::{by_key, event, ids, too_large, topic, writer_id},
};
use crate::{ErrorKind, Event, EventBus, LogId, LogWriter, Mark, OrderOnFailure, Outcome, Seq, Topic, WriterId};

/// The mark of a relay that has settled everything up to `low` but `holes`, and seen everything up to `high`.
fn mark(low: u64, high: u64, holes: &[u64]) -> Mark {
    Mark { low: Seq(low), high: Seq(high), holes: holes.iter().copied().map(Seq).collect() }
}

/// The events at these places: number and key follow from the place.
fn rows(topic: &Topic, seqs: &[u64]) -> Vec<(Seq, Event)> {
    seqs.iter().map(|seq| (Seq(*seq), event(topic, "log", *seq as usize))).collect()
}

async fn write(
    fixture: &Fixture,
    writer: &mut Box<dyn LogWriter>,
    rows: Vec<(Seq, Event)>,
    mark: &Mark,
) -> Vec<Outcome> {
    let confirmations = fixture.within("a hand-over", writer.publish_batch(rows, mark)).await;
    fixture.within("outcomes", confirmations.all()).await
}

/// Whether each outcome is `Ok`, and if so whether the event was there already.
fn fates(outcomes: &[Outcome]) -> Vec<Option<bool>> {
    outcomes.iter().map(|outcome| outcome.as_ref().ok().map(|receipt| receipt.already_stored)).collect()
}

/// Batches written one behind the other arrive in order, with several under way.
pub async fn a_writer_stores_in_order(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    let mut reader = fixture.reader(&bus, &topic).await;
    let mut writer = fixture.writer(&bus, writer_id(LogId::random(), 1)).await;
    let mut under_way = Vec::new();
    for batch in 0..10 {
        let seqs: Vec<u64> = (batch * 20 + 1..=batch * 20 + 20).collect();
        let holes: Vec<u64> = (1..=batch * 20 + 20).collect();
        let mark = mark(0, batch * 20 + 20, &holes);
        under_way.push(fixture.within("a hand-over", writer.publish_batch(rows(&topic, &seqs), &mark)).await);
    }
    for confirmations in under_way {
        assert_eq!(fates(&fixture.within("outcomes", confirmations.all()).await), vec![Some(false); 20]);
    }
    fixture.within("closing", writer.close()).await.expect("the writer closes");
    let all: Vec<Event> = rows(&topic, &(1..=200).collect::<Vec<_>>()).into_iter().map(|(_, event)| event).collect();
    assert_eq!(by_key(&reader.events().await), by_key(&all));
}

/// The next owner hands over what its predecessor had stored but not settled: it is stored once where the broker
/// remembers, and again where it does not.
pub async fn what_a_writer_stored_is_not_stored_again(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    let mut reader = fixture.reader(&bus, &topic).await;
    let log = LogId::random();
    let mut first = fixture.writer(&bus, writer_id(log, 1)).await;
    write(fixture, &mut first, rows(&topic, &[1, 2, 3, 4]), &mark(0, 4, &[1, 2, 3, 4])).await;
    let since = Some(first.position());
    drop(first);
    let mut second = fixture.writer(&fixture.bus().await, WriterId { since, ..writer_id(log, 2) }).await;
    let outcomes = write(fixture, &mut second, rows(&topic, &[2, 3, 4, 5]), &mark(1, 5, &[2, 3, 4, 5])).await;
    let remembers = bus.capabilities().remembers_writers;
    assert_eq!(fates(&outcomes), [Some(remembers), Some(remembers), Some(remembers), Some(false)]);
    let marks = second.high_marks();
    let highest = (Seq(4), "log-4".into());
    assert_eq!(marks.contains(&highest), remembers, "what is remembered can be compared with the log: {marks:?}");
    let expected: &[u64] = if remembers { &[1, 2, 3, 4, 5] } else { &[1, 2, 3, 4, 2, 3, 4, 5] };
    assert_eq!(ids(&reader.events().await), expected.iter().map(|n| format!("log-{n}")).collect::<Vec<_>>());
}

/// A transaction commits late, so its event is written behind later ones: it is no duplicate.
pub async fn a_late_event_is_stored_behind_later_ones(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    let mut reader = fixture.reader(&bus, &topic).await;
    let log = LogId::random();
    let mut writer = fixture.writer(&bus, writer_id(log, 1)).await;
    write(fixture, &mut writer, rows(&topic, &[1, 2, 5]), &mark(0, 5, &[1, 2, 3, 4, 5])).await;
    let late = write(fixture, &mut writer, rows(&topic, &[4]), &mark(2, 5, &[3, 4])).await;
    assert_eq!(fates(&late), [Some(false)]);
    drop(writer);
    let mut next = fixture.writer(&fixture.bus().await, writer_id(log, 2)).await;
    let later = write(fixture, &mut next, rows(&topic, &[3]), &mark(2, 5, &[3])).await;
    assert_eq!(fates(&later), [Some(false)], "an event that was never stored is taken for a duplicate");
    assert_eq!(ids(&reader.events().await), ["log-1", "log-2", "log-5", "log-4", "log-3"]);
}

/// After a restore the same numbers mean other events: under a new incarnation nothing counts as stored.
pub async fn another_history_is_not_taken_for_duplicates(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    let mut reader = fixture.reader(&bus, &topic).await;
    let log = LogId::random();
    let mut writer = fixture.writer(&bus, writer_id(log, 1)).await;
    write(fixture, &mut writer, rows(&topic, &[1, 2, 3]), &mark(0, 3, &[1, 2, 3])).await;
    drop(writer);
    let restored = WriterId { incarnation: "second".into(), ..writer_id(log, 2) };
    let mut writer = fixture.writer(&bus, restored).await;
    assert!(writer.high_marks().is_empty(), "nothing is remembered of this history");
    let outcomes = write(fixture, &mut writer, rows(&topic, &[2, 3]), &mark(1, 3, &[2, 3])).await;
    assert_eq!(fates(&outcomes), [Some(false), Some(false)], "an event of the new history is lost");
    assert_eq!(ids(&reader.events().await), ["log-1", "log-2", "log-3", "log-2", "log-3"]);
}

/// A new owner begins at an old checkpoint: its first marks know less than the broker, and take nothing back.
pub async fn an_old_mark_forgets_nothing(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().remembers_writers {
        return;
    }
    let mut reader = fixture.reader(&bus, &topic).await;
    let log = LogId::random();
    let mut writer = fixture.writer(&bus, writer_id(log, 1)).await;
    write(fixture, &mut writer, rows(&topic, &[1, 2, 3, 4, 5, 6]), &mark(0, 6, &[1, 2, 3, 4, 5, 6])).await;
    drop(writer);
    let mut writer = fixture.writer(&bus, writer_id(log, 2)).await;
    let first = write(fixture, &mut writer, rows(&topic, &[1, 2]), &mark(0, 2, &[1, 2])).await;
    let second = write(fixture, &mut writer, rows(&topic, &[3, 4, 5, 6]), &mark(0, 6, &[1, 2, 3, 4, 5, 6])).await;
    assert_eq!(fates(&[first, second].concat()), [Some(true); 6]);
    assert_eq!(reader.events().await.len(), 6);
}

/// Two logs, or two sinks of one, have the same numbers and nothing else in common.
pub async fn logs_and_sinks_do_not_share_a_position(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    let mut reader = fixture.reader(&bus, &topic).await;
    let log = LogId::random();
    let other_sink = WriterId { sink: "audit".into(), ..writer_id(log, 1) };
    for id in [writer_id(log, 1), writer_id(LogId::random(), 1), other_sink] {
        let mut writer = fixture.writer(&bus, id).await;
        let outcomes = write(fixture, &mut writer, rows(&topic, &[1, 2]), &mark(0, 2, &[1, 2])).await;
        assert_eq!(fates(&outcomes), [Some(false), Some(false)]);
    }
    assert_eq!(reader.events().await.len(), 6);
}

/// Where the broker remembers writers, an owner of the past stores nothing, neither by the writer it has nor by another.
pub async fn a_lower_epoch_is_fenced(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    let mut reader = fixture.reader(&bus, &topic).await;
    let log = LogId::random();
    let mut zombie = fixture.writer(&fixture.bus().await, writer_id(log, 1)).await;
    let mut owner = fixture.writer(&bus, writer_id(log, 2)).await;
    let late = write(fixture, &mut zombie, rows(&topic, &[1]), &mark(0, 1, &[1])).await;
    let again = fixture.within("an answer", bus.open_writer(writer_id(log, 1))).await;
    let republished = fixture.within("a hand-over", zombie.republish(vec![event(&topic, "op", 0)])).await.all().await;
    if bus.capabilities().remembers_writers {
        assert_eq!(late[0].as_ref().expect_err("fenced").kind(), ErrorKind::Fenced);
        assert_eq!(republished[0].as_ref().expect_err("fenced").kind(), ErrorKind::Fenced);
        let refused = again.expect_err("fenced");
        assert_eq!((refused.kind(), refused.fence()), (ErrorKind::Fenced, Some(2)), "it says which epoch it met");
        write(fixture, &mut owner, rows(&topic, &[1]), &mark(0, 1, &[1])).await;
        assert_eq!(ids(&reader.events().await), ["log-1"]);
    } else {
        assert_eq!(fates(&late), [Some(false)], "this broker cannot tell");
    }
}

/// An owner that opens its log again, as after a time-out, silences its own earlier writer.
pub async fn an_older_writer_of_the_same_epoch_is_fenced(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().remembers_writers {
        return;
    }
    let mut reader = fixture.reader(&bus, &topic).await;
    let log = LogId::random();
    let mut older = fixture.writer(&bus, writer_id(log, 1)).await;
    let mut newer = fixture.writer(&bus, writer_id(log, 1)).await;
    let late = write(fixture, &mut older, rows(&topic, &[1]), &mark(0, 1, &[1])).await;
    assert_eq!(late[0].as_ref().expect_err("fenced").kind(), ErrorKind::Fenced);
    write(fixture, &mut newer, rows(&topic, &[1]), &mark(0, 1, &[1])).await;
    assert_eq!(ids(&reader.events().await), ["log-1"]);
}

/// On a fail-stop bus, a batch handed over behind one that failed does not land before the failed one was repeated.
pub async fn a_batch_behind_a_failed_one_does_not_land(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    let mut reader = fixture.reader(&bus, &topic).await;
    let log = LogId::random();
    let mut writer = fixture.writer(&bus, writer_id(log, 1)).await;
    let refused = vec![(Seq(1), too_large(&bus, &topic, "log"))];
    let first = fixture.within("a hand-over", writer.publish_batch(refused, &mark(0, 1, &[1]))).await;
    let second = fixture.within("a hand-over", writer.publish_batch(rows(&topic, &[2]), &mark(0, 2, &[1, 2]))).await;
    let first = fixture.within("outcomes", first.all()).await;
    let second = fixture.within("outcomes", second.all()).await;
    assert_eq!(first[0].as_ref().expect_err("too large").kind(), ErrorKind::TooLarge);
    let fail_stop = bus.capabilities().order_on_failure == OrderOnFailure::FailStop;
    assert_eq!(second[0].is_err(), fail_stop, "what follows a failed batch");
    if fail_stop {
        assert!(!second[0].as_ref().expect_err("held back").spends_attempt(), "it is not to blame");
        fixture.within("closing", writer.close()).await.expect("the writer closes");
        let mut writer = fixture.writer(&bus, writer_id(log, 1)).await;
        let repeated = write(fixture, &mut writer, rows(&topic, &[1, 2]), &mark(0, 2, &[1, 2])).await;
        assert_eq!(fates(&repeated), [Some(false), Some(false)]);
        assert_eq!(ids(&reader.events().await), ["log-1", "log-2"]);
    }
}

/// An operator publishes an event again: it is stored, although its place was written long ago.
pub async fn an_operators_event_is_stored_again(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    let mut reader = fixture.reader(&bus, &topic).await;
    let mut writer: Box<dyn LogWriter> = fixture.writer(&bus, writer_id(LogId::random(), 1)).await;
    write(fixture, &mut writer, rows(&topic, &[1, 2]), &mark(0, 2, &[1, 2])).await;
    let again = fixture.within("a hand-over", writer.republish(vec![event(&topic, "log", 1)])).await;
    assert_eq!(fates(&fixture.within("outcomes", again.all()).await), [Some(false)]);
    let read = ids(&reader.events().await);
    assert_eq!(read, ["log-1", "log-2", "log-1"]);
    let _: Arc<dyn EventBus> = bus;
}
