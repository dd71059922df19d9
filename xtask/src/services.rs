//! `cargo xtask services`: real servers for the tests, as ordinary processes on private ports.

use std::{env, path::PathBuf};

use anyhow::{Result, bail};

use crate::shell;

/// The servers that tests need so far.
const WANTED: [&str; 2] = ["postgres", "pgbouncer"];
/// A variable per server: where all are set, nothing is started.
const VARIABLES: [&str; 2] = ["OUTBUS_TEST_POSTGRES_URL", "OUTBUS_TEST_PGBOUNCER_URL"];

fn script() -> PathBuf {
    shell::root().join("services/services")
}

/// Passes a command on to the script.
pub(crate) fn run(args: &[String]) -> Result<()> {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    shell::run(&script().display().to_string(), &args, &[])
}

/// Servers that were started for one run of the tests.
#[derive(Debug)]
pub(crate) struct Started {
    /// The script's settings.
    settings: Vec<(String, String)>,
    /// The variables by which tests find them.
    environment: Vec<(String, String)>,
}

/// Starts what the environment does not name.
pub(crate) fn start() -> Result<Option<Started>> {
    start_unless_named(&[])
}

/// The same with the level of write-ahead log that PostgreSQL has by default: figures are about that.
pub(crate) fn start_for_figures() -> Result<Option<Started>> {
    start_unless_named(&[("SERVICES_POSTGRES_OPTIONS", "-c wal_level=replica")])
}

fn start_unless_named(settings: &[(&str, &str)]) -> Result<Option<Started>> {
    let missing: Vec<&str> = VARIABLES.into_iter().filter(|name| env::var_os(name).is_none()).collect();
    if missing.is_empty() {
        return Ok(None);
    }
    can_start(&missing)?;
    start_with(settings).map(Some)
}

/// Starts PostgreSQL of another version, with a pooler before it, beside whatever runs.
pub(crate) fn start_postgres(version: u32) -> Result<Started> {
    let dir = shell::target().join(format!("services-postgres-{version}"));
    let cache = shell::target().join("services-cache");
    start_with(&[
        ("SERVICES_POSTGRES_VERSION", &version.to_string()),
        ("SERVICES_DIR", &dir.display().to_string()),
        ("SERVICES_CACHE", &cache.display().to_string()),
        ("SERVICES_PORT_OFFSET", &(version * 10).to_string()),
    ])
}

/// Whether the script can run here.
fn can_start(missing: &[&str]) -> Result<()> {
    let is_debian = shell::find("apt-get").is_some();
    let is_root = shell::output("id", &["-u"])?.trim() == "0";
    let is_there = shell::find("pgbouncer").is_some() && PathBuf::from("/usr/lib/postgresql").exists();
    let can_install = is_debian && is_root;
    if !is_there && !can_install {
        bail!(
            "the tests need servers: set {}, or run this on Debian or Ubuntu as root, where they are installed and \
             started as ordinary processes (services/services help)",
            missing.join(" and ")
        );
    }
    Ok(())
}

fn start_with(settings: &[(&str, &str)]) -> Result<Started> {
    let script = script().display().to_string();
    let mut up = vec!["up"];
    up.extend(WANTED);
    shell::run(&script, &up, settings)?;
    let exports = shell::output_with(&script, &["env"], settings)?;
    let export = |line: &str| {
        let (name, value) = line.strip_prefix("export ")?.split_once('=')?;
        Some((name.to_owned(), value.trim_matches('\'').to_owned()))
    };
    let settings = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Ok(Started { settings, environment: exports.lines().filter_map(export).collect() })
}

impl Started {
    /// The variables, as a command takes them; with the script's settings, for tests that start servers of their own.
    pub(crate) fn environment(&self) -> Vec<(&str, &str)> {
        let all = self.settings.iter().chain(&self.environment);
        all.map(|(name, value)| (name.as_str(), value.as_str())).collect()
    }

    fn settings(&self) -> Vec<(&str, &str)> {
        self.settings.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect()
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Err(error) = shell::run(&script().display().to_string(), &["down"], &self.settings()) {
            println!("the servers could not be stopped: {error}");
        }
    }
}
