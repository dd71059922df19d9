//! Results on stdout; what is for people only on stderr.

use std::{
    io::{self, IsTerminal, Write},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::cli::Format;

/// Longest text in a column whose contents anybody chooses.
const COLUMN_MAX: usize = 60;
/// Longest cell, in characters: an event's id fits, to be copied; what is no event may be any length.
const CELL_MAX: usize = 300;

/// Whether stderr shows colours: only on a terminal, and not where `NO_COLOR` asks for none.
pub(crate) fn has_colour() -> bool {
    io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Writes a line to stderr. Nobody can be told if that fails.
pub(crate) fn to_stderr(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Writes a line to stdout.
pub(crate) fn line(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{text}")?;
    stdout.flush()
}

/// Writes a value as one line of JSON to stdout.
pub(crate) fn json<T: Serialize>(value: &T) -> io::Result<()> {
    line(&serde_json::to_string(value).map_err(io::Error::other)?)
}

/// Writes a result: for people as `text` says, for scripts as JSON.
pub(crate) fn result<T: Serialize>(format: Format, value: &T, text: impl FnOnce(&T) -> String) -> io::Result<()> {
    match format {
        Format::Json => json(value),
        Format::Text => line(&text(value)),
    }
}

/// Columns for people, as wide as they need to be.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(head: &[&str]) -> Self {
        Self { rows: vec![head.iter().map(|name| (*name).to_owned()).collect()] }
    }

    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells.iter().map(|cell| cut_at(&printable(cell), CELL_MAX)).collect());
    }

    pub(crate) fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let render = |row: &Vec<String>| {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        };
        self.rows.iter().map(render).collect::<Vec<_>>().join("\n")
    }
}

/// Text with its control characters escaped: anybody's key must not move a cursor or break a table.
pub(crate) fn printable(text: &str) -> String {
    let mut printable = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            printable.extend(c.escape_default());
        } else {
            printable.push(c);
        }
    }
    printable
}

/// Text that is cut where it is longer than a column should be.
pub(crate) fn cut(text: &str) -> String {
    cut_at(text, COLUMN_MAX)
}

fn cut_at(text: &str, chars_max: usize) -> String {
    match text.char_indices().nth(chars_max) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

/// A bar on a terminal, nothing elsewhere and with JSON. Of unknown length without `total`.
pub(crate) fn progress(format: Format, total: Option<u64>, what: &'static str) -> ProgressBar {
    if format == Format::Json || !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr_with_hz(10));
    let template = match total {
        Some(_) => "{msg} {wide_bar} {human_pos}/{human_len} {per_sec}",
        None => "{msg} {spinner} {human_pos} {per_sec}",
    };
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    bar.set_style(style);
    bar.set_message(what);
    bar
}

/// Seconds with milliseconds, as JSON has them.
pub(crate) fn seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1_000.0).round() / 1_000.0
}

/// A time span for people: `850ms`, `12.3s`, `4m 10s`, `3h 5m`, `2d 1h`.
pub(crate) fn span(duration: Duration) -> String {
    match duration.as_secs() {
        0 => format!("{}ms", duration.as_millis()),
        seconds @ 1..60 => format!("{seconds}.{}s", duration.subsec_millis() / 100),
        seconds @ 60..3_600 => format!("{}m {}s", seconds / 60, seconds % 60),
        seconds @ 3_600..86_400 => format!("{}h {}m", seconds / 3_600, seconds % 3_600 / 60),
        seconds => format!("{}d {}h", seconds / 86_400, seconds % 86_400 / 3_600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_need_to_be() {
        let mut table = Table::new(&["sink", "backlog"]);
        table.row(vec!["main".into(), "7".into()]);
        table.row(vec!["verylong".into(), String::new()]);
        assert_eq!(table.render(), "sink      backlog\nmain      7\nverylong");
    }

    #[test]
    fn what_anybody_chose_neither_breaks_nor_widens_a_table() {
        let mut table = Table::new(&["key", "type"]);
        table.row(vec!["k\n4\u{1b}[2J\u{9b}ä".into(), "t".into()]);
        assert_eq!(table.render().lines().nth(1), Some("k\\n4\\u{1b}[2J\\u{9b}ä  t"));
        assert_eq!(cut(&"ä".repeat(61)), format!("{}…", "ä".repeat(60)));
        assert_eq!(cut(&"ä".repeat(60)), "ä".repeat(60));
        // Wider than a format can say: it panicked.
        table.row(vec!["i".repeat(70_000), "t".into()]);
        assert_eq!(table.render().lines().last().map(|line| line.chars().count()), Some(CELL_MAX + 1 + 2 + 1));
    }

    #[test]
    fn spans_read_well() {
        let text = |millis| span(Duration::from_millis(millis));
        assert_eq!(
            [text(850), text(12_300), text(250_000), text(11_100_000), text(176_400_000)],
            ["850ms", "12.3s", "4m 10s", "3h 5m", "2d 1h"]
        );
    }
}
