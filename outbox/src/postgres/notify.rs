//! Waking across processes: those who append notify, debounced and outside their transactions; those who relay listen.
//!
//! A notification is only a speed-up. One that is lost, or that a pooler swallows, costs no more than the next poll.

use std::{
    convert::Infallible,
    future::{pending, poll_fn},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{sync::watch, task::JoinHandle};
use tokio_postgres::{AsyncMessage, Client, types::Type};

use super::{PostgresConfig, Tables, log_error, timely};
use crate::LogError;

/// Fewest time between two notifications of one process.
const DEBOUNCE: Duration = Duration::from_millis(1);
/// Pause before a connection for notifications is opened again.
const RECONNECT: Duration = Duration::from_secs(1);

const LISTEN: &str = "LISTEN \"{schema}.outbox\"";
/// Need not wait for the disk: a notification that a crash swallows is found by polling. Set for this transaction only:
/// behind a pooler the connection is handed to business transactions next.
const NOTIFY: &str = "SELECT pg_notify('{schema}.outbox', ''), set_config('synchronous_commit', 'off', true)";

/// Tells relays in other processes that something was committed.
#[derive(Debug)]
pub(crate) struct Notifier {
    config: PostgresConfig,
    tables: Tables,
    wanted: watch::Sender<()>,
    is_running: Arc<AtomicBool>,
}

impl Notifier {
    pub(crate) fn new(config: PostgresConfig, tables: Tables) -> Self {
        Self { config, tables, wanted: watch::Sender::new(()), is_running: Arc::default() }
    }

    pub(crate) fn config(&self) -> &PostgresConfig {
        &self.config
    }

    /// Has a notification sent soon. Outside a runtime nothing is sent.
    pub(crate) fn notify(&self) {
        self.wanted.send_replace(());
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if !self.is_running.swap(true, Ordering::AcqRel) {
            let wanted = self.wanted.subscribe();
            let (config, sql) = (self.config.clone(), self.tables.qualify(NOTIFY));
            let running = Running(Arc::clone(&self.is_running));
            runtime.spawn(async move {
                let _running = running;
                send(wanted, config, sql).await;
            });
        }
    }
}

/// Whether the sending task runs: its runtime may end before the outbox does.
struct Running(Arc<AtomicBool>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Sends what is wanted, until the outbox is gone. The first notification is wanted already.
async fn send(mut wanted: watch::Receiver<()>, config: PostgresConfig, sql: String) {
    let mut client: Option<Client> = None;
    loop {
        if let Err(error) = send_one(&mut client, &config, &sql).await {
            tracing::debug!(%error, "relays elsewhere could not be notified: they find it by polling");
            client = None;
            tokio::time::sleep(RECONNECT).await;
        }
        tokio::time::sleep(DEBOUNCE).await;
        if wanted.changed().await.is_err() {
            return;
        }
    }
}

async fn send_one(client: &mut Option<Client>, config: &PostgresConfig, sql: &str) -> Result<(), LogError> {
    let open = match client {
        Some(open) if !open.is_closed() => open,
        _ => client.insert(config.connect().await?),
    };
    timely(async { open.query_typed(sql, &[]).await.map_err(log_error) }).await?;
    Ok(())
}

/// Hears notifications from other processes.
#[derive(Debug, Default)]
pub(super) struct Listener {
    heard: Mutex<Option<(watch::Receiver<()>, JoinHandle<Infallible>)>>,
}

impl Listener {
    /// Waits for a notification since the last one that was waited for.
    pub(super) async fn wait(&self, config: &PostgresConfig, tables: &Tables) {
        let mut heard = self.start(config, tables);
        if heard.changed().await.is_err() {
            // The task is over; the next wait starts another.
            return pending().await;
        }
        if let Some((receiver, _)) = self.heard().as_mut() {
            receiver.mark_unchanged();
        }
    }

    /// Hears the notifications that nobody has waited for.
    fn start(&self, config: &PostgresConfig, tables: &Tables) -> watch::Receiver<()> {
        let mut heard = self.heard();
        match &*heard {
            Some((receiver, task)) if !task.is_finished() => receiver.clone(),
            _ => {
                let (sender, receiver) = watch::channel(());
                let task = tokio::spawn(listen(config.clone(), tables.qualify(LISTEN), sender));
                heard.insert((receiver, task)).0.clone()
            }
        }
    }

    fn heard(&self) -> MutexGuard<'_, Option<(watch::Receiver<()>, JoinHandle<Infallible>)>> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some((_, task)) = self.heard.get_mut().unwrap_or_else(PoisonError::into_inner) {
            task.abort();
        }
    }
}

/// Listens for ever, on one connection after the other. What came while there was none is told of by every new one.
async fn listen(config: PostgresConfig, sql: String, heard: watch::Sender<()>) -> Infallible {
    let mut told = None;
    loop {
        let ended = config.listen(&sql, &heard).await.err();
        let says = ended.as_ref().map(ToString::to_string);
        match ended {
            // Said once: nothing is lost by it but time.
            Some(error) if !error.kind().may_heal() && told != says => {
                tracing::error!(%error, "no notifications are heard, so events are found by polling alone");
                told = says;
            }
            error => tracing::debug!(error = error.map(tracing::field::display), "listening for notifications ended"),
        }
        tokio::time::sleep(RECONNECT).await;
    }
}

/// Drives a connection and passes on its notifications, until it ends.
pub(super) async fn hear<S, T>(
    mut connection: tokio_postgres::Connection<S, T>,
    heard: watch::Sender<()>,
) -> Result<(), tokio_postgres::Error>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    while let Some(message) = poll_fn(|context| connection.poll_message(context)).await {
        if matches!(message?, AsyncMessage::Notification(_)) {
            heard.send_replace(());
        }
    }
    Ok(())
}

/// Sends the statement that begins to listen; the connection must be driven meanwhile.
pub(super) async fn begin(client: &Client, sql: &str) -> Result<(), LogError> {
    let none: &[(&(dyn tokio_postgres::types::ToSql + Sync), Type)] = &[];
    client.query_typed(sql, none).await.map_err(log_error)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Catches the mutant that asks for notifications and forgets who asked: they were found when something else woke it.
    #[tokio::test]
    async fn a_notification_wakes_who_waits() {
        let (sender, receiver) = watch::channel(());
        let listener = Arc::new(Listener::default());
        *listener.heard() = Some((receiver, tokio::spawn(pending())));
        let config = PostgresConfig::from_url("postgres://nobody@localhost/none").unwrap();
        for _ in 0..2 {
            let (listening, config) = (Arc::clone(&listener), config.clone());
            let waiting = tokio::spawn(async move { listening.wait(&config, &Tables::default()).await });
            tokio::task::yield_now().await;
            assert!(!waiting.is_finished(), "one notification is waited for once");
            sender.send_replace(());
            tokio::time::timeout(Duration::from_secs(30), waiting).await.expect("it is woken").unwrap();
        }
    }
}
