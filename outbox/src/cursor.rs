//! [`Cursor`]: which places of a log are settled. Pure.

use bus_core::{Mark, Seq, SeqSet, mutant};

/// Most ranges of holes a checkpoint keeps.
///
/// Beyond that neighbours are joined, which means duplicates after a crash and never loss. Source: design.md 4.1.
pub const HOLE_RANGES_MAX: usize = 1_000;

/// Rows looked through for those that no sink wanted before; behind them, all are taken for such.
pub(crate) const UNCLAIMED_MAX: usize = 100_000;

/// A cursor as its row has it, before an owner goes on with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct StoredCursor {
    pub(crate) low: Seq,
    pub(crate) high: Seq,
    pub(crate) high_id: Option<String>,
    pub(crate) holes: SeqSet,
}

impl StoredCursor {
    /// Everything up to `first` is settled.
    pub(crate) fn behind(first: Seq) -> Self {
        Self { low: first, high: first, ..Self::default() }
    }

    /// These places are not settled after all.
    pub(crate) fn open(&mut self, places: &SeqSet) {
        if let Some(first) = places.first().filter(|first| *first <= self.low) {
            self.low = first.previous();
        }
        self.holes.insert_all(places);
    }

    /// Whether the places mean other events now: `drawn` is the log's highest place, `id` that of the event at
    /// [`high`](StoredCursor::high). As the cursor was not restored together with its log, nobody knows since when they
    /// differ: it begins anew with what is there.
    pub(crate) fn is_of_another_log(&mut self, drawn: Seq, id: Option<&str>) -> bool {
        let is_other = id.zip(self.high_id.as_deref()).is_some_and(|(found, seen)| found != seen);
        let differs = (drawn < self.high || is_other) && !mutant("other-history-believed");
        if differs {
            *self = Self::default();
        }
        differs
    }
}

/// The places of these rows, of which one more than [`UNCLAIMED_MAX`] were asked for: where there are more, everything up
/// to `high`.
pub(crate) fn unclaimed_places(rows: &[i64], high: Seq) -> SeqSet {
    let mut places: SeqSet = rows.iter().map(|seq| Seq(seq.unsigned_abs())).collect();
    if let Some(last) = places.last().filter(|_| rows.len() > UNCLAIMED_MAX) {
        places.insert_range(last, high);
    }
    places
}

/// Which places of a log are settled, by three facts: everything up to `low` is; nothing above `high` was seen; and
/// between them everything is, except the *holes*.
///
/// A hole is *unseen* (a number was drawn, and its row is not visible: its transaction is open, or was rolled back) or
/// *open* (its row was seen and is in flight, waiting or held). Nothing ever waits at an unseen hole: what is behind it
/// is handed out, and the row follows when it becomes visible. That keeps every key in order, because a key's numbers
/// are drawn under the aggregate's lock; the proof is in `outbox-design.md` 1.3.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    high: Seq,
    unseen: SeqSet,
    open: SeqSet,
    /// The last places settled, in a row: taken off `open` when the row ends, for most are settled in order.
    run: Option<(Seq, Seq)>,
}

impl Cursor {
    /// Goes on at a checkpoint. All its holes are unseen: those whose rows are visible are found by the first probe.
    pub fn restore(low: Seq, high: Seq, holes: &SeqSet) -> Self {
        let high = high.max(low);
        let unseen = match mutant("holes-forgotten") {
            false => holes.within(low.next(), high),
            true => SeqSet::new(),
        };
        Self { high, unseen, open: SeqSet::new(), run: None }
    }

    /// Everything up to here is settled.
    pub fn low(&self) -> Seq {
        let open = match self.run {
            // The run is settled, though it is still in `open`.
            Some((first, last)) if self.open.first() == Some(first) => {
                self.open.ranges().find(|(_, end)| *end > last).map(|(start, _)| start.max(last.next()))
            }
            _ => self.open.first(),
        };
        let lowest = [self.unseen.first(), open].into_iter().flatten().min();
        lowest.map_or(self.high, Seq::previous)
    }

    /// The highest place seen.
    pub fn high(&self) -> Seq {
        self.high
    }

    /// Places that may become visible yet.
    pub fn unseen(&self) -> &SeqSet {
        &self.unseen
    }

    /// Takes a page of rows, ascending, all above [`high`](Cursor::high). What is missing between them is unseen, or
    /// dead for good where the log says so.
    pub fn observe(&mut self, rows: impl IntoIterator<Item = Seq>, gaps_are_dead: bool) {
        let mut run: Option<(Seq, Seq)> = None;
        for seq in rows {
            debug_assert!(seq > self.high, "a page is ascending and above the cursor");
            if !gaps_are_dead {
                self.unseen.insert_range(self.high.next(), seq.previous());
            }
            self.high = seq;
            run = match run {
                Some((first, last)) if last.next() == seq => Some((first, seq)),
                other => {
                    self.open_range(other);
                    Some((seq, seq))
                }
            };
        }
        self.open_range(run);
    }

    fn open_range(&mut self, range: Option<(Seq, Seq)>) {
        if let Some((first, last)) = range {
            self.open.insert_range(first, last);
        }
    }

    /// The row at an unseen place is visible now; false if it is not one of them.
    pub fn appear(&mut self, seq: Seq) -> bool {
        let appeared = self.unseen.remove(seq);
        if appeared {
            self.open.insert(seq);
        }
        appeared
    }

    /// These unseen places will never be visible: their transactions were rolled back.
    pub fn close(&mut self, dead: &SeqSet) {
        self.unseen.remove_all(dead);
    }

    /// The event at `seq` needs nothing more: published, set aside, or not for this sink.
    pub fn settle(&mut self, seq: Seq) {
        self.run = match self.run {
            Some((first, last)) if last.next() == seq => Some((first, seq)),
            _ => {
                self.flush();
                Some((seq, seq))
            }
        };
    }

    fn flush(&mut self) {
        if let Some((first, last)) = self.run.take() {
            self.open.remove_range(first, last);
        }
    }

    /// Everything up to [`high`](Cursor::high) that is not settled.
    pub fn holes(&mut self) -> SeqSet {
        self.flush();
        let mut holes = self.open.clone();
        holes.insert_all(&self.unseen);
        holes
    }

    /// Whether everything up to `seq` is settled, apart from places that were never seen.
    pub fn is_settled_to(&mut self, seq: Seq) -> bool {
        self.flush();
        self.high >= seq && self.open.first().is_none_or(|first| first > seq)
    }

    /// What a writer is told with a batch.
    pub fn mark(&mut self) -> Mark {
        let holes = self.holes();
        Mark { low: self.low(), high: self.high, holes }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn seqs(numbers: &[u64]) -> Vec<Seq> {
        numbers.iter().copied().map(Seq).collect()
    }

    fn set(numbers: &[u64]) -> SeqSet {
        numbers.iter().copied().map(Seq).collect()
    }

    #[test]
    fn a_gap_holds_low_back_and_nothing_else() {
        let mut cursor = Cursor::default();
        cursor.observe(seqs(&[1, 2, 4, 5]), false);
        assert_eq!((cursor.low(), cursor.high()), (Seq(0), Seq(5)));
        [1, 2, 4, 5].into_iter().for_each(|seq| cursor.settle(Seq(seq)));
        assert_eq!((cursor.low(), cursor.holes()), (Seq(2), set(&[3])));
        assert!(cursor.appear(Seq(3)) && !cursor.appear(Seq(3)));
        assert_eq!(cursor.low(), Seq(2), "visible is not settled");
        cursor.settle(Seq(3));
        assert_eq!((cursor.low(), cursor.holes()), (Seq(5), SeqSet::new()));
    }

    #[test]
    fn dead_gaps_are_no_holes() {
        let mut cursor = Cursor::default();
        cursor.observe(seqs(&[3, 7]), true);
        assert_eq!(cursor.holes(), set(&[3, 7]));
        let mut open = Cursor::default();
        open.observe(seqs(&[3]), false);
        open.close(&set(&[1, 2]));
        open.settle(Seq(3));
        assert_eq!(open.low(), Seq(3));
    }

    /// Catches the mutants that go on at a cursor whose log was drawn anew below it, and that forget a hole.
    #[test]
    fn a_stored_cursor_begins_anew_with_another_log_only() {
        let stored = || StoredCursor { high_id: Some("a".to_owned()), ..StoredCursor::behind(Seq(10)) };
        for (drawn, id) in [(Seq(10), Some("a")), (Seq(12), None)] {
            let mut same = stored();
            assert!(!same.is_of_another_log(drawn, id) && same == stored());
        }
        for (drawn, id) in [(Seq(9), None), (Seq(12), Some("b"))] {
            let mut other = stored();
            assert!(other.is_of_another_log(drawn, id) && other == StoredCursor::default());
        }
        let mut opened = stored();
        opened.open(&set(&[4, 7]));
        assert_eq!((opened.low, opened.high, opened.holes), (Seq(3), Seq(10), set(&[4, 7])));
    }

    #[test]
    fn beyond_the_limit_all_rows_are_taken_for_unclaimed() {
        assert_eq!(unclaimed_places(&[2, 5], Seq(9)), set(&[2, 5]));
        let many: Vec<i64> = (1..=UNCLAIMED_MAX as i64 + 1).map(|n| n * 2).collect();
        let places = unclaimed_places(&many, Seq(300_000));
        assert!(places.contains(Seq(2)) && !places.contains(Seq(3)) && places.contains(Seq(299_999)));
    }

    #[test]
    fn a_restored_cursor_probes_all_its_holes() {
        let mut cursor = Cursor::restore(Seq(10), Seq(20), &set(&[5, 12, 13, 25]));
        assert_eq!((cursor.unseen(), cursor.low()), (&set(&[12, 13]), Seq(11)));
        assert_eq!(cursor.mark(), Mark { low: Seq(11), high: Seq(20), holes: set(&[12, 13]) });
    }

    proptest! {
        /// Compares with plain sets over random pages, appearances and settlements.
        #[test]
        fn low_and_holes_are_what_they_say(
            pages in proptest::collection::vec(proptest::collection::vec((1u64..4, any::<u8>()), 1..6), 1..8),
        ) {
            let mut cursor = Cursor::default();
            let (mut settled, mut seen, mut high) = (BTreeSet::new(), Vec::new(), 0);
            for page in pages {
                let mut rows = Vec::new();
                for (step, _) in &page {
                    high += step;
                    rows.push(Seq(high));
                    seen.push(high);
                }
                cursor.observe(rows, false);
                for (at, (_, choice)) in page.iter().enumerate() {
                    let unsettled: Vec<u64> = seen.iter().copied().filter(|seq| !settled.contains(seq)).collect();
                    if let Some(seq) = unsettled.get((*choice as usize + at) % unsettled.len().max(1)) {
                        cursor.settle(Seq(*seq));
                        settled.insert(*seq);
                    }
                    if let Some(seq) = cursor.unseen().first().filter(|_| choice % 5 == 0) {
                        prop_assert!(cursor.appear(seq));
                        seen.push(seq.0);
                    }
                    let holes: Vec<u64> = (1..=high).filter(|seq| !settled.contains(seq)).collect();
                    let low = holes.first().map_or(high, |first| first - 1);
                    prop_assert_eq!(cursor.low(), Seq(low));
                    prop_assert_eq!(cursor.clone().holes().iter().map(|seq| seq.0).collect::<Vec<_>>(), holes);
                    prop_assert_eq!(cursor.low(), Seq(low));
                }
            }
        }
    }
}
