//! A PostgreSQL server of its own, which a test may break.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::{
    io::Write as _,
    net::TcpListener,
    process::{Command, Stdio},
};

/// The script's port for PostgreSQL without an offset.
const PORT: u16 = 25_432;

pub(crate) struct Server {
    dir: tempfile::TempDir,
    port: u16,
    settings: Vec<(&'static str, String)>,
    pub(crate) url: String,
}

impl Server {
    pub(crate) fn start() -> Self {
        Self::start_with(Vec::new())
    }

    /// With more of PostgreSQL's options: `-c name=value ...`.
    pub(crate) fn with_options(options: &str) -> Self {
        Self::start_with(vec![("SERVICES_POSTGRES_OPTIONS", options.to_owned())])
    }

    /// A streaming standby of `primary`.
    pub(crate) fn standby_of(primary: &Self) -> Self {
        Self::start_with(vec![("SERVICES_POSTGRES_PRIMARY", primary.port.to_string())])
    }

    fn start_with(settings: Vec<(&'static str, String)>) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a port").port();
        let url = format!("postgres://outbus:outbus@127.0.0.1:{port}/outbus?sslmode=disable");
        let server = Self { dir: tempfile::tempdir().expect("a folder"), port, settings, url };
        server.run(&["up", "postgres"]);
        server
    }

    /// A database of this server.
    pub(crate) fn url_of(&self, database: &str) -> String {
        self.url.replace("/outbus?", &format!("/{database}?"))
    }

    pub(crate) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub(crate) fn run(&self, args: &[&str]) {
        assert!(self.try_run(args), "services {args:?}");
    }

    fn try_run(&self, args: &[&str]) -> bool {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../services/services");
        let offset = i32::from(self.port) - i32::from(PORT);
        let mut command = Command::new(script);
        command.args(args).env("SERVICES_DIR", self.dir.path()).env("SERVICES_PORT_OFFSET", offset.to_string());
        command.envs(self.settings.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).status().expect("the script runs").success()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !self.try_run(&["down"]) {
            // Dropping must not panic: the test may be failing already.
            let _told = writeln!(std::io::stderr(), "a server of a test could not be stopped: {}", self.url);
        }
    }
}
