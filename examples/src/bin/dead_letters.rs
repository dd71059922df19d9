//! An event that its handler refuses is dead-lettered after its attempts; once the cause is mended, it is retried for
//! its group alone.

#![allow(clippy::print_stdout, reason = "an example")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bus_core::{
    Consumer, Context, Event, EventBus, EventBusExt, Group, HandlerError, InMemoryBus, RetryPolicy, Topic,
    dead_letter::{Selection, retry_dead},
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let bus: Arc<dyn EventBus> = Arc::new(InMemoryBus::new());
    let (topic, group) = (Topic::new("orders")?, Group::new("billing")?);
    for total in [5, 0, 7] {
        bus.publish(Event::json("orders", "order.placed", &total)?.key(total)).await?;
    }

    let mended = Arc::new(AtomicBool::new(false));
    let knows = Arc::clone(&mended);
    let handler = move |event: Event, _context: Context| {
        let free_orders_work = knows.load(Ordering::SeqCst);
        async move {
            match event.decode::<u32>()? {
                0 if !free_orders_work => Err(HandlerError::of_event("an order for nothing")),
                total => {
                    println!("billed {total}");
                    Ok(())
                }
            }
        }
    };
    let retry = RetryPolicy { attempts: 3, backoff_min: Duration::from_millis(10), ..RetryPolicy::default() };
    let consumer = Consumer::new(Arc::clone(&bus), "orders", "billing").on_any(handler).retry(retry).concurrency(1);

    let operator = async {
        while bus.admin().dead_letters(&topic, &group, None, 10).await.is_ok_and(|dead| dead.is_empty()) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        for dead in bus.admin().dead_letters(&topic, &group, None, 10).await.unwrap_or_default() {
            let of = |name| dead.event.extension(name).unwrap_or_default().to_owned();
            println!("dead after {} attempts: {}", of("deadattempts"), of("deaderror"));
        }
        mended.store(true, Ordering::SeqCst);
        let revival = retry_dead(&bus, &topic, &group, &Selection::All, false).await;
        println!("retried {}", revival.map_or(0, |revival| revival.retried));
        while bus.admin().lag(&topic, &group).await.is_ok_and(|lag| lag.lag() > 0) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    consumer.run(operator).await?;
    Ok(())
}
