//! The conformance suite for logs, on PostgreSQL.

#[path = "support/database.rs"]
mod database;

use std::sync::Arc;

use async_trait::async_trait;
use bus_core::{Event, Seq};
use database::Database;
use outbox::{LogAdmin, LogSource, conformance::LogDatabase};

#[async_trait]
impl LogDatabase for Database {
    async fn log(&self, sink: &str) -> Arc<dyn LogSource> {
        Database::log(self, sink).await
    }

    async fn admin(&self) -> Arc<dyn LogAdmin> {
        Arc::new(Database::admin(self).await)
    }

    async fn append(&self, events: Vec<Event>) {
        Database::append(self, events).await;
    }

    async fn append_and_roll_back(&self, events: Vec<Event>) {
        let mut client = self.client().await;
        let mut transaction = client.transaction().await.expect("a transaction");
        self.outbox.append(&mut transaction, events).await.expect("the events are appended");
        transaction.rollback().await.expect("it rolls back");
    }

    async fn insert_invalid(&self, topic: &str, key: &str) {
        self.run(&format!("INSERT INTO {{p}}outbox (topic, key, type, data) VALUES ('{topic}', '{key}', '', '1')"))
            .await;
    }

    async fn replace_event(&self, seq: Seq) {
        self.run(&format!("UPDATE {{p}}outbox SET id = 'another' WHERE seq = {seq}")).await;
    }

    async fn delete_row(&self, seq: Seq) {
        self.run(&format!("DELETE FROM {{p}}outbox WHERE seq = {seq}")).await;
    }
}

outbox::log_conformance_tests!(Database::create().await, ignore = "needs PostgreSQL: cargo xtask test");
