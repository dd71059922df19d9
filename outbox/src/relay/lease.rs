//! [`LeaseClock`]: how long an owner may hand events over. Pure.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// The owner stops this much before its lease can end, or a fifth of the lease where that is less: whatever was handed
/// over until then reaches the broker first.
const MARGIN_MAX: Duration = Duration::from_secs(1);

/// An owner's own view of its lease, by the monotonic clock. Only the database's clock says when the lease ends for
/// others; by counting from *before* each renewal was sent, the owner always stops earlier.
///
/// A renewal that did not wait for the disk can be lost in a crash of the database, whose clock would then end the lease
/// earlier: it counts once it is so old that it has reached the disk.
#[derive(Clone, Debug)]
pub(super) struct LeaseClock {
    ttl: Duration,
    until: Instant,
    renewed: Instant,
    /// Renewals that have not reached the disk yet: when they were sent.
    unripe: VecDeque<Instant>,
}

impl LeaseClock {
    /// A lease of `ttl` that was asked for at `sent`.
    pub(super) fn new(ttl: Duration, sent: Instant) -> Self {
        Self { ttl, until: sent + ttl - margin(ttl), renewed: sent, unripe: VecDeque::new() }
    }

    /// It was extended by a request sent at `sent`.
    pub(super) fn renewed(&mut self, sent: Instant) {
        self.until = self.until.max(sent + self.ttl - margin(self.ttl));
        self.renewed = self.renewed.max(sent);
    }

    /// It was extended by a request sent at `sent` that may not have reached the disk.
    pub(super) fn renewed_soon(&mut self, sent: Instant) {
        self.unripe.push_back(sent);
    }

    /// What was sent more than `grace` before `now` has reached the disk.
    pub(super) fn ripen(&mut self, now: Instant, grace: Duration) {
        while let Some(sent) = self.unripe.pop_front_if(|sent| *sent + grace <= now) {
            self.renewed(sent);
        }
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
        let grace = Duration::from_millis(600);
        lease.renewed_soon(sent + Duration::from_secs(3));
        lease.ripen(sent + Duration::from_millis(3_599), grace);
        assert!(!lease.is_held(sent + Duration::from_secs(6)), "a crash could take it back");
        lease.ripen(sent + Duration::from_millis(3_600), grace);
        assert!(lease.is_held(sent + Duration::from_millis(6_999)) && !lease.is_held(sent + Duration::from_secs(7)));
        let short = LeaseClock::new(Duration::from_secs(1), sent);
        assert!(short.is_held(sent + Duration::from_millis(799)) && !short.is_held(sent + Duration::from_millis(800)));
    }
}
