//! Groups: who sees what, who owns what, and what happens when members come and go.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex},
};

use tokio::task::JoinHandle;

use super::{
    Fixture,
    kit::{by_key, event, events, first_by_key, ids, named_request, request_from, topic, until_owned},
    publish::refuses_to_subscribe,
};
use crate::{ErrorKind, Event, SubscribeFrom, SubscribeRequest, Topic};

/// Every group sees every event once.
pub async fn each_group_sees_every_event(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().subscribe {
        return refuses_to_subscribe(fixture, &bus).await;
    }
    fixture.declare(&bus, &topic, &["billing", "shipping"]).await;
    let mut billing = fixture.member(&bus, &topic, "billing").await;
    let mut shipping = fixture.member(&fixture.bus().await, &topic, "shipping").await;
    let all = events(&topic, 10, 10);
    fixture.publish(&bus, all.clone()).await;
    for member in [&mut billing, &mut shipping] {
        assert_eq!(by_key(&member.drain(&bus).await), by_key(&all));
    }
}

/// A member that reads on a task of its own and notes what it got from which partition.
struct Worker {
    read: Arc<Mutex<Vec<(u32, Event)>>>,
    task: JoinHandle<()>,
}

impl Worker {
    async fn start(fixture: &Fixture, request: SubscribeRequest) -> Self {
        let bus = fixture.bus().await;
        let mut subscription = bus.subscribe(request).await.expect("the group can be joined");
        let read: Arc<Mutex<Vec<(u32, Event)>>> = Arc::default();
        let notes = Arc::clone(&read);
        let task = tokio::spawn(async move {
            let _bus = bus;
            while let Ok(batch) = subscription.next_batch(16).await {
                for delivery in batch {
                    let note = (delivery.partition(), delivery.event().clone());
                    notes.lock().expect("not poisoned").push(note);
                    delivery.ack();
                }
            }
        });
        Self { read, task }
    }

    fn read(&self) -> Vec<(u32, Event)> {
        self.read.lock().expect("not poisoned").clone()
    }

    /// Ends the member as a crash would.
    fn kill(self) -> Vec<(u32, Event)> {
        self.task.abort();
        self.read()
    }
}

async fn workers(fixture: &Fixture, topic: &Topic, count: usize) -> Vec<Worker> {
    let mut workers = Vec::new();
    for n in 0..count {
        workers.push(Worker::start(fixture, named_request(topic, "workers", &format!("member-{n}"))).await);
    }
    workers
}

/// Whether `shares` are those of `members`: each floor(P / N), and P mod N of them one more.
fn fair(members: usize) -> impl Fn(&BTreeMap<String, usize>) -> bool {
    move |shares| {
        let total: usize = shares.values().sum();
        let wanted = members.min(total);
        shares.len() == wanted
            && shares.values().all(|share| (total / members..=total.div_ceil(members)).contains(share))
    }
}

/// Three members share all partitions fairly; each partition is read by one of them, each event once.
pub async fn members_share_the_partitions_fairly(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().subscribe {
        return refuses_to_subscribe(fixture, &bus).await;
    }
    fixture.declare(&bus, &topic, &["workers"]).await;
    let workers = workers(fixture, &topic, 3).await;
    until_owned(fixture, &bus, &topic, "workers", fair(3)).await;
    let all = events(&topic, 40, 5);
    fixture.publish(&bus, all.clone()).await;
    let count = || workers.iter().map(|worker| worker.read().len()).sum::<usize>();
    fixture.until("all events", async || (count() >= all.len()).then_some(())).await;

    let mut owners: HashMap<u32, usize> = HashMap::new();
    let mut read = Vec::new();
    for (member, worker) in workers.into_iter().enumerate() {
        for (partition, event) in worker.kill() {
            assert_eq!(*owners.entry(partition).or_insert(member), member, "partition {partition} has two owners");
            read.push(event);
        }
    }
    assert_eq!(by_key(&read), by_key(&all), "each event once, each key in order");
}

/// A member that joins takes its share while events flow: nothing is lost, keys stay in order.
pub async fn a_new_member_takes_its_share_without_loss(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().subscribe {
        return refuses_to_subscribe(fixture, &bus).await;
    }
    fixture.declare(&bus, &topic, &["workers"]).await;
    let first = Worker::start(fixture, named_request(&topic, "workers", "member-0")).await;
    until_owned(fixture, &bus, &topic, "workers", fair(1)).await;
    let all = events(&topic, 20, 20);
    let (before, after) = all.split_at(200);
    fixture.publish(&bus, before.to_vec()).await;
    let second = Worker::start(fixture, named_request(&topic, "workers", "member-1")).await;
    until_owned(fixture, &bus, &topic, "workers", fair(2)).await;
    fixture.publish(&bus, after.to_vec()).await;
    let complete = async || {
        let read: Vec<Event> = [first.read(), second.read()].concat().into_iter().map(|(_, event)| event).collect();
        (first_by_key(&read).values().map(Vec::len).sum::<usize>() == all.len()).then_some(())
    };
    fixture.until("all events", complete).await;
    assert!(!second.read().is_empty(), "the second member has its share");
    for worker in [first, second] {
        let read: Vec<Event> = worker.kill().into_iter().map(|(_, event)| event).collect();
        for ids in first_by_key(&read).values() {
            let numbers: Vec<usize> =
                ids.iter().map(|id| id.rsplit('-').next().unwrap_or("").parse().unwrap_or(0)).collect();
            assert!(numbers.is_sorted(), "a key out of order: {ids:?}");
        }
    }
}

/// A member dies with deliveries in hand: the next owner gets them, in order and before what follows.
pub async fn the_events_of_a_member_that_dies_go_on_in_order(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().subscribe {
        return refuses_to_subscribe(fixture, &bus).await;
    }
    fixture.declare(&bus, &topic, &["workers"]).await;
    let mut first = fixture.member(&fixture.bus().await, &topic, "workers").await;
    let all = events(&topic, 1, 10);
    fixture.publish(&bus, all[..6].to_vec()).await;
    let mut in_hand = first.take(6).await;
    in_hand.remove(0).ack();
    in_hand.remove(0).ack();
    drop(first);
    fixture.publish(&bus, all[6..].to_vec()).await;
    let mut second = fixture.member(&fixture.bus().await, &topic, "workers").await;
    let read = second.drain(&bus).await;
    let expected = ids(&all);
    let got = first_by_key(&read).remove("key-0").unwrap_or_default();
    let acked_again = got.iter().filter(|id| expected[..2].contains(id)).count();
    assert_eq!(got, expected[2 - acked_again..], "what was not settled comes again, in order");
    drop(in_hand);
}

/// A member leaves in order: what it acked stays settled, what it did not goes on.
pub async fn a_member_that_leaves_hands_over_what_it_did_not_settle(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().subscribe {
        return refuses_to_subscribe(fixture, &bus).await;
    }
    fixture.declare(&bus, &topic, &["workers"]).await;
    let mut first = fixture.member(&fixture.bus().await, &topic, "workers").await;
    fixture.publish(&bus, events(&topic, 1, 6)).await;
    let mut in_hand = first.take(6).await;
    let rest = in_hand.split_off(3);
    in_hand.into_iter().for_each(crate::Delivery::ack);
    first.close().await;
    drop(rest);
    let mut second = fixture.member(&fixture.bus().await, &topic, "workers").await;
    assert_eq!(ids(&second.drain(&bus).await), ["key-0-3", "key-0-4", "key-0-5"]);
}

/// A group that did not exist reads the past from `earliest` on, or is refused where the bus keeps none.
pub async fn earliest_reads_the_past_or_is_refused(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().subscribe {
        return refuses_to_subscribe(fixture, &bus).await;
    }
    fixture.declare(&bus, &topic, &["other"]).await;
    fixture.publish(&bus, events(&topic, 3, 3)).await;
    let request = request_from(&topic, "late", SubscribeFrom::Earliest);
    if bus.capabilities().replay {
        let mut late = fixture.member_with(&bus, request).await;
        assert_eq!(late.drain(&bus).await.len(), 9);
    } else {
        let refused = fixture.within("an answer", bus.subscribe(request)).await.expect_err("it keeps no past");
        assert_eq!(refused.kind(), ErrorKind::Invalid);
    }
}

/// A group that begins at `latest` sees only what is published after it was there.
pub async fn latest_reads_only_what_follows(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().subscribe {
        return refuses_to_subscribe(fixture, &bus).await;
    }
    fixture.declare(&bus, &topic, &["other"]).await;
    fixture.publish(&bus, vec![event(&topic, "a", 0)]).await;
    let mut late = fixture.member_with(&bus, request_from(&topic, "late", SubscribeFrom::Latest)).await;
    fixture.publish(&bus, vec![event(&topic, "a", 1)]).await;
    assert_eq!(ids(&late.drain(&bus).await), ["a-1"]);
}

/// A group that exists goes on where it stood, whatever a new member asks for.
pub async fn a_group_goes_on_where_it_stood(fixture: &Fixture) {
    let (bus, topic) = (fixture.bus().await, topic());
    if !bus.capabilities().subscribe {
        return refuses_to_subscribe(fixture, &bus).await;
    }
    fixture.declare(&bus, &topic, &["workers"]).await;
    let mut first = fixture.member(&bus, &topic, "workers").await;
    fixture.publish(&bus, vec![event(&topic, "a", 0)]).await;
    assert_eq!(ids(&first.drain(&bus).await), ["a-0"]);
    first.close().await;
    fixture.publish(&bus, vec![event(&topic, "a", 1)]).await;
    for from in [SubscribeFrom::Latest, SubscribeFrom::Earliest] {
        let mut next = fixture.member_with(&bus, request_from(&topic, "workers", from)).await;
        let expected: &[&str] = if from == SubscribeFrom::Latest { &["a-1"] } else { &[] };
        assert_eq!(ids(&next.drain(&bus).await), expected);
        next.close().await;
    }
}
