//! The command line, run as a user runs it: results, exit status, and a clear answer to every kind of bad input.

mod support;

use std::{
    io::{BufRead, BufReader, Read, Write},
    process::Stdio,
};

use support::{Folder, finish, lines, root, signal, until};

const SHOP: [&str; 2] = ["--database", "sqlite:shop.db"];

fn with<'a>(args: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    [args, more].concat()
}

#[test]
fn the_demo_loses_and_reorders_nothing() {
    let demo = Folder::new().run(&["demo", "--events", "5000", "--output", "json"]).ok().json();
    assert_eq!((&demo["committed"], &demo["published"]), (&5_000.into(), &5_000.into()));
    assert_eq!((&demo["lost"], &demo["reordered"], &demo["duplicates"]), (&0.into(), &0.into(), &0.into()));
    assert_eq!(demo["delivered"], serde_json::json!({"billing": 5_000, "shipping": 5_000}));
    assert!(demo["seconds"].is_number());
}

#[test]
fn the_demo_survives_the_death_of_its_relay() {
    let demo = Folder::new()
        .run(&["demo", "--events", "10000", "--kill-relay", "--seed", "7", "--output", "json"])
        .ok()
        .json();
    assert!(demo["kills"].as_u64().is_some_and(|kills| kills >= 2), "{demo}");
    assert_eq!((&demo["lost"], &demo["reordered"], &demo["invented"]), (&0.into(), &0.into(), &0.into()));
    assert_eq!(demo["delivered"], serde_json::json!({"billing": 10_000, "shipping": 10_000}));
}

#[test]
fn the_demo_takes_the_users_own_events_and_keeps_a_named_database() {
    let folder = Folder::new();
    let file = root().join("examples/orders.jsonl");
    let args = ["demo", "--file", file.to_str().expect("UTF-8"), "--database", "sqlite:kept.db", "--output", "json"];
    for run in 1..=2 {
        let demo = folder.run(&args).ok().json();
        assert_eq!((&demo["committed"], &demo["lost"], &demo["reordered"]), (&60.into(), &0.into(), &0.into()));
        let status = folder.run(&["status", "--database", "sqlite:kept.db", "--output", "json"]).ok().json();
        assert_eq!((&status["logs"][0]["backlog"], &status["logs"][0]["high"]), (&0.into(), &(60 * run).into()));
    }
    folder.write(
        "bad.jsonl",
        "{\"topic\":\"orders\",\"type\":\"order.placed\"}\n{\"topic\":\"or/ders\",\"type\":\"t\"}\n",
    );
    let bad = folder.run(&["demo", "--file", "bad.jsonl"]).is(1);
    assert!(bad.stderr.contains("line 2") && bad.stderr.contains("`topic`"), "{}", bad.stderr);
    folder.run(&["demo", "--file", "missing.jsonl"]).is(2);
    folder.run(&["demo", "--events", "0"]).is(2);
}

#[test]
fn migrate_can_be_repeated_and_printed() {
    let folder = Folder::new();
    let migrate = with(&["migrate", "--output", "json"], &SHOP);
    assert_eq!(folder.run(&migrate).ok().json()["applied"], serde_json::json!(["outbox"]));
    assert_eq!(folder.run(&migrate).ok().json()["applied"], serde_json::json!([]));
    let print = ["migrate", "--database", "sqlite:other.db", "--print"];
    let json = folder.run(&with(&print, &["--output", "json"])).ok().json();
    assert!(json["sql"].as_str().is_some_and(|sql| sql.contains("CREATE TABLE outbus_outbox")), "{json}");
    let printed = folder.run(&print).ok();
    assert!(printed.stdout.contains("CREATE TABLE outbus_outbox"));
    assert!(!folder.path("other.db").exists(), "printing touches nothing");
}

#[test]
fn append_relay_and_status_are_the_road() {
    let folder = Folder::migrated();
    let appended = folder
        .run_with_input(&with(&["append", "--output", "json", "--per-tx", "7"], &SHOP), lines("a", 50).as_bytes());
    assert_eq!(appended.ok().json()["events"], 50);
    folder.write("more.jsonl", &lines("b", 10));
    folder.run(&with(&["append", "--file", "more.jsonl"], &SHOP)).ok();
    folder.run_with_input(&with(&["append", "-"], &SHOP), lines("c", 5).as_bytes()).ok();
    let unread = folder.status();
    assert_eq!(
        (&unread["backlog"], &unread["sink"], &unread["unclaimed"]),
        (&65.into(), &serde_json::Value::Null, &65.into())
    );

    let bus = folder.bus_url();
    let relay = with(&["relay", "--once", "--bus", &bus, "--output", "json"], &SHOP);
    let relayed = folder.run(&relay).ok();
    assert!(relayed.stderr.contains("owner of outbox for sink main (epoch 1)"), "{}", relayed.stderr);
    let relayed = relayed.json();
    assert_eq!((&relayed["events"], &relayed["published"]), (&65.into(), &65.into()));
    for name in ["failed", "duplicates", "parked", "dead"] {
        assert_eq!(relayed[name], 0, "{name}");
    }
    let published = folder.published("orders");
    assert_eq!((published.len(), published[0].as_str(), published[64].as_str()), (65, "a-0", "c-4"));
    assert_eq!(folder.run(&relay).ok().json()["events"], 0, "nothing twice");
    let status = folder.status();
    assert_eq!((&status["log"], &status["sink"], &status["backlog"]), (&"outbox".into(), &"main".into(), &0.into()));
    assert_eq!((&status["backlog_exact"], &status["holes"], &status["low"]), (&true.into(), &0.into(), &65.into()));
    for name in ["oldest_age_seconds", "owner", "lease_seconds_left", "oldest_transaction"] {
        assert!(status[name].is_null(), "{name}");
    }
    let text = folder.run(&with(&["status"], &SHOP)).ok().stdout;
    assert!(text.starts_with("log") && text.contains("outbox") && text.contains("main"), "{text}");
    let sinks = folder.run(&with(&["sinks", "list", "--output", "json"], &SHOP)).ok().json();
    assert_eq!((&sinks["sinks"][0]["sink"], &sinks["sinks"][0]["bus"]), (&"main".into(), &bus.as_str().into()));
    folder.run(&with(&["sinks", "remove", "main"], &SHOP)).ok();
    folder.run(&with(&["sinks", "remove", "main"], &SHOP)).is(1);
    assert_eq!(folder.run(&relay).ok().json()["events"], 65, "a removed sink begins anew");
}

/// What is wrong with a line is named; what was committed before stays, of its transaction nothing does.
#[test]
fn a_bad_line_stops_append_before_its_transaction_commits() {
    let good = "{\"topic\":\"orders\",\"type\":\"order.placed\"}";
    let long_id = format!("{{\"topic\":\"orders\",\"type\":\"t\",\"id\":\"{}\"}}", "x".repeat(300));
    let large = format!("{{\"topic\":\"orders\",\"type\":\"t\",\"data\":\"{}\"}}", "x".repeat(1 << 20));
    let endless = "x".repeat((16 << 20) + 1);
    for (bad, kind, named) in [
        ("{\"topic\":", "invalid_event", "`event`"),
        ("{\"topic\":\"orders\",\"type\":\"\"}", "invalid_event", "`type`"),
        ("{\"type\":\"order.placed\"}", "invalid_event", "`topic`"),
        ("{\"topic\":\"or/ders\",\"type\":\"order.placed\"}", "invalid_event", "`topic`"),
        (&long_id, "invalid_event", "`id`"),
        (&large, "invalid_event", "`data`"),
        (&endless, "line_too_long", "longer than"),
        ("{\"topic\":\"orders\",\"type\":\"t\",\"key\":{}}", "invalid_event", "`key`"),
    ] {
        let folder = Folder::migrated();
        let input = format!("{}{bad}\n{good}\n", format!("{good}\n").repeat(5));
        let args = with(&["append", "--per-tx", "2", "--output", "json"], &SHOP);
        let error = folder.run_with_input(&args, input.as_bytes()).is(1).error();
        assert_eq!(
            (&error["kind"], &error["line"], &error["committed"]),
            (&kind.into(), &6.into(), &4.into()),
            "{error}"
        );
        assert!(error["message"].as_str().is_some_and(|message| message.contains(named)), "{error}");
        assert_eq!(folder.status()["backlog"], 4, "{named}");
        let text = folder.run_with_input(&with(&["append"], &SHOP), input.as_bytes()).is(1).stderr;
        assert!(text.starts_with("error: line 6: ") && text.contains("0 events were committed"), "{text}");
    }
}

/// Each a sentence that names the thing and the remedy; nothing is retried that cannot heal.
#[test]
fn what_is_no_outbox_is_said_so_with_status_2() {
    let folder = Folder::migrated();
    folder.write("text.db", &"this is no database ".repeat(200));
    folder.write("empty.db", "");
    let bus = folder.bus_url();
    for (url, named) in [
        ("sqlite:missing.db", "missing.db: there is no such file: run `outbus migrate`"),
        ("sqlite:text.db", "text.db: the file is not a SQLite database"),
        ("sqlite:empty.db", "run `outbus migrate`"),
        ("sqlite::memory:", "needs a file"),
        ("mysql://localhost/x", "sqlite:"),
        ("postgres://u:s3cret@localhost/x?sslmode=maybe", "sslmode"),
        ("nonsense", "sqlite:"),
    ] {
        for command in [&["append"][..], &["relay", "--bus", &bus], &["status"], &["dead", "list"], &["sinks", "list"]]
        {
            let ran = folder.run(&with(command, &["--database", url])).is(2);
            assert!(ran.stderr.contains(named), "{command:?} {url}: {}", ran.stderr);
            assert!(!ran.stderr.contains("s3cret") && ran.stderr.lines().count() == 1, "{}", ran.stderr);
        }
    }
    assert!(!folder.path("missing.db").exists(), "only demo and migrate create anything");
    for command in ["migrate", "demo"] {
        let ran = folder.run(&[command, "--database", "sqlite:text.db"]).is(2);
        assert!(ran.stderr.contains("text.db: the file is not a SQLite database"), "{command}: {}", ran.stderr);
    }
    let read_only =
        folder.run_with_input(&["append", "--database", "sqlite:shop.db?mode=ro"], lines("a", 1).as_bytes());
    assert!(read_only.is(1).stderr.contains("read-only"));
    let read_only = folder.run(&["relay", "--bus", &bus, "--database", "sqlite:shop.db?mode=ro"]).is(2);
    assert!(read_only.stderr.contains("read-only"), "{}", read_only.stderr);
    folder.run(&["status", "--database", "sqlite:shop.db?mode=ro"]).ok();
}

#[test]
fn what_is_missing_or_wrong_on_the_command_line_is_status_2() {
    let folder = Folder::migrated();
    let bus = folder.bus_url();
    for (args, named) in [
        (vec!["status"], "--database"),
        (vec!["relay", "--database", "sqlite:shop.db"], "--bus"),
        (
            vec!["relay", "--database", "sqlite:shop.db", "--bus", "memory://"],
            "memory lives in one process; use outbus demo or the library",
        ),
        (
            vec!["relay", "--database", "sqlite:shop.db", "--bus", "kafka://localhost:9092"],
            "no kafka:// yet: use file:///",
        ),
        (vec!["relay", "--database", "sqlite:shop.db", "--bus", "file:relative"], "file:///absolute/folder"),
        (vec!["relay", "--database", "sqlite:shop.db", "--bus", "file:"], "file:///absolute/folder"),
        (
            vec!["dead", "retry", "--database", "sqlite:shop.db", "--all", "--wait", "200000000000000d"],
            "1d, is the longest",
        ),
        (vec!["append", "--database", "sqlite:shop.db", "--file", "."], "it is a folder"),
        (vec!["append", "--database", "sqlite:shop.db", "orders.jsonl"], "a file is named with --file"),
        (vec!["publish", "--bus", "file:///x"], "error: `publish` is not in this build yet\n"),
        (vec!["replay", "--database", "sqlite:shop.db"], "error: `replay` is not in this build yet\n"),
        (vec!["relay", "--database", "sqlite:shop.db", "--bus", "file:///x?colour=red"], "colour"),
        (vec!["dead", "retry", "--database", "sqlite:shop.db"], "--all"),
        (vec!["dead", "retry", "--database", "sqlite:shop.db", "--all", "--rate", "5"], "5/s"),
        (vec!["append", "--database", "sqlite:shop.db", "--per-tx", "0"], "--per-tx"),
        (vec!["append", "--database", "sqlite:shop.db", "--file", "missing.jsonl"], "missing.jsonl"),
        (vec!["status", "--database", "sqlite:shop.db", "--output", "yaml"], "yaml"),
        (vec!["status", "--database", "sqlite:shop.db", "--config", "missing.toml"], "missing.toml"),
        (vec!["nonsense"], "nonsense"),
    ] {
        let ran = folder.run(&args).is(2);
        assert!(
            ran.stderr.contains(named) || (named == "5/s" && ran.stderr.contains("100/s")),
            "{args:?}: {}",
            ran.stderr
        );
    }
    folder.write("wrong.toml", "[database]\nurl = \"sqlite:shop.db\"\n[relay]\nlease = 5\n");
    let ran = folder.run(&["relay", "--config", "wrong.toml", "--bus", &bus]).is(2);
    assert!(ran.stderr.contains("wrong.toml") && ran.stderr.contains("relay.lease"), "{}", ran.stderr);
    let json = folder.run(&["status", "--config", "wrong.toml", "--output", "json"]).is(2).error();
    assert_eq!(json["kind"], "config");
    for (text, named) in [
        (
            "lease = \"200000000000000d\"",
            "wrong.toml: `relay.lease` is 17280000000000000000s and must be from 200ms to 86400s",
        ),
        ("drain = \"2d\"", "`relay.drain`"),
        ("poll_interval = \"2d\"", "`relay.poll_interval`"),
        ("backoff_max = \"2d\"", "`relay.backoff_max`"),
        ("lease = \"1s\"\nlease =", "wrong.toml: line 3, column 8: "),
        ("lease = \"1s\"\n[http]", "wrong.toml: `http` is not in this build yet"),
        ("lease = \"1s\"\n[bus]\nrequire = [\"replay\"]", "wrong.toml: `bus.require`: "),
    ] {
        folder.write("wrong.toml", &format!("[relay]\n{text}\n"));
        let ran = folder.run(&with(&["relay", "--once", "--config", "wrong.toml", "--bus", &bus], &SHOP)).is(2);
        assert!(ran.stderr.contains(named) && ran.stderr.lines().count() == 1, "{text}: {}", ran.stderr);
    }
    let usage = folder.run(&["append", "--per-tx", "0", "--output", "json"]).is(2).error();
    assert_eq!(usage["kind"], "usage");
    assert!(usage["message"].as_str().is_some_and(|message| message.starts_with("invalid value '0'")), "{usage}");
    let later = folder.run(&["--output=json", "consume"]).is(2).error();
    assert_eq!((&later["kind"], &later["message"]), (&"not_yet".into(), &"`consume` is not in this build yet".into()));
    folder.run(&["--help"]).ok();
    assert!(folder.run(&["append", "--help"]).ok().stdout.contains("Examples:"));
}

#[test]
fn a_file_an_environment_and_flags_configure_in_this_order() {
    let folder = Folder::migrated();
    folder.append("a", 3);
    let bus = folder.bus_url();
    folder.write("outbus.toml", &format!("[database]\nurl = \"sqlite:shop.db\"\n[bus]\nurl = \"{bus}\"\nrequire = [\"persistent\"]\n[relay]\nsink = \"audit\"\nretention = \"never\"\n"));
    assert_eq!(folder.run(&["relay", "--once", "--output", "json"]).ok().json()["published"], 3);
    assert_eq!(folder.run(&["status", "--output", "json"]).ok().json()["logs"][0]["sink"], "audit");
    let by_environment = folder.command(&["status"]).env("OUTBUS_DATABASE_URL", "sqlite:elsewhere.db").spawn();
    assert!(finish(by_environment.expect("it starts")).is(2).stderr.contains("elsewhere.db"));
    let by_flag = folder
        .command(&["status", "--database", "sqlite:shop.db"])
        .env("OUTBUS_DATABASE_URL", "sqlite:elsewhere.db")
        .spawn();
    finish(by_flag.expect("it starts")).ok();
    // An empty variable is none, as in `docker run -e`; a filter that is none is not passed over.
    let relay = ["relay", "--once"];
    let mut by_file = folder.command(&relay);
    by_file.envs([("OUTBUS_CONFIG", ""), ("OUTBUS_DATABASE_URL", ""), ("OUTBUS_BUS_URL", ""), ("OUTBUS_LOG", "")]);
    finish(by_file.spawn().expect("it starts")).ok();
    let by_secret = |file: &str| {
        finish(folder.command(&["status"]).env("OUTBUS_DATABASE_URL_FILE", file).spawn().expect("it starts"))
            .is(2)
            .stderr
    };
    folder.write("secret", "sqlite:elsewhere.db\n");
    assert!(by_secret("secret").contains("elsewhere.db: there is no such file"));
    assert!(by_secret("nosecret").contains("OUTBUS_DATABASE_URL_FILE: cannot read nosecret"));
    let filter = folder.command(&["status"]).env("OUTBUS_LOG", "outbox=loud").spawn();
    assert!(finish(filter.expect("it starts")).is(2).stderr.contains("OUTBUS_LOG is `outbox=loud`"));
    folder.write(
        "demanding.toml",
        &format!("[database]\nurl = \"sqlite:shop.db\"\n[bus]\nurl = \"{bus}\"\nrequire = [\"replay\"]\n"),
    );
    assert!(folder.run(&["relay", "--config", "demanding.toml"]).is(2).stderr.contains("replay"));
    folder.append("b", 3);
    folder.write("two.toml", &format!("[database]\nurl = \"sqlite:shop.db\"\n[bus]\nurl = \"{bus}\"\n[[relay]]\nsink = \"one\"\n[[relay]]\nsink = \"two\"\n"));
    assert_eq!(
        folder.run(&["relay", "--once", "--config", "two.toml", "--output", "json"]).ok().json()["published"],
        6
    );
}

#[test]
fn events_that_are_set_aside_are_listed_shown_retried_and_discarded() {
    let folder = Folder::migrated();
    folder.append("a", 5);
    // An event of the log that no bus takes: its topic is none.
    let insert = "INSERT INTO outbus_outbox (id, topic, key, type, data) VALUES ('bad-1', 'orders', 'k9', '', '{}'), ('bad-2', 'orders', 'k9', 'order.placed', '{\"total\": 5.00}'), ('bad-3', 'orders', 'k8', '', '{}')";
    sql(&folder, insert);
    let bus = folder.bus_url();
    let relay = with(&["relay", "--once", "--bus", &bus, "--output", "json"], &SHOP);
    let ran = folder.run(&relay).is(1);
    let summary: serde_json::Value = serde_json::from_str(ran.stdout.trim()).expect("JSON");
    assert_eq!((&summary["published"], &summary["parked"]), (&5.into(), &3.into()));
    assert_eq!(ran.error()["kind"], "set_aside");

    let list = with(&["dead", "list", "--output", "json"], &SHOP);
    let dead = folder.run(&list).ok().json();
    let first = &dead["dead"][0];
    assert_eq!(
        (&first["id"], &first["state"], &first["reason"]),
        (&"bad-1".into(), &"parked".into(), &"invalid".into())
    );
    assert_eq!((&first["topic"], &first["key"], &first["seq"]), (&"orders".into(), &"k9".into(), &6.into()));
    assert!(first["error"].as_str().is_some_and(|error| error.contains("`type`")), "{first}");
    assert!(first["time"].as_str().is_some_and(|time| time.ends_with('Z')));
    assert!(dead["dead"][1].get("event").is_none());
    assert_eq!(folder.run(&with(&list, &["--reason", "behind"])).ok().json()["dead"].as_array().map(Vec::len), Some(1));
    let shown = folder.run(&with(&["dead", "show", "bad-2", "--output", "json"], &SHOP)).ok().json();
    assert_eq!(shown["dead"][0]["event"]["data"], serde_json::json!({"total": 5.00}));
    let text = folder.run(&with(&["dead", "list"], &SHOP)).ok().stdout;
    assert!(text.lines().count() == 4 && text.contains("behind"), "{text}");
    assert_eq!(folder.run(&with(&["dead", "show", "nobody"], &SHOP)).is(1).stdout, "");
    let none = folder.run(&with(&["dead", "show", "--reason", "nobody"], &SHOP)).ok().stdout;
    assert_eq!(none, "nothing is set aside\n");
    assert_eq!((&folder.status()["parked"], &folder.status()["backlog"]), (&3.into(), &0.into()));

    // Discarding the head and mending nothing else: the rest of the key can go.
    folder.run(&with(&["dead", "discard", "bad-1"], &SHOP)).ok();
    let asked = folder.run(&with(&["dead", "retry", "bad-2"], &SHOP)).ok().stdout;
    assert!(asked.contains("not done yet"), "no relay is there to do it: {asked}");
    assert_eq!(folder.run(&list).ok().json()["dead"][0]["state"], "retrying");
    folder.run(&relay).ok();
    assert_eq!(folder.published("orders").last().map(String::as_str), Some("bad-2"));
    let discarded = folder.run(&with(&["dead", "discard", "--all", "--output", "json"], &SHOP)).ok().json();
    assert_eq!(discarded["requests"][0]["done"], 1);
    assert_eq!(folder.run(&list).ok().json()["dead"], serde_json::json!([]));
}

/// What an operator must see to decide. Catches the mutants that show only valid events, and a row's text as it is.
#[test]
fn a_row_that_is_no_event_is_shown_with_its_columns() {
    let folder = Folder::migrated();
    let insert = "INSERT INTO outbus_outbox (id, topic, key, type, source, subject, extensions, time, data) VALUES \
         ('text', 'orders', 'k' || char(27) || '[2J' || char(10), 'b c', '/shop', 'order/7', '{\"a\":\"1\"}', 5, 'total ' || char(27)), \
         ('bytes', 'orders', printf('%.2000c', 'k'), '', '/shop', NULL, NULL, 'noon', x'ff00')";
    sql(&folder, insert);
    let bus = folder.bus_url();
    folder.run(&with(&["relay", "--once", "--bus", &bus], &SHOP)).is(1);

    let show = with(&["dead", "show", "--all"], &SHOP);
    let dead = folder.run(&with(&show, &["--output", "json"])).ok().json()["dead"].clone();
    let row = &dead[0]["row"];
    for (name, value) in [
        ("source", "/shop"),
        ("subject", "order/7"),
        ("content_type", "application/json"),
        ("extensions", "{\"a\":\"1\"}"),
        ("time", "5"),
        ("data", "total \u{1b}"),
    ] {
        assert_eq!(row[name], value, "{name}");
    }
    assert!(row["problem"].as_str().is_some_and(|problem| problem.starts_with("`type`")), "{row}");
    assert_eq!((&dead[0]["type"], &dead[0]["key"]), (&"b c".into(), &"k\u{1b}[2J\n".into()));
    assert_eq!((&dead[1]["row"]["time"], &dead[1]["row"]["data_base64"]), (&"noon".into(), &"/wA=".into()));
    let text = folder.run(&show).ok().stdout;
    for named in
        ["no valid event: `type`", "order/7", "total \\u{1b}", "{\"a\":\"1\"}", "k\\u{1b}[2J\\n", "noon", "/wA="]
    {
        assert!(text.contains(named), "{named}: {text}");
    }
    let list = folder.run(&with(&["dead", "list"], &SHOP)).ok().stdout;
    assert_eq!(list.lines().count(), 3, "{list}");
    assert!(list.lines().all(|line| line.len() < 400) && list.contains("k\\u{1b}[2J\\n"), "{list}");
    assert!(!(text + &list).chars().any(|c| c.is_control() && c != '\n'), "nothing reaches the terminal");
}

/// Its events would count as invented, or as lost beside a relay that publishes them elsewhere.
#[test]
fn the_demo_refuses_an_outbox_that_is_in_use() {
    let folder = Folder::migrated();
    let demo = with(&["demo", "--events", "50"], &SHOP);
    folder.append("a", 3);
    let refused = folder.run(&demo).is(2).stderr;
    assert!(refused.contains("shop.db: 3 events of before") && refused.contains("another file"), "{refused}");
    let bus = folder.bus_url();
    let relay = with(&["relay", "--bus", &bus], &SHOP);
    folder.run(&with(&relay, &["--once"])).ok();
    folder.run(&demo).ok();

    let mut owner = folder.command(&relay).spawn().expect("it starts");
    let mut says = BufReader::new(owner.stderr.take().expect("it is piped")).lines();
    assert!(says.next().expect("a line").expect("text").contains("owner of outbox"));
    let refused = folder.run(&demo).is(2).stderr;
    assert!(refused.contains("shop.db: the relay ") && refused.contains("stop it"), "{refused}");
    signal(owner.id(), "TERM");
    finish(owner).ok();
    folder.run(&demo).ok();
}

#[test]
fn a_demo_too_short_to_kill_its_relay_says_so() {
    let demo = Folder::new().run(&["demo", "--events", "1", "--kill-relay", "--seed", "1", "--output", "json"]).ok();
    let was_killed = demo.json()["kills"].as_u64() > Some(0);
    assert_ne!(demo.stderr.contains("too short to kill"), was_killed, "{demo:?}");
}

/// Catches the mutant that counts events alone: all of it stood in memory until the bad line came.
#[test]
fn a_transaction_of_append_is_bounded_by_bytes() {
    let folder = Folder::migrated();
    let large = format!("{{\"topic\":\"orders\",\"type\":\"t\",\"data\":\"{}\"}}\n", "x".repeat(900_000));
    let args = with(&["append", "--output", "json"], &SHOP);
    let error = folder.run_with_input(&args, (large.repeat(50) + "{}\n").as_bytes()).is(1).error();
    assert_eq!((&error["line"], &error["committed"]), (&51.into(), &38.into()), "{error}");
}

/// Several relays share a process; one that halts ends the others, and must be known.
#[test]
fn a_relay_that_halts_names_its_sink() {
    let folder = Folder::migrated();
    sql(&folder, "INSERT INTO outbus_outbox (id, topic, key, type, data) VALUES ('bad', 'orders', 'k', '', '{}')");
    let bus = folder.bus_url();
    folder.write("two.toml", &format!("[database]\nurl = \"sqlite:shop.db\"\n[bus]\nurl = \"{bus}\"\n[[relay]]\nsink = \"one\"\ntopics = [\"payments\"]\n[[relay]]\nsink = \"two\"\non_failure = \"halt\"\n"));
    let halted = folder.run(&["relay", "--config", "two.toml"]).is(1).stderr;
    assert!(halted.contains("error: sink two: halted at event 1"), "{halted}");
}

#[test]
fn a_second_relay_is_a_standby_and_signals_drain() {
    let folder = Folder::migrated();
    let bus = folder.bus_url();
    let args = with(&["relay", "--bus", &bus], &SHOP);
    let start = || {
        let mut child = folder.command(&args).spawn().expect("it starts");
        let stderr = BufReader::new(child.stderr.take().expect("it is piped"));
        (child, stderr.lines())
    };
    let (first, mut first_says) = start();
    let owner = first_says.next().expect("a line").expect("text");
    assert!(owner.contains("owner of outbox"), "{owner}");
    let (second, mut second_says) = start();
    let standby = second_says.next().expect("a line").expect("text");
    assert!(standby.starts_with("standby of ") && standby.ends_with(&format!(":{}", first.id())), "{standby}");
    assert_eq!(folder.status()["owner"].as_str().map(|owner| owner.ends_with(&format!(":{}", first.id()))), Some(true));
    folder.append("a", 20);
    until("the events", || folder.published("orders").len() == 20);

    signal(first.id(), "TERM");
    finish(first).ok();
    assert!(second_says.next().expect("a line").expect("text").contains("owner of outbox"));
    folder.append("b", 20);
    until("the events", || folder.published("orders").len() == 40);
    signal(second.id(), "INT");
    finish(second).ok();
    assert_eq!(folder.published("orders").len(), 40, "an orderly hand-over repeats nothing");
    assert!(folder.status()["owner"].is_null());
}

/// Draining waits for the database, which somebody has locked; a second signal does not.
#[test]
fn a_second_signal_ends_at_once() {
    let folder = Folder::migrated();
    let bus = folder.bus_url();
    let mut relay = folder.command(&with(&["relay", "--bus", &bus], &SHOP)).spawn().expect("it starts");
    let mut says = BufReader::new(relay.stderr.take().expect("it is piped")).lines();
    assert!(says.next().expect("a line").expect("text").contains("owner of outbox"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        use sqlx::Connection;
        let options = sqlx::sqlite::SqliteConnectOptions::new().filename(folder.path("shop.db"));
        let mut connection = sqlx::SqliteConnection::connect_with(&options).await.expect("it opens");
        let _writing = connection.begin_with("BEGIN IMMEDIATE").await.expect("the lock");
        signal(relay.id(), "TERM");
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert!(relay.try_wait().expect("a status").is_none(), "it drains");
        signal(relay.id(), "TERM");
        let status = relay.wait().expect("it ends");
        assert_eq!(status.code(), Some(1));
    });
}

#[test]
fn append_ends_in_order_when_it_is_told_to() {
    let folder = Folder::migrated();
    let mut child =
        folder.command(&with(&["append", "--output", "json"], &SHOP)).stdin(Stdio::piped()).spawn().expect("it starts");
    let mut stdin = child.stdin.take().expect("it is piped");
    stdin.write_all(lines("a", 3).as_bytes()).expect("it reads");
    // Fewer than a transaction's worth: they are committed when no more comes.
    until("the commit", || folder.status()["backlog"] == 3);
    signal(child.id(), "TERM");
    let ran = finish(child).ok();
    assert_eq!(ran.json()["events"], 3);
    drop(stdin);
}

/// As in `outbus dead list | head -1`.
#[test]
fn a_reader_that_leaves_ends_a_command_quietly() {
    let folder = Folder::migrated();
    folder.append("a", 1);
    let mut child = folder.command(&with(&["status"], &SHOP)).spawn().expect("it starts");
    drop(child.stdout.take());
    let mut stderr = String::new();
    child.stderr.take().expect("it is piped").read_to_string(&mut stderr).expect("text");
    assert_eq!((child.wait().expect("it ends").code(), stderr.as_str()), (Some(0), ""));
}

/// A disk that is full: nothing half written, and the remedy named. The tmpfs is the size of a small log.
#[test]
#[ignore = "needs root to mount a tmpfs: cargo xtask test"]
fn a_full_disk_is_said_so_and_heals() {
    let folder = Folder::new();
    let mount = folder.path("small");
    std::fs::create_dir(&mount).expect("a folder");
    let target = mount.to_str().expect("UTF-8");
    let tmpfs = Tmpfs::mount(target, "2m");
    let database = format!("sqlite://{target}/shop.db");
    folder.run(&["migrate", "--database", &database]).ok();
    let big: String = (0..4_000)
        .map(|n| {
            format!(
                "{{\"topic\":\"orders\",\"type\":\"t\",\"id\":\"{n}\",\"partitionkey\":\"k\",\"data\":\"{}\"}}\n",
                "x".repeat(1_000)
            )
        })
        .collect();
    let args = ["append", "--database", &database, "--per-tx", "100", "--output", "json"];
    let error = folder.run_with_input(&args, big.as_bytes()).is(1).error();
    assert!(error["message"].as_str().is_some_and(|message| message.contains("disk is full")), "{error}");
    let committed = error["committed"].as_u64().expect("a count");
    let status = folder.run(&["status", "--database", &database, "--output", "json"]).ok().json();
    assert_eq!(status["logs"][0]["backlog"], committed, "nothing half written");

    // The bus's disk is full: the relay waits, and goes on when there is room.
    let folder_2 = Folder::migrated();
    folder_2.write("big.jsonl", &big);
    folder_2.run(&with(&["append", "--file", "big.jsonl"], &SHOP)).ok();
    let bus = format!("file://{target}/bus");
    let mut relay = folder_2
        .command(&with(&["relay", "--once", "--bus", &bus, "--output", "json"], &SHOP))
        .spawn()
        .expect("it starts");
    let mut says = BufReader::new(relay.stderr.take().expect("it is piped")).lines();
    let away = says
        .by_ref()
        .map(|line| line.expect("text"))
        .find(|line| line.contains("does not take events"))
        .expect("a word");
    assert!(away.contains("No space left"), "{away}");
    tmpfs.resize("64m");
    assert_eq!(finish(relay).ok().json()["published"], 4_000);
    let events = bus_core::read_events(&mount.join("bus"), "orders").expect("whole lines only");
    let ids: Vec<String> = events.iter().map(|event| event.id().to_owned()).collect();
    assert_eq!(ids, (0..4_000).map(|n| n.to_string()).collect::<Vec<_>>());
}

struct Tmpfs(String);

impl Tmpfs {
    fn mount(target: &str, size: &str) -> Self {
        run("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", target]);
        Self(target.to_owned())
    }

    fn resize(&self, size: &str) {
        run("mount", &["-o", &format!("remount,size={size}"), &self.0]);
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").args(["-l", &self.0]).status();
    }
}

fn run(program: &str, args: &[&str]) {
    let status = std::process::Command::new(program).args(args).status().expect("it starts");
    assert!(status.success(), "{program} {args:?}: {status}");
}

/// Runs a statement on the outbox beside `outbus`.
fn sql(folder: &Folder, statement: &'static str) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        use sqlx::Connection;
        let options = sqlx::sqlite::SqliteConnectOptions::new().filename(folder.path("shop.db"));
        let mut connection = sqlx::SqliteConnection::connect_with(&options).await.expect("it opens");
        sqlx::query(statement).execute(&mut connection).await.expect("it runs");
    });
}
