//! [`FileBus`]: events appended to files, for looking at them, for tests that kill processes, and for a relay where no
//! broker is.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use url::Url;

use crate::{
    BusAdmin, BusError, Capabilities, Confirmations, ErrorKind, Event, EventBus, Group, GroupLag, Health, LogWriter,
    Mark, OrderOnFailure, Outcome, Position, Receipt, Seq, StoredDeadLetter, SubscribeFrom, SubscribeRequest,
    Subscription, Text, Topic, TopicSpec, Topology, WriterId,
    bus::{AdmittedBatch, admit_batch},
    failpoint::failpoint,
    url_options::UrlOptions,
    writer::stopped,
};

/// Largest event a line may hold.
const EVENT_BYTES_MAX: usize = 16 << 20;

/// Settings of a file bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileConfig {
    /// The folder that holds one file per topic, `<topic>.jsonl`. It is created where it does not exist.
    pub dir: PathBuf,
}

impl FileConfig {
    /// Reads `file:///dir`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if the path is not absolute, or for an option: there are none.
    pub fn from_url(url: &Url) -> Result<Self, BusError> {
        UrlOptions::new(url)?.finish()?;
        let message = "a file bus is written file:///absolute/folder";
        match url.to_file_path() {
            // The root is what is left of a URL that names no folder.
            Ok(dir) if dir.parent().is_some() => Ok(Self { dir }),
            _ => Err(BusError::new(ErrorKind::Invalid, message)),
        }
    }
}

/// A bus that only stores: each topic is a file of events as structured JSON, one a line.
///
/// An event is confirmed once its line is on disk. A line that was cut by a crash is removed before the next is
/// written. Several processes may publish to one folder: each batch takes the file's lock, and a process that is paused
/// meanwhile keeps the others waiting. A file may be moved away or removed between two batches: the next one begins a new
/// file.
#[derive(Clone, Debug)]
pub struct FileBus(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    closed: std::sync::atomic::AtomicBool,
    /// Publishers take turns, first come, first served.
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl FileBus {
    /// Opens or creates the folder.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if the folder cannot be created or is none.
    pub fn open(config: FileConfig) -> Result<Self, BusError> {
        fs::create_dir_all(&config.dir).map_err(|error| {
            let message = format!("cannot create the folder {}: {error}", config.dir.display());
            BusError::with_source(ErrorKind::Invalid, message, error)
        })?;
        Ok(Self(Arc::new(Inner { dir: config.dir, closed: false.into(), turn: Arc::default() })))
    }

    /// The bus of a URL, `file:///dir`.
    ///
    /// # Errors
    ///
    /// As [`FileConfig::from_url`] and [`FileBus::open`].
    pub fn from_url(url: &Url) -> Result<Self, BusError> {
        Self::open(FileConfig::from_url(url)?)
    }

    fn is_closed(&self) -> bool {
        self.0.closed.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Appends a batch, off the runtime's threads; answers its outcomes in batch order.
    async fn write(&self, batch: Vec<Event>) -> Vec<Outcome> {
        let len = batch.len();
        if self.is_closed() {
            return vec![Err(BusError::closed()); len];
        }
        let turn = Arc::clone(&self.0.turn).lock_owned().await;
        let inner = Arc::clone(&self.0);
        let append = move || {
            // Until it is written, even if nobody waits for it any more: what is handed over later lands behind it.
            let _turn = turn;
            inner.append(batch)
        };
        let written = tokio::task::spawn_blocking(append).await;
        written
            .unwrap_or_else(|_| vec![Err(BusError::new(ErrorKind::Unavailable, "the runtime is shutting down")); len])
    }
}

impl Inner {
    fn append(&self, batch: Vec<Event>) -> Vec<Outcome> {
        let mut outcomes: Vec<Outcome> = vec![Ok(Receipt::default()); batch.len()];
        let AdmittedBatch { events: admitted, refused } = admit_batch(batch, EVENT_BYTES_MAX, OrderOnFailure::FailStop);
        for (index, outcome) in refused {
            outcomes[index] = outcome;
        }
        let mut by_topic: BTreeMap<Topic, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
        for (index, event) in admitted {
            let (indexes, lines) = by_topic.entry(event.topic().clone()).or_default();
            indexes.push(index);
            lines.extend_from_slice(event.to_json().as_bytes());
            lines.push(b'\n');
        }
        for (topic, (indexes, lines)) in by_topic {
            failpoint("mid-batch");
            if let Err(error) = self.append_lines(&topic, &lines) {
                let path = self.path(&topic);
                let message = format!("cannot write {}: {error}", path.display());
                let error = BusError::with_source(ErrorKind::Unavailable, message, error);
                indexes.into_iter().for_each(|index| outcomes[index] = Err(error.clone()));
            }
        }
        outcomes
    }

    fn path(&self, topic: &Topic) -> PathBuf {
        self.dir.join(format!("{topic}.jsonl"))
    }

    fn append_lines(&self, topic: &Topic, lines: &[u8]) -> io::Result<()> {
        // Opened anew for each batch: the file of before may have been moved away or removed.
        let mut file = OpenOptions::new().create(true).read(true).append(true).open(self.path(topic))?;
        file.lock()?;
        let end = cut_torn_line(&mut file)?;
        if end == 0 {
            // The name must survive as well as the lines.
            File::open(&self.dir)?.sync_all()?;
        }
        append_whole(&mut file, end, lines)
    }
}

/// Appends `lines` at `end` durably, or leaves the file as it was.
fn append_whole(file: &mut File, end: u64, lines: &[u8]) -> io::Result<()> {
    let written = file.write_all(lines).and_then(|()| file.sync_data());
    if written.is_err() {
        // What may stand there now was not confirmed; a torn rest would be cut before the next line anyway.
        file.set_len(end)?;
    }
    written
}

/// Removes a last line that a crash cut; answers where the file ends.
fn cut_torn_line(file: &mut File) -> io::Result<u64> {
    let end = file.seek(SeekFrom::End(0))?;
    let keep = end_of_whole_lines(file, end)?;
    if keep < end {
        file.set_len(keep)?;
    }
    Ok(keep)
}

fn end_of_whole_lines(file: &mut File, end: u64) -> io::Result<u64> {
    let mut block = [0; 8_192];
    let mut upto = end;
    while upto > 0 {
        // The usual case, a whole last line, needs one byte.
        let width = if upto == end { 1 } else { upto.min(block.len() as u64) as usize };
        let from = upto - width as u64;
        file.seek(SeekFrom::Start(from))?;
        file.read_exact(&mut block[..width])?;
        if let Some(at) = block[..width].iter().rposition(|byte| *byte == b'\n') {
            return Ok(from + at as u64 + 1);
        }
        upto = from;
    }
    Ok(0)
}

/// Reads back what a file bus stored of one topic: for tests and for people.
///
/// # Errors
///
/// What reading the file answers; [`io::ErrorKind::InvalidData`] for a whole line that is no event. A torn last line is
/// passed over.
pub fn read_events(dir: &Path, topic: &str) -> io::Result<Vec<Event>> {
    let bytes = match fs::read(dir.join(format!("{topic}.jsonl"))) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        read => read?,
    };
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    let lines = bytes[..whole].split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    lines
        .map(|line| Event::from_json(line).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error)))
        .collect()
}

#[async_trait]
impl EventBus for FileBus {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            order_on_failure: OrderOnFailure::FailStop,
            persistent: true,
            subscribe: false,
            replay: false,
            remembers_writers: false,
            counts_redeliveries: false,
            event_bytes_max: EVENT_BYTES_MAX,
        }
    }

    async fn publish_batch(&self, batch: Vec<Event>) -> Confirmations {
        if batch.is_empty() {
            return Confirmations::ready(Vec::new());
        }
        Confirmations::ready(self.write(batch).await)
    }

    async fn open_writer(&self, _id: WriterId) -> Result<Box<dyn LogWriter>, BusError> {
        if self.is_closed() {
            return Err(BusError::closed());
        }
        Ok(Box::new(FileWriter { bus: self.clone(), broken: false }))
    }

    async fn subscribe(&self, _request: SubscribeRequest) -> Result<Box<dyn Subscription>, BusError> {
        Err(publishing_only())
    }

    fn admin(&self) -> &dyn BusAdmin {
        self
    }

    async fn ping(&self) -> Result<Health, BusError> {
        if self.is_closed() { Err(BusError::closed()) } else { Ok(Health::default()) }
    }

    async fn close(&self) -> Result<(), BusError> {
        self.0.closed.store(true, std::sync::atomic::Ordering::Relaxed);
        Ok(())
    }
}

fn publishing_only() -> BusError {
    BusError::new(ErrorKind::Invalid, "a file bus only stores events: nobody can subscribe to it")
}

/// Stops at the first error, so that nothing lands behind an event that did not.
#[derive(Debug)]
struct FileWriter {
    bus: FileBus,
    broken: bool,
}

impl FileWriter {
    async fn write(&mut self, batch: Vec<Event>) -> Confirmations {
        if self.broken {
            return Confirmations::same(batch.len(), Err(stopped()));
        }
        // Should this call be dropped, what became of the batch is unknown: nothing may land behind it.
        self.broken = true;
        let outcomes = self.bus.write(batch).await;
        self.broken = outcomes.iter().any(Result::is_err);
        Confirmations::ready(outcomes)
    }
}

#[async_trait]
impl LogWriter for FileWriter {
    async fn publish_batch(&mut self, batch: Vec<(Seq, Event)>, _mark: &Mark) -> Confirmations {
        self.write(batch.into_iter().map(|(_, event)| event).collect()).await
    }

    async fn republish(&mut self, batch: Vec<Event>) -> Confirmations {
        self.write(batch).await
    }

    fn position(&self) -> Position {
        Position::default()
    }

    fn high_marks(&self) -> Vec<(Seq, Text)> {
        Vec::new()
    }

    async fn close(&mut self) -> Result<(), BusError> {
        self.broken = true;
        Ok(())
    }
}

#[async_trait]
impl BusAdmin for FileBus {
    async fn apply(&self, topology: &Topology) -> Result<(), BusError> {
        if topology.topics.iter().any(|spec| !spec.groups.is_empty()) {
            return Err(publishing_only());
        }
        Ok(())
    }

    async fn check(&self, topology: &Topology) -> Result<(), BusError> {
        self.apply(topology).await
    }

    async fn topics(&self) -> Result<Vec<TopicSpec>, BusError> {
        let unreadable = |error: io::Error| {
            let message = format!("cannot read the folder {}: {error}", self.0.dir.display());
            BusError::with_source(ErrorKind::Unavailable, message, error)
        };
        let mut topics = Vec::new();
        for entry in fs::read_dir(&self.0.dir).map_err(unreadable)? {
            let name = entry.map_err(unreadable)?.file_name();
            let topic = name.to_str().and_then(|name| name.strip_suffix(".jsonl")).map(Topic::new);
            if let Some(Ok(topic)) = topic {
                topics.push(TopicSpec { topic, partitions: None, groups: Vec::new() });
            }
        }
        topics.sort_by(|one, other| one.topic.cmp(&other.topic));
        Ok(topics)
    }

    async fn groups(&self, _topic: &Topic) -> Result<Vec<Group>, BusError> {
        Ok(Vec::new())
    }

    async fn lag(&self, _topic: &Topic, _group: &Group) -> Result<GroupLag, BusError> {
        Err(publishing_only())
    }

    async fn seek(&self, _topic: &Topic, _group: &Group, _to: SubscribeFrom) -> Result<(), BusError> {
        Err(publishing_only())
    }

    async fn remove_group(&self, _topic: &Topic, _group: &Group) -> Result<(), BusError> {
        Err(publishing_only())
    }

    async fn dead_letters(
        &self,
        _topic: &Topic,
        _group: &Group,
        _after: Option<&str>,
        _limit: usize,
    ) -> Result<Vec<StoredDeadLetter>, BusError> {
        Err(publishing_only())
    }

    async fn remove_dead(&self, _topic: &Topic, _group: &Group, _ids: &[Text]) -> Result<usize, BusError> {
        Err(publishing_only())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::EventBusExt;

    fn event(n: u32) -> Event {
        Event::json("orders", "order.placed", &n).unwrap().id(n).key("k").build().unwrap()
    }

    fn ids(dir: &Path) -> Vec<String> {
        read_events(dir, "orders").unwrap().iter().map(|event| event.id().to_owned()).collect()
    }

    #[tokio::test]
    async fn a_torn_last_line_is_cut_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let open = || -> Arc<dyn EventBus> { Arc::new(FileBus::open(FileConfig { dir: dir.path().into() }).unwrap()) };
        assert!(open().publish_all(vec![event(1), event(2)]).await.iter().all(Result::is_ok));
        let path = dir.path().join("orders.jsonl");
        let whole = fs::read(&path).unwrap();
        for torn in [1, 20, whole.len() / 2 - 1, whole.len() - 1] {
            fs::write(&path, &whole[..torn]).unwrap();
            let before = ids(dir.path());
            open().publish(event(3)).await.unwrap();
            assert_eq!(ids(dir.path()), [before, vec!["3".to_owned()]].concat(), "torn at {torn}");
        }
    }

    /// Catches the mutant that goes on after an error: 2 would stand before 1.
    #[tokio::test]
    async fn a_writer_stops_at_its_first_error() {
        let dir = tempfile::tempdir().unwrap();
        let bus = FileBus::open(FileConfig { dir: dir.path().join("bus") }).unwrap();
        let id = || WriterId {
            log: crate::LogId::random(),
            sink: "main".into(),
            incarnation: "a".into(),
            epoch: 1,
            since: None,
        };
        fs::create_dir(dir.path().join("bus/orders.jsonl")).unwrap();
        let mut writer = bus.open_writer(id()).await.unwrap();
        let outcomes = writer.publish_batch(vec![(Seq(1), event(1))], &Mark::default()).await.all().await;
        assert_eq!(outcomes[0].as_ref().unwrap_err().kind(), ErrorKind::Unavailable);
        fs::remove_dir(dir.path().join("bus/orders.jsonl")).unwrap();
        let outcomes = writer.publish_batch(vec![(Seq(2), event(2))], &Mark::default()).await.all().await;
        assert!(outcomes[0].is_err());
        let mut writer = bus.open_writer(id()).await.unwrap();
        writer.publish_batch(vec![(Seq(1), event(1)), (Seq(2), event(2))], &Mark::default()).await.all().await;
        assert_eq!(ids(&dir.path().join("bus")), ["1", "2"]);
    }

    /// Catches the mutant whose turn ends with the call: the batch of a dropped call would land behind what came later.
    #[test]
    fn a_dropped_call_lands_before_what_follows_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let bus = FileBus::open(FileConfig { dir: dir.path().into() }).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            // Whoever holds the lock keeps the dropped batch from being written.
            let lock = File::create(dir.path().join("orders.jsonl")).unwrap();
            lock.lock().unwrap();
            let mut dropped = bus.publish_batch(vec![event(1), event(2)]);
            assert!(futures_util::poll!(&mut dropped).is_pending(), "it is handed over and not written");
            drop(dropped);
            assert!(bus.0.turn.try_lock().is_err(), "its turn lasts until it is written");
            let mut follows = bus.publish_batch(vec![event(3)]);
            assert!(futures_util::poll!(&mut follows).is_pending());
            lock.unlock().unwrap();
            assert!(follows.await.all().await.iter().all(Result::is_ok));
        });
        drop(runtime);
        assert_eq!(ids(dir.path()), ["1", "2", "3"]);
    }

    /// Catches the mutant that goes on though the fate of an earlier batch is unknown.
    #[tokio::test]
    async fn a_writer_whose_call_was_dropped_writes_nothing_more() {
        let dir = tempfile::tempdir().unwrap();
        let bus = FileBus::open(FileConfig { dir: dir.path().into() }).unwrap();
        let mut writer = FileWriter { bus: bus.clone(), broken: false };
        let turn = bus.0.turn.lock().await;
        assert!(futures_util::poll!(Box::pin(writer.republish(vec![event(1)]))).is_pending());
        drop(turn);
        assert!(writer.republish(vec![event(2)]).await.all().await[0].is_err());
        assert!(ids(dir.path()).is_empty());
    }

    /// Catches the mutant that goes on writing to the file it once opened: what it confirms would be gone with it.
    #[tokio::test]
    async fn a_file_that_was_moved_or_removed_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let bus: Arc<dyn EventBus> = Arc::new(FileBus::open(FileConfig { dir: dir.path().into() }).unwrap());
        let path = dir.path().join("orders.jsonl");
        bus.publish(event(1)).await.unwrap();
        fs::rename(&path, dir.path().join("old.jsonl")).unwrap();
        bus.publish(event(2)).await.unwrap();
        assert_eq!(ids(dir.path()), ["2"]);
        fs::remove_file(&path).unwrap();
        bus.publish(event(3)).await.unwrap();
        assert_eq!(ids(dir.path()), ["3"]);
    }

    #[test]
    fn its_url_has_an_absolute_path_and_no_options() {
        let config = |url: &str| FileConfig::from_url(&url.parse().unwrap());
        assert_eq!(config("file:///var/events").unwrap().dir, Path::new("/var/events"));
        assert!(config("file:///var/events?fsync=off").is_err());
        assert!(config("file://host/events").is_err());
    }
}
