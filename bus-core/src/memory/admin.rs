//! Topics, groups, lag and dead letters of the in-memory bus.

use std::time::Duration;

use async_trait::async_trait;

use super::InMemoryBus;
use crate::{
    BusAdmin, BusError, ErrorKind, Group, GroupLag, PartitionLag, StoredDeadLetter, SubscribeFrom, Text, Timestamp,
    Topic, TopicSpec, Topology,
};

#[async_trait]
impl BusAdmin for InMemoryBus {
    async fn apply(&self, topology: &Topology) -> Result<(), BusError> {
        let mut state = self.shared.lock();
        for spec in &topology.topics {
            let at = state.topic(&spec.topic, spec.partitions);
            check_partitions(spec, state.topics()[at].partition_count().get())?;
            let topic = state.find(&spec.topic)?;
            for group in &spec.groups {
                topic.group_or_create(group, SubscribeFrom::Earliest);
            }
        }
        Ok(())
    }

    async fn check(&self, topology: &Topology) -> Result<(), BusError> {
        let mut state = self.shared.lock();
        for spec in &topology.topics {
            let topic = state.find(&spec.topic)?;
            check_partitions(spec, topic.partition_count().get())?;
            for group in &spec.groups {
                topic.group(group)?;
            }
        }
        Ok(())
    }

    async fn topics(&self) -> Result<Vec<TopicSpec>, BusError> {
        let state = self.shared.lock();
        let spec = |topic: &super::state::TopicState| TopicSpec {
            topic: topic.topic.clone(),
            partitions: Some(topic.partition_count()),
            groups: topic.groups.keys().cloned().collect(),
        };
        let mut topics: Vec<TopicSpec> = state.topics().iter().map(spec).collect();
        topics.sort_by(|one, other| one.topic.cmp(&other.topic));
        Ok(topics)
    }

    async fn groups(&self, topic: &Topic) -> Result<Vec<Group>, BusError> {
        Ok(self.shared.lock().find(topic)?.groups.keys().cloned().collect())
    }

    async fn lag(&self, topic: &Topic, group: &Group) -> Result<GroupLag, BusError> {
        let mut state = self.shared.lock();
        let topic = state.find(topic)?;
        topic.group(group)?;
        let members = &topic.groups[group];
        let mut oldest: Option<Timestamp> = None;
        let mut partitions = Vec::new();
        for partition in 0..topic.partition_count().get() {
            let (lag, pending, event, owner) = topic.lag(members, partition);
            oldest = oldest.into_iter().chain(event.map(|event| event.time())).min();
            partitions.push(PartitionLag { partition, lag, pending, owner: owner.map(ToString::to_string) });
        }
        let age = |time: Timestamp| Timestamp::now().unix_micros().saturating_sub(time.unix_micros()).max(0);
        let oldest_age = oldest.map(|time| Duration::from_micros(age(time).unsigned_abs()));
        Ok(GroupLag { group: group.clone(), partitions, oldest_age })
    }

    async fn seek(&self, topic: &Topic, group: &Group, to: SubscribeFrom) -> Result<(), BusError> {
        self.shared.lock().find(topic)?.seek(group, to)
    }

    async fn remove_group(&self, topic: &Topic, group: &Group) -> Result<(), BusError> {
        let mut state = self.shared.lock();
        let topic = state.find(topic)?;
        topic.without_members(group)?;
        topic.groups.remove(group);
        drop(state);
        self.shared.room.notify_waiters();
        Ok(())
    }

    async fn dead_letters(
        &self,
        topic: &Topic,
        group: &Group,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<StoredDeadLetter>, BusError> {
        let not_ours = || BusError::new(ErrorKind::Invalid, "`after` is no position of a dead letter");
        let after = after.map(|text| text.parse().map_err(|_| not_ours())).transpose()?;
        Ok(self.shared.lock().find(topic)?.group(group)?.dead_letters(after, limit))
    }

    async fn remove_dead(&self, topic: &Topic, group: &Group, ids: &[Text]) -> Result<usize, BusError> {
        Ok(self.shared.lock().find(topic)?.group(group)?.remove_dead(ids))
    }
}

fn check_partitions(spec: &TopicSpec, existing: u32) -> Result<(), BusError> {
    match spec.partitions.map(std::num::NonZeroU32::get) {
        Some(wanted) if wanted != existing => {
            let topic = &spec.topic;
            let message =
                format!("topic `{topic}` has {existing} partitions, configuration says {wanted}: make them agree");
            Err(BusError::new(ErrorKind::Invalid, message))
        }
        _ => Ok(()),
    }
}
