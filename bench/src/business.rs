//! R5: what appending costs a service: its transactions a second with an append and without.

use std::{
    net::{SocketAddr, ToSocketAddrs},
    time::{Duration, Instant},
};

use anyhow::Context;
use outbox::{Outbox, PreparedAppend};
use tokio::task::JoinSet;
use tokio_postgres::{Client, Config, NoTls, Statement};

use crate::{
    link,
    pairs::{Measured, Pairs},
    relay_memory::{DATA_BYTES, event},
    road::{Road, url},
};

const CLIENTS: usize = 4;
/// Aggregates of each client: nobody waits for another's lock.
const AGGREGATES: i64 = 1_000;
/// The link's delay, each way.
const ONE_WAY: Duration = Duration::from_millis(1);

const TABLES: &str = "CREATE TABLE {p}.aggregate (id bigint PRIMARY KEY, version bigint NOT NULL) WITH (fillfactor = 50); \
     CREATE TABLE {p}.item (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, aggregate bigint NOT NULL, version bigint NOT NULL); \
     INSERT INTO {p}.aggregate SELECT id, 0 FROM generate_series(0, {aggregates} - 1) AS id";
const UPDATE: &str = "UPDATE {p}.aggregate SET version = version + 1 WHERE id = $1 RETURNING version";
const INSERT: &str = "INSERT INTO {p}.item (aggregate, version) VALUES ($1, $2)";

pub(crate) async fn over_loopback(quick: bool) -> anyhow::Result<Measured> {
    let what = "over loopback";
    Ok(run(quick, server()?).await?.at_least("R5", describe(what), "transactions/s", 0.80))
}

pub(crate) async fn over_a_slow_link(quick: bool) -> anyhow::Result<Measured> {
    let address = link::delayed(server()?, ONE_WAY)?;
    let what = "over a link with 1 ms each way";
    Ok(run(quick, address).await?.at_least("R5-link", describe(what), "transactions/s", 0.90))
}

fn describe(link: &str) -> String {
    format!(
        "PostgreSQL, {link}: {CLIENTS} clients, transactions of UPDATE and INSERT with an append of {DATA_BYTES} B / without"
    )
}

async fn run(quick: bool, address: SocketAddr) -> anyhow::Result<Pairs> {
    let (slice, rounds) = if quick { (Duration::from_millis(500), 3) } else { (Duration::from_secs(3), 9) };
    let road = Road::open().await?;
    let aggregates = (CLIENTS as i64 * AGGREGATES).to_string();
    road.client.batch_execute(&TABLES.replace("{p}", &road.schema).replace("{aggregates}", &aggregates)).await?;
    let mut services = Vec::new();
    for number in 0..CLIENTS {
        services.push(Service::open(&road, number, address).await?);
    }
    let mut pairs = Pairs::default();
    for round in 0..=rounds {
        let ours = rate(&mut services, true, slice).await?;
        let twin = rate(&mut services, false, slice).await?;
        // The first round warms the server's cache for both.
        if round > 0 {
            pairs.push(ours, twin);
        }
    }
    drop(services);
    road.close().await?;
    Ok(pairs)
}

/// Transactions a second of all clients.
async fn rate(services: &mut Vec<Service>, appends: bool, slice: Duration) -> anyhow::Result<f64> {
    let (mut running, started) = (JoinSet::new(), Instant::now());
    for mut service in services.drain(..) {
        running.spawn(async move {
            let mut count = 0;
            while started.elapsed() < slice {
                service.transact(appends).await?;
                count += 1;
            }
            anyhow::Ok((service, count))
        });
    }
    let mut transactions = 0;
    for ended in running.join_all().await {
        let (service, count) = ended?;
        services.push(service);
        transactions += count;
    }
    Ok(f64::from(transactions) / started.elapsed().as_secs_f64())
}

/// One client of the database, with the statements of its business prepared.
struct Service {
    client: Client,
    outbox: Outbox,
    update: Statement,
    insert: Statement,
    append: PreparedAppend,
    aggregates: std::ops::Range<i64>,
}

impl Service {
    async fn open(road: &Road, number: usize, address: SocketAddr) -> anyhow::Result<Self> {
        let (client, connection) = through(address)?.connect(NoTls).await?;
        tokio::spawn(connection);
        let statement = |sql: &str| sql.replace("{p}", &road.schema);
        let first = number as i64 * AGGREGATES;
        Ok(Self {
            update: client.prepare(&statement(UPDATE)).await?,
            insert: client.prepare(&statement(INSERT)).await?,
            append: road.outbox.prepare(&client).await?,
            client,
            outbox: road.outbox.clone(),
            aggregates: first..first + AGGREGATES,
        })
    }

    /// The same statements by the same client, one after the other; with the append the commit brings an event along.
    async fn transact(&mut self, appends: bool) -> anyhow::Result<()> {
        let aggregate = fastrand::i64(self.aggregates.clone());
        let transaction = self.outbox.begin(self.client.build_transaction()).await?.prepared(&self.append);
        let version: i64 = transaction.query_one(&self.update, &[&aggregate]).await?.get(0);
        transaction.execute(&self.insert, &[&aggregate, &version]).await?;
        if appends {
            Ok(transaction.append_and_commit([event(aggregate.unsigned_abs() as usize)]).await?)
        } else {
            Ok(transaction.commit().await?)
        }
    }
}

/// Where the server of the environment is.
fn server() -> anyhow::Result<SocketAddr> {
    let config: Config = url()?.parse()?;
    let host = match config.get_hosts().first() {
        Some(tokio_postgres::config::Host::Tcp(host)) => host.clone(),
        _ => anyhow::bail!("the server's URL names no host"),
    };
    let port = config.get_ports().first().copied().unwrap_or(5_432);
    (host.as_str(), port).to_socket_addrs()?.next().context("the server's host has no address")
}

/// The same server by another address: a configuration cannot forget a host.
fn through(address: SocketAddr) -> anyhow::Result<Config> {
    let from: Config = url()?.parse()?;
    let mut config = Config::new();
    config.host(address.ip().to_string()).port(address.port());
    from.get_user().map(|user| config.user(user));
    from.get_password().map(|password| config.password(password));
    from.get_dbname().map(|name| config.dbname(name));
    Ok(config)
}
