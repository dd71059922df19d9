//! [`RetryPolicy`]: after which attempt how long to wait, or to give up. Pure.

use std::time::Duration;

use crate::FOREVER;

/// How often to try, and how long to wait between: the wait doubles from `backoff_min` to `backoff_max`, and is
/// lengthened or shortened by up to a fifth, so that many that failed together do not come back together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Attempts in all, the first included. Default 20, which is about 6 minutes.
    pub attempts: u32,
    /// Wait after the first attempt. Default 100 ms.
    pub backoff_min: Duration,
    /// Longest wait. Default 30 s.
    pub backoff_max: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self { attempts: 20, backoff_min: Duration::from_millis(100), backoff_max: Duration::from_secs(30) }
    }
}

impl RetryPolicy {
    /// The wait after failed attempt number `attempt`, from 1; `None` after the last.
    ///
    /// `random` is from 0 to 1, exclusive.
    pub fn delay_after(&self, attempt: u32, random: f64) -> Option<Duration> {
        (attempt < self.attempts).then(|| self.backoff(attempt, random))
    }

    /// The wait after failure number `failure`, from 1, where nothing is ever given up.
    pub fn backoff(&self, failure: u32, random: f64) -> Duration {
        let doublings = failure.saturating_sub(1).min(31);
        let plain = self.backoff_min.saturating_mul(1 << doublings).min(self.backoff_max).min(FOREVER);
        plain.mul_f64(0.8 + 0.4 * random)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_its_maximum_and_gives_up() {
        let policy = RetryPolicy::default();
        let plain: Vec<u128> = (1..=11).map(|n| policy.delay_after(n, 0.5).unwrap().as_millis()).collect();
        assert_eq!(plain, [100, 200, 400, 800, 1_600, 3_200, 6_400, 12_800, 25_600, 30_000, 30_000]);
        assert!(policy.delay_after(19, 0.5).is_some() && policy.delay_after(20, 0.5).is_none());
        assert_eq!(policy.backoff(u32::MAX, 0.5), Duration::from_secs(30));
    }

    /// Catches the mutant that trusts the configured maximum: lengthening it, or adding it to a clock, would panic.
    #[test]
    fn the_longest_wait_there_is_can_be_waited_for() {
        let policy = RetryPolicy { attempts: 2, backoff_min: Duration::MAX, backoff_max: Duration::MAX };
        assert!(std::time::Instant::now().checked_add(policy.backoff(1, 0.999)).is_some());
    }

    #[test]
    fn jitter_is_at_most_a_fifth() {
        let policy = RetryPolicy::default();
        assert_eq!(policy.delay_after(1, 0.0), Some(Duration::from_millis(80)));
        assert!(policy.delay_after(1, 0.999).unwrap() < Duration::from_millis(120));
    }

    #[test]
    fn the_default_lasts_about_six_minutes() {
        let policy = RetryPolicy::default();
        let total: Duration = (1..20).filter_map(|n| policy.delay_after(n, 0.5)).sum();
        assert!((330..390).contains(&total.as_secs()), "{total:?}");
    }
}
