//! [`Failure`]: why a command failed, and with which exit status.

use std::{fmt, io::ErrorKind, process::ExitCode};

use bus_core::BusError;
use outbox::{LogError, LogErrorKind, RelayError};
use serde::Serialize;

use crate::cli::Format;

/// Why a command failed.
#[derive(Debug)]
pub(crate) struct Failure {
    status: Status,
    /// One word for scripts.
    kind: &'static str,
    message: String,
    /// The line of input at fault, from 1.
    line: Option<u64>,
    /// Events committed before.
    committed: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    /// Nobody reads the results any more: that is no failure.
    Quiet,
    Runtime,
    Usage,
}

impl Failure {
    /// Failed at run time: exit status 1.
    pub(crate) fn runtime(kind: &'static str, message: impl Into<String>) -> Self {
        Self { status: Status::Runtime, kind, message: message.into(), line: None, committed: None }
    }

    /// Wrong usage or configuration: exit status 2.
    pub(crate) fn usage(kind: &'static str, message: impl Into<String>) -> Self {
        Self { status: Status::Usage, ..Self::runtime(kind, message) }
    }

    /// In the relay of this sink.
    pub(crate) fn of_sink(mut self, sink: &str) -> Self {
        self.message = format!("sink {sink}: {}", self.message);
        self
    }

    /// At this line of input.
    pub(crate) fn at_line(mut self, line: u64) -> Self {
        self.line = Some(line);
        self
    }

    /// After so many events were committed.
    pub(crate) fn after(mut self, committed: u64) -> Self {
        self.committed = Some(committed);
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        f.write_str(&self.message)?;
        match self.committed {
            Some(committed) => write!(f, " ({committed} events were committed before)"),
            None => Ok(()),
        }
    }
}

/// What is wrong with a database: what may heal is a failure of the moment, what cannot is one of configuration.
impl From<LogError> for Failure {
    fn from(error: LogError) -> Self {
        let kind = match error.kind() {
            LogErrorKind::Unavailable => "database_unavailable",
            LogErrorKind::Fenced => "fenced",
            LogErrorKind::Schema => "database_schema",
            LogErrorKind::Denied => "database_denied",
            LogErrorKind::Invalid => "database_invalid",
        };
        let message = error.to_string();
        if error.kind().may_heal() { Self::runtime(kind, message) } else { Self::usage(kind, message) }
    }
}

impl From<BusError> for Failure {
    fn from(error: BusError) -> Self {
        let (kind, message) = (error.kind().as_str(), error.to_string());
        match error.kind() {
            bus_core::ErrorKind::Invalid => Self::usage(kind, message),
            _ => Self::runtime(kind, message),
        }
    }
}

impl From<RelayError> for Failure {
    fn from(error: RelayError) -> Self {
        match error {
            RelayError::Config(message) => Self::usage("config", message),
            RelayError::Bus(error) => error.into(),
            RelayError::Log(error) => error.into(),
            RelayError::Halted { .. } => Self::runtime("halted", error.to_string()),
            RelayError::Owned { .. } => Self::runtime("owned", error.to_string()),
            other => Self::runtime("relay", other.to_string()),
        }
    }
}

/// Writing results failed. A reader that left, as `head` does, ends the command quietly.
impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        let failure = Self::runtime("output", format!("cannot write the results: {error}"));
        match error.kind() {
            ErrorKind::BrokenPipe => Self { status: Status::Quiet, ..failure },
            _ => failure,
        }
    }
}

#[derive(Serialize)]
struct Report<'a> {
    error: Details<'a>,
}

#[derive(Serialize)]
struct Details<'a> {
    kind: &'a str,
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    committed: Option<u64>,
}

/// Writes the failure to stderr and answers the exit status.
pub(crate) fn report(failure: &Failure, format: Format) -> ExitCode {
    if failure.status == Status::Quiet {
        return ExitCode::SUCCESS;
    }
    let text = match format {
        Format::Text => format!("error: {failure}"),
        Format::Json => {
            let Failure { kind, message, line, committed, .. } = failure;
            let error = Details { kind, message, line: *line, committed: *committed };
            serde_json::to_string(&Report { error }).unwrap_or_else(|error| error.to_string())
        }
    };
    crate::output::to_stderr(&text);
    match failure.status {
        Status::Usage => ExitCode::from(2),
        _ => ExitCode::FAILURE,
    }
}
