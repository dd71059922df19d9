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
    /// The variables by which tests find them.
    environment: Vec<(String, String)>,
}

/// Starts what the environment does not name.
pub(crate) fn start() -> Result<Option<Started>> {
    let missing: Vec<&str> = VARIABLES.into_iter().filter(|name| env::var_os(name).is_none()).collect();
    if missing.is_empty() {
        return Ok(None);
    }
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
    let script = script().display().to_string();
    let mut up = vec!["up"];
    up.extend(WANTED);
    shell::run(&script, &up, &[])?;
    let exports = shell::output(&script, &["env"])?;
    let export = |line: &str| {
        let (name, value) = line.strip_prefix("export ")?.split_once('=')?;
        Some((name.to_owned(), value.trim_matches('\'').to_owned()))
    };
    Ok(Some(Started { environment: exports.lines().filter_map(export).collect() }))
}

impl Started {
    /// The variables, as a command takes them.
    pub(crate) fn environment(&self) -> Vec<(&str, &str)> {
        self.environment.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect()
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Err(error) = run(&["down".to_owned()]) {
            println!("the servers could not be stopped: {error}");
        }
    }
}
