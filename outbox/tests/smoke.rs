use std::{sync::Arc, time::Duration};
use bus_core::*;
use outbox::*;
use sqlx::sqlite::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn smoke() {
    let dir = tempfile::tempdir().unwrap();
    let options = SqliteConnectOptions::new().filename(dir.path().join("shop.db")).create_if_missing(true);
    let pool = sqlx::SqlitePool::connect_with(options).await.unwrap();
    let outbox = Outbox::sqlite(pool.clone(), OutboxConfig::default());
    outbox.migrate().await.unwrap();
    for n in 0..20 {
        let mut tx = pool.begin_with("BEGIN IMMEDIATE").await.unwrap();
        let events = (0..500).map(|k| Event::json("orders", "order.placed", &(n * 500 + k)).unwrap().key(k % 7));
        outbox.append(&mut tx, events).await.unwrap();
        tx.commit().await.unwrap();
    }
    let bus = InMemoryBus::new();
    let config = RelayConfig { allow_volatile: true, ..RelayConfig::default() };
    let t = std::time::Instant::now();
    let mut relay = Relay::new(outbox.log("main").await.unwrap(), Arc::new(bus.clone()), config.clone()).unwrap().observe(|e| if !matches!(e, RelayEvent::Progress(_)) { println!("{e:?}") });
    let summary = relay.run_once(std::future::pending()).await.unwrap();
    println!("{summary:?} {:?}", t.elapsed());
    assert_eq!(summary.counts.published, 10_000);
    // live
    let mut relay = Relay::new(outbox.log("main").await.unwrap(), Arc::new(bus.clone()), config).unwrap().wake(outbox.wake_signal());
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let task = tokio::spawn(async move { relay.run(async { drop(stopped.await) }).await });
    let mut sub = bus.subscribe(SubscribeRequest { from: SubscribeFrom::Latest, ..SubscribeRequest::new(Topic::new("orders").unwrap(), Group::new("g").unwrap()) }).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    for _ in 0..5 {
        let t = std::time::Instant::now();
        let mut tx = pool.begin_with("BEGIN IMMEDIATE").await.unwrap();
        outbox.append(&mut tx, [Event::json("orders", "order.placed", &1).unwrap().key("x")]).await.unwrap();
        tx.commit().await.unwrap();
        let t1 = std::time::Instant::now();
        outbox.wake();
        let d = sub.next_batch(1).await.unwrap();
        println!("commit {:?} wake {:?} {}", t1 - t, t1.elapsed(), d[0].event().to_json());
        d.into_iter().for_each(Delivery::ack);
    }
    drop(stop);
    println!("{:?}", task.await.unwrap().unwrap());
}
