//! Settling: what comes again and what does not, and where given-up events go.

use std::{sync::Arc, time::Duration};

use super::{
    Fixture,
    kit::{event, events, first_by_key, group, ids, request, topic},
    publish::refuses_to_subscribe,
};
use crate::{
    BusError, DeadCause, DeadReason, Delivery, ErrorKind, Event, EventBus, SubscribeFrom, SubscribeRequest, Text,
    dead_letter::{DEAD_ATTEMPTS, DEAD_ERROR, DEAD_GROUP, DEAD_REASON, DEAD_TIME},
};

/// What was acked does not come again, neither to this member nor to the next.
pub async fn an_acked_event_does_not_come_again(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().subscribe {
        return refuses_to_subscribe(fixture, &bus).await;
    }
    fixture.declare(&bus, &topic, &["workers"]).await;
    let mut first = fixture.member(&bus, &topic, "workers").await;
    fixture.publish(&bus, events(&topic, 5, 5)).await;
    assert_eq!(first.drain(&bus).await.len(), 25);
    assert!(first.drain(&bus).await.is_empty());
    first.close().await;
    let mut next = fixture.member(&fixture.bus().await, &topic, "workers").await;
    assert!(next.drain(&bus).await.is_empty());
}

/// A delivery that is dropped unsettled comes again, as the next attempt.
pub async fn a_dropped_delivery_comes_again(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().subscribe {
        return refuses_to_subscribe(fixture, &bus).await;
    }
    fixture.declare(&bus, &topic, &["workers"]).await;
    let mut member = fixture.member(&bus, &topic, "workers").await;
    fixture.publish(&bus, vec![event(&topic, "a", 0)]).await;
    for attempt in 1..=3 {
        let delivery = member.take(1).await.remove(0);
        assert_eq!((delivery.event().id(), delivery.attempt()), ("a-0", attempt));
        drop(delivery);
    }
    assert_eq!(ids(&member.read(1).await), ["a-0"]);
    assert!(member.drain(&bus).await.is_empty());
}

/// A released event comes before any event of its key that was not delivered, and holds up no other key.
pub async fn a_released_event_comes_before_what_follows_it(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().subscribe {
        return refuses_to_subscribe(fixture, &bus).await;
    }
    fixture.declare(&bus, &topic, &["workers"]).await;
    let mut member = fixture.member(&bus, &topic, "workers").await;
    fixture.publish(&bus, vec![event(&topic, "a", 0)]).await;
    let first = member.take(1).await.remove(0);
    let released = std::time::Instant::now();
    first.release();
    fixture.publish(&bus, vec![event(&topic, "a", 1), event(&topic, "b", 0)]).await;
    let mut order = Vec::new();
    while order.len() < 3 {
        let delivery = member.take(1).await.remove(0);
        if delivery.event().id() == "a-0" {
            assert!(released.elapsed() >= Duration::from_millis(100), "it stays away for 100 ms");
            assert_eq!(delivery.attempt(), 2);
        }
        order.push(delivery.event().id().to_owned());
        delivery.ack();
    }
    let place = |id: &str| order.iter().position(|other| other == id);
    assert!(place("a-0") < place("a-1"), "{order:?}");
    assert!(place("b-0") < place("a-0"), "another key waits for nobody: {order:?}");
}

/// Later events are acked, an earlier one is not, and the member dies: the earlier one is not lost.
pub async fn acks_out_of_order_lose_nothing(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().subscribe {
        return refuses_to_subscribe(fixture, &bus).await;
    }
    fixture.declare(&bus, &topic, &["workers"]).await;
    let mut first = fixture.member(&fixture.bus().await, &topic, "workers").await;
    fixture.publish(&bus, events(&topic, 1, 5)).await;
    let mut in_hand = first.take(5).await;
    let unsettled = in_hand.remove(1);
    in_hand.into_iter().for_each(Delivery::ack);
    first.close().await;
    drop(unsettled);
    let mut second = fixture.member(&fixture.bus().await, &topic, "workers").await;
    let read = first_by_key(&second.drain(&bus).await).remove("key-0").unwrap_or_default();
    assert!(read.contains(&"key-0-1".to_owned()), "the event that was not acked is lost: {read:?}");
    assert!(!read.contains(&"key-0-0".to_owned()), "what was settled before it stays settled: {read:?}");
    assert!(read.is_sorted(), "{read:?}");
}

/// A read that is dropped half-way loses no delivery.
pub async fn a_dropped_read_loses_nothing(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().subscribe {
        return refuses_to_subscribe(fixture, &bus).await;
    }
    fixture.declare(&bus, &topic, &["workers"]).await;
    let mut member = fixture.member(&bus, &topic, "workers").await;
    let publishing = {
        let (bus, topic) = (Arc::clone(&bus), topic.clone());
        tokio::spawn(async move {
            use crate::EventBusExt;
            for n in 0..200 {
                assert!(bus.publish(event(&topic, "a", n)).await.is_ok());
            }
        })
    };
    let mut read: Vec<Event> = Vec::new();
    let reading = async {
        while read.len() < 200 {
            let impatient = Duration::from_micros(50 * (read.len() as u64 % 40));
            let batch = tokio::time::timeout(impatient, member.subscription.next_batch(7)).await;
            for delivery in batch.map(|batch| batch.expect("the subscription delivers")).unwrap_or_default() {
                read.push(delivery.event().clone());
                delivery.ack();
            }
            tokio::task::yield_now().await;
        }
    };
    fixture.within("200 events", reading).await;
    publishing.await.expect("everything is published");
    assert_eq!(ids(&read), (0..200).map(|n| format!("a-{n}")).collect::<Vec<_>>());
}

/// Never more than the window of a partition is in the process unsettled.
pub async fn the_window_is_kept(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().subscribe {
        return refuses_to_subscribe(fixture, &bus).await;
    }
    fixture.declare(&bus, &topic, &["workers"]).await;
    let narrow = SubscribeRequest { window_events: 4, ..request(&topic, "workers") };
    let mut member = fixture.member_with(&bus, narrow).await;
    fixture.publish(&bus, events(&topic, 1, 10)).await;
    let in_hand = member.take(4).await;
    // A fifth must not come; what has not come in a while that a delivery takes many times over will not.
    let fifth = tokio::time::timeout(Duration::from_millis(300), member.subscription.next_batch(10)).await;
    assert!(fifth.is_err(), "delivered beyond the window: {fifth:?}");
    in_hand.into_iter().for_each(Delivery::ack);
    assert_eq!(member.read(6).await.len(), 6);
}

/// Once a partition has moved on, settling its deliveries does nothing: the next owner decides.
pub async fn settling_after_a_partition_moved_on_does_nothing(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().subscribe {
        return refuses_to_subscribe(fixture, &bus).await;
    }
    fixture.declare(&bus, &topic, &["workers"]).await;
    let mut first = fixture.member(&fixture.bus().await, &topic, "workers").await;
    fixture.publish(&bus, vec![event(&topic, "a", 0), event(&topic, "a", 1)]).await;
    let mut late = first.take(2).await;
    first.close().await;
    fixture.within("the loss of the partition", late[0].lost()).await;
    let mut second = fixture.member(&fixture.bus().await, &topic, "workers").await;
    let again = second.take(2).await;
    late.remove(0).ack();
    late.remove(0).dead_letter(DeadReason { cause: DeadCause::Permanent, error: "late".into(), attempts: 1 });
    again.into_iter().for_each(Delivery::release);
    assert_eq!(ids(&second.read(2).await), ["a-0", "a-1"]);
    assert!(second.drain(&bus).await.is_empty());
    let dead = bus.admin().dead_letters(&topic, &group("workers"), None, 10).await.expect("dead letters are listed");
    assert!(dead.is_empty(), "a late dead letter: {dead:?}");
}

/// Once a group was moved, settling what was delivered before does nothing: the event comes again from its new place.
pub async fn settling_after_a_group_was_moved_does_nothing(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().subscribe {
        return refuses_to_subscribe(fixture, &bus).await;
    }
    fixture.declare(&bus, &topic, &["workers"]).await;
    let mut first = fixture.member(&fixture.bus().await, &topic, "workers").await;
    fixture.publish(&bus, vec![event(&topic, "a", 0)]).await;
    let late = first.take(1).await.remove(0);
    first.close().await;
    if bus.capabilities().replay {
        let moved = async { bus.admin().seek(&topic, &group("workers"), SubscribeFrom::Earliest).await };
        fixture.within("seeking", moved).await.expect("it has no members");
    }
    let mut second = fixture.member(&fixture.bus().await, &topic, "workers").await;
    let again = second.take(1).await.remove(0);
    late.ack();
    again.release();
    assert_eq!(ids(&second.read(1).await), ["a-0"]);
}

/// A dead letter is settled, and kept whole with what is known of its end.
pub async fn a_dead_letter_is_kept_with_its_reason(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().subscribe {
        return refuses_to_subscribe(fixture, &bus).await;
    }
    fixture.declare(&bus, &topic, &["workers"]).await;
    let mut member = fixture.member(&bus, &topic, "workers").await;
    let original = event(&topic, "a", 0).with_extension("tenantid", "acme").expect("valid");
    fixture.publish(&bus, vec![original.clone(), event(&topic, "a", 1)]).await;
    let mut taken = member.take(2).await;
    let reason = DeadReason { cause: DeadCause::Attempts, error: "no such customer".into(), attempts: 20 };
    taken.remove(0).dead_letter(reason);
    taken.remove(0).ack();
    assert!(member.drain(&bus).await.is_empty());
    let dead = dead_letters(fixture, &bus, &topic, "workers", 1).await.remove(0);
    let of = |name| dead.extension(name);
    assert_eq!(of(DEAD_REASON), Some("attempts"));
    assert_eq!((of(DEAD_ERROR), of(DEAD_ATTEMPTS)), (Some("no such customer"), Some("20")));
    assert_eq!(of(DEAD_GROUP), Some("workers"));
    assert!(of(DEAD_TIME).is_some_and(|time| time.parse::<crate::Timestamp>().is_ok()));
    assert_eq!((dead.id(), dead.key(), dead.data()), (original.id(), original.key(), original.data()));
    assert_eq!((dead.topic(), dead.time(), of("tenantid")), (original.topic(), original.time(), Some("acme")));
}

/// Dead letters are listed in order, page by page, and any one of them can be removed.
pub async fn dead_letters_are_listed_and_removed_one_by_one(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().subscribe {
        return refuses_to_subscribe(fixture, &bus).await;
    }
    fixture.declare(&bus, &topic, &["workers"]).await;
    let mut member = fixture.member(&bus, &topic, "workers").await;
    fixture.publish(&bus, events(&topic, 1, 7)).await;
    bury(member.take(7).await);
    dead_letters(fixture, &bus, &topic, "workers", 7).await;
    let group = group("workers");
    let (mut listed, mut after): (Vec<Event>, Option<Text>) = (Vec::new(), None);
    loop {
        let page = bus.admin().dead_letters(&topic, &group, after.as_deref(), 3).await.expect("a page");
        let Some(last) = page.last() else { break };
        assert!(page.len() <= 3 && listed.len() < 100, "pages go on behind the last position");
        after = Some(last.position.clone());
        listed.extend(page.into_iter().map(|dead| dead.event));
    }
    assert_eq!(ids(&listed), ids(&events(&topic, 1, 7)), "fewer or more than the page are listed alike");
    let removed = bus.admin().remove_dead(&topic, &group, &["key-0-4".into(), "unknown".into()]).await;
    assert_eq!(removed.expect("one is removed"), 1);
    let rest = dead_letters(fixture, &bus, &topic, "workers", 6).await;
    assert!(!ids(&rest).contains(&"key-0-4".to_owned()));
}

/// What one group gives up the other still handles, and does not see as a dead letter.
pub async fn a_dead_letter_of_one_group_is_unseen_by_another(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().subscribe {
        return refuses_to_subscribe(fixture, &bus).await;
    }
    fixture.declare(&bus, &topic, &["billing", "shipping"]).await;
    let mut billing = fixture.member(&bus, &topic, "billing").await;
    let mut shipping = fixture.member(&bus, &topic, "shipping").await;
    fixture.publish(&bus, events(&topic, 2, 2)).await;
    bury(billing.take(4).await);
    assert_eq!(shipping.drain(&bus).await.len(), 4);
    dead_letters(fixture, &bus, &topic, "billing", 4).await;
    dead_letters(fixture, &bus, &topic, "shipping", 0).await;
}

/// Member after member dies without settling anything: from the third redelivery on deliveries are suspect, recorded
/// attempts outlive the member, and progress clears the suspicion.
pub async fn repeated_takeovers_without_progress_raise_suspicion(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().subscribe {
        return refuses_to_subscribe(fixture, &bus).await;
    }
    fixture.declare(&bus, &topic, &["workers"]).await;
    fixture.publish(&bus, events(&topic, 1, 2)).await;
    for life in 0..6 {
        let mut member = fixture.member(&fixture.bus().await, &topic, "workers").await;
        let taken = member.take(2).await;
        let suspect = bus.capabilities().counts_redeliveries && life >= 3;
        assert_eq!(taken[0].suspect(), suspect, "after {life} redeliveries");
        let recorded = life.max(3) - 3;
        assert_eq!(taken[0].attempt(), recorded + 1, "recorded attempts outlive the member");
        if life >= 3 {
            let recording = member.subscription.record_attempt(&taken[0]);
            fixture.within("recording", recording).await.expect("the attempt is recorded");
        }
        drop(member);
    }
    let mut member = fixture.member(&fixture.bus().await, &topic, "workers").await;
    let mut taken = member.take(2).await;
    taken.remove(0).ack();
    drop(member);
    let mut member = fixture.member(&fixture.bus().await, &topic, "workers").await;
    let rest = member.take(1).await.remove(0);
    assert_eq!((rest.event().id(), rest.suspect()), ("key-0-1", false), "progress clears the suspicion");
    rest.ack();
}

/// Gives deliveries up.
fn bury(deliveries: Vec<Delivery>) {
    for delivery in deliveries {
        delivery.dead_letter(DeadReason { cause: DeadCause::Permanent, error: "no".into(), attempts: 1 });
    }
}

/// Waits until a group has `count` dead letters.
pub(super) async fn dead_letters(
    fixture: &Fixture,
    bus: &Arc<dyn EventBus>,
    topic: &crate::Topic,
    group_name: &str,
    count: usize,
) -> Vec<Event> {
    let group = group(group_name);
    let listed = async || {
        let dead: Result<_, BusError> = bus.admin().dead_letters(topic, &group, None, 1_000).await;
        let dead = match dead {
            Err(error) if error.kind() == ErrorKind::Invalid => Vec::new(),
            dead => dead.expect("dead letters are listed"),
        };
        (dead.len() == count).then(|| dead.into_iter().map(|dead| dead.event).collect())
    };
    fixture.until(&format!("{count} dead letters of {group_name}"), listed).await
}
