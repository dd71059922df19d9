//! [`Subscription`]: a member's live view of a consumer group.

use std::{fmt, time::Duration};

use async_trait::async_trait;

use crate::{BusError, Delivery, Group, Text, Topic};

/// Which group to join, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubscribeRequest {
    /// The topic to read.
    pub topic: Topic,
    /// The group to join; it is created where it does not exist.
    pub group: Group,
    /// Where a group begins that is created now. An existing one goes on where it stands.
    pub from: SubscribeFrom,
    /// What the member is called in lag and logs. Default: host and process id.
    pub member: Text,
    /// Most events in this process per partition, settled ones not counted. Default 1,024.
    pub window_events: usize,
    /// Most bytes in this process per partition; one event always fits. Default 8 MiB.
    pub window_bytes: usize,
    /// How long a partition that should move on waits for its unsettled deliveries. Default 10 s.
    pub drain: Duration,
}

/// Where a new group begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SubscribeFrom {
    /// With the oldest event the bus still has.
    #[default]
    Earliest,
    /// With what is published from now on.
    Latest,
}

impl SubscribeRequest {
    /// A request with the defaults of the fields above.
    pub fn new(topic: Topic, group: Group) -> Self {
        Self {
            topic,
            group,
            from: SubscribeFrom::default(),
            member: format!("{}:{}", host_name(), std::process::id()).into(),
            window_events: 1_024,
            window_bytes: 8 << 20,
            drain: Duration::from_secs(10),
        }
    }
}

/// The host's name, for people: in owners, members and logs. Nothing is decided by it.
pub fn host_name() -> String {
    let from_kernel = || std::fs::read_to_string("/proc/sys/kernel/hostname").ok().map(|name| name.trim().to_owned());
    from_kernel()
        .or_else(|| std::env::var("HOSTNAME").ok())
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "localhost".to_owned())
}

/// A member of a consumer group: receives the events of the partitions it owns.
///
/// Members share the partitions fairly: with N members and P partitions each owns P / N of them, and P mod N members
/// one more. A partition has one owner at a time. Dropping the subscription leaves the group at once, as a crash would;
/// [`close`](Subscription::close) leaves it in order.
#[async_trait]
pub trait Subscription: fmt::Debug + Send {
    /// Waits for at least one delivery and answers at most `max`.
    ///
    /// # Ordering
    ///
    /// Within a key in the order of publishing. A delivery that was released comes again before any event of its key
    /// that was not delivered yet.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Closed`](crate::ErrorKind::Closed) ends the subscription. A retryable error may pass: call again,
    /// after a pause. What was delivered stays valid.
    ///
    /// # Cancel safety
    ///
    /// A dropped call loses no delivery.
    async fn next_batch(&mut self, max: usize) -> Result<Vec<Delivery>, BusError>;

    /// Makes durable that the handler is about to be called for `delivery`, so that the attempt counts even if the
    /// process dies in it. For deliveries that are [suspect](Delivery::suspect).
    async fn record_attempt(&mut self, delivery: &Delivery) -> Result<(), BusError>;

    /// Leaves the group in order: flushes what was settled, gives the partitions up. What is unsettled goes to their
    /// next owners. Closing twice is fine.
    async fn close(&mut self) -> Result<(), BusError>;
}

fn _subscription_is_object_safe(_: &dyn Subscription) {}
