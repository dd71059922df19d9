//! Events from a file or standard input, one JSON object a line.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

use bus_core::Event;
use tokio::sync::mpsc;

use crate::{cli::InputArgs, failure::Failure};

/// Longest line, in bytes.
const LINE_BYTES_MAX: u64 = 16 << 20;
/// Lines read ahead.
const LINES_AHEAD: usize = 1_024;

/// An event, and the number of the line it was read from.
pub(crate) struct Line {
    pub(crate) number: u64,
    pub(crate) event: Event,
}

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
    pub(crate) fn lines(self) -> Result<mpsc::Receiver<Result<Line, Failure>>, Failure> {
        let reader: Box<dyn Read + Send> = match &self {
            Self::Stdin => Box::new(io::stdin()),
            Self::File(path) => Box::new(open(path)?),
        };
        let (sender, receiver) = mpsc::channel(LINES_AHEAD);
        std::thread::spawn(move || {
            let mut lines = Lines { reader: BufReader::with_capacity(1 << 16, reader), number: 0 };
            while let Some(line) = lines.next_event() {
                let ends = line.is_err();
                if sender.blocking_send(line).is_err() || ends {
                    return;
                }
            }
        });
        Ok(receiver)
    }
}

fn open(path: &Path) -> Result<File, Failure> {
    File::open(path).map_err(|error| Failure::usage("input", format!("cannot read {}: {error}", path.display())))
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

    #[test]
    fn a_line_has_a_limit() {
        let long = vec![b'x'; (LINE_BYTES_MAX + 10) as usize];
        assert!(read(&long)[0].as_ref().unwrap_err().contains("longer than"));
    }
}
