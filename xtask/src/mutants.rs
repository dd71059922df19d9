//! `cargo xtask mutants`: breaks the code on purpose, one promise at a time, and sees that its test notices.
//!
//! A mutant stands in the code as `mutant("name")`, which is `false` but in the build that is made here, with
//! `cfg(outbus_mutants)`: there the environment chooses one. So all of them are built once. The `cfg` comes from a wrapper
//! around rustc, of which cargo knows that only the workspace's own crates are concerned.

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{services, shell};

/// A test that has not ended by then hangs, which is noticed as well.
const DEADLINE: Duration = Duration::from_secs(180);

/// Mutants that are tried at once.
const AT_ONCE: usize = 3;

/// The test programs, by package and target.
type Built = HashMap<(&'static str, &'static str), PathBuf>;

/// A way to break the code, and the test that must notice.
struct Mutant {
    name: &'static str,
    /// The promise it breaks, as design.md counts them.
    promise: &'static str,
    /// The package and its test target; `lib` for the tests beside the code.
    package: &'static str,
    target: &'static str,
    test: &'static str,
}

const fn mutant(
    name: &'static str,
    promise: &'static str,
    package: &'static str,
    target: &'static str,
    test: &'static str,
) -> Mutant {
    Mutant { name, promise, package, target, test }
}

const MUTANTS: &[Mutant] = &[
    mutant(
        "gap-closed-at-sight",
        "I1",
        "outbox",
        "lib",
        "postgres::gaps::model::every_interleaving_keeps_every_promise_in_key_order",
    ),
    mutant(
        "blind-to-prepared",
        "I1",
        "outbox",
        "lib",
        "postgres::gaps::model::every_interleaving_keeps_every_promise_in_key_order",
    ),
    mutant("checkpoint-ahead", "I1", "outbox", "faults", "no_fault_loses_or_reorders_on_a_fail_stop_bus"),
    mutant("holes-forgotten", "I1", "outbox", "faults", "no_fault_loses_or_reorders_on_an_independent_bus"),
    mutant(
        "settled-before-set-aside",
        "I1",
        "outbox",
        "lib",
        "lanes::tests::a_refused_event_holds_its_key_and_is_parked_with_what_follows",
    ),
    mutant(
        "lost-answer-believed",
        "I1",
        "outbox",
        "postgres",
        "a_connection_that_breaks_anywhere_loses_and_reorders_nothing",
    ),
    mutant("other-history-believed", "I1", "outbox", "postgres", "a_restored_dump_repeats_and_skips_nothing"),
    mutant("append-commits-alone", "I2", "outbox", "append_postgres", "by_tokio_postgres"),
    mutant("retry-overtaken", "I3", "outbox", "lib", "lanes::tests::all_promises_hold_on_a_fail_stop_bus"),
    mutant("key-pipelined", "I3", "outbox", "lib", "lanes::tests::all_promises_hold_on_an_independent_bus"),
    mutant("parked-keys-forgotten", "I3", "outbox", "relay", "a_parked_key_stays_parked_under_the_next_owner"),
    mutant("lease-read-once", "I4", "outbox", "postgres", "of_two_relays_that_start_together_one_publishes"),
    mutant("lease-outlived", "I4", "outbox", "relay", "an_owner_that_cannot_renew_stops_and_goes_on_when_it_can"),
    mutant("checkpoints-unawaited", "I6", "outbox", "relay", "a_crash_repeats_no_more_than_the_window_and_4096"),
    mutant(
        "outage-spends-attempts",
        "I7",
        "outbox",
        "lib",
        "lanes::tests::an_outage_spends_no_attempt_and_everything_goes_again_in_order",
    ),
    mutant(
        "held-key-holds-all",
        "I8",
        "outbox",
        "relay",
        "a_refused_event_is_parked_with_its_key_and_retried_in_order",
    ),
    mutant(
        "janitor-forgets-a-sink",
        "I9",
        "outbox",
        "conformance_postgres",
        "nothing_is_removed_before_every_sink_settled_it",
    ),
    mutant("stale-epoch-writes", "I10", "outbox", "conformance_postgres", "a_stale_epoch_moves_nothing"),
    mutant(
        "gap-passed-in-order",
        "I3",
        "outbox",
        "lib",
        "postgres::gaps::model::every_interleaving_keeps_every_promise_in_log_order",
    ),
    mutant("bound-by-xmax", "I1", "outbox", "postgres_faults", "a_gap_is_not_closed_by_the_upper_end_of_a_snapshot"),
    mutant(
        "place-before-xid",
        "I1",
        "outbox",
        "postgres_faults",
        "a_place_that_is_drawn_long_before_its_row_is_published",
    ),
    mutant(
        "failover-read-on",
        "I1",
        "outbox",
        "postgres_faults",
        "a_failover_under_a_relay_that_runs_skips_no_place_that_is_drawn_again",
    ),
    mutant(
        "frozen-owner-stays",
        "I7",
        "outbox",
        "postgres_faults",
        "an_owner_that_freezes_within_a_transaction_is_taken_over_from",
    ),
    mutant(
        "lease-by-host-clock",
        "I10",
        "outbox",
        "postgres_faults",
        "a_lease_is_judged_by_the_databases_clock_that_is_ahead",
    ),
    mutant(
        "insert-awaited-first",
        "-",
        "outbox",
        "append_postgres",
        "by_tokio_postgres_with_the_commit_in_one_round_trip",
    ),
];

/// Tries the mutants whose names contain one of `names`, or all.
pub(crate) fn run(names: &[String]) -> Result<()> {
    let chosen = |mutant: &&Mutant| names.is_empty() || names.iter().any(|name| mutant.name.contains(name.as_str()));
    let chosen: Vec<&Mutant> = MUTANTS.iter().filter(chosen).collect();
    let all: Vec<&str> = MUTANTS.iter().map(|mutant| mutant.name).collect();
    ensure!(!chosen.is_empty(), "no mutant is called so; there are {}", all.join(", "));
    every_mutant_is_tried(&all)?;
    let built = build()?;
    let servers = services::start()?;
    let environment = servers.as_ref().map(services::Started::environment).unwrap_or_default();
    let next = AtomicUsize::new(0);
    let try_next = || -> Result<Vec<&str>> {
        let mut unnoticed = Vec::new();
        while let Some(mutant) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
            if !mutant.is_tried(&built, &environment)? {
                unnoticed.push(mutant.name);
            }
        }
        Ok(unnoticed)
    };
    // A test that notices by waiting for what never comes takes its time, and little else.
    let tried: Vec<Result<Vec<&str>>> = std::thread::scope(|scope| {
        let at_once: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(try_next)).collect();
        at_once.into_iter().map(|one| one.join().expect("no panic")).collect()
    });
    let unnoticed: Vec<&str> = tried.into_iter().collect::<Result<Vec<_>>>()?.concat();
    ensure!(unnoticed.is_empty(), "not noticed: {}", unnoticed.join(", "));
    println!("{} mutants, each noticed by its test", chosen.len());
    Ok(())
}

impl Mutant {
    /// Whether its test notices it, told on stdout.
    fn is_tried(&self, built: &Built, environment: &[(&str, &str)]) -> Result<bool> {
        let test = built.get(&(self.package, self.target));
        let test = test.with_context(|| format!("{} has no test target {}", self.package, self.target))?;
        let started = Instant::now();
        let noticed = self.is_noticed(test, environment)?;
        let says = if noticed { "noticed by" } else { "NOT NOTICED by" };
        println!("{:<4} {:<24} {says} {} ({:.1?})", self.promise, self.name, self.test, started.elapsed());
        Ok(noticed)
    }

    fn is_noticed(&self, test: &Path, environment: &[(&str, &str)]) -> Result<bool> {
        // A test that fails, or is not there, without the mutant would say nothing.
        ensure!(self.passes(test, "none", environment)?, "{} fails without {}", self.test, self.name);
        Ok(!self.passes(test, self.name, environment)?)
    }

    fn passes(&self, test: &Path, mutant: &str, environment: &[(&str, &str)]) -> Result<bool> {
        let mut child = Command::new(test)
            .args(["--include-ignored", "--exact", self.test])
            .envs(environment.iter().copied())
            .envs([("OUTBUS_MUTANT", mutant), ("RUST_BACKTRACE", "0")])
            .current_dir(shell::root().join(self.package))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let started = Instant::now();
        while child.try_wait()?.is_none() && started.elapsed() < DEADLINE {
            std::thread::sleep(Duration::from_millis(20));
        }
        // It may have ended.
        let _ended = child.kill();
        let output = child.wait_with_output()?;
        Ok(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("1 passed"))
    }
}

/// A mutant that stands in the code and not in the list would never be tried.
fn every_mutant_is_tried(listed: &[&str]) -> Result<()> {
    let found = shell::output("git", &["grep", "-hoE", "mutant\\(\"[a-z-]+\"\\)", "--", "*/src/*"])?;
    for line in found.lines() {
        let name = line.split('"').nth(1).unwrap_or_default();
        ensure!(listed.contains(&name) || name == "name", "{name} stands in the code and is not in the list");
    }
    Ok(())
}

/// The test programs by package and target, built so that the environment chooses a mutant.
fn build() -> Result<Built> {
    let mut args = vec!["test", "--quiet", "--no-run", "--message-format=json", "--all-features", "--lib"];
    let mut wanted: Vec<(&str, &str)> = MUTANTS.iter().map(|mutant| (mutant.package, mutant.target)).collect();
    wanted.sort_unstable();
    wanted.dedup();
    let mut last = "";
    for (package, target) in &wanted {
        if *package != last {
            args.extend(["--package", package]);
            last = package;
        }
        if *target != "lib" {
            args.extend(["--test", target]);
        }
    }
    println!("$ cargo {}", args.join(" "));
    let output = Command::new("cargo")
        .args(&args)
        .current_dir(shell::root())
        .env("RUSTC_WORKSPACE_WRAPPER", wrapper()?)
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(output.status.success(), "the mutants do not compile");
    let mut built = HashMap::new();
    for line in String::from_utf8(output.stdout)?.lines() {
        let message: Value = serde_json::from_str(line)?;
        let Some(executable) = message["executable"].as_str().filter(|_| message["profile"]["test"] == true) else {
            continue;
        };
        let manifest = Path::new(message["manifest_path"].as_str().unwrap_or_default());
        let is_lib = message["target"]["kind"][0] == "lib";
        let target = if is_lib { "lib" } else { message["target"]["name"].as_str().unwrap_or_default() };
        let of = |(package, wanted): &&(&str, &str)| {
            shell::root().join(package).join("Cargo.toml") == manifest && *wanted == target
        };
        if let Some(key) = wanted.iter().find(of) {
            built.insert(*key, PathBuf::from(executable));
        }
    }
    Ok(built)
}

/// A program that calls rustc with the `cfg`. Cargo tells its builds from others by its path.
fn wrapper() -> Result<PathBuf> {
    let folder = shell::target().join("mutants");
    fs::create_dir_all(&folder)?;
    let path = folder.join("rustc");
    fs::write(&path, "#!/bin/sh\nexec \"$@\" --cfg outbus_mutants\n")?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}
