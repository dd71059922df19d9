//! Runs the binary, as a user does.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;

/// How long anything may take.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// An empty folder in which `outbus` is run.
pub(crate) struct Folder(pub(crate) TempDir);

/// What a finished run left behind.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) status: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    /// A folder with an outbox in `shop.db`.
    pub(crate) fn migrated() -> Self {
        let folder = Self::new();
        folder.run(&["migrate", "--database", "sqlite:shop.db"]).ok();
        folder
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).expect("the file is written");
    }

    /// The command, without what the caller's environment would add.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_outbus"));
        command.args(args).current_dir(self.0.path());
        for name in ["OUTBUS_CONFIG", "OUTBUS_DATABASE_URL", "OUTBUS_BUS_URL"] {
            command.env_remove(name).env_remove(format!("{name}_FILE"));
        }
        command.env_remove("OUTBUS_LOG");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> Ran {
        finish(self.command(args).spawn().expect("it starts"))
    }

    pub(crate) fn run_with_input(&self, args: &[&str], input: &[u8]) -> Ran {
        let mut child = self.command(args).stdin(Stdio::piped()).spawn().expect("it starts");
        let mut stdin = child.stdin.take().expect("it is piped");
        let input = input.to_vec();
        // It may end before it has read everything.
        let writing = std::thread::spawn(move || drop(stdin.write_all(&input)));
        let ran = finish(child);
        writing.join().expect("no panic");
        ran
    }

    /// Appends `count` events with ids `<prefix>-<n>` and keys `k0` to `k4`.
    pub(crate) fn append(&self, prefix: &str, count: usize) {
        let ran = self.run_with_input(&["append", "--database", "sqlite:shop.db"], lines(prefix, count).as_bytes());
        ran.ok();
    }

    /// `outbus status` of the only sink.
    pub(crate) fn status(&self) -> Value {
        self.run(&["status", "--database", "sqlite:shop.db", "--output", "json"]).json()["logs"][0].clone()
    }

    /// Runs a statement in `shop.db`.
    pub(crate) fn sqlite(&self, sql: &str) {
        block_on(async {
            use sqlx::Connection;
            let options = sqlx::sqlite::SqliteConnectOptions::new().filename(self.path("shop.db"));
            let mut connection = sqlx::SqliteConnection::connect_with(&options).await.expect("it opens");
            sqlx::raw_sql(sqlx::AssertSqlSafe(sql.to_owned())).execute(&mut connection).await.expect("a statement");
        });
    }

    pub(crate) fn bus_url(&self) -> String {
        format!("file://{}", self.path("bus").display())
    }

    /// The ids that were published to a topic, in order.
    pub(crate) fn published(&self, topic: &str) -> Vec<String> {
        let events = bus_core::read_events(&self.path("bus"), topic).expect("events");
        events.into_iter().map(|event| event.id().to_owned()).collect()
    }
}

/// JSON lines of events.
pub(crate) fn lines(prefix: &str, count: usize) -> String {
    let line = |n: usize| {
        format!(
            "{{\"topic\":\"orders\",\"type\":\"order.placed\",\"id\":\"{prefix}-{n}\",\"partitionkey\":\"k{}\",\"data\":{n}}}\n",
            n % 5
        )
    };
    (0..count).map(line).collect()
}

/// Waits for the end of a run.
pub(crate) fn finish(child: Child) -> Ran {
    let id = child.id();
    let done = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let watched = std::sync::Arc::clone(&done);
    std::thread::spawn(move || {
        let started = Instant::now();
        while started.elapsed() < DEADLINE {
            std::thread::sleep(Duration::from_millis(50));
            if watched.load(std::sync::atomic::Ordering::SeqCst) {
                return;
            }
        }
        signal(id, "KILL");
    });
    let output = child.wait_with_output().expect("it ends");
    done.store(true, std::sync::atomic::Ordering::SeqCst);
    Ran {
        status: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8(output.stdout).expect("UTF-8"),
        stderr: String::from_utf8(output.stderr).expect("UTF-8"),
    }
}

pub(crate) fn signal(process: u32, name: &str) {
    let sent = Command::new("kill").args([format!("-{name}"), process.to_string()]).stderr(Stdio::null()).status();
    sent.expect("kill runs");
}

/// Asks again and again until `condition` holds.
pub(crate) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < DEADLINE, "{what}: not within {DEADLINE:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

impl Ran {
    pub(crate) fn ok(self) -> Self {
        self.is(0)
    }

    pub(crate) fn is(self, status: i32) -> Self {
        assert_eq!(self.status, status, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self
    }

    /// The last line of stdout as JSON.
    pub(crate) fn json(&self) -> Value {
        let last = self.stdout.lines().last().unwrap_or_default();
        serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The error on stderr as JSON.
    pub(crate) fn error(&self) -> Value {
        let last = self.stderr.lines().last().unwrap_or_default();
        let report: Value = serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {self:?}"));
        report["error"].clone()
    }
}

/// The repository's root.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace")
}

/// A PostgreSQL database of its own, dropped at the end.
pub(crate) struct PostgresDatabase {
    pub(crate) name: String,
    pub(crate) url: String,
    /// The same through PgBouncer.
    pub(crate) pooled_url: String,
    /// The file of the server's certificate authority.
    pub(crate) ca: String,
    server: String,
}

impl PostgresDatabase {
    pub(crate) fn create() -> Self {
        static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let variable = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("{name} is set: cargo xtask test"));
        let (server, pooler) = (variable("OUTBUS_TEST_POSTGRES_URL"), variable("OUTBUS_TEST_PGBOUNCER_URL"));
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = format!("outbus_cli_{}_{number}", std::process::id());
        let of = |url: &str| format!("{}/{name}", url.rsplit_once('/').expect("a database in the URL").0);
        let (url, pooled_url) = (of(&server), of(&pooler));
        run_sql(&server, &format!("CREATE DATABASE {name}"));
        Self { name, url, pooled_url, ca: variable("OUTBUS_TEST_POSTGRES_CA"), server }
    }

    pub(crate) fn run(&self, sql: &str) {
        run_sql(&self.url, sql);
    }

    /// Two columns of a query, as texts.
    pub(crate) fn query(&self, sql: &str) -> Vec<(String, String)> {
        query_sql(&self.url, sql)
    }
}

impl Drop for PostgresDatabase {
    fn drop(&mut self) {
        run_sql(&self.server, &format!("DROP DATABASE {} WITH (FORCE)", self.name));
    }
}

pub(crate) fn run_sql(url: &str, sql: &str) {
    block_on(async { client(url).await.batch_execute(sql).await.expect("a statement") });
}

/// Two columns of a query, as texts.
pub(crate) fn query_sql(url: &str, sql: &str) -> Vec<(String, String)> {
    block_on(async {
        let rows = client(url).await.query(sql, &[]).await.expect("rows");
        rows.iter().map(|row| (row.get(0), row.get(1))).collect()
    })
}

/// All the connections that a server has left.
pub(crate) struct Connections {
    runtime: tokio::runtime::Runtime,
    clients: Vec<tokio_postgres::Client>,
}

impl Connections {
    pub(crate) fn fill(url: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let mut full = Self { runtime: runtime.expect("a runtime"), clients: Vec::new() };
        while full.take_one(url) {}
        assert!(!full.clients.is_empty(), "there was none left");
        full
    }

    /// Also those of an application, until it has none.
    pub(crate) fn take_from(url: &str, application: &str) -> Self {
        let mut full = Self::fill(url);
        let max = "SELECT current_setting('max_connections')::int8";
        let max: i64 = full.runtime.block_on(full.clients[0].query_one(max, &[])).expect("a number").get(0);
        let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1";
        until("all its connections", || {
            full.runtime.block_on(full.clients[0].execute(sql, &[&application])).expect("a count");
            while full.take_one(url) {}
            full.clients.len() as i64 == max
        });
        full
    }

    pub(crate) fn run(&self, sql: &str) {
        self.runtime.block_on(self.clients[0].batch_execute(sql)).expect("a statement");
    }

    fn take_one(&mut self, url: &str) -> bool {
        let opened = self.runtime.block_on(tokio_postgres::connect(url, tokio_postgres::NoTls));
        let Ok((client, connection)) = opened else { return false };
        self.runtime.spawn(connection);
        self.clients.push(client);
        true
    }
}

async fn client(url: &str) -> tokio_postgres::Client {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await.expect("a connection");
    tokio::spawn(connection);
    client
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(future)
}
