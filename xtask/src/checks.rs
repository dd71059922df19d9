//! `cargo xtask ci`: what must be green before a change lands.

use anyhow::{Result, bail, ensure};

use crate::{mutants, shell, tests};

/// A crate, and the libraries that must not be among its dependencies: they point one way only.
const FORBIDDEN: [(&str, &[&str]); 4] = [
    ("bus-core", &["sqlx", "tokio-postgres", "rdkafka", "lapin", "redis", "outbox", "clap"]),
    ("bus", &["sqlx", "tokio-postgres", "outbox", "clap"]),
    ("outbox", &["openssl", "native-tls", "rdkafka", "lapin", "redis", "bus", "clap"]),
    ("outbus", &["openssl", "native-tls"]),
];

pub(crate) fn run() -> Result<()> {
    shell::cargo(&["fmt", "--all", "--check"])?;
    shell::cargo(&["clippy", "--workspace", "--all-targets", "--all-features", "--", "-D", "warnings"])?;
    // One by one: in a workspace the members' features add up.
    for package in ["bus-core", "bus", "outbox"] {
        shell::cargo(&["clippy", "-p", package, "--no-default-features", "--", "-D", "warnings"])?;
    }
    for features in ["sqlite", "postgres", "sqlx-postgres", "deadpool-postgres", "diesel-async"] {
        let clippy = ["clippy", "-p", "outbox", "--no-default-features", "--features", features];
        shell::cargo(&[clippy.as_slice(), &["--", "-D", "warnings"]].concat())?;
    }
    let documented = ["doc", "--workspace", "--all-features", "--no-deps"];
    shell::run("cargo", &documented, &[("RUSTDOCFLAGS", "-D warnings")])?;
    dependencies_point_one_way()?;
    licences_and_sources()?;
    spelling()?;
    tests::run(&[])?;
    mutants::run(&[])
}

fn dependencies_point_one_way() -> Result<()> {
    for (package, forbidden) in FORBIDDEN {
        let tree =
            shell::output("cargo", &["tree", "-p", package, "-e", "normal", "--prefix", "none", "--all-features"])?;
        // The first line is the package itself.
        let found = tree.lines().skip(1).find(|line| forbidden.contains(&line.split(' ').next().unwrap_or_default()));
        if let Some(found) = found {
            bail!("{package} must not depend on {found}");
        }
        println!("{package}: none of {}", forbidden.join(", "));
    }
    Ok(())
}

fn licences_and_sources() -> Result<()> {
    ensure!(shell::find("cargo-deny").is_some(), "cargo-deny is missing: cargo install --locked cargo-deny");
    shell::cargo(&["deny", "--all-features", "check", "bans", "licenses", "sources"])
}

/// Where `typos` is installed, as in CI.
fn spelling() -> Result<()> {
    match shell::find("typos") {
        Some(_) => shell::run("typos", &[], &[]),
        None => {
            println!("typos is not installed here: the spelling is checked in CI (pip install typos)");
            Ok(())
        }
    }
}
