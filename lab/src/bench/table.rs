//! The rows of a run as they come in: printed at once, kept for the report.
//!
//! Filled by the tables. Refuses to judge; what failed is printed under its row.

use std::fmt::Write as _;
use std::io::Write as _;

use serde_json::Value;

use super::host::Host;
use super::phases::Before;
use super::row::{Row, Stats, ms};

/// Fields that programs had under these names before there were others for the same: the line has them already.
const SAID: [&str; 2] = ["clients", "per_s"];

/// What stands where others' figures do, of what they have none of.
pub const NONE_PUBLISHED: &str = "none published";

/// What is printed while a run goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Show {
    /// Nothing.
    #[default]
    Nothing,
    /// Each row.
    Rows,
    /// The head, and each row.
    HeadAndRows,
}

/// The rows of a run.
#[derive(Debug, Default)]
pub struct Table {
    /// What was measured.
    pub rows: Vec<Row>,
    /// What who reads it must know.
    pub notes: Vec<String>,
    show: Show,
    /// Whether the host is not asked for its phases.
    without_phases: bool,
}

impl Table {
    /// An empty one.
    #[must_use]
    pub fn new(show: Show) -> Self {
        Self { show, ..Self::default() }
    }

    /// An empty one that shows nothing, and leaves the host's metrics alone: to write them takes it as long as a few
    /// requests, and nothing where it counts none.
    #[must_use]
    pub fn of_requests_alone() -> Self {
        Self { without_phases: true, ..Self::default() }
    }

    /// Whether requests alone are to be measured.
    #[must_use]
    pub fn is_of_requests_alone(&self) -> bool {
        self.without_phases
    }

    /// Measures a row, with the phases that the daemon goes through meanwhile.
    ///
    /// # Errors
    /// When `measure` gives up; the row is kept as far as it came.
    pub fn row<T>(
        &mut self,
        host: &Host,
        row: Row,
        measure: impl FnOnce(&mut Row) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        self.rows(host, [row], |[row]| measure(row))
    }

    /// Measures rows whose rounds are the same. Each has the phases of its own operation.
    ///
    /// # Errors
    /// When `measure` gives up; the rows are kept as far as they came.
    pub fn rows<T, const N: usize>(
        &mut self,
        host: &Host,
        mut rows: [Row; N],
        measure: impl FnOnce(&mut [Row; N]) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let before = (!self.without_phases).then(|| Before::now(host));
        let done = measure(&mut rows);
        let phases = before.map(|before| before.until_now(host)).unwrap_or_default();
        for mut row in rows {
            row.spent(&phases);
            if done.is_ok() || !row.times.is_empty() {
                self.push(row);
            }
        }
        done
    }

    /// Adds a row.
    pub fn push(&mut self, row: Row) {
        let mut text = String::new();
        if self.show == Show::HeadAndRows && self.rows.is_empty() {
            text.push_str(&head());
        }
        text.push_str(&line(&row));
        self.rows.push(row);
        if self.show != Show::Nothing {
            print(&text);
        }
    }

    /// Adds what is to be known, once.
    pub fn note(&mut self, text: impl Into<String>) {
        let text = text.into();
        if !self.notes.contains(&text) {
            if self.show != Show::Nothing {
                print(&format!("  note: {text}\n"));
            }
            self.notes.push(text);
        }
    }

    /// What failed in all rows.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.rows.iter().map(|row| row.failures.total()).sum()
    }
}

/// Whoever reads the rows as they come may go away; the run goes on, for its report.
fn print(text: &str) {
    let mut stdout = std::io::stdout().lock();
    if stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).is_err() {
        tracing::warn!("nobody reads the table");
    }
}

/// The head of the table.
#[must_use]
pub fn head() -> String {
    format!(
        "{:<22} {:<12} {:>5} {:>6} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>9} {:>8}  {}\n",
        "ms",
        "case",
        "n",
        "failed",
        "avg",
        "min",
        "p50",
        "p90",
        "p95",
        "p99",
        "max",
        "stddev",
        "wall avg",
        "per s",
        "other hardware"
    )
}

/// A row of it.
#[must_use]
pub fn line(row: &Row) -> String {
    let Row { op, case, times, walls, failures, .. } = row;
    let failed = failures.total();
    let n = u64::try_from(times.len()).unwrap_or(u64::MAX) + failed;
    let mut text = format!("{op:<22} {case:<12} {n:>5} {failed:>6}");
    if let Some(Stats { p50, p90, p95, p99, max, avg, min, stddev }) = Stats::of(times) {
        for time in [avg, min, p50, p90, p95, p99, max, stddev] {
            add(&mut text, format_args!(" {:>8.2}", ms(time)));
        }
    } else {
        for _ in 0..8 {
            add(&mut text, format_args!(" {:>8}", "-"));
        }
    }
    match Stats::of(walls) {
        Some(walls) => add(&mut text, format_args!(" {:>9.2}", ms(walls.avg))),
        None => add(&mut text, format_args!(" {:>9}", "-")),
    }
    match row.per_s() {
        Some(per_s) => add(&mut text, format_args!(" {per_s:>8.1}")),
        None => add(&mut text, format_args!(" {:>8}", "-")),
    }
    let seed = row.seed.map_or_else(|| NONE_PUBLISHED.to_owned(), |seed| seed.text());
    add(&mut text, format_args!("  {seed}"));
    let mut text = text.trim_end().to_owned() + "\n";
    let own = |name: &str, value: &Value| !value.is_array() && !SAID.contains(&name);
    for (name, value) in row.more.iter().filter(|(name, value)| own(name, value)) {
        add(&mut text, format_args!("  {name}: {value}\n"));
    }
    for (error, count) in failures.each() {
        add(&mut text, format_args!("  failed {count} times: {error}\n"));
    }
    text
}

fn add(text: &mut String, what: std::fmt::Arguments<'_>) {
    if text.write_fmt(what).is_err() {
        unreachable!("a string takes what is written to it");
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::net::TcpListener;
    use std::sync::Arc;
    use std::time::Duration;

    use super::super::host::Address;
    use super::super::load::{Failures, Round};
    use super::*;

    #[test]
    fn a_line_has_a_word_under_each_of_the_head() {
        let mut row = Row::new("create", "c=1".to_owned(), 1).beside(1, 0);
        let mut failures = Failures::default();
        failures.add(&anyhow::anyhow!("full"));
        let (wall, times) = (Duration::from_millis(8), vec![Duration::from_millis(4)]);
        // One alone is the mean: it lies nowhere else.
        row.add(Round { wall, times, values: vec![()], failures });
        row.set("clients", 1);
        let text = line(&row);
        let words: Vec<&str> = text.lines().next().unwrap().split_whitespace().collect();
        assert_eq!(words[..5], ["create", "c=1", "2", "1", "4.00"]);
        assert_eq!(words[10..16], ["4.00", "0.00", "8.00", "125.0", "CubeSandbox:", "47.8"]);
        assert_eq!(text.lines().nth(1), Some("  failed 1 times: full"));
        let alone = line(&Row::new("load", "5/s".to_owned(), 1));
        assert!(alone.trim_end().ends_with("-  none published"), "{alone}");
        // Two words more: "wall avg", "other hardware".
        assert_eq!(head().split_whitespace().count(), 18);
    }

    #[test]
    fn a_table_of_requests_alone_asks_the_host_for_nothing_else() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        server.set_nonblocking(true).unwrap();
        let url = format!("http://{}", server.local_addr().unwrap());
        let (api_key, template) = ("key".to_owned(), "base".to_owned());
        let host = Host::new(Address { url, api_key, template }, Arc::default()).unwrap();
        let mut table = Table::of_requests_alone();
        let row = Row::new("create", String::new(), 1);
        let measured = table.row(&host, row, |row| {
            row.times.push(Duration::from_millis(1));
            Ok(7)
        });
        assert_eq!((measured.unwrap(), table.rows.len(), table.rows[0].times.len()), (7, 1, 1));
        assert_eq!(server.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    }

    #[test]
    fn a_note_is_kept_once() {
        let mut table = Table::new(Show::Nothing);
        table.note("a");
        table.note("a");
        assert_eq!(table.notes, ["a"]);
        assert_eq!(table.failed(), 0);
    }
}
