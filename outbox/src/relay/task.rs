//! [`Running`]: something that is done beside the relay's own task.

use std::task::{Context, Poll};

use futures_util::FutureExt;
use tokio::task::JoinHandle;

/// At most one task at a time, whose result waits to be taken. Dropped, it is aborted; its panic is the relay's.
#[derive(Debug)]
pub(super) struct Running<T> {
    task: Option<JoinHandle<T>>,
    result: Option<T>,
}

impl<T: Send + 'static> Running<T> {
    pub(super) fn nothing() -> Self {
        Self { task: None, result: None }
    }

    /// Whether something runs, or its result was not taken yet.
    pub(super) fn is_busy(&self) -> bool {
        self.task.is_some() || self.result.is_some()
    }

    pub(super) fn start(&mut self, future: impl Future<Output = T> + Send + 'static) {
        debug_assert!(!self.is_busy());
        self.task = Some(tokio::spawn(future));
    }

    /// True when it has just ended.
    pub(super) fn poll(&mut self, context: &mut Context<'_>) -> bool {
        let Some(task) = &mut self.task else { return false };
        match task.poll_unpin(context) {
            Poll::Ready(Ok(result)) => {
                (self.task, self.result) = (None, Some(result));
                true
            }
            Poll::Ready(Err(error)) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            // Only dropping it aborts it, and the runtime's end.
            Poll::Ready(Err(_)) => {
                self.task = None;
                false
            }
            Poll::Pending => false,
        }
    }

    /// Whether a result waits to be taken.
    pub(super) fn is_ready(&self) -> bool {
        self.result.is_some()
    }

    pub(super) fn take(&mut self) -> Option<T> {
        self.result.take()
    }
}

impl<T> Drop for Running<T> {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}
