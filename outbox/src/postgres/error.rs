//! The one place where PostgreSQL's errors get their kind.

use std::{borrow::Cow, error::Error as _};

use tokio_postgres::error::{DbError, SqlState};

use super::config::PostgresConfig;
use crate::{LogError, LogErrorKind};

/// What a client's error means: also for code that uses the database beside the outbox.
pub fn log_error(error: tokio_postgres::Error) -> LogError {
    let (kind, message) = match error.as_db_error() {
        Some(database) => classify(database),
        None if error.is_closed() => (LogErrorKind::Unavailable, "the connection to PostgreSQL broke".into()),
        None => match error.source() {
            Some(cause) if cause.is::<std::io::Error>() => {
                (LogErrorKind::Unavailable, format!("the connection to PostgreSQL broke: {cause}").into())
            }
            cause => {
                let cause = cause.map_or_else(String::new, |cause| format!(": {cause}"));
                (LogErrorKind::Invalid, format!("PostgreSQL answered something unexpected: {error}{cause}").into())
            }
        },
    };
    LogError::with_source(kind, message, error)
}

/// Why a connection could not be opened.
pub(super) fn connect_error(config: &PostgresConfig, error: tokio_postgres::Error) -> LogError {
    let place = config.place();
    if let Some(database) = error.as_db_error() {
        let (kind, message) = classify(database);
        return LogError::with_source(kind, format!("PostgreSQL at {place}: {message}"), error);
    }
    let cause = error.source().map_or_else(|| error.to_string(), ToString::to_string);
    let (kind, message) = if cause.contains("server does not support TLS") {
        let remedy = "switch TLS on at the server, or use sslmode=disable";
        (LogErrorKind::Denied, format!("PostgreSQL at {place} offers no TLS: {remedy}"))
    } else if cause.contains("certificate") {
        (LogErrorKind::Denied, format!("PostgreSQL at {place} has a certificate that is not trusted: {cause}"))
    } else if cause.contains("password missing") {
        (LogErrorKind::Denied, format!("PostgreSQL at {place} wants a password: put one into the URL"))
    } else {
        (LogErrorKind::Unavailable, format!("PostgreSQL at {place} cannot be reached: {cause}"))
    };
    LogError::with_source(kind, message, error)
}

/// No answer came in time.
pub(super) fn timed_out(what: &str) -> LogError {
    LogError::new(LogErrorKind::Unavailable, format!("PostgreSQL did not answer in time: {what}"))
}

/// Source: postgresql.org/docs/current/errcodes-appendix.html; the first two characters are the class.
fn classify(error: &DbError) -> (LogErrorKind, Cow<'static, str>) {
    classify_code(error.code().code(), error.message())
}

/// The same by the code and the message, whatever client got them.
pub(super) fn classify_code(code: &str, text: &str) -> (LogErrorKind, Cow<'static, str>) {
    use LogErrorKind::{Denied, Invalid, Schema, Unavailable};
    let code = &SqlState::from_code(code);
    let with = |message: &str| Cow::Owned(format!("{message}: {text}"));
    if *code == SqlState::UNDEFINED_TABLE || *code == SqlState::INVALID_SCHEMA_NAME {
        return (Schema, with("run `outbus migrate`"));
    }
    if *code == SqlState::UNDEFINED_COLUMN || *code == SqlState::UNDEFINED_FUNCTION {
        return (Schema, with("the tables are not those of this build; run `outbus migrate`"));
    }
    if *code == SqlState::INSUFFICIENT_PRIVILEGE {
        return (Denied, with("a grant is missing (docs/postgres.md lists them)"));
    }
    if *code == SqlState::READ_ONLY_SQL_TRANSACTION {
        return (
            Unavailable,
            with(
                "the server is a read-only standby; point the URL at the primary, or switch default_transaction_read_only off",
            ),
        );
    }
    if *code == SqlState::INVALID_CATALOG_NAME {
        return (Schema, with("create the database first"));
    }
    if *code == SqlState::INVALID_PASSWORD || *code == SqlState::INVALID_AUTHORIZATION_SPECIFICATION {
        return (Denied, with("check user and password of the URL"));
    }
    if *code == SqlState::TOO_MANY_CONNECTIONS {
        return (
            Unavailable,
            with("raise max_connections (or the connection limit of the role or database), or use a pooler"),
        );
    }
    // As when the connection broke: we slept in the middle of a transaction.
    if *code == SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT {
        return (Unavailable, text.to_owned().into());
    }
    if *code == SqlState::CHECK_VIOLATION {
        return (Invalid, with("the table refuses the event"));
    }
    match code.code().get(..2).unwrap_or_default() {
        // Connection, transaction rolled back, resources, not in the right state, operator, system.
        "08" | "40" | "53" | "55" | "57" | "58" => (Unavailable, text.to_owned().into()),
        _ => (Invalid, format!("PostgreSQL refuses the statement: {text} ({})", code.code()).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What heals by itself, or by somebody's work at the server, must not end a relay.
    #[test]
    fn what_may_heal_is_told_from_what_may_not() {
        for code in ["08006", "25006", "25P03", "40001", "40P01", "53300", "55P03", "57P01", "57P02", "57P03", "58030"]
        {
            assert_eq!(classify_code(code, "").0, LogErrorKind::Unavailable, "{code}");
        }
        for code in ["0A000", "22P02", "25001", "42601"] {
            assert_eq!(classify_code(code, "").0, LogErrorKind::Invalid, "{code}");
        }
    }
}
