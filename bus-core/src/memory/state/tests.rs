//! Who holds a partition, until when, and whose settlements count.

use super::*;
use crate::{feed::RELEASE_DELAY, partition::partition_of_key};

const DRAIN: Duration = Duration::from_secs(10);
const TWO: NonZeroU32 = NonZeroU32::new(2).unwrap();

/// A topic of two partitions; the second one, which moves to a second member, has `count` events of different keys.
fn state(count: usize) -> State {
    let mut state = State::new(InMemoryConfig { partitions: TWO, ..InMemoryConfig::default() });
    (0..count).for_each(|n| publish(&mut state, n));
    state
}

/// Publishes event `n` to the second partition.
fn publish(state: &mut State, n: usize) {
    let keys = (0..).map(|n| format!("key-{n}"));
    let key = keys.filter(|key| partition_of_key(key.as_bytes(), TWO) == 1).nth(n).unwrap();
    let event = Event::builder("orders", "order.placed").id(n).key(key).build().unwrap();
    assert!(state.publish(vec![event]).is_ok());
}

fn join(state: &mut State, drain: Duration) -> Membership {
    let (orders, group) = (Topic::new("orders").unwrap(), Group::new("billing").unwrap());
    let (topic, member) = state.join(&orders, &group, SubscribeFrom::Earliest, "member".into());
    Membership { topic, group, member, window_events: 10, window_bytes: 1 << 20, drain }
}

type Taken = (HoldId, FeedItem);

fn take(state: &mut State, member: &Membership, now: Instant) -> Vec<Taken> {
    state.take(member, now, 10, 0).into_iter().map(|(hold, item, _)| (hold, item)).collect()
}

fn ids(taken: &[Taken]) -> Vec<&str> {
    taken.iter().map(|(_, item)| item.event.id()).collect()
}

fn settle(state: &mut State, (hold, item): Taken, settlement: Settlement, now: Instant) {
    let settled = Settled { token: item.position, event: item.event, attempt: item.attempt, settlement };
    state.settle(&hold, settled, now, Timestamp::now());
}

/// Catches the mutant that counts holds from 0 again in a group that was moved or removed: an ack of before would settle
/// what was delivered since.
#[test]
fn what_was_delivered_before_a_group_was_moved_settles_nothing_of_it() {
    let moves: [fn(&mut State, &Group); 2] = [
        |state, group| state.topics[0].seek(group, SubscribeFrom::Earliest).unwrap(),
        |state, group| drop(state.topics[0].groups.remove(group)),
    ];
    for moved in moves {
        let (mut state, now) = (state(1), Instant::now());
        let first = join(&mut state, DRAIN);
        let before = take(&mut state, &first, now).remove(0);
        state.leave(&first);
        moved(&mut state, &first.group);

        let second = join(&mut state, DRAIN);
        let after = take(&mut state, &second, now).remove(0);
        settle(&mut state, before, Settlement::Ack, now);
        settle(&mut state, after, Settlement::Release, now);
        assert_eq!(ids(&take(&mut state, &second, now + RELEASE_DELAY)), ["0"], "a late ack settled it");
    }
}

/// Catches the mutant that waits for what was released while its partition drains: that time passes, nothing may be
/// delivered, and the member reads in a loop until the partition has moved on.
#[test]
fn what_a_draining_partition_released_is_not_waited_for() {
    let (mut state, now) = (state(2), Instant::now());
    let first = join(&mut state, DRAIN);
    let mut taken = take(&mut state, &first, now);
    let second = join(&mut state, DRAIN);
    assert!(take(&mut state, &second, now).is_empty(), "it drains");
    settle(&mut state, taken.remove(0), Settlement::Release, now);
    let later = now + RELEASE_DELAY * 2;
    for member in [&first, &second] {
        assert!(take(&mut state, member, later).is_empty());
        assert_eq!(state.next_due(member), Some(now + DRAIN));
    }
}

/// Catches the mutant that goes on draining for a member that has left again: nothing more would be delivered, and the
/// end of the drain, once past, would be waited for in a loop.
#[test]
fn a_partition_that_stays_goes_on() {
    let (mut state, now) = (state(1), Instant::now());
    let first = join(&mut state, DRAIN);
    let in_hand = take(&mut state, &first, now).remove(0);
    let ownership = in_hand.0.ownership.clone();
    let second = join(&mut state, DRAIN);
    assert!(take(&mut state, &second, now).is_empty() && !ownership.is_owned());
    state.leave(&second);

    publish(&mut state, 1);
    assert_eq!(ids(&take(&mut state, &first, now + DRAIN)), ["1"]);
    assert_eq!(state.next_due(&first), None);
    assert!(ownership.is_owned(), "what is in hand may be settled still");
    settle(&mut state, in_hand, Settlement::Ack, now);
    assert_eq!(state.topics[0].groups[&first.group].stale, 0);
}

/// Catches the mutant that drains for as long as the member asked that comes for the partition, and the one that adds
/// any time to a clock.
#[test]
fn the_drain_of_the_owner_counts() {
    for (drain, ends) in [(DRAIN, true), (Duration::MAX, false)] {
        let (mut state, now) = (state(1), Instant::now());
        let first = join(&mut state, drain);
        assert_eq!(take(&mut state, &first, now).len(), 1);
        let second = join(&mut state, Duration::ZERO);
        assert!(take(&mut state, &second, now).is_empty());
        assert!(take(&mut state, &second, now + DRAIN / 2).is_empty(), "its owner asked for more");
        // One read takes the partition from its owner, the next takes it over.
        let taken: usize = (0..2).map(|_| take(&mut state, &second, now + DRAIN).len()).sum();
        assert_eq!(taken, usize::from(ends));
    }
}
