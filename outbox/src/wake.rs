//! [`Wake`]: a nudge from those who append to those who relay, inside one process.

use std::{future::pending, sync::Arc};

use tokio::sync::watch;

/// Tells relays in this process that something was committed. Clones share it.
///
/// A nudge is only a speed-up: what nobody tells of is found by polling.
#[derive(Clone, Debug)]
pub struct Wake(Arc<watch::Sender<()>>);

impl Wake {
    /// A signal nobody listens to yet.
    pub fn new() -> Self {
        Self(Arc::new(watch::Sender::new(())))
    }

    /// Nudges every listener. Costs next to nothing; call it after each commit.
    pub fn wake(&self) {
        self.0.send_replace(());
    }

    /// A listener. Nudges from now on reach it, also those between two waits.
    pub fn listen(&self) -> Awakened {
        Awakened(self.0.subscribe())
    }
}

impl Default for Wake {
    fn default() -> Self {
        Self::new()
    }
}

/// Listens for nudges. A clone has seen what this one has.
#[derive(Clone, Debug)]
pub struct Awakened(watch::Receiver<()>);

impl Awakened {
    /// Waits for a nudge; returns at once if there was one since the last wait.
    ///
    /// # Cancel safety
    ///
    /// A dropped wait loses no nudge.
    pub async fn wait(&mut self) {
        if self.0.changed().await.is_err() {
            // A sender that is gone nudges nobody any more.
            pending().await
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_nudge_between_two_waits_is_not_lost() {
        let wake = Wake::new();
        let mut awakened = wake.listen();
        wake.wake();
        wake.wake();
        awakened.wait().await;
        assert!(tokio::time::timeout(Duration::from_millis(20), awakened.wait()).await.is_err(), "two are one");
    }
    /// Catches the mutant that asks for nudges and forgets who asked: it found them when something else woke it.
    #[tokio::test]
    async fn a_nudge_wakes_who_waits() {
        let wake = Wake::new();
        let mut awakened = wake.listen();
        let waiting = tokio::spawn(async move { awakened.wait().await });
        tokio::task::yield_now().await;
        wake.wake();
        tokio::time::timeout(Duration::from_secs(30), waiting).await.expect("it is woken").unwrap();
    }
}
