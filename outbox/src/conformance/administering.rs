//! Retention, sinks, status.

use std::time::Duration;

use bus_core::{Seq, SeqSet};

use super::{LogDatabase, all_seqs, aside, event, events, own, own_with, request, settle_all, settled};
use crate::{Acquire, Change, DeadState, LogErrorKind, Start};

const AT_ONCE: Duration = Duration::ZERO;

/// With two sinks, the slower one decides.
pub async fn nothing_is_removed_before_every_sink_settled_it(database: &dyn LogDatabase) {
    let (main, audit) = (database.log("main").await, database.log("audit").await);
    database.append(events(10)).await;
    let pruned = main.prune("one:1", AT_ONCE, 100).await.expect("the janitor works");
    assert_eq!(pruned.rows, 0, "no sink is registered: nobody has taken anything");
    let seqs = all_seqs(&main).await;
    let (fast, slow) = (own(&main).await, own(&audit).await);
    settle_all(&main, &fast.lease).await;
    assert_eq!(main.prune("one:1", AT_ONCE, 100).await.expect("the janitor works").rows, 0, "audit took nothing");
    audit.commit(&slow.lease, &settled(seqs[3])).await.expect("the owner commits");
    assert_eq!(main.prune("one:1", AT_ONCE, 100).await.expect("the janitor works").rows, 4);
    assert_eq!(all_seqs(&main).await, seqs[4..]);
    let holes: SeqSet = [seqs[5]].into_iter().collect();
    let change = Change { low: seqs[4], high: seqs[9], holes, ..Change::default() };
    audit.commit(&slow.lease, &change).await.expect("the owner commits");
    main.prune("one:1", AT_ONCE, 100).await.expect("the janitor works");
    assert_eq!(all_seqs(&main).await, seqs[5..], "a hole keeps what is above it");
    settle_all(&audit, &slow.lease).await;
    let bite = main.prune("one:1", AT_ONCE, 3).await.expect("the janitor works");
    assert_eq!((bite.rows, bite.more), (3, true), "a bite at a time");
    let rest = main.prune("one:1", AT_ONCE, 100).await.expect("the janitor works");
    assert_eq!((rest.rows, rest.more), (2, false));
}

/// Rows stay for the retention time after all sinks settled them.
pub async fn retention_counts_from_when_all_had_settled(database: &dyn LogDatabase) {
    let log = database.log("main").await;
    database.append(events(3)).await;
    let owned = own(&log).await;
    settle_all(&log, &owned.lease).await;
    let retention = Duration::from_secs(3);
    assert_eq!(log.prune("one:1", retention, 100).await.expect("the janitor works").rows, 0);
    assert_eq!(log.prune("one:1", retention, 100).await.expect("the janitor works").rows, 0);
    assert_eq!(all_seqs(&log).await.len(), 3);
    let waiting = async {
        while log.prune("one:1", retention, 100).await.expect("the janitor works").rows == 0 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), waiting).await.expect("they go in the end");
    assert!(all_seqs(&log).await.is_empty());
}

/// A topic that no sink takes is nobody's to remove, and status counts it.
pub async fn an_event_that_no_sink_wants_stays(database: &dyn LogDatabase) {
    let log = database.log("main").await;
    let topics = ["orders", "orders.eu", "billing"];
    database.append(topics.iter().map(|topic| event(topic, "a", 0)).collect()).await;
    let patterns = vec!["orders".parse().expect("a pattern"), "orders.*".parse().expect("a pattern")];
    let owned = own_with(&log, Acquire { topics: patterns, ..request("one:1") }).await;
    settle_all(&log, &owned.lease).await;
    assert_eq!(log.prune("one:1", AT_ONCE, 100).await.expect("the janitor works").rows, 2);
    assert_eq!(all_seqs(&log).await.len(), 1);
    let status = database.admin().await.status().await.expect("a status").remove(0);
    assert_eq!((status.unclaimed, status.backlog), (1, 0));
}

/// A sink that is registered when others are gone has settled nothing, whatever those had settled long ago.
pub async fn what_was_settled_before_a_sink_came_is_not_settled_for_it(database: &dyn LogDatabase) {
    let (log, admin) = (database.log("main").await, database.admin().await);
    database.append(events(10)).await;
    let owned = own(&log).await;
    settle_all(&log, &owned.lease).await;
    let retention = Duration::from_millis(100);
    assert_eq!(log.prune("one:1", retention, 100).await.expect("the janitor works").rows, 0);
    log.release(&owned.lease).await.expect("the owner releases");
    admin.remove_sink("main").await.expect("nobody owns it");
    tokio::time::sleep(retention * 2).await;
    assert_eq!(own(&log).await.low, Seq::ZERO);
    assert_eq!(log.prune("one:1", retention, 100).await.expect("the janitor works").rows, 0);
    assert_eq!(all_seqs(&log).await.len(), 10, "rows are gone that the only sink has not settled");
}

/// While one janitor is at work the others leave it alone.
pub async fn one_janitor_at_a_time(database: &dyn LogDatabase) {
    let log = database.log("main").await;
    database.append(events(2)).await;
    let owned = own(&log).await;
    let last = settle_all(&log, &owned.lease).await;
    assert_eq!(log.prune("one:1", AT_ONCE, 1).await.expect("the janitor works").rows, 1);
    assert_eq!(log.prune("two:2", AT_ONCE, 1).await.expect("an answer").rows, 0, "another one is at work");
    assert_eq!(log.prune("one:1", AT_ONCE, 1).await.expect("the janitor works").rows, 1);
    assert_eq!(log.last_seq().await.expect("a place").max(last), last);
}

/// `earliest` begins with what no other sink has settled, `latest` behind everything.
pub async fn a_new_sink_begins_where_it_should(database: &dyn LogDatabase) {
    let main = database.log("main").await;
    database.append(events(5)).await;
    let seqs = all_seqs(&main).await;
    let first = own(&main).await;
    assert_eq!(first.low, Seq::ZERO, "the first one takes everything");
    main.commit(&first.lease, &settled(seqs[2])).await.expect("the owner commits");
    let earliest = own(&database.log("earliest").await).await;
    assert_eq!((earliest.low, earliest.high), (seqs[2], seqs[2]));
    let request = Acquire { start: Start::Latest, ..request("one:1") };
    let latest = own_with(&database.log("latest").await, request).await;
    assert!(latest.low >= seqs[4]);
    database.append(events(1)).await;
    assert!(main.last_seq().await.expect("a place") > latest.high, "what follows is above it");
}

/// Events that no sink wanted stay, so a new one that wants them begins with them.
pub async fn a_new_sink_begins_with_what_nobody_wanted(database: &dyn LogDatabase) {
    let (log, topic) = (database.log("main").await, |topic: &str| vec![topic.parse().expect("a pattern")]);
    database.append(["orders", "payments", "orders", "payments"].map(|topic| event(topic, "a", 0)).into()).await;
    let seqs = all_seqs(&log).await;
    let owned = own_with(&log, Acquire { topics: topic("orders"), ..request("one:1") }).await;
    settle_all(&log, &owned.lease).await;
    let second =
        own_with(&database.log("second").await, Acquire { topics: topic("payments"), ..request("two:2") }).await;
    assert_eq!(second.low, seqs[0], "the first payment is behind it");
    log.prune("one:1", AT_ONCE, 100).await.expect("the janitor works");
    assert!(all_seqs(&log).await.contains(&seqs[1]), "nobody has published it");
}

/// A sink that takes more topics than before gets what no sink wanted until then, and nothing of what it had settled.
pub async fn a_sink_that_takes_more_topics_gets_what_nobody_wanted(database: &dyn LogDatabase) {
    let (log, orders) = (database.log("main").await, vec!["orders".parse().expect("a pattern")]);
    database.append(["orders", "payments", "orders", "payments"].map(|topic| event(topic, "a", 0)).into()).await;
    let seqs = all_seqs(&log).await;
    let owned = own_with(&log, Acquire { topics: orders, ..request("one:1") }).await;
    let last = settle_all(&log, &owned.lease).await;
    log.release(&owned.lease).await.expect("the owner releases");
    for _ in 0..2 {
        let wider = own(&log).await;
        let unsettled: SeqSet = [seqs[1], seqs[3]].into_iter().collect();
        assert_eq!((wider.low, wider.high, wider.holes), (seqs[0], last, unsettled));
        log.release(&wider.lease).await.expect("the owner releases");
    }
    assert_eq!(log.prune("one:1", AT_ONCE, 100).await.expect("the janitor works").rows, 1);
}

/// Backlog, holes, owner, set-aside events: as they are, and a log without sinks is listed too.
pub async fn status_counts(database: &dyn LogDatabase) {
    let (log, admin) = (database.log("main").await, database.admin().await);
    database.append(events(10)).await;
    let unread = admin.status().await.expect("a status").remove(0);
    assert_eq!((unread.sink, unread.backlog, unread.unclaimed, unread.owner), (None, 10, 10, None));
    assert!(unread.oldest_age.is_some());
    let seqs = all_seqs(&log).await;
    let owned = own(&log).await;
    let change = Change {
        low: seqs[1],
        high: seqs[6],
        holes: [seqs[2], seqs[5]].into_iter().collect(),
        set_aside: vec![aside(seqs[3], DeadState::Parked, "attempts"), aside(seqs[4], DeadState::Dead, "attempts")],
        ..Change::default()
    };
    log.commit(&owned.lease, &change).await.expect("the owner commits");
    let status = admin.status().await.expect("a status").remove(0);
    assert_eq!((status.log.as_str(), status.sink.as_deref()), ("outbox", Some("main")));
    assert_eq!((status.backlog, status.backlog_exact, status.holes), (5, true, 2));
    assert_eq!((status.low, status.high, status.parked, status.dead), (seqs[1], seqs[6], 1, 1));
    assert_eq!((status.owner.as_deref(), status.epoch, status.unclaimed), (Some("one:1"), owned.lease.epoch, 0));
    assert!(status.lease_remaining.is_some_and(|left| left > Duration::from_secs(20)));
    settle_all(&log, &owned.lease).await;
    log.release(&owned.lease).await.expect("the owner releases");
    let done = admin.status().await.expect("a status").remove(0);
    assert_eq!((done.backlog, done.oldest_age, done.owner, done.lease_remaining), (0, None, None, None));
}

/// Removing a sink forgets it and what it set aside, but not while a relay owns it.
pub async fn a_sink_that_is_owned_cannot_be_removed(database: &dyn LogDatabase) {
    let (log, admin) = (database.log("main").await, database.admin().await);
    database.append(events(1)).await;
    let owned = own(&log).await;
    let seq = all_seqs(&log).await[0];
    let change = Change { set_aside: vec![aside(seq, DeadState::Dead, "attempts")], ..settled(seq) };
    log.commit(&owned.lease, &change).await.expect("the owner commits");
    assert_eq!(admin.sinks().await.expect("sinks")[0].sink, "main");
    assert_eq!(admin.remove_sink("main").await.expect_err("it is owned").kind(), LogErrorKind::Invalid);
    assert_eq!(admin.remove_sink("other").await.expect_err("there is none").kind(), LogErrorKind::Invalid);
    log.release(&owned.lease).await.expect("the owner releases");
    admin.remove_sink("main").await.expect("nobody owns it");
    assert!(admin.sinks().await.expect("sinks").is_empty());
    assert!(admin.dead_letters(&crate::Selected::default(), None, 10).await.expect("a list").is_empty());
    assert_eq!(own(&log).await.low, Seq::ZERO, "it begins anew");
}

/// An owner that slept while its sink was removed and registered again moves nothing: epochs never begin anew.
pub async fn a_sink_that_comes_back_fences_those_before_it(database: &dyn LogDatabase) {
    let (log, again) = (database.log("main").await, database.log("main").await);
    database.append(events(10)).await;
    let asleep = own(&log).await;
    log.release(&asleep.lease).await.expect("the owner releases");
    database.admin().await.remove_sink("main").await.expect("nobody owns it");
    let owned = own(&again).await;
    let error = log.commit(&asleep.lease, &settled(Seq(10))).await.expect_err("its epoch is over");
    assert_eq!(error.kind(), LogErrorKind::Fenced);
    again.release(&owned.lease).await.expect("the owner releases");
    assert_eq!(own(&again).await.low, Seq::ZERO, "a stale owner moved the cursor");
}
