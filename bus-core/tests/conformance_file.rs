//! The file bus keeps what of the contract a bus without subscriptions can keep.

use std::{
    path::PathBuf,
    sync::{Arc, LazyLock},
};

use bus_core::{EventBus, FileBus, FileConfig, conformance::Fixture, read_events};

static DIR: LazyLock<PathBuf> = LazyLock::new(|| tempfile::tempdir().expect("a folder").keep());

bus_core::conformance_tests!(Fixture::new(connect).stored(|topic| read_events(&DIR, &topic).expect("readable")));

async fn connect() -> Arc<dyn EventBus> {
    Arc::new(FileBus::open(FileConfig { dir: DIR.clone() }).expect("the folder opens"))
}
