//! [`Marks`]: when everything up to a place had been settled by every sink, for retention. Pure.

use std::time::Duration;

/// How long one janitor keeps others away.
pub(crate) const JANITOR_TTL: Duration = Duration::from_secs(60);
/// Marks kept per retention time.
const MARKS_PER_RETENTION: u32 = 16;

/// When every sink had settled how much: microseconds and place, ascending.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Marks(pub(crate) Vec<(i64, i64)>);

impl Marks {
    /// Notes that everything up to `settled` is settled now; answers the marks to keep, and up to where all was settled
    /// at least `retention` ago.
    pub(crate) fn advance(mut self, now: i64, settled: i64, retention: i64) -> (Self, Option<i64>) {
        let step = retention / i64::from(MARKS_PER_RETENTION);
        // A clock that was set back would hide all marks behind the future; and a sink that begins again, or anew, takes
        // back what had been settled by those there were.
        self.0.retain(|(at, upto)| *at <= now && *upto <= settled);
        let (last_at, last_settled) = self.0.last().copied().unwrap_or((i64::MIN, 0));
        if settled > last_settled && (self.0.is_empty() || now.saturating_sub(last_at) >= step) {
            self.0.push((now, settled));
        }
        let old = self.0.iter().rposition(|(at, _)| now.saturating_sub(*at) >= retention);
        let removable = old.map(|at| self.0[at].1);
        self.0.drain(..old.unwrap_or(0));
        (self, removable)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Catches the mutant that removes what was settled a moment ago.
    #[test]
    fn only_what_was_settled_long_ago_is_removable() {
        let hour = 3_600_000_000;
        let (marks, removable) = Marks(vec![]).advance(0, 100, hour);
        assert_eq!(removable, None);
        let (marks, removable) = marks.advance(hour / 2, 200, hour);
        assert_eq!((marks.0.as_slice(), removable), ([(0, 100), (hour / 2, 200)].as_slice(), None));
        let (marks, removable) = marks.advance(hour, 300, hour);
        assert_eq!(removable, Some(100));
        let (marks, removable) = marks.advance(hour * 2, 300, hour);
        assert_eq!((marks.0.len(), removable), (1, Some(300)));
        assert_eq!(Marks(vec![]).advance(5, 100, 0).1, Some(100), "no retention: at once");
    }

    /// Catches the mutant that goes by old marks alone: rows went that a new sink, the only one, had not settled.
    #[test]
    fn what_a_sink_has_not_settled_is_never_removable() {
        let (marks, removable) = Marks(vec![(0, 100)]).advance(10, 0, 5);
        assert_eq!((marks.0.as_slice(), removable), ([].as_slice(), None));
        assert_eq!(marks.advance(20, 60, 5).1, None, "60 was settled just now");
    }

    #[test]
    fn marks_stay_few() {
        let mut marks = Marks(vec![]);
        for now in 0..10_000 {
            marks = marks.advance(now * 1_000_000, now + 1, 3_600_000_000).0;
        }
        assert!(marks.0.len() <= MARKS_PER_RETENTION as usize + 2, "{} marks", marks.0.len());
    }
}
