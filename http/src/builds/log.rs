//! The log of a build: written line by line while it runs, read by page.
//!
//! Called by the build and by the status. Refuses lines over [`LINE_BYTES_MAX`], which it cuts, and a log
//! over its bound, whose rest it leaves out and says so.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mica_shards::{BUILD_LOG_BYTES_MAX, Host};
pub use mica_wire::api::{BuildLogEntry as Entry, LogLevel as Level};
use serde::{Deserialize, Serialize};

use crate::rfc3339;

/// The longest line of a command's that is one entry.
const LINE_BYTES_MAX: usize = 4096;
/// Room for the entry that says that the log is full, and for the build's last words.
const RESERVE_BYTES: u64 = 64 * 1024;
/// What is said at most once.
const FULL: &str = "the log of this build is full; what its commands say further is left out";

/// Reads a level as clients write it.
pub fn level(text: &str) -> Option<Level> {
    Some(match text {
        "debug" => Level::Debug,
        "info" => Level::Info,
        "warn" => Level::Warn,
        "error" => Level::Error,
        _ => return None,
    })
}

/// One entry as it is stored: a line of JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Stored {
    t: u64,
    l: Level,
    m: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    s: Option<String>,
}

/// The log of one build that runs.
#[derive(Debug)]
pub struct Log {
    host: Host,
    build: String,
    at: u64,
    full: bool,
    pending: Vec<u8>,
    step: Option<String>,
}

impl Log {
    /// Of a build that begins.
    pub fn new(host: Host, build: String) -> Self {
        Self { host, build, at: 0, full: false, pending: Vec::new(), step: None }
    }

    /// From now on entries are this step's.
    pub fn set_step(&mut self, step: Option<String>) {
        self.step = step;
    }

    /// Adds an entry of the build's own, and writes what is there.
    pub async fn say(&mut self, level: Level, message: &str) {
        self.push(level, message, 0);
        self.flush().await;
    }

    /// Adds a line that a command wrote. Written with the next [`Self::flush`].
    pub fn line(&mut self, level: Level, line: &str) {
        self.push(level, line, RESERVE_BYTES);
    }

    /// Writes what is there. That it cannot is no reason to end a build.
    pub async fn flush(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let (build, at, bytes) = (self.build.clone(), self.at, std::mem::take(&mut self.pending));
        self.at += u64::try_from(bytes.len()).unwrap_or(0);
        let written =
            self.host.with_builds(move |builds| Ok(builds.write_log(&build, at, &bytes)?));
        if !matches!(written.await, Ok(Ok(()))) {
            tracing::warn!(build = self.build, "the log of a build has a gap");
        }
    }

    fn push(&mut self, level: Level, message: &str, reserve: u64) {
        if self.full && reserve > 0 {
            return;
        }
        let bytes = encoded(level, message, self.step.clone());
        let pending = u64::try_from(self.pending.len() + bytes.len()).unwrap_or(u64::MAX);
        if self.at.saturating_add(pending).saturating_add(reserve) <= BUILD_LOG_BYTES_MAX {
            self.pending.extend(bytes);
        } else if reserve > 0 {
            self.full = true;
            self.pending.extend(encoded(Level::Warn, FULL, None));
        }
    }
}

fn encoded(level: Level, message: &str, step: Option<String>) -> Vec<u8> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let t = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
    let message = message.trim_end_matches(['\r', '\n']);
    let end = message.floor_char_boundary(LINE_BYTES_MAX);
    let stored = Stored { t, l: level, m: message[..end].to_owned(), s: step };
    // A string and numbers always encode.
    let mut bytes = serde_json::to_vec(&stored).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

/// Entries of at least `level`, from `offset` on. A line that was cut off by the host's end is left out.
pub fn page(log: &[u8], level: Level, offset: usize, limit: usize) -> Vec<Entry> {
    entries(log).filter(|entry| entry.level >= level).skip(offset).take(limit).collect()
}

/// The last entries of a step, of all when there is none.
pub fn tail(log: &[u8], step: Option<&str>, most: usize) -> Vec<Entry> {
    let of_step = |entry: &Entry| step.is_none() || entry.step.as_deref() == step;
    let mut all: Vec<Entry> = entries(log).filter(of_step).collect();
    all.split_off(all.len().saturating_sub(most))
}

/// Every entry.
pub fn entries(log: &[u8]) -> impl DoubleEndedIterator<Item = Entry> + '_ {
    let whole = log.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    log[..whole].split(|byte| *byte == b'\n').filter_map(|line| {
        let stored: Stored = serde_json::from_slice(line).ok()?;
        let timestamp = rfc3339::format(UNIX_EPOCH + Duration::from_millis(stored.t));
        Some(Entry { timestamp, message: stored.m, level: stored.l, step: stored.s })
    })
}

/// Bytes of a command on their way to becoming lines.
#[derive(Debug, Default)]
pub struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    /// Takes bytes, and gives each whole line. One that is too long is several.
    pub fn push(&mut self, bytes: &[u8], mut line: impl FnMut(&str)) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            for piece in piece.chunks(LINE_BYTES_MAX) {
                self.rest.extend_from_slice(piece);
                if piece.ends_with(b"\n") || self.rest.len() >= LINE_BYTES_MAX {
                    line(&String::from_utf8_lossy(&self.rest));
                    self.rest.clear();
                }
            }
        }
    }

    /// What is left when there are no more bytes.
    pub fn end(&mut self, mut line: impl FnMut(&str)) {
        if !self.rest.is_empty() {
            line(&String::from_utf8_lossy(&std::mem::take(&mut self.rest)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log() -> Vec<u8> {
        let mut log = Vec::new();
        for (level, message, step) in [
            (Level::Info, "one", Some("1")),
            (Level::Debug, "two\r\n", Some("1")),
            (Level::Error, "three", Some("2")),
        ] {
            log.extend(encoded(level, message, step.map(str::to_owned)));
        }
        log
    }

    #[test]
    fn pages_go_on_where_the_last_one_ended() {
        let log = log();
        let messages = |level, offset, limit| {
            let page = page(&log, level, offset, limit);
            page.into_iter().map(|entry| entry.message).collect::<Vec<_>>()
        };
        assert_eq!(messages(Level::Debug, 0, 2), ["one", "two"]);
        assert_eq!(messages(Level::Debug, 2, 2), ["three"]);
        assert_eq!(messages(Level::Debug, 3, 2), Vec::<String>::new());
        assert_eq!(messages(Level::Info, 1, 9), ["three"]);
        assert_eq!(tail(&log, Some("1"), 1)[0].message, "two");
        assert_eq!(tail(&log, None, 9).len(), 3);
        let mut torn = log.clone();
        torn.truncate(log.len() - 3);
        assert_eq!(page(&torn, Level::Debug, 0, 9).len(), 2, "a line that was cut off");
        assert!(encoded(Level::Info, &"\u{e9}".repeat(9000), None).len() < 5000);
    }

    #[test]
    fn lines_come_whole_and_bounded() {
        let (mut lines, mut seen) = (Lines::default(), Vec::new());
        for piece in [&b"a\nb"[..], b"c\n", b"\xff", b""] {
            lines.push(piece, |line| seen.push(line.to_owned()));
        }
        lines.end(|line| seen.push(line.to_owned()));
        assert_eq!(seen, ["a\n", "bc\n", "\u{fffd}"]);
        seen.clear();
        lines.push(&[b'x'; 10_000], |line| seen.push(line.to_owned()));
        assert_eq!(seen.len(), 2);
    }
}
