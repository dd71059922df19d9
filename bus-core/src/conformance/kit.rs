//! What the cases share: events to publish, members that read, deadlines.

use std::{
    collections::{BTreeMap, HashMap},
    num::NonZeroU32,
    sync::Arc,
    time::Duration,
};

use uuid::Uuid;

use super::Fixture;
use crate::{
    Delivery, Event, EventBus, EventBusExt, Group, LogId, LogWriter, SubscribeFrom, SubscribeRequest, Subscription,
    Topic, TopicSpec, Topology, WriterId, partition::partition_of_key,
};

/// Marks the end of what a test published, one per partition.
const SENTINEL: &str = "conformance.sentinel";

impl Fixture {
    /// A further client of the broker.
    pub(super) async fn bus(&self) -> Arc<dyn EventBus> {
        (self.connect)().await
    }

    /// Waits for `future`; panics with `what` once the deadline has passed.
    pub(super) async fn within<T>(&self, what: &str, future: impl Future<Output = T>) -> T {
        let deadline = self.deadline;
        tokio::time::timeout(deadline, future).await.unwrap_or_else(|_| panic!("{what}: not within {deadline:?}"))
    }

    /// Asks again and again until `condition` answers something.
    pub(super) async fn until<T>(&self, what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
        let polling = async {
            loop {
                if let Some(answer) = condition().await {
                    return answer;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        self.within(what, polling).await
    }

    /// Publishes and expects every event to be stored.
    pub(super) async fn publish(&self, bus: &Arc<dyn EventBus>, events: Vec<Event>) {
        for outcome in self.within("publishing", bus.publish_all(events)).await {
            assert!(outcome.is_ok(), "not stored: {outcome:?}");
        }
    }

    /// Opens a log for writing.
    pub(super) async fn writer(&self, bus: &Arc<dyn EventBus>, id: WriterId) -> Box<dyn LogWriter> {
        self.within("opening a writer", bus.open_writer(id)).await.expect("the writer opens")
    }

    /// A reader of everything published to `topic` from now on, whatever the bus can do.
    pub(super) async fn reader(&self, bus: &Arc<dyn EventBus>, topic: &Topic) -> Reader<'_> {
        let member = if bus.capabilities().subscribe {
            self.declare(bus, topic, &["reader"]).await;
            Some(self.member(bus, topic, "reader").await)
        } else {
            assert!(self.stored.is_some(), "a bus without subscriptions needs Fixture::stored");
            None
        };
        Reader { fixture: self, bus: Arc::clone(bus), topic: topic.clone(), member }
    }

    /// Creates `topic` with `groups`, so that they see what is published from now on on every broker.
    pub(super) async fn declare(&self, bus: &Arc<dyn EventBus>, topic: &Topic, groups: &[&str]) {
        let groups = groups.iter().map(|name| group(name)).collect();
        let topology = Topology { topics: vec![TopicSpec { topic: topic.clone(), partitions: None, groups }] };
        self.within("declaring", bus.admin().apply(&topology)).await.expect("the topology is created");
    }

    /// A new member of a group.
    pub(super) async fn member(&self, bus: &Arc<dyn EventBus>, topic: &Topic, group_name: &str) -> Member<'_> {
        self.member_with(bus, request(topic, group_name)).await
    }

    /// A new member of a group, as `request` says.
    pub(super) async fn member_with(&self, bus: &Arc<dyn EventBus>, request: SubscribeRequest) -> Member<'_> {
        let topic = request.topic.clone();
        let subscription = self.within("subscribing", bus.subscribe(request)).await.expect("the group can be joined");
        Member { fixture: self, bus: Arc::clone(bus), topic, subscription }
    }
}

/// A request that drains for a second only.
pub(super) fn request(topic: &Topic, group_name: &str) -> SubscribeRequest {
    SubscribeRequest { drain: Duration::from_secs(1), ..SubscribeRequest::new(topic.clone(), group(group_name)) }
}

/// How many partitions a topic has.
pub(super) async fn partitions(bus: &Arc<dyn EventBus>, topic: &Topic) -> NonZeroU32 {
    let topics = bus.admin().topics().await.expect("topics are listed");
    let spec = topics.into_iter().find(|spec| spec.topic == *topic).expect("the topic exists");
    spec.partitions.expect("the bus says how many partitions a topic has")
}

/// A topic nobody else uses.
pub(super) fn topic() -> Topic {
    Topic::new(format!("conformance-{}", Uuid::now_v7().simple())).expect("a valid topic")
}

pub(super) fn group(name: &str) -> Group {
    Group::new(name).expect("a valid group")
}

/// Event number `n` of `key`, with the number as id and data.
pub(super) fn event(topic: &Topic, key: &str, n: usize) -> Event {
    let builder = Event::json(topic.as_text(), "conformance.happened", &n).expect("a number is JSON");
    builder.id(format!("{key}-{n}")).key(key).build().expect("a valid event")
}

/// `per_key` events of each of `keys`, interleaved.
pub(super) fn events(topic: &Topic, keys: usize, per_key: usize) -> Vec<Event> {
    (0..per_key).flat_map(|n| (0..keys).map(move |key| event(topic, &format!("key-{key}"), n))).collect()
}

/// An event that `bus` must refuse for its size.
pub(super) fn too_large(bus: &Arc<dyn EventBus>, topic: &Topic, key: &str) -> Event {
    let data = vec![b'x'; bus.capabilities().event_bytes_max + 1];
    Event::builder(topic.as_text(), "conformance.happened").key(key).data(data).build().expect("a valid event")
}

pub(super) fn ids<'a>(events: impl IntoIterator<Item = &'a Event>) -> Vec<String> {
    events.into_iter().map(|event| event.id().to_owned()).collect()
}

/// The ids of each key, in the order of arrival.
pub(super) fn by_key<'a>(events: impl IntoIterator<Item = &'a Event>) -> BTreeMap<String, Vec<String>> {
    let mut keys: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for event in events {
        keys.entry(event.key().unwrap_or_default().to_owned()).or_default().push(event.id().to_owned());
    }
    keys
}

/// As [`by_key`], each id where it came first.
pub(super) fn first_by_key<'a>(events: impl IntoIterator<Item = &'a Event>) -> BTreeMap<String, Vec<String>> {
    let mut keys = by_key(events);
    for ids in keys.values_mut() {
        let mut seen = std::collections::HashSet::new();
        ids.retain(|id| seen.insert(id.clone()));
    }
    keys
}

pub(super) fn writer_id(log: LogId, epoch: u64) -> WriterId {
    WriterId { log, sink: "main".into(), incarnation: "first".into(), epoch, since: None }
}

/// Reads everything that was published to a topic.
pub(super) struct Reader<'a> {
    fixture: &'a Fixture,
    bus: Arc<dyn EventBus>,
    topic: Topic,
    member: Option<Member<'a>>,
}

impl Reader<'_> {
    /// Everything published since the reader was made or last asked, each partition in order.
    pub(super) async fn events(&mut self) -> Vec<Event> {
        match &mut self.member {
            Some(member) => member.drain(&self.bus).await,
            None => self.fixture.stored.as_ref().map(|stored| stored(self.topic.clone())).unwrap_or_default(),
        }
    }
}

/// A member of a group.
pub(super) struct Member<'a> {
    fixture: &'a Fixture,
    bus: Arc<dyn EventBus>,
    topic: Topic,
    pub(super) subscription: Box<dyn Subscription>,
}

impl Member<'_> {
    /// The next `count` deliveries, unsettled.
    pub(super) async fn take(&mut self, count: usize) -> Vec<Delivery> {
        let mut taken = Vec::new();
        while taken.len() < count {
            let what = format!("delivery {} of {count}", taken.len() + 1);
            let batch = self.fixture.within(&what, self.subscription.next_batch(count - taken.len())).await;
            let batch = batch.expect("the subscription delivers");
            assert!(!batch.is_empty() && batch.len() <= count - taken.len(), "a batch is 1 to max deliveries");
            taken.extend(batch);
        }
        taken
    }

    /// The next `count` events, each acked as it comes.
    pub(super) async fn read(&mut self, count: usize) -> Vec<Event> {
        let mut read = Vec::new();
        for _ in 0..count {
            let delivery = self.take(1).await.remove(0);
            read.push(delivery.event().clone());
            delivery.ack();
        }
        read
    }

    /// Everything published before this call and not delivered yet, acked: reads until a sentinel came from every
    /// partition, so nothing is waited for in vain. Not for events that were released a moment ago.
    pub(super) async fn drain(&mut self, publisher: &Arc<dyn EventBus>) -> Vec<Event> {
        self.drain_deliveries(publisher).await.into_iter().map(|(event, _)| event).collect()
    }

    /// As [`drain`](Member::drain), with each delivery's attempt.
    pub(super) async fn drain_deliveries(&mut self, publisher: &Arc<dyn EventBus>) -> Vec<(Event, u32)> {
        let count = partitions(&self.bus, &self.topic).await;
        let round = Uuid::now_v7().to_string();
        let sentinels = sentinels(&self.topic, count, &round);
        self.fixture.publish(publisher, sentinels).await;
        let mut missing = count.get();
        let mut drained = Vec::new();
        while missing > 0 {
            for delivery in self.take(1).await {
                let event = delivery.event().clone();
                let attempt = delivery.attempt();
                delivery.ack();
                if event.event_type() != SENTINEL {
                    drained.push((event, attempt));
                } else if event.subject() == Some(&round) && attempt == 1 {
                    missing -= 1;
                }
            }
        }
        drained
    }

    /// Leaves the group in order.
    pub(super) async fn close(mut self) {
        self.fixture.within("closing", self.subscription.close()).await.expect("the group is left");
    }
}

/// One event for each partition.
fn sentinels(topic: &Topic, count: NonZeroU32, round: &str) -> Vec<Event> {
    let mut keys: HashMap<u32, String> = HashMap::new();
    for n in 0.. {
        let key = format!("sentinel-{n}");
        keys.entry(partition_of_key(key.as_bytes(), count)).or_insert(key);
        if keys.len() == count.get() as usize {
            break;
        }
    }
    let sentinel = |key| Event::builder(topic.as_text(), SENTINEL).key(key).subject(round);
    keys.into_values().map(|key| sentinel(key).build().expect("a valid event")).collect()
}

/// Waits until the members own all partitions of a group as `wanted` says, by member name.
pub(super) async fn until_owned(
    fixture: &Fixture,
    bus: &Arc<dyn EventBus>,
    topic: &Topic,
    group_name: &str,
    wanted: impl Fn(&BTreeMap<String, usize>) -> bool,
) {
    let group = group(group_name);
    let owned = async || {
        let lag = bus.admin().lag(topic, &group).await.ok()?;
        let mut shares: BTreeMap<String, usize> = BTreeMap::new();
        for partition in &lag.partitions {
            *shares.entry(partition.owner.clone()?).or_default() += 1;
        }
        wanted(&shares).then_some(())
    };
    fixture.until("fair ownership", owned).await;
}

/// A request under a member's own name.
pub(super) fn named_request(topic: &Topic, group_name: &str, member: &str) -> SubscribeRequest {
    SubscribeRequest { member: member.into(), ..request(topic, group_name) }
}

/// A request that begins where a new group should.
pub(super) fn request_from(topic: &Topic, group_name: &str, from: SubscribeFrom) -> SubscribeRequest {
    SubscribeRequest { from, ..request(topic, group_name) }
}
