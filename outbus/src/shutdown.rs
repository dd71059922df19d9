//! SIGTERM and ctrl-C: the first drains, the second ends at once.

use tokio::signal::unix::{SignalKind, signal};

use crate::failure::Failure;

/// Completes at the first signal. From then on a second one ends the process with status 1.
///
/// Signals are caught from the call on, not from the first poll.
pub(crate) fn shutdown() -> Result<impl Future<Output = ()> + Send + 'static, Failure> {
    let cannot = |error: std::io::Error| Failure::runtime("signal", format!("cannot listen for signals: {error}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(cannot)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot)?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            std::process::exit(1);
        });
    })
}
