//! How many groups of gaps there are, and how often the locks are read. Which gaps are dead: `model`.

use bus_core::Seq;

use super::*;

#[test]
fn many_groups_are_taken_together_and_none_is_closed_by_that() {
    let (mut gaps, now) = (Gaps::default(), Instant::now());
    let holder = |name: &str| Holder { transaction: name.to_owned(), pid: Some(1) };
    for n in 0..200_u64 {
        gaps.see(&[Seq(n * 2)].into_iter().collect(), now);
        gaps.bound(gaps.seen(), 100 + n);
        gaps.read_locks(&[holder("a"), holder(&n.to_string())].into(), now);
    }
    assert!(gaps.groups.len() <= GROUPS_MAX);
    let all: SeqSet = (0..200).map(|n| Seq(n * 2)).collect();
    assert!(gaps.probed(&all, &SeqSet::new(), 50).is_empty());
    assert_eq!(gaps.probed(&all, &SeqSet::new(), 1_000), all);
    assert!(gaps.groups.is_empty());
}

#[test]
fn locks_are_read_for_gaps_that_stay_and_ever_less_often() {
    let (mut gaps, now) = (Gaps::default(), Instant::now());
    assert!(!gaps.wants_locks(now));
    gaps.see(&[Seq(1)].into_iter().collect(), now);
    assert!(!gaps.wants_locks(now), "a commit may be under way");
    let mut reads = 0;
    for millis in 0..60_000 {
        let at = now + Duration::from_millis(millis);
        if gaps.wants_locks(at) {
            reads += 1;
            gaps.read_locks(&[Holder { transaction: "1/1".to_owned(), pid: Some(1) }].into(), at);
        }
    }
    assert!((60..160).contains(&reads), "{reads} reads in a minute");
}

/// A reader gives up rows from the top of a full page, and with them the gaps between; they are fetched later, and no probe
/// tells of them. Catches the mutant that keeps such gaps for ever.
#[test]
fn gaps_that_were_fetched_are_forgotten() {
    let row = |seq| Row { seq: Seq(seq), event: Err(no_event()) };
    let (mut gaps, now) = (Gaps::default(), Instant::now());
    gaps.see(&[1, 2, 3, 5].into_iter().map(Seq).collect(), now);
    gaps.fetched(&[row(2), row(3), row(4)]);
    let left: SeqSet = [1, 5].into_iter().map(Seq).collect();
    assert_eq!(gaps.groups.iter().map(|group| group.places.clone()).collect::<Vec<_>>(), [left]);
    gaps.fetched(&[row(1), row(5)]);
    assert!(gaps.groups.is_empty());
}

fn no_event() -> crate::InvalidRow {
    let error = bus_core::EventError::new("type", "none");
    crate::InvalidRow { topic: None, key: None, error }
}
