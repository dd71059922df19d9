//! [`InOrder`]: which rows come next in the order of places. Pure.

use std::collections::VecDeque;

use bus_core::{Seq, SeqSet, mutant};

use crate::{Page, PageLimit, Probe, Row};

/// How far a reader in the order of places is, and the page it works on.
///
/// A row comes next when nothing below it can become visible any more: every place up to it was handed out, or is dead.
/// So the rows behind a gap wait, and until they are gone nothing more is fetched.
#[derive(Clone, Debug, Default)]
pub(crate) struct InOrder {
    position: Seq,
    /// Rows above `position`, ascending.
    page: VecDeque<Row>,
    /// Places above `position` and below the last row of the page that are neither visible nor dead.
    unseen: SeqSet,
}

impl InOrder {
    /// Everything up to `position` was handed out before.
    pub(crate) fn behind(position: Seq) -> Self {
        Self { position, ..Self::default() }
    }

    /// The place of the last row that was handed out.
    pub(crate) fn position(&self) -> Seq {
        self.position
    }

    /// Whether another page can be taken: the last one was handed out to its end.
    pub(crate) fn wants_page(&self) -> bool {
        self.page.is_empty()
    }

    /// Places that may become visible yet, and hold up what is behind them.
    pub(crate) fn unseen(&self) -> &SeqSet {
        &self.unseen
    }

    /// The gap that holds up everything there is to hand out.
    pub(crate) fn waits_at(&self) -> Option<Seq> {
        self.unseen.first().filter(|gap| self.page.front().is_some_and(|row| *gap < row.seq))
    }

    #[cfg(all(test, feature = "postgres"))]
    pub(crate) fn waiting(&self) -> impl Iterator<Item = Seq> {
        self.page.iter().map(|row| row.seq)
    }

    /// Takes a page of rows, ascending, all above [`position`](InOrder::position).
    pub(crate) fn admit_page(&mut self, page: Page) {
        debug_assert!(self.wants_page(), "one page at a time");
        let mut last = self.position;
        for row in &page.rows {
            debug_assert!(row.seq > last, "a page is ascending and above the position");
            if !page.gaps_are_dead {
                self.unseen.insert_range(last.next(), row.seq.previous());
            }
            last = row.seq;
        }
        self.page = page.rows.into();
    }

    /// Takes what became of unseen places. Rows beyond `limit` are given up from the top, to be fetched again: what waits
    /// is never more than a page.
    pub(crate) fn admit_probe(&mut self, probe: Probe, limit: PageLimit) {
        self.unseen.remove_all(&probe.dead);
        let appeared = probe.rows.into_iter().filter(|row| self.unseen.remove(row.seq));
        self.page.extend(appeared);
        self.page.make_contiguous().sort_unstable_by_key(|row| row.seq);
        self.page.truncate(fitting(self.page.iter(), limit));
        let last = self.page.back().map_or(self.position, |row| row.seq);
        self.unseen = self.unseen.within(self.position.next(), last);
    }

    /// The rows that come next, as many as there are within `limit`.
    pub(crate) fn take(&mut self, limit: PageLimit) -> Vec<Row> {
        let gap = self.unseen.first().filter(|_| !mutant("gap-passed-in-order"));
        let next = self.page.iter().take_while(|row| gap.is_none_or(|gap| row.seq < gap));
        let count = fitting(next, limit);
        let rows: Vec<Row> = self.page.drain(..count).collect();
        self.position = rows.last().map_or(self.position, |row| row.seq);
        rows
    }
}

/// How many of these rows are within the limit; at least one if there is one.
fn fitting<'a>(rows: impl Iterator<Item = &'a Row>, limit: PageLimit) -> usize {
    let mut bytes = 0;
    let within = rows.take(limit.events.max(1)).take_while(|row| {
        let fits = bytes == 0 || bytes < limit.bytes;
        bytes += row.size_bytes().max(1);
        fits
    });
    within.count()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use bus_core::Event;
    use proptest::prelude::*;

    use super::*;

    const ALL: PageLimit = PageLimit { events: 1_000, bytes: 1 << 20 };

    fn row(seq: u64) -> Row {
        let event = Event::json("orders", "order.placed", &seq).and_then(|builder| builder.build());
        Row { seq: Seq(seq), event: Ok(event.expect("a valid event")) }
    }

    fn rows(seqs: &[u64]) -> Vec<Row> {
        seqs.iter().map(|seq| row(*seq)).collect()
    }

    fn set(seqs: &[u64]) -> SeqSet {
        seqs.iter().copied().map(Seq).collect()
    }

    fn page(seqs: &[u64]) -> Page {
        Page { rows: rows(seqs), gaps_are_dead: false }
    }

    fn probe(visible: &[u64], dead: &[u64]) -> Probe {
        Probe { rows: rows(visible), dead: set(dead), through: Seq(u64::MAX) }
    }

    fn seqs(rows: &[Row]) -> Vec<u64> {
        rows.iter().map(|row| row.seq.0).collect()
    }

    /// Catches the mutants that pass a gap and that keep a dead one.
    #[test]
    fn a_gap_holds_up_what_is_behind_it_until_it_is_visible_or_dead() {
        let mut order = InOrder::behind(Seq(10));
        order.admit_page(page(&[11, 13, 15, 16]));
        assert_eq!((seqs(&order.take(ALL)), order.position()), (vec![11], Seq(11)));
        assert_eq!((order.waits_at(), order.unseen()), (Some(Seq(12)), &set(&[12, 14])));
        order.admit_probe(probe(&[14], &[]), ALL);
        assert!(order.take(ALL).is_empty() && !order.wants_page());
        order.admit_probe(probe(&[], &[12]), ALL);
        assert_eq!(seqs(&order.take(ALL)), [13, 14, 15, 16]);
        assert_eq!((order.waits_at(), order.wants_page(), order.position()), (None, true, Seq(16)));
    }

    #[test]
    fn dead_gaps_hold_up_nothing() {
        let mut order = InOrder::behind(Seq(0));
        order.admit_page(Page { rows: rows(&[5, 9]), gaps_are_dead: true });
        assert!(order.unseen().is_empty());
        assert_eq!(seqs(&order.take(ALL)), [5, 9]);
    }

    /// Catches the mutant that keeps whatever a probe finds.
    #[test]
    fn what_waits_is_never_more_than_a_page() {
        let four = PageLimit { events: 4, ..ALL };
        let mut order = InOrder::behind(Seq(0));
        order.admit_page(page(&[2, 1_000]));
        for found in 3..900_u64 {
            order.admit_probe(probe(&[found], &[]), four);
            assert!(order.page.len() <= 4, "{} rows wait", order.page.len());
        }
        assert_eq!(
            (seqs(&order.page.iter().cloned().collect::<Vec<_>>()), order.unseen()),
            (vec![2, 3, 4, 5], &set(&[1]))
        );
        order.admit_probe(probe(&[1], &[]), four);
        assert_eq!((seqs(&order.take(four)), order.position()), (vec![1, 2, 3, 4], Seq(4)));
        let narrow = PageLimit { bytes: 1, ..ALL };
        order.admit_page(page(&[6, 7]));
        order.admit_probe(probe(&[5], &[]), narrow);
        assert_eq!((seqs(&order.take(narrow)), order.wants_page()), (vec![5], true), "one row is always there");
    }

    #[test]
    fn a_page_is_handed_out_in_parts() {
        let two = PageLimit { events: 2, ..ALL };
        let mut order = InOrder::behind(Seq(0));
        order.admit_page(page(&[1, 2, 3]));
        assert_eq!((seqs(&order.take(two)), order.wants_page()), (vec![1, 2], false));
        assert_eq!((seqs(&order.take(two)), order.wants_page()), (vec![3], true));
    }

    proptest! {
        /// A log whose places become visible or die in any order, read in pages and probes of any size: everything that
        /// became visible is handed out once, ascending. Catches the mutants that hand out a row above a gap, that keep a
        /// dead gap, and that forget the gaps when rows are given up.
        #[test]
        fn everything_visible_is_handed_out_once_in_order(
            fates in proptest::collection::vec(any::<bool>(), 1..40),
            settling in proptest::collection::vec((0usize..40, 1usize..6, 1usize..6), 0..120),
        ) {
            let count = fates.len() as u64;
            let (mut visible, mut over) = (BTreeSet::new(), BTreeSet::new());
            let (mut order, mut handed) = (InOrder::default(), Vec::new());
            let rest = (0..fates.len()).map(|at| (at, 3, 2)).chain((0..80).map(|_| (0, 3, 3)));
            for (at, page_rows, probe_rows) in settling.into_iter().chain(rest) {
                let place = at as u64 % count + 1;
                if over.insert(place) && fates[place as usize - 1] {
                    visible.insert(place);
                }
                let limit = PageLimit { events: page_rows, ..ALL };
                if order.wants_page() {
                    let found: Vec<u64> = visible.range(order.position().0 + 1..).take(page_rows).copied().collect();
                    order.admit_page(page(&found));
                }
                let unseen: Vec<u64> = order.unseen().iter().map(|seq| seq.0).collect();
                let found: Vec<u64> = unseen.iter().filter(|seq| visible.contains(seq)).take(probe_rows).copied().collect();
                let through = if found.len() == probe_rows { found[probe_rows - 1] } else { u64::MAX };
                let is_dead = |seq: &&u64| **seq <= through && over.contains(seq) && !visible.contains(seq);
                let dead: Vec<u64> = unseen.iter().filter(is_dead).copied().collect();
                order.admit_probe(probe(&found, &dead), limit);
                prop_assert!(order.page.len() <= page_rows.max(1));
                for row in order.take(limit) {
                    let below = (1..row.seq.0).find(|place| !over.contains(place));
                    prop_assert_eq!(below, None, "{} was handed out above an open place", row.seq);
                    handed.push(row.seq.0);
                }
            }
            prop_assert_eq!(handed, visible.into_iter().collect::<Vec<_>>());
        }
    }
}
