//! Publishing: what `Ok` means, what survives, in which order.

use std::sync::Arc;

use super::{
    Fixture,
    kit::{by_key, event, events, ids, partitions, too_large, topic},
};
use crate::{
    ErrorKind, Event, EventBus, EventBusExt, OrderOnFailure, SubscribeRequest, Timestamp, partition::partition_of,
};

/// Every index of a batch gets one outcome, and only one.
pub async fn confirms_each_event_of_a_batch_once(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    let mut confirmations = bus.publish_batch(events(&topic, 10, 30)).await;
    assert_eq!(confirmations.len(), 300);
    let mut seen = vec![false; 300];
    while let Some((index, outcome)) = fixture.within("an outcome", confirmations.next()).await {
        assert!(outcome.is_ok(), "{outcome:?}");
        assert!(!std::mem::replace(&mut seen[index], true), "event {index} has two outcomes");
    }
    assert!(seen.into_iter().all(|seen| seen), "an event has no outcome");
}

/// Nothing in, nothing out.
pub async fn an_empty_batch_is_answered_with_nothing(fixture: &Fixture) {
    let bus = fixture.bus().await;
    assert!(fixture.within("no outcome", bus.publish_all(Vec::new())).await.is_empty());
}

/// Directly after `Ok` the event is in the broker, where another client sees it.
pub async fn what_is_confirmed_is_stored(fixture: &Fixture) {
    let (bus, other, topic) = (fixture.bus().await, fixture.bus().await, topic());
    let mut reader = fixture.reader(&other, &topic).await;
    for n in 0..20 {
        fixture.publish(&bus, vec![event(&topic, "key", n)]).await;
        if bus.capabilities().subscribe {
            let lag = other.admin().lag(&topic, &super::kit::group("reader")).await.expect("lag is told");
            assert_eq!(lag.lag(), n as u64 + 1, "confirmed but not stored");
        }
    }
    assert_eq!(reader.events().await.len(), 20);
}

/// Every attribute and every byte of the data comes out as it went in.
pub async fn every_attribute_survives(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    let full = |n: usize| Event::builder(topic.as_text(), "order.placed").id(format!("id-{n}")).key("one-key");
    let builders = vec![
        full(0).data(r#"{"total": 5.00}"#),
        full(1).subject("order/7 é漢").source("https://shop.example/orders?a=b").data("{}"),
        full(2).content_type("text/plain; charset=utf-8").data("line\nbreak \u{1f600}"),
        full(3).content_type("image/png").data((0..=255u8).collect::<Vec<u8>>()),
        full(4).time(Timestamp::from_unix_micros(1)).data("not JSON"),
        full(5).time("2026-11-21T09:30:00.123456Z".parse().expect("a time")),
        full(6).extension("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        full(7).extension("tenantid", "").extension("a1", "x y=z;\"'é").extension("long", "v".repeat(2_000)),
        full(8).data(vec![b'x'; 200_000]).content_type("application/octet-stream"),
        full(9).key("kéy 漢/\u{1f600} with spaces"),
        full(10).key("k".repeat(1_024)).id("i".repeat(255)),
        full(11).data("null"),
        full(12).data("{\n \"pretty\": true\r\n}"),
    ];
    let mut published: Vec<Event> = builders.into_iter().map(|builder| builder.build().expect("valid")).collect();
    published.push(Event::builder(topic.as_text(), "no.key").build().expect("valid"));
    let mut reader = fixture.reader(&bus, &topic).await;
    fixture.publish(&bus, published.clone()).await;
    let mut read = reader.events().await;
    let by_id = |one: &Event, other: &Event| one.id().cmp(other.id());
    published.sort_by(by_id);
    read.sort_by(by_id);
    assert_eq!(ids(&read), ids(&published));
    for (read, published) in read.iter().zip(&published) {
        assert_eq!(read, published);
        assert_eq!(read.data(), published.data(), "the data of {}", published.id());
    }
}

/// The partition of a key is murmur2 of it, on every broker.
pub async fn a_key_goes_where_murmur2_says(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().subscribe {
        return refuses_to_subscribe(fixture, &bus).await;
    }
    fixture.declare(&bus, &topic, &["readers"]).await;
    let mut member = fixture.member(&bus, &topic, "readers").await;
    fixture.publish(&bus, events(&topic, 60, 1)).await;
    let count = partitions(&bus, &topic).await;
    for delivery in member.take(60).await {
        assert_eq!(delivery.partition(), partition_of(delivery.event(), count), "{:?}", delivery.event().key());
        delivery.ack();
    }
}

/// The order of batches is the order of hand-overs, with many batches under way.
pub async fn keeps_the_order_of_a_key_across_batches(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    let mut reader = fixture.reader(&bus, &topic).await;
    let all = events(&topic, 5, 200);
    let mut under_way = Vec::new();
    for batch in all.chunks(37) {
        under_way.push(fixture.within("a hand-over", bus.publish_batch(batch.to_vec())).await);
    }
    for confirmations in under_way {
        let outcomes = fixture.within("outcomes", confirmations.all()).await;
        assert!(outcomes.iter().all(Result::is_ok));
    }
    assert_eq!(by_key(&reader.events().await), by_key(&all));
}

/// Publishers beside each other do not mix up each other's order.
pub async fn concurrent_publishers_keep_their_own_order(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    let mut reader = fixture.reader(&bus, &topic).await;
    let mut publishers = tokio::task::JoinSet::new();
    for publisher in 0..4 {
        let (bus, topic) = (Arc::clone(&bus), topic.clone());
        publishers.spawn(async move {
            let mut under_way = Vec::new();
            for batch in 0..10 {
                let numbers = batch * 10..batch * 10 + 10;
                let batch = numbers.map(|n| event(&topic, &format!("publisher-{publisher}"), n)).collect();
                under_way.push(bus.publish_batch(batch).await);
            }
            for confirmations in under_way {
                assert!(confirmations.all().await.iter().all(Result::is_ok));
            }
        });
    }
    while let Some(published) = fixture.within("the publishers", publishers.join_next()).await {
        published.expect("a publisher stores everything");
    }
    let read = by_key(&reader.events().await);
    assert_eq!(read.len(), 4);
    for (key, ids) in read {
        assert_eq!(ids, (0..100).map(|n| format!("{key}-{n}")).collect::<Vec<_>>());
    }
}

/// One event is too large: it alone is refused, as `TooLarge`, and its neighbours are stored.
pub async fn refuses_an_event_above_its_limit_and_nothing_else(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    let mut reader = fixture.reader(&bus, &topic).await;
    let batch = vec![event(&topic, "a", 0), too_large(&bus, &topic, "b"), event(&topic, "c", 0), event(&topic, "a", 1)];
    let outcomes = fixture.within("outcomes", bus.publish_all(batch)).await;
    let kinds: Vec<_> = outcomes.iter().map(|outcome| outcome.as_ref().err().map(|error| error.kind())).collect();
    assert_eq!(kinds, [None, Some(ErrorKind::TooLarge), None, None]);
    let mut read = ids(&reader.events().await);
    read.sort();
    assert_eq!(read, ["a-0", "a-1", "c-0"]);
}

/// On a fail-stop bus nothing of its key lands behind a refused event of the batch; on another it does.
pub async fn keeps_the_order_behind_a_refused_event(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    let mut reader = fixture.reader(&bus, &topic).await;
    let batch = vec![event(&topic, "a", 0), too_large(&bus, &topic, "a"), event(&topic, "a", 1), event(&topic, "b", 0)];
    let outcomes = fixture.within("outcomes", bus.publish_all(batch)).await;
    let fail_stop = bus.capabilities().order_on_failure == OrderOnFailure::FailStop;
    let stored: Vec<bool> = outcomes.iter().map(Result::is_ok).collect();
    assert_eq!(stored, [true, false, !fail_stop, true]);
    let landed = ids(&reader.events().await).contains(&"a-1".to_owned());
    assert_eq!(landed, !fail_stop, "what follows a refused event of its key");
}

/// After `close` every call is answered, with `Closed`, and a second `close` is fine.
pub async fn answers_closed_after_close(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    fixture.publish(&bus, vec![event(&topic, "a", 0)]).await;
    for _ in 0..2 {
        fixture.within("closing", bus.close()).await.expect("the bus closes");
    }
    let outcomes = fixture.within("outcomes", bus.publish_all(vec![event(&topic, "a", 1)])).await;
    assert_eq!(outcomes[0].as_ref().expect_err("closed").kind(), ErrorKind::Closed);
    assert_eq!(bus.ping().await.expect_err("closed").kind(), ErrorKind::Closed);
    // Another client of the same broker is not concerned.
    let other = fixture.bus().await;
    fixture.publish(&other, vec![event(&topic, "a", 2)]).await;
}

/// What a bus that only stores answers to those who would read.
pub(super) async fn refuses_to_subscribe(fixture: &Fixture, bus: &Arc<dyn EventBus>) {
    let request = SubscribeRequest::new(topic(), super::kit::group("readers"));
    let refused = fixture.within("an answer", bus.subscribe(request)).await;
    assert_eq!(refused.expect_err("it only stores").kind(), ErrorKind::Invalid);
}
