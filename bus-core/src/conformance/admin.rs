//! What an operator asks of a bus.

use std::num::NonZeroU32;

use super::{
    Fixture,
    kit::{event, events, group, ids, partitions, topic},
    publish::refuses_to_subscribe,
};
use crate::{ErrorKind, Group, SubscribeFrom, TopicSpec, Topology};

/// A topology is created where it is missing, left alone where it exists, and a disagreement names both sides.
pub async fn a_declared_topology_is_created_and_checked(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().subscribe {
        return refuses_to_subscribe(fixture, &bus).await;
    }
    let topology = |partitions: u32, group_name: &str| Topology {
        topics: vec![TopicSpec {
            topic: topic.clone(),
            partitions: NonZeroU32::new(partitions),
            groups: vec![group(group_name)],
        }],
    };
    let missing = fixture.within("checking", bus.admin().check(&topology(3, "billing"))).await;
    assert_eq!(missing.expect_err("it does not exist").kind(), ErrorKind::Invalid);
    for _ in 0..2 {
        fixture.within("applying", bus.admin().apply(&topology(3, "billing"))).await.expect("it is created");
    }
    assert_eq!(partitions(&bus, &topic).await.get(), 3);
    assert_eq!(bus.admin().groups(&topic).await.expect("groups are listed"), [group("billing")]);
    bus.admin().check(&topology(3, "billing")).await.expect("it agrees");
    for outcome in [bus.admin().check(&topology(5, "billing")).await, bus.admin().apply(&topology(5, "billing")).await]
    {
        let error = outcome.expect_err("three are not five");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        let text = error.to_string();
        assert!(text.contains('3') && text.contains('5') && text.contains(&*topic), "it names both: {text}");
    }
    assert!(bus.admin().check(&topology(3, "absent")).await.is_err());
}

/// Lag counts what is not settled, delivered or not.
pub async fn lag_counts_what_is_not_settled(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().subscribe {
        return refuses_to_subscribe(fixture, &bus).await;
    }
    fixture.declare(&bus, &topic, &["workers"]).await;
    fixture.publish(&bus, events(&topic, 1, 5)).await;
    let lag = async || bus.admin().lag(&topic, &group("workers")).await.expect("lag is told");
    let before = lag().await;
    assert_eq!((before.lag(), before.partitions.len()), (5, partitions(&bus, &topic).await.get() as usize));
    assert!(before.oldest_age.is_some());
    let mut member = fixture.member(&bus, &topic, "workers").await;
    let mut taken = member.take(5).await;
    fixture
        .until("5 pending", async || (lag().await.partitions.iter().map(|p| p.pending).sum::<u64>() == 5).then_some(()))
        .await;
    taken.drain(..3).for_each(crate::Delivery::ack);
    fixture.until("a lag of 2", async || (lag().await.lag() == 2).then_some(())).await;
    taken.into_iter().for_each(crate::Delivery::ack);
    fixture.until("no lag", async || (lag().await.lag() == 0).then_some(())).await;
    assert_eq!(lag().await.oldest_age, None);
    let absent: Group = group("absent");
    assert_eq!(bus.admin().lag(&topic, &absent).await.expect_err("no such group").kind(), ErrorKind::Invalid);
}

/// A group without members can be moved and removed; one with members cannot.
pub async fn a_group_can_be_moved_and_removed(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().subscribe {
        return refuses_to_subscribe(fixture, &bus).await;
    }
    fixture.declare(&bus, &topic, &["workers"]).await;
    let workers = group("workers");
    fixture.publish(&bus, vec![event(&topic, "a", 0)]).await;
    let mut member = fixture.member(&bus, &topic, "workers").await;
    assert_eq!(ids(&member.drain(&bus).await), ["a-0"]);
    let replay = bus.capabilities().replay;
    if replay {
        let refused = bus.admin().seek(&topic, &workers, SubscribeFrom::Earliest).await;
        assert_eq!(refused.expect_err("it has a member").kind(), ErrorKind::Invalid);
    }
    assert_eq!(
        bus.admin().remove_group(&topic, &workers).await.expect_err("it has a member").kind(),
        ErrorKind::Invalid
    );
    member.close().await;
    let moved = fixture.within("seeking", bus.admin().seek(&topic, &workers, SubscribeFrom::Earliest)).await;
    if replay {
        moved.expect("it has no members");
        let mut member = fixture.member(&bus, &topic, "workers").await;
        assert!(ids(&member.drain(&bus).await).contains(&"a-0".to_owned()), "it reads the past again");
        member.close().await;
    } else {
        assert_eq!(moved.expect_err("it keeps no past").kind(), ErrorKind::Invalid);
    }
    fixture.within("removing", bus.admin().remove_group(&topic, &workers)).await.expect("it has no members");
    assert!(!bus.admin().groups(&topic).await.expect("groups are listed").contains(&workers));
}
