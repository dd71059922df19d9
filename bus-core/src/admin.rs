//! [`BusAdmin`]: topics, groups, lag and dead letters of a bus.

use std::{fmt, num::NonZeroU32, time::Duration};

use async_trait::async_trait;

use crate::{BusError, Event, Group, SubscribeFrom, Text, Topic};

/// What an operator asks of a bus. What a broker cannot do it answers with
/// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) and the reason.
#[async_trait]
pub trait BusAdmin: fmt::Debug + Send + Sync {
    /// Creates the topics and groups that do not exist yet; checks those that do, and never alters them.
    async fn apply(&self, topology: &Topology) -> Result<(), BusError>;

    /// Checks that everything in `topology` exists and agrees.
    async fn check(&self, topology: &Topology) -> Result<(), BusError>;

    /// The topics that exist, with their partitions and groups.
    async fn topics(&self) -> Result<Vec<TopicSpec>, BusError>;

    /// The groups of a topic.
    async fn groups(&self, topic: &Topic) -> Result<Vec<Group>, BusError>;

    /// How far a group is behind.
    async fn lag(&self, topic: &Topic, group: &Group) -> Result<GroupLag, BusError>;

    /// Moves a group that has no members to another place.
    async fn seek(&self, topic: &Topic, group: &Group, to: SubscribeFrom) -> Result<(), BusError>;

    /// Removes a group that has no members, and its dead letters.
    async fn remove_group(&self, topic: &Topic, group: &Group) -> Result<(), BusError>;

    /// The dead letters of a group, oldest first: at most `limit`, behind the one at `after`.
    async fn dead_letters(
        &self,
        topic: &Topic,
        group: &Group,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<StoredDeadLetter>, BusError>;

    /// Removes dead letters by their events' ids; answers how many there were.
    async fn remove_dead(&self, topic: &Topic, group: &Group, ids: &[Text]) -> Result<usize, BusError>;
}

fn _bus_admin_is_object_safe(_: &dyn BusAdmin) {}

/// Topics and groups that should exist.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// One entry per topic.
    pub topics: Vec<TopicSpec>,
}

/// A topic with its partitions and groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicSpec {
    /// Its name.
    pub topic: Topic,
    /// How many partitions it has; `None` takes what exists, or the bus's default for a new topic.
    pub partitions: Option<NonZeroU32>,
    /// The groups that read it.
    pub groups: Vec<Group>,
}

/// How far a group is behind in a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupLag {
    /// The group.
    pub group: Group,
    /// One entry per partition, ascending.
    pub partitions: Vec<PartitionLag>,
    /// Age of the oldest event that is not settled, if there is one.
    pub oldest_age: Option<Duration>,
}

impl GroupLag {
    /// Events not settled in all partitions together.
    pub fn lag(&self) -> u64 {
        self.partitions.iter().map(|partition| partition.lag).sum()
    }
}

/// How far a group is behind in one partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartitionLag {
    /// The partition, from 0.
    pub partition: u32,
    /// Events not settled, those delivered included.
    pub lag: u64,
    /// Events delivered and not settled.
    pub pending: u64,
    /// The member that reads it now.
    pub owner: Option<String>,
}

/// A dead letter as it lies in the bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredDeadLetter {
    /// Its place, to list on from.
    pub position: Text,
    /// The event with what was written on it; see [`dead_letter`](crate::dead_letter).
    pub event: Event,
}
