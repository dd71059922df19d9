//! Fetching, reading, probing.

use std::time::Duration;

use bus_core::{Event, Seq, SeqSet, Timestamp};

use super::{LogDatabase, all_seqs, event, events};
use crate::PageLimit;

const ALL: PageLimit = PageLimit { events: 10_000, bytes: 1 << 30 };

/// Pages are ascending and complete, stop at either limit, and hold at least one row.
pub async fn rows_are_fetched_in_order_within_the_limits(database: &dyn LogDatabase) {
    let log = database.log("main").await;
    assert!(log.fetch(Seq::ZERO, ALL).await.expect("a page").rows.is_empty());
    assert_eq!(log.last_seq().await.expect("a place"), Seq::ZERO);
    database.append(events(30)).await;
    database.append(events(30)).await;
    let page = log.fetch(Seq::ZERO, PageLimit { events: 50, ..ALL }).await.expect("a page");
    assert_eq!(page.rows.len(), 50);
    assert!(page.rows.is_sorted_by_key(|row| row.seq));
    let ids: Vec<_> = page.rows.iter().map(|row| row.event.as_ref().expect("valid").id().to_owned()).collect();
    let expected: Vec<_> = (0..30).chain(0..20).map(|n| format!("key-{n}")).collect();
    assert_eq!(ids, expected);
    let rest = log.fetch(page.rows[49].seq, ALL).await.expect("a page");
    assert_eq!(rest.rows.len(), 10);
    assert_eq!(log.last_seq().await.expect("a place"), rest.rows[9].seq);
    let narrow = log.fetch(Seq::ZERO, PageLimit { events: 50, bytes: 1 }).await.expect("a page");
    assert_eq!(narrow.rows.len(), 1, "one row is always read");
    let wide = log.fetch(Seq::ZERO, PageLimit { events: 50, bytes: 1_000 }).await.expect("a page");
    assert!((2..20).contains(&wide.rows.len()), "{} rows of 1,000 bytes", wide.rows.len());
}

/// A transaction that is rolled back leaves nothing to be published.
pub async fn what_is_rolled_back_is_never_seen(database: &dyn LogDatabase) {
    let log = database.log("main").await;
    database.append(vec![event("orders", "a", 0)]).await;
    database.append_and_roll_back(events(5)).await;
    database.append(vec![event("orders", "a", 1)]).await;
    let page = log.fetch(Seq::ZERO, ALL).await.expect("a page");
    let ids: Vec<_> = page.rows.iter().map(|row| row.event.as_ref().expect("valid").id().to_owned()).collect();
    assert_eq!(ids, ["a-0", "a-1"]);
}

/// Every attribute and every byte comes out of the table as it went in.
pub async fn every_attribute_survives_the_table(database: &dyn LogDatabase) {
    let full = |n: u32| Event::builder("orders.eu", "order.placed").id(format!("id-{n}"));
    let builders = [
        full(0),
        full(1).key("kéy/漢 \u{1f600}").subject("order/7").source("https://shop.example/a?b=c#d"),
        full(2).data(r#"{"total": 5.00, "name": "é"}"#),
        full(3).content_type("application/octet-stream").data((0..=255u8).collect::<Vec<u8>>()),
        full(4).time(Timestamp::from_unix_micros(1)).extension("traceparent", "00-ab").extension("tenantid", "a\"'é"),
        full(5).time("2026-11-21T09:30:00.123456Z".parse().expect("a time")).extension("empty", ""),
        full(6).key("k".repeat(1_024)).data(vec![b'x'; 300_000]),
        full(7).content_type("text/plain").data("a\u{0}b"),
    ];
    let written: Vec<Event> = builders.into_iter().map(|builder| builder.build().expect("valid")).collect();
    database.append(written.clone()).await;
    let page = database.log("main").await.fetch(Seq::ZERO, ALL).await.expect("a page");
    let read: Vec<Event> = page.rows.into_iter().map(|row| row.event.expect("valid")).collect();
    assert_eq!(read, written);
}

/// Anybody may insert with plain SQL: a row that is no event is told with its key and the column at fault.
pub async fn a_row_that_is_no_event_is_told_not_skipped(database: &dyn LogDatabase) {
    database.append(vec![event("orders", "a", 0)]).await;
    database.insert_invalid("orders", "b").await;
    database.append(vec![event("orders", "a", 1)]).await;
    let page = database.log("main").await.fetch(Seq::ZERO, ALL).await.expect("a page");
    assert_eq!(page.rows.len(), 3);
    let invalid = page.rows[1].event.as_ref().expect_err("it is no event");
    assert_eq!(invalid.error.field(), "type");
    let key = invalid.topic.as_ref().zip(invalid.key.as_ref()).map(|(topic, key)| (topic.to_string(), key.to_string()));
    assert_eq!(key, Some(("orders".to_owned(), "b".to_owned())));
}

/// Places are read in order, and where the limit cuts it short the answer says so: nothing is taken for missing.
pub async fn read_says_how_far_it_looked(database: &dyn LogDatabase) {
    let log = database.log("main").await;
    database.append(events(20)).await;
    let seqs = all_seqs(&log).await;
    let wanted: SeqSet = [1, 2, 3, 7, 8, 15].into_iter().map(|at| seqs[at]).collect();
    database.delete_row(seqs[7]).await;
    let all = log.read(&wanted, ALL).await.expect("rows");
    let found: Vec<Seq> = all.rows.iter().map(|row| row.seq).collect();
    assert_eq!(found, [seqs[1], seqs[2], seqs[3], seqs[8], seqs[15]]);
    assert!(all.through >= seqs[15]);
    let part = log.read(&wanted, PageLimit { events: 4, ..ALL }).await.expect("rows");
    assert_eq!((part.rows.len(), part.through), (4, seqs[8]), "15 was not looked at");
    let one = log.read(&wanted, PageLimit { events: 10, bytes: 1 }).await.expect("rows");
    assert_eq!((one.rows.len(), one.through), (1, seqs[1]));
}

/// A place whose row is visible is read; one whose row is gone for good is called dead; each is looked at.
pub async fn probe_tells_the_visible_from_the_dead(database: &dyn LogDatabase) {
    let log = database.log("main").await;
    database.append(events(5)).await;
    let seqs = all_seqs(&log).await;
    database.delete_row(seqs[1]).await;
    let unseen: SeqSet = seqs[..4].iter().copied().collect();
    let probe = log.probe(&unseen, ALL).await.expect("a probe");
    let found: Vec<Seq> = probe.rows.iter().map(|row| row.seq).collect();
    assert_eq!(found, [seqs[0], seqs[2], seqs[3]]);
    assert!(!found.iter().any(|seq| probe.dead.contains(*seq)), "what is there is not dead");
    assert!(probe.through >= seqs[3]);
    let cut = log.probe(&unseen, PageLimit { events: 1, ..ALL }).await.expect("a probe");
    assert_eq!((cut.rows.len(), cut.through), (1, seqs[0]));
    assert!(cut.dead.is_empty(), "nothing above it was looked at");
}

/// A commit by another connection ends the wait.
pub async fn a_commit_elsewhere_is_noticed(database: &dyn LogDatabase) {
    let log = database.log("main").await;
    // The first look may answer at once: it does not know what was seen before.
    let _ = tokio::time::timeout(Duration::from_millis(200), log.changed()).await;
    let watching = tokio::spawn({
        let log = log.clone();
        async move { log.changed().await }
    });
    database.append(events(1)).await;
    let noticed = tokio::time::timeout(Duration::from_secs(10), watching).await;
    noticed.expect("the commit is noticed within 10 s").expect("no panic");
}
