//! Events from a file or standard input, one JSON object a line.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use bus_core::Event;
use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
};

use crate::{cli::InputArgs, failure::Failure};

/// Longest line, in bytes.
const LINE_BYTES_MAX: u64 = 16 << 20;
/// Lines read ahead.
const LINES_AHEAD: usize = 1_024;
/// Bytes of their events, roughly.
const BYTES_AHEAD: usize = 4 << 20;

/// An event, and the number of the line it was read from.
pub(crate) struct Line {
    pub(crate) number: u64,
    pub(crate) event: Event,
}

/// A line, or why there are no more, and the room it took while it waited.
pub(crate) type Ahead = (Result<Line, Failure>, OwnedSemaphorePermit);

/// Where events are read from.
#[derive(Clone, Debug)]
pub(crate) enum Input {
    Stdin,
    File(PathBuf),
}

impl Input {
    pub(crate) fn new(args: &InputArgs) -> Self {
        match &args.file {
            Some(path) if path != Path::new("-") => Self::File(path.clone()),
            _ => Self::Stdin,
        }
    }

    /// Starts to read on a thread of its own, so that a signal is heard while nothing comes.
    pub(crate) fn lines(self) -> Result<mpsc::Receiver<Ahead>, Failure> {
        let reader: Box<dyn Read + Send> = match &self {
            Self::Stdin => Box::new(io::stdin()),
            Self::File(path) => Box::new(open(path)?),
        };
        let (sender, receiver) = mpsc::channel(LINES_AHEAD);
        let (room, runtime) = (Arc::new(Semaphore::new(BYTES_AHEAD)), Handle::current());
        std::thread::spawn(move || {
            let mut lines = Lines { reader: BufReader::with_capacity(1 << 16, reader), number: 0 };
            while let Some(line) = lines.next_event() {
                let ends = line.is_err();
                let bytes = line.as_ref().map_or(0, |line| line.event.size_bytes().min(BYTES_AHEAD));
                let Ok(room) = runtime.block_on(Arc::clone(&room).acquire_many_owned(bytes as u32)) else { return };
                if sender.blocking_send((line, room)).is_err() || ends {
                    return;
                }
            }
        });
        Ok(receiver)
    }
}

fn open(path: &Path) -> Result<File, Failure> {
    let wrong = |problem: String| Failure::usage("input", format!("cannot read {}: {problem}", path.display()));
    let file = File::open(path).map_err(|error| wrong(error.to_string()))?;
    // A folder can be opened, and fails only when it is read.
    if file.metadata().is_ok_and(|metadata| metadata.is_dir()) {
        return Err(wrong("it is a folder".to_owned()));
    }
    Ok(file)
}

struct Lines<R> {
    reader: R,
    number: u64,
}

impl<R: BufRead> Lines<R> {
    /// The next line that is not blank.
    fn next_event(&mut self) -> Option<Result<Line, Failure>> {
        loop {
            let mut bytes = Vec::new();
            let read = (&mut self.reader).take(LINE_BYTES_MAX + 2).read_until(b'\n', &mut bytes);
            self.number += 1;
            let number = self.number;
            match read {
                Err(error) => {
                    let message = format!("cannot read the input: {error}");
                    return Some(Err(Failure::runtime("input", message).at_line(number)));
                }
                Ok(0) => return None,
                Ok(_) => {}
            }
            let text = bytes.trim_ascii_end();
            if text.len() as u64 > LINE_BYTES_MAX {
                let message = format!("the line is longer than {LINE_BYTES_MAX} bytes");
                return Some(Err(Failure::runtime("line_too_long", message).at_line(number)));
            }
            if text.trim_ascii_start().is_empty() {
                continue;
            }
            let event = Event::from_json(text);
            let event = event.map_err(|error| Failure::runtime("invalid_event", error.to_string()).at_line(number));
            return Some(event.map(|event| Line { number, event }));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn read(text: &[u8]) -> Vec<Result<u64, String>> {
        let mut lines = Lines { reader: text, number: 0 };
        let mut read = Vec::new();
        while let Some(line) = lines.next_event() {
            let failed = line.is_err();
            read.push(line.map(|line| line.number).map_err(|failure| failure.to_string()));
            if failed {
                break;
            }
        }
        read
    }

    #[test]
    fn blank_lines_count_but_are_passed_over() {
        let good = r#"{"topic":"o","type":"t"}"#;
        let text = format!("{good}\n\n  \r\n{good}\r\n{good}");
        assert_eq!(read(text.as_bytes()), [Ok(1), Ok(4), Ok(5)]);
        assert!(read(b"").is_empty());
    }

    #[test]
    fn a_bad_line_names_itself_and_its_field() {
        let text = "{\"topic\":\"o\",\"type\":\"t\"}\n{\"topic\":\"a/b\",\"type\":\"t\"}\n";
        let read = read(text.as_bytes());
        assert_eq!(read[0], Ok(1));
        let message = read[1].as_ref().unwrap_err();
        assert!(message.starts_with("line 2: `topic`"), "{message}");
    }

    /// Catches the mutant that counts lines alone: it reads on, to a gigabyte of large events.
    #[tokio::test]
    async fn what_is_read_ahead_is_bounded_by_bytes() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        for _ in 0..20 {
            writeln!(file, "{{\"topic\":\"o\",\"type\":\"t\",\"data\":\"{}\"}}", "x".repeat(900_000)).unwrap();
        }
        let mut lines = Input::File(file.path().to_owned()).lines().unwrap();
        let (mut waiting, mut read) = (0, 0);
        while lines.recv().await.is_some() {
            read += 1;
            // Time for the reader to go as far as it may.
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            waiting = waiting.max(lines.len());
        }
        assert_eq!(read, 20, "all of them come");
        assert!((1..=4).contains(&waiting), "{waiting} lines waited");
    }

    #[test]
    fn a_line_has_a_limit() {
        let long = vec![b'x'; (LINE_BYTES_MAX + 10) as usize];
        assert!(read(&long)[0].as_ref().unwrap_err().contains("longer than"));
    }
}
