//! [`Seq`] and [`SeqSet`]: places in a log, and sets of them as ranges.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// An event's place in its log. Ascends in the order in which writers drew it, with gaps; the first is 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Seq(pub u64);

impl Seq {
    /// The place before the first event.
    pub const ZERO: Self = Self(0);

    /// The place after this one.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }

    /// The place before this one.
    pub fn previous(self) -> Self {
        Self(self.0.saturating_sub(1))
    }
}

impl fmt::Display for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// A set of places in a log, kept as ranges: a run of any length costs one entry.
///
/// Serializes as `[[first, last], ...]`, both ends included.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct SeqSet {
    /// First to last of each range; ranges neither overlap nor touch.
    ranges: BTreeMap<u64, u64>,
}

impl SeqSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether nothing is in the set.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// How many places are in the set.
    pub fn len(&self) -> u64 {
        self.ranges.iter().map(|(first, last)| last - first + 1).sum()
    }

    /// The lowest place.
    pub fn first(&self) -> Option<Seq> {
        self.ranges.first_key_value().map(|(first, _)| Seq(*first))
    }

    /// The highest place.
    pub fn last(&self) -> Option<Seq> {
        self.ranges.last_key_value().map(|(_, last)| Seq(*last))
    }

    /// Whether `seq` is in the set.
    pub fn contains(&self, seq: Seq) -> bool {
        self.ranges.range(..=seq.0).next_back().is_some_and(|(_, last)| *last >= seq.0)
    }

    /// The ranges in ascending order, both ends included.
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = (Seq, Seq)> + DoubleEndedIterator + '_ {
        self.ranges.iter().map(|(first, last)| (Seq(*first), Seq(*last)))
    }

    /// The places in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = Seq> + '_ {
        self.ranges.iter().flat_map(|(first, last)| (*first..=*last).map(Seq))
    }

    /// Adds one place.
    pub fn insert(&mut self, seq: Seq) {
        self.insert_range(seq, seq);
    }

    /// Adds `first` to `last`, both included; nothing where `last < first`.
    pub fn insert_range(&mut self, first: Seq, last: Seq) {
        if last < first {
            return;
        }
        let (mut first, mut last) = (first.0, last.0);
        // Whatever overlaps or touches is swallowed, from the top down.
        while let Some((&other_first, &other_last)) = self.ranges.range(..=last.saturating_add(1)).next_back() {
            if other_last.saturating_add(1) < first {
                break;
            }
            first = first.min(other_first);
            last = last.max(other_last);
            self.ranges.remove(&other_first);
        }
        self.ranges.insert(first, last);
    }

    /// Adds everything that is in `other`.
    pub fn insert_all(&mut self, other: &Self) {
        for (first, last) in other.ranges() {
            self.insert_range(first, last);
        }
    }

    /// Takes one place away; answers whether it was there.
    pub fn remove(&mut self, seq: Seq) -> bool {
        let present = self.contains(seq);
        if present {
            self.remove_range(seq, seq);
        }
        present
    }

    /// Takes `first` to `last` away, both included.
    pub fn remove_range(&mut self, first: Seq, last: Seq) {
        if last < first {
            return;
        }
        while let Some((&other_first, &other_last)) = self.ranges.range(..=last.0).next_back() {
            if other_last < first.0 {
                break;
            }
            self.ranges.remove(&other_first);
            if other_last > last.0 {
                self.ranges.insert(last.0 + 1, other_last);
            }
            if other_first < first.0 {
                self.ranges.insert(other_first, first.0 - 1);
                break;
            }
        }
    }

    /// Takes away everything that is in `other`.
    pub fn remove_all(&mut self, other: &Self) {
        for (first, last) in other.ranges() {
            self.remove_range(first, last);
        }
    }

    /// What lies between `first` and `last`, both included.
    pub fn within(&self, first: Seq, last: Seq) -> Self {
        let mut part = self.clone();
        if let Some(lowest) = part.first().filter(|lowest| *lowest < first) {
            part.remove_range(lowest, first.previous());
        }
        if let Some(highest) = part.last().filter(|highest| *highest > last) {
            part.remove_range(last.next(), highest);
        }
        part
    }

    /// The lowest places, at most `max` of them.
    pub fn lowest(&self, max: u64) -> Self {
        let mut part = Self::new();
        let mut left = max;
        for (first, last) in self.ranges() {
            if left == 0 {
                break;
            }
            let taken = left.min(last.0 - first.0 + 1);
            part.insert_range(first, Seq(first.0 + taken - 1));
            left -= taken;
        }
        part
    }

    /// A set of at most `max` ranges that holds everything this one does, by filling the narrowest gaps.
    pub fn joined(&self, max: usize) -> Self {
        let excess = self.ranges.len().saturating_sub(max.max(1));
        if excess == 0 {
            return self.clone();
        }
        let mut gaps: Vec<(u64, u64)> =
            self.ranges.iter().zip(self.ranges.keys().skip(1)).map(|((_, last), next)| (next - last, *last)).collect();
        gaps.sort_unstable();
        let mut joined = self.clone();
        for (width, last) in gaps.into_iter().take(excess) {
            joined.insert_range(Seq(last), Seq(last + width));
        }
        joined
    }
}

impl FromIterator<Seq> for SeqSet {
    fn from_iter<I: IntoIterator<Item = Seq>>(seqs: I) -> Self {
        let mut set = Self::new();
        set.extend(seqs);
        set
    }
}

impl Extend<Seq> for SeqSet {
    fn extend<I: IntoIterator<Item = Seq>>(&mut self, seqs: I) {
        for seq in seqs {
            self.insert(seq);
        }
    }
}

impl fmt::Debug for SeqSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.ranges.iter().map(|(first, last)| *first..=*last)).finish()
    }
}

impl Serialize for SeqSet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(&self.ranges)
    }
}

impl<'de> Deserialize<'de> for SeqSet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let ranges: Vec<(u64, u64)> = Vec::deserialize(deserializer)?;
        let mut set = Self::new();
        for (first, last) in ranges {
            set.insert_range(Seq(first), Seq(last));
        }
        Ok(set)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn set(seqs: &[u64]) -> SeqSet {
        seqs.iter().copied().map(Seq).collect()
    }

    #[test]
    fn runs_are_one_range() {
        let runs = set(&[1, 2, 3, 7, 5, 6]);
        assert_eq!(runs.ranges().collect::<Vec<_>>(), [(Seq(1), Seq(3)), (Seq(5), Seq(7))]);
        assert_eq!(serde_json::to_string(&runs).unwrap(), "[[1,3],[5,7]]");
        assert_eq!(serde_json::from_str::<SeqSet>("[[5,7],[1,3]]").unwrap(), runs);
    }

    #[test]
    fn joining_fills_the_narrowest_gaps_and_loses_nothing() {
        let sparse = set(&[1, 10, 12, 30]);
        assert_eq!(sparse.joined(2).ranges().collect::<Vec<_>>(), [(Seq(1), Seq(12)), (Seq(30), Seq(30))]);
        assert_eq!(sparse.joined(4), sparse);
    }

    proptest! {
        /// Compares with a plain set of numbers over random operations.
        #[test]
        fn behaves_as_a_set(operations in proptest::collection::vec((any::<bool>(), 0u64..60, 0u64..12), 0..60), first in 0u64..60, width in 0u64..40, max in 1usize..6) {
            let (mut ours, mut model) = (SeqSet::new(), BTreeSet::new());
            for (insert, start, length) in operations {
                let end = start + length;
                if insert {
                    ours.insert_range(Seq(start), Seq(end));
                    model.extend(start..=end);
                } else {
                    ours.remove_range(Seq(start), Seq(end));
                    model.retain(|n| !(start..=end).contains(n));
                }
            }
            prop_assert_eq!(ours.iter().map(|seq| seq.0).collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(ours.len(), model.len() as u64);
            prop_assert!((0..80).all(|n| ours.contains(Seq(n)) == model.contains(&n)));
            let ranges: Vec<_> = ours.ranges().collect();
            prop_assert!(ranges.windows(2).all(|pair| pair[0].1.0 + 1 < pair[1].0.0), "ranges neither overlap nor touch");
            let last = first + width;
            prop_assert_eq!(ours.within(Seq(first), Seq(last)).iter().map(|seq| seq.0).collect::<Vec<_>>(), model.range(first..=last).copied().collect::<Vec<_>>());
            prop_assert_eq!(ours.lowest(width).iter().map(|seq| seq.0).collect::<Vec<_>>(), model.iter().copied().take(width as usize).collect::<Vec<_>>());
            let joined = ours.joined(max);
            prop_assert!(joined.ranges().len() <= max && model.iter().all(|n| joined.contains(Seq(*n))));
        }
    }
}
