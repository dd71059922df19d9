//! `cargo xtask test`

use anyhow::Result;

use crate::{services, shell};

/// Needs root, for it mounts a small disk.
const NEEDS_ROOT: &str = "a_full_disk_is_said_so_and_heals";

/// The versions of PostgreSQL that are supported beside Debian's, which all other tests meet.
pub(crate) const POSTGRES_VERSIONS: [u32; 4] = [14, 16, 17, 18];

/// The test targets that meet PostgreSQL.
const POSTGRES_TESTS: [&str; 9] = [
    "append_postgres",
    "conformance_postgres",
    "postgres",
    "postgres_faults",
    "postgres_review",
    "log_order",
    "inbox_postgres",
    "failpoints",
    "kills",
];
/// They make a standby, for which the programs that npm has are too few.
const NEEDS_STANDBY: [&str; 2] = ["a_standby_is_waited_for", "a_failover_under"];

/// Runs the tests of PostgreSQL against other versions of it.
pub(crate) fn postgres(versions: &[u32]) -> Result<()> {
    let versions = if versions.is_empty() { &POSTGRES_VERSIONS } else { versions };
    for version in versions {
        let server = services::start_postgres(*version)?;
        let mut test = vec!["test", "-p", "outbox", "-p", "outbus", "--all-features"];
        test.extend(POSTGRES_TESTS.iter().flat_map(|name| ["--test", name]));
        test.extend(["--", "--include-ignored"]);
        test.extend(NEEDS_STANDBY.iter().flat_map(|name| ["--skip", name]));
        shell::run("cargo", &test, &server.environment())?;
        println!("PostgreSQL {version}: passed; left out, for they need pg_basebackup: {}", NEEDS_STANDBY.join(", "));
    }
    Ok(())
}

/// Runs every test, against servers that the environment names, or else against some that are started for it. What this
/// machine cannot run is named, not passed over in silence.
pub(crate) fn run(args: &[String]) -> Result<()> {
    let mut cargo = vec!["test", "--workspace", "--all-features"];
    cargo.extend(args.iter().map(String::as_str));
    if !args.iter().any(|arg| arg == "--") {
        cargo.push("--");
    }
    cargo.push("--include-ignored");
    let is_root = shell::output("id", &["-u"])?.trim() == "0";
    if !is_root {
        cargo.extend(["--skip", NEEDS_ROOT]);
    }
    let servers = services::start()?;
    let environment = servers.as_ref().map(services::Started::environment).unwrap_or_default();
    shell::run("cargo", &cargo, &environment)?;
    drop(servers);
    if !is_root {
        println!("\nLeft out, for it needs root: {NEEDS_ROOT}. Run `sudo -E cargo xtask test` to include it.");
    }
    Ok(())
}
