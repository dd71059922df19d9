//! Events that are given up, and what operators do with them.

use bus_core::{Seq, Text};

use super::{LogDatabase, all_seqs, aside, event, events, own, own_with, request, settled};
use crate::{Change, DeadState, RequestKind, RequestProgress, Selected, SetAside};

/// In one transaction the event is copied and the cursor passes it.
pub async fn set_aside_events_and_the_cursor_move_together(database: &dyn LogDatabase) {
    let (log, admin) = (database.log("main").await, database.admin().await);
    let original = event("orders", "a", 0).with_extension("tenantid", "acme").expect("valid");
    database.append(vec![original.clone(), event("orders", "b", 0)]).await;
    let seqs = all_seqs(&log).await;
    let owned = own(&log).await;
    let parked = SetAside { error: "too late".into(), attempts: 20, ..aside(seqs[0], DeadState::Parked, "attempts") };
    let change = Change { set_aside: vec![parked], durable: true, ..settled(seqs[0]) };
    log.commit(&owned.lease, &change).await.expect("the owner commits");
    let dead = admin.dead_letters(&Selected::default(), None, 10).await.expect("a list").remove(0);
    assert_eq!(dead.event.as_ref().expect("valid"), &original);
    assert_eq!((dead.seq, dead.state, dead.parked, dead.sink.as_str()), (seqs[0], DeadState::Parked, true, "main"));
    assert_eq!((dead.reason.as_str(), dead.error.as_str(), dead.attempts), ("attempts", "too late", 20));
    // The copy outlives the row.
    database.delete_row(seqs[0]).await;
    assert_eq!(admin.dead_letters(&Selected::default(), None, 10).await.expect("a list").len(), 1);
    log.commit(&owned.lease, &Change { removed: vec![seqs[0]], ..settled(seqs[0]) }).await.expect("the owner commits");
    assert!(admin.dead_letters(&Selected::default(), None, 10).await.expect("a list").is_empty());
}

/// The next owner knows which keys wait, and from which place on.
pub async fn parked_keys_are_found_by_the_next_owner(database: &dyn LogDatabase) {
    let log = database.log("main").await;
    database.append(vec![event("orders", "a", 0), event("orders", "a", 1), event("orders", "b", 0)]).await;
    let seqs = all_seqs(&log).await;
    let owned = own(&log).await;
    let set_aside = vec![
        aside(seqs[1], DeadState::Parked, "behind"),
        aside(seqs[0], DeadState::Parked, "attempts"),
        aside(seqs[2], DeadState::Dead, "attempts"),
    ];
    log.commit(&owned.lease, &Change { set_aside, ..settled(seqs[2]) }).await.expect("the owner commits");
    log.release(&owned.lease).await.expect("the owner releases");
    let parked = own(&log).await.parked;
    assert_eq!(parked.len(), 1);
    assert_eq!((&*parked[0].0.0, &parked[0].0.1, parked[0].1), ("orders", &Text::from("a"), seqs[0]));
    let audit = database.log("audit").await;
    assert!(own_with(&audit, request("two:2")).await.parked.is_empty(), "another sink's keys are its own");
}

/// By id, by reason, by key; page by page, per sink in order.
pub async fn set_aside_events_are_selected(database: &dyn LogDatabase) {
    let admin = database.admin().await;
    database.append((0..6).map(|n| event("orders", if n < 3 { "a" } else { "b" }, n)).collect()).await;
    for sink in ["main", "audit"] {
        let log = database.log(sink).await;
        let seqs = all_seqs(&log).await;
        let owned = own(&log).await;
        let reason = |at: usize| if at == 5 { "too_large" } else { "attempts" };
        let set_aside = seqs.iter().enumerate().map(|(at, seq)| aside(*seq, DeadState::Parked, reason(at))).collect();
        log.commit(&owned.lease, &Change { set_aside, ..settled(seqs[5]) }).await.expect("the owner commits");
        let of_key = Selected { key: Some(("orders".into(), "b".into())), ..Selected::default() };
        let mine = log.set_aside(&of_key, seqs[3], 10).await.expect("rows");
        assert_eq!(mine.iter().map(|row| row.seq).collect::<Vec<_>>(), [seqs[4], seqs[5]], "of this sink alone");
    }
    let count = async |selected: Selected| admin.dead_letters(&selected, None, 100).await.expect("a list").len();
    assert_eq!(count(Selected::default()).await, 12);
    assert_eq!(count(Selected { reason: Some("too_large".into()), ..Selected::default() }).await, 2);
    assert_eq!(
        count(Selected { ids: Some(vec!["a-1".into(), "b-4".into(), "x".into()]), ..Selected::default() }).await,
        4
    );
    assert_eq!(count(Selected { ids: Some(vec![]), ..Selected::default() }).await, 0);
    let (mut listed, mut after) = (Vec::new(), None::<(String, Seq)>);
    loop {
        let from = after.as_ref().map(|(sink, seq)| (sink.as_str(), *seq));
        let page = admin.dead_letters(&Selected::default(), from, 5).await.expect("a page");
        let Some(last) = page.last() else { break };
        after = Some((last.sink.clone(), last.seq));
        listed.extend(page);
    }
    assert_eq!(listed.len(), 12);
    assert!(listed.is_sorted_by_key(|row| (row.sink.clone(), row.seq)));
}

/// A request is seen by the owner of its sink until it has ended; its events are marked meanwhile.
pub async fn requests_reach_the_owner_and_report_back(database: &dyn LogDatabase) {
    let (log, admin) = (database.log("main").await, database.admin().await);
    database.append(events(2)).await;
    let seqs = all_seqs(&log).await;
    let owned = own(&log).await;
    let set_aside = seqs.iter().map(|seq| aside(*seq, DeadState::Dead, "attempts")).collect();
    log.commit(&owned.lease, &Change { set_aside, ..settled(seqs[1]) }).await.expect("the owner commits");
    assert!(log.requests().await.expect("requests").is_empty());
    let one = Selected { ids: Some(vec!["key-1".into()]), ..Selected::default() };
    let id = admin.ask("main", RequestKind::Retry, &one, Some(7)).await.expect("it is asked");
    admin.ask("audit", RequestKind::Discard, &Selected::default(), None).await.expect("it is asked");
    let requests = log.requests().await.expect("requests");
    assert_eq!(
        (requests.len(), requests[0].id, requests[0].kind, requests[0].rate),
        (1, id, RequestKind::Retry, Some(7))
    );
    let states = async || -> Vec<DeadState> {
        let rows = admin.dead_letters(&Selected::default(), None, 10).await.expect("a list");
        rows.iter().map(|row| row.state).collect()
    };
    assert_eq!(states().await, [DeadState::Dead, DeadState::Retrying]);
    let selected = log.set_aside(&requests[0].selected, Seq::ZERO, 10).await.expect("rows");
    assert_eq!(selected.iter().map(|row| row.seq).collect::<Vec<_>>(), [seqs[1]]);
    let progress = RequestProgress { id, done: 1, failed: 0, ended: false };
    let change = Change { removed: vec![seqs[1]], requests: vec![progress.clone()], ..settled(seqs[1]) };
    log.commit(&owned.lease, &change).await.expect("the owner commits");
    assert_eq!(admin.progress(id).await.expect("progress"), Some(progress.clone()));
    let ended = RequestProgress { ended: true, ..progress };
    log.commit(&owned.lease, &Change { requests: vec![ended.clone()], ..settled(seqs[1]) }).await.expect("committed");
    assert_eq!(admin.progress(id).await.expect("progress"), Some(ended));
    assert!(log.requests().await.expect("requests").is_empty());
    assert_eq!(admin.progress(id + 100).await.expect("progress"), None);
}

/// A retry in vain: the event waits again as it did, with the new error and one more attempt.
pub async fn what_is_refused_again_waits_again(database: &dyn LogDatabase) {
    let (log, admin) = (database.log("main").await, database.admin().await);
    database.append(events(2)).await;
    let seqs = all_seqs(&log).await;
    let owned = own(&log).await;
    let set_aside = vec![aside(seqs[0], DeadState::Parked, "attempts"), aside(seqs[1], DeadState::Dead, "attempts")];
    log.commit(&owned.lease, &Change { set_aside, ..settled(seqs[1]) }).await.expect("the owner commits");
    let id = admin.ask("main", RequestKind::Retry, &Selected::default(), None).await.expect("it is asked");
    let refused = SetAside { error: "still no".into(), attempts: 1, ..aside(seqs[0], DeadState::Retrying, "refused") };
    let ended = RequestProgress { id, done: 0, failed: 1, ended: true };
    let change = Change { refused: vec![refused], requests: vec![ended], ..settled(seqs[1]) };
    log.commit(&owned.lease, &change).await.expect("the owner commits");
    let rows = admin.dead_letters(&Selected::default(), None, 10).await.expect("a list");
    assert_eq!((rows[0].state, rows[0].reason.as_str(), rows[0].attempts), (DeadState::Parked, "refused", 4));
    assert_eq!(rows[0].error, "still no");
    assert_eq!(rows[1].state, DeadState::Dead, "what was not tried waits again too");
}

/// Where no relay runs, an operator discards at once; where one does, it is asked.
pub async fn without_an_owner_events_are_discarded_at_once(database: &dyn LogDatabase) {
    let (log, admin) = (database.log("main").await, database.admin().await);
    database.append(events(3)).await;
    let seqs = all_seqs(&log).await;
    let owned = own(&log).await;
    let set_aside = seqs.iter().map(|seq| aside(*seq, DeadState::Parked, "attempts")).collect();
    log.commit(&owned.lease, &Change { set_aside, ..settled(seqs[2]) }).await.expect("the owner commits");
    let one = Selected { ids: Some(vec!["key-0".into()]), ..Selected::default() };
    assert_eq!(admin.discard_unowned("main", &one).await.expect("an answer"), None, "its owner must do it");
    log.release(&owned.lease).await.expect("the owner releases");
    assert_eq!(admin.discard_unowned("main", &one).await.expect("an answer"), Some(1));
    assert_eq!(admin.dead_letters(&Selected::default(), None, 10).await.expect("a list").len(), 2);
    let late = log.commit(&owned.lease, &settled(seqs[2])).await.expect_err("the former owner is fenced");
    assert_eq!(late.kind(), crate::LogErrorKind::Fenced);
}
