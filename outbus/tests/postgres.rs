//! The command line on a real PostgreSQL: every command, and everything that can be wrong with the database.

mod support;

use support::{Folder, PostgresDatabase, finish, lines};

#[test]
#[ignore = "needs PostgreSQL: cargo xtask test"]
fn every_command_works_on_postgres() {
    let (folder, database) = (Folder::new(), PostgresDatabase::create());
    let url = database.url.as_str();
    let bus = folder.bus_url();
    let early = folder.run(&["status", "--database", url, "--output", "json"]).is(2);
    assert!(early.error()["message"].as_str().expect("a message").contains("outbus migrate"), "{early:?}");
    let migrated = folder.run(&["migrate", "--database", url, "--output", "json"]).ok().json();
    assert_eq!(migrated["applied"], serde_json::json!(["outbox"]));
    assert_eq!(
        folder.run(&["migrate", "--database", url, "--output", "json"]).ok().json()["applied"],
        serde_json::json!([])
    );
    assert!(
        folder.run(&["migrate", "--database", url, "--print"]).ok().stdout.contains("CREATE TABLE \"outbus\".outbox")
    );

    folder.write("events.jsonl", &lines("e", 2_500));
    let appended = folder.run(&["append", "--database", url, "--file", "events.jsonl", "--output", "json"]).ok().json();
    assert_eq!(appended["events"], 2_500);
    let bad = folder
        .run_with_input(&["append", "--database", url, "--output", "json"], b"{\"topic\":\"a/b\",\"type\":\"t\"}\n");
    assert_eq!((bad.status, &bad.error()["line"], &bad.error()["committed"]), (1, &1.into(), &0.into()));
    let status = folder.run(&["status", "--database", url, "--output", "json"]).ok().json()["logs"][0].clone();
    assert_eq!((&status["sink"], &status["backlog"]), (&serde_json::Value::Null, &2_500.into()));

    // A row that is no event is parked with its key, shown, and discarded.
    database.run("INSERT INTO outbus.outbox (topic, key, type, data) VALUES ('orders', 'k0', '', '1')");
    let once = ["relay", "--once", "--database", url, "--bus", &bus, "--output", "json"];
    let relayed = folder.run(&once).is(1).json();
    assert_eq!((&relayed["published"], &relayed["parked"]), (&2_500.into(), &1.into()));
    assert_eq!(folder.published("orders").len(), 2_500);
    let dead = folder.run(&["dead", "list", "--database", url, "--output", "json"]).ok().json();
    assert_eq!((&dead["dead"][0]["reason"], &dead["dead"][0]["state"]), (&"invalid".into(), &"parked".into()));
    let id = dead["dead"][0]["id"].as_str().expect("an id").to_owned();
    assert!(folder.run(&["dead", "show", "--database", url, &id]).ok().stdout.contains("type"));
    folder.run(&["dead", "discard", "--database", url, &id]).ok();
    folder.run(&once).ok();

    let sinks = folder.run(&["sinks", "list", "--database", url, "--output", "json"]).ok().json();
    assert_eq!(sinks["sinks"][0]["sink"], "main");
    folder.run(&["sinks", "remove", "--database", url, "main"]).ok();
}

/// A second relay is a standby that says so; through PgBouncer, which gives each transaction another connection, polling
/// alone carries the road.
#[test]
#[ignore = "needs PostgreSQL: cargo xtask test"]
fn a_standby_takes_over_and_a_pooler_is_no_obstacle() {
    let (folder, database) = (Folder::new(), PostgresDatabase::create());
    folder.run(&["migrate", "--database", &database.pooled_url]).ok();
    let bus = folder.bus_url();
    let relay = ["relay", "--database", &database.pooled_url, "--bus", &bus];
    let owner = folder.command(&relay).spawn().expect("it starts");
    let status =
        || folder.run(&["status", "--database", &database.url, "--output", "json"]).ok().json()["logs"][0].clone();
    support::until("an owner", || {
        status()["owner"].as_str().is_some_and(|name| name.ends_with(&format!(":{}", owner.id())))
    });
    let standby = folder.command(&relay).spawn().expect("it starts");
    folder.write("events.jsonl", &lines("a", 500));
    folder.run(&["append", "--database", &database.pooled_url, "--file", "events.jsonl"]).ok();
    support::until("all events", || folder.published("orders").len() == 500);
    support::signal(owner.id(), "TERM");
    assert!(finish(owner).ok().stderr.contains("owner of outbox"));
    support::until("the standby owns it", || {
        status()["owner"].as_str().is_some_and(|name| name.ends_with(&format!(":{}", standby.id())))
    });
    folder.write("more.jsonl", &lines("b", 500));
    folder.run(&["append", "--database", &database.pooled_url, "--file", "more.jsonl"]).ok();
    support::until("all events", || folder.published("orders").len() == 1_000);
    support::signal(standby.id(), "TERM");
    assert!(finish(standby).ok().stderr.contains("standby of"));
}

/// Each wrong database is a sentence with its remedy: exit 2 where nothing heals by itself, 1 where it may.
#[test]
#[ignore = "needs PostgreSQL: cargo xtask test"]
fn what_is_wrong_with_the_database_is_said_in_a_sentence() {
    let (folder, database) = (Folder::new(), PostgresDatabase::create());
    folder.run(&["migrate", "--database", &database.url]).ok();
    database.run(
        "CREATE ROLE narrow LOGIN PASSWORD 'narrow'; GRANT USAGE ON SCHEMA outbus TO narrow; \
         GRANT SELECT ON outbus.migration TO narrow",
    );
    let other = |from: &str, to: &str| database.url.replace(from, to);
    let cases = [
        (other("outbus:outbus@", "outbus:wr0ng@"), 2, "user and password"),
        (other("outbus:outbus@", "narrow:narrow@"), 2, "grant"),
        (other(&format!("/{}", database.name), "/nowhere"), 2, "create the database"),
        (other("@127.0.0.1:", "@127.0.0.1:1"), 2, "postgres://"),
        (format!("postgres://outbus:s3cret@127.0.0.1:9/{}", database.name), 1, "cannot be reached"),
        (format!("{}?sslmode=require", database.pooled_url), 2, "TLS"),
        (format!("{}?sslmode=verify-full", other("@127.0.0.1:", "@localhost:")), 2, "certificate"),
        (format!("{}?sslmode=verify-full&sslrootcert={}", database.url, database.ca), 0, ""),
        (format!("{}?sslmode=verify-ca&sslrootcert={}", database.url, database.ca), 0, ""),
        (format!("{}?sslmode=verify-full&sslrootcert=/none", database.url), 2, "sslrootcert"),
    ];
    for (url, status, says) in cases {
        let ran = folder.run(&["status", "--database", &url]);
        assert_eq!(ran.status, status, "{url}: {ran:?}");
        assert!(ran.stderr.contains(says), "{url}: {}", ran.stderr);
        for secret in ["wr0ng", "s3cret", "outbus:outbus"] {
            assert!(!ran.stderr.contains(secret) && !ran.stdout.contains(secret), "{}", ran.stderr);
        }
    }
    let ascii = format!("{}_ascii", database.name);
    database.run(&format!("CREATE DATABASE {ascii} ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0"));
    let ascii_url = other(&format!("/{}", database.name), &format!("/{ascii}"));
    let encoded = folder.run(&["migrate", "--database", &ascii_url]).is(2);
    assert!(encoded.stderr.contains("ENCODING 'UTF8'"), "{}", encoded.stderr);
    database.run(&format!("DROP DATABASE {ascii}"));
    database.run("INSERT INTO outbus.migration (version, name) VALUES (99, 'from the future')");
    let newer = folder.run(&["relay", "--once", "--database", &database.url, "--bus", &folder.bus_url()]).is(2);
    assert!(newer.stderr.contains("newer outbus"), "{}", newer.stderr);
    database.run("DELETE FROM outbus.migration");
    let older = folder.run(&["append", "--database", &database.url]).is(2);
    assert!(older.stderr.contains("outbus migrate"), "{}", older.stderr);
    database.run("DROP OWNED BY narrow; DROP ROLE narrow");
}
