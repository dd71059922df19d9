//! [`LeaseClock`]: how long an owner may hand events over. Pure.

use std::time::{Duration, Instant};

/// The owner stops this much before its lease can end, or a fifth of the lease where that is less: whatever was handed
/// over until then reaches the broker first.
const MARGIN_MAX: Duration = Duration::from_secs(1);

/// An owner's own view of its lease, by the monotonic clock. Only the database's clock says when the lease ends for
/// others; by counting from *before* each renewal was sent, the owner always stops earlier.
#[derive(Clone, Copy, Debug)]
pub(super) struct LeaseClock {
    ttl: Duration,
    until: Instant,
    renewed: Instant,
}

impl LeaseClock {
    /// A lease of `ttl` that was asked for at `sent`.
    pub(super) fn new(ttl: Duration, sent: Instant) -> Self {
        Self { ttl, until: sent + ttl - margin(ttl), renewed: sent }
    }

    /// It was extended by a request sent at `sent`.
    pub(super) fn renewed(&mut self, sent: Instant) {
        self.until = self.until.max(sent + self.ttl - margin(self.ttl));
        self.renewed = self.renewed.max(sent);
    }

    /// Whether events may be handed over.
    pub(super) fn is_held(&self, now: Instant) -> bool {
        now < self.until
    }

    /// When it should be renewed even if nothing else is to be written.
    pub(super) fn renewal_due(&self) -> Instant {
        self.renewed + self.ttl / 3
    }
}

fn margin(ttl: Duration) -> Duration {
    MARGIN_MAX.min(ttl / 5)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Catches the mutant that counts from the answer: a slow answer would stretch the lease.
    #[test]
    fn an_owner_stops_before_its_lease_ends() {
        let (ttl, sent) = (Duration::from_secs(5), Instant::now());
        let mut lease = LeaseClock::new(ttl, sent);
        assert!(lease.is_held(sent + Duration::from_millis(3_999)) && !lease.is_held(sent + Duration::from_secs(4)));
        assert_eq!(lease.renewal_due(), sent + ttl / 3);
        lease.renewed(sent + Duration::from_secs(2));
        assert!(lease.is_held(sent + Duration::from_millis(5_999)) && !lease.is_held(sent + Duration::from_secs(6)));
        lease.renewed(sent);
        assert!(lease.is_held(sent + Duration::from_millis(5_999)), "an old answer takes nothing back");
        let short = LeaseClock::new(Duration::from_secs(1), sent);
        assert!(short.is_held(sent + Duration::from_millis(799)) && !short.is_held(sent + Duration::from_millis(800)));
    }
}
