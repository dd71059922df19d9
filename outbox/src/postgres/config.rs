//! [`PostgresConfig`]: where the database is, and how it is reached.

use std::{fmt, str::FromStr, time::Duration};

use tokio::sync::watch;
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage, config::SslMode};
use url::{Url, form_urlencoded};

use super::{
    error::{connect_error, log_error, timed_out},
    notify::{self, hear},
};
use crate::{LogError, LogErrorKind};

/// How long connecting may take, the handshakes included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long bytes may stay unacknowledged before the connection counts as broken.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(10);

/// A PostgreSQL database. Its `Debug` shows no password.
#[derive(Clone)]
pub struct PostgresConfig {
    config: Config,
    tls: Tls,
    /// Where notifications are listened for, if not here.
    listen: Option<Box<PostgresConfig>>,
}

/// How much TLS, as libpq has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tls {
    pub(super) mode: TlsMode,
    /// A file of certificates to trust instead of the machine's.
    pub(super) root: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TlsMode {
    /// None.
    Disable,
    /// Where the server offers it; whoever answers is believed.
    Prefer,
    /// Always; whoever answers is believed.
    Require,
    /// Always, and the server's certificate is one we trust.
    VerifyCa,
    /// Always, and the server's certificate is one we trust, for the host we asked for.
    VerifyFull,
}

impl PostgresConfig {
    /// Reads a URL: `postgres://user:password@host:port/database?sslmode=verify-full&sslrootcert=ca.crt`. `sslmode` is
    /// `disable`, `prefer` (the default), `require`, `verify-ca` or `verify-full`.
    ///
    /// # Errors
    ///
    /// [`Invalid`](LogErrorKind::Invalid) if it is none, or asks for TLS in a build without it. Never shows the password.
    pub fn from_url(url: &str) -> Result<Self, LogError> {
        let invalid = |message: String| LogError::new(LogErrorKind::Invalid, message);
        let shape = || invalid("a PostgreSQL URL is written postgres://user:password@host:port/database".to_owned());
        // In a form `+` is a space; libpq and the client know only percent signs.
        let (place, query) = url.split_once('?').unwrap_or((url, ""));
        let mut parsed = Url::parse(place).map_err(|_| shape())?;
        parsed.set_query(Some(&query.replace('+', "%2B")));
        if !matches!(parsed.scheme(), "postgres" | "postgresql") || parsed.host_str().is_none_or(str::is_empty) {
            return Err(shape());
        }
        let mut tls = Tls { mode: TlsMode::Prefer, root: None };
        let mut rest = Vec::new();
        for option in parsed.query().unwrap_or_default().split('&').filter(|option| !option.is_empty()) {
            // What is not ours stays as it is encoded.
            let decoded = form_urlencoded::parse(option.as_bytes()).next();
            match decoded.as_ref().map(|(name, value)| (&**name, &**value)) {
                Some(("sslmode", value)) => tls.mode = value.parse().map_err(invalid)?,
                Some(("sslrootcert", value)) => tls.root = Some(value.to_owned()),
                _ => rest.push(option),
            }
        }
        let rest = (!rest.is_empty()).then(|| rest.join("&"));
        parsed.set_query(rest.as_deref());
        let mut config = Config::from_str(parsed.as_str()).map_err(|error| {
            // The cause names the parameter; it does not repeat the URL.
            let cause = std::error::Error::source(&error).map_or_else(String::new, |cause| format!(": {cause}"));
            invalid(format!("the PostgreSQL URL cannot be used{cause}"))
        })?;
        if config.get_application_name().is_none() {
            config.application_name("outbus");
        }
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(CONNECT_TIMEOUT);
        }
        config.tcp_user_timeout(TCP_USER_TIMEOUT).keepalives_idle(Duration::from_secs(30));
        config.ssl_mode(match tls.mode {
            TlsMode::Disable => SslMode::Disable,
            TlsMode::Prefer => SslMode::Prefer,
            TlsMode::Require | TlsMode::VerifyCa | TlsMode::VerifyFull => SslMode::Require,
        });
        if cfg!(not(feature = "tls")) && config.get_ssl_mode() == SslMode::Require {
            return Err(invalid("this build has no TLS: use the feature `tls` of crate outbox".to_owned()));
        }
        Ok(Self { config, tls, listen: None })
    }

    /// Listens for notifications at another address: a pooler in transaction mode passes none on.
    pub fn listen_at(mut self, direct: Self) -> Self {
        self.listen = Some(Box::new(direct));
        self
    }

    /// Opens a connection, which a task of its own drives until the client is dropped.
    ///
    /// # Errors
    ///
    /// [`Unavailable`](LogErrorKind::Unavailable) if the server cannot be reached or takes no more connections,
    /// [`Denied`](LogErrorKind::Denied) if it does not let us in or its certificate is not trusted,
    /// [`Schema`](LogErrorKind::Schema) if it has no such database.
    pub async fn connect(&self) -> Result<Client, LogError> {
        let connecting = async {
            if self.tls.mode == TlsMode::Disable || cfg!(not(feature = "tls")) {
                let (client, connection) =
                    self.config.connect(NoTls).await.map_err(|error| connect_error(self, error))?;
                drive(connection);
                return Ok(client);
            }
            #[cfg(feature = "tls")]
            {
                let connector = super::tls::connector(&self.tls)?;
                let connected = self.config.connect(connector).await;
                let (client, connection) = connected.map_err(|error| connect_error(self, error))?;
                drive(connection);
                Ok(client)
            }
            #[cfg(not(feature = "tls"))]
            unreachable!("a build without TLS has returned")
        };
        tokio::time::timeout(CONNECT_TIMEOUT, connecting).await.unwrap_or_else(|_| Err(timed_out("connecting")))
    }

    /// Opens a connection for our own statements, which run in `READ COMMITTED` whatever the role has set. Under
    /// `SERIALIZABLE` a checkpoint, and whoever wants to take over, would fail again and again as long as somebody else's
    /// serializable transaction stays open, and reading would fail transactions of those who append.
    pub(super) async fn connect_for_log(&self) -> Result<Client, LogError> {
        let client = self.connect().await?;
        let rows = client.simple_query("SHOW default_transaction_isolation").await.map_err(log_error)?;
        let is_other = |message: &SimpleQueryMessage| matches!(message, SimpleQueryMessage::Row(row) if row.get(0) != Some("read committed"));
        if !rows.iter().any(is_other) {
            return Ok(client);
        }
        let mut own = self.clone();
        let options = self.config.get_options().unwrap_or_default();
        own.config.options(format!("{options} -c default_transaction_isolation=read\\ committed"));
        match own.connect().await {
            // Of a pooler's connections others would have it too; it refuses to set it.
            Err(error) if error.kind() == LogErrorKind::Unavailable || error.kind() == LogErrorKind::Invalid => {
                tracing::debug!(%error, "the connection keeps the role's default_transaction_isolation");
                Ok(client)
            }
            opened => opened,
        }
    }

    /// Listens on a connection of its own until it ends, and passes on what it hears.
    pub(super) async fn listen(&self, sql: &str, heard: &watch::Sender<()>) -> Result<(), LogError> {
        let at = self.listen.as_deref().unwrap_or(self);
        #[cfg(feature = "tls")]
        if at.tls.mode != TlsMode::Disable {
            let connector = super::tls::connector(&at.tls)?;
            let (client, connection) = at.config.connect(connector).await.map_err(|error| connect_error(at, error))?;
            return listen_on(&client, hear(connection, heard.clone()), sql, heard).await;
        }
        let (client, connection) = at.config.connect(NoTls).await.map_err(|error| connect_error(at, error))?;
        listen_on(&client, hear(connection, heard.clone()), sql, heard).await
    }

    /// Where it is, for people.
    pub(super) fn place(&self) -> String {
        let hosts = self.config.get_hosts().iter().map(|host| match host {
            tokio_postgres::config::Host::Tcp(name) => name.clone(),
            #[cfg(unix)]
            tokio_postgres::config::Host::Unix(path) => path.display().to_string(),
        });
        let ports = self.config.get_ports();
        let hosts: Vec<String> = hosts
            .enumerate()
            .map(|(at, host)| format!("{host}:{}", ports.get(at).or_else(|| ports.first()).copied().unwrap_or(5_432)))
            .collect();
        hosts.join(", ")
    }
}

impl FromStr for TlsMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "disable" => Ok(Self::Disable),
            "allow" | "prefer" => Ok(Self::Prefer),
            "require" => Ok(Self::Require),
            "verify-ca" => Ok(Self::VerifyCa),
            "verify-full" => Ok(Self::VerifyFull),
            _ => Err("`sslmode` must be disable, prefer, require, verify-ca or verify-full".to_owned()),
        }
    }
}

impl fmt::Debug for PostgresConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresConfig")
            .field("place", &self.place())
            .field("user", &self.config.get_user())
            .field("database", &self.config.get_dbname())
            .field("tls", &self.tls)
            .finish()
    }
}

async fn listen_on(
    client: &Client,
    connection: impl Future<Output = Result<(), tokio_postgres::Error>>,
    sql: &str,
    heard: &watch::Sender<()>,
) -> Result<(), LogError> {
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        ended = &mut connection => return ended.map_err(log_error),
        begun = notify::begin(client, sql) => begun?,
    }
    // What came before this is told of now.
    heard.send_replace(());
    connection.await.map_err(log_error)
}

fn drive<S, T>(connection: tokio_postgres::Connection<S, T>)
where
    tokio_postgres::Connection<S, T>: Future<Output = Result<(), tokio_postgres::Error>> + Send + 'static,
{
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection to PostgreSQL ended");
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_says_where_and_how() {
        let config =
            PostgresConfig::from_url("postgres://app:s3cret@db:6543/shop?sslmode=verify-full&sslrootcert=a.crt");
        let config = config.unwrap();
        assert_eq!(config.place(), "db:6543");
        assert_eq!(config.tls, Tls { mode: TlsMode::VerifyFull, root: Some("a.crt".to_owned()) });
        let shown = format!("{config:?}");
        assert!(shown.contains("shop") && !shown.contains("s3cret"), "{shown}");
    }

    /// Catches the mutants that pass a space on as `+`, as a form has it, and that read a `+` as a space.
    #[test]
    fn a_space_and_a_plus_in_a_parameter_stay_what_they_are() {
        let url = "postgres://db/shop?options=-c%20a=b&application_name=a+b&sslrootcert=/etc/a+b%20c.crt";
        let config = PostgresConfig::from_url(url).unwrap();
        assert_eq!(config.config.get_options(), Some("-c a=b"));
        assert_eq!(config.config.get_application_name(), Some("a+b"));
        assert_eq!(config.tls.root.as_deref(), Some("/etc/a+b c.crt"));
    }

    #[test]
    fn what_is_no_url_is_told_without_the_password() {
        for (url, says) in [
            ("mysql://app:s3cret@db/shop", "postgres://"),
            ("postgres:///shop", "postgres://"),
            ("postgres://app:s3cret@db/shop?sslmode=maybe", "sslmode"),
            ("postgres://app:s3cret@db/shop?nonsense=1", "nonsense"),
            ("postgres://app:s3cret@db:none/shop", "postgres://"),
        ] {
            let error = PostgresConfig::from_url(url).unwrap_err();
            assert_eq!(error.kind(), LogErrorKind::Invalid);
            let text = format!("{error} {error:?}");
            assert!(text.contains(says) && !text.contains("s3cret"), "{text}");
        }
    }
}
