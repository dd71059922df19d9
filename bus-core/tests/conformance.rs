//! The in-memory bus keeps the contract.

use std::sync::Arc;

use bus_core::{EventBus, InMemoryBus, InMemoryConfig, conformance::Fixture};

bus_core::conformance_tests!(Fixture::new(connect));

async fn connect() -> Arc<dyn EventBus> {
    Arc::new(InMemoryBus::named("conformance", InMemoryConfig::default()))
}
