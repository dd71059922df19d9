//! Lease, epoch, checkpoint, history.

use std::time::Duration;

use bus_core::{Position, Seq, SeqSet};

use super::{LogDatabase, all_seqs, event, events, own, own_with, request, settled};
use crate::{Acquire, Acquisition, Blocked, Change, LogErrorKind};

/// While one owns the log the other is told who; when it is given back the other has it at once, with a higher epoch.
pub async fn one_owner_at_a_time(database: &dyn LogDatabase) {
    let (first, second) = (database.log("main").await, database.log("main").await);
    let owned = own(&first).await;
    match second.acquire(&request("two:2")).await.expect("the log answers") {
        Acquisition::Standby { owner, remaining } => {
            assert_eq!(owner, "one:1");
            assert!(remaining <= Duration::from_secs(30) && remaining > Duration::from_secs(20), "{remaining:?}");
        }
        owned => panic!("two owners: {owned:?}"),
    }
    let other_sink = database.log("audit").await;
    own_with(&other_sink, request("two:2")).await;
    first.release(&owned.lease).await.expect("the lease is given back");
    let next = own_with(&second, request("two:2")).await;
    assert!(next.lease.epoch > owned.lease.epoch);
    assert_eq!(next.log_id, owned.log_id);
    assert_eq!(next.incarnation, owned.incarnation, "the same history");
}

/// A lease ends by itself, and not while commits extend it.
pub async fn a_lease_ends_and_commits_extend_it(database: &dyn LogDatabase) {
    let (first, second) = (database.log("main").await, database.log("main").await);
    let ttl = Duration::from_millis(600);
    let owned = own_with(&first, Acquire { ttl, ..request("one:1") }).await;
    for _ in 0..6 {
        tokio::time::sleep(ttl / 4).await;
        first.commit(&owned.lease, &settled(Seq::ZERO)).await.expect("the owner commits");
        let answer = second.acquire(&request("two:2")).await.expect("the log answers");
        assert!(matches!(answer, Acquisition::Standby { .. }), "the lease was extended");
    }
    let waiting = async {
        while matches!(second.acquire(&request("two:2")).await, Ok(Acquisition::Standby { .. })) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), waiting).await.expect("the lease ends");
}

/// Whoever was an owner once moves neither cursor nor set-aside events: the answer is `Fenced`.
pub async fn a_stale_epoch_moves_nothing(database: &dyn LogDatabase) {
    let (zombie, log) = (database.log("main").await, database.log("main").await);
    database.append(events(3)).await;
    let old = own_with(&zombie, Acquire { ttl: Duration::from_millis(1), ..request("one:1") }).await;
    tokio::time::sleep(Duration::from_millis(30)).await;
    let new = own_with(&log, request("two:2")).await;
    let last = all_seqs(&log).await[2];
    let change = Change { set_aside: vec![super::aside(last, crate::DeadState::Dead, "attempts")], ..settled(last) };
    let refused = zombie.commit(&old.lease, &change).await.expect_err("its epoch is over");
    assert_eq!(refused.kind(), LogErrorKind::Fenced);
    zombie.release(&old.lease).await.expect("releasing what is not ours changes nothing");
    let dead = database.admin().await.dead_letters(&crate::Selected::default(), None, 10).await.expect("a list");
    assert!(dead.is_empty(), "a stale owner set something aside");
    let still = log.acquire(&request("three:3")).await.expect("the log answers");
    assert!(matches!(still, Acquisition::Standby { owner, .. } if owner == "two:2"));
    log.release(&new.lease).await.expect("the owner releases");
    assert_eq!(own(&log).await.low, Seq::ZERO, "a stale owner moved the cursor");
}

/// What an owner checkpoints the next one finds.
pub async fn a_checkpoint_comes_back(database: &dyn LogDatabase) {
    let log = database.log("main").await;
    database.append(events(10)).await;
    let seqs = all_seqs(&log).await;
    let owned = own(&log).await;
    assert_eq!((owned.low, owned.high, owned.holes, owned.position), (Seq::ZERO, Seq::ZERO, SeqSet::new(), None));
    let holes: SeqSet = [seqs[4], seqs[5], seqs[8]].into_iter().collect();
    let position = Position(serde_json::json!({"partition": [1, 2]}));
    let change = Change {
        low: seqs[3],
        high: seqs[9],
        high_id: Some("key-9".into()),
        holes: holes.clone(),
        position: position.clone(),
        blocked: Blocked { keys: 2, topics: vec!["orders".into()] },
        ..Change::default()
    };
    log.commit(&owned.lease, &change).await.expect("the owner commits");
    log.release(&owned.lease).await.expect("the owner releases");
    let next = own_with(&log, Acquire { bus: "redis".into(), ..request("two:2") }).await;
    assert_eq!((next.low, next.high, next.holes, next.position), (seqs[3], seqs[9], holes, Some(position)));
    assert_eq!(next.incarnation, owned.incarnation);
    assert_eq!(next.previous_bus.as_deref(), Some("memory"));
    let status = database.admin().await.status().await.expect("a status").remove(0);
    assert_eq!((status.blocked.keys, status.blocked.topics.len()), (2, 1));
}

/// Beyond a thousand ranges neighbours are joined: a hole too many is a duplicate, one too few a loss.
pub async fn many_holes_are_joined_and_none_is_forgotten(database: &dyn LogDatabase) {
    let log = database.log("main").await;
    let owned = own(&log).await;
    let holes: SeqSet = (1..=5_000).map(|n| Seq(n * 3)).collect();
    database.append(events(15_001)).await;
    let change = Change { high: Seq(15_001), holes: holes.clone(), ..Change::default() };
    log.commit(&owned.lease, &change).await.expect("the owner commits");
    log.release(&owned.lease).await.expect("the owner releases");
    let found = own(&log).await.holes;
    assert!(found.ranges().len() <= crate::HOLE_RANGES_MAX, "{} ranges", found.ranges().len());
    assert!(holes.iter().all(|seq| found.contains(seq)), "a hole is forgotten");
}

/// An owner whom the broker fenced takes an epoch above the broker's; one whom it remembers from another history begins
/// a new one.
pub async fn an_owner_can_ask_for_a_higher_epoch_and_another_history(database: &dyn LogDatabase) {
    let log = database.log("main").await;
    let first = own(&log).await;
    log.release(&first.lease).await.expect("the owner releases");
    let second = own_with(&log, Acquire { epoch_min: 40, ..request("one:1") }).await;
    assert_eq!((second.lease.epoch, &second.incarnation), (40, &first.incarnation));
    log.release(&second.lease).await.expect("the owner releases");
    let third = own_with(&log, Acquire { new_incarnation: true, ..request("one:1") }).await;
    assert_eq!(third.lease.epoch, 41);
    assert_ne!(third.incarnation, first.incarnation);
}

/// The event at the cursor's highest place is another one than the cursor saw: the places mean other events now, and
/// nobody knows since when. What is there is published, though some of it may have been before.
pub async fn a_restored_log_is_another_history(database: &dyn LogDatabase) {
    let log = database.log("main").await;
    database.append(vec![event("orders", "a", 0), event("orders", "a", 1)]).await;
    let last = all_seqs(&log).await[1];
    let first = own(&log).await;
    let change = Change { high_id: Some("a-1".into()), ..settled(last) };
    log.commit(&first.lease, &change).await.expect("the owner commits");
    log.release(&first.lease).await.expect("the owner releases");
    let same = own(&log).await;
    assert_eq!(same.incarnation, first.incarnation);
    log.release(&same.lease).await.expect("the owner releases");
    database.replace_event(last).await;
    let other = own(&log).await;
    assert_ne!(other.incarnation, first.incarnation, "what the broker remembers would be believed");
    assert_eq!((other.low, other.high), (Seq::ZERO, Seq::ZERO), "what stands there now would be skipped");
    log.release(&other.lease).await.expect("the owner releases");
    assert_eq!(own(&log).await.incarnation, other.incarnation, "and it is so once");
}

/// Where the id at the highest place is not known, as at a row that is no event, that of an earlier place says nothing.
pub async fn a_row_without_a_known_id_is_no_other_history(database: &dyn LogDatabase) {
    let log = database.log("main").await;
    database.append(vec![event("orders", "a", 0)]).await;
    let first = own(&log).await;
    let last = all_seqs(&log).await[0];
    let change = Change { high_id: Some("a-0".into()), ..settled(last) };
    log.commit(&first.lease, &change).await.expect("the owner commits");
    database.insert_invalid("orders", "b").await;
    let last = all_seqs(&log).await[1];
    log.commit(&first.lease, &settled(last)).await.expect("the owner commits");
    log.release(&first.lease).await.expect("the owner releases");
    assert_eq!(own(&log).await.incarnation, first.incarnation);
}
